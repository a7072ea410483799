"""``mica run``: the same script by python and by it, and which code its adapters run."""

import json
import subprocess
import sys

import pytest
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file

from mica.cli import main
from tests.support.adapt_runs import saved, sibling, transfer, write
from tests.support.processes import start
from tests.support.tables import rows
from tests.support.tiny_cli import mica, tiny_llama

STATE = """
import sys
here = sys.modules["__main__"]
print(sys.argv, __name__, __file__, sys.path[0], __spec__ and __spec__.name, vars(here) is globals())
print(sys.stdout.errors, sys.excepthook is sys.__excepthook__)
"""
ARGUMENTS = ["--explain", "-m", "", "--", "x y", "--help"]
WAYS = {"script": ["sub/state.py"], "module": ["-m", "sub.state"], "package": ["-m", "sub"]}
TRAINS = """
import torch
from peft import LoraConfig, get_peft_model
from tests.support.tiny_cli import tiny_llama

def train():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
    ids = torch.arange(64).view(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()

train()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the script sub/state.py; what a run changes in this process is undone."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "state.py").write_text(STATE)
    (tmp_path / "sub" / "__main__.py").write_text(STATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # not torch.distributed's
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(BaseTuner, "__init__", BaseTuner.__init__)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "sub"]:
        del sys.modules[name]


def by_python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_program_is_given_what_python_gives_it(folder, capsys, way):
    words = [*WAYS[way], *ARGUMENTS]
    expected = by_python(*words).stdout.replace("surrogateescape", sys.stdout.errors)
    assert main(["run", *words]) == 0
    assert capsys.readouterr().out == expected.replace("strict", sys.stdout.errors)


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    raise ValueError('x')\n\ntry:\n    f()\nexcept ValueError:\n    {}['y']\n",
        "raise KeyboardInterrupt",
        "print(\n",
        "import sys\nsys.excepthook = lambda kind, error, at: print(at.tb_lineno, file=sys.stderr)\n1 / 0",
    ],
)
def test_a_traceback_has_the_program_s_frames_alone(folder, capsys, code):
    script = folder / "fails.py"
    script.write_text(code)
    with pytest.raises((Exception, KeyboardInterrupt)) as raised:
        mica("run", script)
    sys.excepthook(raised.type, raised.value, raised.tb)  # as Python does at the end
    assert capsys.readouterr().err == by_python(str(script)).stderr != ""


def test_a_module_that_fails_and_exit_statuses(folder, capsys):
    (folder / "sub" / "fails.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError) as raised:
        mica("run -m sub.fails")
    sys.excepthook(raised.type, raised.value, raised.tb)
    _, first, *_ = capsys.readouterr().err.splitlines()
    assert first == f'  File "{folder}/sub/fails.py", line 1, in <module>'
    (folder / "exits.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="3"):
        mica("run exits.py")


@pytest.mark.parametrize(
    ("options", "said"), rows(" => 14 layers: 14 reference\n--no-lora => 14 layers: 14 peft")
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_ran_is_shown_at_the_end(folder, capsys, monkeypatch, options, said, rank):
    """Of a model that nothing holds any more."""
    monkeypatch.setenv("RANK", rank)
    (folder / "train.py").write_text(TRAINS)
    assert mica("run --explain", options, "train.py") == 0
    assert capsys.readouterr().err.count(said) == (rank == "0")


ENDS = """
import atexit, multiprocessing, os, signal, time

def where(x):
    return x, __name__

if __name__ == "__main__":
    import peft  # with which Python itself ends with status 1, and not by the signal

    atexit.register(print, "at exit")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(where, [1]), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.slow
def test_ctrl_c_spawned_processes_and_exit_handlers(folder):
    (folder / "ends.py").write_text(ENDS)
    expected = by_python("ends.py")
    done = start("mica", "run", folder / "ends.py")
    assert (done.returncode, done.stdout) == (expected.returncode, expected.stdout)
    assert done.stderr.partition("Traceback")[1:] == expected.stderr.partition("Traceback")[1:]
    assert "KeyboardInterrupt" in done.stderr
    assert "[(1, '__mp_main__')]\nat exit\n" in done.stdout


SFT = """--use_peft --lora_target_modules all-linear --lora_dropout 0 --max_length 32 --max_steps 4
--logging_steps 1
--optim sgd --learning_rate 1 --dtype float32 --bf16 False --use_cpu --report_to none"""


@pytest.mark.slow
def test_a_module_of_trl_has_stock_s_losses_and_its_adapter_transfers(folder):
    pytest.importorskip("trl")
    base = saved(tiny_llama(initializer_range=0.3), folder / "base")
    (folder / "data").mkdir()
    write(folder / "data" / "train.jsonl", [{"text": f"{n} times {n} is {n * n}; " * 3} for n in range(32)])
    options = ["--model_name_or_path", base, "--dataset_name", folder / "data", *SFT.split()]
    losses = []
    for words in ([], ["mica", "run", "--explain", "-m"]):
        output = folder / f"by {'mica' if words else 'python'}"
        done = start(*words, "trl.scripts.sft", *options, "--output_dir", output)
        assert done.returncode == 0, done.stderr
        state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
        losses.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert "14 layers: 14 operators (CPU)" in done.stderr
    stock, ours = losses
    assert ours == pytest.approx(stock, rel=1e-5)
    assert ours[-1] < ours[0]
    chat = saved(sibling(tiny_llama()), folder / "chat")
    assert transfer(output, chat, folder / "out") == 0
    before, after = (load_file(path / "model.safetensors") for path in (chat, folder / "out"))
    assert sum((after[name] != before[name]).any() for name in before) == 14


GLOO = """
import os
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from tests.support.tiny_cli import tiny_llama

dist.init_process_group("gloo")
model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear"))
parallel = DistributedDataParallel(model)
rank = dist.get_rank()
ids = torch.arange(32).view(1, 32) + rank
parallel(input_ids=ids, labels=ids).loss.backward()
gradients = [weight.grad.sum() for weight in model.parameters() if weight.requires_grad]
print(f"gradients {torch.stack(gradients).sum():.5f}\\n", end="")  # under python -u each argument is a write
dist.barrier()  # the launcher stops the other process as soon as one has failed
dist.destroy_process_group()
raise SystemExit(0 if rank else 3)
"""


@pytest.mark.slow
def test_two_processes_of_torchrun(folder):
    (folder / "gloo.py").write_text(GLOO)
    launch = "torch.distributed.run", "--nproc-per-node", 2, "-m", "mica", "run", "--explain"
    done = start(*launch, folder / "gloo.py", MASTER_PORT="0")
    assert done.returncode == 1, done.stderr  # the launcher's, whichever process has failed
    assert "exitcode  : 3" in done.stderr
    first, second = [line for line in done.stdout.splitlines() if line.startswith("gradients")]
    assert first == second
    assert done.stderr.count("14 layers: 14 operators (CPU)") == 1
