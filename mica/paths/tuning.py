"""Which form of a layer is the fastest on this device: timed at the first call of its kind, then known.

Nobody can say for a device that was not measured which of `mica.kernels.configs.FORM_NAMES` is the fastest
there, nor from how much work on kernels are worth their launches. So each device finds out for itself: the
operators time a `Kind` of layer on scratch operands (`mica.ops.trial`), by the wall clock, so that the host's
time counts as it does in training. `Table` keeps the answers, in memory and in a file for each device and
versions: all calls of a kind run one form, in this process and in those to come.

``MICA_TUNE`` decides: "0", "off", "false" or "no": nothing is measured, and layers take the reference path.
"again": what is known of a device is forgotten and measured anew. Unset, or "1", "on", "true", "yes": the
files are in ``mica/tuning`` of the Hugging Face cache (HF_HOME). Anything else is another folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple

import filelock
import torch
from huggingface_hub import constants
from torch import Tensor

from mica import __version__
from mica.folders import named_folder, write_whole
from mica.kernels import runtime
from mica.kernels.limits import names_of

REFERENCE = "reference"
NATIVE = "C++"  # the reference path as C++ calls it: the whole layer, forward and backward

UNTIMED = 3  # calls: kernels are compiled, and the allocator finds its blocks
ROUNDS = 5  # in which each form has its turn, so that a slow moment of the machine does not hit one alone
CALLS = 3  # that are timed in a round, back to back, after one that is not
MARGIN = 0.02  # of the reference's time: what another form gains at least, beyond the noise

WAITED = 10.0  # seconds for other processes that write a measurement

# The largest difference from the reference's result, relative to it (Frobenius norms): both are rounded, and
# fp32 products may be of TF32.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}

clock = time.perf_counter


class Kind(NamedTuple):
    """What calls of a layer have in common that run in the same form.

    Attributes:
        trains_B: Whether lora_B may be trained.
        dtypes: Those of x, of the low-rank products, of lora_A and of lora_B.
        rank, in_features, out_features: The sizes of the layer.
        tokens: The number of tokens, rounded up to a power of two.
        has_dropout: Whether elements of x are dropped.
        is_aligned: Whether 16 divides the addresses of x and of the gradient.
    """

    trains_B: bool
    dtypes: tuple[torch.dtype, ...]
    rank: int
    in_features: int
    out_features: int
    tokens: int
    has_dropout: bool
    is_aligned: bool

    def __str__(self) -> str:
        adapter = "LoRA" if self.trains_B else "MiCA"
        text = (
            f"{self.out_features} x {self.in_features}, up to {self.tokens} tokens, {adapter}, "
            f"r = {self.rank}, {names_of(self.dtypes)}"
        )
        text += ", dropout" if self.has_dropout else ""
        return text if self.is_aligned else f"{text}, unaligned"


class Part(NamedTuple):
    """How a layer's forward, or its backward, runs.

    Attributes:
        form: The form.
        microseconds: The time that each form took for a call, in µs; empty where nothing was measured.
    """

    form: str
    microseconds: Mapping[str, float] = {}

    def __str__(self) -> str:
        return f"measured here: {self.found()}" if self.microseconds else "not measured"

    def found(self) -> str:
        times = self.microseconds
        reference = times.get(NATIVE, times.get(REFERENCE))
        if reference is None:
            return self.form
        if self.form != REFERENCE:
            return f"{self.form}, {reference / times[self.form]:.2f} times as fast as the reference path"
        others = [times[form] for form in times if form not in (NATIVE, REFERENCE)]
        if not others:
            return "reference, as no form on kernels can run"
        return f"reference, {min(others) / reference:.2f} times as fast as kernels"


class Layer(NamedTuple):
    """What is known of a kind.

    Attributes:
        forward, backward: How each of the two passes runs.
        day: The day of the measurement, as ISO 8601 has it; "" if no file keeps it.
        is_settled: Whether calls of this process run so. Otherwise it is what a file says, and the next call
            settles it.
    """

    forward: Part
    backward: Part
    day: str = ""
    is_settled: bool = True


UNMEASURED = Layer(Part(REFERENCE), Part(REFERENCE))


class UnsettledError(Exception):
    """Nothing has been computed yet: the form of this kind of layer is to be settled first."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(kind)
        self.kind = kind


def rounded_up(tokens: int) -> int:
    """The next power of two; 0 stays."""
    return 1 << (tokens - 1).bit_length() if tokens else 0


def forms_of(kind: Kind) -> list[str]:
    """The forms in which kernels may run a layer of this kind."""
    row_dtype, product_dtype, *_ = kind.dtypes
    forms = ["split"]
    # the vendor's fp32 products use no tensor cores, and a mask, of x or of the update, would be stored
    if product_dtype is row_dtype and product_dtype.itemsize == 2 and not kind.has_dropout:
        forms.append("first")
        if kind.rank % 16 == 0:  # h and g as the kernels write them, without padding
            forms.append("mixed")
    if kind.is_aligned:  # or the fused kernels take all 255 registers of sm_80
        forms.append("fused")
    return forms


