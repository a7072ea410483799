"""The bounds are bounds, the subspaces orthonormal, and convergence is reported as it is."""

import pytest
import torch

from mica.subspace import krylov
from mica.subspace.batched import BatchGram
from mica.subspace.host import HostGram
from tests.support.spectra import NULL, RANK, SPECTRA, weight
from tests.support.tolerances import error

SHAPES = [(1, 1), (3, 2), (90, 40), (60, 60), (150, 140), (330, 300)]
EPS = torch.finfo(torch.float32).eps
# Spectra that fit the small matrices' few steps.
CONVERGING = ["gaussian", "hard edge", "row scales", "times 1e4", "times 1e-4"]


def dense(tall: torch.Tensor) -> torch.Tensor:
    return tall.double().mT @ tall.double()


def deepest(matrix: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """‖C X − X H‖."""
    return torch.linalg.matrix_norm(matrix @ vectors - vectors @ (vectors.mT @ matrix @ vectors))


@pytest.mark.parametrize("steps", [krylov.NORM_STEPS, krylov.LANCZOS_STEPS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds(name, shape, steps):
    tall = weight(name, *shape)
    gram, values = HostGram(tall), torch.linalg.eigvalsh(dense(tall))
    limits = krylov.bounds(gram, 0, steps)
    norm = values[-1]
    assert 0.75 * norm <= limits.norm <= (1 + 1e-12) * norm
    assert 0.75 * norm <= krylov.norm(gram, 0) <= (1 + 1e-12) * norm
    floor = krylov.resolution(gram.size, limits.norm)
    assert len(limits.shifts) == 3
    assert all(shift == -floor or shift > 16 * floor for shift in limits.shifts)
    assert limits.shifts[-1] == -floor
    if norm > 0:
        assert gram.factor(limits.shifts[-1])


@pytest.mark.parametrize("name", sorted(SPECTRA.keys() - NULL - {"flat", "tail x 1e-6", "hard edge"}))
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_the_first_shift_is_below_the_spectrum_and_near_it(name, shape):
    tall = weight(name, *shape)
    gram, values = HostGram(tall), torch.linalg.eigvalsh(dense(tall))
    shift = krylov.bounds(gram, 0).shifts[0]
    assert shift < values[0]
    assert gram.factor(shift)
    if name in ("gaussian", "times 1e4", "times 1e-4") and shape == (90, 40):
        assert shift >= 0.9 * values[0]


@pytest.mark.parametrize("kind", [HostGram, lambda tall: BatchGram(tall[None])], ids=["host", "batch"])
def test_lanczos_goes_on_only_where_the_spectrum_begins_above_zero(kind, monkeypatch):
    steps = []
    apply = HostGram.apply, BatchGram.apply
    for owner, plain in zip((HostGram, BatchGram), apply, strict=True):
        monkeypatch.setattr(
            owner, "apply", lambda gram, vectors, plain=plain: steps.append(1) or plain(gram, vectors)
        )
    for name, shape, expected in (
        ("gaussian", (300, 300), krylov.NORM_STEPS),
        ("graded to 1e-7", (330, 300), krylov.NORM_STEPS),
        ("gaussian", (600, 300), krylov.LANCZOS_STEPS),
        ("flat", (330, 300), krylov.LANCZOS_STEPS),
    ):
        steps.clear()
        krylov.bounds(kind(weight(name, *shape)), 0)
        assert len(steps) == expected, name


def test_one_matrix_with_an_edge_keeps_lanczos_going_for_its_batch():
    weights = torch.stack([weight(name, 600, 300) for name in ("hard edge", "gaussian")])
    shifts = krylov.bounds(BatchGram(weights), 0).shifts[0]
    assert shifts[0] < 1e-4
    assert shifts[1] == pytest.approx(krylov.bounds(HostGram(weights[1]), 0).shifts[0].item(), rel=1e-6)


def test_the_shifts_go_down_to_zero():
    gram = HostGram(weight("gaussian", 330, 300))
    first, second, last = krylov.bounds(gram, 0).shifts
    assert last <= second <= first
    gram = HostGram(weight("flat", 330, 300))
    assert krylov.bounds(gram, 0).shifts[0] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", [HostGram, lambda tall: BatchGram(tall[None])], ids=["host", "batch"])
@pytest.mark.parametrize("columns", [1, 2, 10, 37])
@pytest.mark.parametrize("filling", ["gaussian", "integers", "identity"])
def test_a_basis_is_orthonormal_where_the_space_is_exhausted(kind, columns, filling):
    """Zero columns keep the rounding errors inside the space; ‖C‖ came out 180 times too large."""
    tall = torch.zeros(140, 100)
    if filling == "identity":
        tall[:columns, :columns] = torch.eye(columns)
    else:
        tall[:, :columns] = weight("gaussian" if filling == "gaussian" else "rank 5", 140, columns)
    gram, exact = kind(tall), dense(tall)
    for width, steps in ((1, 40), (16, 6)):
        start = krylov.random_block(gram, width, 0)
        basis, projected = krylov.block_lanczos(gram, gram.apply, start, steps)
        basis, projected = basis.reshape(100, -1), projected.reshape(width * steps, -1)
        assert error(basis.T @ basis, torch.eye(width * steps, dtype=torch.float64)) <= 1e-13
        assert torch.equal(basis[:, :width], start.reshape(100, width))
        expected = basis.T @ exact @ basis
        assert error(projected.tril(), expected.tril()) <= 1e-13
        norm = torch.linalg.matrix_norm(exact, 2).item()
        assert torch.linalg.eigvalsh(projected)[-1].item() == pytest.approx(norm, rel=1e-9)
    exhausted = columns < krylov.NORM_STEPS
    for estimate in (krylov.bounds(gram, 0).norm.item(), krylov.norm(gram, 0).item()):
        assert (1 - 1e-9 if exhausted else 0.75) * norm <= estimate <= (1 + 1e-9) * norm


def test_the_norm_of_each_of_a_batch_and_of_zero():
    weights = torch.stack([weight("gaussian", 60, 40), weight("rank 5", 60, 40), torch.zeros(60, 40)])
    norms = krylov.norm(BatchGram(weights), 0)
    assert norms.shape == (3,)
    assert norms[2] == 0
    for matrix, batched in zip(weights, norms, strict=True):
        assert krylov.norm(HostGram(matrix), 0).item() == pytest.approx(batched.item(), rel=1e-9)


def test_a_basis_holds_the_powers():
    tall = weight("gaussian", 140, 100)
    gram, exact = HostGram(tall), dense(tall)
    seen = []

    def judge(basis, projected):
        seen.append((basis.shape, projected.shape))
        return 2

    basis, _ = krylov.block_lanczos(gram, gram.apply, krylov.random_block(gram, 4, 0), 6, 2, judge)
    power = krylov.random_block(gram, 4, 0)
    for step in range(6):
        part = basis[:, : 4 * (step + 1)]
        assert error(part @ (part.T @ power), power) <= 1e-10
        power = torch.linalg.qr(exact @ power).Q
    # after 2 steps, then every second one
    assert seen == [((100, 4 * count), (4 * count, 4 * count)) for count in (2, 4, 6)]


@pytest.mark.parametrize("further", [0, 1, 9])
def test_the_judge_ends_it_and_has_the_last_word(further):
    gram, calls = HostGram(weight("gaussian", 140, 100)), []

    def judge(basis, projected):
        calls.append(basis.shape[1])
        return further

    krylov.block_lanczos(gram, gram.apply, krylov.random_block(gram, 3, 0), 5, 2, judge)
    assert calls == {0: [6], 1: [6, 9, 12, 15], 9: [6, 15]}[further]


@pytest.mark.parametrize("shape", [(150, 140), (150, 150), (330, 300)], ids=str)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("eps", [EPS, torch.finfo(torch.float64).eps])
def test_converged_means_small_residuals(name, shape, eps):
    tall = weight(name, *shape)
    gram, exact = HostGram(tall), dense(tall)
    limits = krylov.bounds(gram, 0)
    ritz = krylov.smallest_eigenvectors(gram, RANK, limits, eps, 0)
    if name == "zero":
        assert ritz is None
        return
    vectors = ritz.vectors
    assert vectors.shape == (gram.size, RANK)
    assert error(vectors.T @ vectors, torch.eye(RANK, dtype=torch.float64)) <= 1e-13
    values = torch.linalg.eigvalsh(exact)
    floor = krylov.resolution(gram.size, values[-1])
    ritz_values = (vectors.T @ exact @ vectors).diagonal()
    energy = values[:RANK].clamp_min(0).sum() + RANK * floor
    allowed = min(1e-6 * energy / RANK**0.5, 0.5 * eps * (values[-1] * (values[RANK - 1] + floor)).sqrt())
    residual = deepest(exact, vectors)
    if ritz.converged:
        assert residual <= max(1.02 * allowed, 1.1 * floor)
        assert (ritz_values.diff() >= -1e-6 * energy - floor).all()  # ascending
    else:
        assert residual >= 0.98 * max(allowed, 0.75 * floor) - 0.3 * floor
    if name in CONVERGING and eps == EPS and shape[0] > 149:
        assert ritz.converged


def test_no_convergence_in_one_step_is_admitted(monkeypatch):
    monkeypatch.setattr(krylov, "MOST_STEPS", 1)
    gram = HostGram(weight("gaussian", 150, 140))
    assert not krylov.smallest_eigenvectors(gram, RANK, krylov.bounds(gram, 0), EPS, 0).converged


def test_the_space_is_never_more_than_whole(monkeypatch):
    gram, widths = HostGram(weight("gaussian", 60, 50)), []
    extended = krylov.block_lanczos

    def recorded(gram, operation, block, steps, *rest):
        widths.append(block.shape[1] * steps)
        return extended(gram, operation, block, steps, *rest)

    monkeypatch.setattr(krylov, "block_lanczos", recorded)
    for rank in (1, 8, 20):
        krylov.smallest_eigenvectors(gram, rank, krylov.bounds(gram, 0), 1e-300, 0)
    assert max(widths) <= 50


@pytest.mark.parametrize("guesses", [(0.5, 1.5, 0.9), (1.5, 0.5, 0.0), (1.5, 1.2, 0.8)], ids=str)
def test_a_shift_that_is_too_high_is_lowered(guesses, monkeypatch):
    """Shifts in units of the smallest eigenvalue."""
    tall = weight("gaussian", 200, 140)
    gram, (values, vectors) = HostGram(tall), torch.linalg.eigh(dense(tall))
    limits = krylov.Bounds(values[-1], tuple(guess * values[0] for guess in guesses))
    tried, factor = [], gram.factor
    monkeypatch.setattr(gram, "factor", lambda shift: tried.append(shift.item()) or factor(shift))
    ritz = krylov.smallest_eigenvectors(gram, RANK, limits, EPS, 0)
    assert ritz.converged
    assert error(ritz.vectors @ ritz.vectors.T, vectors[:, :RANK] @ vectors[:, :RANK].T) <= 1e-4
    first_good = next(index for index, guess in enumerate(guesses) if guess < 1)
    assert tried == [shift.item() for shift in limits.shifts[: first_good + 1]]


def test_nothing_is_found_without_a_factor():
    tall = weight("gaussian", 200, 140)
    values = torch.linalg.eigvalsh(dense(tall))
    limits = krylov.Bounds(values[-1], (2 * values[0], 1.5 * values[0], 1.1 * values[0]))
    assert krylov.smallest_eigenvectors(HostGram(tall), RANK, limits, EPS, 0) is None


def test_in_a_batch_only_those_are_lowered_that_have_to_be(monkeypatch):
    tall = torch.stack([weight("gaussian", 200, 140), weight("gaussian", 200, 140).flip(0) * 3])
    tall[1] *= torch.linspace(1, 2, 140)
    gram, (values, vectors) = BatchGram(tall), torch.linalg.eigh(dense(tall))
    least = values[:, 0]
    limits = krylov.Bounds(values[:, -1], (least * torch.tensor([1.5, 0.9]), least * 0.8, least * 0))
    tried, factor = [], gram.factor
    monkeypatch.setattr(gram, "factor", lambda shift: tried.append(shift / least) or factor(shift))
    ritz = krylov.smallest_eigenvectors(gram, RANK, limits, EPS, 0)
    assert ritz.converged
    torch.testing.assert_close(torch.stack(tried), torch.tensor([[1.5, 0.9], [0.8, 0.9]]).double())
    exact_vectors = vectors[..., :RANK]
    assert error(ritz.vectors @ ritz.vectors.mT, exact_vectors @ exact_vectors.mT) <= 1e-4


def test_a_batch_has_converged_when_its_last_matrix_has():
    tall = torch.stack([weight("gaussian", 200, 140), weight("hard edge", 200, 140)])
    excess = []
    for index in range(2):
        gram = HostGram(tall[index])
        vectors = krylov.random_block(gram, RANK, 0)
        excess.append(krylov.relative_residual(gram, vectors, krylov.bounds(gram, 0).norm, EPS))
    gram = BatchGram(tall)
    vectors = krylov.random_block(gram, RANK, 0)
    assert krylov.relative_residual(gram, vectors, krylov.bounds(gram, 0).norm, EPS) == pytest.approx(
        max(excess)
    )


@pytest.mark.parametrize("name", ["zero", "rank 5", "rank deficient by most", "identity"])
@pytest.mark.parametrize("size", [1, 2, 40, 140])
def test_breakdown(name, size):
    """Invariant subspaces, exhausted spaces: orthonormal numbers, or nothing."""
    tall = torch.eye(size) if name == "identity" else weight(name, size, size)
    for gram in (HostGram(tall), BatchGram(torch.stack([tall, tall]))):
        limits = krylov.bounds(gram, 0)
        assert torch.isfinite(limits.norm).all()
        rank = min(RANK, size)
        ritz = krylov.smallest_eigenvectors(gram, rank, limits, EPS, 0)
        if ritz is not None:
            unit = torch.eye(rank, dtype=torch.float64)
            assert (ritz.vectors.mT @ ritz.vectors - unit).abs().max() <= 1e-12
        if name == "identity" and size == 140:
            assert ritz.converged


@pytest.mark.parametrize(
    ("rank", "width", "room"),
    [(1, 16, 320), (8, 16, 320), (9, 17, 340), (16, 24, 480), (32, 40, 800), (33, 29, 580), (128, 86, 1720)],
)
def test_block_sizes_and_where_they_fit(rank, width, room, monkeypatch):
    monkeypatch.setattr(krylov, "FIRST_CHECK", 7)
    assert krylov.block_size(rank) == width
    assert krylov.fits(room, rank)
    assert not krylov.fits(room - 1, rank)


def test_blocks_hold_the_smallest():
    assert all(krylov.block_size(rank) >= rank for rank in range(1, 33))


def test_random_blocks_are_the_same_everywhere():
    tall = weight("gaussian", 60, 50)
    host, batch = HostGram(tall), BatchGram(torch.stack([tall, 2 * tall]))
    block = krylov.random_block(host, 5, 3)
    assert error(block.T @ block, torch.eye(5, dtype=torch.float64)) <= 1e-14
    for each in krylov.random_block(batch, 5, 3):
        assert error(each, block) <= 1e-14
    assert error(krylov.random_block(host, 5, 4), block) > 0.5


def test_largest_eigenvectors_read_the_lower_triangle():
    matrices = dense(torch.stack([weight("gaussian", 60, 20), weight("row scales", 60, 20)]))
    values = torch.linalg.eigvalsh(matrices)
    lower = matrices.tril() + torch.full_like(matrices, 1e9).triu(1)
    vectors = krylov._largest_eigenvectors(lower, 4)
    assert vectors.shape == (2, 20, 4)
    expected = torch.diag_embed(values.flip(-1)[:, :4])
    assert error(vectors.mT @ matrices @ vectors, expected) <= 1e-13
    assert error(krylov._largest_eigenvectors(lower[1], 4), vectors[1]) == 0
