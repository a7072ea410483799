"""What is counted for a layer is what it keeps, and between counted lengths no less."""

import random

import pytest
import torch

from bench.measure.memory import alive_bytes
from mica.fast import costs
from mica.fast.costs import Cost, Curve
from tests.support.checkpointed import batch, layers_of, llama, step


@pytest.mark.parametrize("square", [0, 3])
def test_a_curve_is_never_below_what_a_layer_takes(square):
    def cost(length):
        return Cost(1000 + 7 * length + square * length**2, 5000 + 9 * length + 2 * square * length**2)

    curve = Curve()
    generator = random.Random(0)
    counted = 0
    for _ in range(200):
        length = generator.randint(1, 500)
        if curve.lacks(length):
            counted += 1
            curve.add(length, cost(length))
        for other in (*range(1, 800, 13), length):
            estimate, exact = curve.at(other), cost(other)
            assert all(map(float.__ge__, map(float, estimate), map(float, exact)))
        assert curve.at(length).kept <= 2.2 * cost(length).kept
    assert counted < 25


KINDS = {
    "LoRA": {},
    "MiCA": {"init_lora_weights": "mica"},
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "eager attention": {"attention": "eager"},
    "fp32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_counted_is_what_a_layer_keeps(kind):
    """Once the layers beside it are known, which may have it keep less."""
    model = llama(layers=2, **KINDS[kind])
    layer = layers_of(model)[1]
    seen = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    step(model, batch(96, 2))
    hook.remove()
    (args, kwargs) = seen[0]
    layer.gradient_checkpointing = False
    counted = costs.count(layer, args, kwargs)
    layer(*args, **kwargs)
    kept = alive_bytes(lambda: layer(*args, **kwargs))
    assert kept - 64 <= counted.kept <= 1.15 * kept  # numbers of attention
    assert counted.peak >= counted.kept
    assert all(type(parameter) is torch.nn.Parameter for parameter in layer.parameters())


def test_autocast_is_counted():
    model = llama(layers=2, dtype=torch.float32)
    h = torch.randn(1, 64, 64, requires_grad=True)
    position = model.base_model.model.model.rotary_emb(h, torch.arange(64)[None])
    kept = costs.count(layers_of(model)[0], (h,), {"position_embeddings": position}).kept
    with torch.autocast("cpu", torch.bfloat16):
        in_16_bits = costs.count(layers_of(model)[0], (h,), {"position_embeddings": position}).kept
    assert in_16_bits < 0.9 * kept
