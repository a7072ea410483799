"""What ``mica inspect`` measures: whether a layer can be adapted, and the minor end of its spectrum.

The backend decides: each layer is wrapped as PEFT would wrap it, and goes through the checks of
``mica.fast``, whose sentences are the reasons in the table.
"""

import math
import time
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mica import minor_subspace
from mica.cli.output import dtype_name, one_line
from mica.errors import UnsuitableLayerError
from mica.fast import quantised
from mica.fast.bases import NewAdapter, check
from mica.fast.loading import without_solver
from mica.subspace.result import narrowed
from mica.subspace.spectrum import sigma_max, squared_norm


@dataclass(frozen=True)
class Row:
    """One layer. ``reason`` says why it cannot be adapted; then everything after ``seconds`` is None.

    shape: effective (out_features, in_features), (embedding_dim, num_embeddings) of an embedding; None for
        a type of layer that MiCA has no adapter for. dtype: of the weight, like "float32", None without one.
    quantised: the kind of quantised layer, like "bitsandbytes 4-bit", else None. Then all numbers are of the
        dequantised weight, which MiCA starts from, and dtype is that weight's.
    sigma_max, sigma_above, sigma_largest, sigma_smallest: the largest singular value; the one just above
        the chosen r (None where all are chosen); the largest and the smallest of the chosen r.
    gap: sigma_above / sigma_largest. energy_share: Σσ² of the chosen r over ‖weight‖_F². None where the
        denominator is zero.
    method, proven, energy_excess: how the solver found the subspace, whether it is proven to be the minor
        one, and the bound on its energy above the smallest possible, relative as in `MinorSubspace`.
    """

    name: str
    kind: str
    shape: tuple[int, int] | None
    dtype: str | None
    reason: str | None
    seconds: float
    quantised: str | None = None
    sigma_max: float | None = None
    sigma_above: float | None = None
    sigma_largest: float | None = None
    sigma_smallest: float | None = None
    gap: float | None = None
    energy_share: float | None = None
    method: str | None = None
    proven: bool | None = None
    energy_excess: float | None = None


@torch.no_grad()
def measure(name: str, module: nn.Module, rank: int) -> tuple[Row, Tensor | None]:
    """The row of one layer, and its chosen singular values: (rank,) fp64 on the CPU, descending, or None.

    Where there is a singular value above the cut, the solver runs once, with rank + 1: the last ``rank`` of
    its columns are the result for ``rank``.
    """
    start = time.perf_counter()
    weight = getattr(module, "weight", None)
    shape = kind = reason = values = None
    numbers = {}
    try:
        layer = _adapted(module, rank)
        shape, kind = (layer.out_features, layer.in_features), quantised.kind_of(layer)
        weight = _checked_weight(layer)
        values, numbers = _measured(weight, rank)
    except (ValueError, torch.linalg.LinAlgError) as error:  # UnsuitableLayerError; an SVD that fails
        reason = one_line(error).rstrip(".")
    dtype = dtype_name(weight.dtype) if isinstance(weight, Tensor) else None
    kind = kind.name if kind else None
    seconds = time.perf_counter() - start
    return Row(name, type(module).__name__, shape, dtype, reason, seconds, kind, **numbers), values


def weight_of(module: nn.Module, rank: int) -> Tensor:
    """The weight of a layer that `measure` had no ``reason`` against, (out_features, in_features)."""
    return _checked_weight(_adapted(module, rank))


def _adapted(module: nn.Module, rank: int) -> nn.Module:
    """PEFT's layer over ``module``, as the backend adapts it, but without a basis; ``module`` is unchanged.

    Raises UnsuitableLayerError where PEFT or the backend refuses this type of layer.
    """
    model = nn.Module()
    model.layer = module
    tensors = (*module.parameters(), *module.buffers())
    # PEFT looks for a parameter of the model, to know its device
    model.anchor = nn.Parameter(torch.empty(0, device=tensors[0].device if tensors else "cpu"))
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # then PEFT looks at the layer's own type
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    config = LoraConfig(init_lora_weights="mica", r=rank, target_modules=["layer"])
    try:
        with without_solver(), warnings.catch_warnings():  # it will be run with rank + 1
            warnings.simplefilter("ignore", UserWarning)  # of merging, which is not done here
            inject_adapter_in_model(config, model)
    except UnsuitableLayerError as error:
        raise UnsuitableLayerError(str(error).replace("layer 'layer'", "this layer")) from error
    except ValueError as error:  # PEFT has no MiCA for it, or no adapter at all
        raise UnsuitableLayerError(f"a layer of type {type(module).__name__}") from error
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
    return model.layer


def _checked_weight(layer: nn.Module) -> Tensor:
    """The weight that MiCA starts from, (out_features, in_features). Raises UnsuitableLayerError."""
    try:
        return check(NewAdapter("this layer", layer, "default"))
    except TypeError as error:  # its dtype
        raise UnsuitableLayerError(str(error)) from error


def _measured(weight: Tensor, rank: int) -> tuple[Tensor, dict]:
    count = min(weight.shape)
    subspace = _solve(weight, min(rank + 1, count))
    singular_values = subspace.singular_values.double().cpu()
    values = singular_values[-rank:]
    proven, excess = subspace.certified, subspace.energy_excess
    if len(singular_values) > rank:
        chosen = narrowed(subspace, rank)
        if chosen is None:  # alone they may be proven, if the value above the cut is much larger
            chosen = _solve(weight, rank)
        values = chosen.singular_values.double().cpu()
        proven, excess = chosen.certified, chosen.energy_excess
    above = singular_values[0].item() if len(singular_values) > rank else None
    energy = squared_norm(weight)
    largest = values[0].item()
    return values, {
        "sigma_max": sigma_max(weight),
        "sigma_above": above,
        "sigma_largest": largest,
        "sigma_smallest": values[-1].item(),
        "gap": above / largest if above is not None and largest else None,
        "energy_share": values.square().sum().item() / energy if energy else None,
        "method": subspace.method,
        "proven": proven,
        "energy_excess": excess if math.isfinite(excess) else None,
    }


def _solve(weight: Tensor, rank: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # null singular values: sigma_smallest shows them
        return minor_subspace(weight, rank)
