"""What the rules of `machine` share: how an action is followed by the comparisons.

Every action ends with a comparison of all that both models hold, and mostly of an output and its gradients.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from peft.tuners.lora.variants import MiCALinearVariant
from safetensors.torch import load_file, save_file

import mica.fast
from mica.fast.merge import merging
from tests.fuzz.compare import Outcome, dtype_of_base
from tests.fuzz.models import KINDS, MIXTURES, targeting
from tests.fuzz.twins import Twins, layers

NAMES = ["one", "two", "three"]
FLAG = st.booleans()


def any_of(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


LOOKS = any_of("gradients", "gradients", "output", "nothing")
INDEX = st.integers(0, 7)
SEEDS = st.integers(0, 99)


def pass_on(module, args, output):
    """A hook that changes nothing; at module level, so that a model with it can be pickled."""


def action(**strategies):
    """A rule that is followed by the comparisons."""

    def wrap(function):
        def run(self, look, **drawn):
            function(self, **drawn)
            self.twins.compare()
            if look != "nothing":
                self.twins.probe(look == "gradients")

        run.__name__ = function.__name__
        return rule(look=LOOKS, **strategies)(run)

    return wrap


@st.composite
def configs(draw, kind: str, saves: bool = False):
    """``saves``: a whole layer may be trained, so none that adapters target."""
    saved = KINDS[kind].saved
    targets = [name for name in draw(st.sampled_from(KINDS[kind].targets)) if not (saves and name == saved)]
    embeds = any(name in ("embed", "embed_tokens", "wte", "shared") for name in targets)
    mixture = kind in MIXTURES
    config = {
        "init_lora_weights": draw(any_of("mica", "mica", "gaussian")),
        "r": draw(any_of(1, 2, 3, 5)),
        "lora_alpha": draw(any_of(1, 4, 7)),
        "use_rslora": draw(FLAG),
        **targeting(targets),
        "fan_in_fan_out": False,
        "lora_dropout": draw(any_of(0.0, 0.0, 0.0, 0.3)) if not embeds and not mixture else 0.0,
    }
    if config["init_lora_weights"] == "gaussian" and not embeds and not mixture:
        config["use_dora"] = draw(FLAG)
    if draw(FLAG):
        config["rank_pattern"] = {targets[-1]: draw(any_of(1, 4))}
    if saves and draw(FLAG):
        config["modules_to_save"] = [saved]
    if draw(FLAG):
        config["alpha_pattern"] = {targets[0]: draw(any_of(2, 9))}
    return config


class Base(RuleBasedStateMachine):
    """The twins, and what the rules share. ``KIND_NAMES`` are drawn from."""

    KIND_NAMES: Sequence[str] = tuple(KINDS)

    def __init__(self):
        super().__init__()
        self.twins: Twins | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.files: list[Path] = []
        self.hooks: list[tuple[torch.nn.Module, int]] = []  # those of `pass_on`
        self.saves = False  # whether adapters may have ``modules_to_save``
        self.checkpointing: bool | None = None
        self.optimizers: dict[int, torch.optim.Optimizer] = {}  # of the ids of the two models

    def teardown(self):
        mica.fast.enable(lora=False, compute_dtype=None)
        self.folder.cleanup()

    @initialize(data=st.data())
    def start(self, data):
        mica.fast.enable(lora=data.draw(any_of(False, True, True)), compute_dtype=None)
        kind = data.draw(st.sampled_from(self.KIND_NAMES))
        dtype = data.draw(any_of(*[torch.float32] * 3, torch.bfloat16))
        self.saves = data.draw(any_of(False, False, False, True))
        config = data.draw(configs(kind, self.saves))
        config["bias"] = data.draw(st.sampled_from(["none"] * 4 + ["lora_only", "all"]))
        cast, inference = data.draw(FLAG), data.draw(st.sampled_from([False] * 6 + [True]))
        inference &= kind == "llama"  # stock can adapt no embedding and no Conv1D there
        if inference:  # nor train anything of the base
            config, self.saves = {**config, "bias": "none", "modules_to_save": None}, False
        self.twins = Twins(kind, dtype, config, cast, inference)
        self.write("one")
        if data.draw(FLAG):
            self.create("two", data.draw(configs(kind, self.saves)), 4, data.draw(FLAG))

    def create(self, name: str, config: dict, seed: int, cast: bool) -> None:
        if self.is_double:  # MiCA's SVD is refused there by stock
            config = {**config, "init_lora_weights": "gaussian"}
        ours, stock = self.twins.configs(config)

        def added(model):
            chosen = ours if model is self.twins.ours else stock
            model.add_adapter(name, chosen, autocast_adapter_dtype=cast)

        before = None if mica.fast.is_enabled() else copy.deepcopy(self.twins.ours)
        if self.cast_each(added).error is None:
            self.twins.adopt(name, config["init_lora_weights"] == "mica", seed)
            return
        if before is not None:  # stock has left it half wrapped, with another B of that name
            self.twins.ours = before
        self.refused()

    def activate(self, name: str, wanted: bool = True) -> None:
        if wanted:
            self.twins.each(lambda model: model.set_adapter(name) and None)

    def cast_each(self, act) -> Outcome:
        """`Twins.each` within autocast, where that is on."""

        def cast(model):
            with self.twins.casting():
                return act(model)

        return self.twins.each(cast)

    def remove(self, name: str) -> None:
        """Without an active adapter PEFT refuses every new one where there are ``modules_to_save``."""
        self.twins.each(lambda model: model.delete_adapter(name))
        if self.saves and not self.twins.ours.active_adapters:
            self.activate(self.twins.adapters[0])

    def refused(self) -> None:
        """An adapter that both refuse leaves stock's model half wrapped: the twin is made anew."""
        self.optimizers.clear()
        self.twins.stock = copy.deepcopy(self.twins.ours)
        for layer in layers(self.twins.stock).values():
            vars(layer).pop(merging.RECORDS, None)
        self.find_hooks()

    def find_hooks(self) -> None:
        """Those that copies have inherited."""
        modules = [module for model in self.twins.both for module in model.modules()]
        hooks = [(module, key, hook) for module in modules for key, hook in module._forward_hooks.items()]
        self.hooks = [(module, key) for module, key, hook in hooks if hook is pass_on]

    def write(self, name: str, flipped: bool = False) -> bool:
        """A file of an adapter, by both; that of the backend's model is kept for loading.

        ``flipped``: with -B in the file, so that two adapters of one rank need not have one B.
        """
        folders = iter((f"{len(self.files)}", f"{len(self.files)}-stock"))

        def saved(model):
            folder = Path(self.folder.name) / next(folders)
            model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
            return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))

        if self.twins.each(saved).error is not None:
            return False
        self.files.append(Path(self.folder.name) / str(len(self.files)) / name)
        if flipped:
            file = self.files[-1] / "adapter_model.safetensors"
            tensors = load_file(file)
            save_file({key: -t if "_B" in key else t for key, t in tensors.items()}, file)
        return True

    def free_name(self) -> str:
        return next(name for name in NAMES if name not in self.twins.adapters)

    @property
    def is_double(self) -> bool:
        return dtype_of_base(self.twins.ours) == torch.float64

    def pick(self, index: int) -> str:
        adapters = self.twins.adapters
        return adapters[index % len(adapters)]

    def pick_layer(self, index: int) -> str:
        names = list(layers(self.twins.ours))
        return names[index * 5 % len(names)]

    def edited(self):
        self.twins.edited |= self.twins.is_merged

    def base_edited(self):
        """Weights of the base have other values: what unmerging gives is unknown where they were merged."""
        if self.twins.is_merged:
            self.twins.edited, self.twins.exact, self.twins.is_lost = True, False, True
        else:
            self.twins.remember_base()

    def repaired_if_edited(self):
        """Stock unmerges by the adapter's present values: both are unmerged first, and the twin put right."""
        if self.twins.edited:
            self.twins.each(lambda model: model.unmerge_adapter())
            self.twins.synchronise()

    def merged(self):
        """Exact where the backend has merged, and MiCA adapters only."""
        for layer in layers(self.twins.ours).values():
            variants = [layer.lora_variant.get(name) for name in layer.merged_adapters]
            plain = any(not isinstance(variant, MiCALinearVariant) for variant in variants)
            plain |= bool(layer.merged_adapters) and not mica.fast.is_enabled()
            self.twins.exact &= not plain
            self.twins.is_lost |= plain
