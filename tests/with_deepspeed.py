"""DeepSpeed's tests, in an environment that has it.

    python -m tests.with_deepspeed [--work DIR] [TEST ...]

The environment lies on top of this one and sees its packages. DeepSpeed is not installed into this one,
because transformers and accelerate import it wherever it is installed, and most users do not have it.
Installing it compiles nothing; the tests compile the one operator that they need.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEEPSPEED = "deepspeed>=0.19.8,<1"
TESTS = ("tests/mica/fast/test_deepspeed.py",)


def make_environment(folder: Path) -> Path:
    """The interpreter of an environment in which pip sees the packages of this one, and leaves them alone."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    paths = {"base": folder, "platbase": folder}
    own, ours = Path(sysconfig.get_path("purelib", vars=paths)), sysconfig.get_path("purelib")
    (own / "packages_below.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    return folder / "bin" / "python"


def install(python: Path) -> None:
    """DeepSpeed and what it needs; an error if it needs another PyTorch."""
    command = [python, "-m", "pip", "install", "-q", DEEPSPEED, f"torch=={version('torch')}"]
    subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})


def run(python: Path, tests: list[str]) -> int:
    """pytest's status: that of no test at all is an error, too."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # ninja, which compiles the operator
    command = [python, "-m", "pytest", *tests]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "deepspeed")
    args = parser.parse_args()
    python = make_environment(args.work)
    install(python)
    sys.exit(run(python, args.tests))
