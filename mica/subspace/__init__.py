"""The minor singular subspace of a weight matrix, from which MiCA builds ``lora_B`` (arXiv 2604.01694).

``solver`` is the public function and its table of methods, ``gram`` the streamed fp64 products with
the weight, ``eigen`` the partial eigenproblem, ``certificate`` the proof that a result is the minor one.
"""

from mica.subspace.solver import MinorSubspace, minor_subspace

__all__ = ["MinorSubspace", "minor_subspace"]
