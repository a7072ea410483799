"""Pictures of a run: which are drawn, what is in them, and that they repeat and read on both pages."""

import random
from importlib import import_module
from itertools import pairwise
from xml.etree import ElementTree

import pytest

plots, drawing, results = (import_module(f"bench.{name}") for name in ("plots", "drawing", "results"))
BARE, STOCK, STOCK_16, FAST = results.BARE, results.STOCK, results.STOCK_16, results.FAST
LORA, ATEN, GROUPED, UNGROUPED = results.LORA, results.ATEN, results.GROUPED, results.UNGROUPED
BASE = {"tokens": 1024, "out": 2048, "in": 2048, "rank": 16, "dtype": "bfloat16"}
OVERHEADS = {BARE: 0, STOCK: 1.3, STOCK_16: 0.6, LORA: 1.25, ATEN: 0.34, FAST: 0.22}
SVD = "torch.linalg.svd"
SUITES = ("layer", "subspace", "initialisation", "loading", "merge", "step", "block")


def group(axes, noise=0.03, facts=None, **seconds):
    draw = random.Random(str(axes))
    rivals = {name: results.Rival([], (facts or {}).get(name, {})) for name in seconds}
    for _ in range(7):
        for name, value in seconds.items():
            rivals[name].seconds.append(value * draw.uniform(1 - noise, 1 + noise))
    return results.Group(" ".join(map(str, axes.values())), axes, rivals)


def layer(part, **axes):
    axes = {"suite": "layer", "pass": part, **BASE, **axes}
    base = 4e-12 * axes["tokens"] * axes["out"] * axes["in"]
    share = 0.5 + 0.5 * axes["rank"] / 16 + 64 / axes["tokens"]
    seconds = {name: base * (1 + extra * share) for name, extra in OVERHEADS.items()}
    facts = {name: {"saved_mb": mb} for name, mb in {STOCK: 12.58, STOCK_16: 4.26, FAST: 4.19}.items()}
    return group(axes, facts=facts, **seconds)


def a_run(*suites):
    groups = []
    for part in ("forward", "backward"):
        cells = [{"tokens": 2**i} for i in range(7, 14)]
        cells += [{"rank": rank} for rank in (4, 8, 32, 64, 128)] + [{"out": n, "in": n} for n in (576, 4096)]
        groups += [layer(part, **cell) for cell in cells]
    for out, inner in [(576, 49152), (2048, 2048), (1024, 4096), (4096, 11008), (4096, 4096), (11008, 4096)]:
        solvers = {
            f"minor_subspace, {method}, r = {rank}": 0.1 + rank / 400
            for method in ("auto", "krylov")
            for rank in (16, 64)
        }
        axes = {"suite": "subspace", "out": out, "in": inner}
        groups.append(group(axes, **{SVD: 1.0, f"{SVD}, tall": 0.7, **solvers}))
    small = {"model": "SmolLM2-135M", "rank": 16, "dtype": "float32"}
    groups.append(group({"suite": "initialisation", **small}, **{STOCK: 9.0, FAST: 1.1}))
    groups.append(group({"suite": "loading", **small}, **{STOCK: 9.0, FAST: 0.6}))
    groups.append(group({"suite": "merge", **small}, **{STOCK: 1.0, FAST: 1.3}))
    facts = {
        name: {"saved_mb": mb, "peak_mb": 1.0} for name, mb in {BARE: 801, STOCK: 1630, FAST: 988}.items()
    }
    step = {"suite": "step", "tokens": 1024, **small, "dtype": "bfloat16"}
    groups.append(group(step, facts=facts, **{BARE: 1.0, STOCK: 2.1, FAST: 1.2}))
    block = {"suite": "block", "model": "Llama-3.2-1B", "tokens": 512, "rank": 16, "dtype": "bfloat16"}
    groups.append(group(block, **{BARE: 1.0, STOCK: 2.2, UNGROUPED: 1.3, GROUPED: 1.2}))
    return results.Result({}, [one for one in groups if one.axes["suite"] in (suites or SUITES)])


def half(axes, rival):
    """A roofline that knows two rivals."""
    base = 4e-12 * axes["tokens"] * axes["out"] * axes["in"]
    return base / 2 if rival in (BARE, FAST) else None


def gids(path, start):
    return [one for one in ElementTree.parse(path).iter() if one.get("id", "").startswith(start)]


def names(pictures):
    return [path.name for path, _ in pictures]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return plots.draw(a_run(), tmp_path_factory.mktemp("pictures"), "cpu", half)


