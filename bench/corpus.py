"""``python -m bench.corpus --megabytes 500``: what half a gigabyte of text costs before the first step.

Writes that much real text as JSON Lines, one document a file: the sources and documentation of the installed
Python packages, again with a mark in front where they are too few. Then measures in processes of their own:

- *tokenise*: `mica.cli.adapt.tokens` alone, with nothing in the cache, and again with the cache;
- *adapt* (``--adapt``): ``python -m mica adapt --steps 1`` on SmolLM2-135M in float32, both ways too. Its
  whole time, with two evaluations of two blocks and saving, is an upper bound of the time to the first step.

Peaks are of resident memory, looked at five times a second, of the process and of the sum of its children;
pages of mapped files count.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from bench.measure.machine import facts
from mica.cli.demo import smollm2_gguf

SUFFIXES = (".py", ".md", ".rst", ".txt")
TOKENISE = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from mica.cli.adapt import sources, tokens
from mica.cli.demo import smollm2_gguf
gguf = smollm2_gguf()
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
start = time.perf_counter()
[result] = tokens.tokenize(sources.find("--text", [sys.argv[1]]), tokenizer)
print("RESULT", time.perf_counter() - start, len(result.ids), len(result.lengths), result.cached)
"""


def documents() -> Iterator[str]:
    """Text files of the standard library and of the installed packages, without end."""
    paths = sysconfig.get_paths()
    files = [file for name in ("stdlib", "purelib") for file in sorted(Path(paths[name]).rglob("*"))]
    files = [file for file in dict.fromkeys(files) if file.suffix in SUFFIXES and file.is_file()]
    round_ = 0
    while True:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield f"Copy {round_} of {file.name}\n{text}" if round_ else text
        round_ += 1


def write(path: Path, megabytes: float) -> int:
    """Write about that many megabytes of JSON Lines; return the number of documents."""
    size = count = 0
    with path.open("wb") as file:
        for text in documents():
            size += file.write(
                json.dumps({"text": text, "number": count}, ensure_ascii=False).encode() + b"\n"
            )
            count += 1
            if size >= megabytes * 1e6:
                return count
    raise AssertionError


def measure(command: list[str], cache: Path) -> dict:
    """Run a command; its seconds, peaks in bytes, exit status and the first line that it printed."""
    start = time.perf_counter()
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    process = psutil.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    own = children = 0
    while process.poll() is None:
        try:
            own = max(own, process.memory_info().rss)
            children = max(children, sum(_resident(child) for child in process.children(recursive=True)))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.2)
    output = process.communicate()[0].partition("\n")[0]
    return {
        "seconds": time.perf_counter() - start,
        "peak_bytes": own,
        "peak_bytes_of_children": children,
        "status": process.returncode,
        "output": output,
    }


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=500)
    parser.add_argument("--adapt", action="store_true", help="also the whole command")
    parser.add_argument("--json", type=Path, help="where to write the raw results")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="mica-corpus-"))
    results = {"machine": facts(), "megabytes": args.megabytes}
    try:
        text = scratch / "text.jsonl"
        results["documents"] = write(text, args.megabytes)
        results["bytes"] = text.stat().st_size
        runs = {"tokenise": [sys.executable, "-c", TOKENISE, str(text)]}
        if args.adapt:
            options = ["--model", smollm2_gguf(), "--dtype", "float32", "--steps", "1", "--text", text]
            options += ["--eval-blocks", "2"]
            runs["adapt"] = [sys.executable, "-m", "mica", "adapt", *map(str, options)]
        for name, command in runs.items():
            for which in ("first", "second"):
                output = ["--output", str(scratch / which)] if name == "adapt" else []
                result = measure([*command, *output], scratch / f"cache-{name}")
                results[f"{name}, {which} start"] = result
                own, children = (result[key] / 2**30 for key in ("peak_bytes", "peak_bytes_of_children"))
                print(f"{name}, {which} start: {result['seconds']:.1f} s, status {result['status']}")
                print(
                    f"peak {own:.2f} GiB, of its children {children:.2f} GiB\n{result['output']}", flush=True
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
