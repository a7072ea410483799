"""A few of the trials of `make kills`, and that its oracle sees what is lost."""

import shutil
from pathlib import Path

import pytest

from tests.fuzz import folder_trials
from tests.fuzz.folder_scenes import OUTPUT
from tests.fuzz.folder_templates import FINISHED, UNFINISHED, Identity, Templates
from tests.fuzz.folder_world import NEW, OVERWRITE, RESUME, Act, Done, World

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


def ended(kind: str, status: int, replaces: bool = False) -> Done:
    """As if a command had been there."""
    text = "mica adapt: error: refused\n" if status == 2 else ""
    return Done(Act(kind, [], OUTPUT, None, replaces), status, text, False)


# -- the oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [Path.unlink, lambda file: file.write_text("others")], ids=["goes", "other"]
)
def test_a_changed_file_of_the_user_is_a_loss_whatever_the_command_was_told(world, change):
    file = world.put(f"{OUTPUT}/notes.txt")
    world.look()
    change(world.folder / file)
    world.judge(ended(OVERWRITE, -9, replaces=True))
    assert kinds(world) == ["lost"]


def test_what_a_run_wrote_may_go_by_one_that_replaces_it_only(world):
    world.earlier(f"{FINISHED}-1", OUTPUT, Identity(1))
    world.look()
    for name, is_allowed in (("README.md", True), ("summary.json", False)):
        (world.folder / OUTPUT / name).unlink()
        world.judge(ended(OVERWRITE if is_allowed else NEW, -9, replaces=is_allowed))
        assert kinds(world) == ([] if is_allowed else ["lost"]), name


def test_a_refused_command_changes_nothing(world):
    world.earlier(f"{FINISHED}-1", OUTPUT, Identity(1))
    world.look()
    world.judge(ended(OVERWRITE, 2, replaces=True))
    assert not world.faults
    (world.folder / OUTPUT / "summary.json").unlink()
    (world.folder / "new").mkdir()
    world.judge(ended(OVERWRITE, 2, replaces=True))
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


def test_what_a_success_leaves_may_be_replaced_by_one_that_is_killed(world):
    world.earlier(f"{UNFINISHED}-1", OUTPUT, Identity(1))
    world.look()
    world.judge(ended(RESUME, 0), ended(OVERWRITE, -9, replaces=True))
    assert not world.faults
    world.judge(ended(RESUME, 0))
    assert kinds(world) == ["unusable"]


def test_a_failed_run_is_in_the_place_of_the_one_before_or_has_changed_nothing(world):
    folder = world.folder / OUTPUT
    world.earlier(f"{FINISHED}-1", OUTPUT, Identity(1))
    world.look()
    before = world.products(OUTPUT)
    failed = ended(OVERWRITE, 2, replaces=True)

    aside = folder.rename(world.folder / "aside")
    aside.rename(folder)
    world.judge_failure(failed, before)
    assert not world.faults

    (folder / "README.md").unlink()
    world.judge_failure(failed, before)
    assert kinds(world) == ["lost"]

    (folder / "run.yaml").write_bytes((folder / "run.yaml").read_bytes())  # as of a run with the same options
    world.judge_failure(failed._replace(text="(--resume continues from it)"), before)
    assert kinds(world) == ["lost", "mixed"]

    shutil.rmtree(folder)
    world.judge_failure(failed, before)
    assert kinds(world) == ["lost", "mixed", "lost"]

    world.faults.clear()
    world.earlier(f"{UNFINISHED}-2", OUTPUT, Identity(2))
    world.judge_failure(failed._replace(text="(--resume continues from it)"), before)
    assert not world.faults
    world.judge_failure(failed, before)
    assert kinds(world) == ["words"]


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
