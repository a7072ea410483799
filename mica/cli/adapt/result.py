"""What a run leaves behind: the adapter with its tokenizer."""

import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mica.cli.adapt import checkpoints
from mica.cli.adapt.saved_adapter import WEIGHTS
from mica.cli.output import SCRATCH, fill_folder
from mica.cli.record import Record


def save(model: PeftModel, tokenizer, output: Path, checkpoint: Path | None = None) -> None:
    """Write the adapter and its tokenizer, if not None, to ``output``; PEFT's blank model card is left out.

    With ``checkpoint`` the weights are those in it; ``model`` gets them too, unless it is sharded.

    All processes must call this: a sharded adapter (FSDP2) is gathered. What else is in ``output`` stays.

    Raises UsageError if the files cannot be written.
    """
    with checkpoints.written(output, "the adapter"):
        state = gathered(model)
        if not PartialState().is_main_process:
            return
        if checkpoint is not None and state is None:
            model.load_adapter(checkpoint, model.active_adapter, is_trainable=True)

        def save_adapter(folder: Path) -> None:
            write_adapter(model, folder, state)
            if checkpoint is not None:
                shutil.copyfile(checkpoint / WEIGHTS, folder / WEIGHTS)
            (folder / "README.md").unlink(missing_ok=True)

        parts = [save_adapter]
        if tokenizer is not None:
            parts.append(tokenizer.save_pretrained)
        fill_folder(output, *parts, record=Record(output), scratch_name=f".adapter{SCRATCH}")


def write_adapter(model: PeftModel, folder: Path, state: dict[str, torch.Tensor] | None) -> None:
    """Write the adapter alone; ``state``: what `gathered` returned for it."""
    # No base embeddings: nothing resized them. "auto", the default, would look for the base's config.json.
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=state)


def gathered(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The adapter's weights by name, whole and on the CPU, if they are sharded; a collective.

    None if nothing is sharded: PEFT takes them from the model. A tied weight is gathered once, and is there
    under each of its names: PEFT looks for all of them.
    """
    if not any(isinstance(weight, DTensor) for weight in model.parameters()):
        return None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward without a backward, as in an evaluation, leaves the output layer whole. What is read
            # then is FSDP's own memory, which is freed as soon as PEFT asks the layer for its names.
            module.reshard()
    state = {}
    whole = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if not weight.requires_grad and "lora_" not in name:
            continue
        if weight not in whole:
            full = weight.full_tensor() if isinstance(weight, DTensor) else weight
            whole[weight] = full.detach().cpu()
        state[name.replace("_checkpoint_wrapped_module.", "")] = whole[weight]
    return state
