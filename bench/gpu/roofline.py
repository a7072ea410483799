"""How long a layer takes on a device, modelled: each launch by its bytes and operations, in series.

A launch takes as long as the slower of two things: moving its bytes, at the share of the peak bandwidth that
such a kernel reaches, and its operations, at the share of the peak rate that a product reaches. After each
there is a gap. This models the *device time* of `bench.measure.clocks`: the L2 cache is empty at the start,
and what a launch has written may still be there for the next.

No number here is measured: **all are modelled**. `bench.report` puts them beside the measured ones.
"""

from __future__ import annotations

from typing import NamedTuple

from bench.measure.peaks import Peak
from bench.results.names import BACKWARD
from mica.paths.triton_path import MANY_TOKENS, WIDE_RANK

# What is reached of the vendor's figures: assumptions, to be corrected by the first measured run. On
# an H100 SXM 3.0 of 3.35 TB/s by a copy, 790 of 989 TFLOP/s by a large product in bfloat16, 45 of 67 in fp32.
COPY = 0.9  # of the peak bandwidth
PRODUCT = 0.8  # of the peak rate on tensor cores
PRODUCT_FP32 = 0.67
GAP = 2e-6  # seconds between the starts of two launches that do nothing
# Of the L2 cache, how much holds what a launch has just written; a larger matrix leaves less, since its first
# rows have gone when its last are written. What is there is read this many times as fast as memory.
CACHE_USABLE = 0.8
CACHE_LEFT = 0.6
CACHE_SPEEDUP = 1.8
# An update that a product makes of its own output: the part of its read that the product does not hide.
UPDATE_EXPOSED = 0.25
# The fused kernel's rate ÷ that of the vendor's product: the middle of 0.78 to 0.92.
FUSED = 0.85
# Up to this rank a kernel's tile has all of it at once. Above, operands are read again.
NARROW_RANK = 64
LEAST_COLUMNS = 16  # of a product on tensor cores: a smaller rank is padded
BASE, FP32 = 2, 4  # bytes of a number in bfloat16, and of a master of A and B


class Share(NamedTuple):
    """Of a copy's bandwidth, by the rank."""

    narrow: float
    wide: float

    def of(self, rank: int) -> float:
        return self.narrow if rank <= NARROW_RANK else self.wide


ALL = Share(1.0, 1.0)
VENDOR = Share(0.85, 0.85)  # a product of a large and a skinny matrix, or one that writes a large matrix
VENDOR_UPDATE = Share(0.75, 0.75)
DOWN = Share(0.82, 0.6)
UP = Share(0.8, 0.7)
GRAD_A = Share(0.8, 0.55)


class Launch(NamedTuple):
    """``moved``: bytes that it reads and writes; ``cached``: those of them that lie in the L2 cache.

    ``share``: of a copy's bandwidth that it reaches; ``speed``: of the rate of the vendor's product;
    ``exposed``: bytes whose time adds to that of the product; ``is_fp32``: its product is one in float32.
    """

    moved: float
    operations: float = 0.0
    share: float = 1.0
    cached: float = 0.0
    speed: float = 1.0
    exposed: float = 0.0
    is_fp32: bool = False


class Layer(NamedTuple):
    """tokens × in features → tokens × out features, with an adapter of this rank, in bfloat16.

    ``cache``: of the device's L2 cache, in bytes. ``has_masters``: A and B are in float32. ``trains_B``: as
    LoRA does.
    """

    tokens: int
    out: int
    inner: int
    rank: int
    cache: float
    has_masters: bool = True
    trains_B: bool = False

    def backward(self) -> Layer:
        """The layer whose base product is dx = dy W: its x is our dy, its y our dx."""
        return self._replace(out=self.inner, inner=self.out)


class Prediction(NamedTuple):
    """Modelled: seconds of device time, bytes moved, launches."""

    seconds: float
    moved: float
    launches: int


def predict(launches: list[Launch], peak: Peak) -> Prediction:
    return Prediction(
        sum(seconds(launch, peak) for launch in launches),
        sum(launch.moved + launch.exposed for launch in launches),
        len(launches),
    )


def seconds(launch: Launch, peak: Peak) -> float:
    """Modelled."""
    bandwidth = COPY * peak.bandwidth
    from_memory = (launch.moved - launch.cached) / (bandwidth * launch.share)
    from_cache = launch.cached / (bandwidth * CACHE_SPEEDUP)
    rate = PRODUCT_FP32 * peak.flop_fp32 if launch.is_fp32 else PRODUCT * peak.flop_16_bit
    computing = launch.operations / (rate * launch.speed)
    return max(from_memory + from_cache, computing) + launch.exposed / bandwidth + GAP


# ---------------------------------------------------------------------------------------------------
# single launches
# ---------------------------------------------------------------------------------------------------


def elementwise(moved: float) -> Launch:
    return Launch(moved)


def cast(numbers: float) -> Launch:
    """From float32 to bfloat16, or back."""
    return elementwise(numbers * (FP32 + BASE))


def base_product(layer: Layer, speed: float = 1.0, adds: bool = False) -> Launch:
    """y = x Wᵀ by the vendor's library; ``adds``: to a y that has been written before (beta = 1)."""
    result = layer.tokens * layer.out * BASE
    moved = (layer.tokens * layer.inner + layer.out * layer.inner) * BASE + result
    operations = 2.0 * layer.tokens * layer.out * layer.inner
    return Launch(moved, operations, speed=speed, exposed=UPDATE_EXPOSED * result if adds else 0.0)


