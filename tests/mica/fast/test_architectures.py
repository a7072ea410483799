"""Models that are no decoders of text: each trains on the fast path, with stock PEFT's losses."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.support.models import wrap
from tests.support.training import Run, check, optimizer_of, train

TOKENS = 61
LABELS = 8
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,  # three steps then change the loss well beyond rounding
}


def random_ids(seed: int) -> torch.Tensor:
    return torch.randint(0, TOKENS, (4, 12), generator=torch.Generator().manual_seed(seed))


def random_values(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=TOKENS, **SIZES, **dropout))


def loss_of_text(model: nn.Module) -> torch.Tensor:
    return model(input_ids=random_ids(2), labels=random_ids(3)).loss


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=LABELS, **SIZES))


def loss_of_vit(model: nn.Module) -> torch.Tensor:
    images = random_values(4, 3, 16, 16, seed=2)
    return model(pixel_values=images, labels=torch.arange(4)).loss


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=TOKENS,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def loss_of_unet(model: nn.Module) -> torch.Tensor:
    """The mean square error of the predicted noise."""
    latents = random_values(2, 4, 8, 8, seed=2)
    text = random_values(2, 6, 16, seed=3)
    noise = random_values(2, 4, 8, 8, seed=4)
    predicted = model(latents, torch.tensor([10, 500]), encoder_hidden_states=text).sample
    return nn.functional.mse_loss(predicted, noise)


ARCHITECTURES = {
    # name: (what builds the model, its loss, target modules, how many layers are adapted)
    # query, key, value, output and two of the MLP in each of two layers; one in the head
    "BERT": (bert, loss_of_text, "all-linear", 13),
    # the same and the classifier; the patch embedding is a convolution
    "ViT": (vit, loss_of_vit, "all-linear", 13),
    # 6 in each encoder layer, and 10, with the cross-attention, in each decoder layer
    "T5": (t5, loss_of_text, "all-linear", 32),
    # self-attention and cross-attention in one block down, the middle one and two up
    "UNet": (unet, loss_of_unet, ["to_q", "to_k", "to_v", "to_out.0"], 32),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_architecture_trains_on_the_fast_path(name):
    build, loss_of, targets, layers = ARCHITECTURES[name]

    def make():
        torch.manual_seed(0)
        return wrap(build(), targets=targets).train()

    def losses(model):
        return train(lambda **_: SimpleNamespace(loss=loss_of(model)), optimizer=optimizer_of(model))

    run = Run(make=make, train=losses)
    done = run.done()
    assert len(done["rows"]) == layers
    assert all(row.calls == 3 for row in done["rows"])
    check(done, run.expected(), run)
