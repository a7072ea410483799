"""The page of a comparison: what was found, a picture, tables, and how to do it again."""

import math
from pathlib import Path

from mica.cli.compare import settings
from mica.cli.compare.again import Report, command, script
from mica.cli.compare.methods import METHODS
from mica.cli.compare.schedule import LEAST
from mica.cli.output import markdown_table, shown, write_file, write_json, write_text

_UNIT = "nats per token"


def write(output: Path, report: Report) -> None:
    """Write page, picture, scripts and data of ``report`` to ``output``. Raises UsageError if that fails."""
    from mica.cli.compare import picture  # imports matplotlib

    write_json("--output", output / settings.REPORT, report)
    write_file("--output", output / settings.PICTURE, lambda path: picture.trade_off(report, path))
    for row in report["equal"]["methods"]:
        write_text("--output", output / settings.SCRIPTS[row["method"]], script(report, row))
    write_text("--output", output / settings.PAGE, markdown(report, output))


def sentences(report: Report, output: Path) -> list[str]:
    """Who learned most at equal forgetting, who at any, and which to take, or what would decide."""
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
    return [*found, *_advice(report, output)]


def _is_same(report: Report) -> bool:
    """Whether the limit of forgetting changes nothing."""
    return report["equal"]["methods"] == report["any"]["methods"]


def _who(head: str, at: Report, forgotten: bool = False) -> str:
    best, *others = at["methods"]
    amount = f"{best['learned']:.3f} {_UNIT}"
    if forgotten:
        amount += f" for {best['forgotten']:.3f} forgotten"
    if not others:
        return f"{head}, only {_title(best)} learned anything: {amount}."
    text = f"{head}, {_title(best)} learned most, {amount}"
    certain = [f"{_plus_minus(row['behind'])} more than {_title(row)}" for row in others if not row["tied"]]
    if certain:
        text += f": {_listed(certain)}"
    tied = [f"{_title(row)} ({_plus_minus(row['behind'])})" for row in others if row["tied"]]
    if not tied:
        return text + "."
    return f"{text}. Its lead over {_listed(tied)} may be chance."


def _title(row: Report) -> str:
    return METHODS[row["method"]].title


def _listed(texts: list[str]) -> str:
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def _advice(report: Report, output: Path) -> list[str]:
    """Which method to take; where that is undecided, what would decide, and what each costs."""
    best = report["equal"]["methods"][0]
    if not report["undecided"]:
        return [f"Take {_title(best)}: at equal forgetting it learned most. It has {_cost(report, best)}."]
    tied = [row for row in report["equal"]["methods"] if row is best or row["tied"]]
    lines = [f"Undecided between {_listed([_title(row) for row in tied])}."]
    unknown = {}
    for one in report["undecided"]:
        if one["missing"]:
            unknown.setdefault(_listed(one["missing"]), []).append(_title(one))
        else:
            lines.append(
                _what_decides(f"the lead of {_title(best)} over {_title(one)}", one["needed"], output)
            )
    for reason, others in unknown.items():
        lines.append(f"Nothing can be said of the lead of {_title(best)} over {_listed(others)}: {reason}.")
    return [*lines, *(f"Costs of {_title(row)}: {_cost(report, row)}." for row in tied)]


def _what_decides(lead: str, needed: Report | None, output: Path) -> str:
    if needed is None:
        return f"No budget that is practical would show that {lead} is more than chance."
    head = f"If {lead} is as large as it looks, about {needed['seeds']} seeds of both"
    if needed["documents"] == 1:
        more = f"mica compare --output {output} --resume"
        more += f" --budget {needed['minutes']} --seeds {needed['seeds']}"
        return f"{head} would show it, in {needed['minutes']} minutes altogether: `{more}`."
    blocks = f"{needed['documents']} times as many documents (`--eval-blocks`, `--held-out`)"
    return f"{head} on {blocks} would show it, in a comparison of about {needed['minutes']} minutes."


def _cost(report: Report, row: Report) -> str:
    cost = report["costs"][row["method"]]
    parts = [
        f"{cost['trained_parameters'] / 1e6:.3g} million trained parameters",
        f"{cost['bytes'] / 2**30:.2f} GiB for weights, gradients and optimiser",
        f"{cost['step_seconds']:.2g} s a step",
    ]
    return _listed(parts)


