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
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from peft.tuners import lora
from torch import Tensor

from mica import native
from mica.dtypes import FLOATING
from mica.fast.create import quantised
from mica.fast.forward.eligibility import adapter_weights, is_mica, is_stored_transposed
from mica.fast.forward.expert_params import is_stored_as_in_out, is_wrapper, lora_A_of, lora_B_of
from mica.fast.merge.bits import count_equal, positions_that_differ
from mica.fast.merge.report import MergeStats, sum_stats
from mica.fast.merge.scratch import convert, rows_at_a_time, scratch, scratch_like
from mica.fast.merge.unloading import needs_undo
from mica.fast.refusals import check_weight
from mica.fast.settings import around, settings
from mica.memory import TENSOR_TYPES
from mica.ops.operator import no_autocast
from mica.paths import reference_path
from mica.row_checksums import row_checksums


@dataclass
class Update:
    """s·B·A of every matrix of a weight: E experts, or E = 1."""

    lora_A: Tensor  # (E, r, in_features)
    lora_B: Tensor  # (E, out_features, r)
    scaling: float
    transposed: bool  # the weight is stored as (..., in_features, out_features)

    def copy(self, device: torch.device) -> Update:
        lora_A = self.lora_A.to(device, copy=True)
        lora_B = self.lora_B.to(device, copy=True)
        return Update(lora_A, lora_B, self.scaling, self.transposed)

    def chunks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row slices of the stored weight, experts one below the other, with their s·B·A in fp32 (fp64).

        Each s·B·A is contiguous, and valid until the next.
        """
        count = len(weight) // len(self.lora_A)  # rows of one expert
        step = rows_at_a_time(weight)
        for expert, (lora_A, lora_B) in enumerate(zip(self.lora_A, self.lora_B, strict=True)):
            first = expert * count
            up, down = reference_path.delta_factors(lora_A, lora_B, self.scaling)
            for start in range(0, count, step):
                stop = min(start + step, count)
                if self.transposed:
                    delta = _product(up, down[:, start:stop].contiguous()).t()
                else:
                    delta = _product(up[start:stop], down)
                yield slice(first + start, first + stop), _contiguous(delta)


def _product(left: Tensor, right: Tensor) -> Tensor:
    shape = torch.Size((len(left), right.shape[1]))
    return torch.mm(left, right, out=scratch("product", shape, left.dtype, left.device))


def _contiguous(matrix: Tensor) -> Tensor:
    """An operation on tensors of two layouts takes several times as long."""
    if matrix.is_contiguous():
        return matrix
    return scratch_like(matrix, "contiguous").copy_(matrix)


class Correction(NamedTuple):
    """The weights that subtracting the update does not give back, of a weight or of a chunk.

    They are put back only if the checksums show that the weight still has the bits that the merge left.
    The unmerge is exact only if it then has those from before.
    """

    indices: Tensor  # flat positions in the stored weight, int64
    values: Tensor  # the weights that were there
    merged_rows: Tensor  # checksums after the merge, and before it
    original_rows: Tensor


@dataclass
class Undo:
    """What is known of a merge, for the unmerge and for `merge_report`.

    A is cloned because training may continue, or another adapter be loaded, before the unmerge.
    """

    update: Update
    correction: Correction | None  # None where not `needs_undo`
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

# Incremented whenever PEFT gets its own functions back: merges by those are not recorded here.
_period = 0


def end_period() -> None:
    """From now on earlier records are valid only where the weights still have the merged bits."""
    global _period
    _period += 1


def stats_of_merged(layer: lora.LoraLayer) -> MergeStats | None:
    """The statistics of the adapters that are merged now; None where this backend has merged none of them."""
    records = vars(layer).get(RECORDS, {})
    undos = [records[adapter] for adapter in layer.merged_adapters if adapter in records]
    stats = [undo.stats for undo in undos if undo.period == _period]
    if not stats:
        return None
    return sum_stats(stats)


def pop_undo(layer, adapter: str) -> Undo | None:
    """Take out the record of a merge; None if there is none."""
    records = vars(layer).pop(RECORDS, {})
    undo = records.pop(adapter, None)
    if records:
        vars(layer)[RECORDS] = records
    return undo


def _update_of(layer, adapter: str) -> Update:
    """The adapter's present update, without its graph."""
    if is_wrapper(layer):
        lora_A = lora_A_of(layer, adapter)
        lora_B = lora_B_of(layer, adapter)
        transposed = is_stored_as_in_out(layer)
    else:
        lora_A, lora_B = (factor.unsqueeze(0) for factor in adapter_weights(layer, adapter))
        transposed = is_stored_transposed(layer)
    return Update(lora_A.detach(), lora_B.detach(), float(layer.scaling[adapter]), transposed)


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
    update = _update_of(layer, adapter)
    result = stored.data
    if safe:
        result = torch.empty_like(stored)
    weight = _as_matrix(stored)
    out = _as_matrix(result)
    stats, correction = _merge_chunks(update, weight, out, needs_undo(layer, adapter))

    norms_are_finite = math.isfinite(stats.update_squared + stats.error_squared)
    if safe and not norms_are_finite and not torch.isfinite(out).all():
        return result
    record(layer, adapter, Undo(update.copy(weight.device), correction, stats, _period))
    return result


