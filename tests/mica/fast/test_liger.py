"""Beside Liger's kernels: the losses of a model with neither Liger nor this backend.

Liger's kernels run in Triton's interpreter here, compiled with MICA_TEST_DEVICE=cuda.
"""

import gc
import re

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers.integrations.liger import apply_liger_kernel

import mica.fast
from bench.measure.memory import alive_bytes
from mica.fast.frameworks import REMEDIES
from tests.support.kernel_cases import DEVICE
from tests.support.liger import run_on_any_device
from tests.support.models import ADAPTERS
from tests.support.stock import assert_same
from tests.support.training import Run, batches, check, llama, of_lora, report, train, trainable

pytest.importorskip("triton")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

DATA = batches(size=1, length=6)


@pytest.fixture(autouse=True)
def _patched_back(monkeypatch):
    run_on_any_device(monkeypatch)


def with_liger(**config):
    model = llama(num_hidden_layers=1, **config).to(DEVICE)
    apply_liger_kernel(model, None)  # what `use_liger_kernel=True` calls
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "path"),
    [("MiCA", "reference"), ("MiCA", "kernel"), ("LoRA", "reference")],
    indirect=["adapter"],
)
def test_the_losses_of_neither(monkeypatch, adapter, path):
    """RMSNorm, rotary embedding, SwiGLU and fused linear cross-entropy of Liger, around adapted layers."""
    monkeypatch.setenv("MICA_BACKEND", "triton" if path == "kernel" else "reference")
    model = with_liger(**ADAPTERS[adapter])
    done = report(model, lambda: train(model, DATA.to(DEVICE)))
    assert all(row.calls == len(DATA) for row in done["rows"])
    with mica.fast.disabled():
        expected = train(llama(num_hidden_layers=1, **ADAPTERS[adapter]), DATA)
    run = Run() if adapter == "MiCA" else of_lora(Run())
    check(done, expected, run, path=path)


def calls_of(model):
    ids = DATA.to(DEVICE)[0]
    model(input_ids=ids, labels=ids).loss.backward()
    return {row.name.rpartition(".")[2]: row.calls for row in mica.fast.explain(model).rows}


def test_an_adapter_on_the_output_layer_is_bypassed_and_explain_says_so():
    """Liger's fused loss reads `lm_head.weight`. ("all-linear" leaves the output layer out.)"""
    model = with_liger(targets=["q_proj", "lm_head"])
    assert calls_of(model) == {"q_proj": 1, "lm_head": 0}
    assert "; 1 not called" in str(mica.fast.explain(model))


def test_the_remedy_against_that():
    (option,) = re.findall(r"\w+=False", REMEDIES["liger_kernel"])
    model = llama(num_hidden_layers=1, targets=["q_proj", "lm_head"]).to(DEVICE)
    apply_liger_kernel(model, {option.removesuffix("=False"): False})
    assert calls_of(model) == {"q_proj": 1, "lm_head": 1}


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["activations", "norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_its_functions_give_is_computed_again_with_the_same_bits(dtype, recompute):
    """As beside hooks, which get x. Not kept: x of down_proj, and with "norms" that of gate and up."""
    model = llama(num_hidden_layers=1, dtype=dtype).to(DEVICE)
    # in 16 bits the interpreter gives NaN in the rotary embedding, and in bf16 everywhere, without MiCA too
    apply_liger_kernel(model, {"rope": False, "fused_linear_cross_entropy": False})
    ids = DATA.to(DEVICE)[0]
    config = model.config
    of_mlp, of_norms = config.intermediate_size, config.hidden_size if recompute == "norms" else 0
    copies = 2 * of_norms  # of the norms' weights
    less = (ids.numel() * (of_mlp + of_norms) - copies) * dtype.itemsize

    def forward():
        loss = model(input_ids=ids, labels=ids).loss
        gc.collect()  # what the interpreter leaves
        return loss

    def gradients(loss):
        return torch.autograd.grad(loss, list(trainable(model).values()))

    with saved_tensors_hooks(lambda x: x, lambda x: x):
        saved = alive_bytes(forward)
        expected = gradients(forward())
    mica.fast.enable(recompute=recompute)
    assert saved - alive_bytes(forward) >= less
    assert_same(gradients(forward()), expected, 0.0)
