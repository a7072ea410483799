"""``python -m bench.gpu.prediction DEVICE``: what the model expects of a run, before anything is measured.

A record for each implementation of the suites layer, forms and kernels that `bench.gpu.roofline` models, by
device time, in the journal of the run. `bench.report` shows it beside what was measured. Not modelled are
layers under torch.compile or with dropout, and the configurations of a kernel other than its default one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from bench.gpu import roofline
from bench.gpu.roofline import Launch, Layer, Prediction
from bench.measure.peaks import PEAKS, Peak
from bench.results import journal, names
from bench.results.names import BARE, COPY, CUBLAS, DEVICE_TIME, FAST, STOCK, STOCK_16
from mica.kernels import configs

DRY_RUN_AS = "NVIDIA H100 80GB HBM3"  # whose numbers a dry run shows
DTYPE = "bfloat16"  # the only one that is modelled
FORMS = {names.of_form(word): word for word in configs.FORM_NAMES}


def records(device: str) -> Iterator[dict]:
    """What the journal gets, in the order in which the suites run."""
    from bench.suites import bench_kernels, bench_layer  # import the libraries that they time

    peak = PEAKS[device]
    for cell in bench_kernels.CELLS:
        _, default, *_ = bench_kernels.implementations(cell)
        for name in (COPY, default, CUBLAS):
            yield _record(device, cell.name, name, of_kernel(cell.axes, name, peak))
    for cell in bench_layer.CELLS:
        for part in bench_layer.PASSES:
            for name in cell.implementations(part):
                prediction = of_layer({**cell.axes, "pass": part}, name, device)
                if prediction is not None:
                    yield _record(device, f"{cell.name}, {part}", name, prediction)


def _record(device: str, cell: str, implementation: str, prediction: Prediction) -> dict:
    return {
        "group": f"{cell}, {DEVICE_TIME}",
        "implementation": implementation,
        "device": device,
        "seconds": float(f"{prediction.seconds:.4g}"),
        "bytes": float(f"{prediction.moved:.4g}"),
        "launches": prediction.launches,
    }


def of_layer(axes: dict[str, str | int], implementation: str, device: str) -> Prediction | None:
    """Of a cell of the suites layer and forms; None where it is not modelled."""
    if axes["dtype"] != DTYPE or axes.get("dropout"):
        return None
    peak = PEAKS[device]
    trains_B = axes.get("adapter") == names.PLAIN_LORA
    sizes = (axes[axis] for axis in ("tokens", "out", "in", "rank"))
    layer = Layer(*sizes, peak.cache, trains_B=trains_B)
    launches = _of_implementation(layer, axes, implementation)
    return None if launches is None else roofline.predict(launches, peak)


def _of_implementation(layer: Layer, axes: dict[str, str | int], implementation: str) -> list[Launch] | None:
    part = axes["pass"]
    if implementation == BARE:
        return roofline.bare(layer, part)
    if implementation == STOCK:
        return roofline.stock(layer, part)
    if implementation == STOCK_16:
        return roofline.stock(layer._replace(has_masters=False), part)
    if axes["suite"] == "forms" and implementation in FORMS:
        return roofline.of_form(FORMS[implementation], layer, part)
    if implementation == FAST:
        return roofline.of_form("split", layer, part)  # what runs where kernels are demanded
    return None  # under torch.compile


def of_kernel(axes: dict[str, str | int], implementation: str, peak: Peak) -> Prediction:
    """Of a cell of the suite kernels: a copy, the kernel in its default configuration, or cuBLAS."""
    features = axes["features"]
    is_down_a = axes["kernel"] == names.DOWN_A
    layer = Layer(axes["tokens"], features, features, axes["rank"], peak.cache, has_masters=False)
    masters = layer._replace(has_masters=True)
    kernel = {
        names.DOWN_A: roofline.skinny(masters, roofline.DOWN),
        names.DOWN_B: roofline.skinny(layer, roofline.DOWN),
        names.UP_B: roofline.update(layer, roofline.UP, is_cached=False),
        names.GRAD_A: roofline.skinny(masters, roofline.GRAD_A),
    }[axes["kernel"]]
    if implementation == COPY:
        launches = [roofline.elementwise(kernel.moved)]
    elif implementation == CUBLAS:
        share = roofline.VENDOR_UPDATE if axes["kernel"] == names.UP_B else roofline.VENDOR
        launches = [kernel._replace(share=share.of(layer.rank))]
        if is_down_a:
            launches = [roofline.cast(layer.rank * features), *launches]
    else:
        launches = [kernel]
    return roofline.predict(launches, peak)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.prediction", description=__doc__)
    parser.add_argument("device", choices=PEAKS, metavar="DEVICE", help=f"one of {', '.join(PEAKS)}")
    args = parser.parse_args(argv)
    for record in records(args.device):
        journal.write("prediction", **record)


if __name__ == "__main__":
    main()
