"""Gram matrices of a batch: which one failed, panels, and fp32 products that are whole and bounded."""

import math
import threading
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mica.subspace import batched
from mica.subspace.batched import BatchGram, DoubtfulError, full_fp32
from tests.support.judging import assert_orthonormal, dense, gram_of, random
from tests.support.spectra import stack
from tests.support.tolerances import error


def talls() -> torch.Tensor:
    return stack(["gaussian", "row scales", "times 1e-4"], (70, 30))


def test_a_factor_and_a_proof_say_which_matrix_failed():
    tall = talls()
    gram, (values, vectors) = BatchGram(tall), torch.linalg.eigh(gram_of(tall))
    for failing in ([0], [1], [2], [0, 2], [0, 1, 2]):
        good = torch.tensor([index not in failing for index in range(3)])
        share = torch.where(good, 0.9, 1.1)
        assert torch.equal(gram.factor(values[:, 0] * share), good)
        assert torch.equal(gram.exceeds(vectors[..., :3], 2 * values[:, -1], values[:, 3] * share), good)
    assert gram.factor(values[:, 0] * 0.9).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gaussian", "hard edge", "row scales", "graded to 1e-7", "rank 5"])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e12, 1e-30])
def test_the_error_bound_of_mixed_products(name, dtype, scale):
    """Above the exact norm and below 20 times it; with underflow, the norm of the whole matrix."""
    tall = (stack([name, "gaussian"], (900, 80)).double() * scale).to(dtype)
    gram, exact = BatchGram(tall, mixed=True), gram_of(tall)
    norms = torch.linalg.matrix_norm(exact - dense(gram), 2)
    assert gram.error.dtype == torch.float64
    assert (gram.error >= norms).all()
    assert (gram.error <= 20 * norms + 1e-14 * torch.linalg.matrix_norm(exact, 2)).all()


@pytest.mark.parametrize("spread", [1, 1e-3, 1e-9, 0])
def test_what_is_trusted_in_vain_is_known_when_numbers_are_read(spread):
    """And then as little of it as of the numbers; what is careful says so at once."""
    gram = BatchGram(talls())
    vectors = random(3, 30, 4)
    vectors[1, :, 3] = vectors[1, :, 0] + spread * vectors[1, :, 3]
    good = spread > 1e-6
    assert gram.orthonormal(vectors)[2]
    with nullcontext() if good else pytest.raises(DoubtfulError):
        assert torch.equal(*gram.read(vectors), vectors)
    assert torch.equal(*gram.read(vectors), vectors)  # it was said
    gram.careful = True
    basis, triangle, safe = gram.orthonormal(vectors)
    assert safe == good
    assert error(basis @ triangle, vectors) <= 1e-13
    assert gram.presume(lambda *both: torch.stack(both).sum() == 3, torch.ones(1), torch.full((1,), 2.0))
    assert not gram.presume(lambda one: one > 1, torch.ones(1))


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("least", [1, 1e-5, 1e-9, 0])
def test_the_svd_of_thin_matrices(least, careful):
    left, right = torch.linalg.qr(random(3, 70, 5)).Q, torch.linalg.qr(random(3, 5, 5)).Q
    values = torch.logspace(0, math.log10(least) if least else -3, 5, dtype=torch.float64)
    values[-1] *= least > 0
    basis, found, rotation = BatchGram(talls(), careful=careful).svd(left * values @ right)
    assert error(found, values.expand(3, 5)) <= 1e-14
    assert_orthonormal(basis)
    assert error(basis * found[:, None] @ rotation, left * values @ right) <= 1e-14


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_solutions_by_an_fp32_factor_are_corrected(scale, reset):
    """Whatever fp32's range and its setting for products are."""
    gram = BatchGram(talls()[::2, :, :10] * scale, mixed=True)
    values, right = torch.linalg.eigvalsh(dense(gram)), random(2, 10, 3)
    torch.set_float32_matmul_precision("medium")
    with Watch() as watch:
        assert gram.factor(0.9 * values[:, 0]).all()
        solution = gram.solve(right)
    unit = torch.eye(10, dtype=torch.float64)
    assert error(solution, torch.linalg.solve(dense(gram) - 0.9 * values[:, :1, None] * unit, right)) <= 1e-10
    assert watch.seen
    assert not REDUCED & set(watch.seen)
    assert not gram.factor(1.1 * values[:, 0]).any()


