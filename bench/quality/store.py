"""A result of `bench.quality` as a file: complete after every run, and continued by the same command."""

from __future__ import annotations

import json
from pathlib import Path

from mica.errors import UsageError

SAME = ("model", "settings", "recipes", "texts", "plan")  # what makes runs comparable
VERSIONS = ("torch", "peft", "transformers")  # processors are noted with every start


def save(path: Path, result: dict) -> None:
    """As JSON, one line per run. Written beside and renamed, so that a kill leaves this file or the last."""
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in result["runs"])
    scratch = path.with_suffix(".part")
    scratch.write_text(f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n', encoding="utf-8")
    scratch.replace(path)


def resume(path: Path, fresh: dict) -> dict:
    """The result at ``path`` to go on with, else ``fresh``, which has no runs. Methods may be added.

    Raises UsageError if the runs in the file were made by other settings, texts or versions.
    """
    if not path.exists():
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    pairs = {key: (found.get(key), fresh[key]) for key in SAME}
    pairs |= {key: (found.get("machine", {}).get(key), fresh["machine"].get(key)) for key in VERSIONS}
    pairs["plan"] = found["plan"], {name: fresh["plan"].get(name) for name in found["plan"]}
    for key, pair in pairs.items():
        old, new = (json.loads(json.dumps(one)) for one in pair)  # tuples become lists
        if old != new:
            raise UsageError(f"--name {path.stem}: {path} has other {key}: take another name")
    return found | {"plan": fresh["plan"], "starts": found["starts"] + fresh["starts"]}
