"""Peak rates of devices, by the name that PyTorch gives them: the vendor's figures, which nothing reaches.

Rates are those of dense products, without sparsity. Sources: for rates and bandwidths NVIDIA's product pages
(https://www.nvidia.com/en-us/data-center/h100/, likewise h200, a100, l4 and hgx), for L2 caches its white
papers on the Ampere, Ada, Hopper and Blackwell architectures.
"""

from __future__ import annotations

from typing import NamedTuple

TERA = 1e12
MEGABYTE = 2**20


class Peak(NamedTuple):
    """Of a compilation target: bytes a second of the memory, operations a second, bytes of the L2 cache."""

    target: str
    bandwidth: float
    flop_16_bit: float  # bfloat16 and float16, on tensor cores
    flop_fp32: float  # without TF32, PyTorch's default for products in float32
    cache: float


_A100_80 = Peak("sm_80", 2.039 * TERA, 312 * TERA, 19.5 * TERA, 40 * MEGABYTE)

PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak("sm_90", 3.35 * TERA, 989 * TERA, 67 * TERA, 50 * MEGABYTE),  # SXM
    "NVIDIA H100 PCIe": Peak("sm_90", 2.0 * TERA, 756 * TERA, 51 * TERA, 50 * MEGABYTE),
    "NVIDIA H200": Peak("sm_90", 4.8 * TERA, 989 * TERA, 67 * TERA, 50 * MEGABYTE),
    "NVIDIA A100-SXM4-80GB": _A100_80,
    "NVIDIA A100 80GB PCIe": _A100_80._replace(bandwidth=1.935 * TERA),
    "NVIDIA A100-SXM4-40GB": _A100_80._replace(bandwidth=1.555 * TERA),
    "NVIDIA A100-PCIE-40GB": _A100_80._replace(bandwidth=1.555 * TERA),
    "NVIDIA L4": Peak("sm_89", 0.3 * TERA, 121 * TERA, 30.3 * TERA, 48 * MEGABYTE),
    "NVIDIA B200": Peak("sm_100", 8.0 * TERA, 2250 * TERA, 80 * TERA, 126 * MEGABYTE),
}
