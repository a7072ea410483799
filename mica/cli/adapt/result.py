"""What a run leaves behind: the adapter with its tokenizer, and the merged model."""

import shutil
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import mica.fast
from mica.cli.adapt import checkpoints, embeddings
from mica.cli.adapt.folder import MERGED
from mica.cli.adapt.saved_adapter import WEIGHTS
from mica.cli.loading import Source, load_model
from mica.cli.output import SCRATCH, dtype_name, fill_folder, one_line, write_folder
from mica.cli.record import Record
from mica.errors import UsageError


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
    if not _is_sharded(model):
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
            full = weight
            if isinstance(weight, DTensor):
                full = weight.full_tensor()
            whole[weight] = full.detach().cpu()
        state[name.replace("_checkpoint_wrapped_module.", "")] = whole[weight]
    return state


def _is_sharded(model: nn.Module) -> bool:
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def merge(model: PeftModel, tokenizer, args: Namespace) -> mica.fast.MergeReport:
    """Write OUTPUT/merged: the model with the adapter merged, in the run's dtype. Changes ``model``.

    On the main process, after `save`. A base that is quantised (``--quantize``) or sharded is loaded again
    from where it came from, on the CPU: the device still holds the model that was trained. An update that was
    trained for quantised weights is then merged into the weights before quantisation, as usual for QLoRA.

    Raises UsageError if the folder cannot be written, or the merged weights are not finite; everything that
    was written before is kept.
    """
    folder = args.output / MERGED
    option = f"--merge {folder}"
    kept = f"; the adapter is in {args.output}"
    if getattr(model, "is_quantized", False) or _is_sharded(model):
        model = _on_dense_base(model, args)
    merged, report = merged_model(model, option, kept)
    parts = (merged.save_pretrained, tokenizer.save_pretrained)
    write_folder("--merge", folder, *parts, record=Record(args.output), kept=kept)
    return report


def _on_dense_base(model: PeftModel, args: Namespace) -> PeftModel:
    """The adapter in ``args.output`` on the base as it is stored, in the dtype of ``model``, on the CPU."""
    base = model.get_base_model()
    source = Source(args.model, base.name_or_path, {"trust_remote_code": args.trust_remote_code})
    dense = load_model(source, dtype_name(base.dtype), torch.device("cpu"))
    return PeftModel.from_pretrained(dense, args.output)


def merged_model(model: PeftModel, option: str, kept: str = "") -> tuple[nn.Module, mica.fast.MergeReport]:
    """The plain model with the adapter merged into its weights, in place, and a report of lost updates.

    Raises UsageError if the merge is refused, as where a merged weight is not finite; ``option`` begins its
    message and ``kept`` ends it.
    """
    embeddings.round_to_base(model)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UsageError(f"{option}: {one_line(error)}{kept}") from error
    return merged, mica.fast.merge_report(merged)
