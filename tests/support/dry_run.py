"""A suite of the benchmarks as on an accelerator, without one: interpreted kernels, tiny shapes, no clock."""

from pathlib import Path
from typing import NamedTuple

import torch

from bench.results import journal
from bench.results.schema import Result
from mica.paths.products import has_native
from tests.support.processes import ROOT, start

# What a run on this processor measures: without instructions for bf16 nothing is timed in it.
_CELL = "1024-tokens-576x576-r16-bfloat16" if has_native(torch.bfloat16) else "1-tokens-576x576-r16-float32"
CELL = f"MiCA-{_CELL}"


class DryRun(NamedTuple):
    code: int
    text: str
    result: Result


def dry_run(folder: Path, files: str, *arguments: str, injected: str = "", **environment: str) -> DryRun:
    """Run suites in a separate process; ``injected``: Python that breaks something there first."""
    (folder / "injected.py").write_text(injected)
    entries = folder / "journal.jsonl"
    entries.unlink(missing_ok=True)
    settings = {"MICA_BENCH_SIZE": "dry", "TRITON_INTERPRET": "1", "MICA_BACKEND": "triton"}
    settings[journal.VARIABLE] = str(entries)
    suites = [ROOT / "bench" / "suites" / file for file in files.split()]
    done = start("pytest", *suites, "-p", "injected", *arguments, path=folder, **settings | environment)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return DryRun(done.returncode, done.stdout, journal.fold(journal.read(entries), {}))
