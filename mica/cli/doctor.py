"""``mica doctor``: what this machine has, which path MiCA layers take on it, and what is broken."""

import argparse
import os
import platform
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec

from mica import __version__
from mica.cli.arguments import a_path, add_command, example
from mica.cli.extras import DISTRIBUTION
from mica.cli.output import check_file, dtype_name, one_line, write_json
from mica.errors import UsageError

_SETTINGS = {"MICA_BACKEND": "auto", "TRITON_INTERPRET": "0"}  # and their defaults


def add_parser(commands) -> None:
    """Declare ``mica doctor`` on an argparse subparsers object."""
    parser = add_command(
        *(commands, "doctor", run),
        help="what this machine has, which path MiCA layers take on it, and what is broken",
        description="Show versions, devices, whether MiCA layers run on Triton kernels there and why, "
        "whether PyTorch's operators are called from C++ (which this compiles if it has not been), "
        "whether PEFT can be patched, and the caches. Exit status: 0 if nothing is broken, else 1.",
        epilog=example(
            "mica doctor --json findings.json",
            says="This prints what the machine has, and writes the same to findings.json.",
        ),
    )
    parser.add_argument("--json", type=a_path, metavar="FILE", help="also write the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command: 0 if all that this machine can do works, 1 if something is broken.

    ``--json`` is what `examine` returns. Raises UsageError.
    """
    if args.json:
        check_file("--json", args.json)

    report = examine()
    if args.json:
        write_json("--json", args.json, report)
    _print(_lines(report))
    if report["problems"]:
        print(f"broken: {'; '.join(report['problems'])}")
        return 1
    print("everything that this machine can do works")
    return 0


def _print(lines: Iterable[tuple[str, str]]) -> None:
    for label, text in lines:
        print(f"{label:16}  {text}")


# ---------------------------------------------------------------------------------------------------
# the findings
# ---------------------------------------------------------------------------------------------------


def examine() -> dict:
    """All facts; ``problems`` says what is broken. Without torch, or another package, versions only.

    Raises UsageError if ``MICA_BACKEND`` or ``MICA_CACHE_SIZE`` has no valid value.
    """
    versions = _versions()
    problems = [row["problem"] for row in versions if row["problem"]]
    settings = {name: os.environ.get(name) for name in _SETTINGS}
    report = {"versions": versions, "settings": settings, "problems": problems}
    if any(row["version"] is None and row["name"] != "triton" for row in versions):
        return report
    importable = _importable(problems)
    if "torch" not in importable:
        return report

    from mica.paths import choose

    try:
        demand = choose.requested()
        report["caches"] = _caches()
    except ValueError as error:
        raise UsageError(str(error)) from error
    report["torch_build"] = _torch_build()
    report["devices"] = _devices(problems, has_triton="triton" in importable)
    if demand == "triton" and all(row["path"] != "kernel" for row in report["devices"]):
        problems.append("MICA_BACKEND=triton demands kernels, and no device here can run them")
    report["products"] = _products()
    report["native"] = _native(problems)
    report["peft"] = _peft(problems)
    return report


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

    mica = {"name": "mica", "version": __version__, "problem": None}
    try:
        python = Requirement(f"Python{metadata(DISTRIBUTION)['Requires-Python']}")
        needs = [python, *(Requirement(line) for line in requires(DISTRIBUTION))]
    except PackageNotFoundError:
        mica["problem"] = f"{DISTRIBUTION} is not installed, so the versions that it needs are not known"
        return [mica]
    rows = [_version_row(need) for need in needs if "extra" not in str(need.marker)]
    return [mica, *rows]


def _version_row(need) -> dict:
    """The row of a `packaging.requirements.Requirement`."""
    installed = _installed_version(need.name)
    problem = None
    if installed is None:
        if need.marker is None or need.marker.evaluate():
            problem = f"{need.name} is not installed, and MiCA needs {need.specifier}"
    elif not need.specifier.contains(installed, prereleases=True):
        problem = f"{need.name} {installed} is not among the supported versions, {need.specifier}"
    return {"name": need.name, "version": installed, "problem": problem}


def _installed_version(name: str) -> str | None:
    if name == "Python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _importable(problems: list[str]) -> set[str]:
    """Which of torch and triton can be imported. A missing triton is no problem."""
    importable = set()
    for name in ("torch", "triton"):
        if name == "triton" and find_spec(name) is None:
            continue
        with _noted(problems, f"{name} cannot be imported"):
            import_module(name)
            importable.add(name)
    return importable


def _torch_build() -> str:
    from torch.version import cuda, hip

    if hip:
        return f"ROCm {hip} build"
    if cuda:
        return f"CUDA {cuda} build"
    return "CPU build"


def _devices(problems: list[str], has_triton: bool) -> list[dict]:
    """A row for the CPU, then one for each CUDA or ROCm device.

    name; a CPU's threads; a GPU's memory_gib, architecture, target (None: none compiled). path ("kernel",
    "reference", or "error": MiCA layers raise), reason, and trial of a compiled kernel.
    """
    import torch

    with warnings.catch_warnings(record=True) as warned:  # about a driver that is too old, for one
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for warning in warned:
        problems.append(f"torch warns of its GPU: {one_line(warning.message)}")

    rows = [{"device": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    for index in range(count):
        rows.append({"device": f"cuda:{index}"})
    for row in rows:
        row |= {"path": "error", "reason": None, "trial": "not tried"}
        # what cannot be asked here cannot run here either
        with _noted(problems, f"MiCA layers cannot run on {row['device']}"):
            if row["device"] != "cpu":
                _describe_gpu(row, has_triton)
            _find_path(row)
        if row["trial"] == "failed":
            problems.append(f"the kernels do not run on {row['device']}: {row['reason']}")
    return rows


def _describe_gpu(row: dict, has_triton: bool) -> None:
    """Add name, memory_gib, architecture and target to the row of a GPU."""
    import torch

    device = torch.device(row["device"])
    properties = torch.cuda.get_device_properties(device)
    major, minor = torch.cuda.get_device_capability(device)
    row["name"] = properties.name
    row["memory_gib"] = round(properties.total_memory / 2**30, 1)
    row["architecture"] = f"compute capability {major}.{minor}"
    row["target"] = None
    if torch.version.hip:
        row["architecture"] = properties.gcnArchName
    elif has_triton:
        from mica.kernels.common import INTERPRETED, target_of

        if not INTERPRETED.value:
            row["target"] = target_of(device)


def _find_path(row: dict) -> None:
    """Set path, reason and trial in the row of a device."""
    import torch

    from mica.kernels import runtime
    from mica.paths import choose

    device = torch.device(row["device"])
    demand = choose.requested()
    reason = choose.why_not_kernels(device, 16, torch.bfloat16)
    row["reason"] = reason
    if not reason:
        row["path"] = "kernel"
    elif demand != "triton":
        row["path"] = "reference"

    is_tried = False
    if row.get("target") and demand != "reference":
        is_tried = torch.cuda.get_device_capability(device) >= runtime.MINIMUM_CAPABILITY
    if is_tried:
        row["trial"] = "failed" if reason else "passed"


def _products() -> dict[str, bool]:
    """Whether the processor has instructions for each 16-bit dtype."""
    from mica.dtypes import SIXTEEN_BIT
    from mica.paths.products import has_native

    return {dtype_name(dtype): has_native(dtype) for dtype in SIXTEEN_BIT}


def _native(problems: list[str]) -> dict:
    """The folder with the compiled C++ that calls PyTorch's operators, which may be compiled now; or why_not.

    A machine without a compiler, or with one that fails, is not broken: the calls come from Python, with the
    same results.
    """
    found = {"folder": None, "why_not": None}
    with _noted(problems, "the C++ cannot be examined"):
        from mica import native

        module = native.module()
        found["why_not"] = native.why_not()
        if module is not None:
            found["folder"] = os.path.dirname(module.__file__)
    return found


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
        peft["mismatches"] = list(found.refused)
        for part, texts in found.left.items():
            peft["mismatches"] += [f"{text} ({part})" for text in texts]
        peft["mismatches"] += [f"{text} (optional)" for text in found.optional]
        if is_patched:
            peft["patched"] = len(found.patches)
            peft["note"] = known_peft.sentence(release)
        else:
            problems.append(f"mica.fast leaves this PEFT as it is: {', '.join(found.refused)}")
    return peft


def _caches() -> dict:
    """The initialisation cache's folder (None: off), is_writable, distrusted (why it is not used) or None."""
    from mica.folders import why_untrusted
    from mica.subspace.cache import default_cache

    cache = default_cache()
    if not cache:
        return {"folder": None, "is_writable": None, "distrusted": None}
    nearest = next(path for path in (cache.folder, *cache.folder.parents) if os.path.exists(path))
    is_writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {
        "folder": str(cache.folder),
        "is_writable": is_writable,
        "distrusted": why_untrusted(cache.folder),
    }


# ---------------------------------------------------------------------------------------------------
# their text, as lines of a label and what it says
# ---------------------------------------------------------------------------------------------------


def _lines(report: dict) -> Iterator[tuple[str, str]]:
    yield from _lines_of_versions(report)
    for name, default in _SETTINGS.items():
        yield name, report["settings"][name] or f"{default} (not set)"
    if "devices" not in report:
        return
    for row in report["devices"]:
        yield from _lines_of_device(row)
        if row["device"] == "cpu":
            for dtype, is_native in report["products"].items():
                short = "bf16" if dtype == "bfloat16" else "fp16"
                yield f"  {short} products", _INSTRUCTIONS[is_native]
    if len(report["devices"]) == 1:
        yield "kernels", "none compiled: no GPU here"
    yield "C++", _native_line(report["native"])
    yield from _lines_of_peft(report["peft"])
    yield "cache", _cache_line(report["caches"])


def _lines_of_versions(report: dict) -> Iterator[tuple[str, str]]:
    has_note_on_peft = bool(report.get("peft", {}).get("note"))
    for row in report["versions"]:
        if row["problem"]:
            note = row["problem"]
        elif not row["version"]:
            note = "not needed on this system"
        elif row["name"] == "peft" and has_note_on_peft:
            note = "see PEFT below"
        else:
            note = "ok"
        if row["name"] == "torch" and "torch_build" in report:
            note += f", {report['torch_build']}"
        yield row["name"], f"{row['version'] or 'not installed':14}  {note}"


def _lines_of_device(row: dict) -> Iterator[tuple[str, str]]:
    parts = [row.get("name", "unknown")]
    if row.get("threads"):
        parts.append(f"{row['threads']} threads")
    if row.get("memory_gib"):
        parts.append(f"{row['memory_gib']} GiB")
    if row.get("architecture"):
        parts.append(row["architecture"])
    if row.get("target"):
        parts.append(f"target {row['target']}")
    yield row["device"], ", ".join(parts)

    path = row["path"]
    if row["reason"]:
        path += f": {row['reason']}"
    yield "  MiCA layers", path
    if row["device"] != "cpu":
        yield "  trial kernel", row["trial"]


_INSTRUCTIONS = {
    True: "by the processor's own instructions",
    False: "no instructions: adapted layers compute in float32, which --dtype auto selects",
}


def _native_line(native: dict) -> str:
    if native["folder"]:
        return f"calls PyTorch's operators; compiled in {native['folder']}"
    if native["why_not"]:
        return f"not used, so Python calls PyTorch's operators, with the same results: {native['why_not']}"
    return "unknown"


def _lines_of_peft(peft: dict) -> Iterator[tuple[str, str]]:
    yield "PEFT", f"mica.fast replaces {peft['patched']} of its functions"
    if peft["note"]:
        yield "  note", peft["note"]
    for mismatch in peft["mismatches"]:
        yield "  mismatch", mismatch


def _cache_line(caches: dict) -> str:
    if not caches["folder"]:
        return "off"
    if caches["distrusted"]:
        state = f"not used, because it {caches['distrusted']}"
    elif caches["is_writable"]:
        state = "writable"
    else:
        state = "not writable, so nothing new is kept"
    return f"{caches['folder']}, {state}"
