"""Files that are written whole; what else the commands print is tested with them."""

import pytest

from mica.cli import output
from mica.errors import UsageError


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.json"
    path.write_text("old")

    def full_disk(scratch):
        scratch.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match=r"--json .*table.json: cannot be written: No space"):
        output.write_file("--json", path, full_disk)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
