"""Matrix products on the CPU that compute nothing, for the host's time of everything else (no_products.cpp).

Results have the right sizes and no values. PyTorch warns, once, that its operators are replaced.
"""

from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

from mica.native import build, import_extension


@cache
def _module() -> ModuleType:
    return import_extension(build.default_folder(), Path(__file__).with_suffix(".cpp"))


@contextmanager
def installed():
    """In this process, until the block is left."""
    _module().install()
    try:
        yield
    finally:
        _module().uninstall()
