"""Memory that merges use again: whose it is, how much of it, and in which mode it may be written to."""

import threading

import pytest
import torch

from mica.fast.merge import scratch
from mica.fast.merge.scratch import convert, scratch_like

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _of_its_own(monkeypatch):
    """Other tests of this process have merged."""
    monkeypatch.setattr(scratch, "_held", scratch._Held())


def place(name, *shape, dtype=torch.float32):
    return scratch.scratch(name, torch.Size(shape), dtype, CPU).data_ptr()


def test_a_name_and_a_dtype_have_one_memory_whatever_the_shape():
    first = place("a", 30, 40)
    assert place("a", 40, 30) == place("a", 5, 7) == place("a", 30, 40) == first
    assert scratch.scratch("a", torch.Size((5, 7)), torch.float16, CPU).dtype == torch.float16
    assert place("a", 5, 7, dtype=torch.float16) != first
    assert place("b", 30, 40) != first


def test_memory_that_has_grown_stays():
    place("a", 3, 4)
    large = place("a", 300, 400)
    assert place("a", 3, 4) == large
    assert len(scratch._held.memory["a", torch.float32]) == 300 * 400


def test_threads_have_their_own():
    places = [place("a", 30, 40)]
    thread = threading.Thread(target=lambda: places.append(place("a", 30, 40)))
    thread.start()
    thread.join()
    assert places[0] != places[1]


def test_what_is_held_is_bounded():
    for columns in range(200, 0, -1):
        place("a", 3, columns)
    large = scratch.scratch("large", torch.Size((1, 2**21)), torch.float32, CPU)
    assert large.shape == (1, 2**21)
    assert scratch._held.memory.keys() == {("a", torch.float32)}


@pytest.mark.parametrize("made_before", [False, True])
def test_what_inference_mode_has_made_can_be_written_to_outside_of_it(made_before):
    if made_before:
        place("a", 2, 3)
    with torch.inference_mode():
        place("a", 3, 4)
    scratch.scratch("a", torch.Size((3, 4)), torch.float32, CPU).fill_(1.0)


def test_convert_gives_the_tensor_itself_where_nothing_is_to_be_done():
    tensor = torch.randn(3, 4)
    assert convert(tensor, torch.float32, "a") is tensor
    double = convert(tensor, torch.float64, "a")
    assert torch.equal(double, tensor.double())
    assert double.data_ptr() == place("a", 3, 4, dtype=torch.float64)
    assert scratch_like(tensor.t(), "a").is_contiguous()
