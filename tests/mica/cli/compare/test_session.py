"""`mica compare` end to end on a tiny model: its page, what fails, what is refused, and going on."""

import json
import math
import os
import random
import shlex
import shutil
import signal
import time
from statistics import mean

import pytest
import torch

from mica.cli import main
from mica.cli.compare import page, session
from mica.cli.compare.again import again
from tests.support.tiny_cli import TEXT, adapt
from tests.support.tiny_comparison import KEPT, RATES, arguments, compare, report, started, untimed


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """The folder of a comparison of all four methods; not to be changed."""
    folder = tmp_path_factory.mktemp("comparison")
    assert compare(folder, model_dir, folder / "out", "--methods", "mica,lora,random,full", *RATES) == 0
    return folder / "out"


def test_the_page_and_its_data(finished):
    text = (finished / "README.md").read_text()
    found = report(finished)
    names = {"mica-run.json", "settings.json", "runs", "compare.json", "README.md", "compare.png"}
    assert {path.name for path in finished.iterdir()} == names
    assert text.startswith("# model")
    assert "\n".join(page.sentences(found)) in text
    assert page.markdown(found) == text
    for title in ("## At equal forgetting", "## Costs", "## To do it again"):
        assert title in text
    phases = [one["phase"] for one in found["results"].values()]
    assert [phases.count(phase) for phase in (1, 2, 3, 4)] == [5, 8, 4, 4]
    costs = found["costs"]
    assert costs["lora"]["trained_parameters"] < 1.1 * costs["mica"]["trained_parameters"]
    assert costs["random"]["trained_parameters"] == costs["mica"]["trained_parameters"]
    assert costs["full"]["bytes"] > costs["mica"]["bytes"]


def test_mica_adapt_repeats_the_best_training(finished, tmp_path):
    """Its command gives the losses that the comparison has measured: same blocks, order and schedule."""
    found = report(finished)
    (row,) = [row for row in found["equal"]["methods"] if row["method"] == "mica"]
    line = again(found, row | {"share": 1.0})
    command = shlex.split(line.removeprefix("```sh\n").removesuffix("\n```"))
    command[command.index("--output") + 1] = str(tmp_path / "run")
    command = [word for word in command if word != "--keep-best"]  # the last step is compared
    assert command[0] == "mica"
    assert main(command[1:]) == 0
    (run,) = [
        one
        for one in found["results"].values()
        if (one["method"], one["phase"], one["rate"]) == ("mica", 3, row["rate"])
    ]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = run["points"][-1]
    held_out = [*last["validation"], *last["test"]]
    retained = [*last["retained"], *last["retained, the rest"]]
    assert summary["perplexity_after"] == pytest.approx(math.exp(mean(held_out)), rel=1e-6)
    assert summary["retain_after"] == pytest.approx(math.exp(mean(retained)), rel=1e-6)


def test_a_rate_that_diverges_is_named_and_the_rest_goes_on(model_dir, tmp_path, capsys):
    assert compare(tmp_path, model_dir, tmp_path / "out", "--rates", "mica=0.02,1e30") == 0
    line = (
        "mica, learning rate 1e+30, 2 steps, seed 0: diverged: loss on the validation text nan after step 2"
    )
    assert line in capsys.readouterr().err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## Failed\n\n- mica, learning rate 1e+30, seed 0: diverged" in text
    rows = {row["method"]: row["rate"] for row in report(tmp_path / "out")["any"]["methods"]}
    assert rows["mica"] == 0.02


def test_a_method_that_runs_out_of_memory_is_left_out(model_dir, tmp_path, capsys, monkeypatch):
    train = session.train

    def trained(model, data, args, *more):
        if args.rank == 2:  # LoRA's
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return train(model, data, args, *more)

    monkeypatch.setattr(session, "train", trained)
    assert compare(tmp_path, model_dir, tmp_path / "out", "--methods", "mica,random,lora") == 0
    assert "lora, learning rate 0.01, 4 steps, seed 0: out of memory" in capsys.readouterr().err
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- lora, learning rate 0.01, seed 0: out of memory; the method was left out" in text
    assert {row["method"] for row in report(tmp_path / "out")["any"]["methods"]} == {"mica", "random"}


