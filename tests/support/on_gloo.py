"""Runs a script for GPUs on the CPU: ``torchrun … -m tests.support.on_gloo SCRIPT REPORT ARGUMENTS…``

accelerate offers FSDP on accelerators only; here it is told that gloo is one (and, with
ACCELERATE_TORCH_DEVICE=cpu, where it computes). The script itself runs as it stands.

REPORT-0, REPORT-1, ...: JSON of what the script's ``trainer`` has done in each process.
"""

import json
import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

from accelerate.utils import DistributedType

import mica.fast
from tests.support.models import adapted_layers


def main(script: str, report: str, *arguments: str) -> None:
    sys.argv = [script, *arguments]
    backend = ("gloo", DistributedType.MULTI_GPU)
    with patch("accelerate.state.PartialState._prepare_backend", lambda *args, **kwargs: backend):
        trainer = runpy.run_path(script, run_name="__main__")["trainer"]
    done = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "paths": mica.fast.explain(trainer.model).counts(),
        "calls": dict(mica.fast.call_counts),
        "sharded": all(
            hasattr(layer.base_layer.weight, "to_local") for layer in adapted_layers(trainer.model).values()
        ),
    }
    Path(f"{report}-{os.environ['RANK']}").write_text(json.dumps(done), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