def markdown(report: Report, output: Path) -> str:
    """The page of the comparison in ``output``."""
    used = report["settings"]
    title = f"# {shown(Path(str(used['model'])).name)} on {_names(used['text'])}: which method?"
    parts = [
        title,
        "\n".join(f"- {sentence}" for sentence in sentences(report, output)),
        f"![Learned, by what was forgotten]({settings.PICTURE})",
        _setting(report),
        f"## At equal forgetting\n\n{_table(report, report['equal'])}",
        "" if _is_same(report) else f"## However much is forgotten\n\n{_table(report, report['any'])}",
        _costs(report),
        _listed_under("## What the budget did not allow", report["not_done"]),
        _listed_under("## Failed", report["failed"]),
        _again(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _names(paths: list[str]) -> str:
    return _listed([f"`{shown(Path(path).name)}`" for path in paths])


def _setting(report: Report) -> str:
    facts = report["facts"]
    used = report["settings"]
    documents = facts["documents"]
    threads = ""
    if facts["device"] == "CPU":
        threads = f" with {facts['threads']} {'thread' if facts['threads'] == 1 else 'threads'} each"
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    steps = max((row["steps"] for row in report["any"]["methods"]), default=0)
    short = ""
    if 0 < steps < LEAST:
        short = f" **They are short**: {steps} steps say little about a long training."
    lower = 100 * (1 - math.exp(-0.1))
    how = [
        f"*Learned* is the fall of the mean loss on {_blocks(facts['test'], documents['test'])} of held-out "
        f"text, *forgotten* its rise on {_blocks(facts['retained'], documents['retained'])} of "
        f"{_names(used['retain'])} (negative: it fell), both in {_UNIT}: 0.1 less is a perplexity that is "
        f"{lower:.0f} % lower.",
        f"Learning rates and the limit of forgetting were chosen by {facts['validation']} other held-out "
        "blocks. An update that forgets more than the limit counts by the share that is within it.",
        "A difference is that of the seeds that both have. After ± stands its 95 % interval, for other "
        "documents and seeds; all of them hold at once.",
    ]
    what = [
        f"All trainings that are compared have {steps} steps of {_tokens(report)} tokens.{short}",
        f"{facts['parameters'] / 1e6:,.0f} million parameters in {facts['dtype']}; {facts['tokens']:,} "
        f"tokens of text, {facts['blocks']:,} training blocks of {facts['sequence_length']}.",
        f"{report['seconds'] / 60:.1f} minutes, {facts['jobs']} trainings at a time on the "
        f"{facts['device']}{threads}; {versions}.",
    ]
    return f"{' '.join(how)}\n\n{' '.join(what)}"


def _blocks(number: int, documents: int) -> str:
    noun = "document" if documents == 1 else "documents"
    return f"{number} blocks from {documents} {noun}"


def _tokens(report: Report) -> str:
    """Tokens of a step."""
    args = settings.of_mica_adapt(report["settings"], Path("run")).args
    return f"{args.batch_size * args.gradient_accumulation_steps * args.sequence_length:,}"


def _table(report: Report, at: Report) -> str:
    before = report["perplexity"]
    rows = []
    for row in at["methods"]:
        behind = "" if row["behind"] is None else _plus_minus(row["behind"])
        share = "" if row["share"] == 1 else f"{row['share']:.2f}"
        after = [f"{row['perplexity'][name]:.2f}" for name in ("held_out", "retained")]
        amounts = [f"{row['learned']:.3f}", behind, f"{row['forgotten']:.3f}"]
        rows.append([_title(row), *amounts, *after, f"{row['rate']:g}", share, str(row["seeds"])])
    learned = [row["method"] for row in at["methods"]]
    for method in report["costs"]:
        if method not in learned:
            rows.append([METHODS[method].title, "nothing", *[""] * 7])
    header = [
        "",
        "learned",
        "the best learned more by",
        "forgotten",
        f"held-out perplexity (before: {before['held_out']:.2f})",
        f"retained perplexity (before: {before['retained']:.2f})",
        "learning rate",
        "share of the update",
        "seeds",
    ]
    return markdown_table(header, rows)


def _plus_minus(estimate: Report) -> str:
    if estimate["half"] is None:
        return f"{estimate['mean']:.3f} ± unknown"
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


def _again(report: Report) -> str:
    """The scripts beside the page, and for MiCA the command."""
    rows = report["equal"]["methods"]
    if not rows:
        return ""
    scripts = _listed([f"`{settings.SCRIPTS[row['method']]}`" for row in rows])
    text = (
        f"## To do it again\n\n{scripts} beside this page repeat the trainings of the first table (seed 0)."
    )
    mica = [row for row in rows if row["method"] == "mica"]
    if not mica:
        return text
    whole = " (with its whole update)" if mica[0]["share"] < 1 else ""
    return f"{text} MiCA's{whole} can also be had by\n\n```sh\n{command(report, mica[0])}\n```"
