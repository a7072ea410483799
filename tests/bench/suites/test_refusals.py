"""What happens to a wrong implementation, and a dry run: suites as a run starts them."""

from bench.results import names
from bench.results.names import ATEN, BARE, DEVICE_TIME, FAST, GRAPH, PYTORCH, STOCK, STOCK_16

LAYER = "(bench_layer and 1024x576x576-r16-bfloat16 and backward)"
HOST = "(bench_host and not generation and float32 and backward)"


def test_a_wrong_operator_gets_no_number_and_the_others_do(measured):
    code, result, output = measured(["bench_layer.py", "bench_host.py"], f"{LAYER} or {HOST}", "wrong")
    assert code == 1, output
    layer, host_layer, host_block = result.groups
    assert layer.axes["suite"] == "layer"
    assert {BARE, STOCK, STOCK_16, ATEN, names.LORA} <= layer.timings.keys()
    assert {BARE, STOCK, ATEN, names.KERNELS} <= host_layer.timings.keys()
    assert {BARE, STOCK, names.KERNELS} <= host_block.timings.keys()
    assert [one["implementation"] for one in result.refused] == [FAST, PYTORCH, PYTORCH]
    for group in result.groups:
        assert not group.timings.keys() & {FAST, PYTORCH}
    of_layer, _, of_block = (one["why"] for one in result.refused)
    assert of_layer.startswith("the relative error of y is 1.0")
    assert of_block.startswith("y is ")


def test_a_dry_run_times_every_implementation_by_every_clock(measured):
    dry = {"MICA_BENCH_SIZE": "dry", "TRITON_INTERPRET": "1", "MICA_BACKEND": "triton"}
    code, result, output = measured(["bench_block.py"], **dry)
    assert code == 0, output
    assert not result.refused
    assert [group.axes["clock"] for group in result.groups] == [names.WALL, DEVICE_TIME, GRAPH]
    for group in result.groups:
        assert group.timings.keys() == {BARE, STOCK, STOCK_16, FAST}
