"""``mica adapt``: continued pretraining of a causal language model on plain text with MiCA."""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

from mica.cli.arguments import add_model_options, number, target_names
from mica.cli.output import dtype_name
from mica.errors import UsageError

MAX_HELD_OUT_BLOCKS = 32  # enough for a perplexity to two digits, a few seconds of work for a small model


def add_parser(commands) -> None:
    """Declare ``mica adapt`` on an argparse subparsers object."""
    parser = commands.add_parser(
        "adapt",
        help="continued pretraining on text files with MiCA",
        description="Continued pretraining of a causal language model on UTF-8 text files with MiCA. "
        "Writes the adapter, its tokenizer and summary.json; reports held-out perplexity before and after.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count = number(int, 1, low_allowed=True)
    add = parser.add_argument
    add("--model", required=True, help="Hub id, checkpoint folder or GGUF file")
    add("--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8 text files to learn from")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the adapter, made if needed")
    add_model_options(
        parser,
        layers="layers to adapt: all-linear (all but the output layer) or names, like q_proj,v_proj",
        dtype="dtype of the frozen weights; auto: that of the checkpoint where the processor has "
        "instructions for it, else float32, and float32 for GGUF. The adapter is always trained in float32",
    )
    add("--alpha", type=count, help="lora_alpha; None: the rank, a scaling of 1")
    add("--steps", type=count, default=100, help="optimiser steps")
    add("--sequence-length", type=number(int, 2, low_allowed=True), default=512, help="tokens per block")
    add("--batch-size", type=count, default=2, help="blocks per step")
    add("--learning-rate", type=number(float, 0), default=1e-3, help="peak learning rate of AdamW")
    add(
        "--warmup-ratio",
        type=number(float, 0, 1, low_allowed=True),
        default=0.05,
        help="share of the steps in which the learning rate rises to its peak",
    )
    add(
        "--held-out",
        type=number(float, 0, 1),
        default=0.1,
        metavar="FRACTION",
        help="share at the end of every file that is never trained on; the perplexity is measured on up to "
        f"{MAX_HELD_OUT_BLOCKS} blocks of it",
    )
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, slower")
    seed = number(int, 0, 2**32, low_allowed=True)
    add("--seed", type=seed, default=0, help="fixes the order of the training blocks")
    add("--merge", action="store_true", help="also write the model with the adapter merged to OUTPUT/merged")
    parser.set_defaults(run=run)


def _add_adapter(model, args):
    """Return the PEFT model. Raises UsageError if --target-modules names no layer that can be adapted."""
    from peft import LoraConfig, get_peft_model

    from mica.cli.loading import find_targets

    find_targets(model, args.target_modules)
    config = LoraConfig(
        init_lora_weights="mica",
        r=args.rank,
        lora_alpha=args.alpha or args.rank,
        target_modules=target_names(args.target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        if str(error).startswith("Target module"):  # "... is not supported": a norm, an activation
            raise UsageError(f"--target-modules {args.target_modules}: {error}") from error
        raise


def _tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens: blocks start anywhere, so none would be right."""
    return [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]


def _save_merged(model, tokenizer, folder: Path):
    """Merge the adapter into the weights, write the plain model to ``folder``, return the merge report."""
    import mica.fast

    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return mica.fast.merge_report(merged)


def run(args: argparse.Namespace) -> int:
    """Run the command: cheap checks first, nothing on disk before the training has succeeded."""
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("training needs accelerate: pip install 'mica-fast[cli]'")
    from mica.cli.adapt.text import pack, read_texts, spread

    texts = read_texts(args.text)

    import torch

    import mica.fast
    from mica.cli.adapt.evaluation import perplexity
    from mica.cli.loading import (
        check_backend,
        check_limits,
        check_output,
        find_source,
        load_model,
        load_tokenizer,
        quieten_libraries,
        suit_processor,
    )
    from mica.cli.adapt.summary import as_text, peak_memory
    from mica.cli.adapt.training import train

    quieten_libraries()
    source = find_source(args.model, args.trust_remote_code)
    check_output(args.output, source)
    check_backend(args.rank)
    tokenizer = load_tokenizer(source)
    blocks = pack(_tokenize(tokenizer, texts), args.sequence_length, args.held_out, tokenizer.eos_token_id)
    held_out = spread(blocks.held_out, MAX_HELD_OUT_BLOCKS)

    model = load_model(source, args.dtype)
    note = suit_processor(model, args.dtype)
    if note:
        print(f"mica adapt: note: {note}", file=sys.stderr)
    largest_token_id = max(int(blocks.train.max()), int(blocks.held_out.max()))
    check_limits(source, model, args.sequence_length, largest_token_id)
    dtype, device = model.dtype, model.device

    start = time.perf_counter()
    model = _add_adapter(model, args)
    if device.type == "cuda":
        torch.cuda.synchronize()
    initialisation_seconds = time.perf_counter() - start

    before = perplexity(model, held_out, args.batch_size, "Perplexity before")
    training = train(
        model,
        blocks.train,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_ratio=args.warmup_ratio,
        gradient_checkpointing=args.gradient_checkpointing,
        seed=args.seed,
    )
    after = perplexity(model, held_out, args.batch_size, "Perplexity after")
    peak_bytes, peak_of = peak_memory()
    trained, total = model.get_nb_trainable_parameters()
    explanation = mica.fast.explain(model)

    # No base embeddings in the adapter: nothing resized them. "auto", the default, would look for the
    # config.json of the base model to find out, and warn where a GGUF file has none.
    model.save_pretrained(args.output, save_embedding_layers=False)
    tokenizer.save_pretrained(args.output)
    report = _save_merged(model, tokenizer, args.output / "merged") if args.merge else None

    summary = {
        "model": args.model,
        "text": [str(path) for path in args.text],
        "dtype": dtype_name(dtype),
        "device": str(device),
        "rank": args.rank,
        "alpha": args.alpha or args.rank,
        "target_modules": args.target_modules,
        "steps": args.steps,
        "sequence_length": args.sequence_length,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "trained_parameters": trained,
        "total_parameters": total,
        "initialisation_seconds": initialisation_seconds,
        "training_seconds": training.seconds,
        "training_tokens": training.tokens,
        "tokens_per_second": training.tokens / training.seconds,
        "training_loss": training.loss,
        "peak_memory_bytes": peak_bytes,
        "peak_memory_of": peak_of,
        "perplexity_before": before,
        "perplexity_after": after,
        "held_out_tokens": held_out[:, 1:].numel(),
        "paths": dict(explanation.counts()),
        "layers_on_peft_path": [
            {"name": row.name, "reason": row.reason} for row in explanation.rows if row.path == "peft"
        ],
        "layers_not_called": [row.name for row in explanation.rows if row.calls == 0],
        "adapter": str(args.output),
        "merged": str(args.output / "merged") if args.merge else None,
        "merge_swallowed": report.swallowed if report else None,
        "merge_report": str(report) if report else None,
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(as_text(summary))
    return 0
