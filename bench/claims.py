"""How often `mica compare` claims a difference, on simulated results: false claims, and those of a true lead.

``python -m bench.claims [--draws N]`` prints a table. A row is a comparison that is drawn N times:
how many documents and blocks the texts have, how alike the blocks of a document are (ICC: the share of the
variance between documents), how many seeds the methods have, and what seeds change. Sizes are as they were
measured in bench/results/2026-11-29-compare. Where forgetting has noise, the limit of forgetting binds.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mica.cli.compare.outcomes import RETAINED
from mica.cli.compare.verdict import verdict
from mica.cli.output import markdown_table

_ALIKE = (1,) * 15
_EIGHT = (2,) * 8
_UNEQUAL = (6, 4, 2, 1, 1, 1, 1)


class Case(NamedTuple):
    """A comparison to be drawn; sizes in nats per token.

    ``seeds``: of each method, dealt at random where all are alike. ``documents``, ``retained``: blocks of
    each document of the two texts. ``learned``, ``forgotten``: standard deviation between blocks of the
    difference of two methods. ``seed``: of what a seed changes for one method, ``order``: for all alike.
    ``lead``: of the first method.
    """

    seeds: tuple[int, ...] = (3, 3, 2, 2)
    documents: tuple[int, ...] = _ALIKE
    retained: tuple[int, ...] = (1,) * 20
    icc: float = 0.0
    learned: float = 0.101
    forgotten: float = 0.0
    seed: float = 0.01
    order: float = 0.02
    lead: float = 0.0

    def describe(self) -> list[str]:
        documents = f"{len(self.documents)} of {', '.join(map(str, sorted(set(self.documents))))}"
        seeds = ", ".join(map(str, self.seeds))
        return [seeds, documents, f"{self.icc:g}", f"{self.forgotten:g}", f"{self.seed:g}", f"{self.lead:g}"]


def cases() -> Iterator[Case]:
    """Without a lead: what is claimed is false. With one: what is found."""
    for seeds in ((3, 3, 2, 2), (3, 3, 2), (3, 3)):
        for forgotten in (0.0, 0.029, 0.058):
            yield Case(seeds, forgotten=forgotten)
    for documents in (_EIGHT, _UNEQUAL):
        for icc in (0.0, 0.2, 0.5):
            yield Case(documents=documents, retained=documents, icc=icc, forgotten=0.058)
    for seeds in ((2, 2), (3, 2), (3, 3), (2, 2, 2, 2), (3, 3, 2, 2)):
        for seed in (0.003, 0.01, 0.03):
            yield Case(seeds, learned=0.04, seed=seed)
    for seeds in ((2, 2), (3, 3), (3, 3, 2), (3, 3, 2, 2)):
        yield Case(seeds, learned=0.04, seed=0.005, lead=0.05)


def draw(case: Case, generator: np.random.Generator) -> tuple[dict, dict[str, list[dict]]]:
    """The base and the runs of a comparison, as `verdict` takes them."""
    blocks, retained = sum(case.documents), sum(case.retained)
    half = retained // 2
    document = np.repeat(np.arange(len(case.documents)), case.documents).tolist()
    kept = np.repeat(np.arange(len(case.retained)), case.retained).tolist()
    base = {"validation": [3.0] * 5, "test": [3.0] * blocks}
    base |= dict(zip(RETAINED, ([2.0] * half, [2.0] * (retained - half)), strict=True))
    base["documents"] = {"test": document, RETAINED[0]: kept[:half], RETAINED[1]: kept[half:]}

    common = generator.normal(1.8, 0.3, blocks)
    forgotten = generator.normal(0.26, 0.1, retained)
    order = generator.normal(0, case.order, max(case.seeds))
    seeds = case.seeds if case.lead else generator.permutation(case.seeds)
    runs = {}
    for number, some in enumerate(seeds):
        gain = common + _deviations(case.learned, case.icc, document, generator)
        if number == 0:
            gain += case.lead
        loss = forgotten + _deviations(case.forgotten, case.icc, kept, generator)
        runs[str(number)] = []
        for seed in range(some):
            learned = gain + order[seed] + generator.normal(0, case.seed)
            rise = loss + generator.normal(0, 0.07 * case.forgotten)
            validation = 3 - generator.normal(1.8, 0.03, 5)
            losses = {"validation": validation.tolist(), "test": (3 - learned).tolist()}
            losses |= dict(
                zip(RETAINED, ((2 + rise[:half]).tolist(), (2 + rise[half:]).tolist()), strict=True)
            )
            run = {"rate": 1e-3, "steps": 44, "seed": seed, "points": [{"step": 44, **losses}]}
            runs[str(number)].append(run)
    return base, runs


def _deviations(size: float, icc: float, documents: list[int], generator: np.random.Generator) -> np.ndarray:
    """(blocks,): of one method; the difference of two has the standard deviation ``size``."""
    of_document = generator.normal(0, 1, max(documents) + 1)[documents]
    of_block = generator.normal(0, 1, len(documents))
    return size / 2**0.5 * (icc**0.5 * of_document + (1 - icc) ** 0.5 * of_block)


def claimed(case: Case, draws: int, generator: np.random.Generator) -> float:
    """In what share of the draws any difference is claimed; with a lead, that over the second method."""
    found = 0
    for _ in range(draws):
        result = verdict(*draw(case, generator))
        if case.lead:
            found += result.best == "0" and result.lead["1"].is_certain
        else:
            found += any(lead.is_certain for lead in result.lead.values())
    return found / draws


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims")
    parser.add_argument("--draws", type=int, default=2000)
    draws = parser.parse_args(argv).draws
    rows = []
    for number, case in enumerate(cases()):
        share = claimed(case, draws, np.random.default_rng(number))
        rows.append([*case.describe(), f"{100 * share:.1f} %"])
    header = ["seeds", "documents of blocks", "ICC", "sd of forgetting", "sd of seeds", "lead", "claimed"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
