"""All layers solved at once: progress, cache, device, processes, sharded weights; what is said of each."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.fast.create import solving as module
from mica.subspace import device, many
from tests.support import gloo
from tests.support.models import Net, adapted_layers, bases, net, tiny_llama, wrap
from tests.support.moe_models import qwen3_moe, wrap_experts


def assert_same_bases(model, expected):
    other = bases(expected)
    for name, basis in bases(model).items():
        assert torch.equal(basis, other[name]), name


def test_progress_bar_follows_the_hub_s_switch(monkeypatch):
    seen, updates = [], []

    class Bar(module.tqdm):
        def __init__(self, *args, **kwargs):
            seen.append(kwargs)
            super().__init__(*args, **kwargs)

        def update(self, n=1):
            updates.append(n)
            return super().update(n)

    monkeypatch.setattr(module, "tqdm", Bar)
    net()
    assert (seen[0]["desc"], seen[0]["delay"], seen[0]["total"]) == ("MiCA initialisation", 2, 4)
    assert sum(updates) == 4
    disable_progress_bars()
    try:
        net()
    finally:
        enable_progress_bars()
    assert (seen[0]["disable"], seen[1]["disable"]) == (None, True)


def test_an_unproven_basis_is_said(monkeypatch):
    solver = many.solve_each

    def unproven(weight, rank, **kwargs):
        return [replace(solver(weight, rank)[0], certified=False, energy_excess=0.5)]

    monkeypatch.setattr(many, "solve_each", unproven)
    with pytest.warns(UserWarning, match=r"layer 'up' is not proven .*at most 5.0e-01 above"):
        wrap(Net(), targets=["up"])


def test_null_directions_are_said_with_the_layer_s_name():
    model = Net()
    with torch.no_grad():
        model.up.weight[:, :2] = 0  # 20 x 12: tall
    with pytest.warns(UserWarning, match=r"^2 of the 4 smallest .* of layer 'up' are numerically null"):
        wrap(model, targets=["up"])


def test_a_second_initialisation_comes_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path))
    first = net()
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(many, "solve_each", None)
    assert_same_bases(net(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_cpu_go_to_an_accelerator_and_back(dtype, monkeypatch):
    expected = net(dtype)
    monkeypatch.setattr(device, "ON_HOST", ())  # the CPU stands for one
    batches, solver = [], many.solve_each

    def counting(weight, rank, **kwargs):
        batches.append(weight.shape)
        return solver(weight, rank, **kwargs)

    monkeypatch.setattr(many, "solve_each", counting)
    mica.fast.enable(device="meta")
    with pytest.raises(UnsuitableLayerError, match=r"layer 'embed': .*meta device"):
        net(dtype)
    mica.fast.enable(device="cpu")
    batches.clear()
    model = net(dtype)
    assert all(len(shape) == 3 for shape in batches)
    for name, basis in bases(model).items():
        assert basis.device.type == "cpu"
        torch.testing.assert_close(basis, bases(expected)[name], rtol=0, atol=1e-6)


def test_layers_of_one_shape_are_one_batch(monkeypatch):
    monkeypatch.setattr(device, "ON_HOST", ())
    batches, solver = [], many.solve_each

    def counting(weight, rank, **kwargs):
        batches.append(tuple(weight.shape))
        return solver(weight, rank, **kwargs)

    monkeypatch.setattr(many, "solve_each", counting)
    model = wrap(tiny_llama(), targets="all-linear")
    assert sum(shape[0] for shape in batches) == len(adapted_layers(model))
    assert len(batches) == len({shape[1:] for shape in batches})


@pytest.mark.parametrize("wrong", ["tpu?", 1.5, None])
def test_a_device_that_is_none(wrong):
    with pytest.raises(ValueError, match=r"^device must be 'auto' or a torch device, but it is"):
        mica.fast.enable(device=wrong)


def _wrapped(rank):
    models = [net(), wrap_experts(qwen3_moe())]  # layers, and stacks of experts
    return {name: basis.detach() for model in models for name, basis in bases(model).items()}


def test_two_processes_hold_the_same_bits():
    first, second = gloo.run(_wrapped)
    for name, basis in _wrapped(0).items():
        assert torch.equal(first[name], basis)
        assert torch.equal(second[name], basis)


def test_tensor_parallel_weights_are_refused():
    model = Net()
    model.up._hf_tp_plan = "colwise"
    with pytest.raises(UnsuitableLayerError, match=r"whole weight, but layer 'up' holds one shard of it"):
        wrap(model, targets=["up"])
    assert type(model.up) is nn.Linear


def test_partitioned_weights_are_gathered_one_at_a_time(monkeypatch):
    """As DeepSpeed's ZeRO-3 does it: outside of a gathering context a weight is empty."""
    expected = net()
    model = Net()
    model.load_state_dict(
        {key.replace(".base_layer", ""): value for key, value in _base_state(expected).items()}
    )
    whole, gathered = {}, []
    for name in ("up", "down"):
        parameter = getattr(model, name).weight
        parameter.ds_id = name
        whole[name], parameter.data = parameter.data, parameter.data.new_empty(0)

    @contextmanager
    def gather(parameter):
        if not hasattr(parameter, "ds_id") or parameter.numel():
            yield
            return
        gathered.append(parameter.ds_id)
        assert sum(getattr(model, name).weight.numel() > 0 for name in whole) == 0
        parameter.data = whole[parameter.ds_id]
        try:
            yield
        finally:
            parameter.data = parameter.data.new_empty(0)

    monkeypatch.setattr(module, "gather_params_ctx", gather)
    monkeypatch.setattr("peft.tuners.lora.layer.gather_params_ctx", gather)
    wrapped = wrap(model)
    assert sorted(gathered) == ["down", "down", "up", "up"]  # checked, then solved
    for name in whole:
        assert getattr(model, name).base_layer.weight.numel() == 0
    assert_same_bases(wrapped, expected)


def _base_state(model):
    prefix = "base_model.model."
    return {
        key.removeprefix(prefix): value for key, value in model.state_dict().items() if "lora_" not in key
    }
