"""The tiny Llama as a GGUF file, in float32, with its byte tokenizer."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from tests.support.tiny_cli import byte_tokenizer, tiny_llama


def write_tiny_gguf(path: Path) -> None:
    """Needs the package ``gguf``. q and k rows are in llama.cpp's order, as transformers expects."""
    import gguf

    model, tokenizer = tiny_llama(), byte_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    # An empty list of merges cannot be written: one of two bytes that no text has. It stands twice, because
    # transformers 5.16 reads a list of one as a string.
    first, second = sorted(pre_tokenizers.ByteLevel.alphabet())[-2:]
    writer.add_token_list([*(token for token, _ in vocabulary), first + second])
    writer.add_token_types([*(3 if token == "<eos>" else 1 for token, _ in vocabulary), 1])
    writer.add_token_merges([f"{first} {second}"] * 2)
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:
                halves = weight.view(count, 2, -1, weight.shape[1])
                weight = halves.transpose(1, 2).reshape(weight.shape)
        name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(name, weight.to(torch.float32).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
