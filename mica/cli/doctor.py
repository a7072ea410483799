"""``mica doctor``: what this machine has, which path MiCA layers take on it, and what is broken."""

import argparse
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version

from mica import __version__
from mica.cli.arguments import add_command, example
from mica.cli.extras import DISTRIBUTION
from mica.cli.output import dtype_name, one_line

Findings = Iterator[tuple[str, str]]  # label, text
OPTIONAL = ("accelerate", "datasets", "gguf", "trl", "bitsandbytes")  # what extras and recipes use
_VARIABLES = ("MKL_NUM_THREADS", "OMP_NUM_THREADS", "TRITON_INTERPRET")  # beside MICA_...
# How the reasons of `mica.kernels.runtime` begin where kernels should run on a device and do not
_FAILED = "a trial kernel"


def add_parser(commands) -> None:
    """Declare ``mica doctor`` on an argparse subparsers object."""
    add_command(
        commands,
        "doctor",
        run,
        help="what this machine has, which path MiCA layers take on it, and what is broken",
        description="Show versions, devices, whether MiCA layers run on Triton kernels there and why, "
        "whether PyTorch's operators are called from C++ (which this compiles if it has not been), "
        "whether PEFT can be patched, and the caches. Exit status: 0 if nothing is broken, else 1.",
        epilog=example("mica doctor", says="This prints what the machine has, a line for each finding."),
    )


def run(args: argparse.Namespace) -> int:
    """Run the command: 0 if all that this machine can do works, 1 if something is broken."""
    findings, problems = examine()
    for label, text in findings.items():
        print(f"{label:16}  {text}")
    if problems:
        print(f"broken: {'; '.join(problems)}")
        return 1
    print("everything that this machine can do works")
    return 0


def examine() -> tuple[dict[str, str], list[str]]:
    """What there is, as label -> text, and what is broken, as sentences."""
    problems = []
    findings = dict(_versions(problems))
    for part, examined in {"devices": _devices, "C++": _cpp, "PEFT": _peft, "cache": _cache}.items():
        with _noted(problems, part):
            findings.update(examined(problems))
    return findings, problems


@contextmanager
def _noted(problems: list[str], what: str) -> Iterator[None]:
    """Whatever a library raises within, a missing one, one of another version, a driver, is a problem."""
    try:
        yield
    except Exception as error:
        problems.append(f"{what}: {type(error).__name__}: {one_line(error)}")


def _versions(problems: list[str]) -> Findings:
    """MiCA, Python, what MiCA requires on this system or can use, and what the environment sets."""
    from packaging.requirements import Requirement

    yield "mica", __version__
    yield "Python", platform.python_version()
    try:
        needs = [Requirement(line) for line in requires(DISTRIBUTION)]
    except PackageNotFoundError:
        problems.append(f"{DISTRIBUTION} is not installed, so the versions that it needs are not known")
        needs = []
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):  # of another system
            continue
        installed = _installed(need.name)
        if installed is None:
            problems.append(f"{need.name} is not installed, and MiCA needs {need.specifier}")
            continue
        yield need.name, installed
        if not need.specifier.contains(installed, prereleases=True):
            problems.append(f"{need.name} {installed} is not among the supported versions, {need.specifier}")

    for name in OPTIONAL:
        yield name, _installed(name) or "not installed"
    for name, value in sorted(os.environ.items()):
        if value and (name.startswith("MICA_") or name in _VARIABLES):
            yield name, value


