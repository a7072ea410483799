"""A few steps of training on a tiny Llama, what they do, and the plain run that they are held against."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn

import mica.fast
from tests.support.counts import whatever_language
from tests.support.models import ADAPTERS, bases, randomise, tiny_llama, wrap
from tests.support.tolerances import RELATIVE

STEPS = 3
FACTOR_A = r"\.lora_(embedding_)?A\."


def llama(dtype=torch.float32, num_hidden_layers=2, targets="all-linear", base=None, **config):
    """A tiny Llama with a MiCA adapter on its linear layers, 7 a decoder layer.

    Its weights are large enough that three steps at the rate below take the loss from 4.7 to 4.0, far beyond
    the rounding of any dtype: 2e-4 in bf16, 5e-5 in fp16, nothing in fp32. base: options of the Llama.
    """
    model = tiny_llama(initializer_range=0.3, num_hidden_layers=num_hidden_layers, **(base or {}))
    return wrap(model.to(dtype), targets=targets, **config).train()


def batches(count=STEPS, size=4, length=12):
    """The same random token ids ``count`` times: there is something to learn."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 61, (1, size, length), generator=generator).expand(count, -1, -1)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def optimizer_of(model):
    return torch.optim.AdamW(trainable(model).values(), lr=0.01)


def train(model, data=None, step=None, optimizer=None, autocast=None):
    """Losses of one AdamW step a batch; ``step(loss, optimizer)`` in the place of the plain two calls."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for ids in batches() if data is None else data:
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        if step:
            step(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def checkpointed(model, use_reentrant):
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


@dataclass(frozen=True)
class Run:
    """Training in one process, or in each of two, and what must hold of it."""

    config: dict = field(default_factory=dict)  # options of `make`
    make: Callable[..., nn.Module] = llama  # the adapted model, whose B are the same with every option below
    use_reentrant: bool | None = None  # of gradient checkpointing; None: without
    around: Callable[[nn.Module], nn.Module] = lambda model: model  # what is called in the model's place
    train: Callable[..., torch.Tensor] = train
    reference: Callable[..., torch.Tensor] | None = None  # on the bare model; None: ``train``
    is_stock: bool = True  # the reference is stock PEFT's, otherwise this backend's in one process
    is_shared: bool = True  # of two processes each has half of the batch, otherwise the whole one
    dtype: torch.dtype = torch.float32  # the losses' rounding
    counts: dict[str, int] | None = None  # operators a step; None: each layer's forward and backward, fused
    adapter_dtype: torch.dtype = torch.float32
    trained: str = FACTOR_A  # in the names of all trained parameters
    said: dict[str, int] = field(default_factory=dict)  # text in a row of `explain` -> in how many
    adapter: str = "MiCA"  # or "LoRA" or "DoRA", which train B, too

    def made(self) -> nn.Module:
        mica.fast.enable(lora=self.adapter != "MiCA")
        if self.adapter == "MiCA":
            return self.make(**self.config)
        config = {**ADAPTERS["LoRA"], "use_dora": self.adapter == "DoRA", **self.config}
        return randomise(self.make(**config))

    def done(self, rank: int = 0) -> dict:
        """`report` of it in this process."""
        torch.compiler.reset()
        model = self.made()
        if self.use_reentrant is not None:
            checkpointed(model, self.use_reentrant)
        called, share = self.around(model), {}
        if dist.is_initialized() and self.is_shared:
            share = {"data": batches()[:, 2 * rank : 2 * rank + 2]}

        def losses():
            torch.manual_seed(5)  # of dropout
            losses = self.train(called, **share)
            if share:
                dist.all_reduce(losses)
                losses /= 2
            return losses

        return report(model, losses)

    def expected(self) -> torch.Tensor:
        """The losses that it must have: of one process, with nothing around the model."""
        model = self.made()
        torch.manual_seed(5)
        with mica.fast.disabled() if self.is_stock else nullcontext():
            return (self.reference or self.train)(model)


def of_lora(run: Run) -> Run:
    return replace(run, adapter="LoRA", trained=rf"{run.trained}|\.lora_B\.")


def of_dora(run: Run) -> Run:
    """The same with DoRA, which trains the magnitudes, too."""
    run = of_lora(run)
    return replace(run, adapter="DoRA", trained=rf"{run.trained}|\.lora_magnitude_vector\.")


def report(model, losses: Callable) -> dict:
    """What ``losses()``, which trains the adapted model, has done to it; `check` may be elsewhere."""
    before, counts = gathered(bases(model)), mica.fast.call_counts.copy()
    seen = losses()
    after = gathered(bases(model))
    return {
        "losses": torch.as_tensor(seen),
        "counts": whatever_language(mica.fast.call_counts - counts),
        "rows": mica.fast.explain(model).rows,
        "moved": [name for name, B in after.items() if not torch.equal(B, before[name])],
        "trained": {name: p.dtype for name, p in trainable(model).items()},
        "A": gathered(trainable(model)),
        "B": after,
    }


def gathered(tensors):
    """Copies on the CPU; of DTensors and of what ZeRO-3 has partitioned gathered ones, by all processes."""
    return {name: _gathered(tensor).detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _gathered(tensor):
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check(done, expected, run=None, steps=STEPS, path="reference"):
    """A `report`: the reference's losses, by what ``path`` says (of `explain`), and MiCA's B as it was."""
    run = run or Run()
    follows(done["losses"], expected, run.dtype)
    layers = len(done["B"])
    counts = run.counts
    if counts is None:
        counts = {"linear": layers * (1 if run.use_reentrant is None else 2), "linear_backward": layers}
        if run.adapter == "DoRA":
            counts["grad_magnitude"] = layers
    counts = {} if path == "peft" else {name: count * steps for name, count in counts.items()}
    kernels = {f"{name}_kernels": count for name, count in counts.items() if path == "kernel"}
    assert done["counts"] == counts | kernels
    assert {row.path for row in done["rows"]} == {path}
    assert len(done["rows"]) == layers
    for text, count in run.said.items():
        assert sum(text in row.reason for row in done["rows"]) == count, done["rows"]
    assert done["moved"] == ([] if run.adapter == "MiCA" else list(done["B"]))
    assert set(done["trained"].values()) == {run.adapter_dtype}
    assert all(re.search(run.trained, name) for name in done["trained"])
    assert len(done["A"]) >= layers
    for name, B in done["B"].items() if run.adapter == "MiCA" else ():
        if ".experts" not in name:  # of those every expert's is
            off = (B.T.float() @ B.float() - torch.eye(B.shape[1])).abs().max()
            assert off <= (1e-6 if B.dtype == torch.float32 else 2e-2), name


def follows(losses, expected, dtype=torch.float32):
    """Loss by loss; and the run is one that learns, so that a frozen or a dead adapter would be seen."""
    losses, expected = torch.as_tensor(losses), torch.as_tensor(expected)
    assert losses.shape == expected.shape
    assert losses[0] - losses[-1] > 8 * RELATIVE[dtype] * losses[0], losses
    assert ((losses - expected).abs() / expected).max() <= RELATIVE[dtype], (losses, expected)
