"""What the model writes before a run: rows that the run then measures, by the same names."""

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import prediction, roofline
from bench.gpu.roofline import Layer
from bench.measure.peaks import PEAKS
from bench.results import journal
from bench.results.names import (
    ATEN,
    BACKWARD,
    BARE,
    COMPILED_FAST,
    COPY,
    CUBLAS,
    DEVICE_TIME,
    DOWN_A,
    DOWN_B,
    FAST,
    FORWARD,
    GRAD_A,
    STOCK,
    STOCK_16,
    UP_B,
    of_form,
)
from mica.kernels import configs
from tests.support.dry_run import dry_run

DEVICE = "NVIDIA H100 80GB HBM3"
PEAK = PEAKS[DEVICE]
AXES = {"suite": "layer", "tokens": 8192, "out": 4096, "in": 4096, "rank": 16, "dtype": "bfloat16"}
AXES |= {"pass": FORWARD}
LAYER = Layer(8192, 4096, 4096, 16, PEAK.cache)


def predicted(implementation, **axes):
    return prediction.of_layer({**AXES, **axes}, implementation, DEVICE)


def test_each_implementation_of_a_layer_is_that_of_the_model():
    def modelled(launches):
        return roofline.predict(launches, PEAK)

    for part in (FORWARD, BACKWARD):
        axes = {"pass": part}
        assert predicted(BARE, **axes) == modelled(roofline.bare(LAYER, part))
        assert predicted(STOCK, **axes) == modelled(roofline.stock(LAYER, part))
        without_masters = LAYER._replace(has_masters=False)
        assert predicted(STOCK_16, **axes) == modelled(roofline.stock(without_masters, part))
        assert predicted(ATEN, **axes) == modelled(roofline.aten_control(LAYER, part))
        for word in configs.FORM_NAMES:
            expected = modelled(roofline.of_form(word, LAYER, part))
            assert predicted(of_form(word), **axes, suite="forms") == expected
    assert predicted(FAST, dropout=0.05) is None
    assert predicted(FAST, dtype="float32") is None
    assert predicted(COMPILED_FAST) is None
    assert predicted(of_form("fused")) is None  # in the suite of forms only


def test_mica_fast_is_predicted_in_the_form_that_it_takes(monkeypatch):
    forms = {part: predicted(FAST, **{"pass": part}) for part in (FORWARD, BACKWARD)}
    monkeypatch.setitem(configs.FORMS, DEVICE, (configs.Forms(0, 256, "fused", "reference"),))
    fused = roofline.predict(roofline.of_form("fused", LAYER, FORWARD), PEAK)
    assert predicted(FAST) == fused != forms[FORWARD]
    assert predicted(FAST, **{"pass": BACKWARD}) == forms[BACKWARD]  # kernels are demanded


@pytest.mark.parametrize("kernel", [DOWN_A, DOWN_B, UP_B, GRAD_A])
def test_a_copy_moves_the_bytes_of_its_kernel(kernel):
    axes = {"kernel": kernel, "tokens": 8192, "features": 4096, "rank": 16}
    copy, ours, cublas = (prediction.of_kernel(axes, name, PEAK) for name in (COPY, "default", CUBLAS))
    assert copy.moved == ours.moved
    assert copy.seconds < ours.seconds
    large = 8192 * 4096 * 2 * (2 if kernel == UP_B else 1)
    assert 1 <= ours.moved / large < 1.02
    assert cublas.launches == (2 if kernel == DOWN_A else 1)


def test_a_prediction_names_the_cells_that_a_run_then_measures(tmp_path):
    """By the suite of kernels, on tiny shapes; the environment decides which cells there are."""
    injected = "\n".join(
        [
            "from bench.gpu import prediction",
            f"prediction.main([{DEVICE!r}])",
        ]
    )
    done = dry_run(tmp_path, "bench_kernels.py", injected=injected)
    groups = {group.name: group for group in done.result.groups}
    rows = done.result.predictions
    kernels = [one for one in rows if one["group"] in groups]
    assert len(kernels) == 4 * 3
    for one in kernels:
        assert groups[one["group"]].axes["clock"] == DEVICE_TIME
        names = [*groups[one["group"]].timings]
        assert one["implementation"] in (names[0], names[1], names[-1])  # the copy, the default, cuBLAS
    others = {one["group"].partition(",")[0] for one in rows if one["group"] not in groups}
    assert others == {"layer", "forms of a layer"}
    assert {one["device"] for one in rows} == {DEVICE}
    assert not any("dropout" in one["group"] for one in rows)
    entries = journal.read(tmp_path / "journal.jsonl")
    kinds = [entry["kind"] for entry in entries]
    assert kinds.index("sample") > len(kinds) - 1 - kinds[::-1].index("prediction")  # before the first


class FakeRun:
    def __init__(self, folder, device):
        self.file = folder / "run.json"
        self.machine = {"device": device}


def test_a_run_goes_on_without_a_prediction(tmp_path, monkeypatch, capfd):
    gpu.predict(FakeRun(tmp_path, "a card"), False)
    assert "no prediction: bench/measure/peaks.py does not have a card" in capfd.readouterr().out

    def fails(command, **options):
        assert command[-1] == DEVICE
        assert options["env"]["MICA_BACKEND"] == "triton"
        assert options["env"]["TRITON_INTERPRET"] == "0"
        raise gpu.subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(gpu.subprocess, "run", fails)
    gpu.predict(FakeRun(tmp_path, DEVICE), False)
    assert "no prediction: " in capfd.readouterr().out


def test_runs_of_some_stages_have_names_of_their_own():
    assert gpu.default_name([]).endswith("-gpu")
    assert gpu.default_name(["1", "3"]) == f"{gpu.default_name([])}-stages-1-3"
