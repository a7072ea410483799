"""Quantised layers that MiCA cannot start from: one clear sentence, and the model as it was."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from torch import nn

import mica.fast
from mica.errors import UnsuitableLayerError
from tests.support.models import adapted_layers, randomise, wrap
from tests.support.quantised_models import (
    TARGETS,
    adapted,
    assert_spans,
    bnb_4bit,
    bnb_8bit,
    llama,
)
from tests.support.tolerances import RELATIVE, error
from tests.support.unchanged import unchanged

pytestmark = pytest.mark.usefixtures("one_thread", "gptqmodel")


def test_not_quantised_yet():
    bnb = pytest.importorskip("bitsandbytes")
    for layer, flag in (
        (bnb.nn.Linear4bit(32, 16), "is_loaded_in_4bit"),
        (bnb.nn.Linear8bitLt(32, 16, has_fp16_weights=False), "is_loaded_in_8bit"),
    ):
        model = nn.Sequential(layer)
        setattr(model, flag, True)
        with pytest.raises(UnsuitableLayerError, match=r"but layer '0' \(.* .-bit\) is not quantised yet"):
            wrap(model, targets=["0"])
        assert model[0] is layer


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (bnb_4bit, "is_loaded_in_4bit"),
        (partial(bnb_4bit, quant_storage=torch.bfloat16), "is_loaded_in_4bit"),  # r = 1 fits the packed bytes
        (bnb_8bit, "is_loaded_in_8bit"),
    ],
)
def test_a_model_that_does_not_say_that_it_is_quantised(make, flag, tmp_path):
    """PEFT takes its layers for plain ones; an adapter from a file runs there all the same."""
    model = nn.Sequential(make(nn.Linear(32, 16)))
    message = rf"layer '0' is a Linear\w+ of bitsandbytes .*: set model.{flag} = True before"
    with unchanged(model), pytest.raises(UnsuitableLayerError, match=message):
        wrap(model, rank=1, targets=["0"])
    setattr(model, flag, True)
    adapter = randomise(wrap(model, rank=1, targets=["0"]))
    adapter.save_pretrained(tmp_path)
    x = torch.randn(3, 32, requires_grad=True)
    expected = adapter(x)
    delattr(adapter.unload(), flag)
    loaded = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    assert type(loaded.base_model.model[0]) is lora.Linear
    assert error(loaded(x), expected) <= RELATIVE[torch.float32]


def test_8_bit_layer_with_16_bit_weights():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear8bitLt(32, 16, has_fp16_weights=True))
    model.is_loaded_in_8bit = True
    layer = wrap(model, targets=["0"]).base_model.model[0]
    assert type(layer).__name__ == "Linear8bitLt"
    assert_spans(layer.lora_B["default"].weight, layer.get_base_layer().weight.detach())


class QuantizedLinear(nn.Module):
    """As AQLM's: no weight, codes instead."""

    in_features, out_features = 32, 16

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
        self.codebooks = nn.Parameter(torch.zeros(4))


@pytest.mark.parametrize("existing", [False, True])
def test_a_library_that_is_not_covered_is_named(existing):
    model = nn.Sequential(QuantizedLinear())

    def config(init):
        config = LoraConfig(r=4, init_lora_weights=init, target_modules=["0"])
        config._register_custom_module({QuantizedLinear: AqlmLoraLinear})
        return config

    with mica.fast.disabled(), pytest.raises(ValueError, match="Invalid or unsupported variant combination"):
        get_peft_model(copy.deepcopy(model), config("mica"))
    if existing:
        model = get_peft_model(model, config(True))
        attempt = partial(model.add_adapter, "second")
    else:
        attempt = partial(get_peft_model, model)
    message = (
        r"layer '0' has a quantised base layer of type QuantizedLinear \(AQLM\), and .* only those of bits"
    )
    with unchanged(model), pytest.raises(UnsuitableLayerError, match=message):
        attempt(config("mica"))


def test_torchao_int4_is_named():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 64))
    scale, zero = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(1, 64, dtype=torch.bfloat16)
    packed = torch.zeros(64, 16, dtype=torch.int8)
    weight = quantization.Int4Tensor(packed, scale, zero, [1, 32], torch.Size([64, 32]))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    with (
        unchanged(model),
        pytest.raises(UnsuitableLayerError, match=r"layer '0' has .* Linear \(torchao Int4Tensor, refused"),
    ):
        wrap(model, targets=["0"])


def test_other_variants_cannot_be_combined():
    model = llama("nf4")
    with pytest.raises(ValueError, match=r"asks for DoraLinearVariant on layer '.*q_proj'"):
        wrap(model, targets=TARGETS, use_dora=True)
    assert not adapted_layers(model)


def test_disabled_is_stock():
    with mica.fast.disabled(), pytest.raises(TypeError, match="Please initialize MiCA under float32"):
        adapted("nf4")
