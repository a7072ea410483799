"""Mistakes at the prompt: each gets one line that names the argument, status 2, and nothing is written."""

import shlex
from pathlib import Path

import pytest

from mica.cli import main
from tests.support.tables import rows

ADAPT = "adapt --model x --text x --output out"

# The arguments, and how the line begins and ends behind "mica COMMAND: error: "
MISTAKES = rows(f"""
 => no command is given; mica --help lists them =>
adpat => no command is called 'adpat'; did you mean adapt? =>
nothing => no command is called 'nothing'; mica --help lists all =>
--verison => unrecognized arguments: --verison => ; did you mean --version?
--rank 4 adapt => unrecognized arguments: --rank => ; mica --help lists all
adapt --sequence-lenght 64 => unrecognized arguments: --sequence-lenght => --sequence-length?
{ADAPT} --rnak 4 => unrecognized arguments: --rnak => ; did you mean --rank?
{ADAPT} --lr=1 => unrecognized arguments: --lr=1 => ; did you mean --learning-rate?
{ADAPT} --xyz=1 => unrecognized arguments: --xyz=1 => ; mica adapt --help lists all
{ADAPT} --learning-rate -1 => argument --learning-rate: must be a number above 0 => not '-1'
{ADAPT} --dtype flaot32 => argument --dtype: invalid choice: 'flaot32' (choose from =>
transfer --adaptr x --to y => unrecognized arguments: --adaptr => mean --adapter?
run => the following arguments are required: SCRIPT => ARGS
run --expain x.py => unrecognized arguments: --expain => ; did you mean --explain?
run -c print() => argument -c: code is not taken; write it to a file, or pipe it to => mica run -
run nowhere.py --rank 4 => nowhere.py: No such file or => directory
inspect x --rank 4 8 => unrecognized arguments: 8 => ; mica inspect --help lists all
inspect '' => argument MODEL: must not be empty =>
inspect x --rank {"1" * 20} => argument --rank: must be a whole number at least 1 =>
transfer --adapter= --to=x --output=y => argument --adapter: must not be empty =>
{ADAPT} --steps {"1" * 400} => argument --steps: must be a whole number at least 1 =>
{ADAPT} --output {"a" * 5000} => argument --output: 'aaa => File name too long
inspect {"a" * 5000} => argument MODEL: 'aaa => File name too long
""")


@pytest.mark.parametrize(("argv", "start", "end"), MISTAKES)
def test_a_mistake_gets_one_line(argv, start, end, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(argv)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    program, _, message = err.rstrip("\n").partition(": error: ")
    assert program in ("mica", f"mica {argv[0] if argv else ''}")
    assert message.startswith(start)
    assert message.endswith(end)
    assert not [*tmp_path.iterdir()]


# Paths that the system refuses to look at


PLACES = """
adapt --model PATH --text x --output y
adapt --model x --text PATH --output y
adapt --model x --text x --output PATH
adapt --adapter PATH --model x --text x --output y
adapt --config PATH --output y
adapt --output PATH --resume
inspect PATH
inspect x --json PATH
transfer --adapter PATH --to x --output y
transfer --adapter x --to PATH --output y
""".strip().splitlines()


@pytest.mark.parametrize("argv", PLACES)
def test_a_path_that_cannot_be_looked_at(argv, tmp_path, capsys, monkeypatch):
    """A loop of links, and a folder that this process may not search."""
    loop, shut = tmp_path / "loop", tmp_path / "shut"
    loop.symlink_to("loop")
    shut.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != shut)
    argv = argv.split()
    option = argv[argv.index("PATH") - 1]
    named = "MODEL" if option == "inspect" else option
    for path, reason in ((loop, "Too many levels of symbolic links"), (shut, "Permission denied")):
        assert main([str(path) if token == "PATH" else token for token in argv]) == 2
        said = f"mica {argv[0]}: error: argument {named}: '{path}': {reason}\n"
        assert capsys.readouterr() == ("", said)
