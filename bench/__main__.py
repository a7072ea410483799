"""``python -m bench``: run the suites, write results, tables and plots to ``bench/results/<machine>/``."""

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

from bench.harness import SIZES, instructions
from bench.report import write
from bench.results import fold

HERE = Path(__file__).resolve().parent


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    brand = cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()
    words = re.findall(r"\w+", re.sub(r"\(\w+\)", " ", brand.lower()))  # without (R) and (TM)
    kinds = [instructions()] if instructions() else []
    return "-".join([*words, *kinds, str(torch.get_num_threads()), "threads"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", help="3 minutes, not 15")
    size.add_argument(
        "--full", dest="size", action="store_const", const="full", help="more shapes: 40 minutes"
    )
    parser.add_argument("-k", default="", help="pytest expression: run only these")
    parser.add_argument("--name", help="of the result files (default: today, and -quick or -full)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / machine())
    args = parser.parse_args()
    size = args.size or "default"
    assert size in SIZES
    name = args.name or "-".join([str(date.today()), *([] if size == "default" else [size])])
    args.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", str(HERE), "-c", str(HERE / "pytest.ini"), "-k", args.k]
    # Two thread pools that spin (OpenMP's of PyTorch, OpenBLAS's of SciPy) would take turns on the cores.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ, "MICA_BENCH_SIZE": size}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.json"
        done = subprocess.run([*command, f"--benchmark-json={raw}"], env=environment)
        if not raw.exists() or not raw.stat().st_size:
            print("bench: nothing was timed", file=sys.stderr)
            return done.returncode or 1
        result = fold(json.loads(raw.read_text()))
    file = args.output / f"{name}.json"
    result.save(file)
    print(write(file))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
