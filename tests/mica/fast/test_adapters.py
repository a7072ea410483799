"""Several adapters of a model, exported and swapped ones: the results of PEFT's own code."""

import copy
import gc

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from safetensors.torch import load_file, save_file

import mica.fast
from tests.support.models import (
    ADAPTERS,
    TARGETS,
    adapted_layers,
    bases,
    gradients,
    net,
    of_each_adapter_and_backend,
    randomise,
)
from tests.support.moe_models import second
from tests.support.stock import as_graph, as_stock, counted, step
from tests.support.tolerances import RELATIVE, error

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3], [5, 6, 11, 12]])
FP32 = 3 * RELATIVE[torch.float32]
LAYERS = TARGETS[1:]
in_both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def several(second_rank=4, **kwargs):
    """A net with the MiCA adapters "default" and "second", both with values in A."""
    return randomise(second(net(**kwargs), r=second_rank, lora_alpha=3))


def compare(model, tolerance=FP32, **kwargs):
    """Output and gradients with the backend on and off are the same; returns the output."""
    out, grads = as_stock(lambda: step(model, INDICES, **kwargs), tolerance)
    assert not any("lora_B" in name or "lora_embedding_B" in name for name in grads)
    return out


@pytest.mark.parametrize("first", ADAPTERS)
@pytest.mark.parametrize("second_is", ADAPTERS)
def test_two_adapters_of_any_kind(first, second_is):
    """LoRA beside MiCA, too; on a base that is read, called because of a hook, or trained."""
    mica.fast.enable(lora=True)
    model = net(targets=LAYERS, **ADAPTERS[first])
    randomise(second(model, r=3, **ADAPTERS[second_is]))
    layers = model.base_model.model
    layers.up.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    layers.down.base_layer.weight.requires_grad_()
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        _, grads = as_stock(lambda: step(model, INDICES), FP32)
        assert path(model) == {"reference": 3}
        trained = [kind for name, kind in (("default", first), ("second", second_is)) if name in active]
        assert sum("lora_B" in name for name in grads) == 3 * trained.count("LoRA")


def path(model):
    return mica.fast.explain(model).counts()


# -- several adapters ---------------------------------------------------------------------------------


def test_switching():
    model = several(second_rank=3)
    first = compare(model)
    model.set_adapter("second")
    assert path(model) == {"reference": 4}
    second = compare(model)
    assert error(second, first) > 0.01
    assert not any("default" in name for name in gradients(model))
    with model.disable_adapter():
        assert error(compare(model), first) > 0.01
    model.set_adapter("default")
    assert torch.equal(compare(model), first)
    model.base_model.set_adapter(["default", "second"])
    assert error(compare(model), first) > 0.01
    assert len([name for name in gradients(model) if "second" in name]) == 4
    model.set_adapter("second")
    config = copy.deepcopy(model.peft_config["default"])
    model.delete_adapter("default")
    assert torch.equal(compare(model), second)
    model.add_adapter("default", config)  # a new one of the same name: A = 0
    model.set_adapter("default")
    with model.disable_adapter():
        base = model(INDICES)
    assert error(compare(model), base) <= FP32


COMBINATIONS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS += [f"{name}_svd" for name in COMBINATIONS[3:]]


@pytest.mark.parametrize("combination", COMBINATIONS)
@in_both_dtypes
def test_add_weighted_adapter(combination, dtype, solved):
    """The same factors as stock makes of the same adapters without the solver, and on the fast path."""
    ranks_may_differ = combination == "cat" or "svd" in combination
    model = several(second_rank=3 if ranks_may_differ else 4, dtype=dtype)
    stock = copy.deepcopy(model)

    def add(model):
        torch.manual_seed(7)  # dare_* drop at random
        density = {} if combination in ("linear", "cat", "svd") else {"density": 0.6}
        weights = [0.7, 0.5]
        model.add_weighted_adapter(["default", "second"], weights, "both", combination, **density)
        model.set_adapter("both")

    solved.clear()
    add(model)
    assert not solved
    with mica.fast.disabled():
        add(stock)
    for layer, other in zip(adapted_layers(model).values(), adapted_layers(stock).values(), strict=True):
        ours, theirs = layer.get_delta_weight("both"), other.get_delta_weight("both")
        assert ours.norm() > 0
        assert error(ours, theirs) <= (0 if combination == "linear" else 30 * RELATIVE[torch.float32])
    assert path(model) == {"reference": 4}
    compare(model.eval(), 3 * RELATIVE[dtype])
    assert not any(B.requires_grad for B in bases(model, "both").values())


