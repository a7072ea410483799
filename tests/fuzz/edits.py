"""Rules of `machine`: values written past PyTorch's count of writes, between calls and within a step."""

import torch
from torch import Tensor, nn

import mica.fast
from mica.fast.forward.expert_params import weight_name
from mica.paths import choose
from tests.fuzz.actions import FLAG, INDEX, Base, action, any_of
from tests.fuzz.compare import factors
from tests.fuzz.twins import layers

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
