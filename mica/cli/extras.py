"""The command that installs an extra of this package, for all messages that name one."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

DISTRIBUTION = "mica-fast"


def how_to_install(extra: str) -> str:
    """Return the pip command that adds ``extra``, a name in pyproject.toml, to this installation.

    pip finds an installed package by its name, wherever it was installed from, and asks no index for it. A
    checkout that was never installed is named by its path instead.
    """
    checkout = Path(__file__).resolve().parents[2]
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError:
        if (checkout / "pyproject.toml").is_file():
            return f'pip install "{checkout}[{extra}]"'
    return f'pip install "{DISTRIBUTION}[{extra}]"'
