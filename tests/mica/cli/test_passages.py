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


def test_a_passage_is_what_is_around_the_middle():
    (ids,) = documents(400)
    (passage,) = passages.choose([ids], 3)
    assert passage.context.tolist() == list(range(72, 200))
    assert passage.following.tolist() == list(range(200, 224))


def test_a_short_document_is_the_whole_context():
    (passage,) = passages.choose(documents(100), 3)
    assert passage.context.tolist() == list(range(50))


def test_documents_without_enough_on_both_sides_do_not_count():
    found = passages.choose(documents(48, 49, 10, 50), 3)
    assert [(len(context), len(following)) for context, following in found] == [(24, 24), (25, 24)]
    assert found[0].context[0] == 48


@pytest.mark.parametrize(("count", "chosen"), [(2, [0, 1]), (3, [0, 1, 2]), (5, [0, 2, 4]), (9, [0, 4, 8])])
def test_they_are_evenly_spaced(count, chosen):
    found = passages.choose(documents(*[100] * count), 3)
    assert [passage.context[0].item() // 100 for passage in found] == chosen


def test_a_reading_is_that_of_the_model():
    model = tiny_llama().eval()
    (passage,) = passages.choose(documents(100), 1)
    reading = passages.read(model, passage)
    ids = torch.arange(100)
    total = 0
    with torch.no_grad():
        for position in range(50, 74):
            total += model(ids[None, :position]).logits[0, -1].log_softmax(-1)[position].item()
    assert reading.log_likelihood == pytest.approx(total / 24, rel=1e-5)

    written = passage.context.tolist()
    with torch.no_grad():
        for _ in range(24):
            written.append(model(torch.tensor([written])).logits[0, -1].argmax().item())
    assert reading.continuation.tolist() == written[50:]


def test_held_out_is_what_the_run_did_not_train_on(model_dir, tmp_path):
    texts = ["".join(f"{m} times {n} is {m * n}; " for m in range(20)) for n in range(12)]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    output = tmp_path / "run"
    assert adapt(model_dir, file, output, "--held-out", "0.2") == 0
    tokenizer = byte_tokenizer()
    found = [tokenizer.decode(ids, skip_special_tokens=True) for ids in passages.held_out(output, tokenizer)]
    assert 1 <= len(found) < 6
    assert set(found) < set(texts)

    args = settings(
        output, text=[str(file)], model=str(model_dir), held_out=0.2, sequence_length=32, eval_blocks=32
    )
    trained = documents_of(corpus.gather(args, tokenizer).train)
    trained = {tokenizer.decode(ids, skip_special_tokens=True) for ids in trained}
    assert trained == set(texts) - set(found)
