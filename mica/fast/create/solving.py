"""From adapted layers to their B: which weight, whether MiCA can start from it, and all of them solved."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.utils import are_progress_bars_disabled
from peft.tuners import lora
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from tqdm.auto import tqdm  # in a notebook too, where stderr is no terminal
from transformers.integrations import is_fsdp_enabled

from mica.dtypes import FLOATING, SIXTEEN_BIT
from mica.errors import UnsuitableLayerError
from mica.fast.create import experts, quantised
from mica.fast.forward import tensor_parallel
from mica.fast.forward.eligibility import adapter_weights, is_stored_transposed
from mica.fast.forward.expert_params import as_lora_B, is_stack, is_wrapper, parameter_of, weight_of_stack
from mica.fast.settings import settings
from mica.memory import has_no_values
from mica.subspace.cache import default_cache
from mica.subspace.distributed import Meeting, run_shared
from mica.subspace.many import Task
from mica.subspace.solver import check_entries, warnings_about

# Dequantised and gathered weights are solved this many elements at a time, 1 GiB in fp32, so that there is
# never a second copy of a 4-bit model in 16 or 32 bits, nor the whole of a sharded one. 16 layers of
# 4096 x 4096: enough for every thread and every batch.
_DEQUANTISED_ELEMENTS = 2**28

# The fp32 basis of adapters that PEFT has cast to a 16-bit base dtype and may yet cast back to fp32. Keyed by
# the layer, and gone with it. `cast_adapter_dtype` takes it out again through `restore_exact`, which uses it
# only if B still is its rounding. After `inject_adapter_in_model`, which casts nothing, it stays for a later
# call of that public function: 4·rank·out_features bytes per layer.
_exact: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class NewAdapter:
    """One adapter of one layer that needs its B.

    Attributes:
        name: What messages call the layer, such as "layer 'up'".
        layer: PEFT's layer.
        adapter_name: The name of the adapter.
    """

    name: str
    layer: nn.Module
    adapter_name: str

    def materialise_weight(self) -> Tensor:
        """(out_features, in_features); (embedding_dim, num_embeddings) for an embedding; (E, out_features,
        in_features) for an adapted parameter. On the meta device if the weight `is_absent`.

        A quantised layer's is dequantised by each call, one under tensor parallelism is gathered, which all
        processes must do together: do not keep it longer than needed.
        """
        if is_wrapper(self.layer):
            return weight_of_stack(self.layer).detach()
        if self.is_quantised:
            if self.is_absent:
                return torch.empty(self.layer.out_features, self.layer.in_features, device="meta")
            return quantised.dequantise(self.layer, self.name)
        weight = tensor_parallel.gathered(self.layer.get_base_layer())
        if is_stored_transposed(self.layer):
            return weight.t()
        return weight

    @property
    def stored(self) -> Tensor | None:
        """The base layer's parameter, packed where it is quantised; None if the layer has no ``weight``."""
        if is_wrapper(self.layer):
            return parameter_of(self.layer)
        if self.is_quantised:
            return quantised.packed_weight(self.layer)
        return getattr(self.layer.get_base_layer(), "weight", None)

    def materialise_tasks(self) -> list[Task]:
        """The matrices to solve: one for the whole B, or one for each expert of a stack, in their order."""
        weight = self.materialise_weight()
        if not is_stack(self.layer):
            return [Task(self.name, weight[0] if is_wrapper(self.layer) else weight, self.rank)]
        return [
            Task(f"{self.name} expert {expert}", matrix, self.rank) for expert, matrix in enumerate(weight)
        ]

    @property
    def is_quantised(self) -> bool:
        return quantised.kind_of(self.layer) is not None

    @property
    def is_temporary(self) -> bool:
        """Whether `materialise_weight` makes a copy."""
        return self.is_quantised or tensor_parallel.is_gathered(self.layer.get_base_layer())

    @property
    def is_absent(self) -> bool:
        """Whether the weight has no values here: another process has them, or nobody."""
        return has_no_values(self.stored)

    @property
    def rank(self) -> int:
        return self.layer.r[self.adapter_name]

    @property
    def lora_A(self) -> Tensor:  # noqa: N802
        return adapter_weights(self.layer, self.adapter_name)[0]

    @property
    def lora_B(self) -> Tensor:  # noqa: N802
        return adapter_weights(self.layer, self.adapter_name)[1]

    def leave_meta_device(self) -> None:
        """Zeros in place of factors without values (``low_cpu_mem_usage``), on the device of the base weight.

        B gets the dtype of A, as in PEFT. Does nothing where another process has the base weight.
        """
        if self.is_absent:
            return
        for factor in (self.lora_A, self.lora_B):
            if factor.is_meta:
                zeros = torch.zeros_like(factor, device=self.stored.device, dtype=self.lora_A.dtype)
                torch.utils.swap_tensors(factor, nn.Parameter(zeros, factor.requires_grad))


