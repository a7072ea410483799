"""The minor singular subspace of a weight matrix, from which MiCA builds ``lora_B`` (arXiv 2604.01694).

``solver`` has the public function, which checks its arguments, chooses a method and falls back; ``result`` is
what it returns. ``methods`` lists the ways to a ``candidate``, whose energy a ``certificate`` proves.
``krylov`` is the iteration, written once for two kinds of Gram matrix: ``host`` (one matrix, on SciPy's BLAS
through ``lapack``) and ``batched`` (many on an accelerator, where ``device`` forms the batches). ``gram``
streams products with the weight, ``threads`` limits the threads of BLAS and PyTorch, and ``many`` solves
whole models, which ``distributed`` shares among processes. ``cache`` keeps results on disk by the
``content_hash`` of a weight.
"""

from mica.subspace.result import MinorSubspace
from mica.subspace.solver import minor_subspace

__all__ = ["MinorSubspace", "minor_subspace"]
