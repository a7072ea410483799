"""Held-out perplexity of a causal language model."""

import math

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from mica.errors import UsageError


@torch.no_grad()
def perplexity(model: torch.nn.Module, blocks: torch.Tensor, batch_size: int, desc: str = "") -> float:
    """Return exp(mean negative log-likelihood per predicted token) of ``blocks``.

    ``blocks``: (num_blocks, sequence_length) token ids. The first token of a block predicts and is not
    predicted: num_blocks * (sequence_length - 1) tokens count. The loss is taken in fp32 whatever the
    dtype of the logits, and summed in fp64. ``desc`` labels the progress bar; without it there is none.

    Raises UsageError if the result is not a finite number.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    for batch in tqdm(blocks.split(batch_size), desc=desc, disable=not desc):
        batch = batch.to(device)
        logits = model(input_ids=batch).logits[:, :-1]  # (batch_size, sequence_length - 1, vocab_size)
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        total += loss.double().cpu()
    model.train(was_training)
    result = total.div(blocks[:, 1:].numel()).exp().item()
    if not math.isfinite(result):
        raise UsageError(f"the held-out perplexity is not finite ({result}): the model is broken or diverged")
    return result
