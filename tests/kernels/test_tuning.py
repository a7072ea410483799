import json
import os
import subprocess
import sys
import time

import pytest
import torch

from mica.kernels import configs, tuning
from mica.kernels.up_projection import up_projection_
from tests.support.kernel_cases import DEVICE, operand

HERE = torch.device(DEVICE)


@pytest.fixture(autouse=True)
def table(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "tuning.json"
    monkeypatch.setenv("MICA_TUNE_FILE", str(file))
    monkeypatch.setenv("MICA_TUNE", "1")
    tuning.forget()
    yield file
    tuning.forget()


def choices(slow=0.02, quick=0.0, calls=None):
    calls = calls if calls is not None else []
    return {
        "slow": lambda: (calls.append("slow"), time.sleep(slow)),
        "quick": lambda: (calls.append("quick"), time.sleep(quick)),
    }


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's clock does not see a host's sleep")
def test_the_fastest_is_taken_and_kept(table):
    calls = []
    assert tuning.pick("op", HERE, (16, "bf16"), choices(calls=calls)) == "quick"
    assert calls.count("slow") == calls.count("quick") == 3
    assert tuning.pick("op", HERE, (16, "bf16"), choices(calls=calls)) == "quick"
    assert len(calls) == 6
    (entry,) = json.loads(table.read_text())
    assert torch.__version__ in entry
    assert "16 | bf16" in entry


def test_another_process_uses_the_file_without_measuring(table, monkeypatch):
    table.parent.mkdir()
    entry = " | ".join(["op", tuning.machine(HERE), "16"])
    table.write_text(json.dumps({entry: "slow"}))
    monkeypatch.setenv("MICA_TUNE", "0")
    tuning.forget()
    calls = []
    assert tuning.pick("op", HERE, (16,), choices(calls=calls)) == "slow"
    assert not tuning.is_idle()
    assert tuning.pick("op", HERE, (32,), choices(calls=calls)) == "slow"  # no entry: the default
    table.write_text(json.dumps({entry: "gone"}))
    tuning.forget()
    assert tuning.pick("op", HERE, (16,), choices(calls=calls)) == "slow"
    assert not calls


def test_off_by_default(table, monkeypatch):
    monkeypatch.delenv("MICA_TUNE")
    tuning.forget()
    assert tuning.is_idle()
    calls = []
    assert tuning.pick("op", HERE, (16,), choices(calls=calls)) == "slow"
    assert not calls
    assert not table.exists()


def test_entries_of_others_are_kept(table):
    tuning.pick("op", HERE, (1,), choices(0, 0))
    other = json.loads(table.read_text()) | {"from another process": "x"}
    table.write_text(json.dumps(other))
    tuning.pick("op", HERE, (2,), choices(0, 0))
    assert "from another process" in json.loads(table.read_text())
    assert len(json.loads(table.read_text())) == 3
    assert os.listdir(table.parent) == ["tuning.json"]


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"a": 1}', "[" * 10**6], ids=["cut", "list", "number", "deep"]
)
def test_a_damaged_file_is_said_and_replaced(table, caplog, content):
    table.parent.mkdir()
    table.write_text(content)
    tuning.pick("op", HERE, (1,), choices(0, 0))
    assert "is not used" in caplog.text
    assert len(json.loads(table.read_text())) == 1


def test_an_unwritable_place_costs_a_line_in_the_log(monkeypatch, caplog):
    monkeypatch.setenv("MICA_TUNE_FILE", "/proc/none/tuning.json")
    tuning.forget()
    assert tuning.pick("op", HERE, (1,), choices(0, 0)) in ("slow", "quick")
    assert "cannot be kept" in caplog.text


def broken():
    raise RuntimeError("out of resource: shared memory")


def test_a_choice_that_does_not_run_is_left_out():
    assert tuning.pick("op", HERE, (1,), {"broken": broken, "fine": lambda: None}) == "fine"
    with pytest.raises(RuntimeError, match="none of the configurations"):
        tuning.pick("op", HERE, (2,), {"broken": broken, "too": broken})


def test_operands_updated_in_place_come_back():
    tensor = torch.ones(3, device=DEVICE)
    tuning.pick("op", HERE, (1,), {"a": lambda: tensor.add_(1), "b": lambda: tensor.mul_(9)}, [tensor])
    assert torch.equal(tensor.cpu(), torch.ones(3))
    with pytest.raises(RuntimeError):
        tuning.pick("op", HERE, (2,), {"a": lambda: (tensor.add_(1), broken()), "b": broken}, [tensor])
    assert torch.equal(tensor.cpu(), torch.ones(3))


def test_a_tuned_kernel_updates_once(table):
    base, h, factor = (
        operand(40, 24, torch.float32),
        operand(40, 3, torch.float32),
        operand(3, 24, torch.float32),
    )
    exact = base.double() + h.double() @ factor.double()
    up_projection_(base, h, factor)
    assert torch.allclose(base.double(), exact, atol=1e-5)
    ((entry, config),) = json.loads(table.read_text()).items()
    assert entry.startswith("up_projection | ")
    assert config in {"x".join(map(str, c)) for c in configs.up_projection("sm_90", 40, 16, 4)}


def test_token_counts_share_a_bucket():
    assert [tuning.bucket(n) for n in (0, 1, 2, 3, 1000, 1024, 1025)] == [1, 1, 2, 4, 1024, 1024, 2048]


def test_the_default_place():
    script = "from mica.kernels import tuning; print(tuning.path())"
    environment = {**os.environ, "HF_HOME": "/somewhere", "MICA_TUNE_FILE": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "/somewhere/mica/tuning.json"


@pytest.mark.parametrize("variable", ["MICA_TUNE", "MICA_TUNE_FILE", "HF_HOME"])
def test_a_changed_environment_is_another_state(monkeypatch, variable):
    before = tuning.state()
    assert tuning.state() == before
    monkeypatch.setenv(variable, "2")
    assert tuning.state() != before


def test_forgetting_is_another_state(monkeypatch):
    monkeypatch.setenv("MICA_TUNE", "0")
    tuning.forget()
    before = tuning.state()
    assert tuning.is_idle()
    tuning.forget()
    assert tuning.state() != before


@pytest.mark.parametrize(("measuring", "capturing"), [("1", True), ("1", False), ("0", True)])
def test_a_capture_settles_nothing_that_is_to_be_measured(monkeypatch, measuring, capturing):
    monkeypatch.setenv("MICA_TUNE", measuring)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert tuning.is_settled(torch.device("cuda")) == (measuring == "0" or not capturing)
    assert tuning.is_settled(torch.device("cpu"))
