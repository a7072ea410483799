"""The texts of `bench.quality`: two that SmolLM2 cannot have seen, and two that it knows.

*New facts* are invented (`facts.json`): people who do not exist, each with a home town, a trade, an
instrument and an animal. Every fact is stated in `STATEMENTS` phrasings for training and queried in others
for validation and for the test. What counts is how likely the right answer is among all answers to its
attribute, each of which is right for equally many people. That is knowledge and not style: a model that has
learned the possible answers, and the form of such sentences, still guesses. No crawl has them.

*New prose* is what people wrote after SmolLM2's training (it was released in November 2024): paragraphs of
the docstrings of those models that came into transformers in 2025 or later, by their copyright line. The
package is installed anyway, and its prose is technical English with new words. A paragraph stays only
if it shares no run of `RUN` words with the docstrings of older models or with a paragraph before it; so no
such run in a held-out document is in training. Documents, one per model, are trained on or held out whole.

*Known text*, to measure forgetting: the reference manual of the Python language, in the standard library,
code of that library, and sentences of general knowledge, measured like the new facts and far from the new
prose.

Nothing is downloaded, no third-party text is in the repository, and everything is a function of the installed
versions: `bench.quality` records these and a SHA-256 of every text.
"""

from __future__ import annotations

import ast
import bisect
import heapq
import json
import random
import re
import shlex
import textwrap
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import transformers.models

from mica.cli.demo import python_reference_text
from mica.errors import UsageError

MODELS = Path(transformers.models.__path__[0])
KNOWN_CHARACTERS = 200_000  # of the reference manual: far more than is measured
CODE = (bisect, heapq, textwrap, shlex)  # modules older than the model
RUN = 8  # words: shorter runs are idiom ("of the same length as the number of ..."), longer ones are copies
BATCH = {"facts": 3, "prose": 1}  # blocks
SHARES = {"validation": 0.1, "held_out": 0.25}  # of the documents of new prose


class Fact(NamedTuple):
    person: str
    attribute: str
    answer: str


class Probe(NamedTuple):
    """A prompt, the answer that must follow, and the other possible ones, with their leading spaces."""

    prompt: str
    answer: str
    others: tuple[str, ...] = ()


class Attribute(NamedTuple):
    """Templates with {person} and, in statements, {answer}. Questions end right before the answer."""

    answers: list[str]
    statements: list[str]
    validation: str
    held_out: list[str]


_TOLD = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))
# The person always precedes the answer: what is learned in one direction is not recalled in the other.
ATTRIBUTES = {name: Attribute(**parts) for name, parts in _TOLD["attributes"].items()}
STATEMENTS, NUM_ANSWERS = 4, 8  # of every attribute
NAMES = _TOLD["names"]  # of few tokens, since the steps are few, too


def known() -> list[Probe]:
    """Sentences of general knowledge, each split before the word that must follow."""
    return [Probe(*sentence.split("|")) for sentence in _TOLD["known"]]


