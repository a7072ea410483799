"""The page of a comparison: what was found, a picture, tables, and the settings of the trainings."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from mica.cli.adapt.options import OPTIONS as OF_ADAPT
from mica.cli.compare import settings
from mica.cli.compare.methods import METHODS
from mica.cli.compare.schedule import LEAST
from mica.cli.compare.verdict import FEWEST, HELD_OUT, RETAINED_DOCUMENTS, SEEDS
from mica.cli.output import markdown_table, shown, write_file, write_json, write_text

Report = dict[str, Any]

_UNIT = "nats per token"
# Why nothing can be said of a difference, and what to do, by the part of the error that is unknown
_MISSING = {
    HELD_OUT: f"the held-out blocks are of fewer than {FEWEST} documents (give a text of more)",
    RETAINED_DOCUMENTS: f"the retained blocks are of fewer than {FEWEST} documents (give --retain more)",
    SEEDS: "no two methods have second seeds (give more --budget or --seeds)",
}


def write(output: Path, report: Report) -> None:
    """Write page, picture and data of ``report`` to ``output``. Raises UsageError if that fails."""
    from mica.cli.compare import picture  # imports matplotlib

    write_json("--output", output / settings.REPORT, report)
    write_file("--output", output / settings.PICTURE, lambda path: picture.trade_off(report, path))
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
    """Which method to take; where that is undecided, what would decide."""
    best = report["equal"]["methods"][0]
    if not report["undecided"]:
        return [f"Take {_title(best)}: at equal forgetting it learned most."]
    tied = [_title(one) for one in report["undecided"]]
    lines = [f"Undecided between {_listed([_title(best), *tied])}, whose costs are below."]
    others: dict[str, list[str]] = {}
    for one in report["undecided"]:
        others.setdefault(_what_decides(one, output), []).append(_title(one))
    return lines + [f"The lead over {_listed(titles)}: {what}." for what, titles in others.items()]


def _what_decides(one: Report, output: Path) -> str:
    if one["missing"]:
        return f"nothing can be said, as {_listed([_MISSING[source] for source in one['missing']])}"
    needed = one["needed"]
    if needed is None:
        return "more seeds would not show that it is more than chance; a text of more documents might"
    budget = f"--budget {needed['minutes']} --seeds {needed['seeds']}"
    return (
        f"if it is as large as it looks, {needed['seeds']} seeds of both would show it, in about "
        f"{needed['minutes']} minutes altogether: `mica compare --output {output} --resume {budget}`"
    )


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
        _trainings(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _names(paths: list[str]) -> str:
    return _listed([f"`{shown(Path(path).name)}`" for path in paths])


def _setting(report: Report) -> str:
    facts = report["facts"]
    used = report["settings"]
    documents = facts["documents"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    steps = max((row["steps"] for row in report["any"]["methods"]), default=0)
    short = ""
    if 0 < steps < LEAST:
        short = f" **They are short**: {steps} steps say little about a long training."
    args = _args(report)
    tokens = args.batch_size * args.gradient_accumulation_steps * args.sequence_length
    how = [
        f"*Learned* is the fall of the mean loss on {facts['test']} blocks of held-out text (documents: "
        f"{documents['test']}), *forgotten* its rise on {facts['retained']} blocks of "
        f"{_names(used['retain'])} (documents: {documents['retained']}; negative: it fell), both in {_UNIT}: "
        "0.1 less is a perplexity that is 10 % lower.",
        f"Learning rates and the limit of forgetting were chosen by {facts['validation']} other held-out "
        "blocks. An update that forgets more than the limit counts by the share that is within it.",
        "A method that is in neither table learned nothing. A difference is that of the seeds that both "
        "have. After ± stands its 95 % interval, for other "
        "documents and seeds; all of them hold at once.",
    ]
    what = [
        f"All trainings that are compared have {steps} steps of {tokens:,} tokens.{short}",
        f"{facts['parameters'] / 1e6:,.0f} million parameters in {facts['dtype']}; {facts['tokens']:,} "
        f"tokens of text, {facts['blocks']:,} training blocks of {facts['sequence_length']}.",
        f"{report['seconds'] / 60:.1f} minutes, {facts['jobs']} trainings at a time on the "
        f"{facts['device']} (threads of each: {facts['threads']}); {versions}.",
    ]
    return f"{' '.join(how)}\n\n{' '.join(what)}"


def _table(report: Report, at: Report) -> str:
    before = report["perplexity"]
    rows = []
    for row in at["methods"]:
        behind = "" if row["behind"] is None else _plus_minus(row["behind"])
        share = "" if row["share"] == 1 else f"{row['share']:.2f}"
        after = [f"{row['perplexity'][name]:.2f}" for name in ("held_out", "retained")]
        amounts = [f"{row['learned']:.3f}", behind, f"{row['forgotten']:.3f}"]
        rows.append([_title(row), *amounts, *after, f"{row['rate']:g}", share, str(row["seeds"])])
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


def _args(report: Report) -> argparse.Namespace:
    """The options of `mica adapt` that all trainings share."""
    return settings.of_mica_adapt(report["settings"], Path("run")).args


def _trainings(report: Report) -> str:
    """The settings of the trainings, and for MiCA the command."""
    args = _args(report)
    text = (
        f"## The trainings\n\nMiCA has rank {args.rank} and alpha {args.alpha}, LoRA half of both, on "
        f"{args.target_modules}. {args.optimizer}, {args.scheduler} schedule, warm-up "
        f"{args.warmup_ratio:g}, weight decay {args.weight_decay:g}, gradients clipped at "
        f"{args.max_grad_norm:g}; seeds from 0."
    )
    mica = [row for row in report["equal"]["methods"] if row["method"] == "mica"]
    if not mica:
        return text
    return f"{text} To train MiCA so, with its whole update:\n\n```sh\n{command(report, mica[0])}\n```"


def command(report: Report, row: Report) -> str:
    """The `mica adapt` command of the training of MiCA in ``row``: the same blocks in the same order."""
    words = ["mica", "adapt"]
    for name, value in settings.shared(report["settings"]).items():
        values = value if isinstance(value, list) else [value]
        words += [OF_ADAPT[name].flag, *map(str, values)]
    words += ["--learning-rate", f"{row['rate']:g}", "--steps", str(row["steps"]), "--output", "run"]
    return shlex.join(words)
