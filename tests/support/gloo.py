"""Functions run by two gloo processes at once; what each returns comes back, an exception as itself."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.support.server import SERVER

METHOD = SERVER.get_start_method()


def run(function, *arguments, count=2):
    """[function(rank, *arguments) of each process]; ``function`` is a module's, its result can be saved."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = count, folder, function, arguments
        multiprocessing.start_processes(_process, arguments, nprocs=count, start_method=METHOD)
        return [torch.load(Path(folder) / str(rank), weights_only=False) for rank in range(count)]


def _process(rank, count, folder, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    torch.save(attempt(function, rank, *arguments), Path(folder) / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def attempt(function, *arguments):
    """Its result, or the exception that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def pair(results, name):
    """What each process has under this name; an exception is raised."""
    outcomes = [result if isinstance(result, Exception) else result[name] for result in results]
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes
