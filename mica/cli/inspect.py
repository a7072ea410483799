"""``mica inspect``: what MiCA would adapt in a model, without adapting it."""

import time
from argparse import Namespace
from dataclasses import asdict

from mica.cli.arguments import a_name, a_path, a_source, add_command, add_dtype_options, count, example
from mica.cli.kinds import grouped, kinds_table
from mica.cli.output import check_table, dtype_name, write_table
from mica.errors import UsageError

_LAST_LINE = (
    "{layers_found} layers in {seconds:.1f} s: {layers_proven} proven, {layers_not_proven} not proven, "
    "{layers_unsuitable} cannot be adapted"
)
_MEANING = (
    "energy: the share of the weights' squares in the directions that MiCA adapts; small: they add little to "
    "the layer's output today. gap near 1: others would do as well"
)


def add_parser(commands) -> None:
    """Declare ``mica inspect`` on an argparse subparsers object."""
    parser = add_command(
        commands,
        "inspect",
        run,
        help="the spectra of a model's layers, and what MiCA would adapt in them",
        description="Show, for each kind of layer that MiCA would adapt, the singular values at the cut, the "
        "share of the weight's energy in the chosen subspace, and how many layers have the certificate of "
        "the solver. Trains nothing and does not change the model.",
        epilog=example(
            "mica inspect HuggingFaceTB/SmolLM2-135M --json spectra.json",
            says="This prints a line for each kind of layer (q_proj, k_proj, ...), and writes what was "
            "measured in each layer as JSON.",
        ),
    )
    add = parser.add_argument
    add("model", type=a_source, metavar="MODEL", help="Hub id, checkpoint folder or GGUF file")
    add("--rank", type=count(), default=16, help="rank of the adapter")
    add(
        "--target-modules",
        type=a_name,
        default="all-linear",
        metavar="NAMES",
        help="what to look at: all-linear (all but output layer and routers, with experts) or names, like "
        "q_proj,embed_tokens",
    )
    add_dtype_options(parser, "dtype of the weights; auto: that of the checkpoint, float32 for GGUF")
    add("--json", type=a_path, metavar="FILE", help="also write the numbers of all layers as JSON")


def run(args: Namespace) -> int:
    """Run the command: cheap checks first, files at the end.

    ``--json`` is one object: model, dtype, device, rank, target_modules (as given), what `summary` returns,
    and layers, a list of objects with the fields of `mica.cli.spectra.Row`, in the model's order.
    Unknown values are null.

    Raises UsageError; also, after everything else, where no layer can be adapted.
    """
    if args.json:
        check_table(args.json)
    model = _load(args)
    targets = _targets(model, args)

    start = time.perf_counter()
    print(
        f"{args.model}, r = {args.rank}: chosen are sigma_{args.rank} to sigma_1, "
        f"gap = sigma_{args.rank + 1} / sigma_{args.rank}"
    )
    print("medians of each kind of layer, and its worst gap, energy and excess", flush=True)
    rows = _measure(args, targets)
    result = summary(rows, seconds=time.perf_counter() - start)
    print(kinds_table(grouped(rows), args.rank))
    print(_MEANING)
    print(_LAST_LINE.format(**result))

    if args.json:
        report = {
            "model": args.model,
            "dtype": dtype_name(model.dtype),
            "device": str(model.device),
            "rank": args.rank,
            "target_modules": args.target_modules,
            **result,
            "layers": [asdict(row) for row in rows],
        }
        write_table(args.json, report)
    if result["layers_found"] == result["layers_unsuitable"]:
        raise UsageError(f"no layer can be adapted: {rows[0].name}: {rows[0].reason}")
    return 0


def _load(args: Namespace):
    """The model, once its skeleton has shown that it has layers of the names, large enough for the rank."""
    from mica.cli.loading import find_source, load_model, quieten_libraries, skeleton

    quieten_libraries()
    source = find_source(args.model, args.trust_remote_code, option="")  # it is an argument here
    outline = skeleton(source)
    if outline is not None:
        _targets(outline, args)
    return load_model(source, args.dtype)


def _targets(model, args: Namespace):
    """The `mica.cli.targets.Targets` of the options; ``model`` may be a `loading.skeleton`.

    Raises UsageError if a name matches nothing, or the rank is too large for all that they match.
    """
    from mica.cli.targets import ALL_LINEAR, find_targets

    targets = find_targets(model, args.target_modules, args.target_modules == ALL_LINEAR or None)
    sizes = [min(size) for size in targets.sizes(model).values() if size is not None]
    if sizes and args.rank > max(sizes):
        raise UsageError(f"--rank {args.rank}: too large for every layer: at most {max(sizes)} fits")
    return targets


def _measure(args: Namespace, targets) -> list:
    """A `mica.cli.spectra.Row` for each of the `mica.cli.targets.Targets`; stderr shows how many are done."""
    from tqdm import tqdm

    from mica.cli.spectra import measure

    rows = []
    found = targets.modules | targets.parameters
    for name, module in tqdm(found.items(), desc="Measuring", unit=" layers", delay=2, leave=False):
        parameter = name.rpartition(".")[2] if name in targets.parameters else None
        rows.append(measure(name, module, args.rank, parameter))
    return rows


def summary(rows: list, seconds: float) -> dict:
    """The counts and the worst proven energy excess (None if nothing is proven) of a list of `Row`."""
    solved = [row for row in rows if row.reason is None]
    proven = [row.energy_excess for row in solved if row.proven]
    return {
        "layers_found": len(rows),
        "layers_proven": len(proven),
        "layers_not_proven": len(solved) - len(proven),
        "layers_unsuitable": len(rows) - len(solved),
        "worst_energy_excess": max(proven, default=None),
        "seconds": seconds,
    }
