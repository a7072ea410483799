import itertools

import pytest

from mica.kernels import configs

TARGETS = list(configs.SHARED_MEMORY)


@pytest.mark.parametrize(
    ("table", "few", "many"),
    [
        (configs.down_projection, 1, 8192),
        (configs.up_projection, 1, 8192),
        (configs.grad_a, 1, 8192),
        # rows of each expert; columns of all
        (configs.experts_down, 32, 33),
        (configs.experts_up, 32, 33),
        (configs.experts_grad_a, 128 * 263, 128 * 264),
    ],
)
def test_the_default_depends_on_the_size_only_where_it_is_the_other_candidate(table, few, many):
    small, large = (table("sm_90", size, 16, 2) for size in (few, many))
    assert small == large[::-1]
    assert small[0] < large[0]  # the same tile but for one side, which is smaller
    assert few != 32 or small[0].block_m == 16


def test_the_tall_tile_of_the_skinny_product():
    """First for many tokens and the ranks that it does not spill at, in 16-bit products; not of experts."""

    def first(target, tokens, block_r, itemsize=2, table=configs.down_projection):
        return table(target, tokens, block_r, itemsize)[0][:3]

    for target, block_r in itertools.product(TARGETS, (16, 32, 64, 128, 256)):
        is_tall = block_r in {"sm_90": (32, 64, 128), "sm_100": (32, 64)}.get(target, ())
        assert (first(target, 4096, block_r) == (128, 0, 64)) == is_tall
        assert first(target, 4095, block_r)[0] == 64
        assert first(target, 8192, block_r, table=configs.experts_down)[0] == 64
        assert first(target, 8192, block_r, itemsize=4)[0] < 128


def test_a_thin_k_tile_where_an_fp32_factor_would_fill_the_shared_memory():
    """At rank 32 three programs of a multiprocessor have it."""
    for target, tokens in itertools.product(TARGETS, (1, 1000, 4095, 8192)):
        for config in configs.down_projection(target, tokens, 32, 2):
            assert config.block_k == 64


def test_the_square_tile_of_the_wide_product():
    """A candidate, never the first; for the targets that it does not spill on."""
    for target in TARGETS:
        for tokens in (1, 8192):
            table = configs.up_projection(target, tokens, 64, 2)
            square = [config for config in table if config.block_m == config.block_n == 64]
            assert len(square) == (target in ("sm_90", "sm_100"))
            assert table[0] not in square


def test_the_large_tile_of_the_fused_product():
    """First for the wide sides of MLPs, a candidate for other large products; where it compiles."""

    def columns(target, tokens, out_features, itemsize=2, dropout=False, block_r=16):
        table = configs.fused_linear(target, tokens, out_features, block_r, True, itemsize, dropout)
        return [config.block_n for config in table]

    for target in ("sm_90", "sm_100"):
        assert columns(target, 8192, 14336)[:2] == [256, 128]
        assert columns(target, 8192, 4096)[:2] == columns(target, 2048, 14336)[:2] == [128, 256]
        assert 256 not in columns(target, 512, 14336)
        assert 256 not in columns(target, 8192, 14336, itemsize=4)
        assert 256 not in columns(target, 8192, 14336, dropout=True)
        assert 256 not in columns(target, 8192, 14336, block_r=128)
    for target in set(TARGETS) - {"sm_90", "sm_100"}:
        assert 256 not in columns(target, 8192, 14336)


@pytest.mark.parametrize("target", [*TARGETS, "sm_86"])
def test_where_grad_a_multiplies_x_first(target):
    """Where there are products of four warps, which a small rank alone is too narrow for."""

    def decided(num_tokens=8192, block_r=16, itemsize=2, is_aligned=True, dropout=False):
        (config, *_) = configs.grad_a(target, num_tokens, block_r, itemsize)
        return configs.is_x_first(target, config, block_r, itemsize, is_aligned, dropout)

    has_large_products = target in ("sm_90", "sm_100")
    assert decided() == decided(block_r=32) == has_large_products
    assert not decided(num_tokens=512)
    assert not decided(block_r=64)
    assert not decided(itemsize=4)
    assert not decided(is_aligned=False)
    assert not decided(dropout=True)


def test_stages_follow_the_shared_memory():
    large, small = (configs.down_projection(t, 8192, 256, 4)[0].num_stages for t in ("sm_90", "sm_89"))
    assert small < large
    listed, unlisted, least = (configs.grad_a(t, 8192, 64, 2)[0] for t in ("sm_120", "sm_86", "gfx942"))
    assert listed == unlisted
    assert least.num_stages < unlisted.num_stages
