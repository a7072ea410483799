"""Makes the runs that a result of `bench.quality` lacks, here or in a pool of processes."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait

import torch

from bench.quality.recipes import METHODS, STOPS, Method
from bench.quality.schedule import Planned, planned
from bench.quality.texts import BATCH, Texts, gather
from bench.quality.train import Candidate, evaluate, recipe_facts, steps_per_epoch, train
from mica.cli.demo import smollm2_gguf
from mica.cli.loading import find_source, load_model, load_tokenizer


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
    pool: Executor | None = None,
    at_once: int = 1,
) -> None:
    """Do what is not yet in ``result``; ``keep`` gets it after every run.

    ``budget``: seconds. No run is started that would end later, if it takes as long as the longest so far of
    its method, or of any. ``pool``: makes the runs, ``at_once`` of them, in processes begun by `load_here`;
    without one they are made here.
    """
    end = clock() + budget
    if "base" not in result:
        result["base"] = evaluate(base, texts)
    running: dict[Future, Planned] = {}
    while True:
        todo = [one for one in planned(result) if one not in running.values()]
        for one in todo[: at_once - len(running)]:
            if clock() + _seconds(result["runs"], one.method) > end:
                print(f"the budget is used up: no time for {one.method}, rate {one.rate:g}", flush=True)
                break
            needed = {key: result[key] for key in ("settings", "plan")}
            future = pool.submit(_in_pool, needed, one) if pool else _now(measure, base, texts, needed, one)
            running[future] = one
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            facts_of_run, run = future.result()
            result["methods"][running.pop(future).method] = facts_of_run
            result["runs"].append(run)
            keep(result)
            print(_line(run), flush=True)


def _seconds(runs: list[dict], method: str) -> float:
    same = [one["wall_seconds"] for one in runs if one["method"] == method]
    return max(same or [one["wall_seconds"] for one in runs], default=0)


def _now(function: Callable, *args) -> Future:
    future: Future = Future()
    future.set_result(function(*args))
    return future


_loaded: list = []  # in a process of the pool: base, texts


def load_here(settings: dict, threads: int) -> None:
    torch.set_num_threads(threads)
    _loaded[:] = load(settings)


def _in_pool(result: dict, one: Planned) -> tuple[dict, dict]:
    return measure(*_loaded, result, one)


def measure(base, texts: Texts, result: dict, one: Planned) -> tuple[dict, dict]:
    """Train and measure once. Returns the facts of the method, and of the run."""
    gc.collect()  # PEFT's models hold themselves in circles: 16 GB were in use after twelve runs
    begin = time.perf_counter()
    known = result["plan"][one.method]
    candidate = Candidate(Method(**known | {"rates": tuple(known["rates"])}), base)
    run = {"method": one.method}
    run |= train(candidate, texts, one.rate, result["settings"]["epochs"], one.seed, STOPS)
    run["wall_seconds"] = round(time.perf_counter() - begin, 1)
    return candidate.facts(), run


def load(settings: dict) -> tuple:
    """SmolLM2-135M in float32, frozen, and the texts of such settings."""
    source = find_source(str(smollm2_gguf()), False)
    sizes = (settings[name] for name in ("people", "rounds", "length", "eval_blocks"))
    texts = gather(load_tokenizer(source), *sizes)
    return load_model(source, "float32").requires_grad_(False), texts


def _line(run: dict) -> str:
    head = f"{run['method']}, rate {run['rate']:g}, seed {run['seed']}"
    if run["diverged"]:
        return f"{head}: diverged, {run['diverged']}"
    losses = ", ".join(f"{name} {value:.3f}" for name, value in run["points"][-1]["evaluation"].items())
    step, ends = statistics.median(run["seconds"]), (run["losses"][0], run["losses"][-1])
    return f"{head}, {step:.2f} s per step: training {ends[0]:.3f} to {ends[1]:.3f}, {losses}"
