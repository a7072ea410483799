"""The minor singular subspace of a weight matrix, from which MiCA builds ``lora_B`` (arXiv 2604.01694).

``solver`` is the public function: it checks, chooses a method and falls back. ``result`` is what it returns.
``methods`` lists the ways to a ``candidate``, which is judged as it is returned by a ``certificate``.
``krylov`` is the iteration, written once for the two kinds of Gram matrix it runs on: ``host`` (one matrix,
SciPy's BLAS, by ``lapack``) and ``batched`` (many, on an accelerator; ``device`` feeds it). ``gram`` streams
products with the weight, ``workers`` solves many small layers at once (``threads`` is how many BLAS and
PyTorch have meanwhile), ``cache`` keeps results on disk, found by a weight's ``fingerprint``.
"""

from mica.subspace.result import MinorSubspace
from mica.subspace.solver import minor_subspace

__all__ = ["MinorSubspace", "minor_subspace"]
