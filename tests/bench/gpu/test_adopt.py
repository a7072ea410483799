"""A result of a GPU becomes part of a copy of the checkout: its table of what was measured, and its pages."""

import json
import shutil

import pytest

from bench import on_a_gpu, pages
from bench.gpu import __main__ as gpu
from bench.gpu.adopt import RefusedError, adopt, load
from bench.measure.machine import device_folder
from bench.results.names import WALL
from bench.results.schema import Result
from mica.kernels import measured
from tests.support.gpu_results import (
    SIZE,
    both_passes,
    compiled_layers,
    initialisation,
    kernel,
    layers,
    result,
    step,
    subspace,
)

NOTHING = "has been measured on a GPU yet"


@pytest.fixture
def root(tmp_path):
    """A checkout with the pages, and a table in which nothing has been measured."""
    root = tmp_path / "checkout"
    for page in pages.PAGES:
        (root / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pages.ROOT / page, root / page)
    measured.write({}, root / "kernels" / "measured.json")
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


FORMS = both_passes(8192, {"split": 3.0, "fused": 2.0})
SMALL = both_passes(1, {"split": 2.0, "reference": 1.0}, clock=WALL)
ALL = [*FORMS, *SMALL, *layers(1.25e-3), step(), kernel(), subspace(), initialisation()]


def test_rows_the_result_and_the_figures_of_all_pages(root, saved):
    before = contents(root)
    copied, entry = adopt(saved(ALL), root)
    source = "bench/results/a-card/run.json"
    assert copied == root / source
    assert Result.load(copied) == result(*ALL)
    suites = {one.axes["suite"]: source for one in ALL}
    assert entry == measured.Measured(suites, ((8192, 16, "fused", "fused"),), SIZE**2)
    assert measured.read(root / "kernels" / "measured.json") == {"a card": entry}

    changed = {
        path.relative_to(root).as_posix() for path, text in contents(root).items() if before.get(path) != text
    }
    assert changed == {source, "kernels/measured.json", *pages.PAGES}
    for name in pages.PAGES:
        assert "a card" in page(root, name)
        assert NOTHING not in page(root, name)
        assert "not been run on a GPU" not in page(root, name)
        assert "<!-- text: " in page(root, name)
    rows = page(root).splitlines()
    assert (
        "| 4096 × 4096, 8,192 tokens, r = 16 | 2 ms | 4 ms | 2.5 ms | 1.60× (1.60–1.60) | 1.20× (1.20–1.20) |"
        in rows
    )
    assert "| a step | 100 ms | 300 ms | 150 ms | 2.00× (2.00–2.00) |" in rows
    assert "| h = x Aᵀ | 1 | 0.90 to 0.90 | 0.90 | 1.30× to 1.30× | 1.30× |" in rows
    assert "| get_peft_model, a model, float32 | 6 s | 2 s | 3.00× (3.00–3.00) |" in rows
    assert "| 4096 × 4096, minor_subspace, r = 16 | 0.8 s | 0.04 s | 20.00× (20.00–20.00) |" in rows
    assert "| 8,192 | 16 | fused | fused |" in rows
    assert f"Up to {SIZE**2:,} multiplications a layer is faster on PyTorch's operators." in rows
    assert "[raw results](results/a-card/run.json)" in page(root)
    assert "at commit 0123456789ab (torch 2.9, triton 3.5, peft 0.21;" in page(root)


def test_the_command_writes_a_report_and_says_what_is_left_to_do(root, saved, monkeypatch, capsys):
    monkeypatch.setattr(pages, "ROOT", root)
    assert gpu.main(["--adopt", str(saved(ALL))]) == 0
    folder = root / "bench" / "results" / "a-card"
    assert (
        f"{folder / 'run.json'}: 1 rows of forms, bound of the host: {SIZE**2:,}." in capsys.readouterr().out
    )
    assert "## Targets" in (folder / "run.md").read_text(encoding="utf-8")
    assert NOTHING not in page(root)


def test_twice_changes_nothing(root, saved):
    file = saved(ALL)
    copied, entry = adopt(file, root)
    once = contents(root)
    assert adopt(file, root) == adopt(copied, root) == (copied, entry)
    assert contents(root) == once


def test_a_second_device_is_added_and_the_first_one_replaced(root, saved):
    adopt(saved(ALL), root)
    adopt(saved(FORMS[:2], name="other", device="B 200"), root)
    _, entry = adopt(saved(both_passes(512, {"split": 1.0}), name="again"), root)
    devices = measured.read(root / "kernels" / "measured.json")
    assert [*devices] == ["B 200", "a card"]
    assert devices["B 200"].forms == ((8192, 16, "fused", "fused"),)
    assert devices["B 200"].host_bound is None
    assert devices["a card"] == entry
    assert entry.forms == ((512, 16, "split", "split"),)
    assert entry.host_bound is None
    assert page(root).index("### B 200") < page(root).index("### a card")
    assert "of B 200 and a card." in page(root, "README.md")


