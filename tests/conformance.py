"""PEFT's own tests, from the source distribution of the installed version, with the backend and without.

    python tests/conformance.py [--work DIR]

Two selections: PEFT's MiCA tests, where the backend's operators must have run, and its plain LoRA tests of
`test_custom_models.py`, where they must not. In both, exactly the tests that fail without the backend may
fail with it. Exit status 0 if so.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent / "support"
MICA_FILES = ("test_custom_models.py", "test_initialization.py", "test_lora_variants.py")
SELECTIONS = {  # name: (files, -k expression, do the operators have to run)
    "MiCA": (MICA_FILES, "mica or MiCA", True),
    "plain LoRA": (
        ("test_custom_models.py",),
        "TestPeftCustomModel and (Vanilla or Embedding or Conv1D) and LoRA and not (MiCA or DoRA)",
        False,
    ),
}


def peft_tests(work: Path) -> Path:
    """The `tests` folder of the installed PEFT's source distribution, made importable as a package."""
    name = f"peft-{version('peft')}"
    if not (work / name).exists():
        work.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "-d", str(work), name.replace("-", "==")], check=True)
        with tarfile.open(work / f"{name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    for module in ("__init__.py", "conftest.py"):  # the source distribution leaves both out
        (work / name / "tests" / module).touch()
    return work / name


def run(root: Path, files: tuple[str, ...], expression: str, backend: bool) -> tuple[dict[str, str], str]:
    """Outcome of each test, and the summary lines."""
    report = root / f"report-{'mica' if backend else 'stock'}.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore",
        "-o",
        "addopts=",
    ]
    command += ["-p", "peft_plugin"] if backend else []
    command += [f"--junitxml={report}", "-k", expression, *(f"tests/{file}" for file in files)]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"pytest did not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    lines = [
        line for line in done.stdout.splitlines() if re.search(r"calls of mica|\d+ passed|\d+ failed", line)
    ]
    return outcomes, "\n    ".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/conformance"))
    root, good = peft_tests(parser.parse_args().work.resolve()), True
    for name, (files, expression, must_run) in SELECTIONS.items():
        stock, stock_lines = run(root, files, expression, backend=False)
        ours, our_lines = run(root, files, expression, backend=True)
        changed = sorted(test for test in stock.keys() | ours.keys() if stock.get(test) != ours.get(test))
        ran = "calls of mica's operators: none" not in our_lines
        print(f"{name}: stock PEFT {version('peft')}\n    {stock_lines}\n  mica.fast\n    {our_lines}")
        for test in changed:
            print(f"  CHANGED {test}: {stock.get(test)} -> {ours.get(test)}")
        if ran != must_run:
            print(f"  WRONG: the operators {'ran' if ran else 'did not run'} in the {name} tests")
        good = good and bool(ours) and not changed and ran == must_run
    print("conformance: " + ("the same outcomes with the backend as without" if good else "FAILED"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
