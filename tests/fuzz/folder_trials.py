"""Random trials in which commands that share a folder are killed, for `tests.kills` and its tests.

A trial is drawn from a number: what is in the folder, who does what, where one stops until the other has
ended, and which blow falls when. Afterwards the folder must be usable: what was begun is resumed, or its
first command is given again.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tests.fuzz.folder_scenes import OUTPUT, Scene
from tests.fuzz.folder_templates import EARLIER, FINISHED, MODEL, SEEDS, UNFINISHED, Identity, Templates
from tests.fuzz.folder_world import NEW, RESUME

PAIRS = {  # (what the one does, the other) -> what may be in the folder before
    (NEW, NEW): ["nothing", "an empty folder"],
    (NEW, RESUME): ["nothing", UNFINISHED, FINISHED],
    (RESUME, NEW): [UNFINISHED, FINISHED],
    (RESUME, RESUME): [UNFINISHED, UNFINISHED, FINISHED],
}


class Trial(NamedTuple):
    scene: str
    kills: Counter  # (scene, signal) -> how many commands died by it
    commands: int
    faults: list
    story: list[str]


def run(seed: int, templates: Templates, scenes: Sequence[str] = ()) -> Trial:
    """The trial of ``seed``; of one of ``scenes``, if any are named."""
    draw = random.Random(seed)
    name = draw.choice(WEIGHTED)
    if scenes and name not in scenes:
        name = draw.choice(list(scenes))
    scene = Scene(draw, templates, name)
    try:
        SCENES[name](scene)
    except TimeoutError as error:
        scene.world.blame("hangs", error)
    finally:
        scene.world.close()
    world = scene.world
    return Trial(name, scene.kills, world.commands, world.faults, world.story)


def _pair(scene: Scene) -> None:
    kinds = scene.draw.choice(list(PAIRS))
    scene.prepare(scene.draw.choice(PAIRS[kinds]))
    if NEW not in kinds:
        scene.users_files(OUTPUT, 2)
    seeds = scene.draw.sample(SEEDS, 2)
    scene.world.look()
    acts = [
        scene.world.adapt(kind, OUTPUT, None if kind == RESUME else Identity(seed))
        for kind, seed in zip(kinds, seeds, strict=True)
    ]
    scene.both(*acts)
    scene.afterwards()


def _again(scene: Scene) -> None:
    """A first command that is killed, or refused, and given again."""
    scene.world.look()
    identity = scene.identity()
    options = scene.refused_options(0.25)
    scene.world.look()
    act = scene.world.adapt(NEW, OUTPUT, identity, options)
    scene.count(scene.world.do(act, scene.blow(probability=0.9)))
    for _ in range(2):
        scene.count(scene.world.do(scene.world.adapt(NEW, OUTPUT, identity), scene.blow(probability=0.6)))
    scene.afterwards()


def _transfer(scene: Scene) -> None:
    """One transfer, or two into one folder."""
    world, draw = scene.world, scene.draw
    for seed in EARLIER:
        world.earlier(f"earlier-{seed}", f"earlier-{seed}", Identity(seed))
    state = draw.choice(["nothing", "nothing", "nothing", "a transfer", "mine", "a run"])
    if state == "a transfer":
        world.earlier(f"moved-{EARLIER[0]}", OUTPUT, Identity(EARLIER[0]))
    if state == "a run":
        scene.prepare(FINISHED)
    if state == "mine":
        scene.users_files(OUTPUT, at_least=1)
    world.look()
    first = world.transfer(draw.choice(EARLIER), OUTPUT)
    if draw.random() < 0.4:
        scene.both(first, world.transfer(draw.choice(EARLIER), OUTPUT), "transfer")
    else:
        scene.count(world.do(first, scene.blow("transfer", 0.9)))
    for _ in range(2):
        if draw.random() < 0.4:
            act = world.transfer(draw.choice(EARLIER), OUTPUT)
            scene.count(world.do(act, scene.blow("transfer")))
    world.take_away()
    last = world.do(world.transfer(draw.choice(EARLIER), OUTPUT))
    is_there = (world.folder / OUTPUT / MODEL).is_file() or state != "nothing"
    if last.status and not is_there:
        world.blame("unusable", f"transfer: {last.status} {last.text[-300:]}")


SCENES = {"two runs": _pair, "again": _again, "transfer": _transfer}
WEIGHTED = ["two runs"] * 5 + ["again"] * 3 + ["transfer"] * 2
