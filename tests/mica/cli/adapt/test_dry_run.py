"""--dry-run says what a run needs and takes, by its first steps, and leaves nothing; the disk's check."""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from transformers import Trainer

from mica.cli.adapt import adapter, base, dry_run
from mica.cli.loading import find_source
from mica.errors import UsageError
from tests.mica.cli.tiny_gguf import write_tiny_gguf
from tests.support.adapt_runs import Process, command, unfinished
from tests.support.adapt_runs import adapter_settings as settings
from tests.support.tiny_cli import adapt, tiny_llama


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where temporary files go; empty after every test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not [path for path in folder.iterdir() if not path.name.startswith("pymp-")]  # multiprocessing's


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that are done."""
    done = []
    step = Trainer.training_step

    def training_step(*args):
        done.append(args[0].state.global_step + 1)
        return step(*args)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return done


def contents(folder: Path) -> dict:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def told(capsys) -> dict[str, str]:
    """Label -> value of the lines that the dry run printed last; of lines without a label, in one."""
    found = {}
    for line in capsys.readouterr().out.splitlines():
        if match := re.match(r"(.{19})  (.*)", line):
            label = match[1].strip()
            found[label] = f"{found.get(label, '')} {match[2]}".strip()
    return found


def test_it_says_what_the_run_would_do_and_leaves_nothing(model_dir, text_file, tmp_path, capsys, steps):
    options = ["--dry-run", "--eval-steps", 5, "--retain", text_file, "--merge", "--log-steps", 1]
    assert adapt(model_dir, text_file, tmp_path / "out", *options) == 0
    assert steps == [1, 2, 3, 4]
    assert not (tmp_path / "out").exists()
    said = told(capsys)
    assert said["trained parameters"].startswith("1,920 of ")
    assert re.fullmatch(r"\w+ 14", said["layers by path"])
    assert said["steps"] == "12 of 2 blocks, 768 tokens"
    assert re.match(r"\d+\.\d\d GiB \(.*\), measured", said["peak memory"]) or sys.platform == "win32"
    assert re.match(
        r"up to .* to be written \(checkpoints .*, adapter .*, merged model .*\), .* free", said["disk"]
    )
    assert re.match(r"\d\d:\d\d estimated: [\d.e-]+ s a step, measured$", said["time"])
    assert "and 4 measurements of perplexity" in said[""]  # at 0, 5, 10 and 12
    assert f"nothing was written to {tmp_path / 'out'}" in said[""]


def test_the_time_is_that_of_the_steps_that_are_left(model_dir, text_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run._Clock, "seconds", lambda self: 60.0)
    monkeypatch.setattr(dry_run, "_seconds_of_measuring", lambda *_: 30.0)
    output = tmp_path / "out"
    assert adapt(model_dir, text_file, output, "--save-steps", 4) == 0
    unfinished(output, tmp_path / "half")
    for folder, option, time in (
        (output, "--overwrite", "14:30"),  # twelve steps, measured at 0, 3, 6, 9 and 12
        (tmp_path / "half", "--resume", "05:00"),  # four steps, measured at 9 and 12
    ):
        before = contents(folder)
        capsys.readouterr()
        options = ["--save-steps", 4, "--eval-steps", 3, option, "--dry-run"]
        assert adapt(model_dir, text_file, folder, *options) == 0
        assert told(capsys)["time"].startswith(f"{time} estimated: 60 s a step")
        assert contents(folder) == before


def test_what_would_fail_at_the_end_is_refused(model_dir, text_file, tmp_path, capsys, steps):
    assert adapt(model_dir, text_file, tmp_path / "out", "--dry-run", "--push-to-hub", "me/x") == 2
    assert "error: --push-to-hub me/x: not possible while HF_HUB_OFFLINE" in capsys.readouterr().err
    assert not steps


@pytest.mark.parametrize(
    ("times", "seconds"), [([0, 9, 10, 11, 12], 1), ([0, 9, 11], 2), ([0, 9], 9), ([0], 0)]
)
def test_the_first_step_counts_only_where_there_is_no_other(times, seconds):
    clock = dry_run._Clock()
    clock.times = times
    assert clock.seconds() == seconds


def with_free(monkeypatch, number: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=number))


@pytest.mark.parametrize("option", ["--dry-run", "--merge"])
def test_a_disk_that_is_too_small_is_refused_before_the_training(
    option, model_dir, text_file, tmp_path, capsys, monkeypatch, steps
):
    with_free(monkeypatch, 100_000)
    assert adapt(model_dir, text_file, tmp_path / "out", option, "--merge") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = rf"mica adapt: error: --output {tmp_path}/out: not enough disk space: up to .*, 0.10 MiB free"
    assert re.fullmatch(said, line)
    assert not steps
    assert not (tmp_path / "out").exists()


def test_what_a_run_needs_is_what_it_writes(model_dir, text_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    options = ["--save-steps", 4, "--merge", "--rank", 16]
    assert adapt(model_dir, text_file, output, *options) == 0
    args = settings(output=output, merge=True, target_modules="all-linear", rank=16, overwrite=False)
    model = adapter.start(tiny_llama(), args)

    def refused(free: int) -> bool:
        with_free(monkeypatch, free)
        try:
            dry_run.check_disk(model, args, output)
        except UsageError:
            return True
        return False

    tensors = {path: path.stat().st_size for path in output.rglob("*.safetensors")}
    tensors |= {path: path.stat().st_size for path in output.rglob("optimizer.pt")}
    in_all = sum(tensors.values())
    assert refused(0)
    for checkpoint in ("checkpoint-8", "checkpoint-12"):
        in_all += sum(size for path, size in tensors.items() if checkpoint in path.parts) / 2  # a third one
        shutil.rmtree(output / checkpoint)
    (output / "adapter_model.safetensors").unlink()
    overhead = 60_000  # names and headers
    assert refused(in_all - overhead)
    assert not refused(in_all)
    (output / "checkpoint-9").mkdir()
    (output / "checkpoint-9" / "optimizer.pt").write_bytes(bytes(70_000))  # makes room
    assert not refused(in_all - overhead)
    shutil.rmtree(output / "checkpoint-9")
    merged = (output / "merged" / "model.safetensors").stat().st_size
    assert dry_run._dense_size(model) == pytest.approx(merged, abs=10_000)
    args.overwrite = True  # and so does the merged model then
    assert not refused(in_all - merged + 10_000)


def test_a_quantised_base_is_merged_in_its_own_size(model_dir):
    pytest.importorskip("bitsandbytes")
    sizes = []
    for quantize in ("nf4", "int8", None):
        args = settings(model=str(model_dir), quantize=quantize, dtype="bfloat16")
        model = adapter.start(base.load(args, find_source(args.model, False)), args)
        sizes.append(dry_run._dense_size(model))
    assert sizes[0] == pytest.approx(sizes[2], rel=0.02)  # norms stay in fp32
    assert sizes[1] == pytest.approx(sizes[2], rel=0.02)


def test_a_gguf_file_is_converted_elsewhere(text_file, tmp_path, capsys):
    pytest.importorskip("gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    assert adapt(tmp_path / "tiny.gguf", text_file, tmp_path / "out", "--dry-run", "--steps", 1) == 0
    assert not (tmp_path / "out").exists()
    said = told(capsys)
    assert re.search(r", base \d", said["disk"])
    assert said["steps"].startswith("1 of 2 blocks")


def in_a_process(cache: Path, *argv: object) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    printed = sys.stdout = open(cache / f"printed-{os.environ['RANK']}", "w", encoding="utf-8")  # noqa: SIM115
    status = command(*argv)
    printed.flush()
    raise SystemExit(status)  # the group has been left


@pytest.mark.slow
def test_two_processes(model_dir, text_file, tmp_path):
    argv = [
        "--model",
        model_dir,
        "--text",
        text_file,
        "--output",
        tmp_path / "out",
        "--steps",
        6,
        "--rank",
        4,
    ]
    argv += ["--sequence-length", 32, "--dry-run"]
    started = Process(in_a_process, tmp_path, *argv, count=2, folder=tmp_path)
    assert started.join() == [0, 0], started.errors()
    printed = [(tmp_path / f"printed-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert "6 of 4 blocks, 768 tokens, on 2 processes" in printed[0]
    assert printed[1] == ""
    assert not (tmp_path / "out").exists()
