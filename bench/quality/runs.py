"""A result of `bench.quality`, a JSON file, and the runs that it lacks, by one process or several.

Until the command ends, each new run is a file in a folder beside the result: processes share the work by
locks, and kill -9 loses only a run that was under way (see `bench.quality.store`).
"""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import time
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from transformers.utils import logging

import mica.fast
from bench.quality import store
from bench.quality.recipes import METHODS, RECIPES, STOPS, Method
from bench.quality.schedule import Planned, planned
from bench.quality.texts import BATCH, Texts, gather
from bench.quality.train import candidate, evaluate, steps_per_epoch, train
from mica.cli.demo import smollm2_gguf
from mica.cli.loading import find_source, load_model, load_tokenizer
from mica.cli.output import write_file
from mica.errors import UsageError

SAME = ("model", "settings", "recipes", "texts", "plan")  # what makes runs comparable
MORE = ("seeds",)  # settings that may change: they ask for more runs or fewer, and change none
VERSIONS = ("torch", "peft", "transformers")  # processors are noted with every start


def load(settings: dict) -> tuple:
    """SmolLM2-135M in float32, frozen, and the texts of such settings."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = find_source(str(smollm2_gguf()), False)
    sizes = (settings[name] for name in ("people", "rounds", "length", "eval_blocks"))
    texts = gather(load_tokenizer(source), *sizes)
    return load_model(source, "float32").requires_grad_(False), texts


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
        "recipes": {name: recipe._asdict() for name, recipe in RECIPES.items()},
        "texts": texts.about,
        "plan": {method.name: method._asdict() for method in METHODS},
        "methods": {},
        "runs": [],
    }


def resume(path: Path, fresh: dict) -> dict:
    """The result at ``path`` to go on with, else ``fresh``, without runs. Methods and seeds may be added.

    Raises UsageError if the runs in the file were made by other settings, texts or versions.
    """
    if not path.exists():
        shutil.rmtree(_folder(path), ignore_errors=True)
        return fresh
    found = json.loads(path.read_text(encoding="utf-8"))
    pairs = {key: (found.get(key), fresh[key]) for key in SAME}
    pairs |= {key: (found.get("machine", {}).get(key), fresh["machine"].get(key)) for key in VERSIONS}
    pairs["plan"] = found["plan"], {name: fresh["plan"].get(name) for name in found["plan"]}
    pairs["settings"] = [
        {name: value for name, value in one["settings"].items() if name not in MORE} for one in (found, fresh)
    ]
    for key, pair in pairs.items():
        old, new = (json.loads(json.dumps(one)) for one in pair)  # tuples become lists
        if old != new:
            raise UsageError(f"--name {path.stem}: {path} has other {key}: take another name")
    _add(found, store.read(_folder(path)))  # by a command that was killed
    wanted = {name: fresh[name] for name in ("settings", "plan")}
    return found | wanted | {"starts": found["starts"] + fresh["starts"]}


def save(path: Path, result: dict) -> None:
    """As JSON, one line per run."""
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in result["runs"])
    text = f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n'
    write_file("--output", path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def _folder(path: Path) -> Path:
    """Where the runs are that the result at ``path`` does not have yet."""
    return path.with_suffix(".runs")


def _add(result: dict, made: dict[str, dict]) -> bool:
    """Add what `measure` has made, by key, to ``result``; returns whether that is anything new."""
    known = {Planned(run["method"], run["rate"], run["seed"]).key for run in result["runs"]}
    new = [one for key, one in made.items() if key not in known]
    result["methods"] |= {one["run"]["method"]: one["method"] for one in new}
    result["runs"] += [one["run"] for one in new]
    return bool(new)


def experiment(
    base, texts: Texts, result: dict, path: Path, budget: float = math.inf, processes: int = 1
) -> None:
    """Add to ``result`` what it lacks, by so many processes; it is kept at ``path`` after every run.

    ``budget``: seconds. No run is started that would end later, if it takes as long as the longest so far of
    its method, or of any.
    """
    end = time.monotonic() + budget
    if "base" not in result:
        result["base"], _ = evaluate(base, texts)
    save(path, result)
    threads = max(1, torch.get_num_threads() // processes)
    torch.set_num_threads(threads)
    context = get_context("spawn")
    shared = {"args": (path, end, threads), "daemon": True}  # ended with this process, if that is not killed
    helpers = [context.Process(target=_help, **shared) for _ in range(processes - 1)]
    for helper in helpers:
        helper.start()
    _work(base, texts, result, path, end, lambda: save(path, result), lambda: None)
    for helper in helpers:
        helper.join()
    _add(result, store.read(_folder(path)))
    save(path, result)
    shutil.rmtree(_folder(path), ignore_errors=True)


def _help(path: Path, end: float, threads: int) -> None:
    """Make runs of the result at ``path``, as long as the process lives that has started this one."""

    def watch() -> None:
        if not parent_process().is_alive():
            sys.exit(f"the process that keeps {path} has ended")

    torch.set_num_threads(threads)
    result = json.loads(path.read_text(encoding="utf-8"))
    base, texts = load(result["settings"])
    _work(base, texts, result, path, end, lambda: None, watch)


def _work(base, texts: Texts, result: dict, path: Path, end: float, keep, watch) -> None:
    """Make runs until none is left; ``keep`` is called when ``result`` has more, ``watch`` before a run."""

    def seen(made: dict) -> None:
        watch()
        if _add(result, made):
            keep()

    def within_budget(_) -> list[Planned]:
        todo = planned(result)
        found = [one for one in todo if time.monotonic() + _seconds(result["runs"], one.method) <= end]
        if todo and not found:
            print(f"the budget is used up: no time for {todo[0].key}", flush=True)
        return found

    def make(one: Planned) -> dict:
        made = measure(base, texts, result, one)
        print(f"{one.key}: {made['run']['diverged'] or made['run']['points'][-1]}", flush=True)
        return made

    _folder(path).mkdir(exist_ok=True)
    store.work(_folder(path), within_budget, make, seen)


def _seconds(runs: list[dict], method: str) -> float:
    same = [one["wall_seconds"] for one in runs if one["method"] == method]
    return max(same or [one["wall_seconds"] for one in runs], default=0)


def measure(base, texts: Texts, result: dict, one: Planned) -> dict:
    """Train and measure once: {"method": facts of the method, "run": those of the run}."""
    gc.collect()  # PEFT's models hold themselves in circles: 16 GB were in use after twelve runs
    begin = time.perf_counter()
    method = Method(**result["plan"][one.method])
    with candidate(method, base, one.seed) as model:
        size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        run = train(model, method, texts, one.rate, result["settings"]["epochs"], one.seed, STOPS)
    is_fast = method.kind not in ("lora", "full") and mica.fast.is_enabled()
    return {
        "method": method._asdict() | {"trained_parameters": size, "on_fast_path": is_fast},
        "run": one._asdict() | run | {"wall_seconds": round(time.perf_counter() - begin, 1)},
    }
