"""Exponents of measured times beside those of the operations."""

from importlib import import_module

import pytest

scaling, results = import_module("bench.scaling"), import_module("bench.results")
BARE, STOCK, FAST = results.BARE, results.STOCK, results.FAST
BASE = {"tokens": 1024, "out": 2048, "in": 2048, "rank": 16, "dtype": "bfloat16"}


def group(axes, **seconds):
    rivals = {name: results.Rival([value, 1.1 * value, 0.9 * value]) for name, value in seconds.items()}
    return results.Group(" ".join(map(str, axes.values())), axes, rivals)


def layers(axis, values, formula, part="forward"):
    """Groups of the layer suite in which ``formula`` (value -> {rival: seconds}) holds exactly."""
    groups = []
    for value in values:
        changed = {"out": value, "in": value} if axis == "width" else {axis: value}
        groups.append(group({"suite": "layer", "pass": part, **BASE, **changed}, **formula(value)))
    return groups


def fits(groups, **wanted):
    found = scaling.fits(results.Result({}, groups))
    return [fit for fit in found if all(getattr(fit, name) == value for name, value in wanted.items())]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.25])
@pytest.mark.parametrize("axis", ["tokens", "rank", "width"])
def test_a_power_law_has_its_exponent(axis, power):
    (fit,) = fits(layers(axis, [512, 128, 256, 1024], lambda value: {BARE: 3e-6 * value**power}), axis=axis)
    assert (fit.slope, fit.error) == (pytest.approx(power), pytest.approx(0, abs=1e-6))
    assert fit.values == [128, 256, 512, 1024]
    assert fit.what == "layer, forward, " + BARE


def test_noise_shows_in_the_error():
    off = {128: 1.0, 256: 1.2, 512: 0.9, 1024: 1.1}
    (fit,) = fits(layers("tokens", off, lambda value: {BARE: off[value] * value}))
    assert 0.05 < fit.error < 0.2


@pytest.mark.parametrize(
    ("axis", "total", "extra"),
    [("tokens", 1.0, 1.0), ("width", 2.0, 1.0), ("rank", None, 1.0)],
)
def test_operations_predict(axis, total, extra):
    values = [256, 512, 1024]
    groups = layers(axis, values, lambda value: {BARE: 1.0, FAST: 1.0 + value})
    groups += layers(axis, values, lambda value: {BARE: 2.0, FAST: 2.0 + value}, "backward")
    for part in ("forward", "backward", "forward + backward"):
        name = f"layer, {part}, {FAST}"
        (bare,) = fits(groups, what=f"layer, {part}, {BARE}")
        (fast,) = fits(groups, what=name)
        (over,) = fits(groups, what=f"{name}: {scaling.EXTRA}")
        assert over.slope == pytest.approx(1)
        assert over.predicted == pytest.approx(extra)
        assert bare.predicted == pytest.approx(total or 0, abs=1e-9)
        if axis == "rank":
            assert 0 < fast.predicted < 0.5
        else:
            assert min(total, extra) <= fast.predicted <= max(total, extra) + 1e-9


def test_operations_of_a_layer_are_those_of_its_products():
    m, n, k, r = 1024, 2048, 512, 16
    axes = {**BASE, "out": n, "in": k}
    count = {
        (part, rival): scaling.layer_flops({**axes, "pass": part}, rival)
        for part in ("forward", "backward", "forward + backward")
        for rival in (BARE, STOCK)
    }
    assert count["forward", BARE] == count["backward", BARE] == 2 * m * n * k
    assert count["forward", STOCK] - count["forward", BARE] == 2 * m * r * (n + k)
    assert count["backward", STOCK] - count["backward", BARE] == 2 * m * r * (n + k + k)
    assert count["forward + backward", STOCK] == count["forward", STOCK] + count["backward", STOCK]


def test_no_fit_of_two_points_nor_of_time_below_the_bare_layers():
    assert not fits(layers("tokens", [128, 256], lambda value: {BARE: 1.0}))
    slow = layers("tokens", [128, 256, 512], lambda value: {BARE: 1.0, FAST: 1.0 - (value == 256) / 2})
    assert [fit.what for fit in fits(slow)] == [f"layer, forward, {BARE}", f"layer, forward, {FAST}"]


def test_a_family_has_one_value_of_every_other_axis():
    groups = layers("tokens", [128, 256, 512], lambda value: {BARE: value})
    groups += layers("rank", [4, 64], lambda value: {BARE: 1e9})
    odd = group({"suite": "layer", "pass": "forward", **BASE, "tokens": 1024, "in": 512}, **{BARE: 1e9})
    (fit,) = fits([*groups, odd])
    assert (fit.values, fit.at) == ([128, 256, 512], "2048 × 2048, rank 16, bfloat16")


def test_depth_and_initialisation():
    deep = [
        group(
            {"suite": "layers", "layers": n, "width": 256, "tokens": 64, "rank": 16},
            **{BARE: n, FAST: 1.5 * n},
        )
        for n in (2, 4, 8)
    ]
    wide = [
        group({"suite": "subspace", "out": n, "in": m}, **{"torch.linalg.svd": n**2.5 if n == m else 1e9})
        for n, m in [(512, 512), (1024, 1024), (2048, 2048), (2048, 4096)]
    ]
    found = [(fit.axis, fit.what, round(fit.slope, 6), round(fit.predicted, 6)) for fit in fits(deep + wide)]
    assert found == [
        ("layers", f"layers, {BARE}", 1, 1),
        ("layers", f"layers, {FAST}", 1, 1),
        ("layers", f"layers, {FAST}: {scaling.EXTRA}", 1, 1),
        ("width", "subspace, torch.linalg.svd", 2.5, 3),
    ]


def test_passes_that_are_summed_already_are_not_summed_again():
    groups = layers("tokens", [128, 256, 512], lambda value: {BARE: value})
    groups += layers("tokens", [128, 256, 512], lambda value: {BARE: value}, "backward")
    once = results.Result({}, groups).with_both()
    assert scaling.fits(once) == scaling.fits(results.Result({}, groups))


def test_the_table_has_a_row_a_fit_and_explains_the_rank():
    formula = {"tokens": lambda value: {BARE: value}, "rank": lambda value: {BARE: 1.0, FAST: 1 + value**0.5}}
    groups = [one for axis, of in formula.items() for one in layers(axis, [128, 256, 512], of)]
    found = scaling.fits(results.Result({}, groups))
    rows = scaling.table(found).splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == 2 + len(found)
    assert any("128 | 512 | 3 | 0.50 ± 0.00 | 1.00 |" in row for row in rows)
    assert rows[-1] == scaling.NOTE
    assert scaling.NOTE not in scaling.table(found[:1])
    assert scaling.table([]) == ""
