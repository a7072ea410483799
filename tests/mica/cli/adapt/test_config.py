"""Which value an option gets, run.yaml, and what `--resume` and `--adapter` allow."""

import argparse
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mica.cli.adapt import config, options, run_yaml
from mica.cli.adapt.options import OPTIONS
from mica.errors import UsageError
from tests.support.tables import rows
from tests.support.tiny_cli import words

REQUIRED = "--model m --text t --output o"
ADAPTER = {"rank": 8, "alpha": 24, "target_modules": "q_proj", "dropout": 0.0, "train_embeddings": None}


def resolve(*given: object) -> config.Settings:
    """Of a command line of these `words`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.declare(parser)
    return config.resolve(parser.parse_args(words(*given)))


def refused(message, *given) -> str:
    with pytest.raises(UsageError, match=message) as refusal:
        resolve(*given)
    return str(refusal.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        (tmp_path / "some.yaml").write_text(text)
        return tmp_path / "some.yaml"

    return write


# The command line, the YAML with | for the end of a line, and what some of the options are then
RESOLVED = """
 => {} => steps=100 epochs=None alpha=16 learning_rate=0.001 text=['t'] experts=True
--recipe paper --rank 32 => {} => rank=32 alpha=64 target_modules=q_proj,v_proj learning_rate=0.0005
--recipe paper => {} => steps=None epochs=4.0
--seed 2 --no-experts => YAML => seed=2 experts=False text=['t'] rank=8 learning_rate=0.001 dropout=0.05
--method dora => {} => alpha=32 learning_rate=0.0002 steps=100
--steps 7 => epochs: 3 => steps=7 epochs=None
--epochs 7 => steps: 3 => epochs=7.0 steps=None
""".replace("YAML", "recipe: paper|rank: 8|seed: 1|experts: true|learning-rate: 1e-3|text: [a, b]|alpha:")


@pytest.mark.parametrize(("argv", "yaml", "expected"), rows(RESOLVED))
def test_the_command_line_wins_over_yaml_over_the_recipe(argv, yaml, expected, yaml_file):
    args = resolve(REQUIRED, argv, "--config", yaml_file(yaml.replace("|", "\n"))).args
    assert set(vars(args)) == set(OPTIONS)
    assert set(expected.split()) <= {f"{name}={value}" for name, value in vars(args).items()}


def test_what_was_given_is_known(yaml_file, run_folder):
    """By which it is refused where the model cannot do it; a recipe's value is dropped."""
    given_options = resolve(REQUIRED, "--seed 2 --config", yaml_file("packing: documents\nrank:\n")).given
    assert given_options == {"model", "text", "output", "seed", "config", "packing"}
    resumed = resolve("--resume --output", run_folder[0])
    assert resumed.given == {"output", "resume"}


# Text, with | for the end of a line, and how the message goes on
BAD_YAML = r"""
rnak: 3 => there is no option 'rnak'; did you mean rank\?$
rank: [3, 4] => rank must be one value, not \['3', '4'\]$
? [a]|: b => is not YAML: .* unhashable key
rank: true => argument --rank: must be a whole number at least 1 .*, not 'true'
seed: 1:30 => argument --seed: must be a whole number at least 0 .*, not '1:30'
packing: document => argument --packing: invalid choice: 'document' \(choose from
text: [[a]] => text must be one value or a list of them, not \['a'\]
resume: true => --resume belongs on the command line
experts: yes => experts must be true or false, not yes
- rank => must be a mapping of options to values
a: { => is not YAML:
NONE => cannot be read
"""


@pytest.mark.parametrize(("text", "message"), [*rows(BAD_YAML), ("rank: 4\a", "is not YAML: unaccept")])
def test_bad_yaml(text, message, yaml_file, tmp_path):
    missing = [tmp_path, tmp_path / "none.yaml"]
    for path in missing if text == "NONE" else [yaml_file(text.replace("|", "\n"))]:
        assert refused(message, REQUIRED, "--config", path).startswith(f"--config {path}: ")


def test_yaml_is_read_as_the_command_line_is(yaml_file):
    lines = "rank: 010\nalpha: 1_000\nexperts: False\ntext_field: no\ntext: [a, -b]\npatience: ~\n"
    lines += 'dataset_config: 2026-01-01\noptimizer: &x "\\ud83d"\nseed: !!int 3\nsteps: null\n'
    args = resolve("--model m --output o --config", yaml_file(lines)).args
    assert (args.rank, args.alpha, args.experts) == (10, 1000, False)
    assert (args.text_field, args.text, args.patience) == ("no", ["a", "-b"], None)
    assert (args.dataset_config, args.optimizer, args.seed, args.steps) == ("2026-01-01", "\ud83d", 3, 100)


def test_required_options_may_come_from_yaml(yaml_file):
    path = yaml_file("model: m\ntext: t\n")
    assert resolve("--output o --config", path).args.text == ["t"]
    refused("the following arguments are required: --output$", "--config", path)
    refused("required: --model, --text, --output")


