"""Two runs compared: what is a regression, what is chance, and what cannot be compared."""

import json
import random

import pytest

from bench.report import compare
from bench.results.names import BARE, COPY, DEVICE_TIME, FAST, STOCK, SVD, WALL
from bench.results.schema import Group, Result, Timing

SOLVER = "minor_subspace, auto, r = 16"
MACHINE = {"cpu": "A", "threads": 2, "torch": "2.9"}


def a_run(seed=0, rounds=9, noise=0.03, sleep=0.0, drift=1.0, factors=None, cells=40):
    """Layers of 1 to ``cells`` ms and a subspace. ``factors``: implementation -> how much slower it is."""
    draw, groups = random.Random(seed), []
    truth = {BARE: 1.0, STOCK: 2.0, FAST: 1.25}
    for i in range(1, cells + 1):
        implementations = {
            name: Timing([], {"saved_mb": 8.0 * share, "peak_mb": 90.0}) for name, share in truth.items()
        }
        for _ in range(rounds):
            load = drift * draw.uniform(1, 1.5)  # of the round: all implementations suffer
            for name, share in truth.items():
                seconds = 1e-3 * i * share * (factors or {}).get(name, 1.0) + (sleep if name == FAST else 0)
                implementations[name].seconds.append(seconds * load * draw.uniform(1 - noise, 1 + noise))
        axes = {"suite": "layer", "pass": "forward", "tokens": 128 * i}
        groups.append(Group(f"layer, {128 * i} tokens", axes, implementations))
    times = {SVD: 1.0, SOLVER: 0.2 * (factors or {}).get(SOLVER, 1.0)}
    solved = {name: Timing([s * draw.uniform(0.99, 1.01) for _ in range(5)]) for name, s in times.items()}
    axes = {"suite": "subspace", "out": 64, "in": 64}
    return Result(dict(MACHINE), [*groups, Group("subspace", axes, solved)])


@pytest.fixture
def status(tmp_path, capsys):
    """Exit status, stdout and stderr of the command on two runs."""

    def status(old, new, *options):
        paths = [tmp_path / "old.json", tmp_path / "new.json"]
        for path, run in zip(paths, (old, new), strict=True):
            run.save(path) if isinstance(run, Result) else path.write_text(run)
        code = compare.main([*map(str, paths), *options])
        return code, *capsys.readouterr()

    return status


def test_a_run_agrees_with_itself(status):
    code, out, _ = status(a_run(), a_run())
    assert (code, out) == (0, "121 of 121 ratios agree (their intervals overlap): no regression.\n")


@pytest.mark.parametrize(("rounds", "noise"), [(3, 0.01), (5, 0.02), (9, 0.03)])
def test_noise_is_no_regression_nor_is_a_machine_that_slowed_down(rounds, noise, status):
    for seed in range(1, 6):
        code, out, _ = status(a_run(0, rounds, noise), a_run(seed, rounds, noise, drift=1.7))
        assert code == 0, out


def test_a_slower_path_is_caught_where_it_matters_and_worst_first(status):
    code, out, _ = status(a_run(), a_run(1, sleep=0.5e-3))
    assert code == 1
    slower = out[out.index("### Slower") : out.index("121 ratios")]
    rows = [row.split(" | ") for row in slower.splitlines() if FAST in row]
    worst = [float(row[0].strip("| ")) for row in rows]
    assert worst == sorted(worst, reverse=True)
    assert worst[0] == pytest.approx(1.4, abs=0.05)  # (1.25 + 0.5) ÷ 1.25 of the cell of 1 ms
    assert rows[0][1:4] in (["layer, 128 tokens", FAST, f"÷ {base}"] for base in (STOCK, BARE))
    assert not any("5120 tokens" in row[1] for row in rows)  # 1 % of it
    assert status(a_run(), a_run(1, sleep=0.5e-3), "--tolerance", "1")[0] == 0


def test_a_slower_solver_is_a_regression_and_a_faster_one_is_not(status):
    code, out, _ = status(a_run(), a_run(1, factors={SOLVER: 1.2}))
    assert code == 1
    assert f"| subspace | {SOLVER} | ÷ {SVD} | 0.20" in out
    code, out, _ = status(a_run(), a_run(1, factors={SOLVER: 0.8}))
    assert code == 0
    assert "### Faster" in out


def test_other_implementations_move_and_do_not_regress():
    comparison = compare.compare(a_run(), a_run(1, factors={STOCK: 1.3}), 0.05)
    assert not comparison.slower
    assert {(change.implementation, change.against) for change in comparison.moved} == {(STOCK, f"÷ {BARE}")}
    assert {change.against for change in comparison.faster} == {f"÷ {STOCK}"}


def test_intervals_and_tolerance_both_count():
    def run(*seconds):
        timings = {STOCK: Timing([1.0] * len(seconds)), FAST: Timing(list(seconds))}
        return Result(dict(MACHINE), [Group("x", {}, timings)])

    slower = [
        bool(compare.compare(run(0.99, 1.0, 1.01), run(*new), 0.05).slower)
        for new in ([1.03, 1.04, 1.05], [1.0, 1.2, 1.3], [1.05, 1.06, 1.07])
    ]
    assert slower == [False, False, True]


