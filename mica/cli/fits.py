"""``mica fits``: what a training step of a model takes in memory, from its configuration alone."""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from mica.cli.arguments import (
    a_name,
    a_path,
    a_source,
    add_command,
    add_dtype_options,
    count,
    example,
    number,
)
from mica.cli.output import aligned, check_table, explained, write_table
from mica.errors import UsageError

GIB = 2**30
_ADAM = 2  # numbers that Adam keeps of each that is trained, in its dtype
_ALIKE = 1.05  # peaks that differ by less
_NOTES = """\
GiB. A peak is in addition to the weights, a total is both with Adam's state. Attention is flash attention.
Not counted: CUDA's context, workspaces, what the allocator rounds, flash attention's fp32 gradient of q,
prepared copies of B, padding masks. All weights but the adapter's are frozen, without adapter too."""
_LOGITS = """\
With gradient checkpointing all peaks are alike, because the logits of the loss decide. What helps is a loss
without them: Liger's fused one, or PyTorch's linear_cross_entropy."""


class Setup(NamedTuple):
    """How a model is trained. ``init``: what PEFT's ``init_lora_weights`` is; None: without an adapter."""

    name: str
    init: bool | str | None = None
    is_here: bool = False  # on this backend, else PEFT's code
    recompute: str = "norms"
    casts_factors: bool = True  # to fp32, which is PEFT's default


def _setups() -> Iterator[Setup]:
    yield Setup("without adapter")
    for name, init in (("LoRA", True), ("MiCA", "mica")):
        yield Setup(f"{name}, PEFT's default", init)
        yield Setup(f"{name}, PEFT's best setting", init, casts_factors=False)
        yield Setup(f"{name}, here", init, is_here=True)
        yield Setup(f"{name}, here, norms saved", init, is_here=True, recompute="activations")


SETUPS = tuple(_setups())


def add_parser(commands) -> None:
    """Declare ``mica fits`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "fits", run),
        help="what a training step takes in memory, from the configuration alone",
        description="Count, without loading or computing anything, what a training step of a model "
        "allocates: without an adapter, and with LoRA and MiCA of PEFT and of this package, with and without "
        "gradient checkpointing.",
        epilog=example(
            "mica fits meta-llama/Llama-3.1-8B --tokens 4096 --memory 40",
            says="This prints what the weights, the step and Adam take, and how many tokens fit 40 GiB.",
        ),
    )
    add = parser.add_argument
    add("model", type=a_source, metavar="MODEL", help="Hub id or folder; only its config.json is read")
    add("--tokens", type=count(), required=True, metavar="N", help="tokens of a sequence")
    add("--batch-size", type=count(), default=1, help="sequences in a step")
    add("--rank", type=count(), default=16, help="rank of the adapter")
    add("--target-modules", type=a_name, default="all-linear", metavar="NAMES", help="what is adapted")
    add_dtype_options(parser, "dtype of the weights; auto: that of the checkpoint")
    add("--memory", type=number(float, 0), metavar="GIB", help="of a device: say how many tokens fit it")
    add("--json", type=a_path, metavar="FILE", help="also write the numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command. ``--json`` is one object: the options, and ``rows`` as from `measured`.

    Raises UsageError; also for quantised models and mixtures of experts, whose memory depends on values.
    """
    if args.json:
        check_table(args.json)
    rows = measured(args)
    print(_table(rows, args.memory))
    print(_NOTES)
    peaks = [row["peak_bytes"] for row in rows if row["checkpointing"]]
    if max(peaks) < _ALIKE * min(peaks):
        print(_LOGITS)
    if args.json:
        names = ("model", "tokens", "batch_size", "rank", "target_modules", "dtype", "memory")
        report = {name: getattr(args, name) for name in names} | {"rows": rows}
        write_table(args.json, report)
    return 0


