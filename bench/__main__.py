"""``python -m bench``: run the suites, write raw results and tables to ``bench/results/<machine>/``."""

import argparse
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import cpuinfo  # pytest-benchmark's own
import torch

from bench.report import report

HERE = Path(__file__).resolve().parent


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    brand = cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()
    words = re.findall(r"\w+", re.sub(r"\(\w+\)", " ", brand.lower()))  # without (R) and (TM)
    return "-".join([*words, str(torch.get_num_threads()), "threads"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", default="", help="pytest expression: run only these")
    parser.add_argument("--name", default=str(date.today()), help="of the result files (default: today)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / machine())
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    raw = args.output / f"{args.name}.json"
    command = [sys.executable, "-m", "pytest", str(HERE), "-c", str(HERE / "pytest.ini"), "-k", args.k]
    done = subprocess.run([*command, f"--benchmark-json={raw}"])
    if done.returncode == 0:
        text = report(raw)
        raw.with_suffix(".md").write_text(text)
        print(text)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