# -- files --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_inference(tmp_path, strict):
    """By default the program holds PyTorch's own operators and runs where this package is not.

    ``strict=True`` traces as torch.compile does, and ours are in it; inside `disabled()` they are not.
    """
    model = randomise(net(targets=LAYERS)).eval().requires_grad_(False).base_model.model
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=32)}
    options = {"dynamic_shapes": {"indices": dims}, "strict": strict}

    def operators(program):
        return [str(node.target) for node in program.graph.nodes if "mica" in str(node.target)]

    program = torch.export.export(model, (INDICES,), **options)
    assert operators(program) == ["mica.linear.default"] * (3 if strict else 0)
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    with torch.no_grad():
        for part in (INDICES, INDICES[:2, :3]):
            out, counts = counted(lambda part=part: again(part))
            assert counts.get("linear", 0) == len(operators(program))
            assert error(out, model(part)) <= FP32
    with mica.fast.disabled():
        assert operators(torch.export.export(model, (INDICES,), **options)) == []


# -- hotswap ------------------------------------------------------------------------------------------


def saved(folder, seed, rank=4, **config):
    """A trained adapter on the same base, in a folder."""
    config.setdefault("targets", LAYERS)
    model = randomise(net(rank=rank, **config), seed=seed)
    for B in bases(model).values():
        B.data.neg_()  # as after another run: B is not the one that is there
    model.save_pretrained(folder)
    return folder


