"""Input and output embeddings that are trained as whole modules: PEFT's ``modules_to_save``.

What PEFT lacks: fp32 copies over a 16-bit base, a learning rate of their own, and their update for a sibling.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mica.cli.adapt.saved_adapter import WEIGHTS, SavedAdapter
from mica.cli.output import dtype_name, explained
from mica.cli.targets import Targets
from mica.errors import UsageError

TRAINABLE = ("float32", "bfloat16", "float16")


def find(model: nn.Module) -> dict[str, nn.Module]:
    """Input and output embedding of a model without an adapter, by their names; some have no output layer."""
    found = {}
    for wanted in (model.get_input_embeddings(), model.get_output_embeddings()):
        for name, module in model.named_modules():
            if module is wanted:
                found[name] = module
    return found


def _is_tied(found: dict[str, nn.Module]) -> bool:
    return len({id(module.weight) for module in found.values()}) < len(found)


def config(model: nn.Module) -> dict[str, object]:
    """What `LoraConfig` takes to train the embeddings of ``model``, tied ones as one weight."""
    found = find(model)
    names = list(found)
    tied = _is_tied(found)
    if tied:
        names = names[:1]
        if names[0].rpartition(".")[2] not in EMBEDDING_LAYER_NAMES:
            # PEFT ties only if one of these names is there. It then adds the model's own.
            names.append(EMBEDDING_LAYER_NAMES[0])
    return {"modules_to_save": names, "ensure_weight_tying": tied}


def check(model: nn.Module, args: argparse.Namespace, targets: Targets) -> None:
    """Raise UsageError where ``--train-embeddings`` is not possible; ``model`` may have no weights."""
    found = find(model)
    both = sorted(found.keys() & targets.modules.keys())
    if both:
        raise UsageError(
            f"--target-modules {args.target_modules}: "
            f"{both[0]} is already fully trained by --train-embeddings; drop one of the two"
        )
    for name, module in found.items():
        dtype = dtype_name(module.weight.dtype)
        if dtype not in TRAINABLE:
            raise UsageError(f"--train-embeddings: {name} is quantised to {dtype}")


def check_adapter(model: nn.Module, saved: SavedAdapter, model_option: str = "--model") -> None:
    """Raise UsageError unless what the ``saved`` adapter replaces is the embeddings of ``model``.

    They must be tied as they are there. Their shapes are compared by `SavedAdapter.check_fit`.
    """
    found = find(model)
    names = saved.config.modules_to_save
    replaced = {name for name, _ in model.named_modules() if name.endswith(tuple(names))}  # PEFT's rule
    tied = bool(saved.config.ensure_weight_tying)
    if tied:
        replaced |= found.keys()
    if replaced != found.keys():
        raise saved.error(
            f"replaces whole modules, {', '.join(names)}, which are not the embeddings "
            f"of {model_option}, {' and '.join(found)}"
        )
    if tied != _is_tied(found):
        how = "tied" if tied else "not tied"
        raise saved.error(f"its embeddings are {how}, unlike those of {model_option}")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While this context is open, PEFT copies the embeddings of ``model`` in fp32, and loads them unrounded.

    Afterwards the frozen ones have their dtype again, and the copies compute in it, as the model does. The
    copies themselves stay fp32: most of a step would be lost in the rounding of a 16-bit weight.
    """
    found = find(model)
    dtypes = [module.weight.dtype for module in found.values()]
    for module in found.values():
        module.float()  # in place, so a tie holds
    yield
    for name, dtype in zip(found, dtypes, strict=True):
        if dtype != torch.float32:
            wrapper = model.get_submodule(name)
            wrapper.original_module.to(dtype)
            # A lookup has no autocast; without this line all layers would get fp32.
            wrapper.register_forward_hook(lambda module, args, output, dtype=dtype: output.to(dtype))
            wrapper.forward = torch.autocast(model.device.type, dtype)(wrapper.forward)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of trained embeddings, a tied one once."""
    found = []
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            found += module.modules_to_save.parameters()
    return list(dict.fromkeys(found))


def separate(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float, name: str) -> None:
    """Move the embeddings in ``optimizer`` to groups of their own, with learning rate ``rate``.

    Groups without parameters go (the Trainer makes one for biases): where an empty one is not the last,
    PyTorch 2.13 gives its settings to no group at all when it loads the sharded state of FSDP2.

    Raises UsageError, with its ``name``, if it does not have them in its groups.
    """
    wanted = set(trained(model))
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in wanted]
        if own:
            group["params"] = [parameter for parameter in group["params"] if parameter not in wanted]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
            wanted -= set(own)
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if wanted:
        raise UsageError(f"--optimizer {name}: cannot give embeddings a learning rate of their own")


def update(saved: SavedAdapter, base: nn.Module, dtype: str | None) -> dict[str, Tensor]:
    """What training has added to each embedding of the ``saved`` adapter, fp32 (vocabulary, hidden).

    ``dtype``: in which the run loaded its ``base``, whose rounding is no update. None: not known, so the base
    is taken in the dtype of the trained ones where that is of 16 bits (PEFT copies the base's).

    Raises UsageError if the embeddings of the base are others.
    """
    found = find(base)
    check_adapter(base, saved, f"its base {saved.config.base_model_name_or_path}")
    where = f"{saved.option} {saved.folder}"
    reading = explained(f"{where}: its embeddings cannot be read", (OSError, SafetensorError))
    with reading, safe_open(saved.folder / WEIGHTS, framework="pt") as file:
        weights = {name: file.get_tensor(f"base_model.model.{name}.weight") for name in found}
    updates = {}
    for name, weight in weights.items():
        start = found[name].weight.detach()
        if dtype is None and weight.dtype != torch.float32:
            start = start.to(weight.dtype)
        updates[name] = weight.float() - start.float()
    return updates


@torch.no_grad()
def add(model: PeftModel, updates: dict[str, Tensor]) -> None:
    """Make the trained embeddings of ``model`` its own plus ``updates`` (see `update`)."""
    for name, added in updates.items():
        wrapper = model.get_base_model().get_submodule(name)
        (copy,) = wrapper.modules_to_save.values()
        copy.weight.copy_(wrapper.original_module.weight.float() + added)
