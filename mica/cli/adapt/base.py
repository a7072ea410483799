"""The frozen base model of ``mica adapt``: dense or quantised, from a checkpoint or a GGUF file."""

import argparse
import os

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import is_bitsandbytes_available

from mica.cli.adapt import processes
from mica.cli.loading import Source, load_config, load_model, load_tokenizer
from mica.cli.output import dtype_name, first_sentences, write_folder
from mica.errors import UsageError
from mica.fast.loading import BASE as FOLDER
from mica.paths.products import has_native


def load(args: argparse.Namespace, source: Source, device: torch.device | None = None, tokenizer=None):
    """Return the base model on ``device`` (default: this process's), and quantised by ``--quantize``.

    ``tokenizer``: the source's, where it is at hand: to read one from a GGUF file takes seconds.

    A GGUF file is converted to OUTPUT/base first, once, by the main process, and loaded from there: what an
    adapter says about its base is one name, without the file in a folder, so that neither
    ``AutoPeftModelForCausalLM.from_pretrained(OUTPUT)`` nor ``pipeline(model=OUTPUT)`` could find a
    GGUF file. That name is an absolute path: once OUTPUT has been moved, `mica.fast` finds it there. The
    checkpoint that a GGUF file may name as its origin has other weights.

    All processes must call this. Nothing is computed or written before the checks of the configuration.

    Raises UsageError as `check`, if bitsandbytes does not run on ``device``, if OUTPUT/base cannot be
    written, and as `loading.load_model`.
    """
    device = device or PartialState().device
    config, dtype, quantization = check(args, source), args.dtype, None
    if args.quantize is not None:
        dtype = _compute_dtype(dtype, config, device)
        quantization = _quantization(args.quantize, getattr(torch, dtype))
    if source.is_gguf:
        processes.on_main(_convert, args, source, dtype, tokenizer)
        source = converted(args)
    try:
        model = load_model(source, dtype, device, quantization)
    except (ImportError, RuntimeError, NotImplementedError) as error:  # bitsandbytes does not run there
        if quantization is None or isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"not possible on {device}: {first_sentences(str(error))}"
        raise UsageError(f"--quantize {args.quantize}: {what}") from error
    _keep_from_repacking(model)
    return model


def check(args: argparse.Namespace, source: Source) -> PreTrainedConfig | None:
    """The base's configuration, None for GGUF; reads nothing else.

    Raises UsageError if the checkpoint is quantised and ``--quantize`` or ``--merge`` is given, or if
    bitsandbytes is missing.
    """
    config = None if source.is_gguf else load_config(source)
    quantize = f"--quantize {args.quantize}"
    if getattr(config, "quantization_config", None) is not None:
        if args.quantize is not None:
            raise UsageError(f"{quantize}: --model {source.given} is quantised already: leave --quantize out")
        if args.merge:
            raise UsageError(
                f"--merge: --model {source.given} is quantised, and a merged weight would have to be rounded "
                "to its few bits again: leave --merge out, or train on the checkpoint that it was made of, "
                "with --quantize nf4"
            )
    if args.quantize is not None and not is_bitsandbytes_available():
        raise UsageError(f"{quantize}: needs bitsandbytes and accelerate: pip install bitsandbytes")
    return config


def converted(args: argparse.Namespace) -> Source:
    """Where the checkpoint is that `load` has made of a GGUF file: OUTPUT/base, as an absolute path."""
    return Source(args.model, os.path.abspath(args.output / FOLDER), {"trust_remote_code": False})


def _compute_dtype(dtype: str, config, device: torch.device) -> str:
    """The name of the dtype in which quantised layers compute; "auto": as `suit_processor` has it."""
    if dtype != "auto":
        return dtype
    own = getattr(config, "dtype", None) or torch.float32
    return dtype_name(torch.float32 if device.type == "cpu" and not has_native(own) else own)


def _quantization(kind: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with quantised scales, as QLoRA (arXiv 2305.14314), or int8. The output layer stays as it is."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _keep_from_repacking(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, which breaks the training after it.

    On a CPU with AVX512-BF16 the first call in eval mode repacks a weight for good (bitsandbytes 0.50). From
    then on the layer passes no gradient on, in train mode too: after one evaluation the adapters below it
    would learn only what bypasses it. Layers without the flag are other versions', or on another device.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _convert(args: argparse.Namespace, source: Source, dtype: str, tokenizer) -> None:
    """Write OUTPUT/base: model and tokenizer of a GGUF file, dequantised, in the run's dtype."""
    if args.resume and (args.output / FOLDER).is_dir():
        return  # B belongs to the weights as they were converted
    model = load_model(source, dtype, torch.device("cpu"))
    tokenizer = tokenizer or load_tokenizer(source)

    def write(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder("--output", args.output / FOLDER, write)
