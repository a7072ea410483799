"""Rules of `machine`: adapters are added, switched, scaled, edited, saved, loaded, combined, copied."""

import copy
import io

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import precondition
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

import mica.fast
from tests.fuzz.actions import FLAG, INDEX, SEEDS, Base, action, any_of, configs
from tests.fuzz.compare import attempt
from tests.fuzz.models import build
from tests.fuzz.twins import factors, layers
from tests.support.peft_versions import is_at_least


def _through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


where_there_are_several = precondition(lambda self: len(self.twins.adapters) > 1)


class Adapters(Base):
    @precondition(lambda self: len(self.twins.adapters) < 3)
    @action(data=st.data(), seed=SEEDS, cast=FLAG, activate=FLAG)
    def add(self, data, seed, cast, activate):
        name = self.free_name()
        self.create(name, data.draw(configs(self.twins.kind, self.saves)), seed, cast)
        self.activate(name, activate)

    @where_there_are_several
    @action(index=INDEX)
    def delete(self, index):
        name = self.pick(index)
        if not is_at_least("0.21") and self.twins.is_merged_adapter(name):
            return  # it is not refused there, and leaves the update in the weights for good
        self.remove(name)

    @action(index=INDEX, inference=FLAG)
    def switch(self, index, inference):
        self.repaired_if_edited()
        name = self.pick(index)
        self.twins.each(lambda model: model.set_adapter(name, inference_mode=inference))

    @where_there_are_several
    @action(first=INDEX, second=INDEX)
    def activate_several(self, first, second):
        names = list(dict.fromkeys([self.pick(first), self.pick(second)]))
        self.twins.each(lambda model: model.base_model.set_adapter(names))

    @action(index=INDEX, on=FLAG)
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
        self.edited()
        self.twins.synchronise()

    # -- scaling --------------------------------------------------------------------------------------

    @action(index=INDEX, layer=INDEX, factor=any_of(0.5, 2.0, 1.0, 3), everywhere=FLAG)
    def set_scale(self, index, layer, factor, everywhere):
        name = self.pick(index)
        self._scale(lambda module: module.set_scale(name, factor), layer, everywhere)

    @action(layer=INDEX, factor=any_of(0.5, 2.0, 0.25), everywhere=FLAG)
    def scale_layer(self, layer, factor, everywhere):
        assume(max(max(m.scaling.values(), default=0) for m in layers(self.twins.ours).values()) < 20)
        self._scale(lambda module: module.scale_layer(factor), layer, everywhere)

    @action(layer=INDEX, factor=any_of(None, 2.0), everywhere=FLAG)
    def unscale_layer(self, layer, factor, everywhere):
        self._scale(lambda module: module.unscale_layer(factor), layer, everywhere)

    def _scale(self, change, layer, everywhere):
        chosen = list(layers(self.twins.ours)) if everywhere else [self.pick_layer(layer)]

        def scaled(model):
            for name in chosen:
                change(model.get_submodule(name))

        self.twins.each(scaled)
        self.edited()

    # -- files, hotswapping, weighted adapters, copies ------------------------------------------------

    @action(index=INDEX, flipped=FLAG)
    def save(self, index, flipped):
        self.write(self.pick(index), flipped)

    @precondition(lambda self: self.files and len(self.twins.adapters) < 3)
    @action(index=INDEX, lean=FLAG, trainable=FLAG, cast=FLAG, activate=FLAG)
    def load(self, index, lean, trainable, cast, activate):
        name = self.free_name()
        self._load(self.files[index % len(self.files)], name, lean, trainable, cast)
        self.activate(name, activate and name in self.twins.adapters)

    def _load(self, folder, name, lean, trainable, cast):
        assume(not self.is_double)
        options = {"low_cpu_mem_usage": lean, "is_trainable": trainable, "autocast_adapter_dtype": cast}
        if (
            self.twins.each(lambda model: model.load_adapter(str(folder), name, **options) and None).error
            is None
        ):
            config = self.twins.ours.peft_config[name]
            self._compare_factors(name)
            self.twins.adopt(name, config.init_lora_weights == "mica", 0, randomise=False)
            self.twins.remember_biases()
        else:
            self.refused()

    def _compare_factors(self, name):
        """Before the twin takes over what was loaded."""
        twins = layers(self.twins.stock)
        for key, layer in layers(self.twins.ours).items():
            ours, stock = factors(layer, name), factors(twins[key], name)
            if ours is not None:
                self.twins.same([f.detach() for f in ours], [f.detach() for f in stock], key)

    @precondition(lambda self: self.files and not self.twins.is_merged)
    @action(index=INDEX, lean=FLAG, trainable=FLAG)
    def from_pretrained(self, index, lean, trainable):
        """Both models anew, from the base and one file."""
        assume(not self.is_double)
        folder = str(self.files[index % len(self.files)])
        base = {name: tensor.clone() for name, tensor in self.twins.pristine.state_dict().items()}

        def loaded(model):
            fresh = build(self.twins.kind).to(next(iter(base.values())).dtype)
            fresh.load_state_dict(base)
            options = {"low_cpu_mem_usage": lean, "is_trainable": trainable}
            return PeftModel.from_pretrained(fresh, folder, "one", **options)

        if not self.twins.replace(loaded):
            return
        self._renewed()
        self._compare_factors("one")
        self.twins.adopt("one", self.twins.ours.peft_config["one"].init_lora_weights == "mica", 0, False)

    def _renewed(self):
        self.hooks.clear()
        self.optimizers.clear()
        self.checkpointing = None
        self.twins.base, self.twins.frozen = {}, {}

    @precondition(lambda self: self.files)
    @action(index=INDEX, file=INDEX)
    def hotswap(self, index, file):
        name, folder = self.pick(index), self.files[file % len(self.files)]
        if self._lacks_a_magnitude(name, folder):
            assume(mica.fast.is_enabled())
            outcome = attempt(lambda model: hotswap_adapter(model, str(folder), name), self.twins.ours)
            assert type(outcome.error) is ValueError, outcome
            return
        outcome = self.twins.each(lambda model: hotswap_adapter(model, str(folder), name))
        if outcome.error is None and self.twins.is_merged_adapter(name):
            self.edited()  # PEFT before 0.21 does not refuse it
        self._compare_factors(name)
        self.twins.remember_bases(name)
        self.twins.remember_biases()

    def _lacks_a_magnitude(self, name, folder):
        given = load_file(folder / "adapter_model.safetensors")
        own = [key for key in self.twins.ours.state_dict() if f".lora_magnitude_vector.{name}." in key]
        return any(key.removesuffix(f".{name}.weight") not in given for key in own)

    @action(way=any_of("deepcopy", "pickle", "state_dict"))
    def copies(self, way):
        if way == "state_dict":
            self.twins.each(lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())) and None)
            return
        self.twins.replace(copy.deepcopy if way == "deepcopy" else _through_a_file)
        self.optimizers.clear()
        if way == "pickle" and self.twins.is_merged:  # it has no records
            self.twins.exact, self.twins.is_lost = False, True
        self.find_hooks()
