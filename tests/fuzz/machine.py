"""Random sequences of what people do with adapters, done to `Twins`: hypothesis draws and shrinks them."""

import torch
from hypothesis import HealthCheck, Phase, assume
from hypothesis import settings as Options
from hypothesis.stateful import precondition

import mica.fast
from mica.fast.settings import settings
from tests.fuzz.actions import FLAG, INDEX, action, any_of, pass_on
from tests.fuzz.adapters import Adapters
from tests.fuzz.calls import Calls
from tests.fuzz.twins import factors, layers


class Machine(Adapters, Calls):
    """All rules: those of the others, and the modes."""

    @precondition(lambda self: self.twins.is_mixture)
    @action(name=any_of("eager", "grouped_mm", "batched_mm"))
    def experts_implementation(self, name):
        assume(not (self.is_double and name == "grouped_mm"))
        self.twins.each(lambda model: model.set_experts_implementation(name))

    @action(on=FLAG)
    def training(self, on):
        self.twins.each(lambda model: model.train(on) and None)

    @action(dtype=any_of(torch.bfloat16, torch.float32, torch.float64))
    def to_dtype(self, dtype):
        """Also while an adapter is merged: what unmerging gives is then as near as stock's."""
        assume(not self.twins.of_inference)  # PyTorch leaves tensors that stock cannot train with
        self.twins.compare()  # the last probe may have unmerged, with the rounding of the present dtype
        is_merged = self.twins.is_merged
        if self.twins.is_mixture and dtype == torch.float64:
            self.twins.each(lambda model: model.set_experts_implementation("eager"))
        self.twins.each(lambda model: model.to(dtype) and None)
        self.optimizers.clear()
        self.twins.pristine.to(dtype)
        self.twins.remember_base()
        self.twins.remember_bases()
        if is_merged:
            self.twins.base, self.twins.exact, self.twins.edited = {}, False, True

    @action(
        which=any_of(
            "nothing", "everything", "one base layer", "active", "a lora_A", "a lora_B", "every lora_A"
        ),
        layer=INDEX,
    )
    def requires_grad(self, which, layer):
        name, adapter = self.pick_layer(layer), self.pick(layer)

        def flags(model):
            if which == "everything":
                model.requires_grad_(True)
            elif which == "one base layer":
                model.get_submodule(name).get_base_layer().requires_grad_(True)
            elif which in ("a lora_A", "a lora_B"):
                pair = factors(model.get_submodule(name), adapter)
                for factor in pair[which == "a lora_B" :][:1] if pair else ():
                    factor.requires_grad_(not factor.requires_grad)
            elif which == "every lora_A":  # LoRA-FA, or back
                for module in layers(model).values():
                    for lora_A in module.lora_A.values():
                        lora_A.requires_grad_(not lora_A.weight.requires_grad)
            else:
                model.requires_grad_(False)
                if which == "active":
                    for module in layers(model).values():
                        module.set_adapter(module.active_adapters)

        self.twins.each(flags)

    @action(dtype=any_of(None, torch.bfloat16, torch.bfloat16, torch.float16))
    def autocast(self, dtype):
        self.twins.autocast = dtype

    @action(reentrant=any_of(None, True, False))
    def checkpoint(self, reentrant):
        def set_it(model):
            if self.twins.form == "plain":
                model.base_model.model.reentrant = reentrant
            elif reentrant is None:
                model.gradient_checkpointing_disable()
                model.disable_input_require_grads() if self.checkpointing is not None else None
            else:
                model.enable_input_require_grads() if self.checkpointing is None else None
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})

        self.twins.each(set_it)
        self.checkpointing = reentrant

    @action(where=any_of("base", "layer", "lora_A", "lora_B", "lora_dropout"), layer=INDEX)
    def hook(self, where, layer):
        """One that does nothing, so that the base layer is called, or the layer is PEFT's; it stays."""
        if self.hooks:
            for module, key in self.hooks:
                module._forward_hooks.pop(key, None)
            self.hooks = []
            return
        name = self.pick_layer(layer)
        for model in self.twins.both:
            module = model.get_submodule(name)
            if where == "base":
                module = module.get_base_layer()
            elif where != "layer":
                module = next(iter(getattr(module, where).values()), module)
            self.hooks.append((module, module.register_forward_hook(pass_on).id))

    @action(what=any_of("fp32", "narrow", "norms", "lora", "off", "on", "uninstall"))
    def setting(self, what):
        if what in ("off", "on"):
            mica.fast.disable() if what == "off" else mica.fast.enable()
        elif what == "uninstall":
            mica.fast.uninstall()
            self.twins.probe(True)
            mica.fast.enable()
        elif what == "norms":
            mica.fast.enable(recompute="activations" if settings.recompute == "norms" else "norms")
        elif what == "lora":
            mica.fast.enable(lora=not settings.lora)
        else:
            mica.fast.enable(compute_dtype=torch.float32 if what == "fp32" else None)


def options(examples: int, steps: int, shrinks: bool = False, derandomize: bool = False) -> Options:
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]
    limits = {"max_examples": examples, "stateful_step_count": steps, "deadline": None, "database": None}
    checks = list(HealthCheck)
    return Options(**limits, derandomize=derandomize, phases=phases, suppress_health_check=checks)