def _installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices(problems: list[str]) -> Findings:
    """The CPU, then each CUDA or ROCm device: what it is, and how MiCA layers run there and why.

    That is "kernels", "reference", or "error" where they would raise.
    """
    import torch

    from mica.dtypes import SIXTEEN_BIT
    from mica.paths import choose
    from mica.paths.products import has_native

    slow = [dtype_name(dtype) for dtype in SIXTEEN_BIT if not has_native(dtype)]
    if slow:
        what = "adapted layers compute in float32, which --dtype auto selects"
        yield "16-bit products", f"the CPU has no instructions for {' and '.join(slow)}: {what}"

    with warnings.catch_warnings(record=True) as warned:  # about a driver that is too old, for one
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for warning in warned:
        problems.append(f"torch warns of its GPU: {one_line(warning.message)}")

    forms = set()
    for name in ("cpu", *(f"cuda:{index}" for index in range(count))):
        device = torch.device(name)
        with _noted(problems, name):  # what cannot be asked here cannot run here either
            yield name, _description(device)
            choice = choose.choice_of("linear", device, 16, (torch.bfloat16,))
            forms.add(choice.form)
            reason = choice.reason or ""
            yield f"{name}: layers", f"{choice.form}: {reason}".removesuffix(": ")
            if choice.form == choose.KERNELS:
                yield from _measured(name, device)
            if reason.startswith(_FAILED):
                problems.append(f"the kernels do not run on {name}: {reason}")
    if forms == {choose.ERROR}:
        problems.append("MICA_BACKEND=triton demands kernels, and no device here can run them")


def _measured(name: str, device) -> Findings:
    """Which form of each kind of layer is the fastest on this device, and when that was measured."""
    from mica.paths import tuning

    table = tuning.table(device)
    if not table.is_on:
        yield f"{name}: measured", f"nothing, because {tuning.why_not_now(device)}"
        return
    yield f"{name}: measured", f"kinds of layers: {len(table.stored)}, in {table.path}"
    for number, (kind, layer) in enumerate(table.stored.items(), 1):
        what = f"forward {layer.forward.found()}; backward {layer.backward.found()}"
        yield f"{name}: kind {number}", f"{kind}: {what} ({layer.day})"


def _description(device) -> str:
    import torch

    if device.type == "cpu":
        return f"{platform.machine()}, {_threads(torch.get_num_threads())}"
    properties = torch.cuda.get_device_properties(device)
    architecture = "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    if torch.version.hip:
        architecture = properties.gcnArchName
    return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, {architecture}"


def _threads(number: int) -> str:
    """PyTorch's number of threads, and how many processors this process may use."""
    said = f"{number} {'thread' if number == 1 else 'threads'}"
    if hasattr(os, "sched_getaffinity"):
        return f"{said}, may use {len(os.sched_getaffinity(0))} of {os.cpu_count()} processors"
    return f"{said}, {os.cpu_count()} processors"


def _cpp(problems: list[str]) -> Findings:
    """Whether C++ calls PyTorch's operators, which may be compiled now.

    A machine without a compiler, or with one that fails, is not broken: the calls come from Python, with the
    same results.
    """
    from mica import native

    module = native.module()
    if module is not None:
        yield "C++", f"calls PyTorch's operators; compiled in {os.path.dirname(module.__file__)}"
    else:
        yield (
            "C++",
            f"not used, so Python calls PyTorch's operators, with the same results: {native.why_not()}",
        )


def _peft(problems: list[str]) -> Findings:
    """Whether mica.fast can patch PEFT; of a release that is not known, what runs on the backend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is said here
        from peft import __version__ as release

        from mica.fast import known_peft, patching

        is_patched = patching.install()
        found = patching.compare()
        if is_patched:
            replaced = f"mica.fast replaces {len(found.patches)} of its functions"
            yield "PEFT", known_peft.sentence(release) or replaced
        else:
            problems.append(f"mica.fast leaves this PEFT as it is: {', '.join(found.refused)}")


def _cache(problems: list[str]) -> Findings:
    """The folder of the initialisation cache, and why it is not used."""
    from mica.folders import why_untrusted
    from mica.subspace.cache import default_cache

    cache = default_cache()
    if cache is None:
        yield "cache", "off"
        return
    text = str(cache.folder)
    distrusted = why_untrusted(cache.folder)
    if distrusted:
        text += f", not used, because it {distrusted}"
    yield "cache", text
