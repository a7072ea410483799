"""A few of the trials of `make kills`, and that its oracle sees what is lost."""

import shutil
from pathlib import Path

import pytest

from tests.fuzz import folder_trials
from tests.fuzz.folder_scenes import OUTPUT
from tests.fuzz.folder_templates import FINISHED, UNFINISHED, Identity, Templates
from tests.fuzz.folder_world import NEW, RESUME, Act, Done, World

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def templates():
    made = Templates()
    yield made
    made.close()


@pytest.fixture
def world(templates):
    made = World(templates)
    yield made
    made.close()


def kinds(world: World) -> list[str]:
    return [fault.kind for fault in world.faults]


def ended(kind: str, status: int) -> Done:
    """As if a command had been there."""
    text = "mica adapt: error: refused\n" if status == 2 else ""
    return Done(Act(kind, [], OUTPUT, None), status, text)


# -- the oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda file: file.write_text("others")], ids=["goes", "other"]
)
def test_a_changed_file_of_the_user_is_a_loss_whatever_the_command_was_told(world, change):
    file = world.put(f"{OUTPUT}/notes.txt")
    world.look()
    change(world.folder / file)
    world.judge(ended(RESUME, -9))
    assert kinds(world) == ["lost"]


def test_what_a_run_wrote_may_change_by_one_that_goes_on_only(world):
    world.earlier(f"{FINISHED}-1", OUTPUT, Identity(1))
    world.look()
    for name, kind in (("README.md", RESUME), ("summary.json", NEW)):
        (world.folder / OUTPUT / name).write_text("{}")
        world.judge(ended(kind, 1 if kind == RESUME else -9))
        assert kinds(world).count("lost") == (kind == NEW), name


def test_a_refused_command_changes_nothing(world):
    world.earlier(f"{FINISHED}-1", OUTPUT, Identity(1))
    world.look()
    world.judge(ended(RESUME, 2))
    assert not world.faults
    (world.folder / OUTPUT / "summary.json").unlink()
    (world.folder / "new").mkdir()
    world.judge(ended(RESUME, 2))
    assert kinds(world) == ["refused, yet"] * 2


def test_a_lost_checkpoint_is_seen(world):
    world.earlier(f"{UNFINISHED}-1", OUTPUT, Identity(1))
    world.look()
    world.judge(ended(RESUME, -9))
    assert not world.faults
    shutil.rmtree(max((world.folder / OUTPUT).glob("checkpoint-*")))
    world.judge(ended(RESUME, -9))
    assert kinds(world) == ["lost"]


def test_two_runs_in_one_folder_are_seen(world):
    world.earlier(f"{FINISHED}-1", OUTPUT, Identity(1))
    world.identities.add(Identity(2))
    other = world.templates.path(f"{FINISHED}-2") / "run.yaml"
    (world.folder / OUTPUT / "run.yaml").write_bytes(other.read_bytes())
    world.look()
    world.judge(ended(RESUME, 0))
    assert set(kinds(world)) == {"bits", "mixed"}


# -- commands ---------------------------------------------------------------------------------------


def test_a_seed_is_a_trial(templates):
    """The same story, but for the words of commands."""
    stories = []
    for _ in range(2):
        trial = folder_trials.run(11, templates, ["transfer"])
        stories.append([line for line in trial.story if not line.startswith("  ")])
    assert stories[0] == stories[1]


@pytest.mark.parametrize("scene", folder_trials.SCENES)
def test_nothing_is_lost(templates, scene):
    for seed in range(4):
        trial = folder_trials.run(seed, templates, [scene])
        assert not trial.faults, "\n".join(trial.story)
