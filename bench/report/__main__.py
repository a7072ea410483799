"""``python -m bench.report FILE``: the report of a result, or of the journal of an interrupted run."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.report.markdown import report
from bench.results import journal
from bench.results.schema import Result


def load(file: Path) -> tuple[Result, Path]:
    """The result and its file. A journal is folded into one, with the machine of an existing result file."""
    if file.suffix != ".jsonl":
        return Result.load(file), file
    entries = journal.read(file)
    file = file.with_suffix(".json")
    machine = Result.load(file).machine if file.exists() else {}
    result = journal.fold(entries, machine)
    result.save(file)
    return result, file


def write(file: Path) -> str:
    """Write the report next to the result file; returns it."""
    result, file = load(file)
    text = report(result)
    file.with_suffix(".md").write_text(text)
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("file", type=Path, help="a run's .json, or its .jsonl")
    file = parser.parse_args(argv).file
    if not file.is_file():
        parser.error(f"there is no {file}")
    print(write(file), end="")


if __name__ == "__main__":
    main()
