"""The frozen base model of ``mica adapt``: dense or quantised, from a checkpoint or a GGUF file."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedConfig
from transformers.utils import is_bitsandbytes_available

from mica.cli.adapt import fingerprint, processes
from mica.cli.adapt.folder import BASE as FOLDER
from mica.cli.adapt.folder import MARKER, SUMMARY, read_object
from mica.cli.folder import is_unfinished
from mica.cli.loading import Source, load_config, load_model, load_tokenizer
from mica.cli.output import dtype_name, first_sentences, write_folder
from mica.cli.quantising import of_bits
from mica.cli.record import Record
from mica.errors import UsageError
from mica.paths.products import has_native

BITS = {"nf4": 4, "int8": 8}  # by --quantize
_CARD = "Converted by mica adapt from a GGUF file.\n"


def load(args: Namespace, source: Source, device: torch.device | None = None, tokenizer=None):
    """Return the base model on ``device`` (default: this process's), and quantised by ``--quantize``.

    ``tokenizer``: the source's, where it is at hand: to read one from a GGUF file takes seconds.

    A GGUF file is converted first, once, by the main process, to OUTPUT/base, and loaded from there: what an
    adapter says about its base is one name, without the file in a folder, so that neither
    ``AutoPeftModelForCausalLM.from_pretrained(OUTPUT)`` nor ``pipeline(model=OUTPUT)`` could find a
    GGUF file. That name is an absolute path: once OUTPUT has been moved, `mica.fast` finds it there. The
    checkpoint that a GGUF file may name as its origin has other weights.

    All processes must call this. Nothing is computed or written before the checks of the configuration.

    Raises UsageError as `check`, if bitsandbytes does not run on ``device``, if OUTPUT/base cannot be
    written, and as `loading.load_model`.
    """
    device = device or PartialState().device
    config = check(args, source)
    dtype = args.dtype
    quantization = None
    if args.quantize is not None:
        if dtype == "auto":
            dtype = own_dtype(config, device)
        quantization = of_bits(BITS[args.quantize], getattr(torch, dtype))

    if source.is_gguf:
        processes.on_main(_convert, args, source, dtype, tokenizer)
        location = os.path.abspath(args.output / FOLDER)
        source = Source(args.model, location, {"trust_remote_code": False})
    try:
        model = load_model(source, dtype, device, quantization)
    except (ImportError, RuntimeError, NotImplementedError) as error:  # bitsandbytes does not run there
        if quantization is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UsageError(
            f"--quantize {args.quantize}: not possible on {device}: {first_sentences(str(error))}"
        ) from error
    # On a CPU with AVX512-BF16 the first call in eval mode repacks a 4-bit weight for good (bitsandbytes
    # 0.50). From then on the layer passes no gradient on, in train mode too: after one evaluation the
    # adapters below it would learn only what bypasses it.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def own_dtype(config: PreTrainedConfig | None, device: torch.device) -> str:
    """What ``--dtype auto`` means, where the checkpoint is not quantised.

    For weights that are not quantised either `loading.suit_processor` does the same.
    """
    dtype = getattr(config, "dtype", None) or torch.float32
    if device.type == "cpu" and not has_native(dtype):
        dtype = torch.float32
    return dtype_name(dtype)


def check(args: Namespace, source: Source) -> PreTrainedConfig | None:
    """The base's configuration, None for GGUF; reads nothing else.

    Raises UsageError if ``--quantize`` is given and the checkpoint is quantised, bitsandbytes missing, or the
    method not possible over such weights.
    """
    config = None if source.is_gguf else load_config(source)
    if args.quantize is None:
        return config
    what = None
    if getattr(config, "quantization_config", None) is not None:
        what = f"--model {source.given} is quantised already: leave --quantize out"
    elif not is_bitsandbytes_available():
        what = "needs bitsandbytes and accelerate: pip install bitsandbytes"
    elif args.quantize == "int8" and args.method == "dora" and processes.use_cpu():
        what = "PEFT's DoRA loses the scales of 8-bit weights on a CPU: use nf4"
    if what is not None:
        raise UsageError(f"--quantize {args.quantize}: {what}")
    return config


def facts(model: PeftModel, earlier: Path | None) -> dict[str, str | None]:
    """What a run records of its base, as JSON: a hash of its weights, its model type and its dtype.

    ``base_dtype`` is the one in which trained embeddings began, so that of ``earlier``, the adapter that the
    run goes on from, if that says it. Before the model is sharded.
    """
    base = model.get_base_model()
    embedding = base.get_input_embeddings()
    embedding = getattr(embedding, "original_module", embedding)  # the one that is not trained
    dtype = dtype_name(embedding.weight.dtype)
    if earlier is not None:
        dtype = read_facts(earlier).get("base_dtype")
    return {
        fingerprint.BASE: fingerprint.of(base.name_or_path),
        "base_dtype": dtype,
        "model_type": base.config.model_type,
    }


def read_facts(folder: Path) -> dict[str, Any]:
    """What `facts` recorded for the adapter in ``folder``, in summary.json or in a checkpoint's marker.

    Empty where there is neither: PEFT has written the adapter, or its files were copied without them.
    """
    for name in (SUMMARY, MARKER):
        found = read_object(folder / name)
        if found is not None:
            return found
    return {}


def is_trained_on(folder: Path, location: str) -> bool | None:
    """Whether the weights at ``location`` are those that the adapter in ``folder`` was trained on.

    None where that cannot be said: they are not here, or it is not recorded.
    """
    expected = read_facts(folder).get(fingerprint.BASE)
    found = fingerprint.of(location)
    if expected is None or found is None:
        return None
    return found == expected


def _convert(args: Namespace, source: Source, dtype: str, tokenizer) -> None:
    """Write OUTPUT/base: model and tokenizer of a GGUF file, in the run's dtype."""
    folder = args.output / FOLDER
    if folder.is_dir() and args.resume and not is_unfinished(folder):
        return  # B belongs to the weights as they were converted
    record = Record(args.output)
    record.remove(record.below(folder))  # of a first command that was killed
    model = load_model(source, dtype, torch.device("cpu"))
    if tokenizer is None:
        tokenizer = load_tokenizer(source)
    write_folder(folder, model.save_pretrained, tokenizer.save_pretrained, record=record, card=_CARD)
