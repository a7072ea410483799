"""``python -m bench.report FILE``: the report of a result, or of the journal of an interrupted run."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.report.markdown import report
from bench.results import journal


def write(file: Path) -> str:
    """Write the report, and the result of a journal, next to the file; returns the report."""
    result = journal.load(file)
    if file.suffix == ".jsonl":
        result.save(file.with_suffix(".json"))
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
