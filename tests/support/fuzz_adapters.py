"""Rules of `fuzz_machine`: adapters are added, switched, deleted, scaled and edited."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import precondition
from peft import LoraConfig

import mica.fast
from tests.support.fuzz_actions import INDEX, SEEDS, Base, action, configs
from tests.support.fuzz_compare import attempt
from tests.support.fuzz_models import KINDS, targeting
from tests.support.fuzz_twins import factors, layers
from tests.support.peft_versions import is_at_least


class Adapters(Base):
    @precondition(lambda self: len(self.twins.adapters) < 3)
    @action(data=st.data(), seed=SEEDS, cast=st.booleans(), activate=st.booleans())
    def add(self, data, seed, cast, activate):
        name = self.free_name()
        self.create(name, data.draw(configs(self.twins.kind, self.saves)), seed, cast)
        self.activate(name, activate)

    @precondition(lambda self: len(self.twins.adapters) < 3)
    @action(kind=st.sampled_from(["rank", "nan"]))
    def add_refused(self, kind):
        """Of a rank that no layer has: the backend leaves its model as it was (stock, half wrapped)."""
        targets = KINDS[self.twins.kind].targets[0]
        config = LoraConfig(r=999, **targeting(targets), init_lora_weights="mica")
        before = self.twins.fingerprint()
        if not mica.fast.is_enabled():
            return False
        error = attempt(lambda model: model.add_adapter(self.free_name(), config), self.twins.ours).error
        assert isinstance(error, ValueError), "rank 999 was not refused"
        assert self.twins.fingerprint() == before, "a refused adapter has changed the model"
        return True

    @precondition(lambda self: len(self.twins.adapters) > 1)
    @action(index=INDEX)
    def delete(self, index):
        name = self.pick(index)
        if not is_at_least("0.21") and self.twins.is_merged_adapter(name):
            return False  # it is not refused there, and leaves the update in the weights for good
        return self.remove(name)

    @precondition(lambda self: len(self.twins.adapters) > 1 and not self.twins.is_merged)
    @action(data=st.data(), index=INDEX, seed=SEEDS, activate=st.booleans())
    def delete_and_add_again(self, data, index, seed, activate):
        name, config = self.pick(index), data.draw(configs(self.twins.kind, self.saves))
        self.remove(name)
        self.create(name, config, seed, True)
        self.activate(name, activate)

    @action(index=INDEX, inference=st.booleans())
    def switch(self, index, inference):
        self.repaired_if_edited()
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
        self.edited()
        self.twins.synchronise()

    # ---------------------------------------------------------------------------------------------------
    # scaling
    # ---------------------------------------------------------------------------------------------------

    @action(index=INDEX, layer=INDEX, factor=st.sampled_from([0.5, 2.0, 1.0, 3]), everywhere=st.booleans())
    def set_scale(self, index, layer, factor, everywhere):
        name = self.pick(index)
        self._scale(lambda module: module.set_scale(name, factor), layer, everywhere)

    @action(layer=INDEX, factor=st.sampled_from([0.5, 2.0, 0.25]), everywhere=st.booleans())
    def scale_layer(self, layer, factor, everywhere):
        assume(max(max(m.scaling.values(), default=0) for m in layers(self.twins.ours).values()) < 20)
        self._scale(lambda module: module.scale_layer(factor), layer, everywhere)

    @action(layer=INDEX, factor=st.sampled_from([None, 2.0]), everywhere=st.booleans())
    def unscale_layer(self, layer, factor, everywhere):
        self._scale(lambda module: module.unscale_layer(factor), layer, everywhere)

    def _scale(self, change, layer, everywhere):
        chosen = list(layers(self.twins.ours)) if everywhere else [self.pick_layer(layer)]

        def scaled(model):
            for name in chosen:
                change(model.get_submodule(name))

        self.twins.each(scaled)
        self.edited()
