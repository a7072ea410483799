"""What an adapter was trained on, which `mica adapt` records beside it: its base, and its embeddings before.

An adapter names its base by a path or a name on the Hub. Whatever lies there later has the same shapes, so
nothing else would show that it is another one.
"""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft import PeftModel

from mica.cli.adapt import checkpoints, embeddings, fingerprint
from mica.cli.adapt.folder import SUMMARY

_EMBEDDINGS = "embeddings_before"  # in summary.json and in the marker of a checkpoint


def of(model: PeftModel, args: argparse.Namespace, checkpoint: Path | None) -> dict[str, Any]:
    """What a run records, as JSON; before anything is trained or sharded. Every process must call this.

    ``base_weights``: `fingerprint.of` the base, None where it has none. ``embeddings_before``: what trained
    embeddings began with (see `embeddings.start_values`): not in this session, but before the first step of
    all that has trained them. None where there are none, and where ``--adapter`` does not say it.
    """
    recorded = {fingerprint.BASE: None, **fingerprint.facts(model.get_base_model().name_or_path)}
    earlier = checkpoint or args.adapter
    if earlier is None:
        recorded[_EMBEDDINGS] = embeddings.start_values(model)
    else:
        recorded[_EMBEDDINGS] = embeddings_before(earlier)
    return recorded


def embeddings_before(folder: Path) -> dict[str, Any] | None:
    """What the adapter's embeddings were before training; None where ``folder`` does not say it."""
    before = _recorded(folder).get(_EMBEDDINGS)
    if not isinstance(before, dict) or not isinstance(before.get("hashes"), dict):
        return None
    if before.get("dtype") not in embeddings.TRAINABLE:
        return None
    return before


def is_base(folder: Path, location: str) -> bool | None:
    """Whether the weights at ``location`` are those that the adapter in ``folder`` was trained on.

    None where that cannot be said: they are not here, or it is not recorded.
    """
    recorded = _recorded(folder).get(fingerprint.BASE)
    found = fingerprint.of(location)
    if recorded is None or found is None:
        return None
    return found == recorded


def model_type(folder: Path) -> str | None:
    """The base's ``model_type`` in its configuration; None where that is not recorded."""
    return _recorded(folder).get("model_type")


def _recorded(folder: Path) -> dict[str, Any]:
    """summary.json of a run or the marker of a checkpoint; empty where ``folder`` has neither.

    It then was not written by `mica adapt`, or is a copy of its files without these.
    """
    with suppress(OSError, ValueError):
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        if isinstance(summary, dict):
            return summary
    return checkpoints.marked_facts(folder) or {}
