"""The simulation of `mica compare`'s claims: few false ones, and a true lead is found."""

import numpy as np
import pytest

from bench.claims import Case, claimed, draw, main
from mica.cli.compare.outcomes import common_limit, outcome

NULL = {
    "forgetting": Case((3, 3), forgotten=0.058),
    "eight documents": Case((3, 3), documents=(2,) * 8, retained=(2,) * 8, icc=0.5, forgotten=0.058),
    "seeds": Case((2, 2), learned=0.04, seed=0.03),
}


@pytest.mark.parametrize("case", NULL.values(), ids=NULL)
def test_false_claims_are_rare(case):
    """5 % of 300 are 15; 26 or more would come by chance in 1 of 200."""
    assert claimed(case, 300, np.random.default_rng(0)) < 26 / 300


def test_a_lead_is_found_by_two_methods_as_by_more():
    for seeds in ((3, 3), (3, 3, 2, 2)):
        case = Case(seeds, learned=0.04, seed=0.005, lead=0.05)
        assert claimed(case, 100, np.random.default_rng(0)) >= 0.8


def test_what_is_drawn_is_what_the_case_says():
    case = Case((4, 4), documents=(2,) * 400, retained=(2,) * 400, icc=0.3, forgotten=0.058, lead=0.05)
    base, runs = draw(case, np.random.default_rng(0))
    ours, theirs = ([outcome(base, run) for run in runs[name]] for name in "01")
    gaps = ours[0].learned - theirs[0].learned
    assert gaps.mean() == pytest.approx(0.05, abs=0.03)
    assert gaps.std() == pytest.approx(0.101, rel=0.1)
    pairs = gaps.reshape(400, 2) - gaps.mean()
    assert pairs.prod(axis=1).mean() / gaps.var() == pytest.approx(0.3, abs=0.12)
    assert (ours[0].forgotten - theirs[0].forgotten).std() == pytest.approx(0.058, rel=0.1)
    assert common_limit(base, runs).value < max(one.forgotten.mean() for one in (*ours, *theirs))


def test_the_table(capsys):
    main(["--draws", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| seeds | documents of blocks |")
    assert len(lines) > 30
