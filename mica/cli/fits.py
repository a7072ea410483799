"""``mica fits``: what a training step of a model takes in memory, from its configuration alone."""

import copy
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

from mica.cli.adapt.methods import METHODS
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
prepared copies of B, padding masks, outliers of 8-bit layers. Only the adapter is trained."""
_LOGITS = """\
With gradient checkpointing all peaks are alike, because the logits of the loss decide. What helps is a loss
without them (--loss chunked): Liger's fused one, or PyTorch's linear_cross_entropy."""
_SCRIPT = """\
To checkpoint the first k layers, whose backward is the last and finds most memory free (not by the Trainer,
which checkpoints all: gradient_checkpointing=False, also in TRL's configurations):

    from transformers.modeling_layers import GradientCheckpointingLayer
    model.{enable}({{"use_reentrant": False}})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < k"""


class Setup(NamedTuple):
    """How a model is trained. ``config``: what `LoraConfig` takes for a method; None: without an adapter."""

    name: str
    config: dict[str, object] | None = None
    is_here: bool = False  # on this backend, else PEFT's code
    recompute: str = "norms"
    casts_factors: bool = True  # to fp32, which is PEFT's default


def _setups() -> Iterator[Setup]:
    yield Setup("without adapter")
    for method in ("lora", "mica", "dora"):
        name = METHODS[method].title
        config = METHODS[method].config
        yield Setup(f"{name}, PEFT's default", config)
        yield Setup(f"{name}, PEFT's best setting", config, casts_factors=False)
        yield Setup(f"{name}, here", config, is_here=True)
        if method != "dora":
            yield Setup(f"{name}, here, norms saved", config, is_here=True, recompute="activations")


SETUPS = tuple(_setups())


def add_parser(commands) -> None:
    """Declare ``mica fits`` on an argparse subparsers object."""
    parser = add_command(
        commands,
        "fits",
        run,
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
    add(
        "--dropout",
        type=number(float, 0, 1, low_allowed=True),
        default=0.0,
        metavar="P",
        help="of the adapter",
    )
    add("--dora", action="store_true", help="count DoRA, too")
    add_dtype_options(parser, "dtype of the weights; auto: that of the checkpoint")
    add("--bits", type=int, choices=(4, 8), help="of the frozen weights by bitsandbytes; 4: nf4, as in QLoRA")
    chunked = "chunked: no logits of all tokens, as in Liger's fused loss and linear_cross_entropy"
    add("--loss", choices=("logits", "chunked"), default="logits", help=chunked)
    memory = "of a device: say how many tokens fit it, and how many layers have to be checkpointed"
    add("--memory", type=number(float, 0), metavar="GIB", help=memory)
    add("--json", type=a_path, metavar="FILE", help="also write the numbers as JSON")


def run(args: Namespace) -> int:
    """Run the command. ``--json`` is one object: the options, and ``rows`` as from `Counted.rows`.

    Raises UsageError; also for mixtures of experts, whose memory depends on values.
    """
    if args.json:
        check_table(args.json)
    rows = [row for counted in measured(args) for row in counted.rows(args.memory)]
    print(_table(rows, args.memory))
    print(_NOTES)
    peaks = [row["peak_bytes"] for row in rows if row["checkpointing"]]
    if args.loss == "logits" and max(peaks) < _ALIKE * min(peaks):
        print(_LOGITS)
    if args.memory:
        from mica.cli.step_memory import ENABLE_CHECKPOINTING

        print(_SCRIPT.format(enable=ENABLE_CHECKPOINTING))
    if args.json:
        options = {
            name: value for name, value in vars(args).items() if name not in ("run", "command", "json")
        }
        write_table(args.json, options | {"rows": rows})
    return 0


class Counted(NamedTuple):
    """The step of a set-up; ``plain`` and ``checkpointed``: recorded with none and with all of its layers.

    ``tokens``: of all sequences. ``kinds``: see `mica.cli.step_memory.memory`.
    """

    name: str
    tokens: int
    kinds: list[int]
    plain: tuple
    checkpointed: tuple

    def row(self, number: int) -> dict:
        """What the step takes with its first ``number`` layers checkpointed."""
        from mica.cli.step_memory import memory

        kept, peak = memory(self.plain, self.checkpointed, self.kinds, number)
        of_all = (*self.kinds, -1)
        weights, trained = (sum(sizes[kind] for kind in of_all) for sizes in self.plain[1:])
        return {
            "name": self.name,
            "checkpointing": number > 0,
            "weights_bytes": weights,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "total_bytes": weights + _ADAM * trained + peak,
        }

    def fewest(self, memory: float) -> tuple[int | None, int | None]:
        """How many layers have to be checkpointed for so many GiB, and the total; None: all are too few."""
        for checkpointed in range(len(self.kinds) + 1):
            total = self.row(checkpointed)["total_bytes"]
            if total <= memory * GIB:
                return checkpointed, total
        return None, None

    def rows(self, memory: float | None = None) -> list[dict]:
        """With no and with all layers checkpointed.

        ``memory``, in GiB, adds the tokens that fit, of all sequences, and `fewest`.
        """
        rows = [self.row(0), self.row(len(self.kinds))]
        if memory:
            fewest, total = self.fewest(memory)
            for row in rows:
                row["tokens_that_fit"] = tokens_that_fit(row, self.tokens, memory)
                row |= {"fewest_checkpointed": fewest, "fewest_total_bytes": total}
        return rows


def measured(args: Namespace) -> list[Counted]:
    """Each of `SETUPS`; stderr shows how many are done, from the start."""
    from tqdm import tqdm

    dora = METHODS["dora"].config
    setups = [setup for setup in SETUPS if args.dora or setup.config != dora]
    with tqdm(setups, desc="Counting", unit=" set-ups", leave=False) as shown:
        model = _outline(args)
        return [_count(model, setup, args) for setup in shown]


class _Model(NamedTuple):
    """The frozen model on the meta device, with one layer of each kind, and what of it is adapted.

    ``kinds``: for each layer of the whole model the index of that which stands for it. ``quantisation``: of
    bitsandbytes, or None.
    """

    base: object
    kinds: list[int]
    targets: dict[str, object]
    quantisation: object


def _count(model: _Model, setup: Setup, args: Namespace) -> Counted:
    import torch

    from mica.cli.step_memory import checkpoint_first, loss_of, record

    ids = torch.zeros(args.batch_size, args.tokens, dtype=torch.long, device="meta")
    recorded = []
    with _running(setup), explained(f"{args.model} cannot be counted without values"):
        adapted = _adapted(model, setup, args)
        loss = loss_of(adapted, ids, args.loss == "chunked")
        for checkpointed in (0, len(model.kinds)):
            # the states of CPU generators, 5 kB, are of no device
            checkpoint_first(adapted, checkpointed, preserve_rng_state=False)
            recorded.append(record(adapted, loss))
    return Counted(setup.name, ids.numel(), model.kinds, *recorded)


def tokens_that_fit(row: dict, tokens: int, memory: float) -> int:
    """How many tokens fit so many GiB, if a row of so many tokens is known."""
    fixed = row["total_bytes"] - row["peak_bytes"]
    return int(tokens * max(0, memory * GIB - fixed) / row["peak_bytes"])


def _outline(args: Namespace) -> _Model:
    """Raises UsageError where what a step takes is not known without values."""
    if args.model.lower().endswith(".gguf"):
        raise UsageError(
            f"{args.model}: "
            "is a GGUF file: give the Hub id or the folder (with config.json) of the model it was made from"
        )

    import torch

    from mica.cli.loading import find_source, quieten_libraries, skeleton
    from mica.cli.quantising import quantisation
    from mica.cli.step_memory import ATTENTION, shorten
    from mica.cli.targets import find_targets, stacks_of

    quieten_libraries()
    options = {} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}
    source = find_source(args.model, args.trust_remote_code, option="")  # it is an argument here
    base = skeleton(source, attn_implementation=ATTENTION, **options)
    if base is None:
        raise UsageError(
            f"{args.model}: is no causal language model, or cannot be built without its weights, "
            "so nothing can be counted"
        )
    found = quantisation(base, args)
    if stacks_of(base):
        raise UsageError(f"{args.model}: has experts, and how many tokens each gets is not known")
    targets = find_targets(base, args.target_modules)
    targets.check_rank(base, args.target_modules, args.rank)
    base.requires_grad_(False)
    base.enable_input_require_grads()
    kinds = shorten(base, targets.modules.values())
    return _Model(base.train(), kinds, targets.config, found)


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


def _adapted(model: _Model, setup: Setup, args: Namespace):
    """A copy of the model, quantised and with this adapter, if any."""
    from peft import LoraConfig, get_peft_model

    from mica.cli.quantising import quantise

    base = copy.deepcopy(model.base)
    if model.quantisation is not None:
        quantise(base, model.quantisation)
    if setup.config is None:
        return base
    options = {"r": args.rank, "lora_dropout": args.dropout, **model.targets, **setup.config}
    config = LoraConfig(task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(base, config, low_cpu_mem_usage=True)
    if not setup.casts_factors:  # on the meta device PEFT leaves them in fp32
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(model.base.dtype)
    return adapted.train()


def _table(rows: list[dict], memory: float | None) -> str:
    """A line for each set-up, with checkpointing on the right."""
    header = ["", "weights"]
    for checkpointing in ("", "checkpointed "):
        header += [f"{checkpointing}kept", "peak", "total"]
        if memory:
            header.append(f"tokens in {memory:g}")
    if memory:
        header += [f"fewest checkpointed in {memory:g}", "total"]
    lines = [header]
    for row in rows:
        if not row["checkpointing"]:
            lines.append([row["name"], _gib(row["weights_bytes"])])
        lines[-1] += [_gib(row[f"{which}_bytes"]) for which in ("kept", "peak", "total")]
        if memory:
            lines[-1].append(f"{row['tokens_that_fit']:,}")
        if memory and row["checkpointing"]:
            fewest, total = row["fewest_checkpointed"], row["fewest_total_bytes"]
            lines[-1] += ["too few: all", ""] if fewest is None else [str(fewest), _gib(total)]
    return "\n".join(aligned(lines))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
