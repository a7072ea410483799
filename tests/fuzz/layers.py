"""Rules of `machine` for what callers do with a layer's output: edits, hooks, complex numbers."""

import torch
from torch import Tensor

from mica.fast.forward.expert_params import is_wrapper
from tests.fuzz.actions import FLAG, INDEX, SEEDS, Base, action, any_of
from tests.fuzz.compare import dtype_of_base, energy, factors, gradients
from tests.fuzz.models import tokens
from tests.support.linear_calls import Marked

SHAPES = any_of((), (3,), (2, 3), (2, 3), (2, 1, 3), (2, 0))  # before the features
EDITS = any_of(None, "add_", "mul_", "tanh_", "a column", "two outputs")
TENSOR_HOOKS = ("gradient", "several gradients", "before the node", "after the node", "retained")


def edited(y: Tensor, edit: str | None) -> Tensor:
    """The output of a layer as a caller changes it in place."""
    if edit == "add_":
        return y.add_(0.5)
    if edit == "mul_":
        return y.mul_(1.5)
    if edit == "tanh_":
        return y.tanh_()
    if edit == "a column":
        y[..., :1] *= 2
        return y
    if edit == "two outputs":
        return Marked.apply(y)[0]
    return y


class Probe:
    """Hooks that see gradients, and those that can change them double them."""

    def __init__(self):
        self.seen: list[Tensor] = []
        self.handles: list = []

    def note(self, gradient: Tensor | None) -> None:
        """None is not noted: a node of this backend has a second output, which no loss reads."""
        if gradient is not None:
            self.seen.append(gradient.detach().float().norm())

    def doubled(self, gradients: tuple) -> tuple:
        for gradient in gradients:
            self.note(gradient)
        return tuple(gradient if gradient is None else gradient * 2 for gradient in gradients)

    def on_tensor(self, y: Tensor, kind: str | None) -> None:
        if kind is None or not y.requires_grad:
            return
        if kind == "gradient":
            y.register_hook(lambda gradient: self.doubled((gradient,))[0])
        elif kind == "several gradients":
            # it may hold no gradient, so only that it ran is noted
            handle = torch.autograd.graph.register_multi_grad_hook((y,), lambda found: self.note(found[0]))
            self.handles.append(handle)
        elif kind == "before the node" and y.grad_fn is not None:
            y.grad_fn.register_prehook(self.doubled)
        elif kind == "after the node" and y.grad_fn is not None:
            y.grad_fn.register_hook(lambda inputs, outputs: self.note(outputs[0]))
        elif kind == "retained":
            y.retain_grad()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def negated_by_a_bit(x: Tensor) -> Tensor:
    """The values of x, which PyTorch stores as -x and a bit."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def loss_of(y: Tensor, consumer: str) -> Tensor:
    """``conjugated``: the gradient that comes back has PyTorch's negative bit, whatever the layer's path."""
    if consumer == "squared":
        return energy(y)
    y = y.float() if y.dtype.itemsize < 4 else y
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
    if consumer == "conjugated":
        numbers = torch.complex(torch.zeros_like(y), y).conj()
        return (numbers * torch.complex(weights, weights)).real.sum()
    return (torch.complex(y, weights) * torch.complex(weights, y)).abs().sum()


def overwrite(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """In place, which PyTorch counts. Returns the parameter and the values that it had."""
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.mul_(1.5)
    return parameter, before


class Layers(Base):
    def input_of(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor | None:
        """What this layer takes, in fp32 or as tokens; None for a stack of experts."""
        layer = self.twins.ours.get_submodule(name)
        if is_wrapper(layer):
            return None
        if "Embedding" in type(layer).__name__:
            return tokens(1, torch.Size(shape).numel(), seed).reshape(shape)
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, layer.in_features, generator=generator)

    @action(
        layer=INDEX,
        shape=SHAPES,
        edit=EDITS,
        hook=any_of(None, *TENSOR_HOOKS),
        consumer=any_of("squared", "conjugated", "complex"),
        gradient_of_x=FLAG,
        negated=FLAG,
        overwritten=any_of(False, False, True),
        seed=SEEDS,
    )
    def one_layer(self, layer, shape, edit, hook, consumer, gradient_of_x, negated, overwritten, seed):
        """``overwritten``: A is, before the backward of an x without a gradient, which does not need it."""
        name, adapter = self.pick_layer(layer), self.pick(layer)
        values = self.input_of(name, shape, seed)
        if values is None:
            return False

        def step(model):
            module, probe = model.get_submodule(name), Probe()
            module.zero_grad(set_to_none=True)
            kept: list[tuple[Tensor, Tensor]] = []
            x = values.clone()  # its own: gradients add up
            if x.is_floating_point():
                x = x.to(dtype_of_base(model)).requires_grad_(gradient_of_x)
            is_negated = negated and x.dtype in (torch.float32, torch.float64)
            try:
                with self.twins.casting():
                    y = module(negated_by_a_bit(x) if is_negated else x)
                probe.on_tensor(y, hook)
                out = edited(y, edit)
                pair = factors(module, adapter)
                if overwritten and not gradient_of_x and pair is not None:
                    kept.append(overwrite(pair[0]))
                if out.requires_grad:
                    loss_of(out, consumer).backward()
                grads = gradients(module)
                if x.is_floating_point() and x.grad is not None:
                    grads["x"] = x.grad
                if hook == "retained" and y.grad is not None:
                    grads["y"] = y.grad.clone()
                return (out.detach(), probe.seen), grads
            finally:
                for lora_A, before in kept:
                    lora_A.data.copy_(before)
                probe.remove()
                module.zero_grad(set_to_none=True)

        return self.twins.compare_steps(step)
