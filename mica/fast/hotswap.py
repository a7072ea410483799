"""PEFT's hotswap writes new adapters through ``.data``, which PyTorch does not count as a change of a tensor.

So whatever was made from the old B (`mica.kernels.prepared`, `mica.fast.mixed_batch`) is made again.
"""

from __future__ import annotations

from mica import backend
from mica.fast import mixed_batch


def hotswap_adapter_from_state_dict(stock):
    def hotswap_adapter_from_state_dict(*args, **kwargs):
        try:
            return stock(*args, **kwargs)
        finally:  # also after an error: a part of the weights may be new
            backend.forget_prepared()
            mixed_batch.forget()

    return hotswap_adapter_from_state_dict