def measured(args: argparse.Namespace) -> list[dict]:
    """A row for each of `SETUPS`, without and with gradient checkpointing; stderr shows how many are done."""
    from tqdm import tqdm

    base = _outline(args)
    rows = []
    for setup in tqdm(SETUPS, desc="Counting", unit=" set-ups", leave=False):
        with _running(setup), explained(f"{args.model} cannot be counted without values"):
            model = _adapted(base, setup, args)
            rows.append(_row(setup.name, model, False, args))
            options = {"use_reentrant": False, "preserve_rng_state": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            rows.append(_row(setup.name, model, True, args))
    return rows


def _row(name: str, model, checkpointing: bool, args: argparse.Namespace) -> dict:
    """With ``args.memory`` also ``tokens_that_fit``, of all sequences of a step.

    All but the weights and Adam's state grows with the tokens.
    """
    import torch

    from mica.cli.step_memory import count as count_step

    ids = torch.zeros(args.batch_size, args.tokens, dtype=torch.long, device="meta")
    memory = count_step(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    fixed = memory.weights + _ADAM * trained
    row = {
        "name": name,
        "checkpointing": checkpointing,
        "weights_bytes": memory.weights,
        "kept_bytes": memory.kept,
        "peak_bytes": memory.peak,
        "total_bytes": fixed + memory.peak,
    }
    if args.memory:
        row["tokens_that_fit"] = tokens_that_fit(row, args.batch_size * args.tokens, args.memory)
    return row


def tokens_that_fit(row: dict, tokens: int, memory: float) -> int:
    """How many tokens fit so many GiB, if a row of so many tokens is known."""
    fixed = row["total_bytes"] - row["peak_bytes"]
    return int(tokens * max(0, memory * GIB - fixed) / row["peak_bytes"])


def _outline(args: argparse.Namespace):
    """The frozen model on the meta device.

    Raises UsageError where what a step takes is not known without values.
    """
    if args.model.lower().endswith(".gguf"):
        what = (
            "is a GGUF file: give the Hub id or the folder (with config.json) of the model it was made from"
        )
        raise UsageError(f"{args.model}: {what}")

    import torch

    from mica.cli.loading import find_source, quieten_libraries, skeleton
    from mica.cli.step_memory import ATTENTION
    from mica.cli.targets import find_targets, stacks_of

    quieten_libraries()
    options = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    source = find_source(args.model, args.trust_remote_code, option="")  # it is an argument here
    base = skeleton(source, attn_implementation=ATTENTION, **options)
    if base is None:
        what = "is no causal language model, or cannot be built without its weights"
        raise UsageError(f"{args.model}: {what}, so nothing can be counted")
    if getattr(base.config, "quantization_config", None) is not None:
        raise UsageError(f"{args.model}: is quantised: what its library allocates is not counted")
    if stacks_of(base):
        raise UsageError(f"{args.model}: has experts, and how many tokens each gets is not known")
    find_targets(base, args.target_modules).check_rank(base, args.target_modules, args.rank)
    base.requires_grad_(False)
    base.enable_input_require_grads()
    return base.train()


@contextmanager
def _running(setup: Setup) -> Iterator[None]:
    """Everything inside on the backend, or on PEFT's code."""
    import mica.fast
    from mica.fast.settings import settings

    before = {"lora": settings.lora, "recompute": settings.recompute}
    mica.fast.enable(lora=True, recompute=setup.recompute)
    try:
        with nullcontext() if setup.is_here else mica.fast.disabled():
            yield
    finally:
        mica.fast.enable(**before)


def _adapted(base, setup: Setup, args: argparse.Namespace):
    """A copy of the model with this adapter, if any."""
    from peft import LoraConfig, get_peft_model

    from mica.cli.targets import find_targets

    model = copy.deepcopy(base)
    if setup.init is None:
        return model
    targets = find_targets(model, args.target_modules)
    config = LoraConfig(init_lora_weights=setup.init, r=args.rank, task_type="CAUSAL_LM", **targets.config)
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    if not setup.casts_factors:  # on the meta device PEFT leaves them in fp32
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(base.dtype)
    return model.train()


def _table(rows: list[dict], memory: float | None) -> str:
    """A line for each set-up, with checkpointing on the right."""
    header = ["", "weights"]
    for checkpointing in ("", "checkpointed "):
        header += [f"{checkpointing}kept", "peak", "total"]
        if memory:
            header.append(f"tokens in {memory:g}")
    lines = [header]
    for row in rows:
        if not row["checkpointing"]:
            lines.append([row["name"], _gib(row["weights_bytes"])])
        lines[-1] += [_gib(row[f"{which}_bytes"]) for which in ("kept", "peak", "total")]
        if memory:
            lines[-1].append(f"{row['tokens_that_fit']:,}")
    return "\n".join(aligned(lines))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
