"""Rules of `fuzz_machine`: forwards, training, exceptions, merging."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition

from tests.support.fuzz_actions import INDEX, SEEDS, Base, RaisedInForwardError, action, do_raise
from tests.support.fuzz_models import tokens
from tests.support.fuzz_twins import factors, is_base, layers


class Calls(Base):
    @action(size=st.integers(0, 3), length=st.integers(1, 7))
    def forward(self, size, length):
        self.twins.probe(False, size, length)
        return True

    @action(
        rate=st.sampled_from([0.1, 0.5]),
        way=st.sampled_from(["plain", "twice", "retained", "accumulated", "adamw"]),
    )
    def train_step(self, rate, way):
        ids = [tokens(2, 6, self.twins.seed), tokens(3, 4, self.twins.seed + 1)]

        def step(model):
            model.zero_grad(set_to_none=True)
            out = self.twins.call(model, ids[0])
            if not out.requires_grad:
                return out.detach(), {}
            loss = out.float().square().sum()
            if way == "twice":
                loss = loss + self.twins.call(model, ids[1]).float().square().sum()
            if way == "retained":
                loss.backward(retain_graph=True)
                loss = out.float().abs().mean()
            loss.backward()
            if way == "accumulated":
                self.twins.call(model, ids[1]).float().square().sum().backward()
            return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

        trained, gradients = [], {}

        def take_over_gradients(model):
            """They have been compared: rounding must not grow in the steps of an optimizer."""
            for name, parameter in model.named_parameters():
                if parameter.grad is not None and model is self.twins.stock:
                    parameter.grad.copy_(gradients[name])
                elif parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()

        def update(model):
            take_over_gradients(model)
            parameters = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
            norm = torch.stack([p.grad.double().norm() for _, p in parameters]).norm() if parameters else 0
            with torch.no_grad():
                for name, parameter in parameters:
                    trained.append(name)
                    parameter.sub_((parameter.grad * (rate / (norm + 1e-6))).to(parameter.dtype))
            model.zero_grad(set_to_none=True)

        def step_of_adamw(model):
            """Its state outlives the actions."""
            take_over_gradients(model)
            optimizer = self.optimizers.get(id(model))
            if optimizer is None:
                parameters = [p for p in model.parameters() if p.grad is not None]
                if not parameters:
                    return
                optimizer = self.optimizers[id(model)] = torch.optim.AdamW(parameters, lr=0.02)
            theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
            trained.extend(n for n, p in model.named_parameters() if p.grad is not None and id(p) in theirs)
            optimizer.step()
            model.zero_grad(set_to_none=True)

        worked = self.twins.compare_steps(step)
        if self.twins.has_dropout or not worked:
            self.twins.each(lambda model: model.zero_grad(set_to_none=True))
            return bool(worked) and None
        self.twins.each(step_of_adamw if way == "adamw" else update)
        self._trained(trained)
        return bool(trained)

    def _trained(self, names):
        if any(is_base(name) for name in names):
            if self.twins.is_merged:
                self.twins.edited, self.twins.exact, self.twins.is_lost = True, False, True
            else:
                self.twins.remember_base()
        if any("_B" in name for name in names):
            self.twins.remember_bases()
            self.edited()

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
            (grad,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=twice)
            if not twice:
                return out.detach(), {"x": grad}
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            grads = (
                torch.autograd.grad(grad.square().sum(), trained.values(), allow_unused=True)
                if trained
                else ()
            )
            second = {f"second {n}": g for n, g in zip(trained, grads, strict=True) if g is not None}
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
        return self.call_mixed(["__base__" if index < 0 else self.pick(index) for index in names], seed)

    def call_mixed(self, names, seed):
        ids = tokens(len(names), 4, seed)
        outcome = self.twins.each(lambda model: self.twins.call(model, ids, adapter_names=names).detach())
        for model in (self.twins.ours, self.twins.stock):
            for layer in layers(model).values():  # PEFT leaves its hooks there if the forward raises
                layer._forward_pre_hooks.clear()
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
                module.register_forward_pre_hook(do_raise)
                if before
                else module.register_forward_hook(do_raise)
            )
            try:
                self.twins.call(model, tokens(2, 4, 0))
            finally:
                hook.remove()

        return type(self.twins.each(failing).error) is RaisedInForwardError

    @action(seed=SEEDS)
    def exception_in_a_backward(self, seed):
        def failing(model):
            out = self.twins.call(model, tokens(2, 4, seed))
            if out.requires_grad:
                out.register_hook(do_raise)
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
        if self.twins.of_inference:  # PyTorch leaves tensors that stock cannot train with
            return False

        def merged(model):
            with self.twins.casting():
                model.merge_adapter(adapter_names=names, safe_merge=safe)

        self.twins.each(merged)
        self.merged()
        return None

    @precondition(lambda self: self.twins.is_merged)
    @action()
    def unmerge(self):
        def unmerged(model):
            with self.twins.casting():
                model.unmerge_adapter()

        self.twins.each(unmerged)

    @action(safe=st.booleans(), keep=st.booleans())
    def merge_and_unload_a_copy(self, safe, keep):
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
            if pair is None or self.twins.is_merged or self.twins.of_inference:
                return False
        kept = []
        for model in (self.twins.ours, self.twins.stock):
            A = factors(model.get_submodule(name), key)[0]
            kept.append((A, A.detach().clone()))
            A.data[0, 0] = float("nan")
        outcome = self.twins.each(lambda model: model.merge_adapter(adapter_names=[key], safe_merge=True))
        for A, before in kept:
            A.data.copy_(before)
        self.merged()
        return outcome.error is not None

    @action(context=st.booleans(), on=st.booleans())
    def disable_adapters(self, context, on):
        self.repaired_if_edited()
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
