"""Merging in fp32 with one rounding, and unmerging to the original bits.

Stock PEFT rounds s·B·A to the base dtype and then adds in that dtype: in bf16 41 % of the weights of a
small update do not move at all, and merge + unmerge changes 0.8 % of W. Here W' = round(W + s·B·A), and
where round(W' - s·B·A) is not W again, the old value is kept with the layer: a sparse correction.

A copy of W would be faster to make and to put back (0.7 of the time when PyTorch's operators did the rest),
but a merged model would hold its adapted weights twice. The correction takes 10 bytes for each weight that is
lost: 0.08 bytes a weight where 0.8 % of them are, and a copy takes 2.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners import lora
from torch import Tensor, nn

from mica import native
from mica.dtypes import FLOATING
from mica.fast.create import quantised
from mica.fast.forward.eligibility import adapter_weights, is_stored_transposed
from mica.fast.forward.expert_params import is_stored_as_in_out, is_wrapper, lora_A_of, lora_B_of, weight_name
from mica.fast.merge.bits import count_equal, positions_that_differ
from mica.fast.merge.report import MergeReport, MergeStats, summed
from mica.fast.merge.scratch import converted, rows_at_a_time, scratch, scratch_like
from mica.fast.merge.unloading import needs_no_undo
from mica.fast.merge.unmeasured import kind_merged_into
from mica.fast.refusals import check_model, check_weight
from mica.fast.settings import around, settings
from mica.memory import TENSOR_TYPES
from mica.ops.operator import no_autocast
from mica.paths import reference_path
from mica.row_checksums import row_checksums as fingerprint

logger = logging.getLogger(__name__)


@dataclass
class Update:
    """s·B·A of every matrix of a weight: E experts, or E = 1."""

    lora_A: Tensor  # (E, r, in_features)
    lora_B: Tensor  # (E, out_features, r)
    scaling: float
    transposed: bool  # the weight is stored as (..., in_features, out_features)

    def copied(self, device: torch.device) -> Update:
        lora_A = self.lora_A.to(device, copy=True)
        lora_B = self.lora_B.to(device, copy=True)
        return Update(lora_A, lora_B, self.scaling, self.transposed)

    def chunks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row slices of the stored weight, experts one below the other, with their updates in fp32 (fp64).

        Each update is contiguous, and valid until the next one.
        """
        count = len(weight) // len(self.lora_A)  # rows of one expert
        step = rows_at_a_time(weight)
        for expert, (lora_A, lora_B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            first = expert * count
            up, down = reference_path.delta_factors(lora_A, lora_B, self.scaling)
            for start in range(0, count, step):
                stop = min(start + step, count)
                if self.transposed:
                    update = _product(up, down[:, start:stop].contiguous()).t()
                else:
                    update = _product(up[start:stop], down)
                yield slice(first + start, first + stop), _contiguous(update)


def _product(left: Tensor, right: Tensor) -> Tensor:
    shape = torch.Size((len(left), right.shape[1]))
    return torch.mm(left, right, out=scratch("update", shape, left.dtype, left.device))


def _contiguous(matrix: Tensor) -> Tensor:
    """An operation on tensors of two layouts takes several times as long."""
    if matrix.is_contiguous():
        return matrix
    return scratch_like(matrix, "contiguous").copy_(matrix)


@dataclass
class Correction:
    """The weights that subtracting the update does not give back.

    They are put back only if the fingerprints show that the weight still has the bits that the merge left.
    The unmerge is exact only if it then has those from before.
    """

    indices: Tensor  # flat positions in the stored weight, int64
    values: Tensor  # the weights that were there
    merged_rows: Tensor  # fingerprints after the merge, and before it
    original_rows: Tensor


@dataclass
class Undo:
    """What is known of a merge, for the unmerge and for `merge_report`.

    A is cloned because training may continue, or another adapter be loaded, before the unmerge.
    """

    update: Update
    correction: Correction | None  # None where `needs_no_undo`
    stats: MergeStats
    period: int  # `_period` of the merge


class _Records(dict[str, Undo]):
    """The records of a layer's merged adapters, stored in the layer: a deep copy of the model has them too.

    Pickled as an empty dict: nothing of this package gets into a pickle. No tensor of a record is ever
    written to, so copies share them.
    """

    def __deepcopy__(self, memo) -> _Records:
        return _Records(self)

    def __reduce__(self):
        return dict, ()


RECORDS = "_mica_merges"  # in the __dict__ of a layer, while it is merged

# What was merged into base layers, which outlive the PEFT layers around them, by the names of their weights.
# Keyed by the module, and gone with it.
_stats: WeakKeyDictionary[nn.Module, dict[str, MergeStats]] = WeakKeyDictionary()

# Incremented whenever PEFT gets its own functions back: merges by those are not recorded here.
_period = 0


def end_period() -> None:
    """From now on earlier records are valid only where the weights still have the merged bits."""
    global _period
    _period += 1


def merge_report(model: nn.Module) -> MergeReport:
    """What rounding did to the adapters now merged into the model (also after ``merge_and_unload``).

    Raises:
        TypeError: ``model`` is not a `torch.nn.Module`.
    """
    check_model(model, "merge_report")
    report = MergeReport()
    wrapped = set()  # base layers inside of PEFT's, which report for them
    for name, module in model.named_modules():
        if module in wrapped:
            continue
        kind = kind_merged_into(module)
        if kind is not None:
            report.unmeasured[name] = kind
        if isinstance(module, lora.LoraLayer):
            wrapped.add(module.get_base_layer())
            merged = _merged_stats(module)
            if merged:
                report.layers[_named(name, weight_name(module))] = summed(merged)
        elif module in _stats:
            for weight, stats in _stats[module].items():
                report.layers[_named(name, weight)] = stats
    return report


def _merged_stats(layer: lora.LoraLayer) -> list[MergeStats]:
    """Those of the adapters that are merged now, as far as this backend has merged them."""
    records = vars(layer).get(RECORDS, {})
    merged = [records[adapter] for adapter in layer.merged_adapters if adapter in records]
    return [record.stats for record in merged if record.period == _period]


def _named(layer: str, weight: str) -> str:
    """The layer's name, with that of the weight where it may have several that are adapted."""
    if weight == "weight":
        return layer
    return f"{layer.replace('.base_layer', '')}.{weight}"


def pop_undo(layer, adapter: str) -> Undo | None:
    """Take out the record of a merge; None if there is none."""
    records = vars(layer).pop(RECORDS, {})
    undo = records.pop(adapter, None)
    if records:
        vars(layer)[RECORDS] = records
    return undo


def _update_of(layer, adapter: str) -> Update:
    """The adapter's present update, without its graph."""
    scaling = float(layer.scaling[adapter])
    if is_wrapper(layer):
        lora_A = lora_A_of(layer, adapter).detach()
        lora_B = lora_B_of(layer, adapter).detach()
        return Update(lora_A, lora_B, scaling, is_stored_as_in_out(layer))
    lora_A, lora_B = adapter_weights(layer, adapter)
    return Update(
        lora_A.detach().unsqueeze(0), lora_B.detach().unsqueeze(0), scaling, is_stored_transposed(layer)
    )


def is_covered(layer, weight: Tensor) -> bool:
    """Whether this backend merges into the weight; else PEFT does."""
    if is_wrapper(layer):
        is_known = weight.dtype in FLOATING
    else:
        is_known = type(layer) in (lora.Linear, lora.Embedding)
    is_dense = type(weight) in TENSOR_TYPES and weight.is_floating_point() and not weight.is_meta
    return is_known and is_dense and weight.is_contiguous()


def _as_matrix(weight: Tensor) -> Tensor:
    """The stored weight as one matrix, experts one below the other."""
    return weight.view(-1, weight.shape[-1])


def _in_any_mode(function):
    """For calls within autocast too (`disable_adapter` merges and unmerges in evaluations): in fp32.

    A weight created in inference mode, as by a safe merge there, can only be written to in that mode.
    """

    @functools.wraps(function)
    def outside(layer, adapter: str, weight: Tensor, *args, **kwargs):
        mode = torch.no_grad()
        if weight.is_inference():
            mode = torch.inference_mode()
        with no_autocast(), mode:
            return function(layer, adapter, weight, *args, **kwargs)

    return outside


@_in_any_mode
def merge_into(layer, adapter: str, stored: Tensor, safe: bool) -> Tensor:
    """W + s·B·A of the stored, contiguous W, rounded once: in place, or with ``safe`` a new tensor.

    No record is kept of what PEFT will refuse: with ``safe``, a sum that is not finite.
    """
    merged = _update_of(layer, adapter)
    result = stored.data
    if safe:
        result = torch.empty_like(stored)
    weight = _as_matrix(stored)
    out = _as_matrix(result)
    stats = MergeStats(weight.dtype)
    parts = _CorrectionParts()
    if needs_no_undo(layer, adapter):
        parts = None
    _merge_chunks(merged, weight, out, stats, parts)

    norms_are_finite = math.isfinite(stats.update_squared + stats.error_squared)
    if safe and not norms_are_finite and not torch.isfinite(out).all():
        return result
    correction = None
    if parts is not None:
        correction = parts.joined()
    record(layer, adapter, Undo(merged.copied(weight.device), correction, stats, _period))
    return result


class _CorrectionParts:
    """A `Correction`, chunk by chunk: each is in the cache when its fingerprints are taken."""

    def __init__(self) -> None:
        self.indices: list[Tensor] = []
        self.values: list[Tensor] = []
        self.merged_rows: list[Tensor] = []
        self.original_rows: list[Tensor] = []

    def add(self, first: int, old: Tensor, chunk: _Chunk) -> None:
        """first: flat position of the chunk in the weight."""
        self.indices.append(chunk.lost + first)
        self.values.append(old.flatten()[chunk.lost])
        self.merged_rows.append(fingerprint(chunk.new))
        self.original_rows.append(fingerprint(old))

    def joined(self) -> Correction:
        return Correction(
            indices=torch.cat(self.indices),
            values=torch.cat(self.values),
            merged_rows=torch.cat(self.merged_rows),
            original_rows=torch.cat(self.original_rows),
        )


def _merge_chunks(
    merged: Update, weight: Tensor, out: Tensor, stats: MergeStats, parts: _CorrectionParts | None
) -> None:
    """Write W' to ``out``, which may be W itself. ``parts``: None where nothing has to be recovered."""
    for rows, update in merged.chunks(weight):
        old = weight[rows]
        chunk = merged_by_native(old, update, parts is not None)
        if chunk is None:
            chunk = merged_by_torch(old, update, parts is not None)
        stats.weights += old.numel()
        stats.unchanged += chunk.unchanged
        stats.update_squared += chunk.update_squared
        stats.error_squared += chunk.error_squared
        if parts is not None:
            parts.add(rows.start * weight.shape[1], old, chunk)
        out[rows] = chunk.new


class _Chunk(NamedTuple):
    """What merging has made of a part of a weight."""

    new: Tensor
    lost: Tensor | None  # flat positions of what subtracting the update does not give back
    unchanged: int
    update_squared: float
    error_squared: float


def merged_by_native(old: Tensor, update: Tensor, needs_lost: bool) -> _Chunk | None:
    """In one pass; None where `mica.native` is not built, or leaves it to PyTorch."""
    module = native.module_if_built()
    if module is None or old.device.type != "cpu":
        return None
    new = scratch_like(old, "new")
    merged = module.merge_chunk(new, old, update, needs_lost)
    return None if merged is None else _Chunk(new, *merged)


def merged_by_torch(old: Tensor, update: Tensor, needs_lost: bool) -> _Chunk:
    old_wide = converted(old, update.dtype, "old")
    total = torch.add(old_wide, update, out=scratch_like(update, "sum"))
    new = converted(total, old.dtype, "new")
    new_wide = converted(new, update.dtype, "sum")  # which is not needed any more
    if old.element_size() > update.element_size():
        unchanged = count_equal(new, old)  # in the dtype of the update they are rounded
    else:
        unchanged = count_equal(new_wide, old_wide)
    recovered = torch.sub(new_wide, update, out=scratch_like(update, "recovered, wide"))
    lost = None
    if needs_lost:
        lost = positions_that_differ(converted(recovered, old.dtype, "recovered"), old)
    error = recovered.sub_(old_wide)
    return _Chunk(new, lost, unchanged, _squared_norm(update), _squared_norm(error))


def _squared_norm(matrix: Tensor) -> float:
    flat = matrix.view(-1)
    return torch.dot(flat, flat).item()


def record(layer, adapter: str, undo: Undo) -> None:
    """Keep what unmerging needs with the layer, and the statistics with its base layer."""
    records = _Records(vars(layer).get(RECORDS, ()))
    records[adapter] = undo
    vars(layer)[RECORDS] = records

    base = layer.get_base_layer()
    stats_of_base = _stats.setdefault(base, {})
    name = weight_name(layer)
    if layer.merged_adapters and name in stats_of_base:
        stats_of_base[name] = summed([stats_of_base[name], undo.stats])
    else:
        stats_of_base[name] = summed([undo.stats])
    swallowed = 100 * undo.stats.swallowed
    logger.debug("merged adapter %r into %s: swallowed %.2f %%", adapter, base, swallowed)


@_in_any_mode
def unmerge_from(layer, adapter: str, weight: Tensor, undo: Undo | None) -> None:
    """In place: the bits from before the merge, or W' - s·B·A in fp32 and a warning with the reason."""
    weight = _as_matrix(weight)
    correction = undo.correction if undo is not None else None
    exact = correction is not None and _is(weight, correction.merged_rows)
    if undo is not None and not exact and undo.period != _period:
        undo = None  # stock PEFT may have unmerged and merged it since

    if undo is not None:
        merged = undo.update
    else:
        merged = _update_of(layer, adapter)
    for rows, update in merged.copied(weight.device).chunks(weight):
        weight[rows] = subtracted(weight[rows], update)

    if exact:
        weight.view(-1)[correction.indices.to(weight.device)] = correction.values.to(weight.device)
        exact = _is(weight, correction.original_rows)
    if not exact:
        _warn_of_inexact_unmerge(adapter, undo)
    if not layer.merged_adapters:
        _stats.get(layer.get_base_layer(), {}).pop(weight_name(layer), None)


def subtracted(weight: Tensor, update: Tensor) -> Tensor:
    """weight - update, not yet rounded to the weight's dtype where PyTorch computes it."""
    module = native.module_if_built()
    if module is not None and weight.device.type == "cpu":
        new = scratch_like(weight, "new")
        if module.subtract_chunk(new, weight, update):
            return new
    wide = converted(weight, update.dtype, "old")
    return torch.sub(wide, update, out=scratch_like(update, "sum"))


def _is(weight: Tensor, rows: Tensor) -> bool:
    """Whether these are the fingerprints of the weight."""
    return torch.equal(fingerprint(weight), rows.to(weight.device))


def _warn_of_inexact_unmerge(adapter: str, undo: Undo | None) -> None:
    subtracted = "its update"
    if undo is None:
        subtracted = "its present update"
        why = "there is no record of its merge: stock PEFT merged it, or the model was pickled"
    elif undo.correction is None:
        why = "it was merged by merge_and_unload, which is not meant to be undone"
    else:
        why = "the weight was edited, cast or moved to another device while it was merged"
    warnings.warn(
        f"adapter {adapter!r} was unmerged by subtracting {subtracted} in fp32, not to the exact base "
        f"weight, because {why}.",
        stacklevel=7,
    )


@_in_any_mode
def _dequantised(layer, adapter: str, weight: Tensor, sign: int) -> Tensor:
    """W ± s·B·A of a dequantised W, in the wider of their dtypes: PEFT requantises it, as with plain LoRA.

    Stock's MiCA variant would round s·B·A to the dtype of W before that.
    """
    weight = quantised.mergeable(layer, weight)
    return weight + sign * layer.get_delta_weight(adapter).to(weight.device)


def _merge(stock, module, active_adapter: str, orig_weight: Tensor, safe: bool) -> Tensor | None:
    """The merged weight if ``safe``, else in place."""
    if settings.enabled:
        check_weight(module)
        if safe and quantised.kind_of(module) is not None:
            return _dequantised(module, active_adapter, orig_weight, 1)
    if not settings.enabled or not is_covered(module, orig_weight):
        pop_undo(module, active_adapter)
        return stock(module, active_adapter, orig_weight)
    merged = merge_into(module, active_adapter, orig_weight.detach(), safe)
    if safe:
        return merged
    return None


merge_safe = around(functools.partial(_merge, safe=True))
merge_unsafe = around(functools.partial(_merge, safe=False))


@around
def unmerge(stock, module, active_adapter: str, orig_weight: Tensor) -> Tensor:
    if settings.enabled:
        try:
            check_weight(module, verb="unmerged from")
        except ValueError:
            module.merged_adapters.append(active_adapter)  # PEFT has already removed it
            raise
        if quantised.kind_of(module) is not None:
            return _dequantised(module, active_adapter, orig_weight, -1)
    # What this backend merged it also unmerges, even if it has been disabled since.
    undo = pop_undo(module, active_adapter)
    is_ours = undo is not None or settings.enabled
    if not is_ours or not is_covered(module, orig_weight):
        return stock(module, active_adapter, orig_weight)
    unmerge_from(module, active_adapter, orig_weight.data, undo)
    return orig_weight.data
