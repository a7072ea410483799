"""Two gloo processes, each with a part of every layer, against one process with all of it."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mica.fast
from mica.errors import UnsuitableLayerError
from tests.support import gloo
from tests.support.models import adapted_layers, bases, randomise, wrap
from tests.support.peft_versions import needs_peft
from tests.support.stock import assert_same
from tests.support.tolerances import RELATIVE, error
from tests.support.tp_models import made, part, save_models, split, whole
from tests.support.training import batches, gathered, trainable
from tests.support.unchanged import unchanged

pytestmark = [
    needs_peft("0.21", "a layer that is split is refused, as a shard"),
    pytest.mark.usefixtures("one_thread"),
]

BF16 = torch.bfloat16
IDS = batches(1)[0]


def adapted(base, targets="all-linear", **config):
    return wrap(base, targets=targets, **config).train()


def one_step(model, ids=IDS):
    """Loss, gradients of A and, without gradients, logits of a model whose A are not 0."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    gradients = gathered({name: A.grad for name, A in trainable(model).items()})
    return {"loss": loss.detach(), "logits": logits, "gradients": gradients}


# ---------------------------------------------------------------------------------------------------
# what each of the two does, and what one process does alone
# ---------------------------------------------------------------------------------------------------


def bases_of(base, **config):
    """Those of this process, and whole."""
    B = bases(adapted(base, **config))
    return {name: part(tensor) for name, tensor in B.items()}, gathered(B)


def stepped(base, hooked=False, patched=False, twice=False, stock=False, **config):
    """`one_step`, on PEFT's code if ``stock``; with hooks on every base layer, or two active adapters.

    patched: both factors of every adapter have another forward, over that of the plan where there is one.
    """
    model = randomise(adapted(base, **config))
    if twice:
        model.add_adapter("other", model.peft_config["default"])
        randomise(model, seed=3)
        model.base_model.set_adapter(["default", "other"])
    if hooked:
        for layer in adapted_layers(model).values():
            layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.5)
    for layer in adapted_layers(model).values() if patched else ():
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.forward = doubled(factor.forward)
    before = mica.fast.call_counts.copy()
    with mica.fast.disabled() if stock else nullcontext():
        result = one_step(model)
    return {**result, "counts": dict(mica.fast.call_counts - before), "text": str(mica.fast.explain(model))}


def doubled(forward):
    return lambda x: 2 * forward(x)


def mixed(base):
    """The logits of a batch of which one sample has no adapter."""
    model = randomise(adapted(base)).eval()
    with torch.no_grad():
        return model(input_ids=IDS, adapter_names=["default", "__base__", "default", "default"]).logits


def embedded(base):
    """An adapter on the embedding as well, which is split along the vocabulary."""
    model = randomise(adapted(base, targets=["embed_tokens", "q_proj"]))
    return {"B": gathered(bases(model)), "text": str(mica.fast.explain(model))}


ALONE_TOO = {
    "B": bases_of,
    "B of uneven parts": bases_of,
    "B over a bf16 base": bases_of,
    "B in bf16": lambda base: bases_of(base, autocast_adapter_dtype=False),
    "a step": stepped,
    "a step of uneven parts": stepped,
    "a step with hooks": lambda base: stepped(base, hooked=True),
    "a step with patched factors": lambda base: stepped(base, patched=True),
    "a step with two adapters": lambda base: stepped(base, twice=True),
    "a step on PEFT's code": lambda base: stepped(base, stock=True),
    "a mixed batch": mixed,
    "an embedding": embedded,
}


def base_of(name):
    return made("uneven" if "uneven" in name else "even", dtype=BF16 if "bf16" in name else torch.float32)


def saved(folder):
    """An adapter saved by both, and the logits before."""
    model = randomise(adapted(split(folder)))
    model.save_pretrained(f"{folder}/adapter")
    dist.barrier()
    return one_step(model)


def loaded(folder, name):
    model = PeftModel.from_pretrained(split(folder), f"{folder}/{name}", is_trainable=True)
    return {**one_step(model), "B": gathered(bases(model))}


def refused(folder, match, merges=False, **config):
    """Before anything has changed."""
    base = split(folder)
    model = randomise(adapted(base)) if merges else base
    error = ValueError if merges else UnsuitableLayerError
    with unchanged(model), pytest.raises(error, match=match):
        model.merge_adapter() if merges else adapted(base, **config)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def plain_lora(folder):
    """Stock PEFT's own adapters on rowwise layers.

    It creates lora_A as wide as one part, and transformers takes that for the whole width.
    """
    with mica.fast.disabled():
        model = adapted(split(folder), targets=["o_proj"], init_lora_weights=True)
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            one_step(model)


