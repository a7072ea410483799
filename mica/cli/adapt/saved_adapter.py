"""A MiCA, LoRA or DoRA adapter in a folder: what its files say of it, before PEFT loads it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

import mica.fast  # noqa: F401 (reads the configuration of an adapter of experts as MiCA's)
from mica.cli.output import explained, size_text
from mica.cli.targets import features, saved_parameters
from mica.errors import UsageError
from mica.fast.forward.eligibility import requests_mica

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
# Weights beside A and B that PEFT makes for a setting: what is in their names -> the setting
_MADE_FOR = {
    ".lora_magnitude_vector": "use_dora",
    ".lora_B.bias": "lora_bias",
    ".token_adapter.": "trainable_token_indices",
}
_EDITED = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, re.error)
# Ways to begin that leave the base as it is; others (PiSSA, OLoRA, CorDA, ...) train over changed weights.
_STARTS = (True, False, "gaussian", "orthogonal")
# What makes LoRA something else than s·B·A beside a weight
_CHANGES = (
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in ``folder``, which ``option`` of the command line names; see `read`.

    ``layers``: what it has weights for: name -> (out_features, rows of A, in_features). An embedding has
    (embedding_dim, rows of A, num_embeddings). Several parameters of one module have its name, and once or
    more ".base_layer". ``others``: its other weights, name -> shape, like those of modules saved whole.
    """

    folder: Path
    option: str
    config: LoraConfig
    layers: dict[str, tuple[int, int, int]]
    others: dict[str, tuple[int, ...]]

    def error(self, what: str) -> UsageError:
        """The error to raise for ``what`` is wrong with it."""
        return UsageError(f"{self.option} {self.folder}: {what}")

    @property
    def method(self) -> str:
        """Its name in `mica.cli.adapt.methods`."""
        if requests_mica(self.config):
            return "mica"
        return "dora" if self.config.use_dora else "lora"

    @property
    def stacks(self) -> set[str]:
        """Those of its layers that are stacks of experts: A has the rows of all of them."""
        return {name for name, (_, rows, _) in self.layers.items() if rows > self.config.r}

    def settings(self) -> dict[str, object]:
        """The options that the adapter fixes.

        ``method``: str. ``rank``, ``alpha``: int. ``target_modules``: names with commas; where PEFT got a
        pattern, the layers themselves. ``experts``: True if it has stacks of experts, else None;
        ``train_embeddings``: likewise. ``dropout``: float, a proposal.

        Raises UsageError if ranks or alphas differ between layers, or alpha is no whole number: no option
        says that.
        """
        config = self.config
        if config.rank_pattern or config.alpha_pattern:
            raise self.error("its layers have different ranks or alphas, which is not supported")
        if config.lora_alpha % 1:
            raise self.error(f"lora_alpha is {config.lora_alpha:g}, which must be a whole number")

        layers = self.layers.keys() - self.stacks
        parameters = []  # those that are no stacks
        for parameter in config.target_parameters or ():
            module = parameter.rpartition(".")[0]
            holders = {name for name in layers if f".{name}".endswith(f".{module}")}
            if holders:
                parameters.append(parameter)
                layers -= holders
        modules = config.target_modules if isinstance(config.target_modules, set) else layers
        return {
            "method": self.method,
            "rank": config.r,
            "alpha": int(config.lora_alpha),
            "target_modules": ",".join(sorted([*modules, *parameters])),
            "experts": True if self.stacks else None,
            "train_embeddings": True if config.modules_to_save else None,
            "dropout": config.lora_dropout,
        }

    def check_fit(self, model: nn.Module, model_option: str = "--model") -> None:
        """Raise UsageError unless the adapter and ``model`` belong together; needs no weights of either.

        All that the adapter has must be in the model, in the same shape and with as many experts, and all
        that its configuration adapts there must be in the adapter: PEFT ignores the one, and leaves the
        other without an update. The message names the first difference and counts them.
        """
        differences = [*self._misfits(model, model_option), *self._lacking(model, model_option)]
        if differences:
            count = f" ({len(differences)} such differences)" if len(differences) > 1 else ""
            raise self.error(f"{differences[0]}{count}")

    def _misfits(self, model: nn.Module, model_option: str) -> Iterator[str]:
        """What the adapter has and ``model`` lacks, or has in another shape: a phrase for each."""
        modules = dict(model.named_modules())
        parameters = saved_parameters(model, self.config.target_parameters or ())
        for name, (out_features, rows, in_features) in self.layers.items():
            shape = (out_features, in_features)
            what = "a layer"
            if name in parameters:
                parameter, found = parameters[name]
                what = "a parameter"
                ranks = self.config.rank_pattern or {}
                experts = rows // ranks.get(get_pattern_key(ranks.keys(), parameter), self.config.r)
                if len(found) == 3 or experts > 1:
                    shape = (experts, *shape)
            elif name in modules:
                found = features(modules[name])
            else:
                yield f"adapts {name}, which {model_option} does not have"
                continue
            if found != shape:
                if found is None:
                    has = f"it is a {type(modules[name]).__name__}"
                else:
                    has = f"it has {size_text(found)}"
                yield f"adapts {name} as {what} of {size_text(shape)}, but in {model_option} {has}"

        weights = model.state_dict()
        for name, shape in self.others.items():
            if any(part in name and getattr(self.config, setting) for part, setting in _MADE_FOR.items()):
                continue
            weight = weights.get(name.replace(".base_layer.", "."))
            if weight is None:
                yield f"has {name}, which {model_option} does not have"
            elif weight.shape != shape:
                has = f"in {model_option} it has {size_text(weight.shape)}"
                yield f"has {name} of {size_text(shape)}, but {has}"

    def _lacking(self, model: nn.Module, model_option: str) -> Iterator[str]:
        """What the configuration adapts in ``model`` and the adapter lacks: a phrase for each."""
        expected = [*saved_parameters(model, self.config.target_parameters or ())]
        with explained(f"PEFT cannot load the adapter in {self.folder}", _EDITED):
            names = [name for name, _ in model.named_modules() if name]
            expected += [name for name in names if check_target_module_exists(self.config, name)]
        for name in expected:
            if name not in self.layers:
                yield f"has no weights for {name}, which {CONFIG} adapts in {model_option}"

    def load(self, model: nn.Module, is_trainable: bool = False) -> PeftModel:
        """``model`` with the adapter.

        Raises UsageError if PEFT cannot load it: its files may have been edited.
        """
        with explained(f"PEFT cannot load the adapter in {self.folder}", _EDITED):
            return PeftModel.from_pretrained(
                model, self.folder, config=self.config, is_trainable=is_trainable
            )