def invent(people: int, seed: int = 0) -> list[Fact]:
    """One fact per attribute for each of ``people`` invented people."""
    rng = random.Random(seed)
    if people % NUM_ANSWERS or not 0 < people <= len(NAMES):  # every answer as often as any other
        raise UsageError(f"--people {people}: a multiple of {NUM_ANSWERS}, at most {len(NAMES)}")
    persons = rng.sample(NAMES, people)
    facts = []
    for attribute, (answers, *_) in ATTRIBUTES.items():
        dealt = [*answers] * (people // NUM_ANSWERS)
        rng.shuffle(dealt)
        facts += [Fact(*fact) for fact in zip(persons, [attribute] * people, dealt, strict=True)]
    return facts


def statements(facts: list[Fact], rounds: int) -> list[str]:
    """``rounds`` times every fact, in another phrasing and in another order each time.

    If a text were repeated, a model would memorise its order and infer an answer from the preceding sentence;
    if a fact were in a block twice, it would copy.
    """
    rng, lines = random.Random(0), []
    for number in range(rounds):
        if number % STATEMENTS == 0:
            orders = {fact: rng.sample(range(STATEMENTS), STATEMENTS) for fact in facts}
        for fact in rng.sample(facts, len(facts)):
            template = ATTRIBUTES[fact.attribute].statements[orders[fact][number % STATEMENTS]]
            lines.append(template.format(person=fact.person, answer=fact.answer))
    return lines


def probes(facts: list[Fact], part: str) -> list[Probe]:
    """Questions about every fact, in phrasings of ``part`` ("validation": one, "held_out": two) that no
    training text has."""
    questions = []
    for fact in facts:
        attribute = ATTRIBUTES[fact.attribute]
        others = tuple(f" {other}" for other in attribute.answers if other != fact.answer)
        for template in (attribute.validation,) if part == "validation" else attribute.held_out:
            questions.append(Probe(template.format(person=fact.person), f" {fact.answer}", others))
    return questions


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `RUN` words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


def new_prose(folder: Path = MODELS) -> dict[str, str]:
    """Name of a model -> paragraphs of its docstrings, for models added to transformers since 2025.

    ``folder``: that of ``transformers.models``, one folder per model. Paragraphs that describe an argument,
    show code or are short are left out, and those that are copies (see the module).
    """
    seen: set[tuple[str, ...]] = set()
    new: list[tuple[str, str]] = []
    for path in sorted(folder.glob("*/*.py")):
        source = path.read_text(encoding="utf-8")
        recent = is_recent(source)
        for paragraph in _paragraphs(source):
            if recent:
                new.append((path.parent.name, paragraph))
            else:
                seen |= word_runs(paragraph)
    documents: dict[str, list[str]] = {}
    for model, paragraph in new:
        runs = word_runs(paragraph)
        if runs and not runs & seen:
            documents.setdefault(model, []).append(paragraph)
            seen |= runs
    return {model: "\n\n".join(paragraphs) for model, paragraphs in documents.items()}


def is_recent(source: str) -> bool:
    """Whether the copyright line of a module names 2025 or a later year."""
    return re.search(r"Copyright (\(c\) )?20(2[5-9]|[3-9]\d)", source[:1000]) is not None


def _paragraphs(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                section = re.match(r"(Args|Returns|Examples?|Raises|Parameters|Attributes|Inputs)\b", text)
                argument = "(`" in text or "`):" in text or re.match(r"[-*] ", text)
                code = ">>>" in text or "```" in text or " = " in text
                if len(text) > 150 and not (section or argument or code):
                    yield text


def split(documents: dict[str, str]) -> dict[str, list[str]]:
    """Whole documents for "train", "validation" and "held_out", drawn at random; at least one each."""
    if len(documents) < 3:
        raise UsageError(
            f"{len(documents)} documents of new prose in transformers, 3 needed: it has no models of 2025"
        )
    names = sorted(documents)
    random.Random(0).shuffle(names)
    parts, start = {}, 0
    for part, share in SHARES.items():
        count = max(1, round(share * len(names)))
        parts[part] = names[start : start + count]
        start += count
    parts["train"] = names[start:]
    return {part: [documents[name] for name in names] for part, names in parts.items()}


def blocks(tokenizer, texts: list[str], length: int, limit: int | None = None) -> torch.Tensor:
    """(num_blocks, length) token ids, int64: the texts joined by EOS, evenly spaced blocks up to ``limit``.

    Raises UsageError if there is not enough text for one.
    """
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
    count = len(stream) // length
    if not count:
        raise UsageError(f"{len(stream)} tokens of text, {length} needed for a block")
    rows = torch.tensor(stream[: count * length]).view(count, length)
    if limit is None or count <= limit:
        return rows
    return rows[torch.linspace(0, count - 1, limit).round().long()]


class TokenisedProbes(NamedTuple):
    """``tokens`` (num_probes, longest) int64, padded with zeros on the right, where a causal model does not
    look; ``is_answer`` (num_probes, longest) bool marks what must be predicted.
    ``candidates`` (num_probes, num_answers) int64: first tokens of the right answer and of all others."""

    tokens: torch.Tensor
    is_answer: torch.Tensor
    candidates: torch.Tensor


def tokenise(tokenizer, probes: list[Probe]) -> TokenisedProbes:
    """Prompts and answers are tokenised separately, so that an answer's tokens never depend on its prompt.

    Raises UsageError if two answers to one question start with the same token.
    """

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [(ids_of(probe.prompt), ids_of(probe.answer)) for probe in probes]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    is_answer = torch.zeros(len(rows), longest, dtype=torch.bool)
    firsts = []
    for number, (probe, (prompt, answer)) in enumerate(zip(probes, rows, strict=True)):
        end = len(prompt) + len(answer)
        tokens[number, :end] = torch.tensor(prompt + answer)
        is_answer[number, len(prompt) : end] = True
        firsts.append([answer[0], *(ids_of(other)[0] for other in probe.others)])
        if len(set(firsts[-1])) < len(firsts[-1]):
            raise UsageError("the tokenizer begins two answers to one question with the same token")
    return TokenisedProbes(tokens, is_answer, torch.tensor(firsts))


class Texts(NamedTuple):
    """All tokens of a run. ``train``: one tensor per kind of text, (num_blocks, length) int64, of which a
    batch has `BATCH` blocks; ``prose``: blocks by name; ``probes`` by name; ``about``: size and SHA-256."""

    train: dict[str, torch.Tensor]
    prose: dict[str, torch.Tensor]
    probes: dict[str, TokenisedProbes]
    about: dict[str, dict[str, int | str]]


def gather(
    tokenizer, people: int, rounds: int, length: int, eval_blocks: int, folder: Path = MODELS
) -> Texts:
    """Build all texts. ``rounds``: how often every fact is stated; there is as much prose as batches need.

    ``eval_blocks``: blocks of each prose text that is only measured; validation has half.
    Raises UsageError if there is not enough text.
    """
    facts = invent(people)
    sources = {
        "facts, train": statements(facts, rounds),
        **{f"prose, {part}": texts for part, texts in split(new_prose(folder)).items()},
        "reference": [python_reference_text()[:KNOWN_CHARACTERS]],
        "code": [Path(module.__file__).read_text(encoding="utf-8") for module in CODE],
    }
    steps = len(blocks(tokenizer, sources["facts, train"], length)) // BATCH["facts"]
    if len(blocks(tokenizer, sources["prose, train"], length)) < steps * BATCH["prose"] or not steps:
        raise UsageError(f"--rounds {rounds}: too much or too little for blocks of {length} tokens")
    limits = {"prose, validation": max(1, eval_blocks // 2)}
    limits |= {f"{name}, train": steps * count for name, count in BATCH.items()}
    prose, tokenised, about = {}, {}, {}
    for name, texts in sources.items():
        prose[name] = blocks(tokenizer, texts, length, limits.get(name, eval_blocks))
        about[name] = {"tokens": prose[name].numel(), "sha256": _digest(texts)}
    questions = {f"facts, {part}": probes(facts, part) for part in ("validation", "held_out")}
    for name, rows in {**questions, "known facts": known()}.items():
        tokenised[name] = tokenise(tokenizer, rows)
        texts = [probe.prompt + probe.answer for probe in rows]
        about[name] = {"tokens": int(tokenised[name].is_answer.sum()), "sha256": _digest(texts)}
    train = {name: prose.pop(f"{name}, train") for name in BATCH}
    return Texts(train, prose, tokenised, about)


def _digest(texts: list[str]) -> str:
    """SHA-256 of texts, each followed by a zero byte."""
    return sha256(b"".join(text.encode() + b"\0" for text in texts)).hexdigest()
