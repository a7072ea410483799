"""A saved adapter is one of plain PEFT: stock loads that of experts as LoRA, and here it is MiCA again."""

import copy
import json
import warnings
from contextlib import contextmanager
from functools import partial

import peft
import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import mica.fast
from mica.fast.create.solving import NewAdapter
from tests.support import quantised_models
from tests.support.models import (
    Net,
    adapted_layers,
    assert_same_bases,
    factors,
    net,
    randomise,
    stock_load,
    tiny_llama,
    wrap,
)
from tests.support.moe_models import BUILDERS, gpt_oss, qwen3_moe, tokens, wrap_all, wrappers
from tests.support.peft_versions import is_at_least
from tests.support.tolerances import RELATIVE, error
from tests.support.training import llama, train
from tests.support.without_mica import logits_without_mica

pytestmark = pytest.mark.filterwarnings("ignore:.*may get different")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
lean_or_not = pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
trainable_or_not = pytest.mark.parametrize("is_trainable", [False, True])
for_a_task_or_none = pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])


def dense():
    return tiny_llama(initializer_range=0.3)


def trained(kind="qwen3_moe", base=None, **config):
    return randomise(wrap_all(base or BUILDERS[kind](), **config), scale=0.5)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


def saved_config(folder):
    return json.loads((folder / CONFIG).read_text())


def assert_same_adapter(loaded, model):
    expected = wrappers(model)
    assert len(wrappers(loaded)) == len(expected)
    for name, layer in wrappers(loaded).items():
        assert layer.lora_variant
        for ours, theirs in zip(factors(layer), factors(expected[name]), strict=True):
            assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_stock_peft_loads_it_and_gives_the_same_logits(tmp_path):
    """In one process without this package, in each of the ways that PEFT and transformers have.

    The folder is the one that `push_to_hub` uploads.
    """
    loads, expected = [], []
    cases = [("layers", "peft", None), ("qwen3_moe", "peft", None), ("gpt_oss", "peft", None)]
    cases += [("mixtral", "transformers", None), ("qwen3_moe", "auto", None)]
    cases += [("qwen3_moe", "auto for a task", "CAUSAL_LM")]
    builders = {**BUILDERS, "layers": dense}
    for number, (kind, how, task_type) in enumerate(cases):
        base, adapter = tmp_path / f"{kind} base", tmp_path / f"adapter {number}"
        builders[kind]().save_pretrained(base)
        if kind == "layers":
            model = llama()
            train(model)
        else:
            model = trained(kind, type(BUILDERS[kind]()).from_pretrained(base), task_type=task_type)
        model.save_pretrained(adapter)
        assert {file.name for file in adapter.iterdir()} == {CONFIG, WEIGHTS, "README.md"}
        expected.append(logits(model))
        loads.append((base, adapter, how))
        if how.startswith("auto"):
            auto = AutoPeftModel if task_type is None else AutoPeftModelForCausalLM
            assert_same_adapter(auto.from_pretrained(adapter), model)
    results = logits_without_mica(tmp_path, tokens(), *loads)
    for theirs, ours, case in zip(results, expected, cases, strict=True):
        assert error(theirs, ours) <= 5 * RELATIVE[torch.float32], case
        assert error(theirs, logits(builders[case[0]]())) > 0.05  # the adapter does something


# -- the mark of an adapter of experts ---------------------------------------------------------------


@for_a_task_or_none
def test_the_file_says_plain_lora_and_what_it_is(tmp_path, task_type):
    model = trained(task_type=task_type)
    model.save_pretrained(tmp_path)
    config = saved_config(tmp_path)
    assert config["init_lora_weights"] is True
    assert config["peft_version"] == f"{peft.__version__}+mica"
    # what PEFT writes for its auto classes
    library = "transformers.models.qwen3_moe.modeling_qwen3_moe"
    mapping = {"base_model_class": "Qwen3MoeForCausalLM", "parent_library": library}
    assert config["auto_mapping"] == (mapping if task_type is None else None)
    assert model.peft_config["default"].init_lora_weights == "mica"
    assert model.peft_config["default"].peft_version == peft.__version__
    PeftModel.from_pretrained(qwen3_moe(), tmp_path).save_pretrained(tmp_path)
    assert saved_config(tmp_path)["peft_version"] == f"{peft.__version__}+mica"


