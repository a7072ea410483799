"""``python -m bench.fits``: what `mica fits` counts for models of which only the configuration is here."""

import json
from pathlib import Path

from bench import pages
from mica import cli
from mica.cli import fits

MODELS = Path(__file__).parent / "models"
TOKENS = 4096


def counted(model: str) -> list[dict]:
    """The rows of one step, as ``mica fits --json`` has them."""
    arguments = ["fits", str(MODELS / model), "--tokens", str(TOKENS)]
    return fits.measured(cli.parser().parse_args(arguments))


def main() -> None:
    """Write the results, and the pages that show them."""
    models = sorted(folder.name for folder in MODELS.iterdir())
    found = {"tokens": TOKENS, "models": {model: counted(model) for model in models}}
    (pages.RESULTS / "fits.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pages.write()


if __name__ == "__main__":
    main()
