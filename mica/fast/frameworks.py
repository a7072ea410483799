"""Which framework has replaced a function, and how to switch that off.

Frameworks fuse LoRA layers by replacing a forward: that of the attention or MLP around them (on the instance
or on its class), functions that it calls (``self_attn.apply_qkv``), or the layer's own. The replacement reads
the adapter's weights, PEFT's layer is never called, and the backend has no part in it. Nothing here raises:
what cannot be read is no finding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress

from torch import nn

# Framework -> how its layers come back to PEFT. Read in the sources of axolotl 0.19.0
# (utils/schemas/config.py, integrations/kernels/args.py), unsloth and unsloth_zoo 2026.10.9 (kernels/
# fast_lora.py, whose kernels decline MiCA; compiler.py, patch_lora_forwards) and liger_kernel 0.8.5
# (transformers/model/llama.py, whose loss reads lm_head.weight).
REMEDIES = {
    "axolotl": "its configuration needs lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel and "
    "lora_embedding_kernel: false (axolotl turns all four on where none is set), and for experts "
    "use_scattermoe and use_sonicmoe: false",
    "unsloth": "import mica.fast after the model has been loaded, or call mica.fast.uninstall() and "
    "mica.fast.enable() then (loading rewrites the forwards of PEFT's layers, also with "
    "UNSLOTH_COMPILE_DISABLE=1); releases that do not know MiCA need peft.get_peft_model too, instead of "
    "FastLanguageModel.get_peft_model",
    "liger_kernel": "apply it with fused_linear_cross_entropy=False, or leave lm_head without an adapter",
}

# Their forwards call the layers: hooks, offloading, gradient checkpointing, compilation.
_ORDINARY = {"accelerate", "mica", "peft", "torch", "transformers"}


def replaced_by(module: nn.Module) -> str | None:
    """Whose function is the module's forward, or one that its forward is to call; None if its own.

    A known framework's name, else that of the function's module. Wrapped in a decorator of anybody's, a
    module's own forward remains its own.
    """
    with suppress(Exception):  # attributes of foreign objects can do anything
        own = {cls.__module__.partition(".")[0] for cls in type(module).__mro__} | _ORDINARY
        attributes = vars(module)
        calls = [value for name, value in attributes.items() if name.startswith("apply_") and callable(value)]
        for call in [attributes.get("forward", type(module).forward), *calls]:
            function = _innermost(call)
            home = home_of(function)
            package = home.partition(".")[0]
            if package in own:
                continue
            # unsloth_zoo compiles PEFT's forwards into modules named after the layer, "Linear_peft_forward"
            if package.startswith("unsloth") or getattr(function, "__name__", "") == "unsloth_forward":
                return "unsloth"
            return package if package in REMEDIES else home
    return None


def _innermost(call):
    """The function in a bound method, a partial or a decorator's wrapper; this package's is not looked into.

    What this package's function wraps may itself be a framework's, which then no longer decides.
    """
    for _ in range(32):
        if hasattr(call, "__globals__") and home_of(call).startswith("mica."):
            return call
        if hasattr(call, "__wrapped__"):
            call = call.__wrapped__
        elif hasattr(call, "__func__"):
            call = call.__func__
        elif isinstance(call, functools.partial):
            call = call.func
        else:
            return call
    return call


def home_of(function: Callable) -> str:
    """The name of the module that the function was defined or compiled in."""
    scope = getattr(function, "__globals__", None)
    if scope is None:  # a callable object, or a function in C
        return getattr(function, "__module__", None) or type(function).__module__
    return scope.get("__name__") or function.__code__.co_filename
