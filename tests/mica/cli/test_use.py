"""USE.md: its code runs, in its order, on an adapter that has learned; all ways give the same tokens."""

import importlib.util
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM

from mica.cli import main
from tests.support.adapt_runs import poison_solver, saved, working_in, write_adapter
from tests.support.pages import FENCED, read
from tests.support.processes import printed_by
from tests.support.tiny_cli import logits, tiny_llama

BLOCKS = FENCED.findall(read("mica/cli/USE.md"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With ``base``, ``run``, and what the page's code has made of them."""
    folder = tmp_path_factory.mktemp("use")
    saved(tiny_llama(), folder / "base")
    write_adapter(folder / "run", AutoModelForCausalLM.from_pretrained(folder / "base"))
    return folder


@pytest.fixture(scope="module")
def names(folder):
    """What the page's Python has defined, after all of its blocks."""
    names = {}
    with working_in(folder), pytest.MonkeyPatch.context() as patch:
        poison_solver(patch)
        for language, code in BLOCKS:
            if "BitsAndBytesConfig" in code and importlib.util.find_spec("bitsandbytes") is None:
                continue
            if language == "python":
                exec(code, names)
            elif language == "sh":
                for line in code.splitlines():
                    assert main(shlex.split(line)[1:]) == 0
    return names


def test_it_generates_before_and_after(names):
    before, after = names["before"], names["after"]
    assert before.shape[1] > names["prompt"]["input_ids"].shape[1]
    assert not torch.equal(before, after)


def test_merged_models_continue_as_the_adapter_does(names, folder):
    for model in (names["merged"], AutoModelForCausalLM.from_pretrained(folder / "merged-by-peft")):
        tokens = model.generate(**names["prompt"], max_new_tokens=20, do_sample=False)
        assert torch.equal(tokens, names["after"])


def test_the_merged_model_is_quantised_again(names, folder):
    functional = pytest.importorskip("bitsandbytes.functional")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged-nf4")
    packed = model.model.layers[0].self_attn.q_proj.weight
    merged = names["merged"].model.layers[0].self_attn.q_proj.weight
    expected, state = functional.quantize_4bit(merged.data, quant_type="nf4", compress_statistics=True)
    torch.testing.assert_close(
        functional.dequantize_4bit(packed.data, packed.quant_state),
        functional.dequantize_4bit(expected, state),
    )


WITHOUT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "plain")
ids = torch.arange(64).view(2, 32)
with torch.no_grad():
    torch.save([after, model(ids).logits, plain(ids).logits], "without.pt")
"""


@pytest.mark.slow
def test_plain_peft_computes_the_same(names, folder):
    """The page's Python where an import of this package fails, and the copy without its mark."""
    code = BLOCKS[0][1].replace("import mica.fast", "import sys; sys.modules['mica'] = None") + WITHOUT
    printed_by(code, cwd=folder)
    after, adapter, plain = torch.load(folder / "without.pt")
    assert torch.equal(after, names["after"])
    assert torch.equal(adapter, plain)
    torch.testing.assert_close(adapter, logits(names["model"]), rtol=1e-5, atol=1e-6)
