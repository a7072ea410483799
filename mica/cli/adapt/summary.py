"""What ``mica adapt`` reports at the end: one dictionary, as ``summary.json`` and as text."""

import sys
from collections import Counter

import torch


def peak_memory() -> tuple[int | None, str]:
    """Return the peak memory of this process in bytes and what was measured; None where nothing can be."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), "allocated on the GPU"
    try:
        import resource
    except ImportError:  # Windows
        return None, "not measured"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024, "resident set of the process"


def as_text(summary: dict) -> str:
    """Return ``summary`` (see ``mica.cli.adapt.run``) as aligned lines for a terminal."""
    s = summary
    peak = s["peak_memory_bytes"]
    uncalled = s["layers_not_called"]
    paths = ", ".join(f"{path} {count}" for path, count in s["paths"].items())
    rows = [
        ("model", f"{s['model']} ({s['dtype']}, {s['device']})"),
        (
            "trained parameters",
            f"{s['trained_parameters']:,} of {s['total_parameters']:,} "
            f"({s['trained_parameters'] / s['total_parameters']:.2%})",
        ),
        ("initialisation", f"{s['initialisation_seconds']:.1f} s"),
        (
            "training",
            f"{s['training_seconds']:.1f} s, {s['steps']} steps, {s['training_tokens']:,} tokens, "
            f"{s['tokens_per_second']:,.0f} tokens/s",
        ),
        ("peak memory", f"{peak / 2**30:.2f} GiB ({s['peak_memory_of']})" if peak else "not measured"),
        (
            "held-out perplexity",
            f"{s['perplexity_before']:.2f} -> {s['perplexity_after']:.2f} "
            f"(on {s['held_out_tokens']:,} tokens never trained on)",
        ),
        ("layers by path", paths),
        *(
            ("", f"on PEFT's path, {count}: {reason}")
            for reason, count in Counter(row["reason"] for row in s["layers_on_peft_path"]).items()
        ),
        *([("", f"not called in the last forward: {len(uncalled)}")] if uncalled else []),
        ("adapter", s["adapter"]),
    ]
    if s["merged"]:
        rows += [("merged model", s["merged"]), ("", s["merge_report"])]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {value}" for label, value in rows)