def is_outline(model: nn.Module) -> bool:
    """Whether no weight of the model has values: it is there to count with, and no B is computed.

    Under FSDP the first process has them.
    """
    return not is_fsdp_enabled() and all(map(has_no_values, model.parameters()))


def check_type(adapter: NewAdapter) -> None:
    """Raise UnsuitableLayerError if PEFT's layer is of a type for which there is no MiCA."""
    layer = adapter.layer
    if not (isinstance(layer, (lora.Linear, lora.Embedding)) or is_wrapper(layer) or adapter.is_quantised):
        raise UnsuitableLayerError(
            f"MiCA cannot be initialised: {adapter.name} is a {type(layer.get_base_layer()).__name__}, and "
            "MiCA is for embeddings and linear layers only, among quantised ones for those of "
            f"{quantised.COVERED}."
        )


def check(adapter: NewAdapter, needs_values: bool = True) -> list[Task]:
    """The errors that need no solver, so that a hopeless configuration fails before any work.

    Args:
        adapter: has passed `check_type`.
        needs_values: whether a weight without values is an error, as it is unless the model `is_outline`.

    Returns:
        `NewAdapter.materialise_tasks()`, which for a quantised layer takes a dequantisation.

    Raises:
        TypeError: the weight is not of a floating dtype with 16 bits or more.
        UnsuitableLayerError: MiCA cannot start from this layer's weight.
    """
    _check_is_readable(adapter)
    tasks = adapter.materialise_tasks()
    _check_dtype(adapter, tasks[0].weight.dtype)
    if is_wrapper(adapter.layer):
        experts.check(adapter.layer, adapter.name)
    for task in tasks:
        limit = min(task.weight.shape)
        if task.rank > limit:  # in the words of PEFT, whose tests look for them
            raise UnsuitableLayerError(
                f"MiCA requires `r` <= min(in_features, out_features) but got r={task.rank} for {task.name} "
                f"with weight shape {tuple(task.weight.shape)} (max usable r is {limit})."
            )
        if adapter.is_absent:
            continue
        try:
            check_entries(task.weight)
        except ValueError as error:
            raise UnsuitableLayerError(f"MiCA cannot be initialised from {task.name}: {error}") from error
    # under FSDP the first process has the weight, and will provide B
    if adapter.is_absent and needs_values and not is_fsdp_enabled():
        raise UnsuitableLayerError(
            f"MiCA needs the weight, but that of {adapter.name} is on the meta device: it is offloaded or "
            "not loaded yet."
        )
    return tasks


def _check_is_readable(adapter: NewAdapter) -> None:
    base_layer = adapter.layer.get_base_layer()
    why = _why_not_whole(base_layer, adapter.stored)
    if why is not None and not tensor_parallel.is_gathered(base_layer):
        raise UnsuitableLayerError(
            f"MiCA needs the whole weight, but {adapter.name} {why}. Create the adapter before the model is "
            "sharded, or load an adapter that was created before."
        )
    if quantised.is_unknown_to_peft(adapter.layer):
        raise UnsuitableLayerError(
            f"MiCA cannot be initialised: {adapter.name} is a {type(base_layer).__name__} of bitsandbytes, "
            "which PEFT does not know to be quantised: set model.is_loaded_in_4bit = True (or _8bit) before "
            "the adapter is created."
        )


def _check_dtype(adapter: NewAdapter, dtype: torch.dtype) -> None:
    if dtype in FLOATING:
        return
    hint = ""
    if is_wrapper(adapter.layer):
        hint = " Experts in 8 or 4 bits (fp8, mxfp4) have to be dequantised when the model is loaded."
    raise TypeError(
        f"Please initialize MiCA under float32, float16, bfloat16 or float64: {adapter.name} has a weight of "
        f"dtype {dtype}.{hint}"
    )


def _why_not_whole(module: nn.Module, weight: Tensor | None) -> str | None:
    """Why the weight is only a part of it, as text that follows the layer's name; None if it is whole."""
    if getattr(module, "_is_expert_parallel", False):
        return "holds the experts of one process only (expert parallelism)"
    if hasattr(weight, "device_mesh") or getattr(module, "_hf_tp_plan", None) is not None:
        return "holds one shard of it (tensor parallelism or FSDP)"
    return None