@for_a_task_or_none
def test_the_mark_survives_a_disabled_backend(tmp_path, task_type):
    """Stock would refuse what it says, and loads LoRA; saved again it is still there."""
    model = trained(task_type=task_type)
    with mica.fast.disabled():
        model.save_pretrained(tmp_path / "first")
    assert saved_config(tmp_path / "first")["init_lora_weights"] is True
    stock = stock_load(qwen3_moe(), tmp_path / "first")
    assert stock.peft_config["default"].init_lora_weights is True
    assert not any(layer.lora_variant for layer in wrappers(stock).values())
    assert error(logits(stock), logits(model)) <= RELATIVE[torch.float32]
    stock.peft_config["default"].save_pretrained(tmp_path / "config")
    assert PeftConfig.from_pretrained(tmp_path / "config").init_lora_weights == "mica"
    with mica.fast.disabled():
        stock.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(qwen3_moe(), tmp_path / "again", is_trainable=True)
    assert_same_adapter(loaded, model)
    assert {n.split(".")[-3] for n, p in loaded.named_parameters() if p.requires_grad} == {"lora_A"}


# -- loading: the bits that stock gives, without the solver ------------------------------------------


BF16 = torch.bfloat16
QUANTISED = ["nf4", "nf4 double, bf16 storage", "int8", "hqq", "torchao int8"]


def quantised(kind):
    return partial(quantised_models.llama, kind), partial(wrap, targets=quantised_models.TARGETS)


MODELS = {  # name: (the base, what adapts it)
    "layers": (Net, wrap),
    "layers, bf16": (partial(Net, BF16), wrap),
    "experts": (qwen3_moe, wrap_all),
    "experts, bf16": (lambda: qwen3_moe().to(BF16), wrap_all),
    **{kind: quantised(kind) for kind in QUANTISED},
}


