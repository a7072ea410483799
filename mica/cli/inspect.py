"""``mica inspect``: what MiCA would adapt in a model, layer by layer, without adapting it."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from mica.cli.arguments import a_name, a_path, a_source, add_command, add_dtype_options, count
from mica.cli.extras import how_to_install
from mica.cli.output import check_file, dtype_name, write_file, write_json
from mica.errors import UsageError

PLOT_SUFFIXES = (".png", ".pdf", ".svg")


def add_parser(commands) -> None:
    """Declare ``mica inspect`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "inspect", run),
        help="the spectra of a model's layers, and what MiCA would adapt in them",
        description="Show, for every layer that MiCA would adapt, the singular values at the cut, the share "
        "of the weight's energy in the chosen subspace, and the certificate of the solver. Trains nothing "
        "and does not change the model.",
    )
    add = parser.add_argument
    add("model", type=a_source, metavar="MODEL", help="Hub id, checkpoint folder or GGUF file")
    add("--rank", type=count(), default=16, help="rank of the adapter")
    layers = "all-linear (all but output layer and routers, with experts) or names, like q_proj,embed_tokens"
    add(
        "--target-modules",
        type=a_name,
        default="all-linear",
        metavar="NAMES",
        help=f"what to look at: {layers}",
    )
    add_dtype_options(parser, "dtype of the weights; auto: that of the checkpoint, float32 for GGUF")
    add("--plot", type=a_path, metavar="FILE", help="also draw the whole spectra: .png, .pdf or .svg")
    add("--json", type=a_path, metavar="FILE", help="also write the table as JSON")


def _line(row, width: int) -> str:
    """One row of the table, without a line end."""

    def formatted(value, spec):
        return "-" if value is None else format(value, spec)

    shape = " x ".join(map(str, row.shape)) if row.shape else "-"
    start = f"{row.name:{width}}  {shape:>18}  {row.dtype or '-':8}  "
    if row.reason:
        return f"{start}cannot be adapted: {row.reason}"
    values = (row.sigma_max, row.sigma_above, row.sigma_largest, row.sigma_smallest)
    sigmas = "  ".join(f"{formatted(value, '.4g'):>9}" for value in values)
    share = None if row.energy_share is None else 100 * row.energy_share
    numbers = f"{sigmas}  {formatted(row.gap, '.4g'):>7}  {formatted(share, '.2g') + '%':>8}"
    certificate = f"proven, {row.energy_excess:.1e}" if row.proven else "not proven"
    end = f"  {row.quantised}, dequantised" if row.quantised else ""
    end += f"  of expert {row.expert}" if row.expert is not None else ""
    return f"{start}{numbers}  {row.method:6}  {certificate:15}  {row.seconds:6.2f}{end}"


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


def _targets(model, args: argparse.Namespace):
    """The `mica.cli.targets.Targets` of the options; ``model`` may be a `loading.skeleton`.

    Raises UsageError if a name matches nothing, or if all layers are too small for the rank.
    """
    from mica.cli.targets import ALL_LINEAR, features, find_targets, saved_parameters

    found = find_targets(model, args.target_modules, experts=args.target_modules == ALL_LINEAR or None)
    sizes = {name: features(module) for name, module in found.modules.items()}
    for name, shape in saved_parameters(model, found.parameters).values():
        sizes[name] = shape[-2:]
    ranks = {name: min(size) for name, size in sizes.items() if size is not None}
    if ranks and max(ranks.values()) < args.rank:
        name = max(ranks, key=ranks.get)
        shape = " x ".join(map(str, sizes[name]))
        largest = f"the largest, {name}, has {shape} weights, so at most {ranks[name]} fits"
        raise UsageError(f"--rank {args.rank}: no layer can be adapted: {largest}")
    return found


def run(args: argparse.Namespace) -> int:
    """Run the command: cheap checks first, a line as soon as a layer is measured, files at the end.

    ``--json`` is one object: model, dtype, device, rank, target_modules (as given), what `summary` returns,
    and layers, a list of objects with the fields of `mica.cli.spectra.Row`, in the order of the table.
    Unknown values are null.

    Raises UsageError; also where no layer can be adapted: before the weights are read where the rank alone
    forbids it, else after everything else.
    """
    if args.json:
        check_file("--json", args.json)
    if args.plot:
        check_file("--plot", args.plot, PLOT_SUFFIXES)
        try:
            from mica.cli.plot import figure
        except ImportError as error:
            raise UsageError(f"--plot needs matplotlib: {how_to_install('plot')}") from error
    from mica.cli.loading import find_source, load_model, quieten_libraries, skeleton

    quieten_libraries()
    try:
        source = find_source(args.model, args.trust_remote_code)
        outline = skeleton(source)
        if outline is not None:
            _targets(outline, args)
        model = load_model(source, args.dtype)
    except UsageError as error:  # which names an option that is an argument here
        raise UsageError(str(error).removeprefix("--model ")) from error
    from mica.cli.spectra import measure, weight_of
    from mica.subspace.spectrum import spectrum

    found = _targets(model, args)
    targets = [(name, module, None) for name, module in found.modules.items()]
    targets += [(name, module, name.rpartition(".")[2]) for name, module in found.parameters.items()]
    width = max(len(name) for name, _, _ in targets)
    rows, spectra, r, start = [], {}, args.rank, time.perf_counter()
    print(f"{args.model}, r = {r}: chosen are sigma_{r} to sigma_1, gap = sigma_{r + 1} / sigma_{r}")
    sigmas = "  ".join(f"{f'sigma_{which}':>9}" for which in ("max", r + 1, r, 1))
    columns = f"{'gap':>7}  {'energy':>8}  {'method':6}  {'proven, excess':15}  {'s':>6}"
    print(f"{'layer':{width}}  {'out x in':>18}  {'dtype':8}  {sigmas}  {columns}", flush=True)
    for name, module, parameter in targets:
        row, chosen = measure(name, module, r, parameter)
        rows.append(row)
        print(_line(row, width), flush=True)
        if args.plot and chosen is not None:
            spectra[name] = spectrum(weight_of(module, r, parameter, row.expert))
            spectra[name][-r:] = chosen  # exact where the Gram matrix of a large weight is not
    s = summary(rows, time.perf_counter() - start)
    worst = "-" if s["worst_energy_excess"] is None else f"{s['worst_energy_excess']:.1e}"
    print(
        f"{s['layers_found']} layers in {s['seconds']:.1f} s: {s['layers_proven']} proven (worst energy "
        f"excess {worst}), {s['layers_not_proven']} not proven, {s['layers_unsuitable']} cannot be adapted"
    )
    if args.json:
        report = {"model": args.model, "dtype": dtype_name(model.dtype), "device": str(model.device)}
        report |= {"rank": r, "target_modules": args.target_modules, **s}
        write_json("--json", args.json, report | {"layers": [asdict(row) for row in rows]})
    if s["layers_found"] == s["layers_unsuitable"]:
        raise UsageError(f"no layer can be adapted: {rows[0].name}: {rows[0].reason}")
    if args.plot:
        drawn, kind = figure(spectra, r, Path(args.model).name), args.plot.suffix[1:].lower()
        write_file("--plot", args.plot, lambda path: drawn.savefig(path, format=kind))
    return 0