# ---------------------------------------------------------------------------------------------------
# what is known
# ---------------------------------------------------------------------------------------------------


class Table:
    """What is known of one device: what its file said when this was made, and what was settled since.

    Of several processes each measures what the file did not say to it. The first to write a kind stays in the
    file.
    """

    def __init__(self, device: torch.device) -> None:
        setting = os.environ.get("MICA_TUNE", "").strip()
        is_again = setting.lower() == "again"
        default = Path(constants.HF_HOME) / "mica" / "tuning"
        folder = named_folder("on" if is_again or not setting else setting, default)
        self.is_on = folder is not None
        self.path = (folder or default) / _file_name(device_name(device))
        self.measuring = threading.Lock()
        self.settled: dict[Kind, Layer] = {}
        if is_again:
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.stored = _read(self.path) if self.is_on and not is_again else {}

    def find(self, kind: Kind) -> Layer | None:
        return self.settled.get(kind) or self._said(kind)

    def _said(self, kind: Kind) -> Layer | None:
        """What the file says, if calls of this kind can run so."""
        layer = self.stored.get(str(kind))
        if layer is None or not {layer.forward.form, layer.backward.form} <= {REFERENCE, *forms_of(kind)}:
            return None
        return layer

    def settle(self, kind: Kind, layer: Layer) -> None:
        """Run every call of this kind so from now on, in the processes to come too if it was measured."""
        self.settled[kind] = layer._replace(is_settled=True)
        if not layer.day or self._said(kind) is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_suffix(".lock"), timeout=WAITED):
                self.stored = _read(self.path)
                if self._said(kind) is None:
                    self.stored[str(kind)] = layer
                    write_whole(self.path, _content(self.stored))
        except (OSError, NotImplementedError) as error:  # no locks there, by older releases of filelock
            what = f"MiCA cannot keep in {self.path.parent} which form of a layer is the fastest"
            warnings.warn(f"{what}, so the next process measures it again: {error}", stacklevel=2)


_tables: dict[torch.device, Table] = {}


def table(device: torch.device) -> Table:
    """That of the device, which is read from its file once."""
    found = _tables.get(device)
    if found is None:
        found = _tables.setdefault(device, Table(device))
    return found


def clear() -> None:
    """Read the environment and the files again."""
    _tables.clear()