@pytest.mark.parametrize(
    ("fact", "factor", "expected"),
    [("saved_mb", 1.02, 1), ("saved_mb", 1.005, 0), ("peak_mb", 2.0, 0)],
)
def test_memory(fact, factor, expected, status):
    new = a_run(1)
    for timing in new.groups[3].timings.values():
        timing.facts[fact] *= factor
    code, out, _ = status(a_run(), new)
    assert code == expected
    assert (f"| layer, 512 tokens | {FAST} | {fact} |" in out) == bool(expected)
    assert f"| {STOCK} | {fact} |" not in out[: out.find("### Moved")]


def test_refused_is_a_failure_and_missing_is_reported(status):
    new = a_run(1)
    del new.groups[0].timings[FAST]
    del new.groups[1]
    code, out, _ = status(a_run(), new)
    assert code == 0
    assert "### Missing now" in out
    assert f"- layer, 128 tokens, {FAST}\n- layer, 256 tokens, {FAST}\n" in out
    assert STOCK not in out
    new.refused = [{"group": "layer, 128 tokens", "implementation": FAST, "why": "results differ"}]
    code, out, _ = status(a_run(), new)
    assert code == 1
    assert f"- layer, 128 tokens, {FAST}: results differ\n" in out
    assert f"- layer, 256 tokens, {FAST}\n" in out
    assert "1 regressions" in out


def test_what_is_refused_for_all_implementations_or_before_the_passes_part_is_a_failure(status):
    new = a_run(1)
    for group in [*new.groups[:2]]:
        new.groups.remove(group)
    new.refused = [
        {"group": "layer", "why": "no kernel was launched", "implementation": FAST},
        {"group": "layer, 256 tokens", "why": "the process died"},
    ]
    code, out, _ = status(a_run(), new)
    assert code == 1
    assert f"- layer, 128 tokens, {FAST}: no kernel was launched\n" in out
    assert f"- layer, 256 tokens, {FAST}: no kernel was launched\n" in out
    assert STOCK not in out


def test_each_clock_is_compared_with_itself():
    def run(wall, device):
        groups = []
        for clock, ours in ((WALL, wall), (DEVICE_TIME, device)):
            timings = {STOCK: Timing([1.0, 1.01] * 3), FAST: Timing([ours, 1.01 * ours] * 3)}
            groups.append(Group(f"layer, {clock}", {"suite": "layer", "clock": clock}, timings))
        return Result(dict(MACHINE), groups)

    comparison = compare.compare(run(0.9, 0.5), run(0.9, 0.7), 0.05)
    assert [change.cell for change in comparison.slower] == [f"layer, {DEVICE_TIME}"]
    assert (comparison.ratios, comparison.agreeing) == (2, 1)


def test_a_kernel_is_compared_with_a_copy():
    def run(seconds):
        timings = {COPY: Timing([1.0, 1.01] * 3), "64 x 64": Timing([seconds, 1.01 * seconds] * 3)}
        return Result(dict(MACHINE), [Group("down", {"suite": "kernels"}, timings)])

    (change,) = compare.compare(run(1.1), run(1.3), 0.05).slower
    assert change[1:4] == ("down", "64 x 64", f"÷ {COPY}")


def test_a_ratio_without_its_baseline_is_reported():
    new = a_run(1)
    del new.groups[0].timings[STOCK]
    assert compare.compare(a_run(), new, 0.05).missing == [f"layer, 128 tokens, {FAST} ÷ {STOCK}"]


def test_cells_are_matched_by_axes(status):
    new = a_run(1, sleep=0.5e-3)
    for group in new.groups:
        group.name = "reworded " + group.name
    assert status(a_run(), new)[0] == 1


def test_another_machine(status):
    new = a_run(1)
    new.machine["cpu"] = "B"
    code, out, err = status(a_run(), new)
    assert (code, out) == (2, "")
    assert "new.json is of another machine (cpu: A before, B there)." in err
    code, out, _ = status(a_run(), new, "--across-machines")
    assert code == 0
    assert out.startswith("cpu: A before, B now\n")


@pytest.mark.parametrize(
    "content",
    [
        "no JSON",
        "[]",
        "{}",
        json.dumps({"machine": MACHINE, "refused": [], "groups": []}),
        json.dumps({"machine": [], "refused": [], "groups": []}),
    ],
)
def test_what_is_no_result_is_named(content, status):
    code, out, err = status(a_run(), content)
    assert (code, out) == (2, "")
    assert "new.json" in err
    assert len(err.splitlines()) == 1


def test_rounds_that_do_not_pair_and_missing_files(status, tmp_path, capsys):
    new = a_run(1)
    new.groups[2].timings[FAST].seconds.pop()
    code, _, err = status(a_run(), new)
    assert code == 2
    assert "new.json has implementations of different numbers of rounds in 'layer, 384 tokens'" in err
    assert compare.main([str(tmp_path / "old.json"), str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
