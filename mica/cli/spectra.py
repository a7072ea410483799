"""What ``mica inspect`` measures: the layers that MiCA would adapt, and the minor end of their spectra.

A weight is read in its effective orientation, (out_features, in_features), and streamed in fp64, a block
of ``CONVERTED_ELEMENTS`` at a time, so that an embedding is never copied whole.
"""

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mica import minor_subspace
from mica.dtypes import FLOATING
from mica.errors import UnsuitableLayerError, UsageError
from mica.fast import loading, quantised
from mica.subspace.result import narrowed

CONVERTED_ELEMENTS = 1 << 22  # fp64: 32 MiB, and every layer of a small model at once

# min(out_features, in_features) up to which `spectrum` takes the SVD, beyond which the Gram matrix.
LARGEST_SVD = 2048

# Random matrices, whose largest singular values crowd, need most: 576 x 576 takes 30 steps, 2048 x 2048 all
# 60 (and is 5e-8 short); the layers of SmolLM2 take 5 to 35.
_LANCZOS_STEPS = 60
_LANCZOS_TOLERANCE = 1e-8  # relative change of σ_max² in a step

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Row:
    """One layer. ``reason`` says why it cannot be adapted; then everything after ``seconds`` is None.

    shape: effective (out_features, in_features), (embedding_dim, num_embeddings) of an embedding; None for
        a kind of layer that MiCA does not know. dtype: of the weight, like "float32", None without one.
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


def find_targets(model: nn.Module, rank: int, names: str) -> dict[str, nn.Module]:
    """The modules, by name, that PEFT would adapt for ``names``: "all-linear" or a list with commas.

    The model is not changed. Modules that PEFT or MiCA refuses are among them.

    Raises UsageError if a name matches nothing.
    """
    targets = names if names == "all-linear" else [name.strip() for name in names.split(",") if name.strip()]
    config = LoraConfig(init_lora_weights="mica", r=rank, target_modules=targets, task_type="CAUSAL_LM")
    config = _maybe_include_all_linear_layers(config, model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and check_target_module_exists(config, name)
    }
    if not modules:
        raise UsageError(f"--target-modules {names}: no layer of the model has such a name")
    for target in targets if targets != "all-linear" else ():
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise UsageError(f"--target-modules {names}: no layer of the model is called '{target}'")
    return modules


def effective_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, Conv1D or embedding as (out_features, in_features), a view."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, (Conv1D, nn.Embedding)) else weight


def _effective_shape(module: nn.Module) -> tuple[int, int] | None:
    """From the module's own numbers: a quantised weight may be packed into another shape."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim, module.num_embeddings
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape[::-1])
    return None


def _why_not(module: nn.Module, shape: tuple[int, int] | None, rank: int) -> str | None:
    """The reason, apart from the numbers in it, for which a layer cannot be adapted."""
    if shape is None:
        return f"a layer of type {type(module).__name__}"
    weight = module.weight
    if type(weight) not in (Tensor, nn.Parameter):
        return f"the weight is a {type(weight).__name__}, not a plain tensor"
    if weight.dtype not in FLOATING:
        return f"the weight has dtype {str(weight.dtype).removeprefix('torch.')}"
    if weight.is_meta:
        return "the weight is not loaded (meta device)"
    return _why_not_rank(shape, rank)


def _why_not_rank(shape: tuple[int, int], rank: int) -> str | None:
    return f"rank {rank} > min(out, in) = {min(shape)}" if rank > min(shape) else None


@torch.no_grad()
def measure(name: str, module: nn.Module, rank: int) -> tuple[Row, Tensor | None]:
    """The row of one layer, and its chosen singular values: (rank,) fp64 on the CPU, descending, or None.

    Where there is a singular value above the cut, the solver runs once, with rank + 1: the last ``rank`` of
    its columns are the result for ``rank``.
    """
    start = time.perf_counter()
    shape, weight = _effective_shape(module), getattr(module, "weight", None)
    values, numbers, kind = None, {}, None
    try:
        adapted = _quantised_layer(module, rank)
        if adapted is None:
            reason = _why_not(module, shape, rank)
            weight = weight if reason else effective_weight(module)
        else:
            kind = quantised.kind_of(adapted).name
            shape = adapted.out_features, adapted.in_features
            reason = _why_not_rank(shape, rank)
            weight = weight if reason else quantised.dequantise(adapted, "this layer")
        if reason is None:
            values, numbers = _measured(_on_fp64_device(weight), rank)
    except (ValueError, torch.linalg.LinAlgError) as error:  # NaN or Inf; an SVD that does not converge
        reason = " ".join(str(error).split()).rstrip(".")
    dtype = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else None
    seconds = time.perf_counter() - start
    row = Row(name, type(module).__name__, shape, dtype, reason, seconds, kind, **numbers)
    return row, values


