"""What a model expected of a run, beside what was measured. The first is always called modelled."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from bench.results.cell import Timing
from bench.results.names import DEVICE_TIME
from bench.results.schema import Result

TOLERANCE = 0.2  # how far a measured time may be from the modelled one


def text(result: Result, is_dry: bool) -> list[str]:
    """Paragraphs and tables; a dry run has no verdict, since its times are not measurements."""
    predictions = result.predictions
    devices = ", ".join(dict.fromkeys(one["device"] for one in predictions))
    parts = [
        f"Modelled for {devices} before the run, by bytes, operations and launches; times are {DEVICE_TIME}."
    ]
    if not is_dry:
        parts.append(verdict(result))
    return [*parts, table(result).to_markdown(index=False, disable_numparse=True)]


def verdict(result: Result) -> str:
    """How many measured times are far from the modelled ones, which the table names."""
    ratios = []
    for prediction, timing in _measured(result):
        if timing is not None:
            ratios.append(timing.median / prediction["seconds"])
    off = sum(abs(ratio - 1) > TOLERANCE for ratio in ratios)
    counts = f"Rows modelled: {len(result.predictions)}, measured: {len(ratios)}"
    return f"{counts}, off by more than {100 * TOLERANCE:.0f} %: {off}."


def table(result: Result) -> pd.DataFrame:
    """A row a prediction; the cell is not repeated."""
    rows = []
    last = None
    for prediction, timing in _measured(result):
        cell = _cell(prediction)
        modelled = prediction["seconds"]
        row = {
            "cell": "" if cell == last else cell,
            "implementation": prediction["implementation"],
            "launches": str(prediction["launches"]),
            "modelled MB": f"{prediction['bytes'] / 1e6:.4g}",
            "modelled µs": f"{1e6 * modelled:.4g}",
            "measured µs": "",
            "measured ÷ modelled": "",
        }
        if timing is not None:
            row["measured µs"] = f"{1e6 * timing.median:.4g}"
            row["measured ÷ modelled"] = f"{timing.median / modelled:.2f}"
        rows.append(row)
        last = cell
    return pd.DataFrame(rows)


def _measured(result: Result) -> Iterator[tuple[dict, Timing | None]]:
    """Each prediction, and what was measured of it."""
    groups = {group.name: group for group in result.groups}
    for prediction in result.predictions:
        group = groups.get(prediction["group"])
        timings = {} if group is None else group.timings
        yield prediction, timings.get(prediction["implementation"])


def _cell(prediction: dict) -> str:
    return prediction["group"].removesuffix(f", {DEVICE_TIME}")
