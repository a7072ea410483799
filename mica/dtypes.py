"""The dtypes that weights, activations and adapters may have, named once."""

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