def read(folder: Path, option: str = "--adapter") -> SavedAdapter:
    """The adapter in ``folder``; of its weights only the header is read.

    Raises UsageError, naming ``option``, if ``folder`` is not the folder of an adapter, the adapter no plain
    MiCA, LoRA or DoRA over its base, or a file of it damaged or incomplete.
    """
    where = f"{option} {folder}"
    if folder.is_file():
        raise UsageError(f"{where}: is a file; give the folder of the adapter")
    if not folder.is_dir():
        raise UsageError(f"{where}: no such folder")
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{where}: is not a PEFT adapter folder (no {CONFIG})")
    with explained(f"{where}: {CONFIG} is not the configuration of a PEFT adapter"):
        config = PeftConfig.from_pretrained(folder)
        kind = config.peft_type.value

    found = _what_else(config, kind)
    if found is not None:
        raise UsageError(f"{where}: must be a plain MiCA, LoRA or DoRA adapter, but is {found}")
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{where}: has no {WEIGHTS}")
    for name in ("r", "lora_alpha"):
        value = getattr(config, name)
        if not isinstance(value, int | float) or value <= 0:
            raise UsageError(f"{where}: {CONFIG}: {name} must be a number above 0, not {value!r:.80}")
    return SavedAdapter(folder, option, config, *_shapes(folder / WEIGHTS, where))


def _what_else(config: PeftConfig, kind: str) -> str | None:
    """What an adapter is that is none of the methods; None for one of them."""
    if kind != "LORA":
        return kind
    if not requests_mica(config) and config.init_lora_weights not in _STARTS:
        return f"LoRA with init_lora_weights={config.init_lora_weights!r}"
    if config.bias != "none":
        return f"LoRA with bias={config.bias!r}"
    changes = [name for name in _CHANGES if getattr(config, name, None)]
    return f"LoRA with {changes[0]}" if changes else None


def _shapes(file: Path, where: str) -> tuple[dict[str, tuple[int, int, int]], dict[str, tuple[int, ...]]]:
    """`SavedAdapter.layers` and ``others``.

    Raises UsageError if the file cannot be read, or a layer lacks A or B.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # layer -> "lora_A", "lora_B" -> shape
    others = {}
    reading = explained(f"{where}: {WEIGHTS} cannot be read", (OSError, SafetensorError))
    with reading, safe_open(file, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
            shape = tuple(weights.get_slice(key).get_shape())
            name = key.removeprefix("base_model.model.")
            layer, _, factor = name.removesuffix(".weight").rpartition(".")
            factor = factor.replace("lora_embedding_", "lora_")
            if factor in ("lora_A", "lora_B"):
                shapes.setdefault(layer, {})[factor] = shape
            else:
                others[name] = shape
    if not shapes:
        raise UsageError(f"{where}: {WEIGHTS} is incomplete: it has no layer of an adapter")
    for name in sorted(shapes):
        if len(shapes[name]) < 2:
            raise UsageError(f"{where}: {WEIGHTS} is incomplete: {name} has only A or only B")
    layers = {name: (found["lora_B"][0], *found["lora_A"]) for name, found in shapes.items()}
    return layers, others
