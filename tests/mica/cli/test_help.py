"""``--help``: each page ends with an example of complete lines, and names no page of the repository."""

import os
import shlex
import subprocess
import sys

import pytest

from mica.cli import main, parser
from tests.test_house import OPTIONS


@pytest.fixture(
    params=[[], *([command] for command in OPTIONS)], ids=lambda command: " ".join(["mica", *command])
)
def page(request, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*request.param, "--help"]) == 0
    return request.param, capsys.readouterr().out


def test_the_example_is_complete(page):
    command, text = page
    _, _, end = text.partition("\nexample:\n")
    lines = [line for line in end.splitlines() if line.startswith("  ")]
    assert 1 <= len(lines) <= 2
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "mica"
        assert argv[: len(command)] == command
        assert parser().parse_args(argv).command == argv[0]
    assert end.rstrip().endswith(".")


def test_a_page_is_readable_and_whole(page):
    """No page of the repository is named: they are not in the wheel; what a command writes may be."""
    _, text = page
    assert max(map(len, text.splitlines())) <= 110
    assert ("(default: 16)" in text) == (page[0] in (["inspect"], ["fits"]))
    assert [word for word in ("(default: None)", "(default: False)", "OWNER") if word in text] == []
    assert [word for word in text.split() if ".md" in word and not word.startswith("found/")] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has such a device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_line(unbuffered):
    code = """if True:
        from mica.cli import doctor, main
        doctor.run = lambda args: print("a report") or 0  # the real one imports torch
        raise SystemExit(main(["doctor"]))
    """
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    said = b"mica: error: standard output cannot be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (2, said)


@pytest.mark.parametrize("options", ["", "--adapter x"])
def test_neither_help_nor_the_first_line_of_a_run_needs_torch(options):
    argv = f"adapt --model x --text x --output x {options}".split()
    code = (
        f"import sys; from mica.cli import main; [main([c, '--help']) for c in {list(OPTIONS)}]; "
        "print([n for n in ('torch', 'transformers', 'packaging', 'matplotlib') if n in sys.modules]); "
        f"sys.modules['torch'] = None; main({argv})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n")
    assert result.stderr.startswith("mica adapt: loading libraries, model and texts ...\n")
    assert result.stderr.endswith("import of torch halted; None in sys.modules\n")
