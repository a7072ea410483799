"""C++ for what Python and PyTorch's operators do slowly on a CPU, with the same results.

Small layers and few tokens spend most of their time in the Python around PyTorch's operators. The same
operators are called here by one node of autograd (layer.h), behind a check of the layer (check.h).
Where PyTorch has no fast operator on a CPU there is a loop: dropout and a product of bfloat16 in fp32
(loops.h), the output of an RMS norm (norm.h), and merging a weight (merging.h). All of it is built at the
first forward of a layer that this backend runs, once for each machine and PyTorch (`mica.native.build`).
Without it everything runs from Python; only dA of bfloat16 operands is then summed in another order.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from mica.folders import named_folder
from mica.kernels import runtime
from mica.native import build

# The raw value of ``MICA_NATIVE``, None where it is unset, in 0.1 µs; only for comparisons.
setting = runtime.raw_variable("MICA_NATIVE")


# The raw setting -> the module, or why there is none. C++ reads it, too.
modules: dict[object, ModuleType | str] = {}
_preparations: list[Callable[[ModuleType], None]] = []
_lock = threading.Lock()


def when_loaded(prepare: Callable[[ModuleType], None]) -> None:
    """Have ``prepare(module)`` called before anybody gets a module: what floors above know, they tell it."""
    with _lock:
        _preparations.append(prepare)
        for found in modules.values():
            if type(found) is not str:
                prepare(found)


def module() -> ModuleType | None:
    """The compiled module; None: `why_not` says why there is none. The first call in a process may build it.

    ``MICA_NATIVE`` decides: "0", "off", "false" or "no": none. Unset, or "1", "on", "true", "yes": it is kept
    in the folder ``mica/native`` of the Hugging Face cache (HF_HOME). Anything else is another folder, where
    ``~`` is expanded.
    """
    found = _find()
    return None if type(found) is str else found


def module_if_built() -> ModuleType | None:
    """`module`, if it can be had without compiling: for what gains less than a compiler takes."""
    return None if needs_compiler() else module()


def needs_compiler() -> bool:
    """Whether `module` and `why_not` would compile before they answer."""
    raw = setting()
    return raw not in modules and _is_unbuilt(raw)


@functools.cache
def _is_unbuilt(raw: object) -> bool:
    """Whether the folder that this raw setting names lacked the module when this was first asked."""
    folder = _folder()
    return folder is not None and not build.is_built(folder)


def why_not() -> str | None:
    """Why calls run from Python, in words; None if they run from C++."""
    found = _find()
    return found if type(found) is str else None


def _find() -> ModuleType | str:
    raw = setting()
    found = modules.get(raw)
    if found is None:
        with _lock:
            found = modules.get(raw) or _load()
            modules[raw] = found
    return found


def _load() -> ModuleType | str:
    folder = _folder()
    if folder is None:
        return f"MICA_NATIVE={os.environ['MICA_NATIVE']}"
    try:
        loaded = import_extension(folder, build.SOURCE)
    except build.BuildError as error:
        return str(error)
    except ImportError as error:
        hint = "delete the file, or name another folder with MICA_NATIVE"
        return f"what was compiled cannot be loaded ({error}): {hint}"
    for prepare in _preparations:
        prepare(loaded)
    return loaded


def _folder() -> Path | None:
    """Where the environment keeps what is compiled; None: nowhere, there is to be none."""
    value = os.environ.get("MICA_NATIVE", "")
    return named_folder(value if value.strip() else "on", build.default_folder())


def import_extension(folder: Path, source: Path) -> ModuleType:
    """The module of the source's name, which is compiled from that and kept in ``folder``.

    Raises:
        BuildError: see `mica.native.build.ensure_built`.
        ImportError: what was compiled cannot be loaded.
    """
    name = source.stem
    path = str(build.ensure_built(folder, source))
    spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
