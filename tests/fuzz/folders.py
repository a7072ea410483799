"""Rules for commands and folders: whatever lies where, and whoever else works there, nothing is lost.

Each rule is drawn from one number; `folder_world` judges what came of it.

| what is done | what it must come to |
| --- | --- |
| a run, new, resumed or with --overwrite | the unbroken run's bits, or one line and nothing has changed |
| inputs inside, around, linked to the output | they are still there |
| names of every kind | outside of the output folder they work |
| files of the user beside the run's | they are still there |
| another command in the same folder | one of the two waits or is refused |
| a file that cannot be removed | one line; the earlier run is whole, or has all made way for the new one |
| `mica transfer` over any of the folders | as a run |
"""

import random
from functools import cache

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize

from mica.cli.adapt import checkpoints
from tests.fuzz import folder_places as places
from tests.fuzz.actions import SEQUENCES, action
from tests.fuzz.folder_scenes import Scene
from tests.fuzz.folder_templates import EARLIER, FINISHED, SEEDS, UNFINISHED, WEIGHTS, Identity, Templates
from tests.fuzz.folder_world import NEW, OVERWRITE, RESUME

NUMBER = st.integers(0, 2**31 - 1)
TEXTS = {"text": "words.txt", "held-out-text": "held.txt", "retain": "retain.txt"}
UNREMOVABLE = (WEIGHTS, "summary.json", "README.md", "run.yaml", "curve.csv", "optimizer.pt", "checkpoint-4")


@cache
def templates() -> Templates:
    """The templates of this process."""
    return Templates()


