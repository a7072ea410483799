"""``python -m bench``: run the suites, write results, tables and plots to ``bench/results/<machine>/``.

Each suite has a process of its own, so that none works in the memory, or with the threads, that another left.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import cpuinfo  # pytest-benchmark's own
import torch

from bench.harness import instructions, limit
from bench.report import write
from bench.results import fold, joined

HERE = Path(__file__).resolve().parent


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    brand = cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()
    words = re.findall(r"\w+", re.sub(r"\(\w+\)", " ", brand.lower()))  # without (R) and (TM)
    kinds = [instructions()] if instructions() else []
    kinds += [f"as-{limit().lower()}"] if limit() else []
    return "-".join([*words, *kinds, str(torch.get_num_threads()), "threads"])


NOTHING_SELECTED = 5  # pytest's exit status


def pytest(path: Path, selection: str) -> list[str]:
    return [sys.executable, "-m", "pytest", str(path), "-c", str(HERE / "pytest.ini"), "-k", selection]


def suites(selection: str, environment: dict[str, str]) -> list[Path]:
    """The files of those that ``selection`` (``-k``) takes tests of."""
    files = sorted(HERE.glob("bench_*.py"))
    if not selection:
        return files
    listing = subprocess.run(
        [*pytest(HERE, selection), "--collect-only"], env=environment, capture_output=True, text=True
    ).stdout
    return [file for file in files if f"{file.name}::" in listing]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="a look, 8 minutes")
    size.add_argument(
        "--full", dest="size", action="store_const", const="full", help="more shapes, much longer"
    )
    parser.add_argument("-k", default="", help="pytest expression: run only these")
    parser.add_argument("--name", help="of the result files (default: today, and -quick or -full)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / machine())
    args = parser.parse_args()
    size = args.size or "default"
    name = args.name or "-".join([str(date.today()), *([] if size == "default" else [size])])
    args.output.mkdir(parents=True, exist_ok=True)
    # Two thread pools that spin (OpenMP's of PyTorch, OpenBLAS's of SciPy) would take turns on the cores.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "MICA_BENCH_SIZE": size}
    found, refused, failed = [], [], False
    with tempfile.TemporaryDirectory() as folder:
        for suite in suites(args.k, environment):
            print(suite.name, flush=True)
            raw, refusals = (Path(folder) / f"{suite.stem}{end}.json" for end in ("", "-refused"))
            environment["MICA_BENCH_REFUSED"] = str(refusals)
            done = subprocess.run([*pytest(suite, args.k), f"--benchmark-json={raw}"], env=environment)
            failed |= done.returncode not in (0, NOTHING_SELECTED)
            if raw.exists() and raw.stat().st_size:
                found.append(fold(json.loads(raw.read_text())))
            if refusals.exists():
                refused += json.loads(refusals.read_text())
    if not found:
        print("bench: nothing was timed", file=sys.stderr)
        return 1
    file = args.output / f"{name}.json"
    joined(found, refused).save(file)
    print(write(file))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
