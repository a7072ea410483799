"""A result of a GPU becomes part of a copy of the checkout, and its figures of the pages."""

import shutil
from pathlib import Path

import pytest

from bench import on_a_gpu, pages
from bench.gpu import __main__ as gpu
from bench.gpu.adopt import RefusedError, adopt, load
from bench.results.cell import Group, Timing
from bench.results.names import (
    BACKWARD,
    BARE,
    DEVICE_TIME,
    FAST,
    FORWARD,
    STOCK,
    STOCK_16,
    SVD,
    WALL,
    of_form,
)
from bench.results.schema import Result

GOLDEN = Path(__file__).parents[1] / "golden"
NOTHING = "has been measured on a GPU yet"
MACHINE = {
    "torch": "2.9",
    "triton": "3.5",
    "peft": "0.21",
    "size": "default",
    "commit": "0123456789abcdef",
    "uncommitted_changes": False,
    "datetime": "2026-01-02T03:04:05",
}


def result(*groups, device="a card"):
    """Of a GPU, with invented times."""
    return Result({"device": device, **MACHINE}, [*groups])


def cell(suite, clock, times, **axes):
    """The same time in every round."""
    name = ", ".join(map(str, [suite, *axes.values(), clock]))
    timings = {name: Timing([seconds] * 7) for name, seconds in times.items()}
    return Group(name, {"suite": suite, "clock": clock, **axes}, timings)


def both_passes(suite, times):
    """Of a layer; its forward and its backward take as long."""
    return [cell(suite, DEVICE_TIME, times, tokens=8192, **{"pass": part}) for part in (FORWARD, BACKWARD)]


def layers(fast):
    """A cell of the suite layer in which mica.fast takes so many seconds for each pass."""
    return both_passes("layer", {BARE: 1e-3, STOCK: 2e-3, STOCK_16: 1.5e-3, FAST: fast})


FORMS = both_passes("forms", {FAST: 3.0, of_form("fused"): 2.0})
OTHERS = [
    cell("step", WALL, {BARE: 0.1, STOCK: 0.3, FAST: 0.15}, tokens=512),
    cell("subspace", WALL, {SVD: 0.8, "minor_subspace, r = 16": 0.04}, out=4096),
    cell("initialisation", WALL, {STOCK: 6.0, FAST: 2.0}, rank=16),
]
ALL = [*FORMS, *layers(1.25e-3), *OTHERS]


@pytest.fixture
def root(tmp_path):
    """A checkout with the pages, in which nothing has been measured."""
    root = tmp_path / "checkout"
    for page in pages.PAGES:
        (root / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pages.ROOT / page, root / page)
    pages.write(root)
    return root


@pytest.fixture
def saved(tmp_path):
    """saved(groups, name, device) -> a file outside of the checkout."""

    def saved(groups, name="run", device="a card"):
        file = tmp_path / f"{name}.json"
        result(*groups, device=device).save(file)
        return file

    return saved


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def page(root, name="bench/README.md"):
    return (root / name).read_text(encoding="utf-8")


def table_rows(root):
    lines = page(root).partition("## On a GPU")[2].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_rows_the_result_and_the_figures_of_all_pages(root, saved, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", root)
    assert gpu.main(["--adopt", str(saved(ALL))]) == 0
    source = "bench/results/a-card/run.json"
    copied = root / source
    assert f"{copied} and the pages are written" in capsys.readouterr().out
    assert Result.load(copied) == result(*ALL)
    assert on_a_gpu.adopted(root) == {"a card": {one.axes["suite"]: source for one in ALL}}
    assert "## In short" in page(root, "bench/results/a-card/run.md")

    for name in pages.PAGES:
        assert "a card" in page(root, name)
        assert NOTHING not in page(root, name)
        assert "not been run on a GPU" not in page(root, name)
    rows = table_rows(root)
    for suite, against, speedup in (
        ("layer, device time", STOCK, "1.60×"),
        ("layer, device time", STOCK_16, "1.20×"),
        ("step, wall clock", STOCK, "2.00×"),
        ("initialisation, wall clock", STOCK, "3.00×"),
    ):
        assert [suite, against, "1", *[speedup] * 3, "none"] in rows
    assert "[raw results](results/a-card/run.json)" in page(root)
    assert "at commit 0123456789ab (torch 2.9, triton 3.5, peft 0.21;" in page(root)
    once = contents(root)
    assert adopt(saved(ALL), root) == adopt(copied, root) == copied
    assert contents(root) == once


def test_a_second_device_is_added_and_the_first_one_replaced(root, saved):
    adopt(saved(ALL), root)
    adopt(saved(FORMS, name="other", device="B 200"), root)
    adopt(saved(layers(1e-3), name="second"), root)
    devices = on_a_gpu.adopted(root)
    assert devices.keys() == {"B 200", "a card"}
    assert devices["a card"]["forms"].endswith("run.json")
    assert devices["a card"]["layer"].endswith("second.json")
    assert "of B 200 and a card." in page(root, "README.md")
    assert ["layer, device time", STOCK, "1", *["2.00×"] * 3, "none"] in table_rows(root)


def test_a_run_without_the_solver_says_nothing_of_it(root, saved):
    adopt(saved(layers(1.25e-3)), root)
    assert "It has not been run on a GPU yet." in page(root, "mica/subspace/README.md")


def test_the_journal_of_a_run_that_was_cut_off(tmp_path):
    """An old one does not know its machine: the result beside it does."""
    file = tmp_path / "run.jsonl"
    file.write_text((GOLDEN / "run.jsonl").read_text())
    with pytest.raises(RefusedError, match="does not say which machine it is of"):
        load(file)
    shutil.copy(GOLDEN / "run.json", tmp_path)
    assert load(file) == Result.load(GOLDEN / "run.json")


DRY = "of a dry run, whose times are not measurements"


@pytest.mark.parametrize(
    ("fact", "value", "why"),
    [
        ("device", "dry run", DRY),
        ("size", "dry", DRY),
        ("device", "cpu", "of a CPU: only a run on a GPU can be adopted"),
    ],
)
def test_what_is_no_measurement_of_a_gpu_is_refused(fact, value, why, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", root)
    file, refused = tmp_path / "run.json", result(*ALL)
    refused.machine[fact] = value
    refused.save(file)
    assert gpu.main(["--adopt", str(file)]) == 2
    assert capsys.readouterr().err == f"bench.gpu: {file} is {why}.\n"


def test_what_is_no_result_is_refused(saved, tmp_path):
    with pytest.raises(RefusedError, match="there is no "):
        load(tmp_path / "none.json")
    with pytest.raises(RefusedError, match="has no measurement"):
        load(saved([]))
    file = tmp_path / "other.json"
    for text in ("{}", "[]", "half of"):
        file.write_text(text)
        with pytest.raises(RefusedError, match=r"other\.json is not a result of the benchmarks\.$"):
            load(file)


def test_another_result_of_this_name_is_kept(root, saved):
    adopt(saved(FORMS), root)
    before = contents(root)
    with pytest.raises(RefusedError, match="is another result: rename "):
        adopt(saved(layers(1e-3)), root)
    assert contents(root) == before
