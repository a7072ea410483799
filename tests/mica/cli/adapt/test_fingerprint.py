"""The same model has the same fingerprint wherever it lies, another one does not, and little is read."""

import json
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from mica.cli.adapt import fingerprint
from tests.support.tiny_cli import tiny_llama


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "copy")


def test_a_copy_is_the_same(model_dir, copy):
    (copy / "model.safetensors").touch()
    (copy / "adapter_model.safetensors").write_bytes(b"no part of the model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(
        json.dumps(config | {"transformers_version": "4.0", "_name_or_path": "x"})
    )
    assert fingerprint.of(str(copy)) == fingerprint.of(str(model_dir))
    assert fingerprint.facts(str(copy)) == {"base_weights": fingerprint.of(str(copy))}


def test_every_tensor_and_the_configuration_count(copy):
    found = {fingerprint.of(str(copy))}
    weights = load_file(copy / "model.safetensors")
    for name, weight in weights.items():
        save_file({**weights, name: weight + 1}, copy / "model.safetensors")
        found.add(fingerprint.of(str(copy)))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    found.add(fingerprint.of(str(copy)))
    assert len(found) == 1 + len(weights) + 1


def test_shards(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    before = fingerprint.of(str(tmp_path))
    weights = load_file(shards[-1])
    save_file({name: weight + 1 for name, weight in weights.items()}, shards[-1])
    assert len(shards) > 1
    assert before != fingerprint.of(str(tmp_path)) is not None
    shards[-1].unlink()
    assert fingerprint.of(str(tmp_path)) is None


def test_a_name_on_the_hub_is_its_copy_in_the_cache(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert fingerprint.of("owner/name") is None
    folder = tmp_path / "models--owner--name"
    shutil.copytree(model_dir, folder / "snapshots" / "0a1b")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0a1b")
    assert fingerprint.of("owner/name") == fingerprint.of(str(model_dir))


@pytest.mark.parametrize("contents", [None, b"", b"\xff" * 9, b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_no_checkpoint_has_none(contents, model_dir, tmp_path):
    if contents is not None:
        shutil.copy(model_dir / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes(contents)
    assert fingerprint.of(str(tmp_path)) is None
    assert fingerprint.facts("") == {}


def test_little_of_100_gb_is_read(tmp_path, monkeypatch):
    size, number = 100 * 10**6, 1000
    header = json.dumps(
        {
            f"layer.{n}": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [n * size, (n + 1) * size]}
            for n in range(number)
        }
    ).encode()
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size * number)  # a hole, which takes no space
    read, pieces = [], fingerprint._pieces
    monkeypatch.setattr(fingerprint, "_pieces", lambda *args: read.extend(pieces(*args)) or read[-2:])
    assert fingerprint.of(str(tmp_path)) is not None
    assert sum(map(len, read)) == number * 2 * fingerprint.PIECE < 10**7
