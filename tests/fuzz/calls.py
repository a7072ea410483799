"""Rules of `machine`: forwards, training, exceptions, merging."""

import copy

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition

from tests.fuzz.actions import FLAG, INDEX, SEEDS, Base, action, any_of
from tests.fuzz.compare import dtype_of_base, energy
from tests.fuzz.models import tokens
from tests.fuzz.twins import is_base


class RaisedInForwardError(Exception):
    """What `do_raise` raises."""


def do_raise(*args):
    raise RaisedInForwardError


def with_gradients(model):
    return [(name, p) for name, p in model.named_parameters() if p.grad is not None]


class Calls(Base):
    @action(size=st.integers(0, 3), length=st.integers(1, 7))
    def forward(self, size, length):
        self.twins.probe(False, size, length)

    @action(rate=any_of(0.1, 0.5), way=any_of("plain", "twice", "retained", "accumulated", "adamw", "fused"))
    def train_step(self, rate, way):
        ids = [tokens(2, 6, self.twins.seed), tokens(3, 4, self.twins.seed + 1)]

        def step(model):
            model.zero_grad(set_to_none=True)
            out = self.twins.call(model, ids[0])
            if not out.requires_grad:
                return out.detach(), {}
            loss = energy(out)
            if way == "twice":
                loss = loss + energy(self.twins.call(model, ids[1]))
            if way == "retained":
                loss.backward(retain_graph=True)
                loss = out.float().abs().mean()
            loss.backward()
            if way == "accumulated":
                energy(self.twins.call(model, ids[1])).backward()
            return out.detach(), {n: p.grad for n, p in with_gradients(model)}

        trained, gradients = [], {}

        def update(model):
            parameters = with_gradients(model)
            for name, parameter in parameters:  # compared: rounding must not grow in an optimizer's steps
                if model is self.twins.stock:
                    parameter.grad.copy_(gradients[name])
                gradients[name] = parameter.grad.clone()
            if parameters and way in ("adamw", "fused"):  # its state outlives the actions
                optimizer = self.optimizers.get(id(model))
                if optimizer is None:
                    # fused, it does not count its edits
                    optimizer = torch.optim.AdamW([p for _, p in parameters], lr=0.02, fused=way == "fused")
                    self.optimizers[id(model)] = optimizer
                theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
                trained.extend(name for name, p in parameters if id(p) in theirs)
                optimizer.step()
            elif parameters:
                norm = torch.stack([p.grad.double().norm() for _, p in parameters]).norm()
                trained.extend(name for name, _ in parameters)
                with torch.no_grad():
                    for _, p in parameters:
                        p.sub_((p.grad * (rate / (norm + 1e-6))).to(p.dtype))
            model.zero_grad(set_to_none=True)

        worked = self.twins.compare_steps(step)
        if self.twins.has_dropout or not worked:
            self.twins.each(lambda model: model.zero_grad(set_to_none=True))
            return
        self.twins.each(update)
        self._trained(trained)

    def _trained(self, names):
        if any(is_base(name) for name in names):
            self.base_edited()
        if any("_B" in name for name in names):
            self.twins.remember_bases()
            self.edited()

    @precondition(lambda self: self.twins.form != "seq2seq")
    @action(seed=SEEDS, twice=FLAG)
    def gradient_of_the_input(self, seed, twice):
        width = self.twins.ours.get_input_embeddings().weight.shape[1] if self.twins.form == "causal" else 12
        x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed))
        x = x.to(dtype_of_base(self.twins.ours))
        twice = twice and self.checkpointing is None and self.twins.tolerance < 1e-4

        def step(model):
            leaf = x.to(dtype_of_base(model), copy=True).requires_grad_()  # a judge is in fp64
            out = self.twins.call(model, None, inputs_embeds=leaf)
            (grad,) = torch.autograd.grad(energy(out), leaf, create_graph=twice)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            if not twice or not trained:
                return out.detach(), {"x": grad.detach()}
            grads = torch.autograd.grad(grad.square().sum(), trained.values(), allow_unused=True)
            second = {f"second {n}": g for n, g in zip(trained, grads, strict=True) if g is not None}
            return out.detach(), {"x": grad.detach(), **second}

        self.twins.compare_steps(step)

    @precondition(lambda self: self.twins.form != "plain")
    @action(seed=SEEDS, cache=FLAG)
    def generate(self, seed, cache):
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        options |= {"use_cache": cache, "output_scores": True, "return_dict_in_generate": True}
        texts = {}

        def first_scores(model):
            with self.twins.casting():
                out = model.generate(input_ids=tokens(2, 3, seed), **options)
            texts[model is self.twins.ours] = out.sequences
            return None if self.twins.has_dropout else out.scores[0].float()

        worked = self.twins.each(first_scores).error is None
        if worked and not self.twins.has_dropout and self.twins.tolerance < 1e-4:
            assert torch.equal(texts[True], texts[False]), f"generated {texts}"

    @action(seed=SEEDS)
    def inference_mode(self, seed):
        def inferred(model):
            with torch.inference_mode():
                return self.twins.call(model, tokens(2, 4, seed)).clone()

        if not self.twins.has_dropout:
            self.twins.each(inferred)

    @action(layer=INDEX, before=FLAG)
    def exception_in_a_forward(self, layer, before):
        name = self.pick_layer(layer)
        register = "register_forward_pre_hook" if before else "register_forward_hook"

        def failing(model):
            hook = getattr(model.get_submodule(name), register)(do_raise)
            try:
                self.twins.call(model, tokens(2, 4, 0))
            finally:
                hook.remove()

        self.twins.each(failing)

    @action(seed=SEEDS)
    def exception_in_a_backward(self, seed):
        """Of what is trained: PEFT's DoRA over Conv1D has an output that requires a gradient in any case."""

        def failing(model):
            hooks = [p.register_hook(do_raise) for p in model.parameters() if p.requires_grad]
            try:
                out = self.twins.call(model, tokens(2, 4, seed))
                if out.requires_grad:
                    out.float().sum().backward()
            finally:
                for hook in hooks:
                    hook.remove()
                model.zero_grad(set_to_none=True)

        self.twins.each(failing)

    # -- merging --------------------------------------------------------------------------------------

    @action(index=INDEX, safe=FLAG, named=FLAG)
    def merge(self, index, safe, named):
        names = [self.pick(index)] if named else None
        if self.twins.of_inference:  # PyTorch leaves tensors that stock cannot train with
            return

        self.cast_each(lambda model: model.merge_adapter(adapter_names=names, safe_merge=safe))
        self.merged()

    @precondition(lambda self: self.twins.is_merged)
    @action()
    def unmerge(self):
        self.cast_each(lambda model: model.unmerge_adapter())

    @action(safe=FLAG, keep=FLAG)
    def merge_and_unload_a_copy(self, safe, keep):
        ids = tokens(2, 4, 1)

        def unloaded(model):
            model = copy.deepcopy(model)
            model = model.unload() if keep else model.merge_and_unload(safe_merge=safe)
            with torch.no_grad():
                return self.twins.call(model.eval(), ids), dict(model.state_dict())

        self.twins.each(unloaded)

    @action(context=FLAG, on=FLAG)
    def disable_adapters(self, context, on):
        self.repaired_if_edited()
        if context:

            def without(model):
                with model.disable_adapter(), torch.no_grad():
                    return self.twins.call(model, tokens(2, 4, 5))

            self.twins.each(without)
            return
        change = "enable_adapter_layers" if on else "disable_adapter_layers"
        self.twins.each(lambda model: getattr(model.base_model, change)())
