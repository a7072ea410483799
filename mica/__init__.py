"""MiCA (Minor Component Adaptation, arXiv 2604.01694) for PEFT: solver, operators, backend.

``import mica.fast`` makes PEFT's ``LoraConfig(init_lora_weights="mica")`` run on this package.
``mica.minor_subspace`` is the solver alone; it needs neither PEFT nor Triton.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

try:
    __version__ = version("mica-fast")
except PackageNotFoundError:  # read from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["MinorSubspace", "minor_subspace", "__version__"]

if TYPE_CHECKING:  # type checkers see what is there, and that nothing else is
    from mica.subspace import MinorSubspace, minor_subspace
else:

    def __getattr__(name: str):
        """The solver on first use: it needs torch, and ``mica --help`` does not."""
        if name in ("MinorSubspace", "minor_subspace"):
            from mica import subspace

            return getattr(subspace, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