REFUSED = {
    "too large a rank": {"match": r"(?s)but got r=17.*\(16, 16\)", "rank": 17},
    "the head": {"match": "'lm_head' holds one shard of it", "targets": ["lm_head"]},
    "a merge": {
        "match": r"into layer 'model.layers.0.self_attn.q_proj' under tensor parallelism.*save the adapter",
        "merges": True,
    },
}
TOGETHER = {
    "saved": saved,
    "loaded": lambda folder: loaded(folder, "of_one_process"),
    "loaded without a B": lambda folder: loaded(folder, "without_a_B"),
    "plain LoRA": plain_lora,
    **{name: partial(refused, **options) for name, options in REFUSED.items()},
}


def scenarios(rank, folder):
    """All in one launch, which takes longer than they do."""
    results = {name: gloo.attempt(scenario, base_of(name)) for name, scenario in ALONE_TOO.items()}
    return {**results, **{name: gloo.attempt(scenario, folder) for name, scenario in TOGETHER.items()}}


# ---------------------------------------------------------------------------------------------------
# what must hold
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    save_models(folder)
    randomise(adapted(whole(folder))).save_pretrained(folder / "of_one_process")
    weights = load_file(folder / "of_one_process" / "adapter_model.safetensors")
    missing = [name for name in weights if "layers.0" in name and "lora_B" in name]
    (folder / "without_a_B").mkdir()
    save_file(
        {name: weight for name, weight in weights.items() if name not in missing},
        folder / "without_a_B" / "adapter_model.safetensors",
    )
    config = (folder / "of_one_process" / "adapter_config.json").read_text()
    (folder / "without_a_B" / "adapter_config.json").write_text(config)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return gloo.run(scenarios, str(folder))


@pytest.fixture
def of(results):
    return lambda name: gloo.pair(results, name)


def alone(name):
    return ALONE_TOO[name](base_of(name))


@pytest.mark.parametrize("name", ["B", "B of uneven parts", "B over a bf16 base", "B in bf16"])
def test_each_process_has_its_part_of_one_process_s_basis(of, name):
    """To the bit, fp32 masters over a bf16 base too."""
    _, expected = alone(name)
    for rank, (mine, whole_B) in enumerate(of(name)):
        assert mine.keys() == expected.keys()
        for layer, B in expected.items():
            assert B.dtype == mine[layer].dtype == (BF16 if name == "B in bf16" else torch.float32)
            assert torch.equal(whole_B[layer], B)
            is_rowwise = layer.endswith(("o_proj", "down_proj"))
            assert torch.equal(mine[layer], B if is_rowwise else B.chunk(2)[rank])


STEPPED = [name for name in ALONE_TOO if name.startswith("a step")]


@pytest.mark.parametrize("name", STEPPED)
def test_gradients_are_those_of_one_process(of, name):
    expected = alone(name)
    for result in of(name):
        same(result, expected)


def same(result, expected):
    """Within a few rounding errors; gradients have come through two decoder layers."""
    for part_of, tolerance in (("loss", 1), ("logits", 1), ("gradients", 5)):
        assert_same(result[part_of], expected[part_of], tolerance * RELATIVE[torch.float32])


def test_the_operators_give_what_peft_s_own_path_does(of):
    for ours, pefts in zip(of("a step"), of("a step on PEFT's code"), strict=True):
        same(ours, pefts)
        assert ours["counts"] == {"linear": 28, "linear_backward": 14}
        assert pefts["counts"] == {}


def test_a_factor_with_another_forward_takes_peft_s_path(of):
    for result in of("a step with patched factors"):
        assert result["counts"] == {}


def test_a_mixed_batch_takes_peft_s_path(of):
    expected = alone("a mixed batch")
    for logits in of("a mixed batch"):
        assert error(logits, expected) <= RELATIVE[torch.float32]


def test_a_base_layer_with_hooks_is_called(of):
    for result in of("a step with hooks"):
        assert "base layer called: hooks on the base layer" in result["text"]
        assert result["counts"]["down_projection"] == result["counts"]["up_projection"] == 28


def test_an_adapter_saved_by_two_processes_is_one_process_s(of, folder):
    pair = of("saved")
    model = PeftModel.from_pretrained(whole(folder), folder / "adapter", is_trainable=True).train()
    for result in pair:
        same(result, one_step(model))
    written = load_file(folder / "adapter" / "adapter_model.safetensors")
    expected = load_file(folder / "of_one_process" / "adapter_model.safetensors")
    assert written.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(written[name], weight), name


@pytest.mark.parametrize("name", ["loaded", "loaded without a B"])
def test_an_adapter_of_one_process_is_loaded_by_two(of, folder, name):
    model = PeftModel.from_pretrained(whole(folder), folder / "of_one_process", is_trainable=True).train()
    for result in of(name):
        same(result, one_step(model))
        for layer, B in bases(model).items():
            assert torch.equal(result["B"][layer], B), layer


def test_an_embedding_takes_peft_s_path(of):
    expected = alone("an embedding")
    for result in of("an embedding"):
        for name, B in expected["B"].items():
            assert torch.equal(result["B"][name], B), name
        assert "tensor parallelism with plan 'embedding_rowwise'" in result["text"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_all(of, name):
    of(name)


def test_stock_peft_cannot_train_rowwise_layers(of):
    of("plain LoRA")