def test_a_run_of_some_stages_leaves_what_others_have_measured(root, saved):
    adopt(saved([*FORMS, *SMALL, *layers(1.25e-3)], name="first"), root)
    _, entry = adopt(saved(layers(1e-3), name="second"), root)
    assert entry.forms == ((8192, 16, "fused", "fused"),)
    assert entry.host_bound == SIZE**2
    assert entry.sources["forms"].endswith("first.json")
    assert entry.sources["layer"].endswith("second.json")
    assert "It has not been run on a GPU yet." in page(root, "mica/subspace/README.md")
    assert "| 2 ms | 4 ms | 2 ms |" in page(root)
    assert "| 2 ms | 4 ms | 2.5 ms |" not in page(root)


def journal_of(groups, machine):
    entries = [{"kind": "machine", "facts": machine}] if machine else []
    for group in groups:
        for name, timing in group.timings.items():
            for seconds in timing.seconds:
                sample = {"kind": "sample", "group": group.name, "axes": group.axes, "implementation": name}
                entries.append({**sample, "seconds": seconds, "facts": {}, "work": {}})
    lines = [json.dumps(entry) for entry in entries]
    return "\n".join(lines) + '\n{"kind": "sam'  # it was cut off


def test_the_journal_of_a_run_that_was_cut_off(root, tmp_path, saved):
    file = tmp_path / "cut.jsonl"
    file.write_text(journal_of(ALL, result().machine), encoding="utf-8")
    copied, entry = adopt(file, root)
    assert copied.name == "cut.json"
    assert Result.load(copied) == result(*ALL)
    assert entry.forms == ((8192, 16, "fused", "fused"),)
    # of an older run, whose journal does not know the machine: the result beside it does
    file.write_text(journal_of(FORMS, None), encoding="utf-8")
    with pytest.raises(RefusedError, match="does not say which machine it is of"):
        load(file)
    saved([], name="cut")
    assert load(file).machine["device"] == "a card"


REFUSED = {
    "dry run": "of a dry run, whose times are not measurements",
    "cpu": "of a CPU: only a run on a GPU can be adopted",
}


@pytest.mark.parametrize("device", REFUSED)
def test_what_is_no_measurement_of_a_gpu_is_refused(device, root, saved, capsys):
    before = contents(root)
    file = saved(ALL, device=device)
    with pytest.raises(RefusedError, match=REFUSED[device]):
        adopt(file, root)
    assert contents(root) == before
    assert gpu.main(["--adopt", str(file)]) == 2
    assert capsys.readouterr().err == f"bench.gpu: {file} is {REFUSED[device]}.\n"


def test_a_dry_run_on_a_gpu_is_refused(tmp_path):
    dry = result(*ALL)
    dry.machine["size"] = "dry"
    file = tmp_path / "run.json"
    dry.save(file)
    with pytest.raises(RefusedError, match=REFUSED["dry run"]):
        load(file)


def test_a_compiled_layer_is_compared_with_the_compiled_stock_layer(root, saved):
    adopt(saved([*layers(fast=1.5e-3), *compiled_layers(fast=1.1e-3)]), root)
    section = on_a_gpu.text("gpu-section", root)
    (row,) = (line for line in section.splitlines() if "torch.compile" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "4096 × 4096, 8,192 tokens, r = 16, both under torch.compile"
    assert cells[1:4] == ["2 ms", "2.4 ms", "2.2 ms"]
    assert cells[4].startswith("1.09×")


@pytest.mark.parametrize(
    ("bound", "sentence"),
    [
        (0, "Even the smallest layer that was timed is faster on kernels."),
        (1024, "Up to 1,024 multiplications a layer is faster on PyTorch's operators."),
    ],
)
def test_the_bound_of_the_host_in_words(root, saved, bound, sentence):
    adopt(saved(ALL), root)
    file = root / "kernels" / measured.FILE.name
    devices = measured.read(file)
    measured.write({name: one._replace(host_bound=bound) for name, one in devices.items()}, file)
    assert sentence in on_a_gpu.text("gpu-section", root)


def test_what_is_no_result_is_refused(root, saved, tmp_path):
    with pytest.raises(RefusedError, match="there is no "):
        adopt(tmp_path / "none.json", root)
    file = tmp_path / "other.json"
    for text in ("{}", "[]", "half of"):
        file.write_text(text)
        with pytest.raises(RefusedError, match=r"other\.json is not a result of the benchmarks\.$"):
            adopt(file, root)
    with pytest.raises(RefusedError, match="has no measurement"):
        adopt(saved([]), root)


def test_a_journal_replaces_the_unfinished_result_beside_it(root):
    folder = root / "bench" / "results" / "a-card"
    folder.mkdir(parents=True)
    result(*FORMS).save(folder / "run.json")
    journal = folder / "run.jsonl"
    journal.write_text(journal_of(ALL, result().machine), encoding="utf-8")
    copied, _ = adopt(journal, root)
    assert copied == folder / "run.json"
    assert Result.load(copied) == result(*ALL)


def test_another_result_of_this_name_is_kept(root, saved):
    copied, _ = adopt(saved(ALL), root)
    before = contents(root)
    with pytest.raises(RefusedError, match="is another result: rename "):
        adopt(saved(FORMS), root)
    assert contents(root) == before
    result(*FORMS).save(copied)  # a run that wrote to the folder itself
    _, entry = adopt(copied, root)
    assert entry.host_bound is None


def test_folders_are_named_by_the_device():
    assert device_folder("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
