"""The frozen base model of ``mica adapt``: dense or quantised, from a checkpoint or a GGUF file."""

import argparse
import os
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import is_bitsandbytes_available

from mica.cli import record
from mica.cli.adapt import processes
from mica.cli.adapt.folder import BASE as FOLDER
from mica.cli.loading import Source, load_config, load_model, load_tokenizer
from mica.cli.output import PARTIAL, beside, dtype_name, fill_folder, first_sentences
from mica.errors import UsageError
from mica.paths.products import has_native

_CARD = "Converted by mica adapt from a GGUF file.\n"


def load(args: argparse.Namespace, source: Source, device: torch.device | None = None, tokenizer=None):
    """Return the base model on ``device`` (default: this process's), and quantised by ``--quantize``.

    ``tokenizer``: the source's, where it is at hand: to read one from a GGUF file takes seconds.

    A GGUF file is converted first, once, by the main process, beside OUTPUT/base, which `folder.begin` makes
    of it, and loaded from there. The model has the name OUTPUT/base already: what an
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
            dtype = _own_dtype(config, device)
        quantization = _quantization(args.quantize, dtype)

    name = None
    if source.is_gguf:
        processes.on_main(_convert, args, source, dtype, tokenizer)
        name = converted(args).location
        source = Source(args.model, place_of(name), {"trust_remote_code": False})
    try:
        model = load_model(source, dtype, device, quantization)
    except (ImportError, RuntimeError, NotImplementedError) as error:  # bitsandbytes does not run there
        if quantization is None or isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"not possible on {device}: {first_sentences(str(error))}"
        raise UsageError(f"--quantize {args.quantize}: {what}") from error
    if name is not None:
        model.name_or_path = name
        model.config.name_or_path = name
    # On a CPU with AVX512-BF16 the first call in eval mode repacks a 4-bit weight for good (bitsandbytes
    # 0.50). From then on the layer passes no gradient on, in train mode too: after one evaluation the
    # adapters below it would learn only what bypasses it.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _own_dtype(config: PreTrainedConfig | None, device: torch.device) -> str:
    """What ``--dtype auto`` means for a quantised base: as `loading.suit_processor` has it for others."""
    dtype = getattr(config, "dtype", None) or torch.float32
    if device.type == "cpu" and not has_native(dtype):
        dtype = torch.float32
    return dtype_name(dtype)


def _quantization(kind: str, dtype: str) -> BitsAndBytesConfig:
    """The configuration for ``--quantize``, which computes in ``dtype``."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(  # with quantised scales, as QLoRA (arXiv 2305.14314)
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def check(args: argparse.Namespace, source: Source) -> PreTrainedConfig | None:
    """The base's configuration, None for GGUF; reads nothing else.

    Raises UsageError if the checkpoint is quantised and ``--quantize`` or ``--merge`` is given, or if
    bitsandbytes is missing.
    """
    config = None
    if not source.is_gguf:
        config = load_config(source)
    if getattr(config, "quantization_config", None) is not None:
        given = f"--model {source.given} is quantised"
        if args.quantize is not None:
            raise UsageError(f"--quantize {args.quantize}: {given} already: leave --quantize out")
        if args.merge:
            instead = "leave --merge out, or train on the checkpoint it was made from, with --quantize"
            raise UsageError(f"--merge: {given}, and a merged weight cannot be re-quantised: {instead}")
    if args.quantize is not None and not is_bitsandbytes_available():
        needs = "needs bitsandbytes and accelerate: pip install bitsandbytes"
        raise UsageError(f"--quantize {args.quantize}: {needs}")
    return config


def converted(args: argparse.Namespace) -> Source:
    """Where the checkpoint of a run is that was made of a GGUF file: OUTPUT/base, as an absolute path."""
    return Source(args.model, os.path.abspath(args.output / FOLDER), {"trust_remote_code": False})


def place_of(name: str) -> str:
    """Where the base called ``name`` is: there, or beside it, where a run that has not begun has made it."""
    path = Path(name)
    if not path.name:  # a model without a name, or the working directory
        return name
    scratch = beside(path, PARTIAL)
    if scratch.is_dir():
        return str(scratch)
    return name


def _convert(args: argparse.Namespace, source: Source, dtype: str, tokenizer) -> None:
    """Write what is going to be OUTPUT/base: model and tokenizer of a GGUF file, in the run's dtype."""
    if args.resume and (args.output / FOLDER).is_dir():
        return  # B belongs to the weights as they were converted
    model = load_model(source, dtype, torch.device("cpu"))
    if tokenizer is None:
        tokenizer = load_tokenizer(source)
    record.claim(args.output, FOLDER, begun=False)
    scratch = fill_folder("--output", args.output / FOLDER, model, tokenizer, card=_CARD)
    record.completed(args.output, FOLDER, scratch)
