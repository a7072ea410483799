"""The measurement of 16-bit products: what it returns, and that it leaves the process as it was."""

import torch

from mica.cli.products import product_ratios


def test_ratios_of_both_products_of_a_layer():
    threads = torch.get_num_threads()
    ratios = product_ratios()
    assert list(ratios) == ["bfloat16", "float16"]
    for found in ratios.values():
        assert list(found) == ["x Wᵀ", "dy W"]
        assert all(0 < ratio < 1e4 for ratio in found.values())
    assert torch.get_num_threads() == threads


def test_a_product_that_pytorch_has_not(monkeypatch):
    multiply = torch.Tensor.__matmul__

    def without_fp16(self, other):
        if self.dtype is torch.float16:
            raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")
        return multiply(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", without_fp16)
    assert product_ratios()["float16"] == {"x Wᵀ": None, "dy W": None}
    assert None not in product_ratios()["bfloat16"].values()
