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
