"""A user's setting for fp32 products does not reach the solver's, and is there again afterwards."""

import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mica.subspace.batched import BatchGram
from mica.subspace.precision import full_fp32

get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
SETTINGS = [(backend, what) for backend in ("cuda", "mkldnn") for what in ("all", "matmul")]
SETTINGS = [("generic", "all"), *SETTINGS]
WAYS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cuda": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "cuda's all": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "all, bf16": lambda: setattr(torch.backends, "fp32_precision", "bf16"),
    "each": lambda: [put(*setting, "tf32") for setting in SETTINGS],
    "none": lambda: None,
}


def reset():
    """As in a new process, but for a word: "ieee" where the older switch has been used."""
    torch.set_float32_matmul_precision("highest")
    for setting in SETTINGS:
        put(*setting, "none")


@pytest.fixture(autouse=True)
def _every_setting_is_reset():
    reset()
    yield
    reset()


def effective() -> list[str]:
    return [get(*setting) for setting in SETTINGS]


def own() -> list[list[str]]:
    """The settings without what they inherit: what is left as one after the other is taken away."""
    return [effective()] + [put(*setting, "none") or effective() for setting in SETTINGS]


class Watch(TorchDispatchMode):
    """The settings at each product of fp32 matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_product = function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm)
        if is_product and args[0].dtype == torch.float32:
            self.seen += effective()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
def test_products_are_whole_and_the_settings_stay(way):
    tall, unit = torch.randn(2, 600, 300), torch.eye(300, dtype=torch.float64)
    expected = BatchGram(tall, mixed=True)
    WAYS[way]()
    before = effective()
    with warnings.catch_warnings(), Watch() as watch:
        warnings.simplefilter("error")
        gram = BatchGram(tall, mixed=True)
    assert watch.seen
    assert not {"tf32", "bf16"} & set(watch.seen)
    assert torch.equal(gram.apply(unit), expected.apply(unit))
    assert torch.equal(gram.error, expected.error)
    assert effective() == before


@pytest.mark.parametrize("way", WAYS)
def test_a_setting_that_was_inherited_still_is(way):
    WAYS[way]()
    expected = own()
    reset()
    WAYS[way]()
    with full_fp32():
        assert not {"tf32", "bf16"} & set(effective())
    assert own() == expected


def test_an_error_leaves_the_settings_as_they_were():
    WAYS["medium"]()
    before = effective()
    with pytest.raises(ZeroDivisionError), full_fp32():
        raise ZeroDivisionError
    assert effective() == before


def test_one_thread_at_a_time():
    """Or the second would take the first one's settings for the user's, and leave them behind."""
    WAYS["high"]()
    before, inside = effective(), threading.Event()

    def enter():
        with full_fp32():
            inside.set()

    thread = threading.Thread(target=enter)
    with full_fp32():
        thread.start()
        assert not inside.wait(0.2)
    thread.join()
    assert inside.is_set()
    assert effective() == before