def initialise(adapters: Sequence[NewAdapter]) -> None:
    """B = the minor subspace for all of them, in B's present dtype; A is unchanged.

    One progress bar for everything that takes more than 2 s. Under FSDP with ``cpu_ram_efficient_loading``
    only the first process of a node has weights, and FSDP distributes its results: in the others weight and B
    are on the meta device, and B stays there.

    Args:
        adapters: all of them have passed `check`.

    Raises:
        RuntimeError: another process, with which the work is shared, has failed.
    """
    if not adapters:
        return
    meeting = Meeting([(adapter.name, adapter.rank, _count(adapter)) for adapter in adapters])
    bar = tqdm(
        total=sum(_count(adapter) for adapter in adapters if not adapter.is_absent),
        desc="MiCA initialisation",
        unit="weight",
        delay=2,
        leave=False,
        disable=are_progress_bars_disabled() or None,
    )
    warned: dict[NewAdapter, list[tuple[int, str]]] = defaultdict(list)  # results come in any order
    with bar:
        for chunk in _chunks(adapters):
            with gather_params_ctx([adapter.stored for adapter in chunk]):
                parts = []  # of B, one for each task
                tasks = []  # instead of those of the chunk before, whose weights are freed here
                for adapter in chunk:
                    tasks += adapter.materialise_tasks()
                    parts += [(adapter, expert) for expert in range(_count(adapter))]
                cache = default_cache()
                for index, subspace in run_shared(tasks, meeting, device=settings.device, cache=cache):
                    adapter, expert = parts[index]
                    assign(adapter, expert, subspace.basis)
                    for message in warnings_about(subspace, tasks[index].name):
                        warned[adapter].append((index, message))
                    bar.update()

    for messages in warned.values():  # one warning for all experts of a layer
        (_, message), *others = sorted(messages)
        if others:
            message += f" The same holds for {len(others)} more of this layer's experts."
        warnings.warn(message, stacklevel=2)


def _chunks(adapters: Sequence[NewAdapter]) -> Iterator[list[NewAdapter]]:
    """All whose weights exist anyway, then those that are dequantised or gathered by `_DEQUANTISED_ELEMENTS`,
    then one by one those whose weight ZeRO-3 has partitioned, which all processes gather.

    The same in every process: they share the work chunk by chunk.
    """
    partitioned = [adapter for adapter in adapters if hasattr(adapter.stored, "ds_id")]
    others = [adapter for adapter in adapters if adapter not in partitioned]
    yield [adapter for adapter in others if not adapter.is_temporary]
    chunk = []
    elements = 0
    for adapter in others:
        if not adapter.is_temporary:
            continue
        size = _elements(adapter)
        if chunk and elements + size > _DEQUANTISED_ELEMENTS:
            yield chunk
            chunk = []
            elements = 0
        chunk.append(adapter)
        elements += size
    yield chunk
    for adapter in partitioned:
        yield [adapter]


def _elements(adapter: NewAdapter) -> int:
    """How many elements the weight has, without a copy of it."""
    if adapter.is_quantised:
        return adapter.layer.out_features * adapter.layer.in_features
    # Under tensor parallelism PEFT's sizes are those of this process's part.
    return adapter.layer.get_base_layer().weight.numel()


def _count(adapter: NewAdapter) -> int:
    """How many matrices are solved, where the weight may not be there yet (`materialise_tasks` needs it)."""
    if not is_wrapper(adapter.layer):
        return 1
    return adapter.layer.num_experts


@torch.no_grad()
def assign(adapter: NewAdapter, expert: int, basis: Tensor) -> None:
    """Write a basis into lora_B, in the dtype that this has now.

    Args:
        adapter: The adapter.
        expert: The expert whose part of lora_B is written; 0 for a layer without experts.
        basis: The basis, (out_features, rank).
    """
    lora_B = adapter.lora_B
    is_part = is_wrapper(adapter.layer)
    with torch.inference_mode(lora_B.is_inference()):  # the mode is per thread, and the solver has its own
        if is_part:
            as_lora_B(lora_B.data, adapter.layer.num_experts)[expert] = basis
        else:
            tensor_parallel.write(lora_B, basis)
    if lora_B.dtype not in SIXTEEN_BIT:
        return
    exact = _exact.setdefault(adapter.layer, {})
    if not is_part:
        exact[adapter.adapter_name] = basis
        return
    if adapter.adapter_name not in exact:
        exact[adapter.adapter_name] = basis.new_zeros(lora_B.shape, device=lora_B.device)
    as_lora_B(exact[adapter.adapter_name], adapter.layer.num_experts)[expert] = basis


def restore_exact(layer: nn.Module, adapter_name: str, lora_B: Tensor) -> None:
    """Put the exact basis in place of its rounding, once B is in fp32.

    Args:
        layer: PEFT's layer.
        adapter_name: The name of the adapter.
        lora_B: The adapter's B, which is left alone if it is not the rounded basis any more.
    """
    basis = _exact.get(layer, {}).pop(adapter_name, None)
    if basis is None or lora_B.dtype != torch.float32 or basis.shape != lora_B.shape:
        return
    basis = basis.to(lora_B.device)
    shard = tensor_parallel.local_shard(lora_B)
    for dtype in SIXTEEN_BIT:
        rounded = tensor_parallel.part_of(basis.to(dtype).float(), lora_B)
        if torch.equal(shard, rounded):  # else another B has been set
            tensor_parallel.write(lora_B, basis)
            return