@of_each_adapter_and_backend
@in_both_dtypes
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_hotswap(monkeypatch, tmp_path, adapter, backend, dtype, rank):
    """Also on kernels, which keep a prepared copy of B: hotswap edits B behind PyTorch's back."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    model = randomise(net(dtype, targets=LAYERS, **ADAPTERS[adapter])).eval()
    folder = saved(tmp_path, 5, rank, lora_alpha=3, **ADAPTERS[adapter])

    def output():
        out, _ = as_stock(lambda: step(model, INDICES), 3 * RELATIVE[dtype])
        return out

    before = output()
    hotswap_adapter(model, str(folder), "default")
    after = output()
    assert error(after, before) > 0.01
    loaded = PeftModel.from_pretrained(net(dtype, targets=LAYERS).unload(), folder)
    assert error(after, loaded(INDICES)) <= 3 * RELATIVE[dtype]
    assert path(model) == {"kernel" if backend == "triton" else "reference": 3}


@pytest.mark.parametrize("targets", [LAYERS, TARGETS[:1]])
def test_hotswap_of_an_adapter_without_b_is_refused(targets, tmp_path):
    """PEFT sets what is missing to 0: an adapter that does nothing, without a word.

    For an embedding it ends in an error about something else.
    """
    model = randomise(net(targets=targets)).eval()
    whole = saved(tmp_path, 5, targets=targets)
    file = whole / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "_B" not in key}, file)
    before = model(INDICES)
    with pytest.raises(
        ValueError, match=r"'default' needs a whole adapter, but the new one has A and no B of"
    ):
        hotswap_adapter(model, str(whole), "default")
    assert torch.equal(model(INDICES), before)
    with mica.fast.disabled():
        stock = copy.deepcopy(model)
        if targets == TARGETS[:1]:
            with pytest.raises(AttributeError, match="has no attribute 'scaling'"):
                hotswap_adapter(stock, str(whole), "default")
            return
        hotswap_adapter(stock, str(whole), "default")
        assert torch.equal(stock(INDICES), stock.unload()(INDICES))  # the fault is real


def lora_parts(model):
    return {name: weight.clone() for name, weight in model.state_dict().items() if "lora_" in name}


@pytest.mark.parametrize(
    "new", [{"use_dora": False}, {"targets": ["up"]}], ids=["plain LoRA", "fewer layers"]
)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_hotswap_without_dora_s_magnitudes_is_refused(new, is_compiled):
    """PEFT sets them to 0, and with them what the layer returns; of plain LoRA a layer may be missing."""
    dora = {"targets": ["up", "down"], "init_lora_weights": False, "use_dora": True}
    model = randomise(net(**dora))
    whole, lacking = (lora_parts(randomise(net(**dora | options), seed=5)) for options in ({}, new))
    swapped = as_graph(model) if is_compiled else model
    config = model.peft_config["default"]
    before = lora_parts(model)
    with pytest.raises(
        ValueError, match=r"'default' needs DoRA's magnitudes .* none of 'base_model.model.\w+'"
    ):
        hotswap_adapter_from_state_dict(swapped, lacking, "default", config)
    after = lora_parts(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with mica.fast.disabled():
        hotswap_adapter_from_state_dict(swapped, lacking, "default", config)
        assert not model.base_model.model.down(torch.randn(3, 16)).any()  # the fault is real
    hotswap_adapter_from_state_dict(swapped, whole, "default", config)
    after = lora_parts(model)
    assert all(torch.equal(whole[name], after[name]) for name in whole)


@pytest.mark.parametrize("adapter", ADAPTERS, indirect=True)
def test_hotswap_of_fewer_layers_is_allowed(adapter, tmp_path):
    """As PEFT documents it: the others have no update then."""
    model = randomise(net(targets=["up", "down"], **ADAPTERS[adapter]))
    folder = saved(tmp_path, 5, targets=["up"], **ADAPTERS[adapter])
    hotswap_adapter(model, str(folder), "default")
    loaded = PeftModel.from_pretrained(net(targets=LAYERS).unload(), folder)
    assert error(model(INDICES), loaded(INDICES)) <= FP32


def test_hotswap_of_a_compiled_model(tmp_path):
    """One graph for all adapters: ranks are padded, scalings are tensors."""
    model = randomise(net(targets=LAYERS, rank=3)).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = as_graph(model)
    with torch.no_grad():
        before = compiled(INDICES)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed, rank in ((5, 6), (6, 2)):
                folder = saved(tmp_path / str(seed), seed, rank, lora_alpha=3)
                hotswap_adapter(model, str(folder), "default")
                out, counts = counted(lambda: compiled(INDICES))
                assert counts["linear"] == 3
                loaded = PeftModel.from_pretrained(net(targets=LAYERS).unload(), folder)
                assert error(out, loaded(INDICES)) <= FP32
                assert error(out, before) > 0.01


BATCH = torch.randint(0, 29, (5, 3), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("targets", [LAYERS, TARGETS[:1]], ids=["linear", "embedding"])
def test_mixed_batches_are_peft_s(targets):
    """A layer's own adapter for each sample takes PEFT's code no longer than the operators."""
    model = randomise(second(net(targets=targets), r=2)).eval()
    names = ["default", "__base__", "second", "default", "second"]
    with torch.no_grad():
        out, counts = counted(lambda: as_stock(lambda: model(BATCH, adapter_names=names), 0.0))
        model.set_adapter("second")
        assert error(out[[2, 4]], model(BATCH)[[2, 4]]) <= FP32
        model(BATCH, adapter_names=names)
    assert not counts
    assert {row.reason for row in mica.fast.explain(model).rows} == {
        "in its last call: a mixed batch (adapter_names)"
    }


# -- edits of B -----------------------------------------------------------------------------------------


def test_on_kernels_one_call_is_needed_after_an_edit_that_is_not_counted(monkeypatch):
    """They keep a copy of B in their own layout."""
    gc.collect()  # nothing is tracked while there is a module of FSDP2, as one that another test has left
    model = randomise(net(targets=LAYERS)).eval()
    monkeypatch.setenv("MICA_BACKEND", "triton")
    before = model(BATCH)
    model.base_model.model.down.lora_B["default"].weight.data.mul_(3.0)
    assert torch.equal(model(BATCH), before)  # the fault is real
    mica.fast.clear_caches()
    after = model(BATCH)
    assert error(after, before) > 1e-3
    monkeypatch.setenv("MICA_BACKEND", "reference")
    assert error(after, model(BATCH)) <= FP32
