"""``mica compare``: what several methods learn of a text, and what they forget for it."""

import argparse
import os
import time

from mica.cli.adapt import check_libraries
from mica.cli.adapt.options import declare
from mica.cli.arguments import add_command, example
from mica.cli.compare import options
from mica.errors import UsageError

_DESCRIPTION = """\
Short trainings of MiCA, LoRA and full fine-tuning on the same text, at several learning rates: what each has
learned of text that is held out, and forgotten of the text to be retained. One training after the other, on
one device."""
_EXAMPLE = example(
    "mica compare --model HuggingFaceTB/SmolLM2-135M --text corpus.jsonl --retain general.txt --output found",
    "mica compare --output found --resume",
    says="The first takes about 30 minutes and writes found/README.md: what each has learned and forgotten; "
    "the second goes on if the first was stopped.",
)


def add_parser(commands) -> None:
    """Declare ``mica compare`` on an argparse subparsers object."""
    parser = add_command(
        commands,
        "compare",
        run,
        help="what MiCA, LoRA and full fine-tuning learn of a text, and forget",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    declare(parser, options.TABLE, recipes=False)


def run(given: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Raises UsageError for bad input."""
    began = time.monotonic()  # what is imported now takes its time from the budget, too
    check_libraries()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("start it once, without torchrun or accelerate launch: it trains on one device")

    from mica.cli.compare.session import compare

    return compare(given, began)
