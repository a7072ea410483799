"""Runs a script for GPUs on the CPU, in one of several processes: as it stands.

``python -m tests.mica.fast.on_gloo FOLDER SCRIPT ARGUMENT …``, which a launcher starts in each process,
leaves what `run` returns in FOLDER, in a file named by the process's rank.

accelerate offers FSDP on accelerators only; here it is told that gloo is one (and, with
ACCELERATE_TORCH_DEVICE=cpu, where it computes).
"""

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate.utils import DistributedType

import mica.fast
from tests.support.counts import whatever_language
from tests.support.models import adapted_layers


def run(script: str, *arguments: str) -> dict:
    """What the script's ``trainer`` has done in this process, and what was printed."""
    torch.set_num_threads(1)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    sys.argv = [script, *arguments]
    backend, printed = ("gloo", DistributedType.MULTI_GPU), io.StringIO()
    with (
        patch("accelerate.state.PartialState._prepare_backend", lambda *args, **kwargs: backend),
        contextlib.redirect_stdout(printed),
    ):
        trainer = runpy.run_path(script, run_name="__main__")["trainer"]
    layers = adapted_layers(trainer.model).values()
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "paths": mica.fast.explain(trainer.model).counts(),
        "calls": whatever_language(mica.fast.call_counts),
        "sharded": all(hasattr(layer.base_layer.weight, "to_local") for layer in layers),
        "printed": printed.getvalue(),
    }


if __name__ == "__main__":
    folder, script, *arguments = sys.argv[1:]
    torch.save(run(script, *arguments), Path(folder) / os.environ["RANK"])
