"""The minor singular subspace of a weight matrix, from which MiCA builds ``lora_B`` (arXiv 2604.01694).

``solver`` is the public function: it checks, chooses a method and falls back. ``result`` is what it returns.
``methods`` lists the ways to a ``candidate``, which a ``certificate`` judges as it is returned. ``krylov`` is
the iteration, written once for the two kinds of Gram matrix: ``host`` (one matrix, SciPy's BLAS, by
``lapack``) and ``batched`` (many, on an accelerator; ``device`` feeds it). ``gram`` streams products with the
weight, ``threads`` limits those of BLAS and PyTorch and solves many small layers at once, ``cache`` keeps
results on disk by the ``fingerprint`` of a weight. ``spectrum`` is for ``mica inspect`` only.
"""

from mica.subspace.result import MinorSubspace
from mica.subspace.solver import minor_subspace

__all__ = ["MinorSubspace", "minor_subspace"]
