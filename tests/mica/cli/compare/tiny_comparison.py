"""`mica compare` with settings that suit the tiny model of `tests.support.tiny_cli`."""

import json
from pathlib import Path

from mica.cli import main

DOCUMENTS = [
    "".join(f"{n} times {n} is {n * n}; " for n in range(start, start + 2)) for start in range(0, 400, 2)
]
KEPT = [f"the quick brown fox jumps over {n} lazy dogs and runs away. " for n in range(60)]
RATES = ("--rates", "mica=0.02,0.05", "lora=0.01,0.02", "dora=0.01,0.02", "full=0.001,0.002")
OPTIONS = "--methods mica lora --rank 4 --sequence-length 32 --steps 8 --seeds 2"


def arguments(folder: Path, model, output, *options) -> list[str]:
    """Those of the command; texts are written to ``folder``. ``options`` come last and win."""
    text, kept = folder / "text.jsonl", folder / "kept.jsonl"
    for path, documents in ((text, DOCUMENTS), (kept, KEPT)):
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    argv = ["compare", "--model", model, "--text", text, "--retain", kept, "--output", output, *RATES[:3]]
    return [str(word) for word in (*argv, *OPTIONS.split(), *options)]


def compare(folder: Path, model, output, *options) -> int:
    """Run it here; returns the exit status."""
    return main(arguments(folder, model, output, *options))


def results(output: Path) -> dict[str, dict]:
    """What was measured, by the name of its file."""
    return {path.stem: json.loads(path.read_text()) for path in (output / "runs").glob("*.json")}


def untimed(output: Path) -> tuple[dict, str]:
    """What was measured, and the page, without seconds and folder: what must be the same again."""
    found = results(output)
    for result in found.values():
        for name in [name for name in result if name.endswith("seconds") or name == "ended"]:
            del result[name]
    page = (output / "README.md").read_text(encoding="utf-8").replace(str(output), "output")
    return found, "\n".join(line for line in page.splitlines() if " minutes" not in line)
