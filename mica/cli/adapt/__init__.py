"""``mica adapt``: continued pretraining of a causal language model on text with MiCA, LoRA or DoRA."""

import argparse
import importlib.util

from mica.cli.adapt import config, folder, options
from mica.cli.arguments import add_command, example
from mica.cli.extras import HOW_TO_INSTALL
from mica.cli.output import tell_once
from mica.errors import UsageError

_DESCRIPTION = """\
Continued pretraining with MiCA, LoRA or DoRA. To train in several processes, start them with torchrun
--nproc-per-node N -m mica adapt ... or with accelerate launch -m mica adapt ..."""
_EXAMPLE = example(
    "mica adapt --model HuggingFaceTB/SmolLM2-135M --text corpus.jsonl --output run",
    "mica adapt --output run --resume",
    says="The first trains, and writes a PEFT adapter with its model card to run; the second goes on if it "
    "was stopped.",
)
NEEDED = ("accelerate", "datasets", "yaml")


def add_parser(commands) -> None:
    """Declare ``mica adapt`` on an argparse subparsers object."""
    parser = add_command(
        commands,
        "adapt",
        run,
        help="continued pretraining on text with MiCA, LoRA or DoRA",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    options.declare(parser)


def run(given: argparse.Namespace) -> int:
    """Run the command; returns the exit status. Cheap checks come first, before torch is imported.

    Raises UsageError for bad input.
    """
    check_libraries()
    settings = config.resolve(given)
    folder.check(settings.args)
    tell_once(config.STARTING)

    from mica.cli.adapt.session import adapt

    return adapt(settings)


def check_libraries() -> None:
    """Raise UsageError if a library is not installed that training needs; none is imported."""
    missing = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"training needs {', '.join(missing)}: {HOW_TO_INSTALL}")
