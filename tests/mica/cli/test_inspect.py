"""``mica inspect``: its table and JSON against the fp64 SVD of every weight, its reasons, its refusals."""

import json
import re
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from mica.cli import spectra
from mica.subspace import MinorSubspace
from tests.support import models
from tests.support.tables import rows
from tests.support.tiny_cli import mica, tiny_llama

EVERY_KIND = (
    "--target-modules wte,c_attn,c_proj,c_fc"  # of GPT-2: an embedding, and Conv1D both taller and wider
)
NUMBERS = ("sigma_above", "sigma_largest", "sigma_smallest", "gap", "energy_share")


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    models.tiny_gpt2().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command; returns (status, JSON, captured)."""

    def run(model, *options):
        file = tmp_path / "table.json"
        status = mica("inspect", model, "--rank 4 --json", file, *options)
        return status, json.loads(file.read_text()), capsys.readouterr()

    return run


def check_numbers(row, weight, rank, rel):
    """Those of a row against the whole fp64 SVD of the weight, (out_features, in_features)."""
    values = torch.linalg.svdvals(weight.double())
    above = values[-rank - 1].item() if rank < len(values) else None
    largest, share = values[-rank].item(), values[-rank:].square().sum() / values.square().sum()
    gap = None if above is None else above / largest
    expected = (above, largest, values[-1].item(), gap, share.item())
    for number, value in zip(NUMBERS, expected, strict=True):
        assert row[number] == (value if value is None else pytest.approx(value, rel=rel)), number


@pytest.mark.parametrize(
    ("dtype", "rank"), [("float32", 4), ("bfloat16", 4), ("float32", 1), ("float32", 16)]
)
def test_rows_are_those_of_the_svd(dtype, rank, gpt2_dir, run):
    status, table, _ = run(gpt2_dir, EVERY_KIND, f"--dtype {dtype} --rank {rank}")
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


def test_a_line_for_each_kind_has_its_medians_and_worst(tmp_path, run):
    tiny_llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    _, table, captured = run(tmp_path / "model")
    _, _, header, *lines, _, last = captured.out.splitlines()
    assert re.split("  +", header)[4:8] == ["sigma_5", "sigma_4", "sigma_1", "gap"]
    assert re.split("  +", header)[8:11] == ["min gap", "energy", "max energy"]
    by_kind = {}
    for row in table["layers"]:
        by_kind.setdefault(row["name"].rpartition(".")[2], []).append(row)
    assert len({len(line) for line in (header, *lines)}) == 1
    for line, (kind, layers) in zip(lines, by_kind.items(), strict=True):
        name, count, shape, dtype, *numbers, proven, excess = re.split("  +", line)
        assert (name, int(count), dtype, proven) == (kind, 3, "float32", "3 of 3")
        assert shape == f"{layers[0]['shape'][0]} x {layers[0]['shape'][1]}"
        expected = [statistics.median(row[number] for row in layers) for number in NUMBERS]
        expected.insert(4, min(row["gap"] for row in layers))
        expected += [max(row[number] for row in layers) for number in ("energy_share", "energy_excess")]
        shown = [float(number) for number in (*numbers, excess)]
        assert shown[:5] == pytest.approx(expected[:5], rel=1e-3)
        assert shown[5:] == pytest.approx(expected[5:], rel=0.06)
    assert last.endswith(": 21 proven, 0 not proven, 0 cannot be adapted")


def test_layers_that_cannot_be_adapted_are_named_with_the_reason(tmp_path, run):
    model = tiny_llama(num_hidden_layers=5)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.inf
    model.save_pretrained(tmp_path / "model")
    status, table, captured = run(tmp_path / "model", "--target-modules up_proj,input_layernorm")
    assert status == 0
    assert (table["layers_proven"], table["layers_unsuitable"]) == (4, 6)
    unsuitable = [row for row in table["layers"] if row["reason"]]
    assert all(row[number] is None for row in unsuitable for number in (*NUMBERS, "proven"))
    *_, row, first, second, _, _ = captured.out.splitlines()
    assert row.startswith("up_proj       4 ")
    norms = ", ".join(f"model.layers.{block}.input_layernorm" for block in range(3))
    said = [f"a layer of type LlamaRMSNorm ({norms} and 2 more)"]
    infinite = "weight must be finite, but got 1 NaN or infinite of 1536 entries"
    said.append(f"MiCA cannot be initialised from this layer: {infinite} (model.layers.2.mlp.up_proj)")
    assert [second, first] == [f"cannot be adapted: {reason}" for reason in said]


def test_a_model_of_which_nothing_can_be_adapted(model_dir, run):
    status, table, captured = run(model_dir, "--target-modules input_layernorm")
    assert table["layers_unsuitable"] == table["layers_found"] == 2
    assert table["worst_energy_excess"] is None
    assert captured.out.count("cannot be adapted: ") == 1
    assert status == 2
    reason = "no layer can be adapted: model.layers.0.input_layernorm: a layer of type LlamaRMSNorm"
    assert captured.err.endswith(f"mica inspect: error: {reason}\n")


def test_what_is_not_proven_is_said(model_dir, run, monkeypatch):
    def solver(weight, rank):
        basis, values = torch.eye(len(weight), rank), torch.ones(rank)
        return MinorSubspace(basis, values, "svd", False, float("inf"), resolution=0.0)

    monkeypatch.setattr(spectra, "minor_subspace", solver)
    status, table, captured = run(model_dir, "--target-modules q_proj")
    assert status == 0
    assert "  0 of 2           -\n" in captured.out
    assert "\nnot proven: model.layers.0.self_attn.q_proj, model.layers.1.self_attn.q_proj\n" in captured.out
    assert captured.out.endswith(": 0 proven, 2 not proven, 0 cannot be adapted\n")
    assert [(row["proven"], row["energy_excess"]) for row in table["layers"]] == [(False, None)] * 2


# Refusals, before the model is loaded


@pytest.mark.parametrize(
    ("options", "message"),
    rows("""
--json folder => --json folder: is there already: choose another name, or remove it
--json nowhere/x.json => --json nowhere/x.json: nowhere is not a folder
--rank 100000 => --rank 100000: too large for every layer: at most 32 fits
--target-modules q_prj => --target-modules q_prj: no layer of the model is called 'q_prj'; did you mean
"""),
)
def test_a_mistake_is_one_line(options, message, model_dir, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("mica.cli.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert mica("inspect", model_dir, options) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"mica inspect: error: {message}")
    assert captured.err.count("\n") == 1
