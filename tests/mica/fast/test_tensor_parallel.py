"""Two gloo processes, each with a part of every layer, against one process with all of it."""

import shutil
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
from tests.support.stock import assert_same, counted
from tests.support.tolerances import RELATIVE
from tests.support.tp_models import made, part, save_models, split
from tests.support.training import batches, gathered, trainable
from tests.support.unchanged import unchanged

pytestmark = [
    pytest.mark.slow,
    needs_peft("0.21", "a layer that is split is refused, as a shard"),
]

BF16 = torch.bfloat16
IDS = batches(1)[0]


def adapted(base, targets="all-linear", **config):
    return wrap(base, targets=targets, **config).train()


def one_step(model):
    """Loss, gradients of A and, without gradients, logits of a model whose A are not 0."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    gradients = gathered({name: A.grad for name, A in trainable(model).items()})
    return {"loss": loss.detach(), "logits": logits, "gradients": gradients}


# -- what each of the two does, and what one process does alone ---------------------------------------


def bases_of(base, **config):
    """Those of this process, and whole; what `explain` says."""
    model = adapted(base, **config)
    B = bases(model)
    return {name: part(tensor) for name, tensor in B.items()}, gathered(B), str(mica.fast.explain(model))


def stepped(base, twice=False, stock=False):
    """Loss, gradients of A and, without gradients, logits, on PEFT's code if ``stock``.

    twice: with two active adapters.
    """
    model = randomise(adapted(base))
    if twice:
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
        randomise(model, seed=3)
    with mica.fast.disabled() if stock else nullcontext():
        result, counts = counted(lambda: one_step(model))
    return {**result, "counts": counts, "text": str(mica.fast.explain(model))}


STEPPED = {  # name: options of `stepped`
    "a step": {},
    "a step of uneven parts": {},
    "a step with two adapters": {"twice": True},
    "a step on PEFT's code": {"stock": True},
}
BASES = {  # name: options of the adapter
    "B": {},
    "B of uneven parts": {},
    "B over a bf16 base": {},
    "B in bf16": {"autocast_adapter_dtype": False},
    "B of an embedding": {"targets": ["embed_tokens", "q_proj"]},
}


def base_of(name):
    return made("uneven" if "uneven" in name else "even", dtype=BF16 if "bf16" in name else torch.float32)


def alone(name):
    """What one process has under a name, or each of two."""
    if name in STEPPED:
        return stepped(base_of(name), **STEPPED[name])
    return bases_of(base_of(name), **BASES[name])


def saved(folder):
    """An adapter saved by both, and the logits before."""
    model = randomise(adapted(split(folder)))
    model.save_pretrained(f"{folder}/of_two_processes")
    dist.barrier()
    return one_step(model)


def loaded(folder, name="of_one_process"):
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
    "too large a rank": {"match": r"(?s)got r=17 .*\(16, 16\)", "rank": 17},
    "the head": {"match": "'lm_head' holds one shard of it", "targets": ["lm_head"]},
    "a merge": {
        "match": r"into layer 'model.layers.0.self_attn.q_proj' under tensor parallelism.*save the adapter",
        "merges": True,
    },
}
TOGETHER = {
    "saved": saved,
    "loaded": loaded,
    "loaded without a B": lambda folder: loaded(folder, "without_a_B"),
    "plain LoRA": plain_lora,
    **{name: partial(refused, **options) for name, options in REFUSED.items()},
}


def scenarios(rank, folder):
    """All in one launch, which takes longer than they do."""
    results = {name: gloo.attempt(alone, name) for name in (*STEPPED, *BASES)}
    return {**results, **{name: gloo.attempt(scenario, folder) for name, scenario in TOGETHER.items()}}


# -- what must hold -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    save_models(folder)
    randomise(adapted(split(folder))).save_pretrained(folder / "of_one_process")
    shutil.copytree(folder / "of_one_process", folder / "without_a_B")
    file = folder / "without_a_B" / "adapter_model.safetensors"
    weights = load_file(file).items()
    save_file({key: weight for key, weight in weights if "layers.0" not in key or "lora_A" in key}, file)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return gloo.run(scenarios, str(folder))


@pytest.fixture
def of(results):
    return lambda name: gloo.pair(results, name)


@pytest.mark.parametrize("name", BASES)
def test_each_process_has_its_part_of_one_process_s_basis(of, name):
    """To the bit, fp32 masters over a bf16 base too. An embedding is split along the vocabulary."""
    _, expected, _ = alone(name)
    for rank, (mine, whole_B, text) in enumerate(of(name)):
        assert mine.keys() == expected.keys()
        for layer, B in expected.items():
            assert B.dtype == mine[layer].dtype == (BF16 if name == "B in bf16" else torch.float32)
            assert torch.equal(whole_B[layer], B)
            is_whole = layer.endswith(("o_proj", "down_proj", "embed_tokens"))
            assert torch.equal(mine[layer], B if is_whole else B.chunk(2)[rank])
        assert "tensor parallelism" in text


@pytest.mark.parametrize("name", STEPPED)
def test_gradients_are_those_of_one_process(of, name):
    """On PEFT's own path, which `explain` says."""
    expected = alone(name)
    for result in of(name):
        same(result, expected)
        assert not result["counts"]
        assert "peft" in result["text"]
        assert "tensor parallelism" in result["text"]


def same(result, expected):
    """Within a few rounding errors; gradients have come through two decoder layers."""
    for part_of, tolerance in (("loss", 1), ("logits", 1), ("gradients", 5)):
        assert_same(result[part_of], expected[part_of], tolerance * RELATIVE[torch.float32])


def test_an_adapter_saved_by_two_processes_is_one_process_s(of, folder):
    pair, alone = of("saved"), loaded(folder, "of_two_processes")
    for result in pair:
        same(result, alone)
    names = "of_two_processes", "of_one_process"
    assert_same(*(load_file(folder / name / "adapter_model.safetensors") for name in names), 0.0)


@pytest.mark.parametrize("name", ["loaded", "loaded without a B"])
def test_an_adapter_of_one_process_is_loaded_by_two(of, folder, name):
    alone = loaded(folder)
    for result in of(name):
        same(result, alone)
        assert_same(result["B"], alone["B"], 0.0)


@pytest.mark.parametrize("name", [*REFUSED, "plain LoRA"])
def test_refused_by_all(of, name):
    """Plain LoRA by stock PEFT."""
    of(name)
