"""What every scene of `folder_world` begins with, made once, and what unbroken commands come to."""

import os
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.forked import Blow, Command
from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama

WEIGHTS = "adapter_model.safetensors"
MODEL = "model.safetensors"
STEPS, SAVE_STEPS = 6, 2
FIXED = ["--rank=2", "--sequence-length=16", "--eval-blocks=2", "--batch-size=2", "--learning-rate=0.02"]
FIXED += [f"--steps={STEPS}", f"--save-steps={SAVE_STEPS}"]
SEEDS = (1, 2, 3)
EARLIER = (8, 9)  # seeds of the adapters that runs go on from and that are transferred
FINISHED, UNFINISHED = "finished", "unfinished"
FILES = {
    "words.txt": TEXT[:3000],
    "held.txt": TEXT[3000:4200],
    "retain.txt": "The quick brown fox jumps over the lazy dog. " * 8,
}


class Identity(NamedTuple):
    """What decides the bits of a run."""

    seed: int
    adapter: str = ""  # the template with the adapter that it goes on from
    has_held_out_text: bool = False


class Templates:
    """Models, texts, and folders of runs that have ended or were killed, each made when it is asked for.

    To be used by several threads.
    """

    def __init__(self):
        self._made = tempfile.TemporaryDirectory(prefix="mica-kills-")
        self.root = Path(self._made.name)
        self.folder = self.root / "templates"
        self.folder.mkdir()
        self._counts: dict[str, Counter] = {}
        self._whole: dict[Identity, bytes] = {}
        self._lock = threading.RLock()
        self._number = 0
        self._save_inputs()

    def close(self) -> None:
        self._made.cleanup()

    @staticmethod
    def run_name(state: str, seed: int) -> str:
        return f"{state}-{seed}"

    def new_folder(self, name: str) -> Path:
        with self._lock:
            self._number += 1
            path = self.root / f"{name}-{self._number}"
        path.mkdir()
        return path

    def path(self, name: str) -> Path:
        """One of base, sibling, earlier-SEED, finished-SEED, unfinished-SEED and moved-SEED."""
        with self._lock:
            path = self.folder / name
            if not path.exists():
                self._make(*name.split("-"))
        return path

    def counts(self, command: str) -> Counter:
        """How many events of each kind a "run" or "transfer" has that nothing befalls."""
        with self._lock:
            if command not in self._counts:
                self.path(f"moved-{EARLIER[0]}" if command == "transfer" else f"earlier-{EARLIER[0]}")
            return self._counts[command]

    def moved(self, seed: int) -> bytes:
        """The weights that the transfer of the adapter of ``seed`` gives."""
        return (self.path(f"moved-{seed}") / MODEL).read_bytes()

    def whole(self, identity: Identity) -> bytes:
        """The adapter of an unbroken run."""
        with self._lock:
            if identity not in self._whole:
                options = [f"--seed={identity.seed}"]
                if identity.adapter:
                    options.append(f"--adapter={self.path(identity.adapter)}")
                if identity.has_held_out_text:
                    options.append("--held-out-text=held.txt")
                output = self.new_folder("whole") / "out"
                self._adapt(str(output), options)
                self._whole[identity] = (output / WEIGHTS).read_bytes()
                shutil.rmtree(output)
            return self._whole[identity]

    def _save_inputs(self) -> None:
        base = tiny_llama()
        sibling = tiny_llama()
        torch.manual_seed(5)
        for weight in sibling.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        for name, model in (("base", base), ("sibling", sibling)):
            model.save_pretrained(self.folder / name)
            byte_tokenizer().save_pretrained(self.folder / name)
        for name, content in FILES.items():
            (self.folder / name).write_text(content, encoding="utf-8")

    def _make(self, state: str, seed: str) -> None:
        name = f"{state}-{seed}"
        if state == "moved":
            earlier = self.path(f"earlier-{seed}")
            argv = ["transfer", f"--adapter={earlier.name}", "--to=sibling", f"--output={name}"]
            self._counts["transfer"] = self._end(argv)
            return
        blow = Blow("step", STEPS, "SIGKILL") if state == UNFINISHED else None
        self._adapt(name, [f"--seed={seed}"], blow)
        if state != UNFINISHED:
            self._whole[Identity(int(seed))] = (self.folder / name / WEIGHTS).read_bytes()

    def _adapt(self, output: str, options: list[str], blow: Blow | None = None) -> None:
        argv = ["adapt", "--model=base", "--text=words.txt", f"--output={output}", *FIXED, *options]
        counts = self._end(argv, blow)
        if blow is None and not os.path.isabs(output):  # what is elsewhere is not counted
            self._counts["run"] = counts

    def _end(self, argv: list[str], blow: Blow | None = None) -> Counter:
        logs = self.new_folder("logs")
        command = Command(argv, self.folder, logs / "log", logs / "cache", [blow] if blow else [])
        status = command.end()
        if status != (-9 if blow else 0):
            raise AssertionError(f"{argv}: {status}\n{command.text()}")
        return Counter() if blow else command.counts()
