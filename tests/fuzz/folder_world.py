"""Models, texts, files of a user and what commands write: what is lost is found by looking.

The oracle knows no record of the commands. It compares the contents of all files before and after, and knows
who wrote each one: the user's may never change; those that a command wrote may change by a run that goes on,
or where there was nothing of value yet.
"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import yaml

from mica.cli.adapt import checkpoints
from tests.fuzz import snapshots
from tests.fuzz.folder_templates import FILES, FIXED, MODEL, WEIGHTS, Identity, Templates
from tests.support.forked import PUT, Blow, Command

NEW, RESUME, TRANSFER = "new", "--resume", "transfer"
KILLED = (-9, -15, 143, 130)
REFUSED = (  # options that are refused, early and late
    "--rank=40",
    "--target-modules=no_such_proj",
    "--retain=missing.txt",
    "--sequence-length=4000",
    "--held-out-text=empty.txt",
)


class Act(NamedTuple):
    """A command line of `mica`."""

    kind: str
    argv: list[str]
    output: str
    identity: Identity | None


class Done(NamedTuple):
    """``status``: None while it is stopped."""

    act: Act
    status: int | None
    text: str


class Fault(NamedTuple):
    kind: str
    what: str


class World:
    """One scene. ``story``: what was done, for whoever has to understand a fault."""

    def __init__(self, templates: Templates):
        self.templates = templates
        self.root = templates.new_folder("world")
        self.folder = self.root / "scene"
        self.folder.mkdir()
        self.owned: set[str] = set()  # what commands wrote
        self.strangers: set[str] = set()  # files that came while commands worked
        self.identities: set[Identity] = set()
        self.faults: list[Fault] = []
        self.story: list[str] = []
        self.snapshot: snapshots.Snapshot = {}
        self.commands = 0
        self._progress: dict[str, dict[int, int]] = {}  # output -> `progress`, before the present command
        self._makers: dict[str, list[Act]] = {}  # path -> who has last written it
        self._half_done: set[str] = set()  # outputs in which a command was killed, or is stopped
        for name in ("base", "sibling"):
            shutil.copytree(templates.path(name), self.folder / name)
        for name, content in FILES.items():
            self.put(name, content)
        self.look()

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    # -- what is there before a command ---------------------------------------------------------------

    def put(self, path: str, content: str = "mine") -> str:
        """A file of the user."""
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content, encoding="utf-8")
        return path

    def earlier(self, name: str, path: str, identity: Identity) -> str:
        """A template's folder at ``path``: what an earlier command wrote."""
        before = snapshots.taken(self.folder)
        shutil.copytree(self.templates.path(name), self.folder / path, dirs_exist_ok=True)
        self.owned |= snapshots.added(before, snapshots.taken(self.folder))
        self.identities.add(identity)
        self._progress.pop(path, None)
        self.story.append(f"{path!a}: {name}")
        return path

    def look(self) -> None:
        """From here on what is there counts."""
        self.snapshot = snapshots.taken(self.folder)

    # -- commands -------------------------------------------------------------------------------------

    def adapt(
        self, kind: str, output: str, identity: Identity | None = None, options: Sequence[str] = ()
    ) -> Act:
        """``options`` win over the plain ones."""
        if kind == RESUME:
            return Act(kind, ["adapt", f"--output={output}", "--resume", *options], output, None)
        argv = ["adapt", "--model=base", f"--output={output}", *FIXED, f"--seed={identity.seed}", *options]
        if not any(option.startswith("--text=") for option in options):
            argv.append("--text=words.txt")
        if identity.adapter and not any(option.startswith("--adapter=") for option in options):
            argv.append(f"--adapter={identity.adapter}")
        return Act(kind, argv, output, identity)

    def transfer(self, seed: int, output: str) -> Act:
        """The adapter is ``earlier-SEED``, which must be in the scene."""
        argv = ["transfer", f"--adapter=earlier-{seed}", "--to=sibling", f"--output={output}"]
        return Act(TRANSFER, argv, output, Identity(seed))

    def start(self, act: Act, blows: Sequence[Blow] = ()) -> Command:
        self.commands += 1
        self._progress.setdefault(act.output, self.progress(act.output))
        logs = self.root / "logs"
        logs.mkdir(exist_ok=True)
        if act.identity:
            self.identities.add(act.identity)
        self.story.append(f"$ mica {' '.join(map(ascii, act.argv))}    {[*map(tuple, blows)]}")
        log = logs / f"{self.commands}"
        return Command(act.argv, self.folder, log, self.root / f"cache-{self.commands}", blows)

    def do(self, act: Act, blows: Sequence[Blow] = ()) -> Done:
        """One command alone, to its end, and what it did."""
        done = self.ended(act, self.start(act, blows))
        self.judge(done)
        return done

    def ended(self, act: Act, command: Command) -> Done:
        status = command.end()
        self._meet(command)
        text = command.text()
        last = text.strip().splitlines()[-1:] or [""]
        self.story.append(f"  {act.kind}: {status} | {last[0][:300]}")
        return Done(act, status, text)

    def _meet(self, command: Command) -> None:
        for path in command.strangers():
            if path not in self.strangers:
                self.story.append(f"  meanwhile: {path!a} of a stranger")
            self.strangers.add(path)

    def take_away(self) -> None:
        """The strangers move their files away."""
        for path in self.strangers:
            place = self.folder / path
            place.unlink(missing_ok=True)
            with suppress(OSError):
                place.parent.rmdir()
        self.strangers.clear()
        self.look()

    # -- what it did ----------------------------------------------------------------------------------

    def blame(self, kind: str, what: object) -> None:
        self.faults.append(Fault(kind, str(what)))
        self.story.append(f"  FAULT {kind}: {what}")

    def judge(self, *done: Done) -> None:
        """Compare with what was there before; ``done``: all commands that have worked since then."""
        before, owned = self.snapshot, set(self.owned)
        self.look()
        theirs = {str(part) for path in self.strangers for part in (path, *Path(path).parents)}
        self.owned -= self.strangers
        changed = snapshots.altered(before, self.snapshot) - theirs
        added = snapshots.added(before, self.snapshot) - theirs
        self.owned |= added
        for path in sorted(self.strangers):
            place = self.folder / path
            if not place.is_file() or place.read_text(errors="replace") != f"{PUT}{place.name}":
                self.blame("lost", f"{path!a}, of a stranger")
        for each in done:
            self._judge_words(each)
        if lost := changed - owned:
            self.blame("lost", f"{_told(lost)}, of the user")
        products = {path for path in changed & owned if not _is_scratch(path)}
        acts = [each.act for each in done]
        own = {path for path in products if _is_by(acts, self._makers.get(path, []))}
        products -= own  # of a command that was stopped and has gone on
        self._makers |= dict.fromkeys(added | changed, acts)
        self._judge_products(done, before, products, {path for path in added if not _is_scratch(path)})
        self._judge_runs(done)
        for each in done:
            if each.status in (None, *KILLED):
                self._half_done.add(each.act.output)
            elif each.status == 0:
                self._half_done.discard(each.act.output)

    def _judge_products(self, done: Sequence[Done], before, changed: set[str], added: set[str]) -> None:
        """What earlier commands wrote: ``changed`` are gone or other than before."""
        outputs = {each.act.output for each in done}
        if any("move it away" in each.text for each in done):  # stopped in their midst by a stranger's file
            self._half_done |= outputs
        if all(each.status == 2 for each in done):
            # What a killed one has left half done may be mended by any that follows.
            if changed and not outputs & self._half_done:
                self.blame("refused, yet", f"{_told(changed)} changed")
            if added and not outputs & self._half_done:
                self.blame("refused, yet", f"{_told(added)} made")
            return
        if any(each.act.kind == RESUME for each in done):
            return
        if changed and not outputs & self._half_done:
            self.blame("lost", f"{_told(changed)}, of an earlier command, which nothing may replace")

    def _judge_runs(self, done: Sequence[Done]) -> None:
        for output in {each.act.output for each in done if each.act.kind != TRANSFER}:
            self._judge_progress(output)
            self._progress[output] = self.progress(output)
            self._judge_files(output)
        succeeded = [each.act for each in done if each.status == 0]
        if len(succeeded) > 1 and all(act.kind == NEW for act in succeeded):
            self.blame("lost", "two new runs into one folder have both ended well")
        if succeeded:
            self._judge_result(succeeded[-1], {act.identity for act in succeeded})

    def key(self, output: str, name: str) -> str:
        """``name`` in ``output`` as a snapshot calls it, which follows no links."""
        place = os.path.join(os.path.realpath(self.folder / output), name)
        return os.path.relpath(place, os.path.realpath(self.folder))

    def _judge_words(self, done: Done) -> None:
        if done.status is None:
            return
        if "Traceback" in done.text or done.status not in (0, 2, *KILLED):
            self.blame("traceback", f"{done.status}: {done.text.strip()[-700:]}")
        lines = [line for line in done.text.splitlines() if " error: " in line]
        if done.status in KILLED and len(lines) == 1:  # by a blow that came after its error
            return
        if (done.status == 2) != (len(lines) == 1):
            self.blame("words", f"status {done.status}, {len(lines)} lines of errors: {done.text[-300:]}")

    # checkpoints -------------------------------------------------------------------------------------

    def progress(self, output: str) -> dict[int, int]:
        """Seed -> step of its newest whole checkpoint."""
        newest: dict[int, int] = {}
        folder = self.folder / output
        with suppress(OSError):
            for path in checkpoints.complete(folder):
                newest[checkpoints.facts(path)["seed"]] = checkpoints.step(path)
        return newest

    def _judge_progress(self, output: str) -> None:
        after = self.progress(output)
        for seed, step in self._progress.get(output, {}).items():
            if after.get(seed, 0) < step:
                self.blame("lost", f"checkpoint-{step} of seed {seed}: the newest is {after.get(seed, 0)}")

    # results -----------------------------------------------------------------------------------------

    def seed_of(self, output: str) -> int | None:
        """The seed of the run whose run.yaml is in ``output``; of a user's file of that name none."""
        path = self.folder / output / "run.yaml"
        found = re.search(rb"(?m)^seed: (\d+)", path.read_bytes()) if path.is_file() else None
        return int(found[1]) if found else None

    def _judge_files(self, output: str) -> None:
        """Nothing is half written, whatever happened."""
        folder = self.folder / output
        for name, read in (("run.yaml", yaml.safe_load), ("summary.json", json.loads)):
            if not (folder / name).is_file() or self.key(output, name) not in self.owned:
                continue
            try:
                read((folder / name).read_text(encoding="utf-8"))
            except (ValueError, yaml.YAMLError) as error:
                self.blame("unreadable", f"{name}: {error}")
        weights = folder / WEIGHTS
        if weights.is_file() and self.key(output, WEIGHTS) in self.owned:
            content = weights.read_bytes()
            if not any(content == self.templates.whole(identity) for identity in self.identities):
                self.blame("bits", f"{output!a}/{WEIGHTS} is that of no unbroken run")

    def _judge_result(self, act: Act, succeeded: set[Identity | None]) -> None:
        """After a success: the folder holds one run, whole."""
        folder = self.folder / act.output
        if act.kind == TRANSFER:
            found = (folder / MODEL).read_bytes() if (folder / MODEL).is_file() else b""
            if not any(found == self.templates.moved(one.seed) for one in succeeded if one):
                self.blame("bits", f"{act.output}/{MODEL} is not what the transfer gives")
            return
        missing = [name for name in (WEIGHTS, "summary.json", "run.yaml") if not (folder / name).is_file()]
        if missing:
            self.blame("unusable", f"{act.output} has no {', '.join(missing)} after a success")
            return
        seed = self.seed_of(act.output)
        identities = {one for one in self.identities if one.seed == seed}
        if act.identity and len(succeeded) == 1 and act.identity.seed != seed:
            self.blame("mixed", f"run.yaml has seed {seed}, the run had {act.identity.seed}")
        content = (folder / WEIGHTS).read_bytes()
        if not any(content == self.templates.whole(identity) for identity in identities):
            self.blame("bits", f"{act.output}/{WEIGHTS} is not that of the unbroken run of seed {seed}")
        others = {
            checkpoints.facts(path)["seed"]
            for path in checkpoints.folders(folder)
            if checkpoints.facts(path) is not None
        }
        if others - {seed}:
            self.blame("mixed", f"run.yaml has seed {seed}, checkpoints are of {others}")


def _told(paths: set[str]) -> str:
    shown = [ascii(path) for path in sorted(paths)]
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return ", ".join(shown[:6]) + more


def _is_by(acts: Sequence[Act], makers: Sequence[Act]) -> bool:
    return any(act is maker for act in acts for maker in makers)


def _is_scratch(path: str) -> bool:
    """What a killed command may leave half done, and the next one may put away."""
    return any(part.startswith(".") for part in path.split(os.sep))
