"""``mica run``: the same script by python and by it, and which code its adapters run."""

import io
import json
import os
import subprocess
import sys
from zipfile import ZipFile

import pytest
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file

from mica.cli import main
from tests.support.adapt_runs import saved, sibling, transfer, write
from tests.support.processes import ROOT, start
from tests.support.tables import rows
from tests.support.tiny_cli import mica, tiny_llama

STATE = """
import sys
here = sys.modules["__main__"]
print(sys.argv, sys.path[0], __spec__ and __spec__.name, here, vars(here) is globals())
print(sys.stdout.errors, sys.excepthook is sys.__excepthook__)
for name in sorted(vars(here)):
    print(name, type(vars(here)[name]).__name__)
print(__name__, __file__, __cached__, __annotations__, __package__, __builtins__)
"""
ARGUMENTS = ["--explain", "-m", "-c", "", "--", "x y", "--help"]
WAYS = {
    "a script": ["sub/state.py"],
    "a path that is not normal": ["./sub/../link.py"],
    "a folder": ["sub"],
    "a link to a folder": ["./link"],
    "a zip file": ["sub.zip"],
    "standard input": ["-"],
    "a module": ["-m", "sub.state"],
    "a package": ["-m", "sub"],
}
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
    (tmp_path / "link").symlink_to("sub")
    (tmp_path / "link.py").symlink_to("sub/state.py")
    with ZipFile(tmp_path / "sub.zip", "w") as file:
        file.writestr("__main__.py", STATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)  # not torch.distributed's
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(BaseTuner, "__init__", BaseTuner.__init__)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "sub"]:
        del sys.modules[name]


def by_python(*words, script=None):
    """``script``: what it reads from standard input."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *words]
    return subprocess.run(command, input=script, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_program_is_given_what_python_gives_it(folder, capsys, monkeypatch, way):
    words = [*WAYS[way], *ARGUMENTS]
    expected = by_python(*words, script=STATE).stdout.replace("surrogateescape", sys.stdout.errors)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(STATE.encode())))
    assert main(["run", *words]) == 0
    assert capsys.readouterr().out == expected.replace("strict", sys.stdout.errors) != ""


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no python -P")
@pytest.mark.parametrize("words", [["sub"], ["sub/state.py"]], ids=["folder", "script"])
def test_with_safe_paths(folder, words):
    expected = by_python("-P", *words)
    assert by_python("-P", "-m", "mica", "run", *words).stdout == expected.stdout != ""


FAILURES = {
    "twice": "def f():\n    raise ValueError('x')\n\ntry:\n    f()\nexcept ValueError:\n    {}['y']\n",
    "by Ctrl-C": "raise KeyboardInterrupt",
    "by a generator's end": "raise GeneratorExit",
    "by asyncio": "import asyncio\nraise asyncio.CancelledError",
    "by an exception of its own": "class Ends(BaseException):\n    pass\n\nraise Ends",
    "in its syntax": "print(\n",
    "under a hook": "import sys\nsys.excepthook = lambda *of: print(of[2].tb_lineno, file=sys.stderr)\n1/0",
}


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("words", ["sub/fails.py", "fails", "-m sub.fails"])
def test_a_traceback_is_the_one_of_python(folder, capsys, how, words):
    """Without a frame of ours; those of runpy are python's, too."""
    (folder / "fails").mkdir()
    for script in folder / "sub" / "fails.py", folder / "fails" / "__main__.py":
        script.write_text(FAILURES[how])
    try:
        mica("run", words)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)  # as Python does at the end
    assert capsys.readouterr().err == by_python(*words.split()).stderr != ""


def test_exit_statuses_and_what_cannot_be_run(folder):
    """The second as python says it, too."""
    (folder / "exits.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="3"):
        mica("run exits.py")
    (folder / "empty").mkdir()
    for words in ["empty"], ["-m", "nowhere"]:
        with pytest.raises(SystemExit) as raised:
            mica("run", *words)
        assert f"{raised.value}\n" == by_python(*words).stderr


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
import atexit, multiprocessing, os, signal, sys, time

def where(x):
    return x, __name__

def is_main():
    print("at exit", vars(sys.modules["__main__"]) is globals(), sys.path[:2])

if __name__ == "__main__":
    import peft  # with which Python itself ends with status 1, and not by the signal

    atexit.register(is_main)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(where, [1]), flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [["sub/ends.py"], ["-m", "sub.ends"]], ids=["script", "module"])
def test_ctrl_c_spawned_processes_and_exit_handlers(folder, words):
    (folder / "sub" / "ends.py").write_text(ENDS)
    expected = by_python(*words)
    done = by_python("-m", "mica", "run", *words)
    assert (done.returncode, done.stdout) == (expected.returncode, expected.stdout)
    assert done.stderr.partition("Traceback")[1:] == expected.stderr.partition("Traceback")[1:]
    assert "KeyboardInterrupt" in done.stderr
    assert "[(1, '__mp_main__')]\nat exit True" in done.stdout


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