@trainable_or_not
@lean_or_not
@pytest.mark.parametrize("name", MODELS)
def test_loading_runs_no_solver_and_gives_what_stock_gives(
    name, low_cpu_mem_usage, is_trainable, tmp_path, solved
):
    """Fault 4. With low_cpu_mem_usage stock rounds what it loads to the base dtype on its way; so do we."""
    base, adapt = MODELS[name]
    options = {"is_trainable": is_trainable, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = randomise(adapt(base()))
    model.save_pretrained(tmp_path)
    solved.clear()
    loaded = PeftModel.from_pretrained(base(), tmp_path, **options)
    loaded.load_adapter(tmp_path, "second")
    assert not solved
    assert loaded.peft_config["default"].init_lora_weights == "mica"
    if name in QUANTISED:  # stock refuses to initialise these
        theirs = dict(model.named_parameters())
        theirs |= {key.replace(".default", ".second"): parameter for key, parameter in theirs.items()}
        assert torch.equal(quantised_models.logits(loaded), quantised_models.logits(model))
        if name == "nf4" and low_cpu_mem_usage and is_trainable:
            # fault 3: where nothing is initialised stock does not refuse, and trains B
            stock = stock_load(base(), tmp_path, **options)
            assert any("lora_B" in key and p.requires_grad for key, p in stock.named_parameters())
    else:
        stock = stock_load(base(), tmp_path, **options)
        with mica.fast.disabled():
            stock.load_adapter(tmp_path, "second")
        theirs = dict(stock.named_parameters())
    for key, parameter in loaded.named_parameters():
        if "lora_" in key:
            assert torch.equal(parameter, theirs[key]), key
            assert parameter.dtype == torch.float32
            # loading a second adapter for inference freezes the first one too before 0.21
            trained = is_trainable and ".default" in key and "_A" in key and is_at_least("0.21")
            if "_B" in key or is_trainable or not low_cpu_mem_usage:
                # with low_cpu_mem_usage PEFT's cast of a 16-bit embedding leaves A trainable for inference
                assert parameter.requires_grad == trained, key
    for layer in wrappers(loaded).values():
        assert {layer.frozen_peft_weight_names[adapter] for adapter in loaded.peft_config} == {("lora_B",)}
    loaded.set_adapter("second")
    trained = {key for key, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {key for key in theirs if "_A" in key and ".second" in key}


def test_a_factor_that_has_nothing_stays_frozen():
    layer = net().base_model.model.up
    lora_A = layer.lora_A["default"]
    lora_A.weight = nn.Parameter(lora_A.weight.to("meta"), requires_grad=False)
    NewAdapter("layer 'up'", layer, "default").leave_meta_device()
    assert not lora_A.weight.requires_grad
    assert not lora_A.weight.any()


def nested():
    return nn.ModuleDict({"proj": nn.Linear(20, 16), "vision": nn.ModuleDict({"proj": nn.Linear(24, 12)})})


STACK = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_B.weight"
GAPS = {  # what is missing: (the base, what adapts it, whether a key is missing, what is solved)
    "a layer": (Net, partial(wrap, targets=["up", "conv"]), lambda key: "conv" in key, [(16, 20)]),
    "the B": (Net, partial(wrap, targets=["up"]), lambda key: "lora_B" in key, [(20, 12)]),
    "one of two": (nested, partial(wrap, targets=["proj"]), lambda key: "vision" in key, [(12, 24)]),
    # of nested wrappers, whose keys in the file have another form than their names
    "the B of a stack": (qwen3_moe, wrap_all, lambda key: key == STACK, [(48, 32)] * 6),
}


@pytest.mark.parametrize("gap", GAPS)
def test_what_is_missing_in_the_checkpoint_and_nothing_else_is_solved(gap, tmp_path, solved):
    """Never a silent zero: PEFT warns of the missing keys, and B is what a new adapter would have."""
    base, adapt, is_missing, shapes = GAPS[gap]
    torch.manual_seed(0)
    model = randomise(adapt(base()))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = {key: -value for key, value in load_file(file).items() if not is_missing(key)}
    save_file(kept, file)
    solved.clear()
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = peft.get_peft_model_state_dict(PeftModel.from_pretrained(base(), tmp_path))
    assert [shape[1:] for shape in solved] == shapes
    for key, value in peft.get_peft_model_state_dict(model).items():
        if key in kept:
            assert torch.equal(loaded[key], -value), key
        elif "lora_B" in key:
            assert torch.equal(loaded[key], value), key
    assert len(kept) < len(loaded)


ANEW, KEPT = "B was computed anew", "keep the B that they had"
PARTLY = {**MODELS, "linear": (Net, partial(wrap, targets=["up", "down"]))}


def only_a(model, folder=None):
    """What a filter by ``requires_grad`` leaves of an adapter, also in a folder."""
    state = peft.get_peft_model_state_dict(model)
    state = {key: value.clone() for key, value in state.items() if "_B" not in key}
    if folder is not None:
        model.save_pretrained(folder)
        save_file(state, folder / WEIGHTS)
    return state


@contextmanager
def warned_once(what, layers):
    """One warning of ours; PEFT's own may come too, with the list of the missing keys."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    (text,) = [text for text in texts if "has A but no B of" in text]
    assert what in text
    assert "adapter 'default'" in text
    assert f" and {layers - 1} more layers" in text
    assert "save_pretrained" in text


@lean_or_not
@pytest.mark.parametrize("name", ["linear", "experts", "nf4", "hqq"])
def test_a_checkpoint_without_b_is_completed_with_one_warning(name, low_cpu_mem_usage, tmp_path):
    """Whoever trained A: the B that it needs cannot be seen. Nothing stays on the meta device."""
    base, adapt = PARTLY[name]
    torch.manual_seed(0)
    model = randomise(adapt(base()))
    only_a(model, tmp_path)
    torch.manual_seed(0)
    with warned_once(ANEW, len(adapted_layers(model))):
        loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    expected = dict(model.named_parameters())
    for key, parameter in loaded.named_parameters():
        assert not parameter.is_meta, key
        if "lora_" in key:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[key]), key
        assert not (parameter.requires_grad and "lora_B" in key)


@lean_or_not
@pytest.mark.parametrize(
    ("layer", "missing"), [("embed", "embed."), ("up", "up.lora_A")], ids=["has_nothing", "b_alone"]
)
def test_a_layer_of_which_the_checkpoint_has_no_a_starts_anew(layer, missing, low_cpu_mem_usage, tmp_path):
    """PEFT's warning names its keys; no A was trained with another B, so there is none of ours."""
    torch.manual_seed(0)
    model = randomise(wrap(Net(), targets=["embed", "up"]))
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in state.items() if missing not in key}, tmp_path / WEIGHTS)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="missing adapter keys") as caught:
        loaded = PeftModel.from_pretrained(Net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [warning for warning in caught if "has A but no B" in str(warning.message)]
    layers = [adapted_layers(one)[f"base_model.model.{layer}"] for one in (loaded, model)]
    (lora_A, lora_B), (_, expected) = map(factors, layers)
    assert torch.equal(lora_B, expected)
    assert not lora_A.any()


@pytest.mark.parametrize("how", ["a state dict", "a file, as the Trainer resumes"])
def test_a_checkpoint_without_b_for_an_adapter_that_exists(how, tmp_path):
    model, other = net(), randomise(net())
    state, before = only_a(other, tmp_path), copy.deepcopy(model)
    with warned_once(KEPT, 4):
        if how == "a state dict":
            peft.set_peft_model_state_dict(model, state)
        else:
            model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_bases(model, before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(other))


@trainable_or_not
@pytest.mark.parametrize(
    ("build", "adapt"), [(tiny_llama, partial(wrap, targets=["q_proj"])), (gpt_oss, wrap_all)]
)
def test_transformers_own_loader_runs_no_solver_and_trains_no_b(build, adapt, is_trainable, tmp_path, solved):
    model = randomise(adapt(build()))
    model.save_pretrained(tmp_path)
    solved.clear()
    loaded = build()
    loaded.load_adapter(str(tmp_path), is_trainable=is_trainable)
    assert not solved
    assert all(layer.lora_variant for layer in adapted_layers(loaded).values())
    expected = dict(model.base_model.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, expected[name])
            assert parameter.requires_grad == (is_trainable and "lora_A" in name)


def test_sizes_that_do_not_fit(tmp_path, solved):
    """A new basis where they are ignored; else an error, and no adapter that cannot be trained."""
    model = randomise(wrap(tiny_llama(), targets=["q_proj"], rank=4))
    model.save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(saved_config(tmp_path) | {"r": 8}))
    solved.clear()
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "second")
    assert (
        [*model.peft_config]
        == [*model.base_model.model.model.layers[0].self_attn.q_proj.lora_A]
        == ["default"]
    )
    assert not solved
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path), ignore_mismatched_sizes=True)
    assert len(solved) == len(adapted_layers(loaded))
    assert all(factors(layer)[1].any() for layer in adapted_layers(loaded).values())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_base_beside_the_adapter_is_found_where_both_have_moved(checkpoint, tmp_path, monkeypatch):
    """Not that of another run, which has taken the old place; stock finds nothing else."""
    base = randomise(wrap(tiny_llama(), targets=["q_proj"])).merge_and_unload()
    base.save_pretrained(tmp_path / "out" / "base")
    folder = "out/checkpoint-3" if checkpoint else "out"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = randomise(wrap(base, targets=["up_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / folder)
    assert PeftConfig.from_pretrained(pretrained_model_name_or_path=str(tmp_path / folder)).r == 4
    (tmp_path / "moved").mkdir()
    (tmp_path / "out").rename(tmp_path / "moved" / "out")
    tiny_llama().save_pretrained(tmp_path / "out" / "base")
    ids = torch.arange(8)[None]
    monkeypatch.chdir(tmp_path / "moved")
    for place in (folder, tmp_path / "moved" / folder):
        loaded = AutoPeftModelForCausalLM.from_pretrained(place)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        with mica.fast.disabled():
            recorded = PeftConfig.from_pretrained(place).base_model_name_or_path
        assert recorded == str(tmp_path / "out" / "base")
