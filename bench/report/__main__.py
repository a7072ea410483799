"""``python -m bench.report FILE``: the report of a result, or of the journal of an interrupted run."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.report.markdown import report
from bench.results import journal
from bench.results.schema import Result

NO_PICTURES = "There are no pictures: seaborn is not installed, or matplotlib."


def load(file: Path) -> tuple[Result, Path]:
    """The result and its file. A journal is folded into one, with the machine of an existing result file."""
    if file.suffix != ".jsonl":
        return Result.load(file), file
    entries, file = journal.read(file), file.with_suffix(".json")
    result = journal.fold(entries, Result.load(file).machine if file.exists() else {})
    result.save(file)
    return result, file


def write(file: Path, with_pictures: bool = True) -> str:
    """Draw the pictures and write the report next to the result file; returns the report."""
    result, file = load(file)
    pictures, note = [], ""
    if with_pictures:
        try:
            from bench.report import plots

            pictures = plots.draw(result, file.parent, file.stem)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(("matplotlib", "seaborn")):
                raise
            note = NO_PICTURES
    text = report(result, pictures, note)
    file.with_suffix(".md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a run's .json, or its .jsonl")
    parser.add_argument("--no-pictures", action="store_true")
    args = parser.parse_args(argv)
    if not args.file.is_file():
        parser.error(f"there is no {args.file}")
    print(write(args.file, not args.no_pictures), end="")


if __name__ == "__main__":
    main()
