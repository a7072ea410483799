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
TEXTS_COMPARED = 4
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


def test_gradients_are_as_exact_as_stocks(model, dtype):
    """Against fp64 gradients of the same weights; for bf16 the baseline is stock under bf16 autocast."""

    def run(model, ids, autocast=False):
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        return gradients(model)

    def squared_error(found, exact):
        """Relative to all gradients of the text."""
        assert len(exact) == 210
        squared = sum((found[name].double() - exact[name]).square().sum() for name in exact)
        return (squared / sum(grad.square().sum() for grad in exact.values())).item()

    randomise(model, scale=0.01)
    with mica.fast.disabled():
        exact_model = copy.deepcopy(model).double()
    ours, theirs = [], []
    for ids in python_reference_tokens()[: TEXTS_COMPARED * 64].view(TEXTS_COMPARED, 1, 64):
        with mica.fast.disabled():
            exact = run(exact_model, ids)
        with quick_products(dtype):
            ours.append(squared_error(run(model, ids), exact))
            with mica.fast.disabled():
                theirs.append(squared_error(run(model, ids, autocast=dtype == torch.bfloat16), exact))
    # One text decides nothing: on an Intel Xeon with AMX errors were 0.84 to 1.28 times stock's, of
    # four texts together 1.02 to 1.06 times
    assert sum(ours) <= 1.25**2 * sum(theirs)
