"""What the page says of planted results."""

from mica.cli.compare import page, picture
from tests.support.comparisons import SETTINGS, found, gaining


def test_the_best_is_named_and_taken_whatever_it_is():
    for name, title in (("lora", "LoRA"), ("full", "full fine-tuning"), ("mica", "MiCA")):
        first, _, last = page.sentences(found(gaining(name, 0.6)))
        assert first.startswith("At equal forgetting (at most ")
        assert f" {title} learned most, 0." in first
        assert first.count("more than") == 3
        assert "no difference" not in first
        assert last.startswith(f"Take {title}: it learned most. It has 9.6 million trained parameters, ")


def test_no_difference_is_said_and_the_cheapest_taken():
    same = found()
    first, _, last = page.sentences(same)
    assert first.endswith("is no difference that this budget can show.")
    assert "more than" not in first
    assert last.startswith("Take MiCA")
    assert page.taken(same)["method"] in ("mica", "random")


def test_one_seed_of_each_claims_nothing():
    first = page.sentences(found(gaining("lora", 0.6), seeds=1))[0]
    assert first.endswith("is no difference that this budget, which has one seed of each, can show.")


def test_a_price_in_forgetting_is_told():
    def forgets(method, rate, step):
        return step * (0.05 if method == "full" else 0.002)

    told = found(gaining("full", 1.0), forgets)
    first, second, last = page.sentences(told)
    assert "full fine-tuning learned most" not in first
    assert second.startswith("However much is forgotten, full fine-tuning learned most, ")
    assert " for " in second.split(":")[0]
    assert "full" not in last
    assert "## However much is forgotten" in page.markdown(told)


def test_where_nothing_is_forgotten_there_is_no_limit():
    told = found(forgets=lambda *at: -0.1)
    first, second, _ = page.sentences(told)
    assert first.startswith("Without forgetting any of the retained text, ")
    assert second == "More forgetting would not have helped any of them."
    assert "## However much" not in page.markdown(told)


def test_nothing_learned_is_said_and_recommends_nothing():
    told = found(lambda *at: -0.1)
    assert page.sentences(told) == [
        "No method has learned anything of this text: no loss on held-out text fell."
    ]
    assert "## To do it again" not in page.markdown(told)


def test_what_the_budget_did_not_allow_is_on_the_page():
    told = found(budget=300.0)
    assert told["not_done"]
    for line in told["not_done"]:
        assert f"\n- {line}" in page.markdown(told)


def test_names_are_without_the_folders_of_this_machine():
    secret = SETTINGS | {"model": "/home/me/model", "text": ["/home/me/t.txt"], "retain": ["/home/me/r.txt"]}
    text = page.markdown(found(settings=secret)).partition("## To do it again")[0]  # whose command is to run
    assert "/home/me" not in text
    assert "`r.txt`" in text


def test_a_curve_is_the_course_of_the_training_that_was_chosen():
    told = found(gaining("lora"))
    assert set(told["curves"]) == {"MiCA", "LoRA", "MiCA with a random B", "full fine-tuning"}
    for points in told["curves"].values():
        assert points[0][:2] == [0.0, 0.0]
        assert len(points) == 4
        forgotten = [point[0] for point in points]
        assert forgotten == sorted(forgotten)


def test_pictures(tmp_path):
    """With and without intervals, and without anything."""
    for number, curves in enumerate(({"a": [(0, 0, 0), (1, 2, 0.1)], "b": [(0, 0, None), (1, 3, None)]}, {})):
        path = tmp_path / f"{number}.png"
        picture.trade_off(curves, path, "title", "x", "y")
        assert path.read_bytes().startswith(b"\x89PNG")
