"""The models of `machine`: tiny ones of transformers' shapes, and one with what these have not."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.pytorch_utils import Conv1D

from tests.support import moe_models

VOCABULARY = 29
_COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "attn_implementation": "eager"}


class Shared(nn.Module):
    """Three layers that read one tensor, one called twice and under two names, an embedding, a Conv1D.

    ``inplace``: outputs are edited in place. ``reentrant``: None, or how a part is checkpointed.
    """

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 12, padding_idx=3)
        self.q_proj, self.k_proj = nn.Linear(12, 12, bias=False), nn.Linear(12, 12)
        self.v_proj = nn.Linear(12, 10)
        self.mix = nn.Linear(12, 12)
        self.conv = Conv1D(16, 12)
        self.down = nn.Linear(16, 10, bias=False)
        self.again = self.mix
        self.inplace, self.reentrant = inplace, None

    def attend(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.inplace:
            q += x
            k = k.tanh_()
        return torch.tanh(q * k + nn.functional.pad(v, (0, 2)))

    def forward(self, input_ids, inputs_embeds=None):
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if self.reentrant is not None and self.training:
            x = checkpoint(self.attend, x, use_reentrant=self.reentrant)
        else:
            x = self.attend(x)
        x = self.mix(torch.tanh(self.mix(x)))
        x = x + self.again(torch.tanh(x))
        return self.down(torch.tanh(self.conv(x)))


_WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_WIDE |= {"num_key_value_heads": 1, "max_position_embeddings": 64}
_GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
_GEMMA = {**_WIDE, "head_dim": 8, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0, "dropout_rate": 0.0, "initializer_factor": 1.0}
# no ReLU anywhere: where its argument is near 0, two good results have different gradients
_T5 |= {"feed_forward_proj": "gated-gelu"}


def _causal(model_type: str, **sizes):
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, **_COMMON))


class _ByPlace:
    """A token's experts follow from its place, some have none: rounding must not choose between near ties."""

    def forward(self, hidden_states):
        logits, scores, indices = super().forward(hidden_states)
        first = torch.arange(len(logits)).square() % logits.shape[-1]
        indices = torch.stack((first, (first + 1) % logits.shape[-1]), -1)
        return logits, logits.gather(-1, indices).softmax(-1).to(scores.dtype), indices


# with names in this module, so that a model with one can be pickled
_Qwen3Router = type("_Qwen3Router", (_ByPlace, Qwen3MoeTopKRouter), {})
_MixtralRouter = type("_MixtralRouter", (_ByPlace, MixtralTopKRouter), {})
_GptOssRouter = type("_GptOssRouter", (_ByPlace, GptOssTopKRouter), {})


def _mixture(builder, router):
    """One of `moe_models`, with a router that chooses by place."""

    def build():
        model = builder(**_COMMON).train()
        for module in model.modules():
            if isinstance(module, router.__mro__[2]):
                module.__class__ = router
        return model

    return build


class Kind(NamedTuple):
    """How a model is made, and what adapters may target: the first is the widest choice.

    Names with a dot are parameters. All adapters on a model's parameters name the same ones, as PEFT demands.
    """

    build: Callable[[], nn.Module]
    targets: list[list[str]]
    form: str = "causal"  # or "seq2seq", "plain"
    saved: str = "lm_head"  # what ``modules_to_save`` may name


_ATTENTION, _MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
_STACKS, _DOWN = moe_models.STACKS, ["mlp.gate.weight", "mlp.experts.down_proj"]

_SHARED = ["q_proj", "k_proj", "v_proj", "mix", "conv", "down"]

KINDS = {
    "llama": Kind(_causal("llama", **_WIDE), [_ATTENTION + _MLP, ["q_proj", "v_proj"], _MLP]),
    "gpt2": Kind(_causal("gpt2", **_GPT2), [["c_attn", "c_proj", "c_fc"], ["c_attn"], ["wte", "c_fc"]]),
    "gemma": Kind(
        _causal("gemma3_text", **_GEMMA),
        [["embed_tokens", *_ATTENTION, *_MLP], ["embed_tokens", "q_proj", "k_proj"]],
    ),
    "t5": Kind(
        lambda: AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **_T5)),
        [["q", "k", "v", "o", "wi_0", "wi_1", "wo"], ["k", "v"], ["shared", "q"]],
        "seq2seq",
    ),
    "shared": Kind(
        Shared, [["embed", *_SHARED], ["q_proj", "k_proj"], ["embed", "mix"]], "plain", saved="conv"
    ),
    "inplace": Kind(lambda: Shared(inplace=True), [_SHARED, ["q_proj", "k_proj"]], "plain", saved="conv"),
    "qwen3_moe": Kind(_mixture(moe_models.qwen3_moe, _Qwen3Router), [["q_proj", *_DOWN], _DOWN, ["q_proj"]]),
    "mixtral": Kind(
        _mixture(moe_models.mixtral, _MixtralRouter), [["q_proj", "v_proj", *_STACKS], _STACKS, _ATTENTION]
    ),
    "gpt_oss": Kind(_mixture(moe_models.gpt_oss, _GptOssRouter), [["k_proj", *_STACKS], _STACKS]),
}
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")


def targeting(names: list[str]) -> dict[str, list[str]]:
    """As `LoraConfig` names them: modules, and parameters if there are any."""
    parameters = [name for name in names if "." in name]
    modules = {"target_modules": [name for name in names if "." not in name]}
    return {**modules, "target_parameters": parameters} if parameters else modules


def build(kind: str, seed: int = 0) -> nn.Module:
    """Dropout of the base model is off: what is drawn there is not what is compared."""
    torch.manual_seed(seed)
    model = KINDS[kind].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
            # a row of zeros: a normalisation would blow up what rounding leaves there after unmerging
            nn.init.normal_(module.weight.data[module.padding_idx], std=0.3)
    if hasattr(model, "config"):
        for name in ("attention_dropout", "attn_pdrop"):
            if hasattr(model.config, name):
                setattr(model.config, name, 0.0)
    for parameter in model.parameters():  # biases start at 0, where an error in them is not seen
        if parameter.dim() == 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def tokens(size: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (size, length), generator=generator)


def run(model: nn.Module, form: str, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    """The logits of one call of the model, whatever its kind."""
    if form == "plain":
        return model(ids, **kwargs)
    if form == "seq2seq":
        return model(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :3], **kwargs).logits
    if "inputs_embeds" not in kwargs:
        kwargs["input_ids"] = ids
    return model(**kwargs, use_cache=False).logits
