"""What is decided about a call of an adapted layer: PEFT's own code, or operators with all that they need.

The layer's forward runs the very object that `mica.fast.explain` prints.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mica import backend

KERNEL, REFERENCE, PEFT, ERROR = "kernel", "reference", "peft", "error"


class OnPeft(NamedTuple):
    """PEFT's own code runs, for this reason."""

    reason: str

    def explained(self) -> tuple[str, str]:
        return PEFT, self.reason


class OnOperators:
    """The operators of `mica.ops` run: an instance is called with the layer's x."""

    why_called: str | None = None  # why the base layer is called, instead of its weight being read

    def products(self) -> list[tuple[Tensor, ...]]:
        """(lora_A, lora_B) of each operator, and the base weight where it multiplies by that too."""
        raise NotImplementedError

    def explained(self) -> tuple[str, str]:
        """The path, and why it is not the one before it in this module's list of paths."""
        reason = f"base layer called: {self.why_called}" if self.why_called else ""
        for lora_A, *others in self.products():
            dtypes = (tensor.dtype for tensor in (*others[1:], lora_A, others[0]))
            refused = backend.why_not_kernels(lora_A.device, lora_A.shape[-2], *dtypes)
            if refused:
                path = ERROR if backend.requested() == "triton" else REFERENCE
                return path, "; ".join(filter(None, (refused, reason)))
        return KERNEL, reason
