"""A tiny Llama with a byte tokenizer, and `mica adapt` with settings that suit it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mica.cli import main

TEXT = "".join(f"{n} times {n} is {n * n}; " for n in range(400))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and an EOS, 257 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def tiny_llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes | heads | options))


def words(*given: object) -> list[str]:
    """Those of a command line: a string has one or several, anything else, as a path, is one."""
    found = []
    for each in given:
        found += each.split() if isinstance(each, str) else [str(each)]
    return found


def mica(*given: object) -> int:
    """Run the command of these `words`."""
    return main(words(*given))


def adapt(model, text, output, *options: object) -> int:
    """Run ``mica adapt`` with settings for the tiny model; ``options``, as `words`, come last and win."""
    own = "--rank 4 --steps 12 --sequence-length 32 --learning-rate 0.02"
    return mica("adapt --model", model, "--text", text, "--output", output, own, *options)


def logits(model) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(64).view(2, 32)).logits
