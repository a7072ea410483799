"""Two gloo processes, each with a part of every layer: adapters run on PEFT's code, made elsewhere."""

from functools import partial

import pytest
import torch
from peft import PeftModel

import mica.fast
from mica.errors import UnsuitableLayerError
from tests.support import gloo
from tests.support.models import adapted_layers, randomise, wrap
from tests.support.peft_versions import needs_peft
from tests.support.stock import assert_same, counted
from tests.support.tolerances import RELATIVE
from tests.support.tp_models import save_model, split
from tests.support.training import batches
from tests.support.unchanged import unchanged

pytestmark = [
    pytest.mark.slow,
    needs_peft("0.21", "it has no tensor parallelism"),
    pytest.mark.usefixtures("one_thread"),
]


SHARD = r"holds one shard of it .*Create the adapter before the model is sharded"


def loaded(folder):
    return PeftModel.from_pretrained(split(folder), f"{folder}/adapter").eval()


def logits(folder):
    model = loaded(folder)
    with torch.no_grad():
        result, counts = counted(lambda: model(input_ids=batches(1)[0]).logits)
    return result, counts, str(mica.fast.explain(model))


def refused(folder, targets):
    """Before anything has changed."""
    base = split(folder)
    with (
        unchanged(base),
        pytest.raises(UnsuitableLayerError, match=SHARD),
    ):
        wrap(base, targets=targets)


def merge_refused(folder):
    model = loaded(folder)
    message = r"into layer 'model.layers.0.self_attn.q_proj' under tensor parallelism.*save the adapter"
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.merge_adapter()
    assert not any(layer.merged for layer in adapted_layers(model).values())


SCENARIOS = {
    "loaded": logits,
    **{name: partial(refused, targets=[name]) for name in ("q_proj", "o_proj", "lm_head", "embed_tokens")},
    "a merge": merge_refused,
}


def scenarios(rank, folder):
    """All in one launch, which takes longer than they do."""
    return {name: gloo.attempt(scenario, folder) for name, scenario in SCENARIOS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor_parallel")
    save_model(folder)
    randomise(wrap(split(folder), targets="all-linear")).save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    return gloo.run(scenarios, str(folder))


def test_an_adapter_of_one_process_runs_on_peft_s_code(results, folder):
    alone, _, _ = logits(folder)
    for result, counts, text in gloo.pair(results, "loaded"):
        assert_same(result, alone, RELATIVE[torch.float32])
        assert not counts
        assert "tensor parallelism" in text


@pytest.mark.parametrize("name", [*SCENARIOS][1:])
def test_refused_by_all(results, name):
    gloo.pair(results, name)
