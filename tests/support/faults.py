"""What goes wrong outside of the code that is tested."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

FULL = OSError(28, "No space left on device")


def fill_disk_for(name: str, monkeypatch) -> None:
    """No file of that name can be put in its place."""
    replace = os.replace

    def replace_others(source, target):
        if Path(target).name == name:
            raise FULL
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_others)


def raising(error: Exception) -> Callable[..., NoReturn]:
    """A function of any arguments that raises ``error``."""

    def function(*_, **__):
        raise error

    return function
