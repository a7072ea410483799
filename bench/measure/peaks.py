"""Peak bandwidths of devices, by PyTorch's name for them: the vendor's figures, which nothing reaches.

Source: NVIDIA's product pages (https://www.nvidia.com/en-us/data-center/h100/, likewise h200, a100, l4, hgx).
"""

from __future__ import annotations

TERA = 1e12

BANDWIDTHS = {  # bytes a second
    "NVIDIA H100 80GB HBM3": 3.35 * TERA,  # SXM
    "NVIDIA H100 PCIe": 2.0 * TERA,
    "NVIDIA H200": 4.8 * TERA,
    "NVIDIA A100-SXM4-80GB": 2.039 * TERA,
    "NVIDIA A100 80GB PCIe": 1.935 * TERA,
    "NVIDIA A100-SXM4-40GB": 1.555 * TERA,
    "NVIDIA A100-PCIE-40GB": 1.555 * TERA,
    "NVIDIA L4": 0.3 * TERA,
    "NVIDIA B200": 8.0 * TERA,
}