def skinny(layer: Layer, share: Share) -> Launch:
    """h = x Aᵀ, or g, dA and dB of the same sizes: one matrix of tokens × in features is read."""
    factor = FP32 if layer.has_masters else BASE
    moved = layer.tokens * (layer.inner + layer.rank) * BASE + layer.rank * layer.inner * factor
    return Launch(moved, _low_rank_operations(layer, layer.inner), share.of(layer.rank))


def update(layer: Layer, share: Share, is_cached: bool = True) -> Launch:
    """y += h Bᵀ: y is read and written. ``is_cached``: the base product wrote it just before."""
    result = layer.tokens * layer.out * BASE
    moved = 2 * result + (layer.tokens + layer.out) * layer.rank * BASE
    cached = _left_in_cache(result, layer.cache) if is_cached else 0.0
    return Launch(moved, _low_rank_operations(layer, layer.out), share.of(layer.rank), cached)


def written_first(layer: Layer) -> Launch:
    """y = h Bᵀ, to which the base product adds."""
    moved = layer.tokens * layer.out * BASE + (layer.tokens + layer.out) * layer.rank * BASE
    return Launch(moved, _low_rank_operations(layer, layer.out), VENDOR.of(layer.rank))


def _low_rank_operations(layer: Layer, features: int) -> float:
    return 2.0 * layer.tokens * features * max(LEAST_COLUMNS, layer.rank)


def _left_in_cache(size: float, cache: float) -> float:
    usable = CACHE_USABLE * cache
    return size if size <= usable else CACHE_LEFT * usable


# ---------------------------------------------------------------------------------------------------
# a layer: which launches its forward and its backward make
# ---------------------------------------------------------------------------------------------------


def bare(layer: Layer, part: str) -> list[Launch]:
    return [base_product(layer.backward() if part == BACKWARD else layer)]


def of_form(form: str, layer: Layer, part: str) -> list[Launch]:
    """In one of the forms of `mica.kernels.configs.FORM_NAMES`."""
    is_backward = part == BACKWARD
    by_vendor = form in ("mixed", "reference")
    product = layer.backward() if is_backward else layer
    launches = [
        *_rounded(form, layer, is_backward),
        skinny(product, VENDOR if by_vendor else DOWN),
        *_base_and_update(form, product),
    ]
    if not is_backward:
        return launches
    of_factors = VENDOR if by_vendor else GRAD_A
    launches.append(skinny(layer, of_factors))
    if layer.trains_B:  # dB = (hᵀ dy)ᵀ is written transposed
        launches += [skinny(product, of_factors), elementwise(2 * layer.rank * layer.out * FP32)]
    return launches


def _rounded(form: str, layer: Layer, is_backward: bool) -> list[Launch]:
    """The factors that are rounded before a pass; for kernels a frozen B is rounded once for all."""
    A = cast(layer.rank * layer.inner)
    B = cast(layer.rank * layer.out)
    if form == "reference":
        return [A, B]
    if form == "mixed" and is_backward:
        return [B, *_kernel_operand(layer)]
    is_A_rounded = (form == "first" and is_backward) or form == "mixed"
    of_A = [A] if is_A_rounded else _kernel_operand(layer)
    return [*of_A, B] if layer.trains_B else of_A


def _kernel_operand(layer: Layer) -> list[Launch]:
    """A is rounded before the kernels read it (`mica.paths.triton_path.as_operand`)."""
    if layer.rank < WIDE_RANK or layer.tokens < MANY_TOKENS:
        return []
    return [cast(layer.rank * layer.inner)]


def _base_and_update(form: str, layer: Layer) -> list[Launch]:
    if form == "fused":
        return [base_product(layer, FUSED)]
    if form == "first":
        return [written_first(layer), base_product(layer, adds=True)]
    return [base_product(layer), update(layer, VENDOR_UPDATE if form == "reference" else UP)]


def stock(layer: Layer, part: str) -> list[Launch]:
    """PEFT's own layer: y + s·((x Aᵀ) Bᵀ), each operator by itself, x and y cast where there are masters."""
    return _stock_backward(layer) if part == BACKWARD else _stock_forward(layer)


def _stock_forward(layer: Layer) -> list[Launch]:
    x = layer.tokens * layer.inner
    y = layer.tokens * layer.out
    adapter = FP32 if layer.has_masters else BASE
    products = [_stock_product(layer, layer.inner), _stock_product(layer, layer.out)]
    scaling = elementwise(2 * adapter * y)
    added = elementwise((BASE + 2 * adapter) * y)
    if layer.has_masters:
        return [base_product(layer), cast(x), *products, scaling, added, cast(y)]
    return [base_product(layer), *products, scaling, added]


def _stock_backward(layer: Layer) -> list[Launch]:
    x = layer.tokens * layer.inner
    y = layer.tokens * layer.out
    adapter = FP32 if layer.has_masters else BASE
    scaling = elementwise(2 * adapter * y)
    # dh, dA and the adapter's part of dx
    products = [_stock_product(layer, layer.out), *[_stock_product(layer, layer.inner)] * 2]
    if layer.trains_B:
        products.append(_stock_product(layer, layer.out))
    base = base_product(layer.backward())
    summed = elementwise(3 * BASE * x)
    if layer.has_masters:
        return [cast(y), cast(y), scaling, *products, cast(x), base, summed]
    return [scaling, *products, base, summed]


def _stock_product(layer: Layer, features: int) -> Launch:
    """Of tokens × features, tokens × rank and rank × features, two of which are read and one is written."""
    itemsize = FP32 if layer.has_masters else BASE
    moved = itemsize * (layer.tokens * features + (layer.tokens + features) * layer.rank)
    operations = 2.0 * layer.tokens * features * layer.rank
    return Launch(moved, operations, VENDOR.of(layer.rank), is_fp32=layer.has_masters)
