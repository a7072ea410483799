"""What is a regression, what is chance, and what cannot be compared; the text is in `tests.bench.golden`."""

import random

import pytest

from bench.report import compare
from bench.results.cell import Group, Timing
from bench.results.names import BARE, COPY, CUBLAS, FAST, STOCK, SVD
from bench.results.schema import Result

MACHINE = {"cpu": "A", "threads": 2, "torch": "2.9"}


def a_run(seed=0, rounds=9, noise=0.03, sleep=0.0, drift=1.0):
    """40 layers of 1 to 40 ms, mica.fast slower by ``sleep`` s; a round's load slows all implementations."""
    draw, result = random.Random(seed), Result(dict(MACHINE), [])
    for i in range(1, 41):
        loads = [drift * draw.uniform(1, 1.5) for _ in range(rounds)]
        group = Group(f"layer, {128 * i} tokens", {"tokens": 128 * i})
        for name, share in ((BARE, 1.0), (STOCK, 2.0), (FAST, 1.25)):
            seconds = 1e-3 * i * share + (sleep if name == FAST else 0)
            times = [seconds * load * draw.uniform(1 - noise, 1 + noise) for load in loads]
            group.timings[name] = Timing(times)
        result.groups.append(group)
    return result


@pytest.fixture
def status(tmp_path, capsys):
    """Exit status, stdout and stderr of the command on two runs."""

    def status(old, new, *options):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, run in zip(paths, (old, new), strict=True):
            if run is not None:
                run.save(path) if isinstance(run, Result) else path.write_text(run)
        code = compare.main([*map(str, paths), *options])
        return code, *capsys.readouterr()

    return status


@pytest.mark.parametrize(("rounds", "noise"), [(3, 0.01), (5, 0.02), (9, 0.03)])
def test_noise_is_no_regression_nor_is_a_machine_that_slowed_down(rounds, noise, status):
    for seed in range(1, 6):
        code, out, _ = status(a_run(0, rounds, noise), a_run(seed, rounds, noise, drift=1.7))
        assert code == 0, out


def test_a_slower_path_is_caught_where_it_matters_and_worst_first(status):
    code, out, _ = status(a_run(), a_run(1, sleep=0.5e-3))
    assert code == 1
    rows = [row.split(" | ") for row in out.split("###")[1].splitlines() if FAST in row]
    assert out.startswith("### Slower")
    worst = [float(row[0].strip("| ")) for row in rows]
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(1.4, abs=0.05)  # (1.25 + 0.5) ÷ 1.25 of the cell of 1 ms
    assert rows[0][1:4] in (["layer, 128 tokens", FAST, f"÷ {base}"] for base in (STOCK, BARE))
    assert not any("5120 tokens" in row[1] for row in rows)  # 1 % of it
    assert status(a_run(), a_run(1, sleep=0.5e-3), "--tolerance", "1")[0] == 0


SOLVER, KERNEL = "minor_subspace, auto, r = 16", "64 x 64"


@pytest.mark.parametrize(
    ("baseline", "name", "old", "new", "kind"),
    [
        (STOCK, FAST, [0.99, 1.0, 1.01], [1.03, 1.04, 1.05], ""),  # within the tolerance
        (STOCK, FAST, [0.99, 1.0, 1.01], [1.0, 1.2, 1.3], ""),  # the intervals overlap
        (STOCK, FAST, [0.99, 1.0, 1.01], [1.05, 1.06, 1.07], "slower"),
        (STOCK, FAST, [0.99, 1.0, 1.01], [0.93, 0.94, 0.95], "faster"),
        (BARE, STOCK, [0.99, 1.0, 1.01], [1.2, 1.21, 1.22], "moved"),
        (SVD, SOLVER, [0.199, 0.2, 0.201], [0.239, 0.24, 0.241], "slower"),
        (SVD, SOLVER, [0.199, 0.2, 0.201], [0.159, 0.16, 0.161], "faster"),
        (COPY, KERNEL, [1.1, 1.1, 1.1], [1.3, 1.3, 1.3], "slower"),
        (COPY, CUBLAS, [1.1, 1.1, 1.1], [1.3, 1.3, 1.3], "moved"),
    ],
)
def test_intervals_and_tolerance_both_count(baseline, name, old, new, kind):
    before, after = (
        Result({}, [Group("x", {}, {baseline: Timing([1.0] * 3), name: Timing(seconds)})])
        for seconds in (old, new)
    )
    found = compare.compare(before, after, 0.05)
    kinds = ("slower", "faster", "moved")
    changes = [(kind, *change[1:4]) for kind in kinds for change in getattr(found, kind)]
    assert changes == [(kind, "x", name, f"÷ {baseline}")] * bool(kind)


OTHER = a_run(1)
OTHER.machine["cpu"] = "B"
UNPAIRED = Result(MACHINE, [Group("x", {}, {STOCK: Timing([1.0]), FAST: Timing([1.0, 1.0])})])
UNUSABLE = [
    (OTHER, "new.json is of another machine (cpu: A before, B there)."),
    ("no JSON", "new.json is not the result of a run (JSONDecodeError: "),
    ("[]", "new.json is not the result of a run (TypeError: "),
    ("{}", "new.json is not the result of a run (KeyError: "),
    (
        '{"commit_info": {}, "datetime": [], "machine_info": 1}',
        "new.json is not the result of a run (TypeError",
    ),
    (Result(MACHINE, []), "new.json has no ratio that "),
    (UNPAIRED, "new.json has implementations of different numbers of rounds in 'x'."),
    (None, "new.json cannot be read: No such file or directory."),
]


@pytest.mark.parametrize(("new", "why"), UNUSABLE)
def test_what_cannot_be_compared_is_named(new, why, status):
    code, out, err = status(a_run(), new)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert why in err
