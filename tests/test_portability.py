"""What Windows and macOS lack is taken away: the package still trains, saves and runs its commands.

Without Triton, `fcntl` and `resource`, processes by spawn instead of fork, no right to make links, signals of
Windows only, and an output that is not Unicode, as that of a program in a Windows pipe.
"""

import os
import subprocess
import sys

import pytest

from tests.support.imports import ROOT
from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama

ELSEWHERE = """
import builtins, importlib.util, multiprocessing, os, signal, sys

POSIX = {"fcntl", "resource", "grp", "pwd", "termios", "syslog", "posix", "pty", "tty"}
import_module = builtins.__import__

def without(name, scope=None, *args, **options):
    # not for others: psutil, for one, has a part for Linux
    ours = ((scope or {}).get("__name__") or "").partition(".")[0] == "mica"
    if name.partition(".")[0] == "triton" or ours and name in POSIX:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_module(name, scope, *args, **options)

builtins.__import__ = without
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find(name, *args)
multiprocessing.set_start_method("spawn")
sys.path.insert(0, ROOT)

def no_right(*args, **options):
    raise OSError(22, "A required privilege is not held by the client")

os.symlink = os.link = no_right
# torch and the standard library go by os.name, so that these must be here for them
kept = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIGCHLD", "SIGKILL"}
for name in dir(signal):
    if name.startswith("SIG") and name.isupper() and name.isalnum() and name not in kept:
        delattr(signal, name)
"""

TRAINED = """
import torch
import mica.fast
from peft import LoraConfig, PeftModel, get_peft_model
from tests.support.tiny_cli import tiny_llama

config = LoraConfig(init_lora_weights="mica", r=4, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(tiny_llama(), config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
tokens, losses = torch.arange(64).view(2, 32), []
for _ in range(2):
    losses.append(model(input_ids=tokens, labels=tokens).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[1] < losses[0]
assert mica.fast.explain(model).counts() == {"reference": 14}
model.save_pretrained(sys.argv[1])
again = PeftModel.from_pretrained(tiny_llama(), sys.argv[1])
assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)
model.merge_and_unload()
"""

COMMAND = """
from mica.cli import main
sys.exit(main(sys.argv[1:]))
"""


def elsewhere(tmp_path, code, *arguments):
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": ""}
    program = f"ROOT = {str(ROOT)!r}{ELSEWHERE}if __name__ == '__main__':\n    exec({code!r})\n"
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    command = [sys.executable, tmp_path / "program.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    return done.stdout.decode("cp1252")


@pytest.mark.slow
def test_training_of_an_adapter(tmp_path):
    elsewhere(tmp_path, TRAINED, tmp_path / "adapter")


@pytest.mark.slow
def test_mica_adapt_with_a_name_that_its_output_cannot_show(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text, output = tmp_path / "語.txt", tmp_path / "run ε"
    text.write_text(TEXT, encoding="utf-8")
    options = ["--rank", 4, "--steps", 2, "--save-steps", 1, "--sequence-length", 32]
    said = elsewhere(
        tmp_path, COMMAND, "adapt", "--model", "model", "--text", text, "--output", output, *options
    )
    assert "\\u8a9e.txt" in said
    assert (output / "adapter_model.safetensors").exists()
    assert '"peak_memory_bytes": null' in (output / "summary.json").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_other_commands(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    assert "q_proj" in elsewhere(tmp_path, COMMAND, "inspect", "model", "--rank", 4)
    assert "triton" in elsewhere(tmp_path, COMMAND, "doctor").lower()
