"""``python -m bench.fits``: what `mica fits` counts for models of which only the configuration is here.

It takes a minute and a half of CPU time, and no weights.
"""

import json
from pathlib import Path

from bench import pages
from mica import cli
from mica.cli import fits

MODELS = Path(__file__).parent / "models"
TOKENS = 4096
NF4 = ["--bits", "4", "--loss", "chunked"]
HOWS = {pages.BF16: [], pages.NF4: NF4, pages.NF4_DROPOUT: [*NF4, "--dropout", "0.05"]}


def counted(model: str, how: str) -> list[dict]:
    """The rows of one step, as ``mica fits --json`` has them, with the fewest layers for each device."""
    arguments = ["fits", str(MODELS / model), "--tokens", str(TOKENS), *HOWS[how]]
    rows = []
    for setup in fits.measured(cli.parser().parse_args(arguments)):
        fewest = {str(memory): setup.fewest(memory)[0] for memory in pages.DEVICES}
        rows += [row | {"fewest_checkpointed": fewest} for row in setup.rows()]
    return rows


def main() -> None:
    """Write the results, and the pages that show them."""
    models = {}
    for folder in sorted(MODELS.iterdir()):
        models[folder.name] = {how: counted(folder.name, how) for how in HOWS}
    found = {"tokens": TOKENS, "models": models}
    (pages.RESULTS / "fits.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pages.write()


if __name__ == "__main__":
    main()
