"""What Windows and macOS lack is taken away: the package still trains, saves and runs its commands.

No Triton, `fcntl` or `resource`, processes by spawn instead of fork, no right to make links, no signals but
those of Windows, and an output that is not Unicode, as that of a program in a Windows pipe.
"""

import os
import subprocess
import sys

import pytest

from tests.support.imports import ROOT
from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama

PROGRAM = """
import builtins, importlib.util, multiprocessing, os, signal, sys

POSIX = {"fcntl", "resource", "grp", "pwd", "termios", "syslog", "posix", "pty", "tty"}
import_module, find = builtins.__import__, importlib.util.find_spec

def without(name, scope=None, *args, **options):
    # of our own imports: psutil, for one, has a part for Linux
    ours = ((scope or {}).get("__name__") or "").partition(".")[0] == "mica"
    if name.partition(".")[0] == "triton" or ours and name in POSIX:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return import_module(name, scope, *args, **options)

def no_right(*args, **options):
    raise OSError(22, "A required privilege is not held by the client")

builtins.__import__, os.symlink, os.link = without, no_right, no_right
importlib.util.find_spec = lambda name, *args: None if name == "triton" else find(name, *args)
multiprocessing.set_start_method("spawn")
# Python and torch go by os.name: these must be here for them
kept = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV", "SIGCHLD", "SIGKILL"}
for name in set(dir(signal)) - kept:
    if name.startswith("SIG") and name.isalnum() and name.isupper():
        delattr(signal, name)

import torch
import mica.fast
from mica.cli import main
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
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(tiny_llama(), "adapter")
assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)

options = "--rank 4 --steps 2 --save-steps 1 --sequence-length 32".split()
for command in (
    ["adapt", "--model", "model", "--text", "語.txt", "--output", "run ε", *options],
    ["inspect", "model", "--rank", "4"],
    ["doctor"],
):
    assert main(command) == 0, command
"""


@pytest.mark.slow
def test_a_training_and_the_commands(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "語.txt").write_text(TEXT, encoding="utf-8")
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    said = done.stdout.decode("cp1252")
    assert "run \\u03b5" in said
    assert "q_proj" in said
    assert (tmp_path / "run ε/adapter_model.safetensors").exists()
    assert '"peak_memory_bytes": null' in (tmp_path / "run ε/summary.json").read_text(encoding="utf-8")
