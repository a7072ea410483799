"""What the processes tell each other, with threads in their place; test_processes.py has processes."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from mica.cli.adapt import processes
from mica.errors import UsageError
from tests.support.threads import Group


@pytest.fixture
def group(monkeypatch):
    group = Group()

    def state():
        return SimpleNamespace(
            num_processes=2, process_index=group.rank, is_main_process=group.rank == 0, device="cpu"
        )

    def broadcast(values):
        values[:] = group.gathered(values)[0]

    monkeypatch.setattr(processes, "PartialState", state)
    monkeypatch.setattr(processes, "gather_tensor", lambda tensor: torch.cat(group.gathered(tensor)))
    monkeypatch.setattr(processes, "gather_object", lambda values: [*chain(*group.gathered(values))])
    monkeypatch.setattr(processes, "broadcast_object_list", broadcast)
    return group


def test_values_of_all_and_of_the_main_process(group):
    assert group.run(lambda: processes.largest(group.rank * 7)) == [7, 7]
    assert group.run(lambda: processes.on_main(lambda: ["a", group.rank])) == [["a", 0]] * 2
    assert group.run(lambda: processes.alike("a", "folder")) == ["a", "a"]
    for error in group.run(lambda: processes.alike(group.rank, "folder")):
        assert isinstance(error, UsageError)
        assert str(error) == "folder: not the same in all processes"


@pytest.mark.parametrize("failing", [[0, 1], [0], [1]])
def test_an_error_of_the_user_is_the_main_process_s_to_print(group, failing):
    def fail():
        with processes.one_voice():
            if group.rank in failing:
                raise UsageError("--text x.csv: no")
            processes.on_main(print)

    first, second = group.run(fail)
    assert isinstance(first, UsageError)
    assert str(first) == "--text x.csv: no"
    assert isinstance(second, SystemExit)
    assert second.code == 2


@pytest.mark.parametrize("folders", [["shared", "shared"], ["own", "own"], ["shared", "own"]])
def test_an_output_folder_that_is_not_shared(group, folders, tmp_path):
    """A folder each, as on two machines: every process says so, and nothing is left."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").touch()
    for error in group.run(lambda: processes.check_shared(tmp_path / folders[group.rank])):
        if folders[0] == folders[1]:
            assert error is None
        else:
            assert str(error).startswith(f"--output {tmp_path / 'own'}: process 1 on ")
    assert [path.name for path in tmp_path.rglob("*")] == ["own", "notes.txt"]
