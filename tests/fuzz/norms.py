"""Random norms over views and parts of their input, before layers: `recompute="norms"` changes no bit.

The yardstick are the same layers on a clone of x, which is saved as it is.
"""

from collections import Counter

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from torch import Tensor

from mica.ops import kept
from tests.fuzz.actions import FLAG, TALLY, any_of
from tests.support.kept_layers import IN, Layer, assert_same, gradients, norm_weight

SHAPES = any_of((IN, IN), (IN, IN), (5, IN), (2, 3, IN))
VIEWS = {
    "the first features": lambda h: h[..., :1],
    "half of the features": lambda h: h[..., : (h.shape[-1] + 1) // 2],
    "every other feature": lambda h: h[..., ::2],
    "the first token": lambda h: h[:1],
    "a transpose": lambda h: h.transpose(0, -1),
    "heads": lambda h: h.unflatten(-1, (-1, 4 if h.shape[-1] % 4 == 0 else 1)),
    "one row": torch.flatten,
    "copies in one place": lambda h: h.expand(2, *h.shape),
    "the negative": torch._neg_view,
    "the same": lambda h: h.view_as(h),
    "reversed": lambda h: h.flip(0),
    "a copy": torch.clone,
    "detached": torch.detach,
}
CHAINS = st.lists(st.sampled_from(sorted(VIEWS)), max_size=3)
TALLY["norm"] = Counter()


def viewed(h: Tensor, chain: list[str]) -> Tensor:
    for name in chain:
        h = VIEWS[name](h)
    return h


def rstd(h: Tensor, exponent: int, like: Tensor) -> Tensor:
    """Of each row where that fits ``like``, else of all."""
    powers = h.pow(exponent)
    means = powers.mean(-1, keepdim=True)
    is_fitting = means.dim() <= like.dim() and all(
        size in (1, other) for size, other in zip(reversed(means.shape), reversed(like.shape), strict=False)
    )
    return torch.rsqrt((means if is_fitting else powers.mean()) + 1e-6)


class Norms(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        kept.recompute_norms(True)

    def teardown(self):
        kept.recompute_norms(False)

    @rule(
        shape=SHAPES,
        dtype=any_of(torch.bfloat16, torch.bfloat16, torch.float16, torch.float32),
        has_gaps=FLAG,
        of_product=CHAINS,
        of_square=CHAINS,
        exponent=any_of(2, 2, 4),
        is_first=FLAG,
        is_edited=any_of(False, False, True),
        norms=any_of(1, 1, 2),
    )
    def norm(self, shape, dtype, has_gaps, of_product, of_square, exponent, is_first, is_edited, norms):
        """``is_first``: h before 1/rms. ``norms``: how many share one h in 32 bits, each before a layer."""
        values = torch.randn(*shape[:-1], 2 * IN).to(dtype)
        layers = [Layer(dtype, seed) for seed in range(norms)]
        found = []

        def as_it_is(x: Tensor) -> Tensor:
            TALLY["norm"]["tried"] += 1
            TALLY["norm"]["effective"] += kept.input_of(x) is not None
            return x

        for change in (as_it_is, torch.clone):
            leaf = values.clone().requires_grad_()
            h = leaf[..., ::2] if has_gaps else leaf[..., :IN]
            wide = h.float()
            if is_edited:
                wide.detach().mul_(1.001)  # no number of 16 bits any more
            factor = viewed(wide, of_product)
            if factor.shape != wide.shape:
                factor = wide
            loss = 0
            for layer in layers:
                inverse = rstd(viewed(wide, of_square), exponent, wide)
                normed = factor * inverse if is_first else inverse * factor
                x = norm_weight(dtype) * normed.to(dtype)
                loss = loss + layer(change(x)).float().sin().sum()
            found.append(gradients(loss, leaf, *[layer.lora_A for layer in layers]))
        assert_same(*found)
