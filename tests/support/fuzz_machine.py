"""Random sequences of what people do with adapters, done to `Twins`: hypothesis draws, shrinks and replays them.

Every action ends with a comparison of all that both models hold, and mostly of an output and its gradients.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections import Counter
from pathlib import Path

import torch
from fuzz_models import KINDS, build, tokens
from fuzz_twins import Twins, factors, is_base, layers
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from peft import LoraConfig, PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import nn

import mica.fast
from mica.fast import mixed_batch

# Faults that are known and being mended: the machine goes around them. To be emptied.
KNOWN = {
    "in-place operations on an output",
    "groups and non-reentrant checkpointing",
    "followers are stale",
    "mixed batches by address",
    "undo survives uninstall",
    "copies of a merged model",
}

NAMES = ["one", "two", "three"]
LOOKS = st.sampled_from(["gradients", "gradients", "output", "nothing"])
INDEX = st.integers(0, 7)
SEEDS = st.integers(0, 99)

# rule -> how often it was tried, how often it did something: dead rules are seen
TALLY: dict[str, Counter] = {}


class _RaisedInForwardError(Exception):
    pass


def _raise(*args):
    raise _RaisedInForwardError


def _pass_on(module, args, output):
    """A hook that changes nothing; at module level, so that a model with it can be pickled."""


def action(**strategies):
    """A rule that is followed by the comparisons. It returns False if there was nothing to do."""

    def wrap(function):
        name = function.__name__
        TALLY[name] = Counter()

        def run(self, look, **drawn):
            TALLY[name]["tried"] += 1
            before = self.twins.fingerprint()
            done = function(self, **drawn)
            if done is not False:
                changed = done is True or self.twins.fingerprint() != before
                TALLY[name]["effective"] += changed
            self.twins.compare()
            if look != "nothing":
                self.twins.probe(look == "gradients")

        run.__name__ = name
        return rule(look=LOOKS, **strategies)(run)

    return wrap


@st.composite
def configs(draw, kind: str, rsLoRA=None):
    targets = draw(st.sampled_from(KINDS[kind].targets))
    embeds = any(name in ("embed", "embed_tokens", "wte", "shared") for name in targets)
    config = {
        "init_lora_weights": draw(st.sampled_from(["mica", "mica", "mica", "gaussian"])),
        "r": draw(st.sampled_from([1, 2, 3, 5])),
        "lora_alpha": draw(st.sampled_from([1, 4, 7])),
        "use_rslora": draw(st.booleans()),
        "target_modules": list(targets),
        "fan_in_fan_out": False,
        "lora_dropout": draw(st.sampled_from([0.0, 0.0, 0.0, 0.3])) if not embeds else 0.0,
    }
    if draw(st.booleans()):
        config["rank_pattern"] = {targets[-1]: draw(st.sampled_from([1, 4]))}
    if draw(st.booleans()):
        config["alpha_pattern"] = {targets[0]: draw(st.sampled_from([2, 9]))}
    return config


class Machine(RuleBasedStateMachine):
    """``KIND_NAMES`` and ``DTYPES`` are drawn from; `machine` makes variants."""

    KIND_NAMES = [name for name in KINDS if name != "small"]
    DTYPES = [torch.float32, torch.float32, torch.float32, torch.bfloat16]
    GROUPS: bool | str = "auto"

    def __init__(self):
        super().__init__()
        self.twins: Twins | None = None
        self.folder = tempfile.TemporaryDirectory()
        self.files: list[Path] = []
        self.hooks: list = []
        self.checkpointing: bool | None = None

    def teardown(self):
        mica.fast.enable()
        self.folder.cleanup()

    # ---------------------------------------------------------------------------------------------------
    # adapters
    # ---------------------------------------------------------------------------------------------------

    @initialize(data=st.data())
    def start(self, data):
        mica.fast.enable(group_projections=self.GROUPS)
        names = [
            name for name in self.KIND_NAMES if name != "inplace" or not self._knows("in-place operations")
        ]
        kind = data.draw(st.sampled_from(names))
        dtype = data.draw(st.sampled_from(self.DTYPES))
        self.twins = Twins(kind, dtype, data.draw(configs(kind)), cast=data.draw(st.booleans()))

    @property
    def _is_double(self) -> bool:
        return next(iter(self.twins.base.values())).dtype == torch.float64

    @staticmethod
    def _knows(words: str) -> bool:
        return any(words in fault for fault in KNOWN)

    def pick(self, index: int) -> str:
        adapters = self.twins.adapters
        return adapters[index % len(adapters)]

    def pick_layer(self, index: int) -> str:
        names = list(layers(self.twins.ours))
        return names[index * 5 % len(names)]

    def _add(self, name: str, config: dict, seed: int, cast: bool) -> None:
        if self._is_double:  # MiCA's SVD is refused there by stock
            config = {**config, "init_lora_weights": "gaussian"}
        outcome = self.twins.each(
            lambda model: model.add_adapter(name, LoraConfig(**config), autocast_adapter_dtype=cast)
        )
        if outcome.error is None:
            self.twins.adopt(name, config["init_lora_weights"] == "mica", seed)

    @precondition(lambda self: len(self.twins.adapters) < 3)
    @action(data=st.data(), seed=SEEDS, cast=st.booleans(), activate=st.booleans())
    def add(self, data, seed, cast, activate):
        name = next(name for name in NAMES if name not in self.twins.adapters)
        self._add(name, data.draw(configs(self.twins.kind)), seed, cast)
        if activate:
            self.twins.each(lambda model: model.set_adapter(name) and None)

    @precondition(lambda self: len(self.twins.adapters) < 3)
    @action(kind=st.sampled_from(["rank", "nan"]))
    def add_refused(self, kind):
        """Of a rank that no layer has: the backend leaves its model as it was (stock, half wrapped)."""
        name = next(name for name in NAMES if name not in self.twins.adapters)
        targets = KINDS[self.twins.kind].targets[0]
        config = LoraConfig(r=999, target_modules=targets, init_lora_weights="mica")
        before = self.twins.fingerprint()
        if not mica.fast.is_enabled():
            return False
        try:
            self.twins.ours.add_adapter(name, config)
        except ValueError:
            assert self.twins.fingerprint() == before, "a refused adapter has changed the model"
            return True
        raise AssertionError("rank 999 was not refused")

    @precondition(lambda self: len(self.twins.adapters) > 1)
    @action(index=INDEX)
    def delete(self, index):
        name = self.pick(index)
        self.twins.each(lambda model: model.delete_adapter(name))
        self._deleted()

    @precondition(lambda self: len(self.twins.adapters) > 1 and not self.twins.is_merged)
    @action(data=st.data(), index=INDEX, seed=SEEDS, activate=st.booleans())
    def delete_and_add_again(self, data, index, seed, activate):
        name, config = self.pick(index), data.draw(configs(self.twins.kind))
        self.twins.each(lambda model: model.delete_adapter(name))
        self._add(name, config, seed, True)
        if activate:
            self.twins.each(lambda model: model.set_adapter(name) and None)
        self._deleted()

    def _deleted(self):
        if self._knows("mixed batches by address"):
            mixed_batch.forget()

    @action(index=INDEX, inference=st.booleans())
    def switch(self, index, inference):
        self._repaired_if_edited()
        name = self.pick(index)
        self.twins.each(lambda model: model.set_adapter(name, inference_mode=inference))

    @precondition(lambda self: len(self.twins.adapters) > 1)
    @action(first=INDEX, second=INDEX)
    def activate_several(self, first, second):
        names = list(dict.fromkeys([self.pick(first), self.pick(second)]))
        self.twins.each(lambda model: model.base_model.set_adapter(names))

    @action(index=INDEX, on=st.booleans())
    def requires_grad_of_an_adapter(self, index, on):
        name = self.pick(index)
        self.twins.each(lambda model: model.set_requires_grad(name, on))

    @action(seed=SEEDS, index=INDEX)
    def new_values(self, seed, index):
        """As an optimiser or a checkpoint writes them, in place."""
        name = self.pick(index)
        generator = torch.Generator().manual_seed(seed)
        for layer in layers(self.twins.ours).values():
            pair = factors(layer, name)
            if pair is not None:
                with torch.no_grad():
                    pair[0].copy_(torch.randn(pair[0].shape, generator=generator) * 0.2)
        self._edited()
        self.twins.synchronise()

    def _edited(self):
        self.twins.edited |= self.twins.is_merged

    def _repaired_if_edited(self):
        """Stock unmerges by the adapter's present values: both are unmerged first, and the twin put right."""
        if self.twins.edited:
            self.twins.each(lambda model: model.unmerge_adapter())
            self.twins.synchronise()

    # ---------------------------------------------------------------------------------------------------
    # scaling
    # ---------------------------------------------------------------------------------------------------

    @action(index=INDEX, layer=INDEX, factor=st.sampled_from([0.5, 2.0, 1.0, 3]), everywhere=st.booleans())
    def set_scale(self, index, layer, factor, everywhere):
        name, only = self.pick(index), self.pick_layer(layer)
        self._scale(lambda module: module.set_scale(name, factor), None if everywhere else only)

    @action(layer=INDEX, factor=st.sampled_from([0.5, 2.0, 0.25]), everywhere=st.booleans())
    def scale_layer(self, layer, factor, everywhere):
        only = self.pick_layer(layer)
        assume(max((max(m.scaling.values(), default=0) for m in layers(self.twins.ours).values())) < 20)
        self._scale(lambda module: module.scale_layer(factor), None if everywhere else only)

    @action(layer=INDEX, factor=st.sampled_from([None, 2.0]), everywhere=st.booleans())
    def unscale_layer(self, layer, factor, everywhere):
        only = self.pick_layer(layer)
        self._scale(lambda module: module.unscale_layer(factor), None if everywhere else only)

    def _scale(self, change, only):
        def everywhere(model):
            for name, module in layers(model).items():
                if only in (None, name):
                    change(module)

        self.twins.each(everywhere)
        self._edited()

    # ---------------------------------------------------------------------------------------------------
    # calls
    # ---------------------------------------------------------------------------------------------------

    @action(size=st.integers(1, 3), length=st.integers(1, 7))
    def forward(self, size, length):
        self.twins.probe(False, size, length)
        return True

    @action(
        rate=st.sampled_from([0.1, 0.5]), way=st.sampled_from(["plain", "twice", "retained", "accumulated"])
    )
    def train_step(self, rate, way):
        if way == "retained" and self._checkpoints_groups():
            return False
        ids = [tokens(2, 6, self.twins.seed), tokens(3, 4, self.twins.seed + 1)]

        def step(model):
            model.zero_grad(set_to_none=True)
            out = self.twins.call(model, ids[0])
            if not out.requires_grad:
                return out.detach(), {}
            loss = out.float().square().mean()
            if way == "twice":
                loss = loss + self.twins.call(model, ids[1]).float().square().mean()
            if way == "retained":
                loss.backward(retain_graph=True)
                loss = out.float().abs().mean()
            loss.backward()
            if way == "accumulated":
                self.twins.call(model, ids[1]).float().square().mean().backward()
            return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        trained = []

        def update(model):
            parameters = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
            norm = torch.stack([p.grad.double().norm() for _, p in parameters]).norm() if parameters else 0
            with torch.no_grad():
                for name, parameter in parameters:
                    trained.append(name)
                    parameter.sub_((parameter.grad * (rate / (norm + 1e-6))).to(parameter.dtype))
            model.zero_grad(set_to_none=True)

        worked = self.twins.compare_steps(step)
        if self.twins.has_dropout or not worked:
            self.twins.each(lambda model: model.zero_grad(set_to_none=True))
            return bool(worked) and None
        self.twins.each(update)
        self._trained(trained)
        return bool(trained)

    def _trained(self, names):
        if any(is_base(name) for name in names):
            self.twins.edited |= self.twins.is_merged
            self.twins.exact &= not self.twins.is_merged
            self.twins.remember_base()
        if any("_B" in name for name in names):
            self.twins.remember_B()
            self._edited()

    def _checkpoints_groups(self) -> bool:
        return (
            self._knows("groups and non-reentrant")
            and self.checkpointing is False
            and mica.fast.settings.settings.group_projections is True
        )

    @precondition(lambda self: self.twins.form != "seq2seq")
    @action(seed=SEEDS, twice=st.booleans())
    def gradient_of_the_input(self, seed, twice):
        width = self.twins.ours.get_input_embeddings().weight.shape[1] if self.twins.form == "causal" else 12
        x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed))
        x = x.to(next(p for n, p in self.twins.ours.named_parameters() if is_base(n)).dtype)
        twice = twice and self.checkpointing is None and self.twins.tolerance < 1e-4

        def step(model):
            leaf = x.clone().requires_grad_()
            out = self.twins.call(model, None, inputs_embeds=leaf)
            (grad,) = torch.autograd.grad(out.float().square().mean(), leaf, create_graph=twice)
            if not twice:
                return out.detach(), {"x": grad}
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            found = (
                torch.autograd.grad(grad.square().sum(), trained.values(), allow_unused=True)
                if trained
                else ()
            )
            second = {f"second {n}": g for n, g in zip(trained, found, strict=True) if g is not None}
            return out.detach(), {"x": grad, **second} if second else {"x": grad.detach()}

        return self.twins.compare_steps(step)

    @precondition(lambda self: self.twins.form != "plain")
    @action(seed=SEEDS, cache=st.booleans())
    def generate(self, seed, cache):
        ids = tokens(2, 3, seed)

        def generated(model):
            with self.twins.casting():
                out = model.generate(
                    input_ids=ids,
                    max_new_tokens=3,
                    min_new_tokens=3,
                    do_sample=False,
                    use_cache=cache,
                    output_scores=True,
                    return_dict_in_generate=True,
                    pad_token_id=0,
                )
            return out.scores[0].float() if self.twins.has_dropout is False else None, out.sequences

        texts = {}

        def first_scores(model):
            scores, texts[model is self.twins.ours] = generated(model)
            return scores

        worked = self.twins.each(first_scores).error is None
        if worked and not self.twins.has_dropout and self.twins.tolerance < 1e-4:
            assert torch.equal(texts[True], texts[False]), f"generated {texts}"
        return worked

    @precondition(lambda self: len(self.twins.adapters) > 1)
    @action(names=st.lists(st.integers(-1, 2), min_size=2, max_size=4), seed=SEEDS)
    def mixed_batch(self, names, seed):
        names = ["__base__" if index < 0 else self.pick(index) for index in names]
        ids = tokens(len(names), 4, seed)
        outcome = self.twins.each(lambda model: self.twins.call(model, ids, adapter_names=names).detach())
        return outcome.error is None

    @action(seed=SEEDS)
    def inference_mode(self, seed):
        def inferred(model):
            with torch.inference_mode():
                return self.twins.call(model, tokens(2, 4, seed)).clone()

        if self.twins.has_dropout:
            return False
        return self.twins.each(inferred).error is None

    @action(layer=INDEX, before=st.booleans())
    def exception_in_a_forward(self, layer, before):
        name = self.pick_layer(layer)

        def failing(model):
            module = model.get_submodule(name)
            hook = (
                module.register_forward_pre_hook(_raise) if before else module.register_forward_hook(_raise)
            )
            try:
                self.twins.call(model, tokens(2, 4, 0))
            finally:
                hook.remove()

        return type(self.twins.each(failing).error) is _RaisedInForwardError

    @action(seed=SEEDS)
    def exception_in_a_backward(self, seed):
        def failing(model):
            out = self.twins.call(model, tokens(2, 4, seed))
            if out.requires_grad:
                out.register_hook(_raise)
                try:
                    out.float().sum().backward()
                finally:
                    model.zero_grad(set_to_none=True)

        return self.twins.each(failing).error is not None

    # ---------------------------------------------------------------------------------------------------
    # merging
    # ---------------------------------------------------------------------------------------------------

    @action(index=INDEX, safe=st.booleans(), named=st.booleans())
    def merge(self, index, safe, named):
        names = [self.pick(index)] if named else None
        self.twins.each(lambda model: model.merge_adapter(adapter_names=names, safe_merge=safe))
        self._merged()

    def _merged(self):
        """Exact where the backend has merged, and MiCA adapters only."""
        for layer in layers(self.twins.ours).values():
            plain = any(name not in layer.lora_variant for name in layer.merged_adapters)
            plain |= bool(layer.merged_adapters) and not mica.fast.is_enabled()
            self.twins.exact &= not plain
            self.twins.is_plain |= plain

    @precondition(lambda self: self.twins.is_merged)
    @action()
    def unmerge(self):
        self.twins.each(lambda model: model.unmerge_adapter())

    @action(safe=st.booleans(), keep=st.booleans())
    def merge_and_unload_a_copy(self, safe, keep):
        if self.twins.is_merged and self._knows("copies of a merged model"):
            return False
        ids = tokens(2, 4, 1)

        def unloaded(model):
            model = copy.deepcopy(model)
            model = model.unload() if keep else model.merge_and_unload(safe_merge=safe)
            with torch.no_grad():
                return self.twins.call(model.eval(), ids), dict(model.state_dict())

        return self.twins.each(unloaded).error is None

    @action(index=INDEX, factor=st.sampled_from(["A", "B"]))
    def merge_that_is_refused(self, index, factor):
        """NaN in an adapter: safe_merge raises on both, and both go on."""
        name, key = self.pick_layer(index), self.pick(index)
        for model in (self.twins.ours, self.twins.stock):
            pair = factors(model.get_submodule(name), key)
            if pair is None or self.twins.is_merged:
                return False
        kept = []
        for model in (self.twins.ours, self.twins.stock):
            A = factors(model.get_submodule(name), key)[0]
            kept.append((A, A.detach().clone()))
            A.data[0, 0] = float("nan")
        outcome = self.twins.each(lambda model: model.merge_adapter(adapter_names=[key], safe_merge=True))
        for A, before in kept:
            A.data.copy_(before)
        self._merged()
        return outcome.error is not None

    @action(context=st.booleans(), on=st.booleans())
    def disable_adapters(self, context, on):
        self._repaired_if_edited()
        if context:

            def without(model):
                with model.disable_adapter(), torch.no_grad():
                    return self.twins.call(model, tokens(2, 4, 5))

            return self.twins.each(without).error is None
        self.twins.each(
            lambda model: (
                model.base_model.enable_adapter_layers() if on else model.base_model.disable_adapter_layers()
            )
        )
        return None

    # ---------------------------------------------------------------------------------------------------
    # files and copies
    # ---------------------------------------------------------------------------------------------------

    @action(index=INDEX)
    def save(self, index):
        name = self.pick(index)
        folders = iter((f"{len(self.files)}", f"{len(self.files)}-stock"))

        def saved(model):
            folder = Path(self.folder.name) / next(folders)
            model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
            return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))

        outcome = self.twins.each(saved)
        if outcome.error is None:
            folder = Path(self.folder.name) / str(len(self.files))
            self.files.append(folder / name if (folder / name).exists() else folder)
        return outcome.error is None

    @precondition(lambda self: self.files and len(self.twins.adapters) < 3)
    @action(
        index=INDEX, lean=st.booleans(), trainable=st.booleans(), cast=st.booleans(), activate=st.booleans()
    )
    def load(self, index, lean, trainable, cast, activate):
        folder = self.files[index % len(self.files)]
        name = next(name for name in NAMES if name not in self.twins.adapters)
        self._load(folder, name, lean, trainable, cast)
        if activate and name in self.twins.adapters:
            self.twins.each(lambda model: model.set_adapter(name) and None)

    @precondition(lambda self: self.files and len(self.twins.adapters) > 1 and not self.twins.is_merged)
    @action(index=INDEX, file=INDEX, lean=st.booleans())
    def delete_and_load_again(self, index, file, lean):
        name = self.pick(index)
        self.twins.each(lambda model: model.delete_adapter(name))
        self._load(self.files[file % len(self.files)], name, lean, False, True)
        self._deleted()

    def _load(self, folder, name, lean, trainable, cast):
        assume(not self._is_double)
        outcome = self.twins.each(
            lambda model: (
                model.load_adapter(
                    str(folder),
                    name,
                    is_trainable=trainable,
                    low_cpu_mem_usage=lean,
                    autocast_adapter_dtype=cast,
                )
                and None
            )
        )
        if outcome.error is None:
            config = self.twins.ours.peft_config[name]
            self._compare_factors(name)
            self.twins.adopt(name, config.init_lora_weights == "mica", 0, randomise=False)

    def _compare_factors(self, name):
        """Before the twin takes over what was loaded."""
        twins = layers(self.twins.stock)
        for key, layer in layers(self.twins.ours).items():
            ours, stock = factors(layer, name), factors(twins[key], name)
            if ours is not None:
                self.twins._same([f.detach() for f in ours], [f.detach() for f in stock], key)

    @precondition(lambda self: self.files and not self.twins.is_merged)
    @action(index=INDEX, lean=st.booleans(), trainable=st.booleans())
    def from_pretrained(self, index, lean, trainable):
        """Both models anew, from the base and one file."""
        assume(not self._is_double)
        folder = str(self.files[index % len(self.files)])
        base = {name: tensor.clone() for name, tensor in self.twins.pristine.state_dict().items()}

        def loaded(model):
            fresh = build(self.twins.kind).to(next(iter(base.values())).dtype)
            fresh.load_state_dict(base)
            return PeftModel.from_pretrained(
                fresh, folder, "one", low_cpu_mem_usage=lean, is_trainable=trainable
            )

        self.twins.replace(loaded)
        self._renewed()
        self._compare_factors("one")
        self.twins.adopt("one", self.twins.ours.peft_config["one"].init_lora_weights == "mica", 0, False)

    def _renewed(self):
        self.hooks.clear()
        self.checkpointing = None
        self.twins.base = {}
        self.twins.frozen = {}

    @precondition(lambda self: self.files)
    @action(index=INDEX, file=INDEX)
    def hotswap(self, index, file):
        name, folder = self.pick(index), str(self.files[file % len(self.files)])
        outcome = self.twins.each(lambda model: hotswap_adapter(model, folder, name))
        self._compare_factors(name)
        self.twins.remember_B(name)
        return outcome.error is None

    @precondition(lambda self: 1 < len(self.twins.adapters) < 3)
    @action(
        combination=st.sampled_from(
            ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune", "ties_svd"]
        ),
        weights=st.sampled_from([(0.7, 0.5), (1.0, -0.4)]),
        activate=st.booleans(),
    )
    def add_weighted_adapter(self, combination, weights, activate):
        sources = self.twins.adapters
        assume(not self._is_double)
        name = next(name for name in NAMES if name not in sources)
        density = {} if combination in ("linear", "cat", "svd") else {"density": 0.6}
        outcome = self.twins.each(
            lambda model: model.add_weighted_adapter(sources, list(weights), name, combination, **density)
        )
        if outcome.error is None:
            self._compare_factors(name)
            self.twins.adopt(name, False, 0, randomise=False)
            if activate:
                self.twins.each(lambda model: model.set_adapter(name) and None)
        elif name in self.twins.adapters:  # refused after it was created
            self.twins.each(lambda model: model.delete_adapter(name))
        return outcome.error is None

    @action(way=st.sampled_from(["deepcopy", "pickle", "state_dict"]))
    def copies(self, way):
        if self.twins.is_merged and self._knows("copies of a merged model"):
            return False
        if way == "state_dict":
            self.twins.each(lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())) and None)
            return True
        if way == "pickle" and self.checkpointing is not None:
            return False  # transformers' own hook cannot be pickled
        self.twins.replace(copy.deepcopy if way == "deepcopy" else _through_a_file)
        self.hooks = [_Handle(model, key) for model, key in self._hooked()]
        return True

    def _hooked(self):
        for model in (self.twins.ours, self.twins.stock):
            for module in model.modules():
                for key, hook in module._forward_hooks.items():
                    if hook is _pass_on:
                        yield module, key

    # ---------------------------------------------------------------------------------------------------
    # modes
    # ---------------------------------------------------------------------------------------------------

    @action(on=st.booleans())
    def training(self, on):
        self.twins.each(lambda model: model.train(on) and None)

    @action(dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    def to_dtype(self, dtype):
        assume(not self.twins.is_merged)
        self.twins.each(lambda model: model.to(dtype) and None)
        self.twins.pristine.to(dtype)
        self.twins.remember_base()
        self.twins.remember_B()

    @action(which=st.sampled_from(["nothing", "everything", "one base layer", "active"]), layer=INDEX)
    def requires_grad(self, which, layer):
        name = self.pick_layer(layer)

        def flags(model):
            if which == "everything":
                model.requires_grad_(True)
            elif which == "one base layer":
                model.get_submodule(name).get_base_layer().requires_grad_(True)
            else:
                model.requires_grad_(False)
                if which == "active":
                    for module in layers(model).values():
                        module.set_adapter(module.active_adapters)

        self.twins.each(flags)

    @action(dtype=st.sampled_from([None, torch.bfloat16, torch.bfloat16, torch.float16]))
    def autocast(self, dtype):
        self.twins.autocast = dtype

    @action(reentrant=st.sampled_from([None, True, False]))
    def checkpoint(self, reentrant):
        grouping = mica.fast.settings.settings.group_projections is True
        if reentrant is False and grouping and self._knows("groups and non-reentrant"):
            return False

        def set_it(model):
            if self.twins.form == "plain":
                model.base_model.model.reentrant = reentrant
            elif reentrant is None:
                model.gradient_checkpointing_disable()
                model.disable_input_require_grads() if self.checkpointing is not None else None
            else:
                model.enable_input_require_grads() if self.checkpointing is None else None
                model.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": reentrant}
                )

        self.twins.each(set_it)
        self.checkpointing = reentrant
        return True

    @action(where=st.sampled_from(["base", "layer", "A"]), layer=INDEX)
    def hook(self, where, layer):
        """One that does nothing, so that the base layer is called, or the layer is PEFT's; it stays."""
        if self.hooks:
            for handle in self.hooks:
                handle.remove()
            self.hooks = []
            return True
        name = self.pick_layer(layer)
        for model in (self.twins.ours, self.twins.stock):
            module = model.get_submodule(name)
            if where == "base":
                module = module.get_base_layer()
            elif where == "A":
                module = next(iter(module.lora_A.values()), module)
            self.hooks.append(module.register_forward_hook(_pass_on))
        return True

    @action(what=st.sampled_from(["groups", "no groups", "fp32", "off", "on", "uninstall"]))
    def setting(self, what):
        if what in ("off", "on"):
            mica.fast.disable() if what == "off" else mica.fast.enable()
        elif what == "uninstall":
            if self.twins.is_merged and self._knows("undo survives"):
                return False
            mica.fast.uninstall()
            self.twins.probe(True)
            mica.fast.enable()
        elif what == "fp32":
            mica.fast.enable(compute_dtype=torch.float32)
        else:
            if what == "groups" and self.checkpointing is False and self._knows("groups and non-reentrant"):
                return False
            mica.fast.enable(group_projections=what == "groups")
        return None


class _Handle:
    """A hook that a copy has inherited."""

    def __init__(self, module: nn.Module, key: int):
        self.module, self.key = module, key

    def remove(self):
        self.module._forward_hooks.pop(self.key, None)


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def machine(name: str, **attributes) -> type[Machine]:
    """A variant: other kinds, dtypes, groups from the start."""
    return type(name, (Machine,), attributes)


def tally() -> str:
    rows = [f"{'action':32} {'tried':>6} {'effective':>9}"]
    rows += [f"{name:32} {count['tried']:6} {count['effective']:9}" for name, count in sorted(TALLY.items())]
    return "\n".join(rows)
