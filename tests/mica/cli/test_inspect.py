"""``mica inspect``: its tables and JSON against the fp64 SVD of every weight, its reasons, its refusals."""

import json
import re
import statistics
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mica.cli import main, spectra
from mica.subspace import MinorSubspace
from tests.support import models
from tests.support.quantised_models import dequantised
from tests.support.tiny_cli import tiny_llama

EVERY_KIND = "wte,c_attn,c_proj,c_fc"  # of GPT-2: an embedding, and Conv1D both taller and wider
NUMBERS = ("sigma_max", "sigma_above", "sigma_largest", "sigma_smallest", "gap", "energy_share")


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    models.tiny_gpt2().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command; returns (status, JSON or None, captured)."""

    def run(model, *options):
        file = tmp_path / "table.json"
        status = main(["inspect", str(model), "--rank", "4", "--json", str(file), *map(str, options)])
        return status, json.loads(file.read_text()) if file.is_file() else None, capsys.readouterr()

    return run


def check_numbers(row, weight, rank, rel):
    """Those of a row against the whole fp64 SVD of the weight, (out_features, in_features)."""
    values = torch.linalg.svdvals(weight.double())
    above = values[-rank - 1].item() if rank < len(values) else None
    largest, share = values[-rank].item(), values[-rank:].square().sum() / values.square().sum()
    gap = None if above is None else above / largest
    expected = (values[0].item(), above, largest, values[-1].item(), gap, share.item())
    for number, value in zip(NUMBERS, expected, strict=True):
        assert row[number] == (value if value is None else pytest.approx(value, rel=rel)), number


@pytest.mark.parametrize(
    ("dtype", "rank"), [("float32", 4), ("bfloat16", 4), ("float32", 1), ("float32", 16)]
)
def test_rows_are_those_of_the_svd(dtype, rank, gpt2_dir, run):
    status, table, _ = run(gpt2_dir, "--target-modules", EVERY_KIND, "--dtype", dtype, "--rank", rank)
    assert status == 0
    assert (table["rank"], table["dtype"], table["layers_found"]) == (rank, dtype, 9)
    model = AutoModelForCausalLM.from_pretrained(gpt2_dir, dtype=getattr(torch, dtype))
    for row in table["layers"]:
        weight = model.get_submodule(row["name"]).weight.T  # both kinds are kept transposed
        assert row["shape"] == list(weight.shape)
        assert (row["dtype"], row["reason"], row["proven"]) == (dtype, None, True)
        check_numbers(row, weight, rank, rel=1e-5)
        assert 0 <= row["energy_excess"] <= 1e-5
    assert {row["kind"] for row in table["layers"]} == {"Embedding", "Conv1D"}
    assert table["layers_proven"] == 9
    assert table["worst_energy_excess"] == max(row["energy_excess"] for row in table["layers"])


def test_table_says_what_the_json_says(model_dir, run):
    modules = "q_proj,input_layernorm,embed_tokens"
    status, table, captured = run(model_dir, "--layers", "--target-modules", modules)
    assert status == 0
    lines = captured.out.splitlines()
    assert str(model_dir) in lines[0]
    assert lines[1].split()[4:9] == ["dtype", "sigma_max", "sigma_5", "sigma_4", "sigma_1"]
    assert len(lines) == 3 + len(table["layers"]) == 8
    unsuitable = [row for row in table["layers"] if row["reason"]]
    assert [row["kind"] for row in unsuitable] == ["LlamaRMSNorm"] * 2
    for line, row in zip(lines[2:], table["layers"], strict=False):
        name, *cells = re.split("  +", line)
        assert name == row["name"]
        if row["reason"]:
            assert cells == ["-", "float32", f"cannot be adapted: {row['reason']}"]
            assert all(row[number] is None for number in (*NUMBERS, "method", "proven", "energy_excess"))
            continue
        assert cells[:2] == [f"{row['shape'][0]} x {row['shape'][1]}", "float32"]
        assert list(map(float, cells[2:7])) == pytest.approx([row[name] for name in NUMBERS[:5]], rel=1e-3)
        assert float(cells[7].removesuffix("%")) == pytest.approx(100 * row["energy_share"], rel=0.06)
        assert cells[8:10] == [row["method"], f"proven, {row['energy_excess']:.1e}"]
        assert float(cells[10]) == pytest.approx(row["seconds"], abs=0.006)
    aligned = [line for line in lines[1:-1] if "cannot" not in line]
    assert len({len(line) for line in aligned}) == 1
    assert lines[-1].startswith("5 layers in ")
    assert "3 proven" in lines[-1]
    assert "2 cannot be adapted" in lines[-1]


def test_a_line_for_each_kind_has_its_medians_and_worst(tmp_path, run):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    status, table, captured = run(tmp_path / "model")
    assert status == 0
    lines = captured.out.splitlines()
    assert lines[1].endswith("; --layers: each layer")
    header = ["dtype", "sigma_max", "sigma_5", "sigma_4", "sigma_1", "gap", "min gap", "energy", "max energy"]
    assert re.split("  +", lines[2])[3:-2] == header
    by_kind = {}
    for row in table["layers"]:
        by_kind.setdefault(row["name"].rpartition(".")[2], []).append(row)
    assert len(table["layers"]) == 7 * len(by_kind["q_proj"])
    assert len(lines) == 3 + len(by_kind) + 1
    assert len({len(line) for line in lines[2:-1]}) == 1
    for line, (kind, rows) in zip(lines[3:-1], by_kind.items(), strict=True):
        name, count, shape, dtype, *numbers, proven, excess = re.split("  +", line)
        assert (name, int(count), dtype) == (kind, len(rows), "float32")
        assert shape == f"{rows[0]['shape'][0]} x {rows[0]['shape'][1]}"
        expected = [statistics.median(row[number] for row in rows) for number in NUMBERS]
        expected.insert(5, min(row["gap"] for row in rows))
        expected.append(max(row["energy_share"] for row in rows))
        shown = [float(number.removesuffix("%")) / (100 if "%" in number else 1) for number in numbers]
        assert shown[:6] == pytest.approx(expected[:6], rel=1e-3)
        assert shown[6:] == pytest.approx(expected[6:], rel=0.06)
        assert proven == f"{len(rows)} of {len(rows)}"
        assert excess == f"{max(row['energy_excess'] for row in rows):.1e}"


def test_a_layer_that_cannot_be_adapted_has_a_line_of_its_own(tmp_path, run):
    model = tiny_llama(num_hidden_layers=3)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    status, table, captured = run(tmp_path / "model")
    assert status == 0
    assert [row["name"] for row in table["layers"] if row["reason"]] == ["model.layers.2.mlp.up_proj"]
    assert (table["layers_proven"], table["layers_unsuitable"]) == (20, 1)
    lines = [re.split("  +", line)[:2] for line in captured.out.splitlines() if line.startswith("up_proj")]
    assert lines == [["up_proj", "2"], ["up_proj", "1"]]
    assert " (model.layers.2.mlp.up_proj)\n" in captured.out


def test_lines_appear_as_layers_are_measured(model_dir, capsys, monkeypatch):
    seen, measure = [], spectra.measure

    def spying(*arguments, **options):
        seen.append(len(capsys.readouterr().out.splitlines()))
        return measure(*arguments, **options)

    monkeypatch.setattr(spectra, "measure", spying)
    assert (
        main(["inspect", str(model_dir), "--rank", "4", "--target-modules", "q_proj,k_proj", "--layers"]) == 0
    )
    assert seen == [2, 1, 1, 1]


# Layers that cannot be adapted, and results that are not proven


def test_nf4_checkpoint_can_be_adapted(model_dir, tmp_path, run):
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=nf4)
    model.save_pretrained(tmp_path / "model")
    status, table, captured = run(tmp_path / "model", "--plot", tmp_path / "plot.png")
    assert (status, table["layers_proven"], table["layers_unsuitable"]) == (0, 14, 0)
    kinds = {(row["kind"], row["quantised"]) for row in table["layers"]}
    assert kinds == {("Linear4bit", "bitsandbytes 4-bit")}
    assert captured.out.count("  bitsandbytes 4-bit, dequantised\n") == 7
    (row,) = [row for row in table["layers"] if row["name"] == "model.layers.1.mlp.up_proj"]
    check_numbers(row, dequantised(model.model.layers[1].mlp.up_proj), 4, rel=1e-3)


def test_a_model_of_which_nothing_can_be_adapted(model_dir, run, tmp_path):
    plot = ["--plot", tmp_path / "plot.png"]
    status, table, captured = run(model_dir, "--target-modules", "input_layernorm", *plot)
    assert table["layers_unsuitable"] == table["layers_found"] == 2
    assert table["worst_energy_excess"] is None
    assert captured.out.count("cannot be adapted: ") == 1
    assert status == 2
    reason = "no layer can be adapted: model.layers.0.input_layernorm: a layer of type LlamaRMSNorm"
    assert error_of(captured) == f"mica inspect: error: {reason}"
    assert not (tmp_path / "plot.png").exists()


def test_what_is_not_proven_is_said(model_dir, run, monkeypatch):
    def solver(weight, rank):
        basis, values = torch.eye(len(weight), rank), torch.ones(rank)
        return MinorSubspace(basis, values, "svd", False, float("inf"), resolution=0.0)

    monkeypatch.setattr(spectra, "minor_subspace", solver)
    status, table, captured = run(model_dir, "--target-modules", "q_proj")
    assert status == 0
    assert "    0 of 2           -\n" in captured.out
    assert "\nnot proven: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj\n" in captured.out
    assert captured.out.endswith("0 proven (worst energy excess -), 2 not proven, 0 cannot be adapted\n")
    assert [(row["proven"], row["energy_excess"]) for row in table["layers"]] == [(False, None)] * 2
    _, _, captured = run(model_dir, "--target-modules", "q_proj", "--layers")
    assert captured.out.count("  not proven  ") == 2


# The plot


def test_plot_is_a_png(gpt2_dir, run, tmp_path):
    path = tmp_path / "plot.png"
    status, _, _ = run(gpt2_dir, "--target-modules", EVERY_KIND, "--plot", path)
    assert status == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plot.png", "table.json"]


def test_plot_shows_the_chosen_values_exactly(model_dir, run, tmp_path, monkeypatch):
    """Also where the rest comes from a Gram matrix, which resolves less."""
    shown = {}

    def figure(values, rank, model):
        shown.update(values)
        return SimpleNamespace(savefig=lambda path, format: path.write_bytes(b""))

    nines = torch.full((999,), 9.0).double()
    monkeypatch.setattr("mica.cli.plot.figure", figure)
    monkeypatch.setattr(spectra, "spectrum", lambda weight: nines[: min(weight.shape)].clone())
    _, table, _ = run(model_dir, "--plot", tmp_path / "plot.svg")
    for row in table["layers"]:
        values = shown[row["name"]]
        assert (values[-5], values[-4], values[-1]) == (9, row["sigma_largest"], row["sigma_smallest"])


# Refusals


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    monkeypatch.setattr("mica.cli.loading.load_model", lambda *_: pytest.fail("the model was loaded"))


def error_of(captured) -> str:
    assert "Traceback" not in captured.err
    line = captured.err.replace("\r", "\n").splitlines()[-1]
    assert line.startswith("mica inspect: error: ")
    return line


@pytest.mark.usefixtures("nothing_is_loaded")
def test_missing_matplotlib_is_reported_before_loading(model_dir, run, tmp_path, monkeypatch):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "mica.cli.plot", raising=False)
    monkeypatch.delattr("mica.cli.plot", raising=False)
    status, _, captured = run(model_dir, "--plot", tmp_path / "plot.png")
    assert status == 2
    assert 'pip install "mica-fast[plot]"' in error_of(captured)
    assert captured.err.count("\n") == 1


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("option", ["--plot", "--json"])
def test_bad_path_is_reported_before_loading(option, model_dir, capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    cases = [("folder.png", "not a file"), ("nowhere/x.png", "not a folder")]
    if option == "--plot":
        cases.append(("x.bmp", "must end in .png"))
    for name, message in cases:
        assert main(["inspect", str(model_dir), option, str(tmp_path / name)]) == 2
        error = error_of(capsys.readouterr())
        assert error.startswith(f"mica inspect: error: {option} {tmp_path / name}: ")
        assert message in error


def test_model_not_found(run):
    status, _, captured = run("./nowhere")
    assert (status, captured.err) == (2, "mica inspect: error: ./nowhere: no such file or folder\n")
