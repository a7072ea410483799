"""The same model has the same fingerprint wherever it lies, another one does not, and little is read."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from mica.cli.adapt import fingerprint
from tests.support.adapt_runs import edit_json
from tests.support.tiny_cli import tiny_llama


def of(folder) -> str | None:
    return fingerprint.of(str(folder))


def change_weight(path, name: str) -> None:
    weights = load_file(path)
    save_file({**weights, name: weights[name] + 1}, path)


def test_a_copy_is_the_same_and_every_change_another(model_dir, tmp_path):
    copy = shutil.copytree(model_dir, tmp_path / "copy")
    (copy / "model.safetensors").touch()
    (copy / "adapter_model.safetensors").write_bytes(b"no part of the model")
    edit_json(copy / "config.json", transformers_version="4.0", _name_or_path="x")
    assert of(copy) == of(model_dir)
    found, names = {of(copy)}, load_file(copy / "model.safetensors")
    for name in names:
        change_weight(copy / "model.safetensors", name)
        found.add(of(copy))
    edit_json(copy / "config.json", rms_norm_eps=0.1)
    assert len(found | {of(copy)}) == 1 + len(names) + 1


def test_shards(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    before = of(tmp_path)
    change_weight(shards[-1], next(iter(load_file(shards[-1]))))
    assert before != of(tmp_path) is not None
    shards[-1].unlink()
    assert of(tmp_path) is None


def test_a_name_on_the_hub_is_its_copy_in_the_cache(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert of("owner/name") is None
    folder = tmp_path / "models--owner--name"
    shutil.copytree(model_dir, folder / "snapshots" / "0a1b")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0a1b")
    assert of("owner/name") == of(model_dir)


@pytest.mark.parametrize("contents", [None, b"", b"\xff" * 9, b"\x02" + b"\0" * 7 + b"[]"])
def test_what_is_no_checkpoint_has_none(contents, model_dir, tmp_path):
    if contents is not None:
        shutil.copy(model_dir / "config.json", tmp_path)
        (tmp_path / "model.safetensors").write_bytes(contents)
    assert of(tmp_path) is None
    assert of("") is None
