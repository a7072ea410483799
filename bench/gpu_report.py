"""Tables and the plot of a result of `bench.gpu`: ``python -m bench.gpu_report FILE.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.gpu_group import GROUPED
from bench.gpu_layer import ATEN, BARE, COMPILED, SPLIT, STOCK, STOCK_16

MAIN_SHAPE = "8192x4096x4096"


def report(result: dict) -> str:
    """Markdown: the machine, the tests, what was asked, then a table a shape."""
    machine = result["machine"]
    parts = [", ".join(f"{name} {value}" for name, value in machine.items())]
    if machine["device"].startswith("dry run"):
        parts.insert(0, "**A dry run: interpreted kernels on a CPU. Its times are not measurements.**")
    if result["tests"]:
        rows = [f"{test['file']} | {test['state']} | {test['last_line']}" for test in result["tests"]]
        parts.append("\n".join(["tests on the device | state | last line", "--- | --- | ---", *rows]))
    asked = acceptance(result)
    if asked:
        rows = [
            f"{what} | {limit} | {value:.3g} | {'yes' if met else 'NO'}" for what, limit, value, met in asked
        ]
        parts.append(
            "\n".join([f"asked at {MAIN_SHAPE} | limit | measured | met", "--- | --- | --- | ---", *rows])
        )
    parts += [
        _shape_table(shape, entry, result["kernels"].get(shape)) for shape, entry in result["shapes"].items()
    ]
    if result.get("group"):
        parts.append(_group_table(result["group"]))
    return "\n\n".join(parts) + "\n"


def acceptance(result: dict) -> list[tuple[str, str, float, bool]]:
    """What the design asks of a GPU: (what, limit, measured, whether it is met)."""
    times = result["shapes"].get(MAIN_SHAPE, {}).get("times")
    if not times:
        return []
    split = times[SPLIT]
    rows = [
        ("split, extra forward", "≤ 0.28", split["forward"]["extra"], split["forward"]["extra"] <= 0.28),
        ("split, extra backward", "≤ 0.35", split["backward"]["extra"], split["backward"]["extra"] <= 0.35),
    ]
    for rival, least in ((STOCK_16, 1.15), (STOCK, 1.6), (ATEN, 0.98), (COMPILED, 0.98)):
        if rival in times:
            ratio = times[rival]["both"]["us"] / split["both"]["us"]
            rows.append((f"{rival} ÷ split", f"≥ {least}", ratio, ratio >= least))
    for name, entry in result["kernels"][MAIN_SHAPE].items():
        if name != "copy":
            share = entry["share_of_copy"]
            rows.append((f"{name}, share of the copy's bandwidth", "≥ 0.8", share, share >= 0.8))
    grouped = result.get("group", {}).get("times", {}).get(GROUPED)
    if grouped:
        extra = grouped["both"]["extra"]
        rows.append(("grouped q/k/v, extra forward + backward", "≤ 0.15", extra, extra <= 0.15))
    return rows


def _group_table(entry: dict) -> str:
    lines = ["### q/k/v: three layers of the first shape on one x", ""]
    if entry["wrong"]:
        return "\n".join(
            [*lines, "No times, because results are wrong:", "", *(f"- {w}" for w in entry["wrong"])]
        )
    lines += [
        "rival | forward µs | backward µs | extra forward | extra backward | extra both | error y, dx, dA"
    ]
    lines += [" | ".join(["---"] * 7)]
    for name, times in entry["times"].items():
        numbers = [f"{times[part]['us']:.1f}" for part in ("forward", "backward")]
        numbers += [f"{times[part]['extra']:+.1%}" for part in ("forward", "backward", "both")]
        errors = ", ".join(f"{value:.1e}" for value in entry["errors"].get(name, {}).values())
        lines.append(" | ".join([name, *numbers, errors]))
    return "\n".join(lines)


def _shape_table(shape: str, entry: dict, kernels: dict | None) -> str:
    lines = [f"### {shape} (tokens x out_features x in_features)", ""]
    if entry["wrong"]:
        return "\n".join(
            [*lines, "No times, because results are wrong:", "", *(f"- {w}" for w in entry["wrong"])]
        )
    lines += [
        "rival | forward µs | backward µs | extra forward | extra backward | both ÷ split | error y, dx, dA"
    ]
    lines += [" | ".join(["---"] * 7)]
    split = entry["times"][SPLIT]["both"]["us"]
    for name, times in entry["times"].items():
        numbers = [f"{times[part]['us']:.1f}" for part in ("forward", "backward")]
        numbers += [f"{times[part]['extra']:+.1%}" for part in ("forward", "backward")]
        errors = ", ".join(f"{value:.1e}" for value in entry["errors"].get(name, {}).values())
        lines.append(" | ".join([name, *numbers, f"{times['both']['us'] / split:.2f}", errors]))
    if kernels:
        lines += ["", "kernel | µs | GB/s | share of a copy's", "--- | --- | --- | ---"]
        for name, kernel in kernels.items():
            lines.append(
                f"{name} | {kernel['us']:.1f} | {kernel['gb_s']:.0f} | {kernel['share_of_copy']:.2f}"
            )
    return "\n".join(lines)


def write_plot(result: dict, file: Path) -> None:
    """Bars of forward + backward over the bare GEMM, a group a shape; without matplotlib it says so."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = {shape: entry["times"] for shape, entry in result["shapes"].items() if "times" in entry}
    if not timed:
        return
    names = [name for name in next(iter(timed.values())) if name != BARE]
    figure, axes = pyplot.subplots(figsize=(10, 5), facecolor="white")
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [place + index * width for place in range(len(timed))]
        values = [100 * times[name]["both"]["extra"] if name in times else 0 for times in timed.values()]
        axes.bar(places, values, width, label=name)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(timed))], timed)
    axes.set_xlabel("tokens x out_features x in_features")
    axes.set_ylabel("forward + backward, % over the bare GEMM")
    title = f"{result['machine']['device']}, rank {result['rank']}, bf16"
    axes.set_title(title if not title.startswith("dry run") else f"{title}: NOT A MEASUREMENT")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text())), end="")