def test_what_is_drawn_and_how_much_is_in_it(pictures):
    series = {path.name: len(gids(path, "series-")) for path, _ in pictures}
    assert series == {
        "cpu-overhead-by-tokens.svg": 5,
        "cpu-overhead-by-rank.svg": 5,
        "cpu-subspace.svg": 6 * 5,
        "cpu-saved-step.svg": 3,
        "cpu-saved-layer.svg": 3,
        "cpu-against-stock.svg": 5,
        "cpu-roofline.svg": 2,
    }
    assert len(gids(pictures[0][0], "interval-")) == 5
    assert len(gids(pictures[-1][0], "roofline")) == 1


def test_files_are_small_and_captions_are_a_sentence(pictures):
    for path, caption in pictures:
        assert path.stat().st_size < 100_000
        assert caption.endswith(".")
        assert "\n" not in caption


def test_a_second_drawing_gives_the_same_bytes(pictures, tmp_path):
    again = plots.draw(a_run(), tmp_path / "new", "cpu", half)
    assert [path.read_bytes() for path, _ in again] == [path.read_bytes() for path, _ in pictures]


def test_a_suite_that_is_not_there_is_not_drawn(tmp_path):
    assert plots.draw(results.Result({}, []), tmp_path, "none", half) == []
    assert names(plots.draw(a_run("subspace"), tmp_path, "one")) == ["one-subspace.svg"]
    assert "layers-roofline.svg" not in names(plots.draw(a_run("layer"), tmp_path, "layers"))
    assert not plots.draw(a_run("layer"), tmp_path, "layers", lambda axes, rival: None)[3:]


def test_a_refused_rival_leaves_the_others(tmp_path):
    run = a_run("layer", "subspace", "step")
    for one in run.groups:
        one.rivals.pop(STOCK if one.axes["suite"] == "step" else FAST, None)
        one.rivals.pop(SVD, None)
    drawn = plots.draw(run, tmp_path, "few")
    assert names(drawn) == [
        f"few-{end}.svg" for end in ("overhead-by-tokens", "overhead-by-rank", "saved-step", "saved-layer")
    ]
    assert len(gids(drawn[0][0], "series-")) == 4


def test_of_many_methods_the_default_is_drawn(tmp_path):
    run = a_run("subspace")
    for one in run.groups:
        for i in range(8):
            one.rivals[f"minor_subspace, gram, r = {2**i}"] = results.Rival([0.5] * 7)
    ((path, _),) = plots.draw(run, tmp_path, "many")
    assert len(gids(path, "series-")) == 6 * 3  # SVD of the tall form, two ranks
    assert path.stat().st_size < 100_000


def test_overheads_are_those_over_the_bare_layer():
    one = results.Group("", {}, {BARE: results.Rival([1.0, 2.0]), FAST: results.Rival([1.25, 2.5])})
    assert plots._percent(one, FAST) == (25, 25, 25)


@pytest.mark.parametrize("end", [1, 50, 99])
def test_names_at_the_ends_of_lines_do_not_touch_nor_leave_the_picture(end):
    _, axes = drawing.blank(7, 3.5, "")
    ends = [0, *(end + i / 1000 for i in range(5)), 100]
    series = [
        drawing.Line(name, {1: results.Ratio(1, 1, 1), 2: results.Ratio(value, value, value)})
        for name, value in zip("abcdefg", ends, strict=True)
    ]
    drawing.lines(axes, series, " %")
    heights = [text.xy[1] for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list("abcdefg")
    assert all(b - a > 0.06 for a, b in pairwise(heights))
    assert heights[0] >= 0
    assert heights[-1] <= 1


def contrast(one, other):
    """WCAG 2's ratio."""

    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_colour_reads_on_both_pages():
    rivals = [*OVERHEADS, GROUPED, UNGROUPED, "minor_subspace, krylov, r = 16", "anything else"]
    colours = {drawing.INK, drawing.OTHER, *(drawing.style(rival).colour for rival in rivals)}
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for colour in colours:
        assert min(contrast(colour, page) for page in drawing.PAGES) >= 3.5, colour


def test_pages_show_through_and_text_is_in_ink(pictures):
    for path, _ in pictures:
        styles = " ".join(one.get("style", "") for one in ElementTree.parse(path).iter()).lower()
        assert "#ffffff" not in styles
        assert "#000000" not in styles
        assert drawing.INK in styles
        assert "<text" not in path.read_text()  # a page's fonts are not known
