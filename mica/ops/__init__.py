"""The operators ``torch.ops.mica.*`` and their checked functions; importing this registers all of them.

Each takes Triton kernels (`mica.paths.triton_path`) or plain PyTorch (`mica.paths.reference_path`), as
`mica.paths.choose` decides. That of an embedding is always plain PyTorch.
"""

from mica.ops.embedding import mica_embedding
from mica.ops.experts import mica_experts_linear
from mica.ops.linear import mica_linear
from mica.ops.low_rank import mica_down_projection, mica_up_projection
from mica.ops.operator import call_counts

__all__ = [
    "call_counts",
    "mica_down_projection",
    "mica_embedding",
    "mica_experts_linear",
    "mica_linear",
    "mica_up_projection",
]
