"""Models that change a layer's output in place while they train: as with PEFT's own layers."""

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
)

from tests.support.models import randomise, wrap
from tests.support.stock import as_stock, counted, step
from tests.support.tolerances import RELATIVE

SIZES = {"vocab_size": 61}
WINDOWS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 4}


class Residual(nn.Module):
    """The ways in which models do it: an activation in place, a sum in place."""

    def __init__(self, hook=False):
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.up = nn.Linear(16, 16)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Linear(16, 16)
        if hook:  # its base layer is called
            self.down.register_forward_hook(lambda *_: None)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        x.mul_(1.5)
        y = self.down(self.relu(self.up(x)))
        y += x
        return y


def falcon():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**SIZES, **sizes, attention_dropout=0.0, hidden_dropout=0.0))


def longformer():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LongformerConfig(**SIZES, **sizes, attention_window=4, max_position_embeddings=66)
    return LongformerForMaskedLM(config).eval()


def led():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    inner = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return LEDForConditionalGeneration(LEDConfig(**SIZES, **sizes, **inner, **WINDOWS)).eval()


MODELS = {
    "in place": (Residual, ["embed", "up", "down"]),
    "in place, base layer called": (lambda: Residual(hook=True), ["embed", "up", "down"]),
    "Falcon": (falcon, "all-linear"),
    "Longformer": (longformer, "all-linear"),
    "LED": (led, "all-linear"),
}


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_with_stock(name):
    build, targets = MODELS[name]
    torch.manual_seed(0)
    model = randomise(wrap(build(), targets=targets))
    ids = torch.randint(3, 61, (2, 12))

    tolerances = RELATIVE[torch.float32], 10 * RELATIVE[torch.float32]
    _, counts = counted(lambda: as_stock(lambda: step(model, input_ids=ids, labels=ids), *tolerances))
    assert "linear" in counts or "up_projection" in counts
