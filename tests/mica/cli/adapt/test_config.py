"""Which value an option gets and from where, run.yaml, and what `--resume` and `--adapter` allow."""

import argparse
from pathlib import Path

import pytest

from mica.cli.adapt import config, options
from mica.cli.adapt.options import OPTIONS
from mica.errors import UsageError

REQUIRED = ("--model", "m", "--text", "t", "--output", "o")


def given(*argv: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.declare(parser)
    return parser.parse_args(list(map(str, argv)))


def resolve(*argv, **options) -> config.Settings:
    return config.resolve(given(*REQUIRED, *argv), **options)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        (tmp_path / "some.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "some.yaml"

    return write


def test_defaults_and_recipe():
    args, origins = resolve()
    assert set(vars(args)) == set(OPTIONS)
    assert (args.steps, args.epochs, args.rank, args.alpha, args.learning_rate) == (100, None, 16, 16, 1e-3)
    assert (args.text, args.report_to, args.merge) == (["t"], [], False)
    assert origins["rank"] == origins["steps"] == origins["alpha"] == "recipe all-linear"
    assert "epochs" not in origins
    assert (origins["model"], origins["seed"]) == ("command line", "default")


def test_the_paper_s_recipe():
    args, origins = resolve("--recipe", "paper", "--rank", 32)
    assert (args.rank, args.alpha, args.target_modules, args.scheduler) == (32, 64, "q_proj,v_proj", "cosine")
    assert (args.learning_rate, args.warmup_ratio, args.weight_decay) == (5e-4, 0.1, 0.01)
    assert (args.dropout, args.max_grad_norm, args.epochs, args.steps) == (0.05, 0.3, 4, None)
    assert (origins["rank"], origins["alpha"]) == ("command line", "recipe paper")


def test_the_command_line_wins_over_yaml_over_the_recipe(yaml_file):
    path = yaml_file(
        "recipe: paper\nrank: 8\nseed: 1\nmerge: true\nlearning-rate: 1e-3\ntext: [a, b]\nalpha:\n"
    )
    args, origins = resolve("--config", path, "--seed", 2, "--no-merge")
    assert (args.rank, args.seed, args.merge, args.learning_rate) == (8, 2, False, 1e-3)
    assert (args.alpha, args.text, args.dropout) == (16, ["t"], 0.05)
    assert (origins["rank"], origins["seed"]) == ("some.yaml", "command line")
    assert origins["dropout"] == "recipe paper"


@pytest.mark.parametrize("own", ["--steps", "--epochs"])
def test_steps_and_epochs_replace_each_other(own, yaml_file):
    other = {"--steps": "epochs", "--epochs": "steps"}[own]
    args, origins = resolve("--config", yaml_file(f"{other}: 3\n"), own, 7)
    assert (getattr(args, own[2:]), getattr(args, other)) == (7, None)
    assert other not in origins
    with pytest.raises(UsageError, match="--steps and --epochs: give one of them"):
        resolve("--steps", 1, "--epochs", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak: 3", "there is no option 'rnak', did you mean rank?"),
        ("xyzzy: 3", "there is no option 'xyzzy'$"),
        ("rank: [3, 4]", "rank must be one value, not"),
        ("rank: {a: 3}", "rank must be one value, not"),
        ("rank: true", "rank must be one value, not True"),
        ("rank: zero", "argument --rank: must be a whole number at least 1, not 'zero'"),
        ("dtype: int4", "argument --dtype: invalid choice: 'int4'"),
        ("text: [[a]]", "text must be a list, not"),
        ("resume: true", "--resume belongs on the command line"),
        ("config: x.yaml", "--config belongs on the command line"),
        ("merge: 3", "merge must be true or false, not '3'"),
        ("- rank", "must be a mapping of options to values"),
        ("", "must be a mapping of options to values"),
        ("a: {", "is not YAML: "),
    ],
)
def test_bad_yaml(text, message, yaml_file):
    path = yaml_file(text)
    with pytest.raises(UsageError, match=message) as refusal:
        resolve("--config", path)
    assert str(refusal.value).startswith(f"--config {path}: ")


def test_unreadable_yaml(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            resolve("--config", path)


def test_required_options_may_come_from_yaml(yaml_file):
    path = yaml_file("model: m\ntext: t\n")
    assert config.resolve(given("--config", path, "--output", "o")).args.text == ["t"]
    with pytest.raises(UsageError, match=r"the following arguments are required: --output$"):
        config.resolve(given("--config", path))
    with pytest.raises(UsageError, match="required: --model, --text, --output"):
        config.resolve(given())


def test_weights_must_be_as_many_as_sources():
    assert resolve("--text-weights", 1).args.text_weights == [1.0]
    with pytest.raises(UsageError, match="--text-weights: 2 numbers for 1 sources"):
        resolve("--text-weights", 1, 2)


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run that was started in another working directory."""
    (tmp_path / "corpus.txt").touch()
    output = tmp_path / "out"
    output.mkdir()
    arguments = ["--model", "m", "--text", tmp_path / "corpus.txt", "--output", output, "--recipe", "paper"]
    settings = config.resolve(given(*arguments, "--learning-rate", "1e-5", "--seed", 5, "--merge"))
    config.write(settings, output)
    return output, settings


def test_run_yaml_gives_the_same_settings(run_folder, tmp_path, monkeypatch):
    output, before = run_folder
    for settings in (
        config.resolve(given("--config", output / "run.yaml")),
        config.resolve(given("--output", output, "--resume")),
    ):
        after = vars(settings.args) | {"resume": False, "config": None, "output": output}
        assert after == vars(before.args)
    assert (
        config.resolve(given("--output", output, "--resume")).origins | {"resume": "default"}
        == before.origins
    )
    assert not list(output.glob(".*"))
    monkeypatch.chdir(tmp_path)  # a relative path to the same file is the same
    assert config.resolve(given("--output", output, "--resume", "--text", "corpus.txt")).args.seed == 5


def test_run_yaml_tells_the_number_of_processes(run_folder, yaml_file):
    output, settings = run_folder
    assert config.recorded_processes(output / "run.yaml") == 1
    config.write(settings, output, processes=4)
    assert config.recorded_processes(output / "run.yaml") == 4
    assert config.resolve(given("--config", output / "run.yaml")).args.seed == 5
    assert config.recorded_processes(yaml_file("rank: 3\n")) is None


def test_run_yaml_names_origins_and_nothing_of_one_start(run_folder):
    lines = (run_folder[0] / "run.yaml").read_text(encoding="utf-8").splitlines()
    assert "dropout: 0.05  # recipe paper" in lines
    assert "seed: 5  # command line" in lines
    assert "learning_rate: 1e-05  # command line" in lines
    assert not [line for line in lines if line.startswith(("resume", "config", "overwrite", "steps"))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", 6], "--seed 6: --resume: .*run.yaml has 5; leave the option out"),
        (["--recipe", "all-linear"], "--recipe all-linear: --resume: .* has paper"),
        (["--steps", 10], "--steps 10: --resume: .* does not have it"),
        (["--text", "another.txt"], "--text another.txt: --resume: .* has .*corpus.txt"),
        (["--overwrite"], "--resume and --overwrite: give one of them"),
    ],
)
def test_resume_refuses_another_training(arguments, message, run_folder):
    with pytest.raises(UsageError, match=message):
        config.resolve(given("--output", run_folder[0], "--resume", *arguments))


def test_resume_refuses_another_training_from_yaml_too(run_folder, yaml_file):
    with pytest.raises(UsageError, match="--seed 7: --resume"):
        config.resolve(given("--output", run_folder[0], "--resume", "--config", yaml_file("seed: 7\n")))


def test_resume_allows_what_leaves_training_alone(run_folder, tmp_path):
    moved = run_folder[0].rename(tmp_path / "moved")
    args, origins = config.resolve(given("--output", moved, "--resume", "--save-steps", 3, "--no-merge"))
    assert (args.save_steps, args.merge, args.seed, args.output) == (3, False, 5, moved)
    assert (origins["save_steps"], origins["seed"]) == ("command line", "command line")
    assert origins["dropout"] == "recipe paper"


def test_the_adapter_s_values_hold():
    adapter = {"rank": 8, "alpha": 24, "target_modules": "q_proj", "dropout": 0.0}
    args, origins = resolve("--adapter", "a", "--recipe", "paper", read_adapter=lambda path: adapter)
    assert (args.rank, args.alpha, args.target_modules) == (8, 24, "q_proj")
    assert (origins["rank"], args.learning_rate) == ("adapter", 5e-4)
    args, _ = resolve("--adapter", "a", "--rank", 8, "--dropout", 0.1, read_adapter=lambda path: adapter)
    assert (args.rank, args.dropout) == (8, 0.1)
    with pytest.raises(UsageError, match="--rank 9: --adapter has 8; leave the option out"):
        resolve("--adapter", "a", "--rank", 9, read_adapter=lambda path: adapter)


def test_a_run_from_an_adapter_is_resumed_without_it(tmp_path):
    adapter = {"rank": 8, "alpha": 24, "target_modules": "q_proj", "dropout": 0.0}
    before = resolve("--adapter", "a", "--output", tmp_path, read_adapter=lambda path: adapter)
    config.write(before, tmp_path)
    after = config.resolve(given("--output", tmp_path, "--resume"), pytest.fail)
    assert (after.args.adapter, after.args.alpha) == (Path("a"), 24)
    assert after.origins["alpha"] == "adapter"


def test_describe_names_each_value_once_with_its_origin():
    lines = config.describe(resolve("--recipe", "paper", "--rank", 32)).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "command line",
        "default",
        "recipe paper (arXiv 2604.01694)",
    ]
    assert "rank 32" in lines[0]
    assert "alpha 64" in lines[2]
    assert "learning_rate 0.0005" in lines[2]
    assert "seed 0" in lines[1]


def test_paths_are_absolute_where_there_is_such_a_file(tmp_path):
    assert config.absolute(str(tmp_path)) == str(tmp_path)
    assert config.absolute("nobody/no-such-model") == "nobody/no-such-model"
    assert Path(config.absolute("~")).is_absolute()
