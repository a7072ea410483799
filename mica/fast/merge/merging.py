"""Merging in fp32 with one rounding, and unmerging to the original bits.

Stock PEFT rounds s·B·A to the base dtype and then adds in that dtype: in bf16 41 % of the weights of a
small update do not move at all, and merge + unmerge changes 0.8 % of W. Here W' = round(W + s·B·A), and
where round(W' - s·B·A) is not W again, the old value is kept with the layer: a sparse correction.

A copy of W would be simpler, but a merged model would hold its adapted weights twice. The correction takes 4
bytes (bf16) or 6 (fp32) for each weight that is lost, 0.17 and 0.37 bytes a weight where 3.5 and 6 % are.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from mica.fast.merge.report import MergeStats, sum_stats
from mica.fast.merge.unloading import needs_undo
from mica.fast.refusals import check_weight
from mica.fast.settings import around, settings
from mica.memory import TENSOR_TYPES
from mica.ops import dora
from mica.ops.operator import no_autocast
from mica.paths import reference_path
from mica.row_checksums import WORDS, odd_numbers, row_checksums

# Elements of a weight whose s·B·A is computed at a time. On a CPU its 1 MB should stay in the cache. On a
# device the number of launches matters; 2**24 are 64 MB. Products of other numbers of rows may differ in
# their last bits: with another chunk a merged weight has other bits.
CHUNK = 2**18
DEVICE_CHUNK = 2**24
# Without an undo record, statistics use every 8th row: sums take as long as the merge of a row itself.
MEASURED_ROWS = 8


class Update(NamedTuple):
    """s·B·A of every matrix of a weight: E experts, or E = 1. In fp32, or fp64 where A or B is."""

    up: Tensor  # (E, out_features, r): B
    down: Tensor  # (E, r, in_features): s·A
    transposed: bool  # the weight is stored as (..., in_features, out_features)
    factor: Tensor | None = None  # (out_features): what DoRA then multiplies W + s·B·A by, where E = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stored weight, as a matrix."""
        rows, columns = self.up.shape[1], self.down.shape[2]
        if self.transposed:
            rows, columns = columns, rows
        return len(self.up) * rows, columns

    def to(self, device: torch.device) -> Update:
        factor = None if self.factor is None else self.factor.to(device)
        return Update(self.up.to(device), self.down.to(device), self.transposed, factor)

    def added(self, rows: slice, weight: Tensor, delta: Tensor) -> Tensor:
        """The merged weight, not yet rounded, of these rows of the stored one."""
        merged = weight + delta
        return merged if self.factor is None else merged.mul_(self._factor_of(rows))

    def subtracted(self, rows: slice, merged: Tensor, delta: Tensor) -> Tensor:
        """The inverse of `added`."""
        return (merged if self.factor is None else merged / self._factor_of(rows)) - delta

    def _factor_of(self, rows: slice) -> Tensor:
        return self.factor if self.transposed else self.factor[rows, None]

    def chunks(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Row slices of the stored weight, experts one below the other, with their s·B·A, contiguous."""
        count = len(weight) // len(self.up)  # rows of one expert
        step = _rows_at_a_time(weight)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            first = expert * count
            for start in range(0, count, step):
                stop = min(start + step, count)
                if self.transposed:
                    delta = (up @ down[:, start:stop].contiguous()).t().contiguous()
                else:
                    delta = up[start:stop] @ down
                yield slice(first + start, first + stop), delta


def _rows_at_a_time(weight: Tensor) -> int:
    size = CHUNK if weight.is_cpu else DEVICE_CHUNK
    return max(1, size // max(1, weight.shape[1]))


class Kept(NamedTuple):
    """The weights that subtracting the update does not give back, row by row, and checksums of all rows.

    They are put back into the rows that still have the bits that the merge left. The unmerge is exact only if
    all rows then have those from before.
    """

    checksums: Tensor  # (rows, 2), int64: before the merge, and after it
    counts: Tensor  # (rows), int32: how many weights of each row are kept
    columns: Tensor  # uint16, or int64 where a row has more than 2**16 weights
    values: Tensor
    threads: int  # with how many s·B·A was multiplied: with others its last bits may differ

    @classmethod
    def of(cls, *tensors: Tensor) -> Kept:
        return cls(*tensors, torch.get_num_threads())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self[:4]

    def to(self, device: torch.device) -> Kept:
        return Kept(*(tensor.to(device) for tensor in self.tensors), self.threads)


@dataclass
class Undo:
    """What is known of a merge, for the unmerge and for `merge_report`."""

    update: Update
    kept: Kept | None  # None where not `needs_undo`
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
    return sum_stats(stats) if stats else None


def pop_undo(layer, adapter: str) -> Undo | None:
    """Take out the record of a merge; None if there is none."""
    records = vars(layer).pop(RECORDS, {})
    undo = records.pop(adapter, None)
    if records:
        vars(layer)[RECORDS] = records
    return undo


def _update_of(layer, adapter: str) -> Update:
    """The adapter's present update, with B itself and a new s·A. Without gradients: it is called so."""
    scaling = float(layer.scaling[adapter])
    if is_wrapper(layer):
        up, down = reference_path.delta_factors(lora_A_of(layer, adapter), lora_B_of(layer, adapter), scaling)
        return Update(up, down, is_stored_as_in_out(layer))
    up, down = reference_path.delta_factors(*adapter_weights(layer, adapter), scaling)
    transposed = is_stored_transposed(layer)
    factor = None
    if adapter in layer.lora_magnitude_vector:
        weight = layer.get_base_layer().weight
        norms = dora.plain_row_norms(weight.t() if transposed else weight, down, up)
        magnitude = layer.lora_magnitude_vector[adapter].weight.to(norms.device)
        factor = dora.factor_of(magnitude, dora.as_divisors(norms)) * (magnitude != 0)
    return Update(up.unsqueeze(0), down.unsqueeze(0), transposed, factor)


def is_covered(layer, weight: Tensor) -> bool:
    """Whether this backend merges into the weight; else PEFT does."""
    is_known = is_wrapper(layer) or type(layer) in (lora.Linear, lora.Embedding)
    is_dense = type(weight) in TENSOR_TYPES and weight.dtype in FLOATING and not weight.is_meta
    return is_known and is_dense and weight.is_contiguous()


def _as_matrix(weight: Tensor) -> Tensor:
    """The stored weight as one matrix, experts one below the other."""
    return weight.view(-1, weight.shape[-1])


@contextmanager
def _in_any_mode(weight: Tensor) -> Iterator[None]:
    """For calls within autocast too (`disable_adapter` merges and unmerges in evaluations): in fp32.

    A weight made in inference mode can only be written to in that mode, and what is made there has no
    gradients over it: all others are written to, and made, outside.
    """
    with no_autocast(), torch.inference_mode(weight.is_inference()), torch.no_grad():
        yield


def merge_into(layer, adapter: str, stored: Tensor, safe: bool) -> Tensor:
    """W + s·B·A of the stored, contiguous W, rounded once: in place, or with ``safe`` a new tensor.

    No record is kept of what PEFT will refuse: with ``safe``, a sum that is not finite.
    """
    result = stored.data
    if safe:
        with torch.inference_mode(False):
            result = torch.empty_like(stored)
    with _in_any_mode(result):
        out = _as_matrix(result)
        update = _update_of(layer, adapter)
        keeps = needs_undo(layer, adapter)
        if keeps:  # another adapter may be loaded before the unmerge
            update = update._replace(up=update.up.clone())
        stats, kept = merge_update(update, _as_matrix(stored), out, keeps)

        norms_are_finite = math.isfinite(stats.update_squared + stats.error_squared)
        if not safe or norms_are_finite or torch.isfinite(out).all():
            record(layer, adapter, Undo(update, kept, stats, _period))
    return result


def merge_update(update: Update, weight: Tensor, out: Tensor, keeps: bool) -> tuple[MergeStats, Kept | None]:
    """Write W' to ``out``, which may be W itself: from C++, and by PyTorch what that leaves to it.

    The statistics are of all rows if it ``keeps``, else of every `MEASURED_ROWS`-th.
    """
    stats = MergeStats(weight.dtype)
    measured = 1 if keeps else MEASURED_ROWS
    left = slice(None)
    parts = []
    module = native_module(update, weight)
    if module is not None:
        merge = module.merge_bfloat16 if weight.dtype == torch.bfloat16 else module.merge_float32
        rows_at_a_time = _rows_at_a_time(weight)
        factors = _factors(weight)
        left, sums, fields = merge(weight, out, *update[:3], rows_at_a_time, factors, keeps, measured)
        stats = MergeStats(weight.dtype, weight[::measured].numel(), int(sums[0]), *sums[1:])
        if keeps:
            parts = [fields]
        if not len(left):
            return stats, Kept.of(*fields) if keeps else None

    for rows, delta in update.chunks(weight):
        chosen = _chosen(rows, left)
        old = weight[rows]
        wide = old.to(delta.dtype)
        merged = update.added(rows, wide, delta)
        new = merged.to(old.dtype)
        if module is None:
            recovered = update.subtracted(rows, new.to(delta.dtype), delta)
            change, error = delta, recovered - wide
            if update.factor is not None:
                change, error = merged - wide, new.to(delta.dtype) - merged
            some = slice(-rows.start % measured, None, measured)
            stats.add(stats_of(old[some], new[some], change[some], error[some]))
            if keeps:
                parts.append(_keep(old, recovered.to(old.dtype), new))
        out[rows][chosen] = new[chosen]
    if not keeps:
        return stats, None
    kept = Kept.of(*map(torch.cat, zip(*parts, strict=True)))
    if module is not None:
        kept.checksums[left, 1] = row_checksums(out[left])
    return stats, kept


def native_module(update: Update, weight: Tensor) -> ModuleType | None:
    """`mica.native`'s, if its functions take the weight."""
    module = native.module_if_built()
    row_bytes = weight.shape[1] * weight.element_size()
    is_taken = (
        module is not None
        and weight.is_cpu
        and weight.dtype in (torch.bfloat16, torch.float32)
        and update.up.dtype == torch.float32
        and update.factor is None
        and update.shape == weight.shape
        and weight.numel() > 0
        and weight.shape[1] <= 2**16  # what `Kept.columns` can hold in 16 bits
        and row_bytes % 8 == weight.data_ptr() % 8 == 0  # its checksums are of words of 8 bytes
    )
    return module if is_taken else None


def _factors(weight: Tensor) -> Tensor:
    return odd_numbers(weight.shape[1] * weight.element_size() // 8)


def _chosen(rows: slice, left: slice | Tensor) -> slice | Tensor:
    """The rows of a chunk that C++ has left, counted from its first; all of them where it did nothing."""
    if type(left) is slice:
        return left
    return left[(left >= rows.start) & (left < rows.stop)] - rows.start


def stats_of(old: Tensor, new: Tensor, delta: Tensor, error: Tensor) -> MergeStats:
    """The numbers of a weight, ``old`` and ``new``, which are ``error`` apart from the sum with ``delta``."""
    unchanged = int((new == old).sum())
    return MergeStats(
        old.dtype, old.numel(), unchanged, float(delta.square().sum()), float(error.square().sum())
    )


def _keep(old: Tensor, back: Tensor, new: Tensor) -> tuple[Tensor, ...]:
    """The tensors of `Kept` for these rows."""
    word = WORDS[old.element_size()]
    is_lost = back.view(word) != old.view(word)
    columns = is_lost.nonzero()[:, 1]
    if old.shape[1] <= 2**16:
        columns = columns.to(torch.uint16)
    checksums = torch.stack((row_checksums(old), row_checksums(new)), dim=1)
    return checksums, is_lost.sum(dim=1, dtype=torch.int32), columns, old[is_lost]


def record(layer, adapter: str, undo: Undo) -> None:
    """Keep with the layer what unmerging and the report need."""
    records = _Records(vars(layer).get(RECORDS, ()))
    records[adapter] = undo
    vars(layer)[RECORDS] = records


def unmerge_from(layer, adapter: str, weight: Tensor, undo: Undo | None) -> None:
    """In place: the bits from before the merge, or W' - s·B·A in fp32 and a warning with the reason."""
    with _in_any_mode(weight):
        if undo is not None and not is_as_merged(undo, weight):
            undo = None  # stock PEFT may have unmerged and merged it since
        weight = _as_matrix(weight)
        kept = None
        if undo is None:
            update = _update_of(layer, adapter)
        else:
            update = undo.update
            if undo.kept is not None and undo.kept.values.dtype == weight.dtype:
                kept = undo.kept.to(weight.device)
        if not unmerge_update(update.to(weight.device), weight, kept):
            _warn_of_inexact_unmerge(adapter, undo)


def is_as_merged(undo: Undo, weight: Tensor) -> bool:
    """Whether the weight is, for all that is known, as that merge left it."""
    if undo.period == _period:
        return True
    if undo.kept is None or undo.kept.values.dtype != weight.dtype:
        return False
    after = undo.kept.checksums[:, 1].to(weight.device)
    return torch.equal(row_checksums(_as_matrix(weight)), after)


def unmerge_update(update: Update, weight: Tensor, kept: Kept | None) -> bool:
    """Whether all weights had the bits that the merge left, and now have those from before it."""
    threads = torch.get_num_threads()
    if kept is None or kept.threads == threads:
        return _unmerge_update(update, weight, kept)
    torch.set_num_threads(kept.threads)
    try:
        return _unmerge_update(update, weight, kept)
    finally:
        torch.set_num_threads(threads)


def _unmerge_update(update: Update, weight: Tensor, kept: Kept | None) -> bool:
    left = slice(None)
    is_exact = kept is not None
    module = native_module(update, weight)
    if module is not None and kept is not None:
        unmerge = module.unmerge_bfloat16 if weight.dtype == torch.bfloat16 else module.unmerge_float32
        step = _rows_at_a_time(weight)
        left, is_exact = unmerge(weight, *update[:3], step, _factors(weight), kept.tensors)
        if not len(left):
            return is_exact

    if kept is not None:
        is_as_merged = row_checksums(weight) == kept.checksums[:, 1]
    for rows, delta in update.chunks(weight):
        chosen = _chosen(rows, left)
        new = update.subtracted(rows, weight[rows].to(delta.dtype), delta).to(weight.dtype)
        weight[rows][chosen] = new[chosen]
    if kept is None:
        return False
    rows = torch.repeat_interleave(kept.counts)
    chosen = is_as_merged[rows]
    weight[rows[chosen], kept.columns.long()[chosen]] = kept.values[chosen]
    is_exact = is_exact and bool(is_as_merged[left].all())
    return is_exact and torch.equal(row_checksums(weight), kept.checksums[:, 0])


def _warn_of_inexact_unmerge(adapter: str, undo: Undo | None) -> None:
    what = "its update"
    if undo is None:
        what = "its present update"
        why = "there is no record of its merge: stock PEFT merged it, or the model was pickled"
    elif undo.kept is None:
        why = "it was merged by merge_and_unload, which is not meant to be undone"
    else:
        why = (
            "the weight was edited (as by a merge of another layer that shares it), cast or moved to another "
            "device while it was merged"
        )
    warnings.warn(
        f"adapter {adapter!r} was unmerged by subtracting {what} in fp32, not to the exact base "
        f"weight, because {why}.",
        stacklevel=9,
    )


def _add_to_dequantised(layer, adapter: str, weight: Tensor, sign: int) -> Tensor:
    """W ± s·B·A of a dequantised W, in the wider of their dtypes: PEFT requantises it, as with plain LoRA.

    Stock's MiCA variant would round s·B·A to the dtype of W before that.
    """
    with _in_any_mode(weight):
        if quantised.is_packed_for_cpu(getattr(layer.get_base_layer(), "weight", None)):
            weight = quantised.dequantise(layer, "the layer")  # which PEFT misreads
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