class Folders(RuleBasedStateMachine):
    """One scene; ``placed``: option -> where its input lies, for the commands that follow.

    ``has_stranger``: whether a file of the user is in a checkpoint of a run.
    """

    def __init__(self):
        super().__init__()
        self.twins = self  # what `action` compares
        self.scene: Scene | None = None
        self.placed: dict[str, places.Placed] = {}
        self.output = ""
        self.has_stranger = False

    @initialize(number=NUMBER)
    def start(self, number):
        SEQUENCES["folders"] += 1
        draw = random.Random(number)
        self.scene = Scene(draw, templates(), "fuzz")
        self.world = self.scene.world
        self.output = places.output(draw, self.world)
        self.scene.prepare(draw.choice(["nothing", FINISHED, FINISHED, UNFINISHED]), self.output)
        self.world.story.append(f"output {self.output!a}")
        self.world.look()

    def redraw(self, number: int) -> random.Random:
        """What follows depends on ``number`` alone."""
        self.scene.draw = random.Random(number)
        return self.scene.draw

    def fingerprint(self) -> object:
        return len(self.world.story)

    def compare(self) -> None:
        assert not self.world.faults, "\n".join(["", *self.world.story])

    def probe(self, gradients: bool) -> None:
        """Nothing more: every command is judged."""

    @action(number=NUMBER)
    def files_beside(self, number):
        self.redraw(number)
        self.scene.users_files(self.output, 6)
        self.world.look()
        return True

    @action(number=NUMBER)
    def an_input_elsewhere(self, number):
        draw = self.redraw(number)
        option = draw.choice([*TEXTS, *TEXTS, "model", "adapter", "config"])
        if option in TEXTS:
            placed = places.file(draw, self.world, option, TEXTS[option], self.output)
        elif option == "model":
            placed = places.model(draw, self.world, self.output)
        elif option == "adapter":
            placed = places.adapter(draw, self.world, self.output, f"earlier-{draw.choice(EARLIER)}")
        else:
            placed = places.config(draw, self.world, self.output)
        self.placed[option] = placed
        self.world.story.append(f"placed {placed.story}")
        self.world.look()
        return True

    @action(number=NUMBER)
    def a_run(self, number):
        draw = self.redraw(number)
        kind = draw.choice([NEW, RESUME, OVERWRITE, OVERWRITE, OVERWRITE])
        options = self.scene.refused_options(0.2) if kind != RESUME else []
        if options:
            self.world.look()
        act = self.act(kind, options)
        blows = self.scene.blow(probability=0.35)
        if kind == OVERWRITE and draw.random() < 0.2:
            self.put_into_a_checkpoint()
        must_work = self.must_work(kind) and not (options or blows)
        done = self.world.do(act, blows)
        if must_work and done.status:
            self.world.blame("refused", f"{done.status}: {done.text[-300:]}")
        return True

    def put_into_a_checkpoint(self) -> None:
        """A file of the user, in a folder that a run has written and may not replace any more."""
        whole = checkpoints.marked(self.world.folder / self.output)
        if whole:
            self.world.put(f"{self.output}/{self.scene.draw.choice(whole).name}/mine.txt")
            self.world.story.append("placed a file in a checkpoint")
            self.world.look()
            self.has_stranger = True

    def act(self, kind: str, options: list[str] = ()):
        if kind == RESUME:
            return self.world.adapt(RESUME, self.output)
        draw = self.scene.draw
        template = self.placed["adapter"].template if "adapter" in self.placed else ""
        identity = Identity(draw.choice(SEEDS), template, "held-out-text" in self.placed)
        given = [option for placed in self.placed.values() for option in placed.options]
        return self.world.adapt(kind, self.output, identity, [*given, *options])

    def must_work(self, kind: str) -> bool:
        """Whether nothing lies in another's way: then no name is one that may be refused."""
        if not all(placed.is_outside for placed in self.placed.values()):
            return False
        folder = self.world.folder / self.output
        is_empty = not folder.exists() or not any(folder.iterdir())
        if kind == NEW:
            return is_empty
        is_replaceable = f"{self.output}/run.yaml" in self.world.owned and not self.has_stranger
        return kind == OVERWRITE and (is_empty or is_replaceable)

    @action(number=NUMBER)
    def a_run_beside(self, number):
        draw = self.redraw(number)
        kinds = draw.choice([(NEW, NEW), (RESUME, RESUME), (RESUME, OVERWRITE), (OVERWRITE, RESUME)])
        if kinds == (NEW, NEW) and any(not placed.is_outside for placed in self.placed.values()):
            return False
        self.scene.both(self.act(kinds[0]), self.act(kinds[1]))
        return True

    @action(number=NUMBER)
    def a_file_that_stays(self, number):
        """A new run over an earlier one; the system neither removes nor renames files of one name."""
        draw = self.redraw(number)
        before = self.world.products(self.output)
        done = self.world.do(self.act(OVERWRITE), unremovable=draw.choice(UNREMOVABLE))
        if done.status == 2:
            self.world.judge_failure(done, before)
        return True

    @action(number=NUMBER)
    def a_transfer(self, number):
        draw = self.redraw(number)
        template = f"earlier-{draw.choice(EARLIER)}"
        output = draw.choice(
            ["moved", self.output, "base", template, "sibling", ".", draw.choice(places.ODD)]
        )
        adapter = places.adapter(draw, self.world, output if output == "moved" else "beside", template)
        sibling = places.model(draw, self.world, output if output == "moved" else "beside", "to", "sibling")
        self.world.story.append(f"placed {adapter.story}; {sibling.story}")
        self.world.look()
        seed = int(template.rpartition("-")[2])
        options = [*adapter.options, *sibling.options]
        act = self.world.transfer(seed, output, draw.random() < 0.7, options)
        self.world.do(act, self.scene.blow("transfer", 0.3))
        return True

    def is_of_runs_alone(self) -> bool:
        """Whether a run is in the output folder, and nothing of a user."""
        prefix = f"{self.world.key(self.output, '')}/"
        found = [path for path in self.world.snapshot if path.startswith(prefix)]
        has_run = self.world.seed_of(self.output) is not None
        return has_run and all(path in self.world.owned for path in found)

    def teardown(self):
        if self.scene is None:
            return
        try:
            if not self.world.faults:
                self.scene.afterwards(self.output, self.is_of_runs_alone())
                self.compare()
        finally:
            self.world.close()
