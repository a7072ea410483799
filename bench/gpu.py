"""``make gpu``: on a machine with a CUDA or ROCm GPU, are the kernels right there, and how fast are they?

In order: the kernels' own tests, compiled on the device; parity with fp64 on real layer shapes, and bitwise
equal reruns; then times against the bare GEMM, the aten control and stock PEFT, shape by shape, and of q/k/v
as a group. A shape whose result is wrong gets no time. Writes raw JSON, tables and a plot to
``bench/results/<device>/``. ``--dry-run`` goes the same way on a CPU with interpreted kernels, tiny shapes:
it shows that the script runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (2048, 4096, 4096), (512, 4096, 4096)]
TINY = [(40, 48, 64)]
RANK, ROUNDS, RERUNS = 16, 50, 3
# Relative error of y, dx, dA against fp64 that no bf16 layer of these sizes should pass.
GATE = {"y": 6e-3, "dx": 6e-3, "dA": 6e-3}
TEST_SECONDS = 240


def device_tests() -> list[dict]:
    """The kernels' tests compiled on the device, one process a file, all at the same time."""
    files = [*sorted((ROOT / "tests" / "kernels").glob("test_*.py")), ROOT / "tests/mica/test_kernel_path.py"]
    environment = {**os.environ, "MICA_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    running = []
    for file in files:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed below)
        process = subprocess.Popen([*command, str(file)], cwd=ROOT, env=environment, stdout=log, stderr=log)
        running.append((file, process, log))
    deadline, found = time.monotonic() + TEST_SECONDS, []
    for file, process, log in running:
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        log.seek(0)
        lines = log.read().strip().splitlines()
        log.close()
        state = "not finished" if code is None else "passed" if code == 0 else "FAILED"
        found.append({"file": file.name, "state": state, "last_line": lines[-1] if lines else ""})
        if state == "FAILED":
            print("\n".join(lines[-40:]), flush=True)
    return found


def judge(layer, found, device: str) -> dict:
    """Errors of every rival against fp64; ``wrong``: sentences on errors too large and on unequal reruns."""
    import torch

    from bench.gpu_layer import BARE, STOCK_16
    from bench.layer import exact, relative_errors

    truth = exact(layer)
    errors = {
        name: relative_errors(rival.run, lambda y, rival=rival: rival.gradients(y, layer.grad_output), truth)
        for name, rival in found.items()
    }
    wrong = []
    for name, rival in found.items():
        if not name.startswith("mica"):
            continue
        for what, value in errors[name].items():
            limit = min(GATE[what], 1.1 * errors[STOCK_16][what])
            if not value <= limit:
                wrong.append(f"{name}: error of {what} is {value:.2e}, allowed is {limit:.2e}")
        first = rival.run()
        gradients = rival.gradients(first, layer.grad_output)
        for _ in range(RERUNS):
            again = rival.run()
            for one, other in zip(
                (first, *gradients), (again, *rival.gradients(again, layer.grad_output)), strict=True
            ):
                if not torch.equal(one, other):
                    wrong.append(f"{name}: a rerun gave other bits")
    return {"errors": {name: value for name, value in errors.items() if name != BARE}, "wrong": wrong}


def measure(layer, found, device: str, rounds: int) -> dict[str, dict]:
    """rival -> forward, backward and both: median microseconds, quartiles, extra over the bare GEMM."""
    from bench.gpu_layer import BARE
    from bench.gpu_timing import interleaved, summary

    outputs = {name: rival.run() for name, rival in found.items()}
    forward = interleaved({name: rival.run for name, rival in found.items()}, device, rounds)
    backward = interleaved(
        {
            name: lambda rival=rival, y=outputs[name]: rival.gradients(y, layer.grad_output)
            for name, rival in found.items()
        },
        device,
        rounds,
    )
    table = {}
    for name in found:
        both = [a + b for a, b in zip(forward[name], backward[name], strict=True)]
        parts = {"forward": forward[name], "backward": backward[name], "both": both}
        table[name] = {part: summary(times) for part, times in parts.items()}
    for entry in table.values():
        for part, times in entry.items():
            times["extra"] = times["us"] / table[BARE][part]["us"] - 1
    return table


def machine_facts(device: str) -> dict:
    import peft
    import torch
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"dry run on {platform.machine()}"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"triton": triton.__version__, "peft": peft.__version__}
    return {"device": name, **versions, "commit": commit.stdout.strip() or "unknown"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted on the CPU")
    parser.add_argument("--no-tests", action="store_true", help="leave the kernels' own tests out")
    parser.add_argument("--name", default=f"{date.today()}-gpu", help="of the result files")
    parser.add_argument("--output", type=Path, help="folder (default: bench/results/<device>)")
    args = parser.parse_args()
    if args.dry_run:
        os.environ |= {"TRITON_INTERPRET": "1", "MICA_BACKEND": "triton"}
    import torch

    if not args.dry_run and not torch.cuda.is_available():
        print(
            "make gpu needs a CUDA or ROCm GPU, and torch sees none here (--dry-run goes without)",
            file=sys.stderr,
        )
        return 2
    from bench.gpu_group import measure_group
    from bench.gpu_layer import rivals
    from bench.gpu_report import report, write_plot
    from bench.gpu_timing import kernel_bandwidths
    from bench.layer import make_layer

    start = time.monotonic()
    device, rounds = ("cpu", 2) if args.dry_run else ("cuda", ROUNDS)
    result = {"machine": machine_facts(device), "rank": RANK, "rounds": rounds, "shapes": {}, "kernels": {}}
    result["tests"] = [] if args.dry_run or args.no_tests else device_tests()
    for shape in TINY if args.dry_run else SHAPES:
        layer = make_layer(*shape, RANK, torch.bfloat16, device)
        found = rivals(layer, compiled=not args.dry_run)
        entry = judge(layer, found, device)
        result["shapes"][layer.shape] = entry
        if entry["wrong"]:
            print("\n".join(f"{layer.shape}: {text}" for text in entry["wrong"]), flush=True)
            continue
        entry["times"] = measure(layer, found, device, rounds)
        result["kernels"][layer.shape] = kernel_bandwidths(layer, device, rounds)
        del layer, found
    shape = (TINY if args.dry_run else SHAPES)[0]
    result["group"] = measure_group(shape, RANK, torch.bfloat16, device, rounds, GATE)
    result["seconds"] = time.monotonic() - start

    folder = args.output or ROOT / "bench" / "results" / result["machine"]["device"].lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    text = report(result)
    (folder / f"{args.name}.md").write_text(text)
    write_plot(result, folder / f"{args.name}.png")
    print(text)
    wrong = any(entry["wrong"] for entry in (*result["shapes"].values(), result["group"]))
    return 1 if wrong or any(test["state"] != "passed" for test in result["tests"]) else 0


if __name__ == "__main__":
    sys.exit(main())
