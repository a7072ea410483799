"""PEFT's own tests, from a version's source distribution, with the backend and without.

    python -m tests.conformance [--versions VERSION ...] [--work DIR] [--processes N]

Both ends of the supported range by default: the installed PEFT, and the oldest that pyproject.toml allows. A
version that is not the installed one is installed into the work folder, over the same other packages.

Exactly the tests that fail without the backend may fail with it: those that need the hub, and those of an old
PEFT that newer packages break. The backend's operators must have run in PEFT's MiCA tests and in no other; in
a third run, with ``enable(lora=True)``, in those of plain LoRA, too. Exit status 0 if so.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUPPORT = ROOT / "tests" / "support"
FILES = (
    "test_custom_models.py",
    "test_initialization.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_riemannian_lora.py",
    "test_tuners_utils.py",
)
# The tests that are repeated for every kind of adapter (18 000, in test_custom_models.py) run for LoRA alone,
# all others run. The dashes matter: `-k` searches and ignores case, and AdaLoraConfig has a LoraConfig in it.
EXPRESSION = "(-LoraConfig-) or (not Config-)"
# PEFT's `hub_online_once` takes HF_HUB_OFFLINE back, and a test that needs the hub then waits and tries
# again: a run took 19 minutes and computed for two and a half. Without it the same tests fail, at once.
CONFTEST = """from contextlib import nullcontext

import peft

from . import testing_utils

assert peft.__version__ == {version!r}, peft
testing_utils.hub_online_once = lambda model_id: nullcontext()
"""


MODES = ("alone", "with mica.fast", "with lora=True")


class Outcome(NamedTuple):
    kind: str  # passed, skipped, failure or error
    calls: int  # of the backend's operators


def oldest_supported() -> str:
    """The lower bound of pyproject.toml's range, as a release: "0.20.0"."""
    (bound,) = re.findall(r'"peft>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return ".".join([*bound.split("."), "0", "0"][:3])


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "-q", "--no-deps"], check=True)


def peft_tests(work: Path, peft: str) -> Path:
    """The folder of that PEFT's source distribution, with `tests` in it made importable as a package."""
    root = work / f"peft-{peft}"
    if not root.exists():
        work.mkdir(parents=True, exist_ok=True)
        pip("download", "--no-binary", ":all:", "-d", str(work), f"peft=={peft}")
        with tarfile.open(f"{root}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    # the source distribution leaves both out
    (root / "tests" / "__init__.py").touch()
    (root / "tests" / "conftest.py").write_text(CONFTEST.format(version=peft))
    return root


def peft_package(work: Path, peft: str) -> Path | None:
    """A folder for the Python path with that PEFT in it; None for the installed one."""
    if peft == version("peft"):
        return None
    folder = work / f"peft-{peft}-installed"
    if not (folder / f"peft-{peft}.dist-info").exists():
        pip("install", "--upgrade", "--target", str(folder), f"peft=={peft}")
    return folder


def run(root: Path, package: Path | None, processes: int, mode: str) -> dict[str, Outcome]:
    report = root / f"report-{MODES.index(mode)}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-o", "addopts=", "-n", str(processes), f"--junitxml={report}", "-k", EXPRESSION]
    command += ["-p", "peft_plugin"] if mode != "alone" else []
    command += [f"tests/{file}" for file in FILES if (root / "tests" / file).exists()]
    folders = (package, SUPPORT, os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(str(folder) for folder in folders if folder)
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["CONFORMANCE_MODE"] = mode
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise SystemExit(f"pytest did not run:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        calls = [int(p.get("value")) for p in case.iter("property") if p.get("name") == "calls"]
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = Outcome(
            kinds[0] if kinds else "passed", sum(calls)
        )
    return outcomes


def is_mica(test: str) -> bool:
    return re.search(r"mica(?!l)", test, re.IGNORECASE) is not None


def differences(stock: dict[str, Outcome], ours: dict[str, Outcome], mode: str) -> list[str]:
    """What is not as it should be, a line each."""
    includes_lora = mode == "with lora=True"
    lines = []
    for test in sorted(stock.keys() | ours.keys()):
        before, after = (tests.get(test, Outcome("missing", 0)) for tests in (stock, ours))
        if before.kind != after.kind:
            lines.append(f"CHANGED {test}: {before.kind} -> {after.kind}")
        if after.calls and not is_mica(test) and not includes_lora:
            lines.append(f"WRONG {test}: the operators ran {after.calls} times, and this is no MiCA test")
    if not any(outcome.calls for test, outcome in ours.items() if is_mica(test) != includes_lora):
        lines.append("WRONG: the operators did not run in any test")
    return lines


def conform(work: Path, peft: str, processes: int) -> bool:
    """All runs of one version and their summary, printed. Whether they agree."""
    root, package, runs = peft_tests(work, peft), peft_package(work, peft), {}
    for mode in MODES:
        start = time.monotonic()
        runs[mode] = run(root, package, processes, mode)
        seconds = time.monotonic() - start
        print(f"PEFT {peft} {mode}, {seconds:.0f} s")
        kinds = Counter(f"{kind}, operators ran: {calls > 0}" for kind, calls in runs[mode].values())
        for kind, count in sorted(kinds.items()):
            print(f"    {count} {kind}", flush=True)
    alone, *others = MODES
    lines = [f"{mode}: {line}" for mode in others for line in differences(runs[alone], runs[mode], mode)]
    for line in lines:
        print(f"  {line}")
    outcome = "FAILED" if lines else "the same outcomes with the backend as without"
    print(f"conformance, PEFT {peft}: {outcome}", flush=True)
    return not lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=[version("peft"), oldest_supported()])
    parser.add_argument("--work", type=Path, default=Path("build/conformance"))
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    args = parser.parse_args()
    agree = [conform(args.work.resolve(), peft, args.processes) for peft in dict.fromkeys(args.versions)]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
