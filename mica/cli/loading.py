"""Loading of tokenizer and model from a Hub id, a folder or a GGUF file, with one-line errors."""

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import find_adapter_config_file

from mica.cli.extras import HOW_TO_INSTALL
from mica.cli.output import dtype_name, expanded, first_sentences, one_line, size_text, tell_once
from mica.errors import UsageError
from mica.paths import choose
from mica.paths.products import has_native

# Raised by from_pretrained for what the user gave: OSError for files that are missing, unreachable or not
# JSON, ValueError for contents that name no known architecture or that need custom code, RecursionError for
# JSON that is nested too deeply, StrictDataclassError for values of a wrong type.
_BAD_SOURCE = (OSError, ValueError, RecursionError, StrictDataclassError)
# Raised, and not explained, by the code of a model for values in config.json that it was not made for.
_BAD_CONFIG = (ArithmeticError, AttributeError, LookupError, TypeError)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: it is loaded by ``from_pretrained(location, **options)``.

    ``given``: its name as the user has written it. ``option``: what stands before that name in a message.
    """

    given: str
    location: str
    options: dict
    option: str = "--model "

    @property
    def is_gguf(self) -> bool:
        return "gguf_file" in self.options

    def error(self, reason: Exception | str) -> UsageError:
        """The error to raise for ``reason``; of a library's message only the first lines are kept."""
        message = str(reason)
        if "trust_remote_code" in message:
            message = "it contains custom code; pass --trust-remote-code to run it"
        elif "couldn't connect" in message:
            message = "no such folder, and the Hub cannot be reached: give a folder, or a model in its cache"
        return UsageError(f"{self.option}{self.given}: {first_sentences(message)}")


@contextmanager
def _explained_errors(source: Source) -> Iterator[None]:
    """Raise transformers' errors about what is in ``source`` as a UsageError.

    Not where code of the checkpoint's own has run: a bug in that keeps its traceback.
    """
    try:
        yield
    except SafetensorError as error:
        raise source.error(f"its weights cannot be read: {error}") from error
    except _BAD_SOURCE as error:
        raise source.error(error) from error
    except _BAD_CONFIG as error:
        if source.options.get("trust_remote_code"):
            raise
        raise source.error(
            "its configuration describes no model that transformers knows "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


def quieten_libraries() -> None:
    """Switch off the logs of libraries: retries and advice to programmers would hide a one-line error."""
    transformers.logging.set_verbosity_error()
    huggingface_hub.logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)


def find_source(model: str, trust_remote_code: bool, option: str = "--model ") -> Source:
    """Turn a name into a Source. Raises UsageError where the path alone shows that it cannot work."""
    # False and not None: with None transformers prompts whether to run the code.
    options = {"trust_remote_code": trust_remote_code}
    location = model
    path = expanded(model)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UsageError(f"{option}{model}: a file must end in .gguf; otherwise give the folder")
        if importlib.util.find_spec("gguf") is None:
            raise UsageError(f"{option}{model}: GGUF files need gguf: {HOW_TO_INSTALL}")
        options["gguf_file"] = path.name
        location = str(path.parent.absolute())
    elif path.is_dir():
        # Absolute: the adapter names this folder, and is loaded from other working directories too.
        location = str(path.absolute())
    # A Hub id is OWNER/NAME at most.
    elif model.endswith(".gguf") or model.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2:
        raise UsageError(f"{option}{model}: no such file or folder")
    return Source(model, location, options, option)


def note_hub(location: str) -> None:
    """Say that the Hub is asked: where it cannot be reached, that takes most of a minute."""
    if not os.path.isdir(location) and not huggingface_hub.constants.HF_HUB_OFFLINE:
        tell_once(f"mica: asking the Hugging Face Hub for {location}: there is no such folder")


def _note_gguf(source: Source) -> None:
    """Say that a GGUF file is read: until its weights are, transformers prints nothing, for seconds."""
    if source.is_gguf:
        tell_once(f"mica: reading {source.given}, whose tokenizer and weights are converted ...")


def _refuse_adapter(source: Source) -> None:
    """Raise UsageError if the source is a PEFT adapter, which transformers would load with its base."""
    if source.is_gguf:
        return
    note_hub(source.location)
    config_file = None
    base = None
    # What cannot be reached or read is reported when the model is loaded.
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        config_file = find_adapter_config_file(source.location)
        if config_file is not None:
            base = json.loads(Path(config_file).read_bytes()).get("base_model_name_or_path")
    if config_file is None:
        return
    of_what = f" for {base}" if base else ""
    raise source.error(f"is an adapter{of_what}, not a model: pass its base model or a merged model")


def load_tokenizer(source: Source):
    """Return the tokenizer, after the checks on the configuration that need no weights.

    Raises UsageError if the source cannot be loaded, needs custom code or is not a causal language model.
    """
    if not source.is_gguf:  # GGUF files name their architecture only; from_pretrained checks it
        config = load_config(source)
        has_own_class = "AutoModelForCausalLM" in getattr(config, "auto_map", {})
        is_causal = has_own_class or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        # BERT and the like are in the mapping too, as decoders, but a masked model sees what it predicts.
        is_masked = any(name.endswith("ForMaskedLM") for name in config.architectures or ())
        if is_masked or not is_causal:
            raise source.error(f"model type '{config.model_type}' is not a causal language model")
    _note_gguf(source)
    try:
        return AutoTokenizer.from_pretrained(source.location, **source.options)
    except _BAD_SOURCE as error:
        raise source.error(
            f"its tokenizer cannot be loaded, from tokenizer.json or tokenizer.model: {one_line(error)}"
        ) from error


