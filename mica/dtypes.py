"""The dtypes that weights, activations and adapters may have, named once.

A new one is an entry here, in tests/support/tolerances.py and, if its size is new, in `_BITS` of
mica/subspace/content_hash.py, and `bits` of its test. The tests then run with it and show which operations
PyTorch lacks; C++ leaves such layers to Python. For kernels it is an entry in kernels/limits.py, and one in
each `DTYPES` of tests/support/kernel_cases.py, tests/support/static_cases.py and tests/emulator/cases.py.
"""

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
