"""The base model: quantised as it is read, or converted from a GGUF file."""

import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import mica.fast
from mica.cli.adapt import adapter, base
from mica.cli.adapt.saved_adapter import WEIGHTS
from mica.cli.loading import find_source
from mica.errors import UsageError
from tests.mica.cli.tiny_gguf import write_tiny_gguf
from tests.support.adapt_runs import adapter_settings as settings
from tests.support.adapt_runs import edit_json, resume, same, transfer, working_in
from tests.support.faults import raising
from tests.support.tables import rows
from tests.support.tiny_cli import adapt, byte_tokenizer, logits, tiny_llama


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


def load(model, **options):
    return base.load(settings(model=str(model), **options), find_source(str(model), False))


@pytest.mark.parametrize(
    ("kind", "layer", "method", "trained"),
    rows("""
nf4 => Linear4bit => mica => 1
int8 => Linear8bitLt => mica => 1
nf4 => Linear4bit => lora => 2
nf4 => Linear4bit => dora => 3
"""),
)
def test_quantised_base_can_be_evaluated_and_then_trained(kind, layer, method, trained, model_dir):
    pytest.importorskip("bitsandbytes")
    model = load(model_dir, quantize=kind, dtype="float32")
    up = model.model.layers[0].mlp.up_proj
    assert type(up).__name__ == layer
    assert type(model.lm_head) is torch.nn.Linear
    assert model.dtype == torch.float32
    assert (model.name_or_path, model.device.type) == (str(model_dir), "cpu")
    if kind == "nf4":
        assert up.weight.quant_state.nested
        assert up.compute_dtype == torch.float32
    tuned = adapter.start(model, settings(target_modules="all-linear", method=method))
    ids, gradients = torch.arange(64).view(2, 32), []
    for _ in range(2):
        evaluated = logits(tuned)  # in eval mode, where bitsandbytes repacks 4-bit weights
        assert (evaluated - logits(tiny_llama())).abs().max() < 0.5
        tuned.zero_grad()
        tuned.train()
        tuned(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: w.grad for name, w in tuned.named_parameters() if w.requires_grad})
    first, again = gradients
    assert len(first) == 14 * int(trained)
    starts_at_zero = "lora_A" if method == "mica" else "lora_B"  # and has a gradient before the other
    assert all(gradient.abs().max() > 0 for name, gradient in first.items() if starts_at_zero in name)
    assert same(first, again)


@pytest.mark.parametrize("native", [True, False])
def test_auto_computes_in_the_dtype_of_the_checkpoint(native, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("mica.cli.adapt.base.has_native", lambda dtype: native or dtype == torch.float32)
    tiny_llama().bfloat16().save_pretrained(tmp_path)
    model = load(tmp_path, quantize="nf4")
    expected = torch.bfloat16 if native else torch.float32
    assert model.dtype == model.model.layers[0].mlp.up_proj.compute_dtype == expected


def test_bitsandbytes_does_not_run_on_the_device(model_dir, monkeypatch):
    error = RuntimeError("None of the available devices are supported\nby bitsandbytes.\nInstall it.")
    monkeypatch.setattr("transformers.integrations.validate_bnb_backend_availability", raising(error))
    with pytest.raises(
        UsageError, match=r"^--quantize nf4: not possible on cpu: None of .* by bitsandb\w+\.$"
    ):
        load(model_dir, quantize="nf4")


def test_what_cannot_be_quantised_is_refused_before_its_weights_are_read(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"^--quantize int8: PEFT's DoRA loses the scales .* use nf4"):
        load(tmp_path, quantize="int8", method="dora")
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UsageError, match=r"^--quantize nf4: .* is quantised already"):
        load(tmp_path, quantize="nf4")


def test_a_run_on_a_gguf_file_goes_on_where_its_folder_was_moved(
    gguf_file, model_dir, tmp_path, text_file, capsys
):
    """With --resume, --adapter and mica transfer; after --resume stock PEFT finds the base again."""
    out, moved = tmp_path / "out", tmp_path / "moved" / "out"
    with working_in(tmp_path):  # the adapter names the absolute path of its base
        assert adapt(gguf_file, text_file, "out", "--steps 4 --save-steps 2") == 0
    assert capsys.readouterr().err.count(f"mica: reading {gguf_file}, whose tokenizer and weights are") == 1
    ids = AutoTokenizer.from_pretrained(out / "base")("déjà vu")["input_ids"]
    assert ids == byte_tokenizer()("déjà vu")["input_ids"]
    assert AutoPeftModelForCausalLM.from_pretrained(out).get_base_model().name_or_path == str(out / "base")
    weights = (out / WEIGHTS).read_bytes()
    moved.parent.mkdir()
    out.rename(moved)
    shutil.rmtree(moved / "checkpoint-4")
    (moved / WEIGHTS).unlink()
    assert resume(moved) == 0
    assert (moved / WEIGHTS).read_bytes() == weights
    with mica.fast.disabled():
        loaded = AutoPeftModelForCausalLM.from_pretrained(moved)
    assert adapt(gguf_file, text_file, tmp_path / "on", "--adapter", moved, "--steps 2") == 0
    assert transfer(moved, model_dir, tmp_path / "chat") == 0
    chat = AutoModelForCausalLM.from_pretrained(tmp_path / "chat")
    vocabulary = chat.config.vocab_size  # the file has two tokens more
    torch.testing.assert_close(logits(chat), logits(loaded)[..., :vocabulary])


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_gguf_base_is_converted_in_the_dtype_of_the_run_and_once(gguf_file, output, monkeypatch, dtype):
    options = {"output": output, "dtype": dtype}
    model = load(gguf_file, **options)
    assert model.dtype == (torch.float32 if dtype == "auto" else torch.bfloat16)
    monkeypatch.setattr("mica.cli.adapt.base.write_folder", lambda *_, **__: pytest.fail("converted again"))
    assert load(gguf_file, **options, resume=True).dtype == model.dtype
    if dtype == "auto":
        assert torch.equal(logits(model), logits(tiny_llama()))
        pytest.importorskip("bitsandbytes")
        quantised = load(gguf_file, **options, resume=True, quantize="nf4")
        assert type(quantised.model.layers[1].mlp.up_proj).__name__ == "Linear4bit"