def load_config(source: Source):
    """The configuration of a checkpoint other than GGUF; no weights are read.

    Raises UsageError if there is none, if it needs custom code, or for an adapter.
    """
    _refuse_adapter(source)
    folder = Path(source.location)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise source.error("is not a checkpoint: it has no config.json")
    with _explained_errors(source):
        return AutoConfig.from_pretrained(source.location, **source.options)


def load_model(source: Source, dtype: str, device: torch.device | None = None, quantization=None):
    """Return the causal language model on ``device`` (default: `find_device`).

    ``dtype``: "float32", ... or "auto", the dtype of the checkpoint (float32 for GGUF, whose weights are
    dequantised). Checkpoints other than GGUF must be safetensors: pickles are never opened.
    ``quantization``: a configuration of transformers by which the weights are quantised as they are read,
    on ``device``; not for GGUF.

    Raises UsageError if weights are missing, unreadable or those of another kind of model or of an adapter.
    """
    _refuse_adapter(source)
    _note_gguf(source)
    device = device or find_device()
    options = _loading_options(source, dtype, device, quantization)
    try:
        with _explained_errors(source):
            # Mismatched sizes are ignored here, and refused below: transformers names them in a log only.
            model, info = AutoModelForCausalLM.from_pretrained(
                source.location, **options, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except ImportError as error:
        if quantization is not None:  # a library that --quantize needs: the caller says how to install it
            raise
        raise source.error(error) from error  # one that the checkpoint's own quantisation needs

    for name, found, expected in sorted(info["mismatched_keys"]):
        raise source.error(
            "its configuration is not that of its weights: "
            f"{name} is {size_text(found)}, and {size_text(expected)} by the configuration"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise source.error(f"not a causal language model: it has no weights for {', '.join(missing[:3])}")

    quantizer = getattr(model, "hf_quantizer", None)
    if source.is_gguf and quantizer is not None:
        # Dense now, but still marked as quantised: the Trainer would refuse it, and so would the reader of
        # a merged model.
        quantizer.remove_quantization_config(model)
    if quantization is not None:  # it is there already, and bitsandbytes refuses to move 8-bit weights
        return model
    return model.to(device)


def _loading_options(source: Source, dtype: str, device: torch.device, quantization) -> dict:
    """The keywords of ``from_pretrained`` for the arguments of `load_model`."""
    if dtype == "auto" and source.is_gguf:
        dtype = "float32"
    options = {**source.options, "dtype": dtype}
    if dtype != "auto":
        options["dtype"] = getattr(torch, dtype)
    if quantization is not None:
        options["quantization_config"] = quantization
        options["device_map"] = {"": device}
    if not source.is_gguf:
        options["use_safetensors"] = True
    elif hasattr(transformers, "GgufConfig"):  # versions without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return options


def skeleton(source: Source, **options) -> nn.Module | None:
    """The model of `load_model` without weights, on the meta device: half a second for 80 layers of a 70B.

    ``options``: of ``from_config``. None where there is no way but to load it: for GGUF, whose configuration
    takes as long to read as a small model, and where its code does not run without weights.

    Raises UsageError as `load_config`.
    """
    if source.is_gguf:
        return None
    config = load_config(source)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **source.options, **options)
    except Exception:  # whatever custom code, or a missing library for it, may raise: loading says it
        return None


def find_device() -> torch.device:
    """This process's device among several processes; else the accelerator, or the CPU without one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from accelerate import PartialState  # in the extra `cli`: `mica inspect` works without it

        return PartialState().device
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def check_backend(rank: int) -> None:
    """Raise UsageError if ``MICA_BACKEND`` is invalid, or demands kernels that cannot run here."""
    try:
        choice = choose.choice_of("linear", find_device(), rank, (torch.float32,))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if choice.form == choose.ERROR:
        raise UsageError(str(choose.demand_error(choice)))


def suit_processor(model, dtype: str) -> str | None:
    """The line to print where the model is 16-bit on a CPU without such instructions, else None.

    ``dtype`` is what `load_model` got. "auto" becomes float32, in place; any other, and that of a quantised
    checkpoint, is kept, and the line says what it costs.
    """
    if model.device.type != "cpu" or has_native(model.dtype):
        return None
    name = dtype_name(model.dtype)
    cost = f"this processor has no {name} instructions, so matrix products take 10 to 400 times as long"

    if dtype != "auto":
        return f"--dtype {dtype}: {cost} (adapted layers compute in float32); --dtype float32 is faster"
    if getattr(model, "is_quantized", False):
        return f"the checkpoint is quantised and computes in {name}: {cost}"
    model.float()
    return f"float32 instead of the checkpoint's {name}: {cost}"


def check_limits(source: Source, model, sequence_length: int, largest_token_id: int = 0) -> None:
    """Raise UsageError if the model cannot take the tokens: blocks too long, tokenizer of another model.

    ``model`` may be a `skeleton`.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise UsageError(f"--sequence-length {sequence_length}: the model takes at most {longest} tokens")
    entries = model.get_input_embeddings().weight.shape[0]
    if largest_token_id >= entries:
        raise source.error(
            f"its tokenizer produces token {largest_token_id}, but its embedding has {entries} entries"
        )