def _quantised_layer(module: nn.Module, rank: int) -> nn.Module | None:
    """PEFT's layer over a quantised module, as the backend adapts it, without a basis; None for any other.

    The module stays as it was. Raises UnsuitableLayerError for a quantised one that the backend refuses.
    """
    if type(getattr(module, "weight", None)) in (Tensor, nn.Parameter):
        return None
    model = nn.Module()
    model.layer = module
    tensors = (*module.parameters(), *module.buffers())
    model.anchor = nn.Parameter(
        torch.empty(0, device=tensors[0].device if tensors else "cpu")
    )  # PEFT asks one
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # then PEFT looks at the layer's own type
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    config = LoraConfig(init_lora_weights="mica", r=rank, target_modules=["layer"])
    try:
        # no solver: it will be run with rank + 1
        with loading.without_solver(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of merging, which is not done here
            inject_adapter_in_model(config, model)
    except UnsuitableLayerError:
        raise
    except ValueError:  # PEFT does not know this kind of layer
        return None
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
    return model.layer if quantised.kind_of(model.layer) else None


def weight_of(module: nn.Module, rank: int) -> Tensor:
    """The weight of a layer that `measure` had no ``reason`` against, (out_features, in_features)."""
    adapted = _quantised_layer(module, rank)
    return effective_weight(module) if adapted is None else quantised.dequantise(adapted, "this layer")


def _on_fp64_device(weight: Tensor) -> Tensor:
    return weight.cpu() if weight.device.type == "mps" else weight


def _measured(weight: Tensor, rank: int) -> tuple[Tensor, dict]:
    count = min(weight.shape)
    subspace = _solve(weight, min(rank + 1, count))
    found = subspace.singular_values.double().cpu()
    values = found[-rank:]
    sigma_max = largest_singular_value(weight)
    proven, excess = subspace.certified, subspace.energy_excess
    if len(found) > rank:
        chosen = narrowed(subspace, rank)
        if chosen is None:  # alone they may be proven, where the value above the cut is far above it
            chosen = _solve(weight, rank)
        values = chosen.singular_values.double().cpu()
        proven, excess = chosen.certified, chosen.energy_excess
    above = found[0].item() if len(found) > rank else None
    energy = _squared_norm(weight)
    largest = values[0].item()
    return values, {
        "sigma_max": sigma_max,
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


def _tall(weight: Tensor) -> Tensor:
    """(long, short), a view; in fp64 already where it is small enough to be converted at once."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    return tall.double() if tall.numel() <= CONVERTED_ELEMENTS else tall


def _row_blocks(tall: Tensor) -> Iterator[Tensor]:
    for block in tall.split(max(1, CONVERTED_ELEMENTS // tall.shape[1])):
        yield block.double()


def _squared_norm(weight: Tensor) -> float:
    return sum(block.square().sum().item() for block in _row_blocks(_tall(weight)))


def largest_singular_value(weight: Tensor) -> float:
    """σ_max of a finite (out_features, in_features) weight, to about 1e-7, a little from below.

    Lanczos on weightᵀ weight, with full reorthogonalisation: the products of a power iteration, put to
    better use. That one is 2% short after 12 steps on a random 576 x 576 matrix. The start is drawn from
    its own generator: the same on every call and device.
    """
    tall = _tall(weight)
    start = torch.randn(tall.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(tall.device) / start.norm().item()
    steps = min(_LANCZOS_STEPS, len(vector))
    vectors = vector.new_zeros(steps, len(vector))
    diagonal, off_diagonal = [], []
    largest = 0.0
    for step in range(steps):
        vectors[step] = vector
        product = torch.zeros_like(vector)
        for block in _row_blocks(tall):
            product += block.T @ (block @ vector)
        diagonal.append((vector @ product).item())
        previous, largest = largest, _largest_eigenvalue(diagonal, off_diagonal)
        for _ in range(2):  # twice is enough
            product -= vectors[: step + 1].T @ (vectors[: step + 1] @ product)
        length = product.norm().item()
        if largest - previous <= _LANCZOS_TOLERANCE * largest or length <= _EPS * largest:
            break
        off_diagonal.append(length)
        vector = product / length
    return math.sqrt(max(0.0, largest))


def _largest_eigenvalue(diagonal: list[float], off_diagonal: list[float]) -> float:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if off_diagonal:
        beside = torch.tensor(off_diagonal, dtype=torch.float64)
        matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
    return torch.linalg.eigvalsh(matrix)[-1].item()


@torch.no_grad()
def spectrum(weight: Tensor) -> Tensor:
    """All singular values of a finite (out_features, in_features) weight: descending, fp64 on the CPU.

    For min(out_features, in_features) <= 2048, to fp64: by `svdvals` of the tall orientation, or of the
    triangle R of a streamed QR decomposition where that is less than half as long. Beyond, as roots of the
    eigenvalues of the streamed Gram matrix, which resolve σ only down to about 1e-7 σ_max: smaller ones are
    drawn at that resolution, √(4 √n ε₆₄) σ_max.
    """
    tall = _tall(_on_fp64_device(weight))
    long_features, short_features = tall.shape
    if short_features > LARGEST_SVD:
        gram = torch.zeros(short_features, short_features, dtype=torch.float64, device=tall.device)
        for block in _row_blocks(tall):
            gram.addmm_(block.T, block)
        eigenvalues = torch.linalg.eigvalsh(gram).flip(0).cpu()
        return eigenvalues.clamp_min(4 * short_features**0.5 * _EPS * eigenvalues[0].item()).sqrt()
    if long_features > 2 * short_features:
        tall = _triangle(tall)
    return torch.linalg.svdvals(tall.double()).cpu()


def _triangle(tall: Tensor) -> Tensor:
    """R, (short, short) fp64, of the QR decomposition of ``tall``: the same singular values."""
    short_features = tall.shape[1]
    triangle = torch.empty(0, short_features, dtype=torch.float64, device=tall.device)
    for block in tall.split(2 * short_features):  # a block costs a QR of 3/2 of its rows
        triangle = torch.linalg.qr(torch.cat([triangle, block.double()]), mode="r").R
    return triangle
