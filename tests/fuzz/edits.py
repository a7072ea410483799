"""Rules of `machine`: values written past PyTorch's count of writes, between calls and within a step."""

import torch
from peft.tuners.lora import ParamWrapper
from torch import Tensor, nn

import mica.fast
from mica.fast.forward.expert_params import weight_name
from mica.paths import choose
from tests.fuzz.actions import FLAG, INDEX, Base, action, any_of
from tests.fuzz.compare import attempt, distance, energy, factors, gradients
from tests.fuzz.models import tokens
from tests.fuzz.twins import GRADIENTS, layers

WHAT = any_of("lora_A", "lora_B", "lora_B", "weight", "bias")
WAYS = ("data =", "data.copy_", "data[...] =", "numpy", "copy_")


def write(parameter: Tensor, values: Tensor, way: str) -> None:
    """New values, as users and libraries write them. PyTorch counts a write of ``copy_`` alone."""
    if way == "data =":
        parameter.data = values.clone()
    elif way == "data[...] =":
        parameter.data[...] = values
    elif way == "numpy" and parameter.dtype != torch.bfloat16:
        parameter.detach().numpy()[...] = values.numpy()
    elif way == "copy_":
        with torch.no_grad():
            parameter.copy_(values)
    else:
        parameter.data.copy_(values)


def other_values(parameter: Tensor) -> Tensor:
    """As large as the present ones, and in a shape of which no element stays where it was."""
    values = parameter.detach()
    return values.flatten().roll(1).reshape(values.shape).clone()


def parameter_of(layer: nn.Module, what: str, adapter: str) -> Tensor | None:
    if what in ("lora_A", "lora_B"):
        pair = factors(layer, adapter)
        return None if pair is None else pair[what == "lora_B"]
    name = weight_name(layer) if what == "weight" else "bias"
    return getattr(layer.get_base_layer(), name, None)


class Edits(Base):
    @action(what=WHAT, way=any_of(*WAYS), layer=INDEX, index=INDEX, everywhere=FLAG)
    def edit_values(self, what, way, layer, index, everywhere):
        adapter = self.pick(index)
        names = list(layers(self.twins.ours)) if everywhere else [self.pick_layer(layer)]
        if self.twins.of_inference and what in ("weight", "bias"):
            return False  # PyTorch leaves tensors that cannot be written to
        self.twins.probe(False)
        is_done = False
        for name in names:
            parameter = parameter_of(self.twins.ours.get_submodule(name), what, adapter)
            if parameter is not None:
                write(parameter, other_values(parameter), way)
                is_done = True
        if not is_done:
            return False
        self._note(what, adapter)
        self.twins.synchronise()
        return True

    def _note(self, what: str, adapter: str) -> None:
        """What the comparisons expect from now on. Only kernels have to be told of another B."""
        if what == "lora_B":
            if choose.requested() == "triton":
                mica.fast.clear_caches()
            self.twins.remember_bases(adapter)
        if what in ("lora_A", "lora_B"):
            self.edited()
        else:
            self.base_edited()

    @action(what=WHAT, way=any_of("data =", "data =", "data.copy_"), layer=INDEX, index=INDEX)
    def edit_before_the_backward(self, what, way, layer, index):
        """The gradient is that of the values that the forward has used.

        Where they were overwritten, which nothing can see, it may be that of the new ones, as stock's is.
        """
        name, adapter, ids = self.pick_layer(layer), self.pick(index), tokens(2, 5, self.twins.seed)
        if (
            parameter_of(self.twins.ours.get_submodule(name), what, adapter) is None
            or self.twins.of_inference
        ):
            return False
        if way == "data.copy_" and self.twins.tolerance > 1e-4:
            return False  # fp64 cannot judge between the two
        if way == "data.copy_" and isinstance(self.twins.ours.get_submodule(name), ParamWrapper):
            return False  # stock's is of both: x's comes from W + B A as it was, A's from B as it is

        def step(model, edits=True):
            parameter = parameter_of(model.get_submodule(name), what, adapter)
            model.zero_grad(set_to_none=True)
            memory, values = parameter.data, parameter.detach().clone()
            try:
                out = self.twins.call(model, ids)
                if not out.requires_grad:
                    return out.detach(), {}
                if edits:
                    write(parameter, other_values(parameter), way)
                energy(out).backward()
                return out.detach(), gradients(model)
            finally:
                parameter.data = memory
                parameter.data.copy_(values)
                if choose.requested() == "triton":
                    mica.fast.clear_caches()
                model.zero_grad(set_to_none=True)

        compare = self.twins.compare_steps if way == "data =" else self._is_one_of_two
        return compare(step)

    def _is_one_of_two(self, step) -> bool:
        if self.twins.has_dropout:
            return False
        ours = attempt(step, self.twins.ours)
        with mica.fast.disabled():
            edited = attempt(step, self.twins.stock)
            unedited = attempt(lambda model: step(model, edits=False), self.twins.stock)
        both = edited, unedited
        errors = {type(outcome.error) for outcome in (ours, *both)}
        assert len(errors) == 1, f"ours: {ours.error!r}, stock: {both[0].error!r}"
        if ours.error is not None:
            return False
        (_, found), (_, new), (_, old) = ours.value, both[0].value, both[1].value
        assert found.keys() == new.keys() == old.keys()
        largest = max((grad.norm().item() for grad in (*new.values(), *old.values())), default=0.0)
        limit = GRADIENTS * self.twins.tolerance
        for key, grad in found.items():
            error = min(distance(grad, other[key], 0.1 * largest) for other in (new, old))
            assert error <= limit, (
                f"{key}: {error:.1e} from the gradients of the old values and of the new ones"
            )
        return True
