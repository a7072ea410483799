"""What a run on a GPU has measured of `mica.kernels.configs`: rows of `FORMS`, and the bound of the host.

Both are decided by the ratios of the rounds: something replaces a default only where the whole 95 % interval
of its ratio says that it is faster.
"""

from __future__ import annotations

from bench.results.cell import Group, Ratio, interval
from bench.results.names import BACKWARD, DEVICE_TIME, FORWARD, WALL, of_form
from bench.results.schema import Result
from mica.kernels.configs import FORM_NAMES, HOST_BOUND, Forms, first_fitting

DEFAULT = "split"
REFERENCE = "reference"


def rows(result: Result) -> tuple[Forms, ...]:
    """The fastest form of each size by device time, the most tokens first; without what was not timed."""
    timed = {"suite": "forms", "clock": DEVICE_TIME}
    sizes = {(group.axes["tokens"], group.axes["rank"]) for group in result.select(**timed)}
    found = []
    for tokens, rank in sorted(sizes, key=lambda size: (-size[0], size[1])):
        layers = {**timed, "tokens": tokens, "rank": rank}
        forward = fastest([*result.select(**layers, **{"pass": FORWARD})])
        backward = fastest([*result.select(**layers, **{"pass": BACKWARD})])
        if forward and backward:
            found.append(Forms(tokens, rank, forward, backward))
    return tuple(found)


def fastest(layers: list[Group]) -> str | None:
    """The form for all of these layers together; None unless the default was timed in each of them.

    Another form than the default is faster only if that is certain: its ratio to the default is below 1 with
    its whole interval.
    """
    if not _is_timed(DEFAULT, layers):
        return None
    best = DEFAULT
    least = 1.0
    for form in FORM_NAMES:
        if form == DEFAULT or not _is_timed(form, layers):
            continue
        ratio = ratio_to_default(form, layers)
        if ratio.high < 1 and ratio.median < least:
            best = form
            least = ratio.median
    return best


def ratio_to_default(form: str, layers: list[Group]) -> Ratio:
    """The time that a form takes for these layers ÷ the default's, round by round."""
    ours = _seconds(form, layers)
    default = _seconds(DEFAULT, layers)
    return interval([one / other for one, other in zip(ours, default, strict=True)])


def _is_timed(form: str, layers: list[Group]) -> bool:
    return bool(layers) and all(of_form(form) in layer.timings for layer in layers)


def _seconds(form: str, layers: list[Group]) -> list[float]:
    """Of each round that all layers have, the sum over the layers."""
    rounds = zip(*(layer.timings[of_form(form)].seconds for layer in layers), strict=False)
    return [sum(seconds) for seconds in rounds]


def host_bound(result: Result, forms: tuple[Forms, ...]) -> int | None:
    """The most multiplications up to which PyTorch's operators are faster than kernels by the wall clock.

    From the smallest timed layer up to the last one before the first that is not certainly faster by them:
    forward and backward together, compared with the kernels of the form that ``forms`` has for it. 0 where
    the smallest is not; None where nothing was timed that says more than the guess, `HOST_BOUND`.
    """
    is_faster: dict[int, bool] = {}
    for layer in result.select(suite="forms", clock=WALL, **{"pass": FORWARD}):
        ratio = _reference_to_kernels(result, layer, forms)
        if ratio is not None:
            size = layer.axes["tokens"] * layer.axes["out"] * layer.axes["in"]
            is_faster[size] = is_faster.get(size, True) and ratio.high < 1
    if not is_faster:
        return None
    bound = 0
    for size in sorted(is_faster):
        if not is_faster[size]:
            break
        bound = size
    if bound == 0 and min(is_faster) > HOST_BOUND:
        return None  # layers that small were not timed
    return bound


def _reference_to_kernels(result: Result, layer: Group, forms: tuple[Forms, ...]) -> Ratio | None:
    """The time of a layer on the reference path ÷ that on kernels; None where one was not timed.

    ``layer``: its forward.
    """
    backward = result.other_pass(layer, BACKWARD)
    if backward is None:
        return None
    form = first_fitting(forms, layer.axes["tokens"], layer.axes["rank"])
    on_reference = _both_passes(layer, backward, REFERENCE, REFERENCE)
    on_kernels = _both_passes(layer, backward, _on_kernels(form.forward), _on_kernels(form.backward))
    if on_reference is None or on_kernels is None:
        return None
    pairs = zip(on_reference, on_kernels, strict=True)
    return interval([reference / kernels for reference, kernels in pairs])


def _both_passes(forward: Group, backward: Group, first: str, second: str) -> list[float] | None:
    """Seconds of each round, forward in one form and backward in another; None where one was not timed."""
    if not _is_timed(first, [forward]) or not _is_timed(second, [backward]):
        return None
    passes = zip(_seconds(first, [forward]), _seconds(second, [backward]), strict=False)
    return [sum(seconds) for seconds in passes]


def _on_kernels(form: str) -> str:
    """What runs if kernels are to: where the reference path was the fastest, the default."""
    return DEFAULT if form == REFERENCE else form


def summary(result: Result) -> str:
    """What ``--adopt`` would write, as Python; "" if nothing of it was timed."""
    found = rows(result)
    bound = host_bound(result, found)
    lines = [f'    Forms({row.tokens}, {row.rank}, "{row.forward}", "{row.backward}"),' for row in found]
    device = result.machine["device"]
    if lines:
        lines = [f'FORMS["{device}"] = (', *lines, ")"]
    if bound is not None:
        lines.append(f'HOST_BOUNDS["{device}"] = {bound}')
    return "\n".join(lines)
