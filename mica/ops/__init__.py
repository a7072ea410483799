"""The operators ``torch.ops.mica.*``, and checked functions of two of them; importing this registers all.

Each takes Triton kernels (`mica.paths.triton_path`) or plain PyTorch (`mica.paths.reference_path`), as
`mica.paths.choose` decides. That of an embedding is always plain PyTorch.
"""

from mica.ops import embedding as _embedding  # noqa: F401  (registers its operators)
from mica.ops.experts import mica_experts_linear
from mica.ops.linear import mica_linear
from mica.ops.operator import call_counts

__all__ = [
    "call_counts",
    "mica_experts_linear",
    "mica_linear",
]
