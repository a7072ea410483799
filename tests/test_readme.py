"""The README files: links lead somewhere, examples run, and the table of set-ups is the tested one."""

import ast
import importlib.util
import re
import sys
import urllib.parse
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

import mica.fast
from tests.support.imports import ROOT
from tests.support.models import tiny_llama
from tests.support.pages import FENCED, pages, read
from tests.support.setups import ONE_PROCESS, TWO_PROCESSES, setups

LINK = re.compile(r"\]\(([^()\s]+)\)")


@cache
def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives to the headings of a page."""
    seen: Counter[str] = Counter()
    ids = set()
    for title in re.findall(r"^#+ +(.*)$", FENCED.sub("", read(page)), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("]", title).lower()).replace(" ", "-")
        ids.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return ids


def broken_links(page: str) -> list[str]:
    """Relative links and images whose file or heading does not exist."""
    prose = re.sub(r"`[^`\n]*`", "", FENCED.sub("", read(page)))
    broken = []
    for link in LINK.findall(prose):
        path, _, anchor = urllib.parse.unquote(link).partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", pages())
def test_links(page):
    assert broken_links(page) == []


def examples(page: str) -> list[str]:
    return [code for language, code in FENCED.findall(read(page)) if language == "python"]


@pytest.mark.parametrize("page", ["README.md", "mica/fast/README.md"])
def test_examples_run(page, monkeypatch):
    """As they stand, but for the model's size."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda name: tiny_llama(**sizes))
    assert examples(page)
    for example in examples(page):
        names = {}
        exec(example, names)
        assert mica.fast.explain(names["model"]).counts() == {"reference": 14}


def test_the_solver_example_runs(capsys):
    (example,) = examples("mica/subspace/README.md")
    torch.manual_seed(0)
    exec(example, {})
    assert f"# {capsys.readouterr().out.strip()}" in example


def test_the_kernel_example_passes_the_test_example(tmp_path, monkeypatch):
    kernel, test = examples("CONTRIBUTING.md")
    file = tmp_path / "scaled.py"  # Triton reads the source
    file.write_text(kernel, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mica.kernels.scaled", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, spec.name, module)
    names = {}
    exec(test, names)
    for dtype in (torch.float32, torch.bfloat16):
        names["test_scaled"](dtype)


def test_the_benchmark_example_builds_and_checks_its_implementations(monkeypatch):
    (example,) = examples("bench/METHOD.md")
    names = {"__name__": "bench_forward"}
    exec(example, names)
    timed = {}

    def rounds(group, implementations, sample):
        for implementation in implementations:

            def once(call, axes, iterations, all_clocks, implementation=implementation):
                timed[implementation] = call().shape, axes["tokens"], iterations > 0

            sample(once, implementation)

    monkeypatch.setattr("bench.suites.case.rounds", rounds)
    names["bench_forward"]()
    assert timed == dict.fromkeys((names["BARE"], names["FAST"]), ((256, 1024), 256, True))


SETUPS = setups().values()


@pytest.mark.parametrize("file", sorted({setup.test.partition("::")[0] for setup in SETUPS}))
def test_every_named_test_exists(file):
    tree = ast.parse(read(file))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {setup.test.partition("::")[2] for setup in SETUPS if setup.test.startswith(f"{file}::")}
    assert named <= functions


def test_rows_have_known_values():
    assert {setup.works for setup in SETUPS} == {"yes", "stand-in", "refused"}
    assert {setup.fast for setup in SETUPS} == {"yes", "partly", "no"}
    assert {setup.fast for setup in SETUPS if setup.works == "refused"} == {"no"}


@pytest.mark.parametrize(
    ("function", "runs"), [("in_one_process", ONE_PROCESS), ("in_two_processes", TWO_PROCESSES)]
)
def test_a_row_has_runs_or_a_test_of_its_own(function, runs):
    driven = [setup for setup in SETUPS if setup.test.endswith(f"::test_{function}")]
    assert {setup.name for setup in driven} == set(runs)
    assert {setup.works for setup in driven} == {"yes"}
    assert all(runs.values())
