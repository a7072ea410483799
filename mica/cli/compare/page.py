"""The page of a comparison: three sentences, a picture, tables, and how to do the best again."""

from pathlib import Path

from mica.cli import record
from mica.cli.compare import settings
from mica.cli.compare.again import Report, again
from mica.cli.compare.methods import METHODS
from mica.cli.output import markdown_table, shown, write_json

_UNIT = "nats per token"


def write(output: Path, report: Report) -> None:
    """Write page, picture and data of ``report`` to ``output``. Raises UsageError if that fails."""
    from mica.cli.compare import picture  # imports matplotlib

    write_json("--output", output / settings.REPORT, report)
    labels = "Learned, by what was forgotten for it", f"forgotten, {_UNIT}", f"learned, {_UNIT}"
    curves = report["curves"]
    record.claimed(output, settings.PICTURE, lambda path: picture.trade_off(curves, path, *labels))
    text = markdown(report)
    record.claimed(output, settings.PAGE, lambda path: path.write_text(text, encoding="utf-8"))


def sentences(report: Report) -> list[str]:
    """Who learned most at equal forgetting, who at any, and which to take at which cost."""
    equal = report["equal"]
    if not equal["methods"]:
        return ["No method has learned anything of this text: no loss on held-out text fell."]
    within = f"At equal forgetting (at most {equal['limit']:.3f} {_UNIT})"
    if not equal["limit"]:
        within = "Without forgetting any of the retained text"
    found = [_who(within, equal)]
    if _is_same(report):
        found.append("More forgetting would not have helped any of them.")
    else:
        found.append(_who("However much is forgotten", report["any"], forgotten=True))
    return [*found, _advice(report)]


def _is_same(report: Report) -> bool:
    """Whether the limit of forgetting changes nothing."""
    return report["equal"]["methods"] == report["any"]["methods"]


def _who(head: str, at: Report, forgotten: bool = False) -> str:
    best, *others = at["methods"]
    title = METHODS[best["method"]].title
    amount = f"{best['learned']['mean']:.3f} {_UNIT}"
    if forgotten:
        amount += f" for {best['forgotten']:.3f} forgotten"
    if not others:
        return f"{head}, only {title} learned anything: {amount}."
    certain = [f"{_plus_minus(row['behind'])} more than {_title(row)}" for row in others if not row["tied"]]
    tied = [f"{_title(row)} ({_plus_minus(row['behind'])})" for row in others if row["tied"]]
    text = f"{head}, {title} learned most, {amount}"
    if certain:
        text += f": {_listed(certain)}"
    if not tied:
        return text + "."
    seeds = ""
    if any(row["behind"]["half"] is None for row in others):
        seeds = ", which has one seed of each,"
    return f"{text}. Its lead over {_listed(tied)} is no difference that this budget{seeds} can show."


def _title(row: Report) -> str:
    return METHODS[row["method"]].title


def _listed(texts: list[str]) -> str:
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def taken(report: Report) -> Report | None:
    """The row at equal forgetting that is recommended: the smallest in memory of what may be the best."""
    rows = report["equal"]["methods"]
    if not rows:
        return None
    good = [rows[0], *(row for row in rows[1:] if row["tied"])]
    return min(good, key=lambda row: report["costs"][row["method"]]["bytes"])


def _advice(report: Report) -> str:
    row = taken(report)
    cost = report["costs"][row["method"]]
    parts = [
        f"{cost['trained_parameters'] / 1e6:.3g} million trained parameters",
        f"{cost['bytes'] / 2**30:.2f} GiB for weights, gradients and optimiser",
        f"{cost['step_seconds']:.2g} s a step",
    ]
    why = "it learned most"
    if row is not report["equal"]["methods"][0]:
        why = "nothing is shown to learn more, and it needs the least memory"
    return f"Take {_title(row)}: {why}. It has {_listed(parts)}."


def markdown(report: Report) -> str:
    """The page."""
    used = report["settings"]
    title = f"# {shown(Path(str(used['model'])).name)} on {_names(used['text'])}: which method?"
    parts = [
        title,
        "\n".join(sentences(report)),
        f"![Learned, by what was forgotten]({settings.PICTURE})",
        _setting(report),
        f"## At equal forgetting\n\n{_table(report, report['equal'])}",
        "" if _is_same(report) else f"## However much is forgotten\n\n{_table(report, report['any'])}",
        _costs(report),
        _listed_under("## What the budget did not allow", report["not_done"]),
        _listed_under("## Failed", report["failed"]),
    ]
    row = taken(report)
    if row is not None:
        parts.append(f"## To do it again\n\n{again(report, row)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _names(paths: list[str]) -> str:
    return _listed([f"`{shown(Path(path).name)}`" for path in paths])


def _setting(report: Report) -> str:
    facts = report["facts"]
    used = report["settings"]
    threads = ""
    if facts["device"] == "CPU":
        threads = f" with {facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'} each"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return (
        f"*Learned* is the fall of the mean loss on {facts['test']} held-out blocks, *forgotten* its rise on "
        f"{facts['retained']} blocks of {_names(used['retain'])} (negative: it fell), both in {_UNIT}. "
        "Learning rates, stops and the limit of forgetting were chosen by "
        f"{facts['validation']} other held-out blocks. Intervals are of 95 %, over blocks and seeds; those "
        "of differences hold all at once.\n\n"
        f"{facts['parameters'] / 1e6:,.0f} million parameters in {facts['dtype']}; {facts['tokens']:,} "
        f"tokens of text, {facts['blocks']:,} training blocks of {facts['sequence_length']}. "
        f"{report['seconds'] / 60:.1f} minutes, {facts['jobs']} trainings at a time on the "
        f"{facts['device']}{threads}; {versions}."
    )


def _table(report: Report, at: Report) -> str:
    rows = []
    for row in at["methods"]:
        behind = "" if row["behind"] is None else _plus_minus(row["behind"])
        steps = f"{row['stop']} of {row['steps']}"
        if row["share"] < 1:
            steps += f", scaled by {row['share']:.2f}"
        cells = [_title(row), _plus_minus(row["learned"]), behind, f"{row['forgotten']:.3f}"]
        rows.append([*cells, f"{row['rate']:g}", steps, str(row["seeds"])])
    learned = [row["method"] for row in at["methods"]]
    for method in report["costs"]:
        if method not in learned:
            rows.append([METHODS[method].title, "nothing", *[""] * 5])
    header = ["", "learned", "behind the best", "forgotten", "learning rate", "steps", "seeds"]
    return markdown_table(header, rows)


def _plus_minus(estimate: Report) -> str:
    if estimate["half"] is None:
        return f"{estimate['mean']:.3f}"
    return f"{estimate['mean']:.3f} ± {estimate['half']:.3f}"


def _costs(report: Report) -> str:
    rows = []
    for method, cost in report["costs"].items():
        size = f"{cost['bytes'] / 2**30:.2f} GiB"
        seconds = f"{cost['step_seconds']:.3g} s"
        rows.append([METHODS[method].title, f"{cost['trained_parameters']:,}", size, seconds])
    header = ["", "trained parameters", "weights, gradients, optimiser", "a step"]
    return f"## Costs\n\n{markdown_table(header, rows)}"


def _listed_under(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return "\n".join([title, "", *(f"- {line}" for line in lines)])
