"""The check of graphs, streams, compilers and checkpoints, as far as a CPU goes: errors are reported."""

import pytest

from tests.support.dry_run import dry_run

NEEDS_GPU = {
    *(
        f"test_a_graph_follows_an_update_of_a[{part}-{rank}]"
        for part in ("alone", "step")
        for rank in (4, 16)
    ),
    *(f"test_graphed_callables[{rank}]" for rank in (4, 16)),
    "test_two_streams_share_nothing",
    "test_a_backward_follows_its_forward_to_another_stream",
    "test_a_model_under_reduce_overhead",
    *(
        f"test_compile_fullgraph[{mode}-{rank}]"
        for mode in ("default", "reduce-overhead")
        for rank in (4, 16)
    ),
}

# Each call of a layer draws another seed, and a compiled one gives 2 % too much.
BROKEN = """
import os
import torch
from mica.fast.forward import decide

def dropout(p, x):
    seed = torch.tensor([int.from_bytes(os.urandom(7), "big")]) if p else None
    return (p, seed)

decide.dropout = dropout

compile = torch.compile

def broken(module, **options):
    compiled = compile(module, **options)
    return lambda x: compiled(x) * 1.02

torch.compile = broken
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    return dry_run(tmp_path_factory.mktemp("results"), "check_streams.py", injected=BROKEN)


def test_what_needs_a_gpu_says_so(broken):
    skipped = {name: why for name, why in broken.whys.items() if broken.outcomes[name] == "skipped"}
    assert skipped.keys() == NEEDS_GPU
    assert all("needs a GPU" in why for why in skipped.values())


def test_what_is_wrong_is_reported(broken):
    failed = {name for name, outcome in broken.outcomes.items() if outcome == "failed"}
    compiled = {f"test_compile_fullgraph[{how}-{rank}]" for how in ("eager", "aot_eager") for rank in (4, 16)}
    assert failed == compiled | {"test_a_checkpoint_draws_the_same_mask"}
    assert "a checkpointed layer: other bits of" in broken.whys["test_a_checkpoint_draws_the_same_mask"]
    assert "call 0: y is 2.0" in broken.whys["test_compile_fullgraph[eager-16]"]


def test_nothing_passes_without_kernels(tmp_path):
    done = dry_run(
        tmp_path, "check_streams.py", "-k", "checkpoint", injected="import mica.fast\nmica.fast.disable()"
    )
    assert set(done.outcomes.values()) == {"failed"}
