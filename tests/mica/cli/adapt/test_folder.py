"""What may be in the output folder, and what a run may remove from it."""

import pytest

from mica.cli.adapt import folder
from mica.errors import UsageError


def check(output, *, resume=False, overwrite=False, **inputs):
    inputs = {"--model": ["hub/model"], **{f"--{name}": [str(given)] for name, given in inputs.items()}}
    folder.check(output, resume=resume, overwrite=overwrite, inputs=inputs)


@pytest.mark.parametrize(
    ("name", "contents", "harmless"),
    [
        (".lock", "", True),
        (".run.yaml.123", "", True),  # killed while it was written
        (".base.partial/model", "", True),
        ("base/README.md", f"{folder.CONVERTED}\n", True),
        ("base/README.md", "My model", False),
        ("base/model.safetensors", "", False),
        ("notes.txt", "", False),
    ],
)
def test_what_may_be_there(tmp_path, name, contents, harmless):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(contents)
    if harmless:
        check(tmp_path)
    else:
        with pytest.raises(UsageError, match="is not empty"):
            check(tmp_path)
    check(tmp_path, resume=True)
    check(tmp_path, overwrite=True)


def test_overwrite_removes_nothing_that_the_run_reads(tmp_path):
    for name in ("base", "checkpoint-5", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "merged")
    (tmp_path / "merged").mkdir()
    for option, given in (("model", "base"), ("adapter", "checkpoint-5/x"), ("text", "link/a.txt")):
        with pytest.raises(UsageError) as raised:
            check(tmp_path, overwrite=True, **{option: tmp_path / given})
        assert str(raised.value) == (
            f"--{option} {tmp_path / given}: --overwrite would remove it from --output {tmp_path}"
        )
        check(tmp_path, resume=True, **{option: tmp_path / given})
    check(tmp_path, overwrite=True, text=tmp_path / "mine")


def test_a_folder_that_was_there_stays(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link", "new"):
        with folder.held(tmp_path / name):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]
