"""``mica doctor``: what this machine has, which path MiCA layers take on it, and what is broken; or where an
adapter can be served."""

import argparse
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec

from mica import __version__
from mica.cli.arguments import a_path, add_command
from mica.cli.extras import DISTRIBUTION
from mica.cli.output import check_file, dtype_name, explained, one_line, write_json
from mica.errors import UsageError

_SETTINGS = {"MICA_BACKEND": "auto", "TRITON_INTERPRET": "0"}  # and their defaults


def add_parser(commands) -> None:
    """Declare ``mica doctor`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "doctor", run),
        help="what this machine has, which path MiCA layers take on it, and what is broken",
        description="Show versions, devices, whether MiCA layers run on Triton kernels there and why, "
        "whether PEFT can be patched, and the caches. Exit status: 0 if nothing is broken, else 1. With "
        "--adapter: where that can be served and why not, and nothing of the machine; exit status 0.",
    )
    help = "output folder of mica adapt, or any PEFT LoRA: say where it can be served"
    parser.add_argument("--adapter", type=a_path, metavar="DIR", help=help)
    parser.add_argument("--json", type=a_path, metavar="FILE", help="also write the findings as JSON")


@contextmanager
def _noted(problems: list[str], what: str) -> Iterator[None]:
    """Whatever a library raises within, a missing one, one of another version, a driver, is a problem."""
    try:
        yield
    except Exception as error:
        problems.append(f"{what}: {type(error).__name__}: {one_line(error)}")


def _versions() -> list[dict]:
    """MiCA, Python and requirements: name, version (None: not installed), problem (None: ok)."""
    from packaging.requirements import Requirement

    rows = [{"name": "mica", "version": __version__, "problem": None}]
    try:
        python = f"Python{metadata(DISTRIBUTION)['Requires-Python']}"
        needs = [Requirement(line) for line in (python, *requires(DISTRIBUTION))]
    except PackageNotFoundError:
        rows[0]["problem"] = f"{DISTRIBUTION} is not installed, so the versions that it needs are not known"
        return rows
    for need in needs:
        if "extra" in str(need.marker):
            continue
        installed = problem = None
        with suppress(PackageNotFoundError):
            installed = platform.python_version() if need.name == "Python" else version(need.name)
        if installed is None and (need.marker is None or need.marker.evaluate()):
            problem = f"{need.name} is not installed, and MiCA needs {need.specifier}"
        elif installed is not None and not need.specifier.contains(installed, prereleases=True):
            problem = f"{need.name} {installed} is not among the supported versions, {need.specifier}"
        rows.append({"name": need.name, "version": installed, "problem": problem})
    return rows


def _devices(problems: list[str], has_triton: bool) -> list[dict]:
    """A row for the CPU, then one for each CUDA or ROCm device.

    name; a CPU's threads; a GPU's memory_gib, architecture, target (None: none compiled). path ("kernel",
    "reference", or "error": MiCA layers raise), reason, and trial of a compiled kernel.
    """
    import torch

    from mica.kernels import runtime
    from mica.paths import choose

    with warnings.catch_warnings(record=True) as warned:  # of a driver that is too old, for one
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    problems.extend(f"torch warns of its GPU: {one_line(w.message)}" for w in warned)
    cpu = {"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}
    rows = [cpu, *({"device": f"cuda:{index}"} for index in range(count))]
    for row in rows:
        device, capability, demand = torch.device(row["device"]), (0, 0), choose.requested()
        row |= {"path": "error", "reason": None, "trial": "not tried"}
        with _noted(problems, f"MiCA layers cannot run on {device}"):  # nor will they
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                capability = torch.cuda.get_device_capability(device)
                row |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
                row |= {"architecture": "compute capability {}.{}".format(*capability), "target": None}
                if torch.version.hip:
                    row["architecture"] = properties.gcnArchName
                elif has_triton:
                    from mica.kernels.common import INTERPRETED, target_of

                    row["target"] = None if INTERPRETED.value else target_of(device)
            reason = row["reason"] = choose.why_not_kernels(device, 16, torch.bfloat16)
            row["path"] = "kernel" if not reason else "error" if demand == "triton" else "reference"
            if row.get("target") and demand != "reference" and capability >= runtime.MINIMUM_CAPABILITY:
                row["trial"] = "failed" if reason else "passed"
        if row["trial"] == "failed":
            problems.append(f"the kernels do not run on {device}: {row['reason']}")
    return rows


def _products() -> dict[str, dict]:
    """For bf16 and fp16: the time of a frozen layer's products over fp32's, whether the machine is too busy
    for that, and whether MiCA uses them."""
    from mica.dtypes import SIXTEEN_BIT
    from mica.paths.products import has_native, slowdown

    names = ("x Wᵀ", "dy W", "busy")  # those of a `Slowdown`
    return {
        dtype_name(dtype): dict(zip(names, slowdown(dtype), strict=True)) | {"native": has_native(dtype)}
        for dtype in SIXTEEN_BIT
    }


def _peft(problems: list[str]) -> dict:
    """patched (the number of functions that mica.fast replaced), mismatches (sentences) and note.

    note: what runs on the backend with this release of PEFT, where that needs to be said; else None.
    """
    peft = {"patched": 0, "mismatches": [], "note": None}
    with _noted(problems, "mica.fast cannot be imported"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mismatches are listed one by one
        from peft import __version__ as release

        from mica.fast import known_peft, patching

        is_patched = patching.install()
        found = patching.compare()
        parts = [f"{text} ({part})" for part, texts in found.left.items() for text in texts]
        peft["mismatches"] = [*found.refused, *parts, *(f"{text} (optional)" for text in found.optional)]
        if is_patched:
            peft["patched"] = patching.count()
            peft["note"] = known_peft.sentence(release)
        else:
            problems.append(f"mica.fast leaves this PEFT as it is: {', '.join(found.refused)}")
    return peft


def _caches() -> dict:
    """The initialisation cache's folder (None: off), is_writable, distrusted (why it is not used) or None."""
    from mica.subspace.cache import default_cache, distrusted

    cache = default_cache()
    if not cache:
        return dict.fromkeys(("folder", "is_writable", "distrusted"))
    nearest = next(path for path in (cache.folder, *cache.folder.parents) if os.path.exists(path))
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {"folder": str(cache.folder), "is_writable": writable, "distrusted": distrusted(cache.folder)}


