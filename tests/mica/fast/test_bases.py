"""All layers solved at once: progress, cache, device, processes, sharded weights; what is said of each."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

import mica.fast
from mica.fast.create import solving as module
from mica.fast.settings import settings
from mica.subspace import device, many
from tests.support import quantised_models
from tests.support.models import Net, assert_same_bases, bases, net, wrap
from tests.support.moe_models import holder, qwen3_moe, wrap_experts, wrap_holder, wrappers
from tests.support.peft_versions import needs_peft


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


def test_progress_bar_counts_layers_and_experts_and_follows_the_hub_s_switch(bars):
    net()
    wrap_experts(qwen3_moe())
    disable_progress_bars()
    try:
        net()
    finally:
        enable_progress_bars()
    (shown, updates), (experts, moved), (hidden, _) = bars
    assert (shown["desc"], shown["delay"], shown["total"], updates) == ("MiCA initialisation", 2, 4, 4)
    assert (experts["total"], experts["unit"], moved) == (24, "weight", 24)
    assert (shown["disable"], hidden["disable"]) == (None, True)


def test_an_unproven_basis_is_said(monkeypatch):
    solver = many.solve_stack

    def unproven(weight, rank, **kwargs):
        return [replace(solver(weight, rank)[0], certified=False, energy_excess=0.5)]

    monkeypatch.setattr(many, "solve_stack", unproven)
    with pytest.warns(UserWarning, match=r"layer 'up' is not proven .*at most 5.0e-01 above"):
        wrap(Net(), targets=["up"])


def test_null_directions_are_said_with_the_layer_s_name():
    """Those of many experts in one warning."""
    model, weight = Net(), torch.randn(4, 12, 6)
    with torch.no_grad():
        model.up.weight[:, :2] = 0  # 20 x 12: tall
    weight[:3, :, 0] = 0
    with pytest.warns(UserWarning, match=r"^2 of the 4 smallest .* of layer 'up' are numerically null"):
        wrap(model, targets=["up"])
    with pytest.warns(UserWarning, match="null") as caught:
        wrap_holder(holder(weight))
    (text,) = {str(w.message) for w in caught if "null" in str(w.message)}
    assert text.startswith("1 of the 2 smallest singular values of layer 'experts.down_proj' expert 0")
    assert text.endswith("The same holds for 2 more of this layer's experts.")


@pytest.mark.parametrize(
    ("build", "count"),
    [(net, 4), (lambda: wrap_experts(qwen3_moe()), 24), (partial(quantised_models.adapted, "nf4"), 7)],
)
def test_a_second_initialisation_comes_from_the_cache(build, count, monkeypatch, tmp_path):
    monkeypatch.setenv("MICA_CACHE", str(tmp_path))
    first = build()
    assert len(list(tmp_path.iterdir())) == count
    monkeypatch.setattr(many, "solve_stack", None)
    assert_same_bases(build(), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_cpu_go_to_an_accelerator_and_back(dtype, monkeypatch, solved):
    expected = net(dtype)
    monkeypatch.setattr(device, "ON_HOST", ())  # the CPU stands for one
    monkeypatch.setattr(settings, "device", "meta")
    with pytest.raises(RuntimeError, match="of layer 'embed' could not be computed: Cannot copy out of meta"):
        net(dtype)
    mica.fast.enable(device="cpu")
    solved.clear()
    model = net(dtype)
    assert all(len(shape) == 3 for shape in solved)
    for name, basis in bases(model).items():
        assert basis.device.type == "cpu"
        torch.testing.assert_close(basis, bases(expected)[name], rtol=0, atol=1e-6)


def stack():
    return holder(torch.randn(3, 8, 12))


no_stacks = needs_peft("0.21", "it takes the shape of a partitioned parameter for empty")


@pytest.mark.parametrize(
    ("build", "adapt", "names"),
    [
        (Net, wrap, ["down.weight", "up.weight"]),
        pytest.param(stack, wrap_holder, ["experts.down_proj"], marks=no_stacks),
    ],
)
def test_partitioned_weights_are_gathered_one_at_a_time(build, adapt, names, monkeypatch):
    """As DeepSpeed's ZeRO-3 does it: outside of a gathering context a weight is empty."""
    torch.manual_seed(0)
    expected = adapt(build())
    torch.manual_seed(0)
    model = build()
    parameters, whole, gathered = {name: model.get_parameter(name) for name in names}, {}, []
    for name, parameter in parameters.items():
        parameter.ds_id, parameter.ds_shape = name, parameter.shape
        whole[name], parameter.data = parameter.data, parameter.data.new_empty(0)

    @contextmanager
    def gather(given):
        given = given if isinstance(given, list) else [given]
        partitioned = [
            parameter for parameter in given if hasattr(parameter, "ds_id") and not parameter.numel()
        ]
        if not partitioned:
            yield
            return
        (parameter,) = partitioned
        gathered.append(parameter.ds_id)
        assert not any(other.numel() for other in parameters.values())
        parameter.data = whole[parameter.ds_id]
        try:
            yield
        finally:
            parameter.data = parameter.data.new_empty(0)

    for file in ("mica.fast.create.solving", "mica.fast.create.initialisation", "peft.tuners.lora.layer"):
        monkeypatch.setattr(f"{file}.gather_params_ctx", gather)
    assert_same_bases(adapt(model), expected)
    assert sorted(gathered) == sorted(2 * names)  # checked, then solved
    assert not any(parameter.numel() for parameter in parameters.values())


def test_the_process_without_weights_requests_the_same_and_solves_nothing(monkeypatch, solved):
    """FSDP with cpu_ram_efficient_loading: the first process, which has them, compares both requests."""
    monkeypatch.setattr(module, "is_fsdp_enabled", lambda: True)
    requests, request = [], module.Meeting

    def requesting(layers):
        requests.append(layers)
        return request(layers)

    monkeypatch.setattr(module, "Meeting", requesting)
    with torch.device("meta"):
        absent = stack()
    (layer,) = wrappers(wrap_holder(absent)).values()
    assert layer.lora_B["default"].weight.is_meta
    assert not solved
    wrap_holder(stack())
    assert requests[0] == requests[1]
    assert len(solved) == 3
