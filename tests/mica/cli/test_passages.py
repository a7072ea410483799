"""Passages of what a run has held out: chosen by position alone, and scored as by hand."""

import json

import pytest
import torch

from mica.cli import passages
from mica.cli.adapt import corpus
from mica.cli.adapt.packing import documents_of
from tests.support.adapt_runs import settings
from tests.support.tiny_cli import adapt, byte_tokenizer, tiny_llama


def documents(*lengths):
    """All tokens differ."""
    return list(torch.arange(sum(lengths)).split(lengths))


@pytest.mark.parametrize(
    ("lengths", "contexts"),
    [
        ([400], [(72, 200)]),  # what is around the middle
        ([100], [(0, 50)]),
        ([48, 49, 10, 50], [(48, 72), (107, 132)]),  # those without enough on both sides do not count
        ([100] * 9, [(0, 50), (400, 450), (800, 850)]),  # evenly spaced
    ],
)
def test_passages_are_chosen_by_position(lengths, contexts):
    found = passages.choose(documents(*lengths), 3)
    assert [passage.context.tolist() for passage in found] == [[*range(*context)] for context in contexts]
    for passage, (_, middle) in zip(found, contexts, strict=True):
        assert passage.following.tolist() == [*range(middle, middle + 24)]


def test_a_reading_is_that_of_the_model():
    model = tiny_llama().eval()
    (passage,) = passages.choose(documents(100), 1)
    log_likelihood, continuation = passages.read(model, passage)
    written = passage.context.tolist()
    with torch.no_grad():
        scores = model(torch.arange(100)[None]).logits[0].log_softmax(-1)
        for _ in range(24):
            written.append(model(torch.tensor([written])).logits[0, -1].argmax().item())
    expected = sum(scores[token - 1, token].item() for token in range(50, 74)) / 24
    assert log_likelihood == pytest.approx(expected, rel=1e-5)
    assert continuation.tolist() == written[50:]


def test_held_out_is_what_the_run_did_not_train_on(model_dir, tmp_path):
    texts = ["".join(f"{m} times {n} is {m * n}; " for m in range(20)) for n in range(12)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    output = tmp_path / "run"
    assert adapt(model_dir, file, output, "--held-out", "0.2") == 0
    tokenizer = byte_tokenizer()

    def texts_of(documents):
        return {tokenizer.decode(ids, skip_special_tokens=True) for ids in documents}

    found = texts_of(passages.held_out(output, tokenizer))
    assert 1 <= len(found) < 6
    sizes = {"held_out": 0.2, "sequence_length": 32, "eval_blocks": 32}
    args = settings(output, text=[str(file)], model=str(model_dir), **sizes)
    assert texts_of(documents_of(corpus.gather(args, tokenizer).train)) == {*texts} - found
