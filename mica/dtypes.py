"""The dtypes that weights, activations and adapters may have, named once.

A new one is an entry here and in tests/support/tolerances.py. The tests then run with it and show which
operations PyTorch lacks; C++ leaves such layers to Python. For kernels it is an entry in kernels/limits.py,
and one in each `DTYPES` of tests/support/kernel_cases.py, tests/support/static_cases.py and
tests/emulator/cases.py.
"""

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
