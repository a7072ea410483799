"""The whole path on a pretrained model, SmolLM2-135M: losses and gradients."""

import copy

import pytest
import torch

import mica.fast
from tests.mica.fast.quick_products import quick_products
from tests.support import training
from tests.support.models import (
    bases,
    gradients,
    python_reference_tokens,
    randomise,
    smollm2,
    wrap,
)

pytestmark = pytest.mark.slow

TEXTS, BATCH = 2, (1, 48)
LOSS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative


@pytest.fixture(scope="module")
def one_thread():
    """But all threads: its matrices are large."""


@pytest.fixture(scope="module", params=LOSS, ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def model(dtype):
    """All its linear layers adapted; each test sets A."""
    return wrap(smollm2(dtype), rank=16, targets="all-linear", lora_alpha=16)


def train(model, data):
    """Losses of AdamW steps from A = 0."""
    trained = training.trainable(model).values()
    with torch.no_grad():
        for A in trained:
            A.zero_()
    return training.train(model, data, optimizer=torch.optim.AdamW(trained, lr=1e-3))


def test_six_steps_follow_stock(model, dtype):
    assert mica.fast.explain(model).counts() == {"reference": 210}
    assert len(training.trainable(model)) == 210
    before = {name: B.clone() for name, B in bases(model).items()}
    for B in before.values():
        assert B.dtype == torch.float32
        assert (B.T @ B - torch.eye(16)).abs().max() <= 1e-6
    data = [ids.view(BATCH) for ids in python_reference_tokens().split(BATCH[0] * BATCH[1])[:TEXTS]] * 3
    with quick_products(dtype):
        with mica.fast.disabled():
            expected = train(model, data)  # the same B
        losses = train(model, data)
    assert losses[-TEXTS:].mean() < losses[:TEXTS].mean()  # it learns
    assert ((losses - expected).abs() / expected).max() <= LOSS[dtype]
    for name, B in bases(model).items():
        assert torch.equal(B, before[name])


def test_gradients_are_at_least_as_exact_as_stocks(model, dtype):
    """Against fp64 gradients of the same weights; for bf16 the baseline is stock under bf16 autocast."""
    ids = python_reference_tokens()[:64].view(1, 64)

    def run(model, autocast=False):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return gradients(model)

    randomise(model, scale=0.01)
    with quick_products(dtype):
        ours = run(model)
        with mica.fast.disabled():
            theirs = run(model, autocast=dtype == torch.bfloat16)
    with mica.fast.disabled():
        exact = run(copy.deepcopy(model).double())

    def distance(grads):
        squared = sum((grads[name].double() - exact[name]).square().sum() for name in exact)
        return (squared / sum(grad.square().sum() for grad in exact.values())).sqrt().item()

    assert len(exact) == 210
    errors = {"ours": distance(ours), "stock": distance(theirs)}
    print(f"{dtype}, relative error of all gradients of A: {errors}")
    # seen: 3.73e-6 against 3.74e-6 and 4.4e-2 against 4.8e-2; 5 % for other thread counts and machines
    assert errors["ours"] <= 1.05 * errors["stock"]
