"""A suite of the benchmarks as on an accelerator, without one: interpreted kernels, tiny shapes, no clock."""

from pathlib import Path
from typing import NamedTuple

import torch

from bench.results import journal
from bench.results.schema import Result
from mica.paths.products import has_native
from tests.support.processes import ROOT, start

# What a run on this processor measures: without instructions for bf16 nothing is timed in it.
CELL = "1024x576x576-r16-bfloat16" if has_native(torch.bfloat16) else "1x576x576-r16-float32"


class DryRun(NamedTuple):
    code: int
    text: str
    result: Result
    outcomes: dict[str, str]  # test, without its file's name -> outcome
    whys: dict[str, str]  # the same for those that did not pass -> why


def dry_run(folder: Path, files: str, *arguments: str, injected: str = "", **environment: str) -> DryRun:
    """Run them in a separate process; ``injected``: Python that breaks something there first.

    ``files``: of ``bench/suites``, or of ``tests/device`` if they are tests.
    """
    (folder / "injected.py").write_text(injected)
    within = ROOT / "tests" / "device" if files.startswith("test_") else ROOT / "bench" / "suites"
    settings = {"MICA_BENCH_SIZE": "dry", "TRITON_INTERPRET": "1", "MICA_BACKEND": "triton"}
    settings[journal.VARIABLE] = str(folder / "journal.jsonl")
    command = [
        "pytest",
        *(within / file for file in files.split()),
        "-p",
        "injected",
        *([] if files.startswith("bench_") else ["-p", "bench.measure.watching"]),
        *arguments,
    ]
    done = start(*command, path=folder, **settings | environment)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    entries = journal.read(folder / "journal.jsonl")
    tests = {entry["name"].partition("::")[2]: entry for entry in entries if entry["kind"] == "test"}
    outcomes = {name: entry["outcome"] for name, entry in tests.items()}
    whys = {name: entry["why"] for name, entry in tests.items() if "why" in entry}
    return DryRun(done.returncode, done.stdout, journal.fold(entries, {}), outcomes, whys)