STRONG, WEAK = [(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)], [(6, 1), (7, 5), (8, 6), (8, 9), (10, 3), (12, 0)]


@pytest.mark.parametrize("capability", [*STRONG, *WEAK], ids=str)
def test_cuda_devices_with_weak_fp64(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert batched.has_weak_fp64(torch.device("cuda")) == (capability in WEAK)
    assert not batched.has_weak_fp64(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not batched.has_weak_fp64(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mixed_products_where_they_are_precise_and_finite(dtype, request):
    wide = torch.ones(2, 10, 20, dtype=dtype)
    assert not batched.may_be_mixed(wide)
    request.getfixturevalue("weak_fp64")
    assert batched.may_be_mixed(wide)
    assert batched.may_be_mixed(wide.mT)
    assert not batched.may_be_mixed(torch.ones(2, 11, 20, dtype=dtype))
    for sign in (1, -1):
        wide[1, 2, 3] = sign * 2.0**50
        assert batched.may_be_mixed(wide)
        assert torch.isfinite(BatchGram(wide.mT, mixed=True).error).all()
        wide[1, 2, 3] = sign * 2.0**51
        assert not batched.may_be_mixed(wide)
    assert math.isfinite(wide.double().square().sum())


# A user's setting for fp32 products does not reach the solver's, and is there again afterwards

get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
SETTINGS = [("generic", "all"), ("cuda", "all"), ("cuda", "matmul"), ("mkldnn", "all"), ("mkldnn", "matmul")]
REDUCED = {"tf32", "bf16"}
cuda, cudnn, onednn = torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn.matmul
WAYS = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(cuda, "allow_tf32", True),
    "cuda": lambda: setattr(cuda, "fp32_precision", "tf32"),
    "cuda's all": lambda: setattr(cudnn, "fp32_precision", "tf32"),
    "oneDNN": lambda: setattr(onednn, "fp32_precision", "bf16"),
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "each": lambda: [put(*setting, "tf32") for setting in SETTINGS],
}


@pytest.fixture
def reset():
    """As in a new process, but for a word: "ieee" where the older switch has been used."""

    def reset():
        torch.set_float32_matmul_precision("highest")
        for setting in SETTINGS:
            put(*setting, "none")

    reset()
    yield reset
    reset()


def effective() -> list[str]:
    return [get(*setting) for setting in SETTINGS]


def own() -> list[list[str]]:
    """The settings without what they inherit: what is left as one after the other is taken away."""
    return [effective()] + [put(*setting, "none") or effective() for setting in SETTINGS]


class Watch(TorchDispatchMode):
    """The settings at each product of fp32 matrices, and at each of their factors and inverses."""

    seen = ()
    aten = torch.ops.aten
    watched = (aten.mm, aten.bmm, aten.linalg_cholesky_ex, aten.linalg_solve_triangular)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in self.watched and args[0].dtype == torch.float32:
            self.seen += (*effective(),)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("error")
def test_products_are_whole_and_the_settings_stay(way, reset):
    """Those that were inherited still are."""
    tall = torch.randn(2, 600, 300)
    expected = BatchGram(tall, mixed=True)
    WAYS[way]()
    before = effective()
    with Watch() as watch:
        gram = BatchGram(tall, mixed=True)
    assert watch.seen
    assert not REDUCED & set(watch.seen)
    assert torch.equal(dense(gram), dense(expected))
    assert torch.equal(gram.error, expected.error)
    assert effective() == before

    owned = own()
    reset()
    WAYS[way]()
    with full_fp32():
        assert not REDUCED & set(effective())
    assert own() == owned


def test_an_error_leaves_the_settings_as_they_were_and_one_thread_is_inside_at_a_time(reset):
    """Or the second would take the first one's settings for the user's, and leave them behind."""
    WAYS["medium"]()
    before, inside = effective(), threading.Event()
    with pytest.raises(ZeroDivisionError), full_fp32():
        raise ZeroDivisionError
    assert effective() == before

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
