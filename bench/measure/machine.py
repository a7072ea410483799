"""Which machine a run is on, the size of the run, and what its numbers depend on."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import cpuinfo  # pytest-benchmark's own
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a run on an accelerator does, without one, on tiny shapes
IS_DRY = os.environ.get("MICA_BENCH_SIZE") == "dry"
ON_ACCELERATOR = DEVICE == "cuda" or IS_DRY
# On a CPU the CPU time of one thread is measured; of more, which OMP_NUM_THREADS may ask for, the wall
# clock, since threads that spin would count.
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
IS_CPU_TIME = DEVICE == "cpu" and THREADS == 1
# A process of `bench.suites.bench_fresh` has PyTorch's default
if DEVICE == "cpu" and "MICA_BENCH_FRESH" not in os.environ:
    torch.set_num_threads(THREADS)
LIBRARIES = ("torch", "peft", "transformers", "triton", "bitsandbytes")


def instructions() -> str:
    """For matrix products in bf16 on this CPU: they decide what an adapter costs there. "" without any."""
    if limit():
        return ""
    flags = _cpu().get("flags", [])
    if "amx_bf16" in flags:
        return "amx"
    if "avx512_bf16" in flags:
        return "avx512-bf16"
    return ""


def limit() -> str:
    """The latest instructions that oneDNN may use in this run, like "AVX2"; "" without a limit."""
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "")


def _brand() -> str:
    return _cpu().get("brand_raw") or platform.machine()


@functools.cache
def _cpu() -> dict:
    """0.2 s: a process of its own."""
    return cpuinfo.get_cpu_info()


def folder() -> str:
    """The name of this machine's folder of results."""
    if DEVICE == "cuda":
        return device_folder(torch.cuda.get_device_name())
    words = re.findall(r"\w+", re.sub(r"\(\w+\)", " ", _brand().lower()))  # without (R) and (TM)
    if instructions():
        words.append(instructions())
    if limit():
        words.append(f"as-{limit().lower()}")
    return "-".join([*words, str(torch.get_num_threads()), "threads"])


def device_folder(name: str) -> str:
    """The name of the folder of results of a GPU, by the name that PyTorch gives it."""
    return "-".join(re.findall(r"\w+", name.lower()))


def output(name: str | None = None) -> Path:
    """The default folder of results: ``OUT`` if that is set, else this machine's."""
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return ROOT / "bench" / "results" / (name or folder())


def facts() -> dict[str, str | int | bool]:
    """What the numbers depend on; no host name. The commit is git's, or that in ``MICA_BENCH_COMMIT``."""
    machine: dict[str, str | int | bool] = {
        "cpu": _brand(),
        "python": platform.python_version(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "bf16 instructions": instructions(),
        "instructions limited to": limit(),
    }
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            machine[library] = version(library)
    changes = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return machine | {
        "size": "dry" if IS_DRY else "default",
        "commit": _git("rev-parse", "HEAD") or os.environ.get("MICA_BENCH_COMMIT", "unknown"),
        "uncommitted_changes": bool(changes),
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _device() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return "dry run" if IS_DRY else "cpu"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