def _merge_chunks(
    update: Update, weight: Tensor, out: Tensor, needs_correction: bool
) -> tuple[MergeStats, Correction | None]:
    """Write W' to ``out``, which may be W itself."""
    stats = MergeStats(weight.dtype)
    corrections = []  # one a chunk, which is in the cache when its checksums are taken
    for rows, delta in update.chunks(weight):
        old = weight[rows]
        chunk = merge_by_native(old, delta, needs_correction)
        if chunk is None:
            chunk = merge_by_torch(old, delta, needs_correction)
        stats.add(chunk.stats)
        if needs_correction:
            first = rows.start * weight.shape[1]
            values = old.flatten()[chunk.lost]
            checksums = row_checksums(chunk.new), row_checksums(old)
            corrections.append(Correction(chunk.lost + first, values, *checksums))
        out[rows] = chunk.new
    if not needs_correction:
        return stats, None
    return stats, Correction(*map(torch.cat, zip(*corrections, strict=True)))


class _Chunk(NamedTuple):
    """What merging has made of a part of a weight."""

    new: Tensor
    lost: Tensor | None  # flat positions of what subtracting the update does not give back
    stats: MergeStats


def merge_by_native(old: Tensor, delta: Tensor, needs_lost: bool) -> _Chunk | None:
    """In one pass; None where `mica.native` is not built, or leaves it to PyTorch."""
    module = _native_for(old)
    if module is None:
        return None
    new = scratch_like(old, "new")
    merged = module.merge_chunk(new, old, delta, needs_lost)
    if merged is None:
        return None
    lost, *counts = merged
    return _Chunk(new, lost, MergeStats(old.dtype, old.numel(), *counts))


def merge_by_torch(old: Tensor, delta: Tensor, needs_lost: bool) -> _Chunk:
    old_wide = convert(old, delta.dtype, "old")
    total = torch.add(old_wide, delta, out=scratch_like(delta, "sum"))
    new = convert(total, old.dtype, "new")
    new_wide = convert(new, delta.dtype, "sum")  # which is not needed any more
    if old.element_size() > delta.element_size():
        unchanged = count_equal(new, old)  # in the dtype of s·B·A they are rounded
    else:
        unchanged = count_equal(new_wide, old_wide)
    recovered = torch.sub(new_wide, delta, out=scratch_like(delta, "recovered, wide"))
    lost = None
    if needs_lost:
        lost = positions_that_differ(convert(recovered, old.dtype, "recovered"), old)
    error = recovered.sub_(old_wide)
    stats = MergeStats(old.dtype, old.numel(), unchanged, _squared_norm(delta), _squared_norm(error))
    return _Chunk(new, lost, stats)


