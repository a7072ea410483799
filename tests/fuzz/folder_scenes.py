"""A `World` and what is drawn for it: files, blows, two commands in one folder, what a user does then."""

import random
import time
from collections import Counter
from collections.abc import Sequence

from tests.fuzz.folder_templates import FINISHED, SEEDS, UNFINISHED, Identity, Templates
from tests.fuzz.folder_world import KILLED, NEW, REFUSED, RESUME, Act, Done, World
from tests.support.forked import PUT, Blow, Command

OUTPUT = "out"
USERS = (  # files of a user beside a run's, some by names that a run has too
    *("notes.txt", "adapter_notes.md", "curve.fit.py", "tokenizer_train.py", "vocab.py", "vocab.mine.txt"),
    *("merged/mine.bin", "base/code.py", "runs/events", "checkpoint-notes/a.txt"),
    *("chat_template_old.jinja", "sub/deep/file", ".hidden"),
)
STRANGERS = (  # that come while a command works, some where it writes
    *("README.md", "notes.txt", "curve.png", "tokenizer.json", "summary.json", "base/code.py"),
    *("checkpoint-2/notes.txt", "checkpoint-3/mine.bin", "checkpoint-4/mine.bin", "runs/mine", "config.json"),
)


class Scene:
    """A `World`, what is drawn for it, and the ``kills`` that commands in it died of."""

    def __init__(self, draw: random.Random, templates: Templates, name: str):
        self.draw, self.templates, self.name = draw, templates, name
        self.world = World(templates)
        self.kills: Counter = Counter()

    # -- drawing --------------------------------------------------------------------------------------

    def blow(self, command: str = "run", probability: float = 1.0) -> list[Blow]:
        """At a random event, or at a random moment of the time that the command takes; after strangers."""
        counts = self.templates.counts(command)
        strangers = [
            Blow("file", self.draw.randint(1, counts["file"] // 2), f"{PUT}{OUTPUT}/{name}")
            for name in self.draw.sample(STRANGERS, self.draw.choice([0, 0, 1, 2]))
        ]
        if self.draw.random() >= probability:
            return strangers
        what = self.draw.choice(["SIGKILL", "SIGKILL", "SIGKILL", "SIGTERM"])
        kinds = ["file", "write", "write", "moment", *(["step"] if counts["step"] else [])]
        where = self.draw.choice(kinds)
        if where == "moment":
            moment = self.draw.uniform(0.0, counts["milliseconds"] / 1000)
            return [*strangers, Blow("file", 1, what, moment)]
        at = self.draw.randint(1, counts[where])
        delay = self.draw.choice([0.0, 0.0, 0.003, 0.02])
        return [*strangers, Blow(where, at, what, delay)]

    def stop(self, command: str = "run") -> Blow:
        """Before anything was written as often as in the midst."""
        counts = self.templates.counts(command)
        where = self.draw.choice(["file", "write"])
        last = self.draw.choice([6, counts[where]])
        return Blow(where, self.draw.randint(1, last), "SIGSTOP")

    def identity(self, seeds: Sequence[int] = SEEDS) -> Identity:
        return Identity(self.draw.choice(seeds))

    def refused_options(self, probability: float) -> list[str]:
        """One that is refused, or none."""
        if self.draw.random() >= probability:
            return []
        self.world.put("empty.txt", "")
        return [self.draw.choice(REFUSED)]

    def users_files(self, output: str, most: int = 4, at_least: int = 0) -> None:
        for name in self.draw.sample(USERS, self.draw.randint(at_least, most)):
            self.world.put(f"{output}/{name}", f"mine: {name}")

    def prepare(self, state: str, output: str = OUTPUT) -> None:
        """What is in the folder before."""
        if state in (FINISHED, UNFINISHED):
            seed = self.draw.choice(SEEDS[:2])
            self.world.earlier(self.templates.run_name(state, seed), output, Identity(seed))
        elif state == "an empty folder":
            (self.world.folder / output).mkdir()

    def count(self, *done: Done) -> None:
        for each in done:
            if each.status in KILLED:
                self.kills[
                    f"{self.name}, {each.act.kind}, {'SIGKILL' if each.status == -9 else 'SIGTERM'}"
                ] += 1

    # -- two commands ---------------------------------------------------------------------------------

    def both(self, first: Act, second: Act, command: str = "run") -> None:
        """The first stops somewhere until the second has ended; or both at once."""
        world = self.world
        chance = 0.6
        if self.draw.random() < 0.25:
            one = world.start(first, self.blow(command, chance))
            time.sleep(self.draw.uniform(0, 0.4))
            other = world.start(second, self.blow(command, chance))
            self.end((first, one), (second, other))
            return
        stopped = world.start(first, [self.stop(command), *self.blow(command, chance)])
        is_stopped = stopped.wait_until_stopped()
        if is_stopped:
            world.judge(Done(first, None, ""))
        else:
            self.end((first, stopped))
        other = world.start(second, self.blow(command, chance))
        limit = 5 + self.templates.counts(command)["milliseconds"] / 100
        if is_stopped and not other.has_ended(limit):
            world.story.append("  the second waits for the first")
            self.end((first, stopped), (second, other))
            return
        self.end((second, other))
        if is_stopped:
            self.end((first, stopped))

    def end(self, *commands: tuple[Act, Command]) -> None:
        """Wait for them, and judge what they have done together."""
        done = [self.world.ended(*command) for command in commands]
        self.world.judge(*done)
        self.count(*done)

    def afterwards(self) -> None:
        """As a user would: resume, through more kills; where no run has begun, begin one."""
        world = self.world
        for _ in range(2):
            if self.draw.random() < 0.5 and world.progress(OUTPUT):
                done = world.do(world.adapt(RESUME, OUTPUT), self.blow())
                self.count(done)
        world.take_away()
        seed = world.seed_of(OUTPUT)
        act = world.adapt(RESUME, OUTPUT)
        if seed is None:
            act = world.adapt(NEW, OUTPUT, self.identity())
        done = world.do(act)
        if done.status != 0:
            world.blame("unusable", f"{done.act.kind}: {done.status} {done.text[-300:]}")
