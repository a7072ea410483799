"""The mutation check (``make mutants``): small wrong edits, each of which must turn the tests red.

Every edit is made in a copy of the tree of its own, and the tests that mirror the edited file run there until
the first failure. An edit that stays green is a hole in the tests; one whose place is gone has to be renewed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.support.mutants import MUTANTS
from tests.support.mutants.edits import Mutant

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kernels", "mica", "tests", "bench", "pyproject.toml")
TIMEOUT = {False: 300, True: 1500}  # seconds, without and with slow tests: a mutant may loop
# Imported once, before the first fork: they take 6 s of the 12 that the tests of a mutant otherwise do.
LIBRARIES = ("pytest", "hypothesis", "numpy", "torch", "triton.language", "transformers.integrations", "peft")
OWN = ("bench", "mica", "tests")
NOTHING_RAN = 5  # pytest's exit status where no test was collected: all that are named are slow
# Without an edit these must pass: where the copy or the fork breaks the tests, every mutant would look red.
CONTROL = [
    "tests/kernels/test_split_k.py",
    "tests/mica/ops/test_recompute.py",
    "tests/mica/ops/test_routing.py",
    "tests/mica/fast/test_calls.py",
]

_folder: tempfile.TemporaryDirectory  # of this worker: a copy of the tree, with one mutant at a time


def _prepare() -> None:
    """Runs once in each worker."""
    global _folder
    _folder = tempfile.TemporaryDirectory()
    for name in COPIED:
        source, copy = ROOT / name, Path(_folder.name) / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy, symlinks=True, ignore=ignored)
        else:
            shutil.copy(source, copy)


def run(mutant: Mutant) -> tuple[str, float]:
    """("red", "late", "GREEN" or what is wrong with the entry, seconds).

    "late": `make test` passes with the edit, or has no test of the file; the nightly tests do not pass.
    """
    start, file = time.monotonic(), Path(_folder.name) / mutant.file
    try:
        before = file.read_text()
        file.write_text(mutant.applied(before))
    except (LookupError, OSError) as error:
        return str(error), 0.0
    try:
        state = _state(mutant.tests)
    finally:
        file.write_text(before)
    return state, time.monotonic() - start


def _state(tests: list[str]) -> str:
    status = outcome(tests)
    if _is_red(status):
        return "red"
    if status in (0, NOTHING_RAN):
        status = outcome(tests, slow=True)
        if _is_red(status):
            return "late"
    return "GREEN" if status == 0 else f"pytest exits with {status}"


def _is_red(status: int) -> bool:
    # 1: tests failed; 2: an import failed; below 0: it crashed, as an access far outside does, or looped.
    # Anything else (no tests, a usage error) proves nothing.
    return status in (1, 2) or status < 0


def outcome(tests: list[str], slow: bool = False) -> int:
    """pytest's exit status in this worker's copy of the tree, below 0 where a signal ended it."""
    child = os.fork()
    if not child:
        _test(tests, slow)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what its tests have started
    return status


def _test(tests: list[str], slow: bool) -> None:
    """In a forked process, which it ends: pytest's exit status is its own."""
    os.setsid()
    signal.alarm(TIMEOUT[slow])
    # Tests that start processes would fail with any edit: the children of a pool must not have children
    multiprocessing.current_process()._config["daemon"] = False
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    sys.path[:] = [_folder.name, *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = True
    os.chdir(_folder.name)
    os.environ["PYTHONPATH"] = _folder.name
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import pytest

    options = ["--full"] if slow else ["-m", "not slow and not weekly"]
    os._exit(int(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *options, *tests])))


def sample(mutants: list[Mutant], number: int) -> list[Mutant]:
    """So many, chosen by the commit: of the files of its last 20 commits, but at least a third of others."""
    commit = _git("rev-parse", "HEAD")
    changed = set(_git("log", "-20", "--name-only", "--format=").split())
    by_commit = sorted(mutants, key=lambda mutant: hashlib.sha256(f"{commit} {mutant}".encode()).digest())
    first = [m for m in by_commit if changed & {m.file, *m.tests}][: number * 2 // 3]
    others = [m for m in by_commit if m not in first][: number - len(first)]
    print(
        f"{len(first) + len(others)} of {len(mutants)} mutants, {len(first)} of files changed of late",
        flush=True,
    )
    return sorted(first + others, key=mutants.index)


def _git(*arguments: str) -> str:
    """What git says; nothing outside a checkout."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="only mutants whose file, function or edit contains one")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, chosen by the commit")
    parser.add_argument("--draw", type=int, metavar="N", help="N of them, drawn from all by --seed")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="printed with --draw")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(w in " ".join(m[:4]) for w in args.words)]
    if args.sample:
        chosen = sample(chosen, args.sample)
    if args.draw:
        print(f"seed {args.seed}", flush=True)
        chosen = random.Random(args.seed).sample(chosen, min(args.draw, len(chosen)))
    # as tests/conftest.py has it, before Triton is imported
    os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    os.environ["MICA_TESTS_SHRINK"] = "0"
    for library in LIBRARIES:
        importlib.import_module(library)
    states = Counter()
    with multiprocessing.get_context("fork").Pool(args.processes, _prepare) as pool:
        if pool.apply(outcome, (CONTROL,)) != 0:
            print(f"the tests of {', '.join(CONTROL)} fail without any edit")
            return 1
        for mutant, (state, seconds) in zip(chosen, pool.imap(run, chosen), strict=True):
            edit = " -> ".join(" ".join(text.split()) or "nothing" for text in (mutant.old, mutant.new))
            print(f"{state:6} {seconds:4.0f} s  {mutant.file}: {mutant.function}: {edit[:100]}", flush=True)
            states[state] += 1
    bad = len(chosen) - states["red"] - states["late"]
    print(
        f"{len(chosen)} mutants, {states['red']} red, {states['late']} red only by slow tests or cases that "
        f"`make test` leaves out, {bad} not"
    )
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