def examine() -> dict:
    """All facts; ``problems`` says what is broken. Without torch, or another package, versions only.

    Raises UsageError if ``MICA_BACKEND`` or ``MICA_CACHE_SIZE`` has no valid value.
    """
    report = {"versions": _versions(), "settings": {name: os.environ.get(name) for name in _SETTINGS}}
    problems = report["problems"] = [row["problem"] for row in report["versions"] if row["problem"]]
    usable = set()
    if any(row["version"] is None and row["name"] != "triton" for row in report["versions"]):
        return report
    for name in ("torch", "triton"):
        if name == "torch" or find_spec(name) is not None:
            with _noted(problems, f"{name} cannot be imported"):
                import_module(name)
                usable.add(name)
    if "torch" not in usable:
        return report
    from torch.version import cuda, hip

    from mica.paths import choose

    try:
        demand, report["caches"] = choose.requested(), _caches()
    except ValueError as error:
        raise UsageError(str(error)) from error
    report["torch_build"] = f"ROCm {hip} build" if hip else f"CUDA {cuda} build" if cuda else "CPU build"
    report["devices"] = _devices(problems, "triton" in usable)
    if demand == "triton" and all(row["path"] != "kernel" for row in report["devices"]):
        problems.append("MICA_BACKEND=triton demands kernels, and no device here can run them")
    return report | {"products": _products(), "peft": _peft(problems)}


def _times(row: dict) -> str:
    shown = (f"{row[name]:.{2 if row[name] < 10 else 3}g}" for name in ("x Wᵀ", "dy W"))
    times = "x Wᵀ takes {} times float32's time, dy W takes {} times float32's time".format(*shown)
    if row["busy"]:
        times = "not measured, because other processes keep this machine busy"
    through = "" if row["native"] else "; adapted layers go through float32, which --dtype auto takes"
    return f"small ones: {times}{through}"


def _lines(report: dict) -> Iterator[tuple[str, str]]:
    """The report as text: lines of a label and its text."""
    note_on_peft = report.get("peft", {}).get("note")
    for row in report["versions"]:
        note = row["problem"] or ("ok" if row["version"] else "not needed on this system")
        if row["name"] == "peft" and note_on_peft and not row["problem"]:
            note = "see PEFT below"
        build = f", {report['torch_build']}" if row["name"] == "torch" and "torch_build" in report else ""
        yield row["name"], f"{row['version'] or 'not installed':14}  {note}{build}"
    for name, value in report["settings"].items():
        yield name, value or f"{_SETTINGS[name]} (not set)"
    if "devices" not in report:
        return
    units = {"threads": "{} threads", "memory_gib": "{} GiB", "architecture": "{}", "target": "target {}"}
    for row in report["devices"]:
        parts = [text.format(row[key]) for key, text in units.items() if row.get(key)]
        yield row["device"], ", ".join([row.get("name", "unknown"), *parts])
        yield "  MiCA layers", row["path"] + (f": {row['reason']}" if row["reason"] else "")
        if row["device"] != "cpu":
            yield "  trial kernel", row["trial"]
            continue
        for dtype, ratios in report["products"].items():
            yield f"  {'bf16' if dtype == 'bfloat16' else 'fp16'} products", _times(ratios)
    if len(report["devices"]) == 1:
        yield "kernels", "none compiled: no GPU here"
    yield "PEFT", f"mica.fast replaces {report['peft']['patched']} of its functions"
    if note_on_peft:
        yield "  note", note_on_peft
    yield from (("  mismatch", mismatch) for mismatch in report["peft"]["mismatches"])
    caches = report["caches"]
    state = "writable" if caches["is_writable"] else "not writable, so nothing new is kept"
    if caches["distrusted"]:
        state = f"not used, because it {caches['distrusted']}"
    yield "cache", f"{caches['folder']}, {state}" if caches["folder"] else "off"


def run(args: argparse.Namespace) -> int:
    """Run the command: 0 if all that this machine can do works, 1 if something is broken.

    ``--json`` is what `examine` returns; with ``--adapter``, what `serving.judge` does. Raises UsageError.
    """
    if args.json:
        check_file("--json", args.json)
    if args.adapter:
        with explained("--adapter needs packages that `mica doctor` lists", ImportError):
            from mica.cli import serving
        report = serving.judge(args.adapter)
    else:
        report = examine()
    if args.json:
        write_json("--json", args.json, report)
    for label, text in serving.lines(report) if args.adapter else _lines(report):
        print(f"{label:16}  {text}")
    if args.adapter:
        return 0
    broken = "; ".join(report["problems"])
    print(f"broken: {broken}" if broken else "everything that this machine can do works")
    return 1 if broken else 0
