"""PEFT's own code as the oracle: the same calls with the backend on and off."""

import warnings
from contextlib import contextmanager

import torch

import mica.fast
from tests.support.counts import whatever_language
from tests.support.models import gradients
from tests.support.tolerances import error


def both(function):
    """What it returns with the backend and, without a call of the operators, with stock; the same seed."""
    torch.manual_seed(11)
    ours = function()
    counts = mica.fast.call_counts.copy()
    torch.manual_seed(11)
    with mica.fast.disabled():
        theirs = function()
    assert mica.fast.call_counts == counts
    return ours, theirs


@contextmanager
def uninstalled():
    """Within it PEFT is as before the import."""
    mica.fast.uninstall()
    try:
        yield
    finally:
        mica.fast.enable()


def assert_same(ours, theirs, tolerance):
    """Tensors of one dtype within ``tolerance``, also in tuples and, by the same keys, in dicts."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_same(ours[name], value, tolerance)
    elif isinstance(theirs, tuple | list):
        for pair in zip(ours, theirs, strict=True):
            assert_same(*pair, tolerance)
    elif theirs is None:
        assert ours is None
    else:
        assert ours.dtype == theirs.dtype
        assert error(ours, theirs) <= tolerance


def as_stock(function, *tolerances):
    """What it returns with the backend, which is stock's; of a tuple each part by a tolerance of its own."""
    ours, theirs = both(function)
    pairs = zip(ours, theirs, strict=True) if tolerances[1:] else [(ours, theirs)]
    for pair, tolerance in zip(pairs, tolerances, strict=True):
        assert_same(*pair, tolerance)
    return ours


def counted(function):
    """What it returns, and how often it has run each operator, from Python or C++."""
    before = mica.fast.call_counts.copy()
    result = function()
    return result, whatever_language(mica.fast.call_counts - before)


def step(model, *args, **kwargs):
    """The output, and the gradients of its mean square (of its loss, if it has one), by name."""
    model.zero_grad(set_to_none=True)
    out = model(*args, **kwargs)
    loss = getattr(out, "loss", None)
    out = getattr(out, "logits", out) if loss is None else loss
    if out.requires_grad:
        (out if loss is not None else out.float().square().mean()).backward()
    return out.detach(), gradients(model)


def as_graph(function):
    """It compiled as one graph, anew: what an earlier test has compiled is forgotten."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def warned(function):
    """What it returns, and the warnings of this package."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in caught if "mica.fast" in str(warning.message)]
