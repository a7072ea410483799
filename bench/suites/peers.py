"""Peers' autograd functions for LoRA on a CPU, from their wheels, which are not installed.

Of a wheel's files only the definitions that are named here are executed. What these import for a GPU,
Triton's kernels of SwiGLU above all, is given to them in PyTorch's operators. The wheels come from
``pip download --no-deps -d FOLDER unsloth axolotl nemo-automodel``.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from zipfile import ZipFile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIABLE = "MICA_BENCH_PEERS"  # the folder with their wheels
AMP = {
    "torch_amp_custom_fwd": torch.amp.custom_fwd(device_type="cpu"),
    "torch_amp_custom_bwd": torch.amp.custom_bwd(device_type="cpu"),
}


class Peer(NamedTuple):
    """``mlp(model, x)`` of a model with gate_proj, up_proj and down_proj, and ``linear(layer, x)``.

    ``has_masters``: whether its adapters may be in fp32 over a 16-bit base; ``has_dora``: whether they may be
    DoRA.
    """

    mlp: Callable[[nn.Module, Tensor], Tensor]
    linear: Callable[[nn.Module, Tensor], Tensor]
    has_masters: bool = True
    has_dora: bool = False


def factors(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor, float]:
    """W, A, B and the scaling of a LoRA layer of PEFT's."""
    A, B = (part["default"].weight for part in (layer.lora_A, layer.lora_B))
    return layer.base_layer.weight, A, B, layer.scaling["default"]


def projections(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor, float]]:
    return [factors(layer) for layer in (model.gate_proj, model.up_proj, model.down_proj)]


def found() -> dict[str, Peer]:
    """Name and version -> peer, of the wheels in the folder; {} without one."""
    folder = os.environ.get(VARIABLE)
    peers = {}
    for name, (distribution, make) in _PEERS.items():
        for wheel in sorted(Path(folder).glob(f"{distribution}-*.whl")) if folder else ():
            _, version, *_ = wheel.name.split("-")
            peers[f"{name} {version}"] = make(wheel)
    return peers


def _execute(wheel: Path, file: str, definitions: str, **given: Any) -> SimpleNamespace:
    """These definitions of a file, with ``given`` in place of what it imports.

    Raises:
        AssertionError: the file does not have all of them.
    """
    wanted = set(definitions.split())
    tree = ast.parse(ZipFile(wheel).read(file))
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    missing = wanted - {node.name for node in tree.body}
    assert not missing, f"{file} of {wheel.name} does not define {', '.join(sorted(missing))}"
    namespace = {"torch": torch, "F": F, **given}
    exec(compile(tree, file, "exec"), namespace)
    return SimpleNamespace(**namespace)


def _as_it_is(weight: Tensor, *_, **__) -> Tensor:
    """A weight that is not quantised, dequantised."""
    return weight


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(SwiGLU, the gradient of ``up``, that of ``gate``)."""
    activated = F.silu(gate)
    return activated * up, grad * activated, torch.ops.aten.silu_backward(grad * up, gate)


def _swiglu_backward_gate_first(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, grad_up, grad_gate = _swiglu_backward(grad, gate, up)
    return hidden, grad_gate, grad_up


def _unsloth(wheel: Path) -> Peer:
    products = _execute(
        wheel,
        "unsloth/kernels/utils.py",
        "addmm_ matmul_lora",
        _HAS_ADDMM_OP=False,
        Float8Tensor=SimpleNamespace,
        Int4QuantState=SimpleNamespace,
        _is_packed_state=lambda state: False,
        torch_matmul=torch.matmul,
        fast_dequantize=_as_it_is,
    )
    functions = _execute(
        wheel,
        "unsloth/kernels/fast_lora.py",
        "LoRA_MLP LoRA_W _add_lora_dX",
        addmm_=products.addmm_,
        matmul_lora=products.matmul_lora,
        fast_dequantize=_as_it_is,
        _rms_layernorm=SimpleNamespace(_SAVE_OUTPUT=False),
        **AMP,
    )

    def mlp(model: nn.Module, x: Tensor) -> Tensor:
        operands = [operand for W, *rest in projections(model) for operand in (W, None, *rest)]
        return functions.LoRA_MLP.apply(x, *operands, _swiglu, _swiglu_backward, False)

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        W, *rest = factors(layer)
        return functions.LoRA_W.apply(x, W, None, *rest)

    return Peer(mlp, linear)


def _axolotl(wheel: Path) -> Peer:
    file = "axolotl/kernels/lora.py"
    functions = _execute(
        wheel,
        file,
        "matmul_lora LoRA_MLP LoRA_O _lora_only _compute_dora_scale",
        dequantize=_as_it_is,
        nn=nn,
        _should_use_triton_dora=lambda: False,
        **AMP,
    )

    def operands(layer: nn.Module) -> tuple:
        W, A, B, scaling = factors(layer)
        return W, None, None, A, B, scaling, None, magnitude_of(layer)

    def mlp(model: nn.Module, x: Tensor) -> Tensor:
        layers = model.gate_proj, model.up_proj, model.down_proj
        of_all = [operand for layer in layers for operand in operands(layer)]
        return functions.LoRA_MLP.apply(x, None, *of_all, _swiglu, _swiglu_backward_gate_first, False)

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        return functions.LoRA_O.apply(x, None, *operands(layer))

    def magnitude_of(layer: nn.Module) -> Tensor | None:
        """Without its cached norm, which no longer holds after a training step."""
        if not layer.lora_magnitude_vector:
            return None
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.__dict__.pop("_dora_cache", None)
        return magnitude

    return Peer(mlp, linear, has_dora=True)


def _nemo(wheel: Path) -> Peer:
    folder = "nemo_automodel/components/_peft"
    of_layer = _execute(wheel, f"{folder}/lora.py", "LoRATritonFunction apply_memory_efficient_lora")
    of_mlp = _execute(
        wheel,
        f"{folder}/lora_mlp.py",
        "LoRASwiGLUMLPFunction _use_triton _cast _like_input _swiglu_fwd _swiglu_bwd_inplace",
        HAVE_TRITON=False,
    )

    def mlp(model: nn.Module, x: Tensor) -> Tensor:
        operands = [operand for one in projections(model) for operand in one]
        return of_mlp.LoRASwiGLUMLPFunction.apply(x, *operands)

    def linear(layer: nn.Module, x: Tensor) -> Tensor:
        W, A, B, scaling = factors(layer)
        return of_layer.apply_memory_efficient_lora(x, A, B, scaling, False, F.linear(x, W))

    return Peer(mlp, linear, has_masters=False)


_PEERS = {
    "Unsloth": ("unsloth", _unsloth),
    "axolotl": ("axolotl", _axolotl),
    "NeMo Automodel": ("nemo_automodel", _nemo),
}
