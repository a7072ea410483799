"""A user's script type-checks in strict mode, with mypy and pyright, and the public names are fully typed.

pyright runs as basedpyright, which comes with its own Node.js. It has pyright's strict mode.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.imports import ROOT
from tests.test_house import PUBLIC

SCRIPT = ROOT / "tests/typing/user_script.py"

# line -> a word of what both checkers must say about it: what they see is not `Any`
WRONG = {
    "import mica.fast": None,
    "import torch": None,
    'mica.minor_subspace(torch.eye(3), rank="1")': "argument",
    "mica.minor_subspaces": "attribute",
    'mica.fast.enable(recompute="ignore")': "argument",
    "mica.fast.enable(compute=torch.float32)": "compute",
    "mica.fast.explain(model=torch.nn.ReLU()).counted": "attribute",
    "1 + mica.fast.merge_report(torch.nn.ReLU())": "operator",
}


def _said(folder: Path, module: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode < 2, done.stdout + done.stderr
    return done.stdout


def _mypy(folder: Path) -> list[str]:
    # silent: of the package itself its signatures count, as if it were installed
    options = ["--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir", folder / "cache"]
    said = _said(folder, "mypy", *options, "script.py", "wrong.py", MYPYPATH=str(ROOT))
    return [line for line in said.splitlines() if ": error: " in line]


def _pyright(folder: Path) -> list[str]:
    settings = {"include": ["."], "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    options = ["--outputjson", "--pythonpath", sys.executable]
    said = _said(folder, "basedpyright", *options, PYTHONPATH=str(ROOT))
    return [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1}: {one['message']} ({one.get('rule')})"
        for one in json.loads(said)["generalDiagnostics"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("check", [_mypy, _pyright], ids=lambda check: check.__name__[1:])
def test_a_users_script(check, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "wrong.py").write_text("".join(f"{line}\n" for line in WRONG))
    errors = check(tmp_path)
    assert not [error for error in errors if error.startswith("script.py")]
    for number, word in enumerate(WRONG.values(), start=1):
        said = [error.lower() for error in errors if error.startswith(f"wrong.py:{number}:")]
        assert bool(said) == bool(word), errors
        assert not word or any(word in error for error in said), said


def test_the_script_uses_every_public_name():
    code = SCRIPT.read_text(encoding="utf-8")
    assert not [name for names in PUBLIC.values() for name in names if name not in code]
