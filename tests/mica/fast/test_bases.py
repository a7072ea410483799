"""All layers solved at once: progress, cache, device, processes, sharded weights; what is said of each."""

import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import mica.fast
from mica.errors import UnsuitableLayerError
from mica.fast.create import initialisation
from mica.fast.create import solving as module
from mica.subspace import device, many
from tests.support import gloo
from tests.support.models import Net, adapted_layers, bases, factors, net, stored, tiny_llama, wrap
from tests.support.moe_models import (
    assert_same_vectors,
    exact_basis,
    holder,
    qwen3_moe,
    wrap_experts,
    wrap_holder,
    wrappers,
)
from tests.support.peft_versions import needs_peft


def assert_same_bases(model, expected):
    other = bases(expected)
    for name, basis in bases(model).items():
        assert torch.equal(basis, other[name]), name


@pytest.fixture
def bars(monkeypatch):
    """(options, total of the updates) of every progress bar."""
    seen = []

    class Bar(module.tqdm):
        def __init__(self, *args, **kwargs):
            seen.append([kwargs, 0])
            super().__init__(*args, **kwargs)

        def update(self, n=1):
            seen[-1][1] += n
            return super().update(n)

    monkeypatch.setattr(module, "tqdm", Bar)
    return seen


def test_progress_bar_follows_the_hub_s_switch(bars):
    net()
    disable_progress_bars()
    try:
        net()
    finally:
        enable_progress_bars()
    (shown, updates), (hidden, _) = bars
    assert (shown["desc"], shown["delay"], shown["total"], updates) == ("MiCA initialisation", 2, 4, 4)
    assert (shown["disable"], hidden["disable"]) == (None, True)


def test_one_bar_counts_the_experts(bars):
    wrap_experts(qwen3_moe())
    ((options, updates),) = bars
    assert (options["total"], options["unit"], updates) == (24, "expert", 24)


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


def test_null_directions_of_many_experts_are_one_warning():
    weight = torch.randn(4, 12, 6)
    weight[:3, :, 0] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrap_holder(holder(weight))
    (text,) = {str(w.message) for w in caught if "null" in str(w.message)}
    assert text.startswith("1 of the 2 smallest singular values of layer 'experts.down_proj' expert 0")
    assert text.endswith("So it is for 2 more of this layer's experts.")


@pytest.mark.parametrize(("build", "count"), [(net, 4), (lambda: wrap_experts(qwen3_moe()), 24)])
def test_a_second_initialisation_comes_from_the_cache(build, count, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path))
    first = build()
    assert len(list(tmp_path.iterdir())) == count
    monkeypatch.setattr(many, "solve_each", None)
    assert_same_bases(build(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_cpu_go_to_an_accelerator_and_back(dtype, monkeypatch, solved):
    expected = net(dtype)
    monkeypatch.setattr(device, "ON_HOST", ())  # the CPU stands for one
    mica.fast.enable(device="meta")
    with pytest.raises(UnsuitableLayerError, match=r"layer 'embed': .*meta device"):
        net(dtype)
    mica.fast.enable(device="cpu")
    solved.clear()
    model = net(dtype)
    assert all(len(shape) == 3 for shape in solved)
    for name, basis in bases(model).items():
        assert basis.device.type == "cpu"
        torch.testing.assert_close(basis, bases(expected)[name], rtol=0, atol=1e-6)


def test_layers_or_experts_of_one_shape_are_one_batch(monkeypatch, solved):
    monkeypatch.setattr(device, "ON_HOST", ())
    model = wrap(tiny_llama(), targets="all-linear")
    assert sum(shape[0] for shape in solved) == len(adapted_layers(model))
    assert len(solved) == len({shape[1:] for shape in solved})
    solved.clear()
    model = wrap_experts(qwen3_moe())
    assert sorted(solved) == [(12, 32, 24), (12, 48, 32)]
    for layer in adapted_layers(model).values():
        assert_same_vectors(factors(layer)[1], exact_basis(stored(layer), 4))


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


@needs_peft("0.21", "it takes the shape of a partitioned parameter for empty")
def test_partitioned_stacks_are_gathered_one_at_a_time(monkeypatch):
    """As DeepSpeed's ZeRO-3 does it: outside of a gathering context a parameter is empty."""
    model, weight, gathered = holder(torch.randn(3, 8, 12)), torch.randn(3, 8, 12), []
    parameter = model["experts"].down_proj
    parameter.ds_id, parameter.ds_shape, parameter.data = 0, weight.shape, weight.new_empty(0)

    @contextmanager
    def gather(parameter):
        gathered.append(parameter.ds_id)
        parameter.data = weight
        try:
            yield
        finally:
            parameter.data = weight.new_empty(0)

    for file in (module, initialisation):
        monkeypatch.setattr(file, "gather_params_ctx", gather)
    (layer,) = wrappers(wrap_holder(model)).values()
    assert len(gathered) == 2  # checked, then solved
    assert parameter.numel() == 0
    assert_same_vectors(factors(layer)[1], exact_basis(weight, 2))


def test_the_process_without_weights_gets_its_bases_from_the_others(monkeypatch):
    """FSDP with cpu_ram_efficient_loading: it declines the very matrices that the first process solves."""
    monkeypatch.setattr(module, "is_fsdp_enabled", lambda: True)
    declined, requested, share = [], [], module.solve_shared

    def described(tasks):
        return [(task.name, task.weight.shape, task.weight.dtype, task.rank) for task in tasks]

    def sharing(tasks, **kwargs):
        requested.extend(described(tasks))
        return share(tasks, **kwargs)

    monkeypatch.setattr(module, "decline", lambda tasks: declined.extend(described(tasks)))
    monkeypatch.setattr(module, "solve_shared", sharing)
    with torch.device("meta"):
        absent = holder(torch.randn(3, 8, 12))
    (layer,) = wrappers(wrap_holder(absent)).values()
    assert not requested
    assert layer.lora_B["default"].weight.is_meta
    wrap_holder(holder(torch.randn(3, 8, 12)))
    assert declined == requested
    assert len(requested) == 3
