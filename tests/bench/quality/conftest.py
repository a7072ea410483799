"""The texts of `bench.quality` for a tiny model: words are tokens, and new models are made up."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from bench.quality import texts as sources
from bench.quality.recipes import METHODS, Method
from tests.support import models

SMALL = [  # ranks that a tiny model has
    Method(one.name, one.kind, one.recipe, one.rates, one.rank and one.rank // 4)
    for one in METHODS
    if one.rank not in (64, 128)
]


def prose(name):
    return " ".join(f"{name}{number}" for number in range(60))


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory):
    """Like ``transformers.models``: one old model and eight new ones, some with text to leave out."""
    folder = tmp_path_factory.mktemp("models")
    for model in ("old", *(f"new{number}" for number in range(8))):
        parts = [prose(model)]
        if model in ("old", "new3"):
            parts.append(f"{model} before. {prose('copied')} {model} after. {prose(model + 'x')}")
        if model in ("new4", "new5"):
            parts.append(f"Shared by two new models: {prose('shared')}")
        docstring = "\n\n    ".join([*parts, f"Args:\n        {prose('argument')}"])
        year = 2023 if model == "old" else 2025
        source = f'# Copyright {year} The Team.\nclass Model:\n    """{docstring}\n    """\n'
        (folder / model).mkdir()
        (folder / model / f"modeling_{model}.py").write_text(source)
    return folder


@pytest.fixture(scope="session")
def tokenizer(models_folder):
    """One token per word: every answer is one token, as it is in SmolLM2's tokenizer."""
    facts = sources.invent(8)
    probes = [one for part in ("validation", "held_out") for one in sources.probes(facts, part)]
    lines = [*sources.statements(facts, 4), *sources.new_prose(models_folder).values()]
    lines += [probe.prompt + probe.answer for probe in [*probes, *sources.known()]]
    words = [word for line in lines for word, _ in Whitespace().pre_tokenize_str(line)]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", "<eos>", *words]))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="session")
def texts(models_folder, tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "KNOWN_CHARACTERS", 2000)
        return sources.gather(tokenizer, people=8, rounds=2, length=32, eval_blocks=2, folder=models_folder)


@pytest.fixture(scope="session")
def base(tokenizer):
    return models.tiny_llama(vocab_size=len(tokenizer)).requires_grad_(False)