@functools.cache
def device_name(device: torch.device) -> str:
    """The name of a GPU, or the type of another device; GPUs of one name are taken to be equally fast."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def why_not_now(device: torch.device) -> str | None:
    """Why nothing can be measured at this moment; what is known counts nevertheless."""
    if not table(device).is_on:
        return f"MICA_TUNE={os.environ.get('MICA_TUNE')}"
    if torch.are_deterministic_algorithms_enabled():
        return "nothing is measured in a deterministic run"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "nothing is measured while a CUDA graph is captured"
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # a trial has hooks of its own
        return "nothing is measured while saved-tensor hooks are disabled"
    if torch._C._current_graph_task_id() != -1:
        return "nothing is measured within a backward"
    return None


# ---------------------------------------------------------------------------------------------------
# the file
# ---------------------------------------------------------------------------------------------------

_FORMAT = 1  # raise it whenever a measurement of before does not hold any more


def _versions() -> dict[str, str | int | None]:
    """A file of others is not read: what was the fastest there may not be here."""
    return {
        "format": _FORMAT,
        "mica": __version__,
        "torch": torch.__version__,
        "triton": runtime.triton_version(),
    }


def _file_name(name: str) -> str:
    versions = "-".join(map(str, _versions().values()))
    return re.sub(r"[^\w.+-]+", "-", f"{name}-{versions}.json")


_DAMAGE = (ValueError, KeyError, TypeError, AttributeError)


def _read(path: Path) -> dict[str, Layer]:
    """By the words for kinds, without damaged records.

    Nothing where there is no file, or one that is damaged as a whole or of other versions.
    """
    layers = {}
    with contextlib.suppress(OSError):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["versions"] == _versions():
                for kind, record in content["layers"].items():
                    with contextlib.suppress(*_DAMAGE):
                        layers[kind] = _layer(**record)
        except _DAMAGE:
            warnings.warn(f"MiCA measures anew what {path} does not say: it is damaged.", stacklevel=2)
    return layers


def _layer(forward: dict, backward: dict, day: str) -> Layer:
    """A record of the file. Raises one of ``_DAMAGE`` unless it is as `_content` writes them."""
    parts = Part(**forward), Part(**backward)
    for form, times in parts:
        are_positive = all(0 < time < math.inf for time in times.values())
        if not are_positive or not times.keys() >= {REFERENCE, form}:
            raise ValueError("the form of a pass, and the reference, must have a time")
    date.fromisoformat(day)
    return Layer(*parts, day, is_settled=False)


def _content(layers: dict[str, Layer]) -> bytes:
    entries = {}
    for kind, (forward, backward, day, _) in layers.items():
        entries[kind] = {"forward": forward._asdict(), "backward": backward._asdict(), "day": day}
    text = json.dumps({"versions": _versions(), "layers": entries}, indent=1)
    return f"{text}\n".encode()


# ---------------------------------------------------------------------------------------------------
# measuring
# ---------------------------------------------------------------------------------------------------

Results = Sequence[Tensor]
Rounds = dict[str, list[float]]  # form -> seconds a call, of each round


def timed(
    calls: Mapping[str, Callable[[], Results]],
    tolerance: float,
    synchronize: Callable[[], None],
    leave_out: Callable[[str, Exception], None],
) -> Rounds:
    """The time of a call in each form; a form that raises, or gives another result, is left out.

    Args:
        calls: A function for each form. `REFERENCE` is one of them, to whose results those of the others are
            compared; what it raises is raised.
        tolerance: The largest difference from it that is accepted, see `TOLERANCES`.
        synchronize: A function that waits for the device.
        leave_out: A function that is told the form that is left out, and why.

    Returns:
        The seconds of a call in each round, by form.
    """
    expected = calls[REFERENCE]()
    rounds = {}
    for form, call in calls.items():
        with _left_out(form, rounds, leave_out):
            _check(call(), expected, tolerance)
            for _ in range(UNTIMED - 1):
                call()
            rounds[form] = []
    del expected
    for _ in range(ROUNDS):
        for form in [*rounds]:
            with _left_out(form, rounds, leave_out):
                rounds[form].append(_seconds(calls[form], synchronize))
    return rounds


@contextlib.contextmanager
def _left_out(form: str, rounds: Rounds, leave_out: Callable[[str, Exception], None]):
    """Whatever a form raises within, no memory left, a kernel that does not compile, it is out."""
    try:
        yield
    except Exception as error:
        if form == REFERENCE:
            raise
        rounds.pop(form, None)
        leave_out(form, error)


def _seconds(call: Callable[[], Results], synchronize: Callable[[], None]) -> float:
    """Of one call, out of several back to back: the larger of the host's and the device's time."""
    call()
    synchronize()
    start = clock()
    for _ in range(CALLS):
        call()
    synchronize()
    return (clock() - start) / CALLS


@torch.no_grad()
def _check(results: Results, expected: Results, tolerance: float) -> None:
    for result, exact in zip(results, expected, strict=True):
        difference = torch.linalg.vector_norm(result - exact, dtype=torch.float32)
        scale = torch.linalg.vector_norm(exact, dtype=torch.float32)
        if not difference <= tolerance * scale:  # NaN, too
            raise ValueError(f"its result is off by {float(difference / scale):.1e}, more than {tolerance}")


def chosen(forward: Rounds, backward: Rounds) -> tuple[Part, Part]:
    """The forms of both passes: the reference, unless others are faster by more than the noise.

    Where C++ calls the reference path it calls both passes; any other pair is called from Python. So the pair
    of the fastest forms has to be faster than C++ altogether.
    """
    forms = [fastest(rounds) for rounds in (forward, backward)]
    if NATIVE in forward and NATIVE in backward:
        pair = [sum(both) for both in zip(forward[forms[0]], backward[forms[1]], strict=True)]
        native = [sum(both) for both in zip(forward[NATIVE], backward[NATIVE], strict=True)]
        if not is_faster(pair, native):
            forms = [REFERENCE, REFERENCE]
    parts = []
    for form, rounds in zip(forms, (forward, backward), strict=True):
        times = {name: round(1e6 * median(seconds), 1) for name, seconds in rounds.items()}
        parts.append(Part(form, times))
    return tuple(parts)


def fastest(rounds: Rounds) -> str:
    """The form that is called from Python."""
    best = REFERENCE
    for form, seconds in rounds.items():
        is_certain = form != NATIVE and is_faster(seconds, rounds[REFERENCE])
        if is_certain and median(seconds) < median(rounds[best]):
            best = form
    return best


def is_faster(seconds: Sequence[float], reference: Sequence[float]) -> bool:
    """Whether all rounds but the slowest take less than all rounds of the reference but its fastest.

    So one slow moment of the machine decides nothing, and neither does a difference within the noise.
    """
    slow = sorted(seconds)[-2]
    fast = sorted(reference)[1]
    return slow < (1 - MARGIN) * fast
