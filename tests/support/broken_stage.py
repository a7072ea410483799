"""A pytest plugin for dry runs of `bench.gpu`: faults in the stages that MICA_TEST_FAULTS names.

For example "kernels:raise,layers:kill". *raise*, *wrong*: in every launch of a kernel and call of the solver.
*memory* (there is none left), *hang*, *kill*: in the first one, and not again, in the process that is started
next neither.
"""

import dataclasses
import os
import signal
import time
from functools import wraps
from pathlib import Path

import torch

import mica
from mica.kernels import launching

FAULTS = dict(one.split(":") for one in os.environ["MICA_TEST_FAULTS"].split(","))
STAGE = os.environ.get("MICA_BENCH_STAGE", "")


def _is_first() -> bool:
    """Whether this is the first call in any process of this stage."""
    try:
        Path(f"{os.environ['MICA_BENCH_JOURNAL']}.{STAGE}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _go_wrong(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("injected")
    if fault not in ("memory", "hang", "kill") or not _is_first():
        return
    if fault == "memory":
        raise torch.OutOfMemoryError("out of memory, injected")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def _break(fault: str) -> None:
    launch, solve = launching.Plan.__call__, mica.minor_subspace

    @wraps(launch)
    def launched(plan, *tensors):
        _go_wrong(fault)
        launch(plan, *tensors)
        names = plan.kernel.arg_names
        if fault == "wrong" and "out_ptr" in names:
            tensors[names.index("out_ptr")].mul_(1.5)

    @wraps(solve)
    def solved(*args, **kwargs):
        _go_wrong(fault)
        subspace = solve(*args, **kwargs)
        return subspace if fault != "wrong" else dataclasses.replace(subspace, basis=subspace.basis * 1.5)

    launching.Plan.__call__, mica.minor_subspace = launched, solved


if STAGE in FAULTS:
    _break(FAULTS[STAGE])
