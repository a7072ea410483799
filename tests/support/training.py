"""A few steps of training on a tiny Llama, the losses, and the proof of which path they took."""

from contextlib import contextmanager, nullcontext

import torch

import mica.fast
from tests.support.models import bases, tiny_llama, wrap
from tests.support.tolerances import RELATIVE

STEPS = 3


def llama(seed=0, dtype=torch.float32, num_hidden_layers=2, targets="all-linear", **config):
    """A tiny Llama with a MiCA adapter on its linear layers, 7 a decoder layer.

    Its weights are large enough that three steps at the rate below take the loss from 4.7 to 4.0, far beyond
    the rounding of any dtype: 2e-4 in bf16, 5e-5 in fp16, nothing in fp32.
    """
    base = tiny_llama(seed, initializer_range=0.3, num_hidden_layers=num_hidden_layers)
    return wrap(base.to(dtype), targets=targets, **config).train()


def batches(count=STEPS, size=4, length=12, seed=2):
    """The same random token ids ``count`` times: there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
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


def eager_losses(autocast=None, data=None, **config):
    """What every way of training is held against: stock PEFT, one process, nothing around the model."""
    model = llama(**config)  # the same B: initialised by the backend
    with mica.fast.disabled():
        return train(model, data, autocast=autocast)


def follows(losses, expected, dtype=torch.float32):
    """Loss by loss; and the run is one that learns, so that a frozen or a dead adapter would be seen."""
    losses, expected = torch.as_tensor(losses), torch.as_tensor(expected)
    assert losses.shape == expected.shape
    assert losses[0] - losses[-1] > 8 * RELATIVE[dtype] * losses[0], losses
    assert ((losses - expected).abs() / expected).max() <= RELATIVE[dtype], (losses, expected)


@contextmanager
def on_the_fast_path(model, forwards, backwards=None):
    """In the block every adapted linear layer runs on the backend, that often; B stays as it is, frozen."""
    before_B = {name: B.detach().clone() for name, B in bases(model).items()}
    before = mica.fast.call_counts.copy()
    layers = len(before_B)
    assert mica.fast.explain(model).counts() == {"reference": layers}, str(mica.fast.explain(model))
    yield
    counted = mica.fast.call_counts - before
    assert counted["linear"] == forwards * layers
    assert counted["linear_backward"] == (forwards if backwards is None else backwards) * layers
    for name, B in bases(model).items():
        assert not B.requires_grad, name
        assert torch.equal(B, before_B[name]), name
