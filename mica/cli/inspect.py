"""``mica inspect``: what MiCA would adapt in a model, without adapting it."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from mica.cli.arguments import a_name, a_path, a_source, add_command, add_dtype_options, count, example
from mica.cli.extras import how_to_install
from mica.cli.kinds import grouped
from mica.cli.layer_tables import kinds_table, layer_line, layers_header, number
from mica.cli.output import check_file, dtype_name, size_text, write_file, write_json
from mica.errors import UsageError

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_parser(commands) -> None:
    """Declare ``mica inspect`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "inspect", run),
        help="the spectra of a model's layers, and what MiCA would adapt in them",
        description="Show, for each kind of layer that MiCA would adapt, the singular values at the cut, the "
        "share of the weight's energy in the chosen subspace, and how many layers have the certificate of "
        "the solver. Trains nothing and does not change the model.",
        epilog=example(
            "mica inspect HuggingFaceTB/SmolLM2-135M",
            "mica inspect HuggingFaceTB/SmolLM2-135M --layers --plot spectra.png --json spectra.json",
            says="The first prints a line for each kind of layer (q_proj, k_proj, ...). The second prints "
            "one for each layer, draws all singular values, and writes what it has measured as JSON.",
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
    add("--layers", action="store_true", help="a line for each layer, not for each kind of layer")
    add("--plot", type=a_path, metavar="FILE", help="also draw the whole spectra: .png, .pdf or .svg")
    add("--json", type=a_path, metavar="FILE", help="also write the numbers of all layers as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command: cheap checks first, files at the end. With --layers each line is printed at once.

    ``--json`` is one object: model, dtype, device, rank, target_modules (as given), what `summary` returns,
    and layers, a list of objects with the fields of `mica.cli.spectra.Row`, in the model's order.
    Unknown values are null.

    Raises UsageError; also where no layer can be adapted: before the weights are read where the rank alone
    forbids it, else after everything else.
    """
    _check_files(args)
    model = _load(args)
    targets = _listed(_targets(model, args))

    start = time.perf_counter()
    print(_first_lines(args), flush=True)
    rows, spectra = _measure(args, targets)
    result = summary(rows, seconds=time.perf_counter() - start)
    if not args.layers:
        print(kinds_table(grouped(rows), args.rank))
    print(_last_line(result))

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
        write_json("--json", args.json, report)
    if result["layers_found"] == result["layers_unsuitable"]:
        raise UsageError(f"no layer can be adapted: {rows[0].name}: {rows[0].reason}")
    if args.plot:
        _draw(args, spectra)
    return 0


def _check_files(args: argparse.Namespace) -> None:
    """Raise UsageError if what --json and --plot ask for cannot be written."""
    if args.json:
        check_file("--json", args.json)
    if args.plot:
        check_file("--plot", args.plot, PLOT_SUFFIXES)
        try:
            import mica.cli.plot  # noqa: F401
        except ImportError as error:
            raise UsageError(f"--plot needs matplotlib: {how_to_install('plot')}") from error


def _load(args: argparse.Namespace):
    """The model, once its skeleton has shown that something in it can be adapted."""
    from mica.cli.loading import find_source, load_model, quieten_libraries, skeleton

    quieten_libraries()
    try:
        source = find_source(args.model, args.trust_remote_code)
        outline = skeleton(source)
        if outline is not None:
            _targets(outline, args)
        return load_model(source, args.dtype)
    except UsageError as error:  # which names an option that is an argument here
        raise UsageError(str(error).removeprefix("--model ")) from error


def _targets(model, args: argparse.Namespace):
    """The `mica.cli.targets.Targets` of the options; ``model`` may be a `loading.skeleton`.

    Raises UsageError if a name matches nothing, or if all layers are too small for the rank.
    """
    from mica.cli.targets import ALL_LINEAR, find_targets

    with_experts = True if args.target_modules == ALL_LINEAR else None
    found = find_targets(model, args.target_modules, with_experts)
    sizes = {name: size for name, size in found.sizes(model).items() if size is not None}
    largest = max(sizes, key=lambda name: min(sizes[name]), default=None)
    if largest is not None and min(sizes[largest]) < args.rank:
        has = f"the largest, {largest}, has {size_text(sizes[largest])} weights"
        what = f"{has}, so at most {min(sizes[largest])} fits"
        raise UsageError(f"--rank {args.rank}: no layer can be adapted: {what}")
    return found


def _listed(found) -> list[tuple]:
    """(name, module, parameter) of what is measured; None for the parameter of a layer."""
    layers = [(name, module, None) for name, module in found.modules.items()]
    parameters = [(name, module, name.rpartition(".")[2]) for name, module in found.parameters.items()]
    return layers + parameters


def _measure(args: argparse.Namespace, targets: list[tuple]) -> tuple[list, dict]:
    """Measure the targets; with --layers print a line for each, else show on stderr how many are done.

    Returns:
        A `mica.cli.spectra.Row` for each, and singular values by name: with --plot all of them.
    """
    from tqdm import tqdm

    from mica.cli.spectra import measure

    width = max(len(name) for name, _, _ in targets)
    if args.layers:
        print(layers_header(args.rank, width), flush=True)

    rows = []
    spectra = {}
    bar = tqdm(targets, desc="Measuring", unit=" layers", delay=2, leave=False, disable=args.layers)
    for name, module, parameter in bar:
        row, values = measure(name, module, args.rank, parameter, whole=bool(args.plot))
        rows.append(row)
        if args.layers:
            print(layer_line(row, width), flush=True)
        if values is not None:
            spectra[name] = values
    return rows, spectra


def _first_lines(args: argparse.Namespace) -> str:
    """What is shown, above the table."""
    rank = args.rank
    gap = f"gap = sigma_{rank + 1} / sigma_{rank}"
    text = f"{args.model}, r = {rank}: chosen are sigma_{rank} to sigma_1, {gap}"
    if args.layers:
        return text
    medians = "medians of each kind of layer, and its worst gap, energy and excess; --layers: each layer"
    return f"{text}\n{medians}"


def _draw(args: argparse.Namespace, spectra: dict) -> None:
    from mica.cli.plot import figure

    drawn = figure(spectra, args.rank, Path(args.model).name)
    kind = args.plot.suffix[1:].lower()
    write_file("--plot", args.plot, lambda path: drawn.savefig(path, format=kind))


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


def _last_line(result: dict) -> str:
    worst = number(result["worst_energy_excess"], ".1e")
    return (
        f"{result['layers_found']} layers in {result['seconds']:.1f} s: {result['layers_proven']} proven "
        f"(worst energy excess {worst}), {result['layers_not_proven']} not proven, "
        f"{result['layers_unsuitable']} cannot be adapted"
    )
