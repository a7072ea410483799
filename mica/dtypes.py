"""The dtypes that weights, activations and adapters may have, named once.

A new one is an entry here and in tests/support/tolerances.py: the tests of the solver, of row checksums and
of merging then run with it, and show which operations PyTorch lacks. Those of operators and layers do so only
with an entry in each `DTYPES` of tests/support/oracle.py and tests/mica/fast/test_initialisation.py and
test_layers.py. C++ leaves such layers to Python. For kernels it is an entry in kernels/limits.py, and one in
each `DTYPES` of tests/support/kernel_cases.py, tests/support/static_cases.py and tests/emulator/cases.py;
without them tests/mica/paths/test_parity.py must not ask for kernels (`DTYPES_ON`).
"""

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
