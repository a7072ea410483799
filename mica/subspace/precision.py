"""Full fp32 products, whatever precision PyTorch has been told to make them with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of (backend, operation), each after those that it inherits from. All of PyTorch's ways to set a precision,
# `torch.set_float32_matmul_precision` too, write these, and its products (from 2.9 on) read nothing else.
_SETTINGS = (("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul"))
_REDUCED = ("tf32", "bf16")

# The public properties lack one: that of `torch.backends.mkldnn` sets another's. Without these functions
# products may be reduced, which the error that is measured of a Gram shows.
_get = getattr(torch._C, "_get_fp32_precision_getter", lambda *setting: "none")
_set = getattr(torch._C, "_set_fp32_precision_setter", None)

_lock = threading.Lock()


@contextmanager
def full_fp32() -> Iterator[None]:
    """No fp32 product in it is made of fewer bits; afterwards every setting is what it was.

    They are the whole process's, so one thread at a time is within. A setting that is not set reads as the
    one above it: these go first, and what is still reduced then is a setting's own.
    """
    with _lock:
        changed = []
        try:
            for setting in _SETTINGS:
                before = _get(*setting)
                if before in _REDUCED:
                    _set(*setting, "ieee")
                    changed.append((setting, before))
            yield
        finally:
            for setting, before in changed:
                _set(*setting, before)