def test_resume_needs_no_more_than_the_folder():
    refused("^--resume: needs --output, the folder of the run$", "--resume")


@pytest.mark.parametrize(
    ("argv", "message"),
    rows("""
--steps 1 --epochs 1 => --steps and --epochs: use only one
--held-out 0.1 --held-out-text a => --held-out and --held-out-text: use only one
--memory 9 --gradient-checkpointing => --memory and --gradient-checkpointing: use only one
--scheduler constant --warmup-ratio 0.1 => --warmup-ratio: scheduler 'constant' has no warmup; use
--keep-best => --keep-best: needs --eval-steps
--patience 5 => --patience: needs --eval-steps
--recipe paper --method lora => --recipe paper: it is MiCA's and has no values for LoRA
"""),
)
def test_options_that_go_together(argv, message):
    refused(f"^{message}", REQUIRED, argv)


@pytest.mark.parametrize(
    ("argv", "kept"),
    rows("""
 => None
--patience 2 => True
--patience 2 --no-keep-best => False
"""),
)
def test_who_stops_early_keeps_the_best(argv, kept):
    """None: so run.yaml does not have it, and --config run.yaml --patience 2 keeps the best."""
    assert str(resolve(REQUIRED, "--eval-steps 1", argv).args.keep_best) == kept


def write(settings: config.Settings, output: Path) -> None:
    """As a run writes its settings."""
    text = run_yaml.as_yaml(config.values(settings))
    (output / "run.yaml").write_text(text)


@pytest.fixture
def run_folder(tmp_path, output):
    """The folder of a run that was started in another working directory."""
    (tmp_path / "corpus.txt").touch()
    output.mkdir()
    arguments = "--model m --recipe paper --text", tmp_path / "corpus.txt", "--output", output
    settings = resolve(*arguments, "--learning-rate 1e-5 --seed 5 --experts")
    write(settings, output)
    return output, settings


def test_run_yaml_gives_the_same_settings(run_folder, tmp_path, monkeypatch):
    output, before = run_folder
    again = resolve("--config", output / "run.yaml")
    resumed = resolve("--resume --output", output)
    for settings in (again, resumed):
        after = vars(settings.args) | {"resume": False, "config": None, "output": output}
        assert after == vars(before.args)
    monkeypatch.chdir(tmp_path)  # a relative path to the same file is the same
    assert resolve("--resume --text corpus.txt --output", output).args.seed == 5


@pytest.mark.parametrize(
    "name",
    [os.fsdecode(b"caf\xe9"), "a\x85b", "a\x7f\x91b", "a\nb", "-a", "a: b # c", "'\"\\", "déjà 😀", "\u2028"],
)
def test_any_name_is_in_run_yaml_what_it_was(tmp_path, name):
    """The name of a text, of the folder and of the file that options came from."""
    text, yaml, output = (tmp_path / f"{name}{more}" for more in ("", ".yaml", ".out"))
    yaml.write_text("seed: 3")
    text.touch()
    output.mkdir()
    write(resolve("--model m --text", text, "--config", yaml, "--output", output), output)
    for again in (["--resume --output", output], ["--config", output / "run.yaml"]):
        args = resolve(*again).args
        assert (args.text, args.seed) == ([str(text)], 3)


def test_resume_allows_what_leaves_training_alone(run_folder, tmp_path):
    moved = run_folder[0].rename(tmp_path / "moved")
    args = resolve("--resume --save-steps 3 --eval-steps 2 --patience 3 --output", moved).args
    assert (args.save_steps, args.seed, args.patience) == (3, 5, 3)


def test_the_adapter_s_values_hold(tmp_path, monkeypatch):
    saved = SimpleNamespace(settings=lambda: ADAPTER)
    monkeypatch.setattr("mica.cli.adapt.saved_adapter.read", lambda path: saved)
    args = resolve(REQUIRED, "--adapter a --recipe paper").args
    assert (args.rank, args.alpha, args.target_modules, args.learning_rate) == (8, 24, "q_proj", 5e-4)
    args = resolve(REQUIRED, "--adapter a --rank 8 --dropout 0.1").args
    assert (args.rank, args.dropout) == (8, 0.1)
    refused("--rank 9: --adapter has 8; omit this option", REQUIRED, "--adapter a --rank 9")
    omit = "--train-embeddings True: --adapter does not have it; omit this option"
    refused(omit, REQUIRED, "--adapter a --train-embeddings")
    saved.settings = lambda: ADAPTER | {"method": "lora"}
    args = resolve(REQUIRED, "--adapter a").args
    assert (args.method, args.alpha, args.learning_rate) == ("lora", 24, 2e-4)
    saved.settings = lambda: ADAPTER
    # The run that it began is resumed without it
    write(resolve(REQUIRED, "--adapter a --output", tmp_path), tmp_path)
    monkeypatch.setattr("mica.cli.adapt.saved_adapter.read", pytest.fail)
    after = resolve("--resume --output", tmp_path)
    assert (after.args.adapter, after.args.alpha) == (Path("a"), 24)
