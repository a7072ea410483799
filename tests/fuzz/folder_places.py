"""Where the inputs of a command may lie, and what they may be called: all that a file system allows."""

import os
import random
import shutil
from typing import NamedTuple

from tests.fuzz.folder_templates import FILES, Identity
from tests.fuzz.folder_world import World

ODD = tuple(
    os.fsdecode(name)
    for name in (
        *(
            b"caf\xe9",
            b"\xff\xfe",
            "a\u0085b".encode(),
            b"a\x7fb",
            "a\u0091b".encode(),
            b"new\nline",
            b"ta\tb",
        ),
        *(
            b"-dash",
            b"--output",
            b"x::words",
            b"file::words",
            b"#hash",
            b"colon: space",
            b" blank ",
            b"a # b",
        ),
        *(
            "\u2028".encode(),
            "\ufeffbom".encode(),
            b"[a]",
            b"*",
            b"{x}",
            b"$HOME",
            b"%41",
            b"'\"",
            b"back\\slash",
        ),
        *(
            b"l" * 240,
            b"null",
            b"1e5",
            b"y" * 100 + b"\xf0\x9f\xa6\x99",
            b"~no-user-has-this-name",
            b"\x01\x1b[31m",
        ),
        *(b"&anchor", b"*alias", b"!tag", b"- item", b"a,b", b"@at", b"`tick`", b"%YAML", b"?", b"|", b">"),
    )
)
# below the output folder; some as the names of what a run writes
INSIDE = ("{}", "base/{}", "merged/{}", "runs/{}", "checkpoint-words/{}", "checkpoint-77/{}", "sub/{}")
INSIDE_FILES = (
    "adapter_{}",
    "curve.{}",
    "vocab.{}",
    "tokenizer_{}",
    "chat_template_{}",
    "additional_chat_templates/{}",
)
OUTPUTS = ("out", "out", "project/run", "an odd name", "a link")


class Placed(NamedTuple):
    """``options``: for the command line. ``is_outside``: not in the output folder, nor around it."""

    options: list[str]
    is_outside: bool
    story: str
    template: str = ""  # of an adapter


def output(draw: random.Random, world: World) -> str:
    """A name for the output folder, which is not made; of a link, its target is."""
    kind = draw.choice(OUTPUTS)
    if kind == "an odd name":
        is_below = draw.random() < 0.5
        name = draw.choice(ODD)
        path = f"in/{name}" if is_below else name
        return path if _is_accepted(path) else kind
    if kind == "a link":
        (world.folder / "real").mkdir()
        return world.link("link", "real")
    return kind


def _is_accepted(output: str) -> bool:
    """Models can only be written to a path that is UTF-8, and a blank one is refused like an empty one."""
    return bool(output.strip()) and os.fsencode(output).decode(errors="replace") == output


def file(draw: random.Random, world: World, option: str, name: str, out: str) -> Placed:
    """A text, one of `FILES`, for ``option``."""
    kinds = ["plain", "odd", "odd", "inside", "inside", "link to inside", "link inside"]
    kinds += ["folder", "odd folder", "the output", "around"]
    kind = draw.choice(kinds)
    content = FILES[name]
    is_outside = False
    if kind == "inside" or kind == "link to inside":
        pattern = draw.choice(INSIDE + INSIDE_FILES)
        path = _put(world, f"{out}/{pattern.format(name)}", content)
        if kind == "link to inside":
            path = world.link(f"link-{name}", path)
    elif kind == "link inside":
        path = f"{out}/{draw.choice(INSIDE_FILES).format(name)}"
        if not os.path.lexists(world.folder / path):
            world.link(path, name)
    elif kind == "the output":
        _put(world, f"{out}/{name}", content)
        path = out
    elif kind == "around" and "/" in out:
        path = out.partition("/")[0]
        _put(world, f"{path}/{name}", content)
    else:
        is_outside = True
        path = name
        if kind == "odd":
            path = _put(world, f"{draw.choice(ODD)}.txt", content)
        elif kind == "folder":
            path = _put(world, f"folder-{name}/{name}", content).partition("/")[0]
        elif kind == "odd folder":
            path = _put(world, f"{draw.choice(ODD)}-{name}/{name}", content).partition("/")[0]
    return Placed([f"--{option}={path}"], is_outside, f"{option}: {kind} {path!a}")


def model(draw: random.Random, world: World, out: str, option: str = "model", name: str = "base") -> Placed:
    """A copy of the base, or of its sibling."""
    kind = draw.choice(["plain", "plain", "odd", "inside", "base", "link to inside", "the output"])
    if kind == "plain":
        return Placed([f"--{option}={name}"], True, f"{option}: plain")
    if kind == "odd":
        path = f"{draw.choice(ODD)}-{name}"
    elif kind == "the output":
        path = out
    else:
        below = draw.choice(["model", "adapter_base", "merged", "runs/m"])
        path = f"{out}/{'base' if kind == 'base' else below}"
    if not os.path.lexists(world.folder / path):
        shutil.copytree(world.folder / name, world.folder / path)
    if kind == "link to inside":
        path = world.link(f"link-{name}", path)
    return Placed([f"--{option}={path}"], kind == "odd", f"{option}: {kind} {path!a}")


def adapter(draw: random.Random, world: World, out: str, template: str) -> Placed:
    """A finished run, ``template``, to go on from."""
    kind = draw.choice(["plain", "odd", "inside", "link to inside"])
    path = template
    if kind == "odd":
        path = f"{draw.choice(ODD)}-adapter"
    elif kind in ("inside", "link to inside"):
        path = f"{out}/{draw.choice(['earlier', 'adapter_earlier', 'checkpoint-old', 'base', 'merged'])}"
    if not os.path.lexists(world.folder / path):
        world.earlier(template, path, Identity(int(template.rpartition("-")[2])))
        # it is an input: as if it were the user's
        world.owned = {one for one in world.owned if not (one == path or one.startswith(f"{path}/"))}
    if kind == "link to inside":
        path = world.link("link-adapter", path)
    return Placed([f"--adapter={path}"], kind in ("plain", "odd"), f"adapter: {kind} {path!a}", template)


def config(draw: random.Random, world: World, out: str) -> Placed:
    """A file of options that change no bits."""
    content = "log_steps: 3\neval-blocks: 2\n"
    kind = draw.choice(["plain", "odd", "inside"])
    if kind == "plain":
        path = _put(world, "my.yaml", content)
    elif kind == "odd":
        path = _put(world, f"{draw.choice(ODD)}.yaml", content)
    else:
        path = _put(world, f"{out}/{draw.choice(INSIDE + INSIDE_FILES).format('my.yaml')}", content)
    return Placed([f"--config={path}"], kind != "inside", f"config: {kind} {path!a}")


def _put(world: World, path: str, content: str) -> str:
    """A user's file at ``path``, unless something is there."""
    if not os.path.lexists(world.folder / path):
        world.put(path, content)
    return path
