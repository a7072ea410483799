"""MiCA (Minor Component Adaptation, arXiv 2604.01694) for PEFT: solver, operators, backend.

``import mica.fast`` makes PEFT's ``LoraConfig(init_lora_weights="mica")`` run on this package.
``mica.minor_subspace`` is the solver alone; it needs neither PEFT nor Triton.
"""

from importlib.metadata import PackageNotFoundError, version

from mica.subspace import MinorSubspace, minor_subspace

try:
    __version__ = version("mica-fast")
except PackageNotFoundError:  # read from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["MinorSubspace", "minor_subspace", "__version__"]
