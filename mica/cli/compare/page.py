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
from mica.cli.output import markdown_table, shown, write_file, write_json, write_unless_edited

Report = dict[str, Any]

_UNIT = "nats per token"
# Why a lead is uncertain and what to do, by the source of most of its doubt
_REMEDIES = {
    HELD_OUT: "the held-out documents are few or differ: give a --text of more documents",
    RETAINED_DOCUMENTS: "the retained documents are few or differ: give a --retain of more documents",
    SEEDS: "seeds are few or differ: `mica compare --output {} --resume --budget {:g} --seeds {}` adds more",
}
_SETTING = """\
*Learned* is the fall of the mean loss on {test} blocks of held-out text (documents: {documents[test]}), \
*forgotten* its rise on {retained} blocks of {retain} (documents: {documents[retained]}; negative: it fell), \
both in {unit}: 0.1 less is a perplexity that is 10 % lower. Learning rates and the limit of forgetting were \
chosen by {validation} other held-out blocks. An update that forgets more than the limit counts by the share \
of it that is within; its figures divided by that share are those of the whole. A method that is not in the \
table learned nothing. A difference is that of the seeds that both have. After ± stands its 95 % interval, \
for other documents and seeds; all of them hold at once. It is unknown with fewer than {fewest} documents, \
and without second seeds.

All trainings in the table have {steps} steps of {step_tokens:,} tokens. {millions:,.0f} million parameters \
in {dtype}; {tokens:,} tokens of text, {blocks:,} training blocks of {sequence_length}. {minutes:.1f} \
minutes, {jobs} at a time on the {device}."""


def write(output: Path, report: Report) -> None:
    """Write page, picture and data of ``report`` to ``output``. Raises UsageError if that fails."""
    from mica.cli.compare import picture  # imports matplotlib

    write_json("--output", output / settings.REPORT, report)
    write_file("--output", output / settings.PICTURE, lambda path: picture.trade_off(report, path))
    write_unless_edited("--output", output / settings.PAGE, markdown(report, output))


def sentences(report: Report, output: Path) -> list[str]:
    """Who learned most at equal forgetting, and which method to take, or what would tell them apart."""
    if not report["methods"]:
        return ["No method has learned anything of this text: no loss on held-out text fell."]
    head = f"At equal forgetting (at most {report['limit']:.3f} {_UNIT})"
    if not report["limit"]:
        head = "Without forgetting any of the retained text"
    best, *others = report["methods"]
    amount = f"{best['learned']:.3f} {_UNIT}"
    if not others:
        return [f"{head}, only {_title(best)} learned anything: {amount}."]
    certain = [row for row in others if not row["behind"]["tied"]]
    tied = [row for row in others if row["behind"]["tied"]]
    text = f"{head}, {_title(best)} learned most, {amount}"
    if certain:
        text += ": " + _listed([f"{_plus_minus(row)} more than {_title(row)}" for row in certain])
    if not tied:
        return [f"{text}.", f"Take {_title(best)}."]
    leads = _listed([f"{_title(row)} ({_plus_minus(row)})" for row in tied])
    undecided = _listed([_title(row) for row in (best, *tied)])
    return [
        f"{text}. Its lead over {leads} may be chance.",
        f"Undecided between {undecided}, whose costs are below.",
        *_remedies(report, tied, output),
    ]


def _remedies(report: Report, tied: list[Report], output: Path) -> list[str]:
    """What would tell the best from those that may be as good, a sentence for each source of doubt."""
    used = report["settings"]
    more = [2 * settings.value(used, name) for name in ("budget", "seeds")]
    lines = []
    for source, remedy in _REMEDIES.items():
        methods = [_title(row) for row in tied if row["behind"]["doubt"] == source]
        if methods:
            why = remedy.format(output, *more)
            lines.append(f"The lead over {_listed(methods)} is uncertain mostly because {why}.")
    return lines


def _title(row: Report) -> str:
    return METHODS[row["method"]].title


def _plus_minus(row: Report) -> str:
    """How much less than the best a method has learned, with the interval of that."""
    behind = row["behind"]
    if behind is None:
        return ""
    if behind["half"] is None:
        return f"{behind['mean']:.3f} ± unknown"
    return f"{behind['mean']:.3f} ± {behind['half']:.3f}"


def _listed(texts: list[str]) -> str:
    if len(texts) < 2:
        return "".join(texts)
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def markdown(report: Report, output: Path) -> str:
    """The page of the comparison in ``output``."""
    used = report["settings"]
    parts = [
        f"# {shown(Path(str(used['model'])).name)} on {_names(used['text'])}: which method?",
        *_bullets("", sentences(report, output)),
        f"![Learned, by what was forgotten]({settings.PICTURE})",
        _table(report),
        _setting(report),
        _costs(report),
        *_bullets("## Failed\n\n", report["failed"]),
        _trainings(report),
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(title: str, lines: list[str]) -> list[str]:
    """A list below its title; nothing where it is empty."""
    if not lines:
        return []
    return [title + "\n".join(f"- {line}" for line in lines)]


def _names(paths: list[str]) -> str:
    return _listed([f"`{shown(Path(path).name)}`" for path in paths])


def _setting(report: Report) -> str:
    """What was measured, and on what."""
    args = _args(report)
    steps = max((row["steps"] for row in report["methods"]), default=0)
    text = _SETTING
    if 0 < steps < LEAST:
        text += " **The trainings are short**: {steps} steps say little about a long one."
    return text.format(
        **report["facts"],
        steps=steps,
        step_tokens=args.batch_size * args.gradient_accumulation_steps * args.sequence_length,
        retain=_names(report["settings"]["retain"]),
        millions=report["facts"]["parameters"] / 1e6,
        minutes=report["seconds"] / 60,
        fewest=FEWEST,
        unit=_UNIT,
    )


def _table(report: Report) -> str:
    before = report["perplexity"]
    rows = []
    for row in report["methods"]:
        share = "" if row["share"] == 1 else f"{row['share']:.2f}"
        after = [f"{row['perplexity'][name]:.2f}" for name in ("held_out", "retained")]
        amounts = [f"{row['learned']:.3f}", _plus_minus(row), f"{row['forgotten']:.3f}"]
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


def _costs(report: Report) -> str:
    rows = []
    for method, cost in report["costs"].items():
        size = f"{cost['bytes'] / 2**30:.2f} GiB"
        seconds = f"{cost['step_seconds']:.3g} s"
        rows.append([METHODS[method].title, f"{cost['trained_parameters']:,}", size, seconds])
    header = ["", "trained parameters", "weights, gradients, optimiser", "a step"]
    return f"## Costs\n\n{markdown_table(header, rows)}"


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
    mica = [row for row in report["methods"] if row["method"] == "mica"]
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
