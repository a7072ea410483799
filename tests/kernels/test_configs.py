import pytest

from mica.kernels import configs

TARGETS = list(configs.SHARED_MEMORY)
SIZES = [
    (tokens, block_r, itemsize)
    for tokens in (1, 200, 8192)
    for block_r in (16, 64, 256)
    for itemsize in (2, 4)
]


@pytest.mark.parametrize("target", [*TARGETS, "sm_86", "gfx90a"])
@pytest.mark.parametrize(("tokens", "block_r", "itemsize"), SIZES)
def test_at_most_three_and_all_of_them_tiles(target, tokens, block_r, itemsize):
    tables = [
        configs.down_projection(target, tokens, block_r, itemsize),
        configs.up_projection(target, tokens, block_r, itemsize),
        configs.grad_a(target, tokens, block_r, itemsize),
        configs.embedding(target, tokens, block_r, itemsize),
        configs.fused_linear(target, tokens, tokens > 1, itemsize, False),
        configs.fused_linear(target, tokens, True, itemsize, True),
    ]
    for table in tables:
        assert 1 <= len(table) <= 3
        for config in table:
            for size in (config.block_m, config.block_n, config.block_k):
                assert size == 0 or (size >= 16 and size & (size - 1) == 0)
            assert config.num_warps in (4, 8)
            assert config.num_stages >= 1


def test_the_default_depends_on_the_tokens_only_where_it_is_the_other_candidate():
    for function in (configs.down_projection, configs.up_projection, configs.grad_a):
        few, many = function("sm_90", 1, 16, 2), function("sm_90", 8192, 16, 2)
        assert few == many[::-1]
        assert few[0] < many[0]  # the same tile but for one side, which is smaller


def test_stages_follow_the_shared_memory():
    large, small = (configs.down_projection(t, 8192, 256, 4)[0].num_stages for t in ("sm_90", "sm_89"))
    assert small < large
