"""What goes wrong outside of the code that is tested."""

from collections.abc import Callable
from typing import NoReturn

FULL = OSError(28, "No space left on device")


def raising(error: Exception) -> Callable[..., NoReturn]:
    """A function of any arguments that raises ``error``."""

    def function(*_, **__):
        raise error

    return function
