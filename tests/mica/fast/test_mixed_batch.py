import copy

import pytest
import torch
from peft import LoraConfig

from tests.support.models import adapted_layers, net, randomise, tiny_llama, wrap
from tests.support.stock import as_stock, counted, step
from tests.support.tolerances import RELATIVE, error

TARGETS = ["up", "conv", "down"]
INDICES = torch.randint(0, 29, (5, 3), generator=torch.Generator().manual_seed(3))
NAMES = ["wide", "__base__", "narrow", "other", "wide"]


def model_of_three(dtype=torch.float32, **kwargs):
    """Ranks 4 and 2 that share B, and one whose B has been changed."""
    model = net(dtype, targets=TARGETS, adapter_name="wide", **kwargs)
    for name in ("narrow", "other"):
        rank = {"narrow": 2, "other": 4}[name]
        model.add_adapter(name, LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights="mica"))
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_variant")]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["narrow"].weight.copy_(layer.lora_B["wide"].weight[:, -2:])
            layer.lora_B["other"].weight.mul_(-1.0)
    return randomise(model).eval()


def compare(model, names, tolerance, indices=INDICES):
    return as_stock(lambda: model(indices, adapter_names=names), tolerance)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_stock(monkeypatch, backend, dtype):
    monkeypatch.setenv("MICA_BACKEND", backend)
    compare(model_of_three(dtype), NAMES, 3 * RELATIVE[dtype])


def test_adapters_that_share_b_share_one_up_projection():
    model = model_of_three()
    for names, products in (
        (NAMES, 2),
        (["wide", "narrow", "wide", "narrow", "narrow"], 1),
        (["wide"] * 5, 1),
    ):
        _, counts = counted(lambda names=names: compare(model, names, 3 * RELATIVE[torch.float32]))
        assert counts["up_projection"] == 3 * products  # three layers
        assert counts["down_projection"] == 3 * len(set(names) - {"__base__"})
    with torch.inference_mode():
        compare(model, NAMES, 3 * RELATIVE[torch.float32])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_has_diverged_reaches_no_sample_of_another(value):
    model = model_of_three()
    expected = model(INDICES, adapter_names=NAMES)
    with torch.no_grad():
        model.base_model.model.down.lora_B["other"].weight.fill_(value)
    actual, others = model(INDICES, adapter_names=NAMES), [name != "other" for name in NAMES]
    assert torch.equal(actual[others], expected[others])
    assert not actual[[not other for other in others]].isfinite().any()


def test_a_basis_that_changes_is_not_shared_any_longer():
    model = model_of_three()
    names = ["wide", "narrow"] * 2 + ["wide"]
    before = compare(model, names, 3 * RELATIVE[torch.float32])
    with torch.no_grad():
        model.base_model.model.down.lora_B["narrow"].weight.mul_(3.0)
    after = compare(model, names, 3 * RELATIVE[torch.float32])
    assert error(after, before) > 1e-3


def test_an_adapter_loaded_again_under_its_name_has_its_own_basis(tmp_path):
    """Deleted and loaded from a file, B mostly comes to lie where the one before it lay."""
    model = model_of_three()
    model.save_pretrained(tmp_path / "shares", selected_adapters=["narrow"])
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B["narrow"].weight.neg_()
    model.save_pretrained(tmp_path / "differs", selected_adapters=["narrow"])
    for turn in range(20):
        model.delete_adapter("narrow")
        folder = tmp_path / ("differs" if turn % 2 else "shares") / "narrow"
        model.load_adapter(folder, "narrow", low_cpu_mem_usage=True)
        compare(model.eval(), ["wide", "narrow"] * 2 + ["wide"], 3 * RELATIVE[torch.float32])


def test_under_a_process_group_every_basis_is_compared_each_time(monkeypatch):
    """FSDP writes what it gathers into the same storage, and PyTorch does not count it."""
    model = model_of_three()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for _ in range(2):
        compare(model, ["wide", "narrow"] * 2 + ["wide"], 3 * RELATIVE[torch.float32])
        model.base_model.model.down.lora_B["narrow"].weight.data.mul_(3.0)


def test_adapters_made_on_one_base_share_their_basis():
    """What the sharing rests on: the solver's last columns are the basis of the smaller rank."""
    model = net(targets=TARGETS, adapter_name="wide")
    config = copy.deepcopy(model.peft_config["wide"])
    config.r = 2
    model.add_adapter("narrow", config)
    up = model.base_model.model.up.eval()
    _, counts = counted(lambda: up(torch.randn(2, 12), adapter_names=["narrow", "wide"]))
    assert counts == {"down_projection": 2, "up_projection": 1}


def test_adapters_on_some_layers_only():
    model = randomise(net(targets=["up"], adapter_name="first"))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["down"], init_lora_weights="mica"))
    compare(randomise(model).eval(), ["first", "second", "first", "__base__", "second"], 1e-5)


def test_gradients_follow_stock():
    """PEFT allows it in evaluation mode, so it has to be right."""
    model = model_of_three()
    model.base_model.set_adapter(["wide", "narrow", "other"])
    model.eval()
    _, grads = as_stock(lambda: step(model, INDICES, adapter_names=NAMES), 5 * RELATIVE[torch.float32])
    assert len(grads) == 9


def test_what_peft_refuses_is_refused():
    model = model_of_three()
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        model(INDICES, adapter_names=["wide"])
    with pytest.raises(ValueError, match="absent"):
        model(INDICES, adapter_names=["absent"] * 5)
    model.merge_adapter(["wide"])
    with pytest.raises(ValueError, match="merged adapters"):
        model(INDICES, adapter_names=NAMES)


def test_embeddings_and_other_adapters_are_peft_s():
    model = net(adapter_name="wide")
    model.add_adapter("plain", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    names = ["wide", "plain", "__base__", "wide", "plain"]
    _, counts = counted(lambda: compare(randomise(model).eval(), names, 3 * RELATIVE[torch.float32]))
    assert "up_projection" not in counts


def test_generation():
    model = wrap(tiny_llama(), targets="all-linear", adapter_name="wide")
    model.add_adapter("narrow", LoraConfig(r=2, target_modules="all-linear", init_lora_weights="mica"))
    randomise(model, scale=0.5).eval()
    indices = torch.randint(0, 61, (3, 4), generator=torch.Generator().manual_seed(1))
    names = ["wide", "narrow", "__base__"]
    options = {"adapter_names": names, "max_new_tokens": 5, "do_sample": False}
    as_stock(lambda: model.generate(input_ids=indices, **options), 0.0)
