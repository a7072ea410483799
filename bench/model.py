"""MODELLED, not measured: initialisation and a training step of a model on a device that is not at hand.

``python -m bench.model --device h100 --model llama-3.1-8b``: from flops, bytes and launches, rival by rival
(`bench.step_cost`, `bench.initialisation_cost`), at assumed rates of the device. ``--device measured`` takes
the rates that a result file has. Wherever there are measurements, the model's error is printed. Whether a
step fits into the device's memory is not asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import initialisation_cost
from bench.architectures import ARCHITECTURES, Architecture
from bench.kernel_cost import DEVICES, Device
from bench.model_error import (
    SIZES,
    gpu_errors,
    lines,
    measured_device,
    modelled_errors,
    newest_rates,
    results_in,
)
from bench.results import BARE, STOCK, Result
from bench.step_cost import Step, others, step_cost
from mica.kernels.common import MAX_RANK

LABEL = "MODELLED, not measured"


def step_lines(steps: dict[str, Step]) -> list[str]:
    head = ("ms", "% over bare", "stock ÷ it", "launches", "kept GB", "A MB", "AdamW MB")
    found = [f"  {'':<40}" + "".join(f"{title:>12}" for title in head)]
    for name, step in steps.items():
        numbers = (
            f"{1e3 * step.seconds:.1f}",
            f"{100 * (step.seconds / steps[BARE].seconds - 1):.1f}",
            f"{steps[STOCK].seconds / step.seconds:.2f}",
            str(step.launches),
            f"{step.saved / 1e9:.2f}",
            f"{step.trainable / 1e6:.1f}",
            f"{step.optimizer / 1e6:.1f}",
        )
        found.append(f"  {name:<40}" + "".join(f"{number:>12}" for number in numbers))
    return found


def initialisation(model: Architecture, name: str, device: Device, rank: int) -> tuple[dict, list[str]]:
    """Numbers for the JSON file, and lines."""
    shares = initialisation_cost.SVD_SHARE["cpu" if device.target == "cpu" else "gpu"]
    stock, slowest, fastest = (initialisation_cost.stock_seconds(model, device.fp32, one) for one in shares)
    told = [
        f"  {stock:>9.2f} s  stock PEFT: a full fp32 SVD of every weight, ASSUMED to reach {shares[0]:.1%} "
        f"of products' rate\n{'':>14}({fastest:.0f} to {slowest:.0f} s at {shares[2]:.1%} to {shares[1]:.1%})"
    ]
    numbers: dict = {"stock_seconds": stock, "stock_range": [fastest, slowest], "assumed_shares": shares}
    why = initialisation_cost.why_not(model, name, rank)
    if why is not None:
        return numbers | {"mica": f"not modelled: {why}"}, [*told, f"  mica.fast: not modelled, {why}"]
    solved = initialisation_cost.ours(model, name, rank)
    seconds = sum(one.seconds for one in solved)
    told.append(
        f"  {seconds:>9.2f} s  mica.fast: the solver's own code, counted, without the host's part of it\n"
        f"{'':>14}({fastest / seconds:.0f} to {slowest / seconds:.0f} times faster)"
    )
    for one in solved:
        out, inner = one.shape
        told.append(
            f"  {one.seconds:>9.2f} s    {one.count} weights {out} x {inner}: {one.flops / 1e12:.1f} Tflop, "
            f"{one.bytes / 1e12:.2f} TB, {one.launches:.0f} launches"
        )
    return numbers | {"mica_seconds": seconds, "mica": [one._asdict() for one in solved]}, told


def error_lines(name: str, files: list[tuple[Path, Result]]) -> tuple[list[dict], list[str]]:
    """The model's errors where something was measured, and that nothing was on a GPU where it is so."""
    rows, told = [], []
    for file, result in files:
        errors = modelled_errors(result)
        if not errors:
            continue
        cpu = result.machine.get("cpu", "")
        told += [f"\nMODELLED against measured: {file.parent.name}/{file.name}, {cpu}, its own rates"]
        told += lines(errors)
        rows.append({"file": f"{file.parent.name}/{file.name}", "errors": [one._asdict() for one in errors]})
    if name in DEVICES:
        errors = gpu_errors(name)
        told.append(
            f"\nMODELLED against measured: {name}, its assumed rates"
            if errors
            else f"\nno measured result for {name}: error unknown"
        )
        told += lines(errors) if errors else []
        rows.append({"device": name, "errors": [one._asdict() for one in errors] or "unknown"})
    return rows, told


def device_of(name: str, files: list[Path]) -> tuple[Device, str]:
    """The device and where its rates come from."""
    if name in DEVICES:
        return DEVICES[name], "assumed"
    file = next((one for one in files if measured_device(Result.load(one))), None) or newest_rates()
    device = file and measured_device(Result.load(file))
    if device is None:
        sys.exit("--device measured needs a result file with rates: run python -m bench -k rate")
    return device, f"measured, {file.parent.name}/{file.name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=[*DEVICES, "measured"], default="h100")
    parser.add_argument("--model", choices=ARCHITECTURES, default="llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=8192, help="a step (default 8192)")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sequence (default 2048)")
    parser.add_argument("--rank", type=int, choices=range(1, MAX_RANK + 1), default=16, metavar="R")
    parser.add_argument("--dtype", choices=SIZES, default="bfloat16", help="fp32: --device measured only")
    parser.add_argument("--no-initialisation", action="store_true", help="a few minutes of counting less")
    parser.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="default: bench/results/*/")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args()
    model = ARCHITECTURES[args.model]
    device, origin = device_of(args.device, args.results or [])
    if args.dtype == "float32" and device.target != "cpu":
        parser.error("the kernels are modelled with bfloat16 only")
    size = SIZES[args.dtype]
    steps = step_cost(model, device, args.tokens, args.sequence, args.rank, size)
    rest = {
        name: part.seconds(device) for name, part in others(model, args.tokens, args.sequence, size).items()
    }

    work = f"{args.tokens} tokens in sequences of {args.sequence}, rank {args.rank}, {args.dtype}"
    print(f"{LABEL}: {args.model} on {args.device}, {work}")
    rates = f"{device.tensor / 1e12:.3g} TF/s bf16, {device.fp32 / 1e12:.3g} TF/s fp32"
    print(f"{origin}: {rates}, {device.bandwidth / 1e12:.3g} TB/s, {device.gap * 1e6:.2g} us a launch")
    print(f"\n{LABEL}: a training step, all linear layers; kept: for the backward, more than the bare model")
    print("\n".join(step_lines(steps)))
    shares = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in rest.items())
    linear = ", ".join(f"{name} {1e3 * step.linear:.1f}" for name, step in steps.items())
    print(f"  adapted layers of it, ms: {linear}\n  the same for every rival, ms: {shares}")
    numbers = {
        "label": LABEL,
        "device": args.device,
        "model": args.model,
        "tokens": args.tokens,
        "sequence": args.sequence,
        "rank": args.rank,
        "dtype": args.dtype,
        "rates": {"origin": origin, **device._asdict()},
        "step": {name: step._asdict() for name, step in steps.items()},
        "step_seconds_of_every_rival": rest,
    }
    if not args.no_initialisation:
        numbers["initialisation"], told = initialisation(model, args.device, device, args.rank)
        print(f"\n{LABEL}: initialisation of {sum(model.weights().values())} weights on {args.device}")
        print("\n".join(told))
    files = [(file, Result.load(file)) for file in args.results] if args.results else results_in()
    numbers["errors"], told = error_lines(args.device, files)
    print("\n".join(told))
    if args.json:
        args.json.write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
