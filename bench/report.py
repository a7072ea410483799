"""Medians and paired ratios of a pytest-benchmark result, as Markdown: ``python -m bench.report FILE``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

BARE = "bare frozen model"
BASELINES = (BARE, "stock PEFT", "PEFT LoRA", "mica.fast, ungrouped", "torch.linalg.svd", "1 process")
# Whose overhead over the bare model the others' is compared with, too.
OVERHEADS = ("PEFT LoRA", "mica.fast, ungrouped")
LIBRARIES = ("torch", "peft", "transformers", "bitsandbytes")


def groups(result: dict) -> dict[str, dict[str, dict]]:
    """group -> rival -> {"seconds": [one a round], and what the suite noted}."""
    found: dict = defaultdict(lambda: defaultdict(lambda: {"seconds": []}))
    for benchmark in result["benchmarks"]:
        entry = found[benchmark["group"]][benchmark["extra_info"]["rival"]]
        entry["seconds"].append(benchmark["stats"]["median"])
        entry.update({key: value for key, value in benchmark["extra_info"].items() if key != "rival"})
    return found


def ratio(entry: dict, baseline: dict) -> str:
    """Median and range over the rounds of rival ÷ baseline, each from one and the same round."""
    pairs = [a / b for a, b in zip(entry["seconds"], baseline["seconds"], strict=True)]
    return f"{median(pairs):.3f} ({min(pairs):.2f}–{max(pairs):.2f})"


def overhead(entry: dict, baseline: dict, bare: dict) -> str:
    """Median and range over the rounds of (rival - bare) ÷ the baseline's median (baseline - bare).

    Each difference is of one round. The divisor is a median: a round in which the baseline happens to be
    hardly slower than the bare model would blow up a quotient of its own.
    """
    extra, unit = (
        [a - b for a, b in zip(one["seconds"], bare["seconds"], strict=True)] for one in (entry, baseline)
    )
    if median(unit) <= 0:  # not measurably slower than the bare model
        return ""
    low, middle, high = (of(extra) / median(unit) for of in (min, median, max))
    return f"{middle:.3f} ({low:.2f}–{high:.2f})"


def table(group: str, rivals: dict[str, dict]) -> str:
    present = [name for name in BASELINES if name in rivals]
    overheads = [name for name in OVERHEADS if name in rivals and BARE in rivals]
    notes = sorted({key for entry in rivals.values() for key in entry} - {"seconds"})
    titles = [*(f"÷ {name}" for name in present), *(f"overhead ÷ that of {name}" for name in overheads)]
    header = ["rival", "median s", *titles, *notes]
    lines = [f"### {group}", "", " | ".join(header), " | ".join(["---"] * len(header))]
    for rival, entry in rivals.items():
        row = [rival, f"{median(entry['seconds']):.3f}"]
        row += [ratio(entry, rivals[name]) for name in present]
        row += [overhead(entry, rivals[name], rivals[BARE]) for name in overheads]
        row += [f"{entry[key]:.4g}" if key in entry else "" for key in notes]
        lines.append(" | ".join(row))
    return "\n".join(lines)


def report(path: Path) -> str:
    result = json.loads(path.read_text())
    machine = result["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw", machine["machine"])
    versions = ", ".join(f"{name} {machine[name]}" for name in LIBRARIES if name in machine)
    head = f"{cpu}, {machine['threads']} threads, {versions}, Python {machine['python_version']}"
    tables = [table(group, rivals) for group, rivals in groups(result).items()]
    return "\n\n".join([head, *tables]) + "\n"


if __name__ == "__main__":
    print(report(Path(sys.argv[1])), end="")