def _native_for(weight: Tensor) -> ModuleType | None:
    if weight.device.type != "cpu":
        return None
    return native.module_if_built()


def _squared_norm(matrix: Tensor) -> float:
    flat = matrix.view(-1)
    return torch.dot(flat, flat).item()


def record(layer, adapter: str, undo: Undo) -> None:
    """Keep with the layer what unmerging and the report need."""
    records = _Records(vars(layer).get(RECORDS, ()))
    records[adapter] = undo
    vars(layer)[RECORDS] = records


@_in_any_mode
def unmerge_from(layer, adapter: str, weight: Tensor, undo: Undo | None) -> None:
    """In place: the bits from before the merge, or W' - s·B·A in fp32 and a warning with the reason."""
    weight = _as_matrix(weight)
    correction = None
    if undo is not None:
        correction = undo.correction
    exact = correction is not None and _has_rows(weight, correction.merged_rows)
    if undo is not None and not exact and undo.period != _period:
        undo = None  # stock PEFT may have unmerged and merged it since

    if undo is None:
        update = _update_of(layer, adapter)
    else:
        update = undo.update
    for rows, delta in update.copy(weight.device).chunks(weight):
        weight[rows] = subtract(weight[rows], delta)

    if exact:
        weight.view(-1)[correction.indices.to(weight.device)] = correction.values.to(weight.device)
        exact = _has_rows(weight, correction.original_rows)
    if not exact:
        _warn_of_inexact_unmerge(adapter, undo)


def subtract(weight: Tensor, delta: Tensor) -> Tensor:
    """weight - delta, not yet rounded to the weight's dtype where PyTorch computes it."""
    module = _native_for(weight)
    if module is not None:
        new = scratch_like(weight, "new")
        if module.subtract_chunk(new, weight, delta):
            return new
    wide = convert(weight, delta.dtype, "old")
    return torch.sub(wide, delta, out=scratch_like(delta, "sum"))


def _has_rows(weight: Tensor, checksums: Tensor) -> bool:
    return torch.equal(row_checksums(weight), checksums.to(weight.device))


def _warn_of_inexact_unmerge(adapter: str, undo: Undo | None) -> None:
    what = "its update"
    if undo is None:
        what = "its present update"
        why = "there is no record of its merge: stock PEFT merged it, or the model was pickled"
    elif undo.correction is None:
        why = "it was merged by merge_and_unload, which is not meant to be undone"
    else:
        why = "the weight was edited, cast or moved to another device while it was merged"
    warnings.warn(
        f"adapter {adapter!r} was unmerged by subtracting {what} in fp32, not to the exact base "
        f"weight, because {why}.",
        stacklevel=8,
    )


@_in_any_mode
def _add_to_dequantised(layer, adapter: str, weight: Tensor, sign: int) -> Tensor:
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
            return _add_to_dequantised(module, active_adapter, orig_weight, 1)
    if not settings.enabled or not is_covered(module, orig_weight):
        pop_undo(module, active_adapter)
        return stock(module, active_adapter, orig_weight)
    merged = merge_into(module, active_adapter, orig_weight.detach(), safe)
    return merged if safe else None


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
            return _add_to_dequantised(module, active_adapter, orig_weight, -1)
    if unmerge_ours(module, active_adapter, orig_weight.data):
        return orig_weight.data
    return stock(module, active_adapter, orig_weight)


def unmerge_ours(layer, adapter: str, weight: Tensor) -> bool:
    """False where stock has to unmerge: what this backend merged it also unmerges, even if it is disabled."""
    undo = pop_undo(layer, adapter)
    is_ours = undo is not None or (settings.enabled and is_mica(layer, adapter))
    if not is_ours or not is_covered(layer, weight):
        return False
    unmerge_from(layer, adapter, weight, undo)
    return True
