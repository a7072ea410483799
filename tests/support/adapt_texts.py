"""Texts for `mica adapt`: settings, files of every kind, and stores of tokens without a tokenizer."""

import bz2
import gzip
import json
import lzma
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

from tests.support import adapt_settings

ROWS = [
    {"title": f"Nr {n}", "text": f"{n} mal {n} ist {n * n}; schön, 漢字.\r\n" * (n % 4 + 1)}
    for n in range(30)
]


def settings(text, **changes) -> Namespace:
    """Settings of a run on ``text``, one source or a list; three times two blocks a step."""
    items = [str(item) for item in (text if isinstance(text, list) else [text])]
    own = {"text": items, "workers": 1, "eval_blocks": 4, "batch_size": 2, "gradient_accumulation_steps": 3}
    return adapt_settings.settings(**own | changes)


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows to a table or to JSON by the suffix of ``path``, compressed if there is a second one."""
    kind = path.suffixes[0]
    if kind == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    if kind == ".json":
        data = json.dumps(rows, indent=1)
    elif kind in (".csv", ".tsv"):
        data = pd.DataFrame(rows).to_csv(index=False, sep="," if kind == ".csv" else "\t")
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(data.encode()))
    return path


def store(*documents: list[int]) -> SimpleNamespace:
    """What `mica.cli.adapt.tokens.Tokens` holds, of these documents."""
    return SimpleNamespace(
        ids=np.array([token for document in documents for token in document], np.uint16),
        lengths=np.array([len(document) for document in documents], np.int64),
        digests=np.array([hash(tuple(document)) % 2**64 for document in documents], np.uint64),
    )
