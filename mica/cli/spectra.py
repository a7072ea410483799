"""What ``mica inspect`` measures: whether a layer can be adapted, and the minor end of its spectrum.

The backend decides: each layer is wrapped as PEFT would wrap it, and goes through the checks of
``mica.fast``, whose sentences are the reasons in the table.
"""

import math
import re
import warnings
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mica import MinorSubspace, minor_subspace
from mica.cli.output import dtype_name, one_line
from mica.errors import UnsuitableLayerError
from mica.fast.create import quantised
from mica.fast.create.solving import NewAdapter, check
from mica.fast.forward.expert_params import is_stack
from mica.fast.loading import without_solver
from mica.subspace.device import is_on_host
from mica.subspace.gram import row_blocks
from mica.subspace.result import is_certified


@dataclass(frozen=True)
class Row:
    """What was measured in a layer or stack; all of it is None if it cannot be adapted, for ``reason``.

    shape: effective (out_features, in_features), (embedding_dim, num_embeddings) of an embedding, with their
        number in front for a stack of experts; None for a type of layer that MiCA has no adapter for.
    dtype: of the weight, like "float32", None without one.
    quantised: the kind of quantised layer, like "bitsandbytes 4-bit", else None. Then all numbers are of the
        dequantised weight, which MiCA starts from, and dtype is that weight's.
    sigma_above, sigma_largest, sigma_smallest: the singular value just above the chosen r (None where all
        are chosen); the largest and the smallest of the chosen r.
    gap: sigma_above / sigma_largest. energy_share: Σσ² of the chosen r over ‖weight‖_F². None where the
        denominator is zero.
    method, proven, energy_excess: how the solver found the subspace, whether it is proven to be the minor
        one, and the bound on its energy above the smallest possible, relative as in `MinorSubspace`.
    expert: the expert of a stack with the smallest gap, whose numbers these are; but proven holds for all
        experts, and energy_excess is the largest of any.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    reason: str | None = None
    quantised: str | None = None
    sigma_above: float | None = None
    sigma_largest: float | None = None
    sigma_smallest: float | None = None
    gap: float | None = None
    energy_share: float | None = None
    method: str | None = None
    proven: bool | None = None
    energy_excess: float | None = None
    expert: int | None = None


@torch.no_grad()
def measure(name: str, module: nn.Module, rank: int, parameter: str | None = None) -> Row:
    """The `Row` of one layer.

    ``parameter``: measure this one of ``module``, like a stack of experts, and not its weight as a layer.

    Where there is a singular value above the cut, the solver runs once, with rank + 1: the last ``rank`` of
    its columns are the result for ``rank``.
    """
    weight = getattr(module, parameter or "weight", None)
    facts = {}
    try:
        layer = _adapted(module, rank, parameter)
        facts["shape"] = (layer.out_features, layer.in_features)
        kind = quantised.kind_of(layer)
        if kind:
            facts["quantised"] = kind.name
        weights = _checked_weights(layer)
        weight = weights[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # null singular values: sigma_smallest shows them
            measured = [_measured(each, rank) for each in weights]
        numbers = measured[0]
        if is_stack(layer):
            facts["shape"] = (len(weights), *facts["shape"])
            numbers = _worst_expert(measured)
        facts |= numbers
    except (ValueError, torch.linalg.LinAlgError) as error:  # UnsuitableLayerError; an SVD that fails
        facts["reason"] = one_line(error).rstrip(".")

    if isinstance(weight, Tensor):
        facts["dtype"] = dtype_name(weight.dtype)
    return Row(name, type(module).__name__, **facts)


def _worst_expert(measured: list[dict]) -> dict:
    """What `_measured` returned for the expert with the smallest gap, with the worst certificate of all."""

    numbers = min(measured, key=lambda each: each["gap"] or math.inf)
    excesses = [each["energy_excess"] for each in measured]
    numbers["expert"] = measured.index(numbers)
    numbers["proven"] = all(each["proven"] for each in measured)
    numbers["energy_excess"] = None
    if None not in excesses:
        numbers["energy_excess"] = max(excesses)
    return numbers


def _adapted(module: nn.Module, rank: int, parameter: str | None) -> nn.Module:
    """PEFT's layer over ``module``, as the backend adapts it, but without a basis; it freezes ``module``.

    Raises UnsuitableLayerError where PEFT or the backend refuses this type of layer.
    """
    model = nn.Module()
    model.layer = module
    tensors = (*module.parameters(), *module.buffers())
    device = tensors[0].device if tensors else "cpu"
    model.anchor = nn.Parameter(torch.empty(0, device=device))  # PEFT takes its device for the model's
    model.is_loaded_in_4bit = True  # then PEFT looks at the layer's own type
    model.is_loaded_in_8bit = True
    if parameter:
        targets = {"target_modules": [], "target_parameters": [f"layer.{parameter}"]}
    else:
        targets = {"target_modules": ["layer"]}
    config = LoraConfig(init_lora_weights="mica", r=rank, **targets)
    try:
        with without_solver(), warnings.catch_warnings():  # the solver is run later, with rank + 1
            warnings.simplefilter("ignore", UserWarning)  # about merging, which is not done here
            inject_adapter_in_model(config, model)
    except UnsuitableLayerError as error:
        raise UnsuitableLayerError(re.sub(r"layer 'layer[^']*'", "this layer", str(error))) from error
    except ValueError as error:  # PEFT has no MiCA for it, or no adapter at all
        raise UnsuitableLayerError(f"a layer of type {type(module).__name__}") from error
    return model.layer


def _checked_weights(layer: nn.Module) -> list[Tensor]:
    """The weight that MiCA starts from, (out_features, in_features); of a stack, every expert's.

    Raises UnsuitableLayerError.
    """
    adapter = NewAdapter("this layer", layer, "default")
    try:
        return [task.weight for task in check(adapter)]
    except TypeError as error:  # its dtype
        raise UnsuitableLayerError(str(error)) from error


def _measured(weight: Tensor, rank: int) -> dict:
    """The numbers of one matrix in a `Row`."""
    subspace = minor_subspace(weight, min(rank + 1, *weight.shape))
    singular_values = subspace.singular_values.double().cpu()
    above = None
    chosen = subspace
    if len(singular_values) > rank:
        above = singular_values[0].item()
        # Where the rank + 1 smallest are not proven, the chosen may be, if the value above the cut is much
        # larger.
        chosen = narrow(subspace, rank) or minor_subspace(weight, rank)

    values = chosen.singular_values.double().cpu()
    largest = values[0].item()
    energy = squared_norm(weight)
    excess = chosen.energy_excess
    return {
        "sigma_above": above,
        "sigma_largest": largest,
        "sigma_smallest": values[-1].item(),
        "gap": above / largest if above is not None and largest else None,
        "energy_share": values.square().sum().item() / energy if energy else None,
        "method": subspace.method,
        "proven": chosen.certified,
        "energy_excess": excess if math.isfinite(excess) else None,
    }


def narrow(stored: MinorSubspace, rank: int) -> MinorSubspace | None:
    """The last ``rank`` columns of a result, or None where what is known of all does not certify them.

    With E the energy of a column as stored, θ its squared singular value and λ the true one, θ >= λ for
    each, so that what the kept columns exceed Σλ by is at most

        Σ_all (E − λ) − Σ_dropped (E − θ),    with E − θ = θ (‖column‖² − 1) up to second order:

    because columns rounded to fp32 do not quite have norm 1. That term counts: where 16 columns of a square
    Gaussian matrix are cut to 1, it can be as large as the excess that is allowed. With 40 matrices of
    96 x 96, 15 are therefore not certified at rank 1, 2 at rank 2, none at 4 or 8; with 15 of 256 x 256 none.
    """
    dropped = stored.basis.shape[1] - rank
    if dropped == 0:
        return stored
    if not stored.certified or stored.null_count:
        return None

    energies = stored.singular_values.double().square()
    stretch = stored.basis[:, :dropped].double().square().sum(0) - 1
    excess = stored.energy_excess * max(energies.sum().item(), (rank + dropped) * stored.resolution)
    excess = max(0.0, excess - (energies[:dropped] * stretch).sum().item())
    least = max(0.0, energies[dropped:].sum().item() - excess)  # Σλ of the kept is at least this
    if not is_certified(excess, least, rank, stored.resolution):
        return None

    reference = max(least, rank * stored.resolution)
    return replace(
        stored,
        basis=stored.basis[:, dropped:].contiguous(),
        singular_values=stored.singular_values[dropped:].clone(),
        energy_excess=excess / reference if reference else 0.0,
    )


def squared_norm(weight: Tensor) -> float:
    """‖weight‖_F² of a (out_features, in_features) weight, summed in fp64."""
    if is_on_host(weight.device):  # which may have no fp64
        weight = weight.cpu()
    return sum(block.square().sum().item() for _, block in row_blocks(weight))
