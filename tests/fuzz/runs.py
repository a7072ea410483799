"""``mica adapt`` at random: broken off and resumed again and again, it ends as the unbroken run.

To the bit, all on one thread. Logs of resumed runs, and full disks, are in tests/mica/cli/adapt.

| what is done | what it must come to |
| --- | --- |
| a signal, at a step or at a write | 130 or 143, from the first step on with a checkpoint of it |
| SIGKILL | no checkpoint is lost |
"""

import json
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from safetensors.torch import load_file

from mica.cli.adapt import checkpoints
from tests.fuzz.actions import FLAG, any_of
from tests.support import forked, moe_models
from tests.support.tiny_cli import TEXT, byte_tokenizer, tiny_llama

MODELS = ["llama", "mixture"]
STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGKILL": -9}
MOMENTS = any_of(0.0, 0.003, 0.01, 0.03)

WEIGHTS = "adapter_model.safetensors"
FIXED = {"rank": 4, "sequence-length": 16, "eval-blocks": 3}
COUNTS = ("steps", "training_tokens", "blocks")
OPTIONS = {  # each is given with one of these values, or left out
    "rank": [1],
    "dropout": [0.2],
    "batch-size": [1],
    "gradient-accumulation-steps": [2],
    "learning-rate": [0.02],
    "scheduler": ["cosine", "constant_with_warmup"],
    "optimizer": ["sgd", "adafactor"],
    "warmup-ratio": [0.3],
    "weight-decay": [0.1],
    "max-grad-norm": [0],
    "dtype": ["bfloat16"],
    "packing": ["stream"],
    "recipe": ["paper"],
    "seed": [7],
    "eval-steps": [2, 3],
    "log-steps": [1, 3],
    "retain": ["retain.txt"],
    "held-out-text": ["retain.txt"],
}


@cache
def inputs() -> tempfile.TemporaryDirectory:
    """Models, texts and the cache of tokens, for all runs of this process."""
    made = tempfile.TemporaryDirectory()
    folder, sizes = Path(made.name), {"vocab_size": 257, "max_position_embeddings": 128}
    for name, model in (("llama", tiny_llama()), ("mixture", moe_models.qwen3_moe(**sizes))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    rows = (json.dumps({"text": TEXT[31 * n : 91 + 32 * n]}) for n in range(60))
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "retain.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8, encoding="utf-8")
    return made


class Runs(RuleBasedStateMachine):
    """One run unbroken, in ``whole``, and one in ``broken``, which the rules are done to."""

    def __init__(self):
        super().__init__()
        self.inputs = Path(inputs().name)
        self.scratch = tempfile.TemporaryDirectory(dir=self.inputs)
        self.folder = Path(self.scratch.name)
        self.outside = tempfile.TemporaryDirectory()  # what is printed, and the cache of tokens
        self.output = self.folder / "broken"
        self.options: list[str] = []
        self.is_sound = False
        self.step = 0  # of the last complete checkpoint, at least
        self.accumulation = self.save_steps = 1

    @initialize(data=st.data())
    def start(self, data):
        model = data.draw(st.sampled_from(MODELS))
        self.weights = self.inputs / model / "model.safetensors"
        steps, self.save_steps = data.draw(st.integers(2, 8)), data.draw(any_of(1, 1, 2, 3))
        options = {"model": model, "text": "rows.jsonl", "steps": steps, **FIXED}
        options["save-steps"] = self.save_steps
        for name, values in OPTIONS.items():
            value = data.draw(st.sampled_from([None] * 2 + values))
            options |= {name: value} if value is not None else {}
        if model == "mixture":  # PEFT has no dropout for parameters
            options.pop("dropout", None)
        self.accumulation = options.get("gradient-accumulation-steps", 1)
        self.options = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        if data.draw(FLAG):
            self.options.append("--gradient-checkpointing")
        if model == "mixture" and data.draw(FLAG):
            self.options.append("--no-experts")

    def unbroken(self) -> None:
        """Not before a rule needs it: hypothesis draws starts that nothing follows."""
        assert self.adapt("whole", *self.options) == 0, self.errors
        self.base = self.weights.read_bytes()
        self.adapter = load_file(self.folder / "whole" / WEIGHTS)
        self.is_sound = True

    def adapt(self, name: str, *options: str, blows: Sequence[forked.Blow] = ()) -> int:
        """The exit status of a run; one that failed has said so in one line."""
        argv = ["adapt", "--output", f"{self.folder.name}/{name}", *options]
        outside = Path(self.outside.name)
        log = outside / f"log {len(list(outside.iterdir()))}"
        status, self.errors = forked.run(argv, self.inputs, log, outside / "cache", blows)
        assert "Traceback" not in self.errors, self.errors
        lines = [line for line in self.errors.splitlines() if " error: " in line]
        assert len(lines) == (status == 2), self.errors
        return status

    def go_on(self, blows: Sequence[forked.Blow] = ()) -> int:
        """As a user would: resume what can be resumed, else begin."""
        options = ["--resume"] if self.newest() else self.options
        return self.adapt("broken", *options, blows=blows)

    def newest(self) -> Path | None:
        return checkpoints.latest(self.output)

    def newest_step(self) -> int:
        latest = self.newest()
        return checkpoints.step(latest) if latest else 0

    def compare(self) -> None:
        """No checkpoint is lost, and B is the unbroken run's in each."""
        latest, step = self.newest(), self.newest_step()
        assert step >= self.step, f"checkpoint {self.step} is lost, the last is {step}"
        self.step = step
        if latest:
            for name, weight in load_file(latest / WEIGHTS).items():
                assert "lora_A" in name or torch.equal(weight, self.adapter[name]), f"step {step}: {name}"

    @rule(where=any_of("step", "write"), at=st.integers(0, 59), what=any_of(*STATUS), moment=MOMENTS)
    def broken_off(self, where, at, what, moment):
        if not self.is_sound:
            self.unbroken()
        at = at % 8 if where == "step" else at
        status = self.go_on([forked.Blow(where, at + 1, what, moment)])
        assert status in (0, STATUS[what]), f"{status}: {self.errors}"
        is_stopped = status in (130, 143)
        if where == "step" and status:
            done = self.step + at // self.accumulation
            self.step = done + 1 if is_stopped else max(self.step, done - done % self.save_steps)
        self.compare()

    def teardown(self):
        """Undisturbed to the end; only a run of which nothing has failed yet."""
        try:
            if self.is_sound:
                assert self.go_on() == 0, self.errors
                self._compare_results()
        finally:
            self.scratch.cleanup()
            self.outside.cleanup()

    def _compare_results(self):
        whole, broken = self.folder / "whole", self.output
        assert (whole / WEIGHTS).read_bytes() == (broken / WEIGHTS).read_bytes(), "another adapter"
        assert self.weights.read_bytes() == self.base, "the base has changed"
        reports = [json.loads((folder / "summary.json").read_text()) for folder in (whole, broken)]
        perplexities = ("perplexity_before", "perplexity_after", "retain_after")
        expected, found = ({name: report[name] for name in (*COUNTS, *perplexities)} for report in reports)
        assert found == expected, f"{found}, unbroken {expected}"