def test_another_error_is_not_taken_for_a_full_memory(model_dir, tmp_path, monkeypatch):
    def trained(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(session, "train", trained)
    with pytest.raises(RuntimeError, match="a bug"):
        compare(tmp_path, model_dir, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--retain", "nowhere.txt"), "--retain nowhere.txt: no such file"),
        (("--methods", "mica"), "argument --methods: must be two or more different methods, not 'mica'"),
        (("--methods", "mica,lore"), "argument --methods: 'lore' is not one of mica, lora, random, full"),
        (("--rates", "lore=1"), "argument --rates: must be METHOD=RATE,RATE,... with a method of mica"),
        (("--rates", "mica=1,zero"), "argument --rates: must be a number above 0, not 'zero'"),
        (("--rates", "full=1e-4"), "--rates full: --methods does not name it"),
        (("--rank", "64"), "--rank 64: "),
        (("--target-modules", "q_porj"), "did you mean 'q_proj'?"),
        (("--resume", "--overwrite"), "--resume and --overwrite: use only one"),
        (("--resume",), "nothing to continue"),
        (("--sequence-length", "3000"), "--sequence-length 3000: the model takes at most 128 tokens"),
        (("--held-out", "0.001"), "1 blocks of 32 tokens are held out, 3 needed"),
    ],
)
def test_mistakes_are_one_line(model_dir, tmp_path, capsys, options, message):
    assert compare(tmp_path, model_dir, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("mica compare: error")]
    assert message in line
    assert not (tmp_path / "out").exists()  # so that the same command, corrected, is not refused


def test_a_missing_retained_text_is_one_line(capsys):
    assert main(["compare", "--model", "m", "--text", "t", "--output", "o"]) == 2
    error = "mica compare: error: the following arguments are required: --retain\n"
    assert capsys.readouterr().err == error


def test_a_budget_that_is_too_small_names_one_that_is_not(model_dir, tmp_path, capsys):
    argv = arguments(tmp_path, model_dir, tmp_path / "out", "--budget", "0.01")
    del argv[argv.index("--steps") : argv.index("--steps") + 2]
    assert main(argv) == 2
    assert "--budget 0.01: at least 1 minutes are needed here" in capsys.readouterr().err


def test_a_finished_comparison_writes_its_page_again(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "copy")
    before = (tmp_path / "copy" / "README.md").read_bytes()
    (tmp_path / "copy" / "README.md").unlink()
    assert main(["compare", "--resume", "--output", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "README.md").read_bytes() == before


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_same_page(model_dir, tmp_path):
    """kill -9 of the whole command, helpers too, at random moments."""
    options = ("--methods", "mica,lora,full", "--rates", "full=0.001,0.002", "--jobs", 2)
    argv = arguments(tmp_path, model_dir, tmp_path / "whole", *options)
    whole = started(argv)
    begin = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()
    seconds = time.monotonic() - begin
    argv[argv.index("--output") + 1] = str(tmp_path / "killed")
    generator = random.Random(os.urandom(8))
    for _ in range(5):
        process = started(argv)
        time.sleep(generator.uniform(0.3, 0.8) * seconds)
        is_begun = (tmp_path / "killed" / "settings.json").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        if is_begun and "--resume" not in argv:
            argv.append("--resume")
    process = started(argv)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("-m", "torch.distributed.run", "--nproc-per-node", "2")])
def test_the_processes_of_a_launcher_share_the_trainings(model_dir, tmp_path, launcher):
    argv = arguments(tmp_path, model_dir, tmp_path / "alone")
    alone = started(argv)
    assert alone.wait() == 0, alone.stderr.read()
    argv[argv.index("--output") + 1] = str(tmp_path / "both")
    at = argv.index("--jobs")
    del argv[at : at + 2]
    both = started(argv, launcher)
    errors = both.communicate()[1]
    assert both.returncode == 0, errors
    assert untimed(tmp_path / "both") == untimed(tmp_path / "alone")
    results = report(tmp_path / "both")["results"].values()
    assert {one["jobs"] for one in results} == {2}
    assert {one["worker"] for one in results} == {0, 1}


@pytest.mark.slow
def test_the_budget_is_held_by_the_clock(model_dir, tmp_path):
    """Within 30 %: other tests run beside this one, and begin and end. On a clock of its own: within 10 %."""
    argv = arguments(tmp_path, model_dir, tmp_path / "out", "--budget", "1", "--seeds", "3")
    del argv[argv.index("--steps") : argv.index("--steps") + 2]
    (tmp_path / "text.txt").write_text(TEXT * 40, encoding="utf-8")
    (tmp_path / "kept.txt").write_text(KEPT, encoding="utf-8")
    process = started(argv)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    seconds = report(tmp_path / "out")["seconds"]
    assert 0.7 * 60 <= seconds <= 1.3 * 60


def test_mica_adapt_does_not_write_into_a_comparison(finished, model_dir, text_file, capsys):
    assert adapt(model_dir, text_file, finished, "--overwrite") == 2
    assert "mica compare has written it: choose another folder" in capsys.readouterr().err
