"""Who computes a layer's result without calling the layer, and how to switch that off.

Frameworks fuse LoRA layers by replacing a forward: that of the attention or MLP around them (on the instance
or on its class), functions that it calls (``self_attn.apply_qkv``), or the layer's own. The replacement reads
the adapter's weights, PEFT's layer is never called, and the backend has no part in it. Nothing here raises:
what cannot be read is no finding.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from contextlib import suppress

from torch import nn

# package -> how its layers come back to PEFT. From the sources of axolotl 0.19.0 (utils/schemas/config.py and
# monkeypatch/lora_kernels.py), unsloth at 015bdef0d (models/llama.py), unsloth_zoo at ce232d6ce (compiler.py)
# and liger_kernel (transformers/model/llama.py, whose loss reads lm_head.weight).
REMEDIES = {
    "axolotl": "its configuration needs lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel and "
    "lora_embedding_kernel: false (axolotl turns all four on where none is set)",
    "unsloth": "make the adapter by peft.get_peft_model instead of FastLanguageModel.get_peft_model, or with "
    "lora_dropout > 0, and set UNSLOTH_COMPILE_DISABLE=1 before unsloth is imported",
    "liger_kernel": "apply it with fused_linear_cross_entropy=False, or leave lm_head without an adapter",
}
# Their forwards call the layers: hooks, offloading, gradient checkpointing, compilation.
_ORDINARY = {"accelerate", "mica", "peft", "torch", "transformers"}


def bypassed_by(modules: Mapping[str, nn.Module], name: str, entered: Collection[str]) -> str | None:
    """Who replaced a forward around the layer ``name``, which was not called; None if nobody is found.

    Args:
        modules: the model's ``named_modules()``.
        entered: the names of all modules around layers that were called. What is around such a module has
            entered it and cannot be why the layer was not called.

    Returns:
        a key of `REMEDIES`, or the name of the function's module.
    """
    while True:
        if name in modules and (who := replaced_by(modules[name])):
            return who
        if not name or name in entered:
            return None
        name = name.rpartition(".")[0]


def around(names: Collection[str]) -> set[str]:
    """The names of all modules around those named, the whole model ("") among them."""
    found: set[str] = set()
    for name in names:
        while name and (name := name.rpartition(".")[0]) not in found:
            found.add(name)
    return found


def replaced_by(module: nn.Module) -> str | None:
    """Whose function is the module's forward, or one that its forward is to call; None if its own.

    Wrapped in a decorator of anybody's, a module's own forward remains its own.
    """
    with suppress(Exception):  # attributes of foreign objects can do anything
        own = {cls.__module__.partition(".")[0] for cls in type(module).__mro__} | _ORDINARY
        held = vars(module)
        calls = [held["forward"]] if "forward" in held else [type(module).forward]
        calls += [value for name, value in held.items() if name.startswith("apply_") and callable(value)]
        for call in calls:
            function = _innermost(call)
            home = _home(function)
            if home.partition(".")[0] not in own:
                return _framework(home, function) or home
    return None


def _innermost(call):
    """The function in a bound method, a partial or a decorator's wrapper."""
    for _ in range(32):
        if hasattr(call, "__wrapped__"):
            call = call.__wrapped__
        elif hasattr(call, "__func__"):
            call = call.__func__
        elif isinstance(call, functools.partial):
            call = call.func
        else:
            break
    return call


def _home(function) -> str:
    """The name of the module that the function was defined or compiled in."""
    scope = getattr(function, "__globals__", None)
    if scope is None:  # an object that can be called, or one of C's functions
        return getattr(function, "__module__", None) or type(function).__module__
    return scope.get("__name__") or function.__code__.co_filename


def _framework(home: str, function) -> str | None:
    package = home.partition(".")[0]
    # unsloth_zoo compiles PEFT's forwards into modules named after the layer, "Linear_peft_forward"
    if package.startswith("unsloth") or getattr(function, "__name__", "") == "unsloth_forward":
        return "unsloth"
    return package if package in REMEDIES else None
