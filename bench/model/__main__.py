"""``python -m bench.model``: a table of figures modelled by `bench.model.roofline`."""

from __future__ import annotations

import argparse

from bench.measure.machine import output
from bench.model.roofline import DEVICES, TARGET_LAYER, Layer, compare, targets

SHAPES = ((8192, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (512, 4096, 4096))  # M, N, K
RANK = 16


def modelled(name: str) -> dict:
    """All that is modelled for a device of `DEVICES`."""
    device = DEVICES[name]
    return {
        "label": "MODELLED, not measured",
        "device": name,
        "assumed": device._asdict(),
        "shapes": [compare(Layer(*shape, RANK, device.target), device) for shape in SHAPES],
        "targets": targets(device),
    }


def table(model: dict) -> str:
    assumed, ours = model["assumed"], model["shapes"][0]["triton_gemm"]
    rates = "{tensor:g} TF/s bf16, {fp32:g} TF/s fp32, {bandwidth:g} TB/s".format(
        **{name: assumed[name] / 1e12 for name in ("tensor", "fp32", "bandwidth")}
    )
    lines = [
        f"{model['label']}: {model['device']}, rank {RANK}, our GEMM {ours} x vendor's",
        f"assumed: {rates}, {assumed['gap'] * 1e6:g} us between launches",
    ]
    for row in model["shapes"]:
        title = "MODELLED {m} x {n} x {k} (M x N x K)".format(**row)
        shares = "h {h:.1f}, g {g:.1f}, dA {dA:.1f}".format(**row["partials_percent"])
        lines += [
            f"\n{title}: base GEMM {row['base_us']['forward']:.1f} us; partial sums, % of bytes: {shares}",
            f"  {'% over the base':<49}{'forward':>9}{'backward':>10}{'both':>8}{'saved MB':>10}",
        ]
        for name, form in row["forms"].items():
            numbers = "{forward:>9.1f}{backward:>10.1f}{both:>8.1f}".format(**form["percent"])
            lines.append(f"  {name:<49}{numbers}{form['saved_bytes'] / 1e6:>10.1f}")
    title = "MODELLED at {} x {} x {}, rank {}".format(*TARGET_LAYER)
    lines.append(f"\n{title:<51}{'target':>9}{'modelled':>10}")
    lines += [f"  {what:<49}{target:>9}{value:>10.2f}" for what, target, value in model["targets"]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--write", action="store_true", help="to bench/results/modelled, or to $OUT")
    args = parser.parse_args(argv)
    model = modelled(args.device)
    print(table(model), end="")
    if args.write:
        folder = output("modelled")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{args.device}.txt").write_text(table(model))


if __name__ == "__main__":
    main()
