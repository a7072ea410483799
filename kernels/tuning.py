"""An opt-in tuner: which of a few choices is fastest for a kind of call on this device, measured and kept.

Off by default. ``MICA_TUNE=1`` measures what has no entry yet, once a kind of call (a pause of a second or
so), and writes it to ``MICA_TUNE_FILE``, by default ``mica/tuning.json`` under ``HF_HOME``. Entries that are
there are always used. They hold for one device name and one version of torch and Triton: Triton's own disk
cache goes by architecture, and an H100 PCIe is not an H100 SXM. What a launch reads and writes in place is
put back after the trials.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from statistics import median

import torch
import triton
from torch import Tensor

from mica.kernels.common import power_of_two
from mica.kernels.configs import Config
from mica.kernels.runtime import raw_variable

_logger = logging.getLogger("mica")
_ROUNDS = 3  # rounds of all choices in turn; the median of each counts

# What the file held when it was last read or written. Its keys are words: kernel, device, versions of torch
# and Triton, shapes, dtypes. An answer that is none of a call's choices is not taken.
_table: dict[str, str] | None = None
_table_path: Path | None = None
_idle: bool | None = None
_generation = 0  # how often `forget` was called
_environment = [raw_variable(name) for name in ("MICA_TUNE", "MICA_TUNE_FILE", "HF_HOME")]


def path() -> Path:
    default = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "mica", "tuning.json")
    return Path(os.environ.get("MICA_TUNE_FILE") or default).expanduser()


def is_measuring() -> bool:
    return os.environ.get("MICA_TUNE", "0") == "1"


def bucket(num_tokens: int) -> int:
    """Token counts between two powers of two share an entry."""
    return power_of_two(max(1, num_tokens))


def pick(
    name: str,
    device: torch.device,
    key: Iterable[object],
    choices: dict[str, Callable[[], object]],
    updates: Iterable[Tensor] = (),
) -> str:
    """The name of the choice to run: the one on file, else (where tuning is on) the fastest, else the first.

    Args:
        name: of the kernel or the operator.
        device: where it runs.
        key: what the answer may depend on (shapes, dtypes), in words that are stable between runs.
        choices: name -> function that runs it once, the default first.
        updates: tensors that running a choice changes and that must come back as they were.
    """
    default = next(iter(choices))
    if len(choices) == 1 or device.type == "meta" or is_idle():
        return default
    table = _read()
    entry = " | ".join([name, _machine(device), *map(str, key)])
    found = table.get(entry)
    if found in choices:
        return found
    if not is_measuring() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return default
    times = _measure(choices, device, list(updates))
    fastest = min(times, key=times.__getitem__)
    _write(entry, fastest)
    _logger.info("tuned %s: %s of %s", entry, fastest, times)
    return fastest


def pick_config(
    name: str,
    device: torch.device,
    key: Iterable[object],
    candidates: Sequence[Config],
    launch: Callable[[Config], Callable[[], object]],
    updates: Iterable[Tensor] = (),
) -> Config:
    """`pick` among launch configurations; ``launch(config)`` gives the launch that one would make."""
    if len(candidates) == 1 or device.type == "meta" or is_idle():
        return candidates[0]
    named = {"x".join(map(str, candidate)): candidate for candidate in candidates}
    choices = {name: _made_once(launch, candidate) for name, candidate in named.items()}
    return named[pick(name, device, key, choices, updates)]


def _made_once(launch: Callable[[Config], Callable[[], object]], config: Config) -> Callable[[], object]:
    """A function that makes one and the same launch at each call: planning it is not measured."""
    planned = []

    def run() -> object:
        if not planned:
            planned.append(launch(config))
        return planned[0]()

    return run


def is_idle() -> bool:
    """Whether nothing is on file and nothing is to be measured: found out once, for calls are frequent."""
    global _idle
    if _idle is None:
        _idle = not is_measuring() and not _read()
    return _idle


def forget() -> None:
    """Look at the environment and the file again at the next call."""
    global _table, _idle, _generation
    _table = _idle = None
    _generation += 1


def state() -> Hashable:
    """What an answer of `pick` hangs on beside its arguments: as long as this is the same, it may be kept."""
    return _generation if is_idle() else (_generation, *(value() for value in _environment))


def is_settled(device: torch.device) -> bool:
    """Whether `pick` answers now as it will later: while a graph is captured, it measures nothing."""
    return not (is_measuring() and device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}"


def _measure(choices, device: torch.device, updates: list[Tensor]) -> dict[str, float]:
    """Choice -> median milliseconds over the rounds. A choice that cannot run on this device is left out."""
    before = [tensor.clone() for tensor in updates]
    times: dict[str, list[float]] = {}
    try:
        for turn in range(_ROUNDS):
            for name, run in choices.items():
                if turn and name not in times:
                    continue
                try:
                    times.setdefault(name, []).append(_time(run, device))
                except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
                    _logger.info("tuning: %s does not run here: %s", name, error)
                    times.pop(name, None)
    finally:
        for tensor, saved in zip(updates, before, strict=True):
            tensor.copy_(saved)
    if not times:
        raise RuntimeError(f"none of the configurations {list(choices)} runs on {device}.")
    return {name: median(found) for name, found in times.items()}


def _time(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")  # flushes the L2 cache
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _read() -> dict[str, str]:
    global _table, _table_path
    if _table is None or _table_path != path():
        _table, _table_path = load(path()), path()
    return _table


def load(file: Path) -> dict[str, str]:
    try:
        table = json.loads(file.read_text())
        if isinstance(table, dict) and all(isinstance(value, str) for value in table.values()):
            return table
        raise ValueError("not a table of names")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # the last: a million brackets
        _logger.warning("the tuning table %s is not used: %s", file, error)
        return {}


def _write(entry: str, choice: str) -> None:
    """Put the file in place whole, with what others have added since; trouble costs a line in the log."""
    global _table
    file = path()
    _table = {**load(file), **_read(), entry: choice}
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(_table, indent=1, sort_keys=True))
        os.replace(scratch, file)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        _logger.warning("the tuning table cannot be kept in %s: %s", file, error)
