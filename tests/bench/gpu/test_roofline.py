"""The model of a layer's time: what follows from bytes, operations and launches alone."""

import functools

import pytest

from bench.gpu import roofline
from bench.gpu.roofline import COPY, GAP, PRODUCT, Launch, Layer
from bench.measure.peaks import Peak
from bench.results.names import BACKWARD, FORWARD
from mica.kernels.configs import FORM_NAMES

CACHE = 1e6
PEAK = Peak("sm_90", bandwidth=1e12, flop_16_bit=1e15, flop_fp32=1e14, cache=CACHE)
LAYER = Layer(4096, 1024, 2048, 16, CACHE)


@pytest.mark.parametrize(
    ("launch", "seconds"),
    [
        (Launch(1e9, share=0.5), 2e9 / (COPY * 1e12)),
        (Launch(1e9, 1e13, is_fp32=True), 1e13 / (roofline.PRODUCT_FP32 * 1e14)),
        (Launch(1e9, 1e13, speed=0.5, exposed=1e9), 2e13 / (PRODUCT * 1e15) + 1e9 / (COPY * 1e12)),
        (Launch(1e9, cached=1e9), 1e9 / (COPY * 1e12 * roofline.CACHE_SPEEDUP)),
    ],
)
def test_a_launch_takes_as_long_as_the_slower_of_memory_and_products(launch, seconds):
    assert roofline.seconds(launch, PEAK) == pytest.approx(seconds + GAP)


def moved(launches):
    return roofline.predict(launches, PEAK).moved


@pytest.mark.parametrize("part", [FORWARD, BACKWARD])
def test_which_matrices_a_form_moves_more_than_the_bare_layer(part):
    """At rank 1 its own factors weigh little; kernels/README.md has the same, as memory traffic."""
    layer = Layer(65536, 4096, 4096, 1, CACHE)
    matrix = 2.0 * layer.tokens * layer.out
    bare = moved(roofline.bare(layer, part))
    own = 1 if part == FORWARD else 2  # reads of x, or of dy and x
    more = {"fused": 0, "split": 2, "mixed": 2, "reference": 2, "first": 1 + roofline.UPDATE_EXPOSED}
    for form, times in more.items():
        got = (moved(roofline.of_form(form, layer, part)) - bare) / matrix
        assert got == pytest.approx(own + times, rel=0.01), form


def test_stock_with_masters_casts_and_moves_twice_the_bytes():
    base = LAYER._replace(has_masters=False)
    for part, casts in ((FORWARD, 2), (BACKWARD, 3)):
        wide, narrow = roofline.stock(LAYER, part), roofline.stock(base, part)
        assert len(wide) == len(narrow) + casts
        assert moved(wide) > 1.5 * moved(narrow) > 1.5 * moved(roofline.bare(base, part))


IMPLEMENTATIONS = {form: functools.partial(roofline.of_form, form) for form in FORM_NAMES}
IMPLEMENTATIONS["stock"] = roofline.stock


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_trained_b_costs_one_more_read_of_dy_in_the_backward(name):
    """And nothing of the size of y or dx in the forward."""
    frozen = Layer(65536, 4096, 2048, 1, CACHE, has_masters=name != "stock")
    launches = IMPLEMENTATIONS[name]
    for part, reads in ((FORWARD, 0), (BACKWARD, 1)):
        more = moved(launches(frozen._replace(trains_B=True), part)) - moved(launches(frozen, part))
        assert more / (2.0 * frozen.tokens * frozen.out) == pytest.approx(reads, abs=0.01)
