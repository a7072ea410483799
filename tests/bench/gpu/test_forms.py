"""The rows of the table of forms that a run would give."""

from bench.gpu.forms import table
from bench.results import names
from bench.results.names import BACKWARD, DEVICE_TIME, FORWARD, WALL
from bench.results.schema import Group, Result, Timing
from mica.kernels.configs import Forms

# seconds of split, fused, descriptor, PyTorch; of two layers
TIMES = {
    (8192, FORWARD): [(3.0, 2.0, 5.0, 4.0), (3.0, 3.5, 5.0, 4.0)],  # fused is faster for both together
    (8192, BACKWARD): [(3.0, 4.0, 1.0, 4.0), (3.0, 4.0, 1.0, 4.0)],
    (512, FORWARD): [(3.0, 4.0, None, 1.0)],
    (512, BACKWARD): [(3.0, 4.0, 5.0, 3.5)],
}


def result(clock):
    groups = []
    for (tokens, part), layers in TIMES.items():
        for times in layers:
            timed = zip((names.FAST, names.FUSED, names.DESCRIPTOR, names.PYTORCH), times, strict=True)
            timings = {name: Timing([seconds]) for name, seconds in timed if seconds}
            axes = {"suite": "forms", "tokens": tokens, "rank": 16, "pass": part, "clock": clock}
            groups.append(Group("a layer", axes, timings))
    return Result({"device": "a card"}, groups)


def test_the_fastest_of_all_layers_of_a_size_the_most_tokens_first():
    text = table(result(DEVICE_TIME))
    rows = eval("{" + text + "}", {"Forms": Forms})
    assert rows == {"a card": (Forms(8192, 16, "fused", "descriptor"), Forms(512, 16, "aten", "split"))}


def test_nothing_where_nothing_was_timed():
    assert table(result(WALL)) == table(Result({"device": "a card"}, [])) == ""
