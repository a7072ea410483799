"""``mica run``: somebody's script or module, unchanged, with PEFT's adapters on this backend."""

import argparse
import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable
from functools import partial, wraps
from importlib.machinery import BuiltinImporter, SourceFileLoader
from types import ModuleType
from typing import NoReturn

from mica.cli.arguments import MEMORY, a_name, add_command, example, memory
from mica.cli.output import explained, tell

_MAIN = "__main__"


class _RefusedCode(argparse.Action):
    """Python's option -c, which has no place here."""

    def __call__(self, parser, *_) -> NoReturn:
        parser.error("argument -c: code is not taken; write it to a file, or pipe it to mica run -")


def add_parser(commands) -> None:
    """Declare ``mica run`` on an argparse subparsers object."""
    parser = add_command(
        commands,
        "run",
        run,
        help="run a script as it is, with its adapters on this backend",
        description="Run a script, or with -m a module, as python does, with the adapters that it makes with "
        "PEFT on this backend: MiCA, LoRA and DoRA. To run it in several processes, start them with torchrun "
        "--nproc-per-node N -m mica run ... or with accelerate launch -m mica run ...",
        epilog=example(
            "mica run train.py --epochs 3",
            "mica run --memory auto -m trl.scripts.sft --config sft.yaml",
            says="The first runs train.py; the second a module of trl, with as few layers checkpointed as "
            "each batch needs. Processes that a script starts run PEFT's own code: name what trains.",
        ),
    )
    parser.usage = "mica run [options] SCRIPT [ARGS ...]\n       mica run [options] -m MODULE [ARGS ...]"
    add = parser.add_argument
    add("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as for python -m")
    add("--explain", action="store_true", help="at the end show how each adapted layer ran, and why")
    add("--no-lora", action="store_false", dest="lora", help="leave LoRA and DoRA to PEFT's own code")
    add("--compute-dtype", choices=("float32",), help="of the low-rank products; otherwise x's")
    add("--device", metavar="NAME", help="where MiCA's B is solved: auto, cpu, cuda:1, ...")
    add("--recompute", choices=("norms", "activations"), help="what is computed again, and not kept")
    add("--memory", type=memory, metavar="GIB", help=MEMORY)
    add("-c", action=_RefusedCode, nargs=0, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("script", type=a_name, metavar="SCRIPT", help="a file, a folder or zip file with __main__.py, or -")
    add("arguments", nargs=argparse.REMAINDER, metavar="ARGS", help="its own arguments")


def run(args: argparse.Namespace) -> Callable[[], int]:
    """Read the script and switch the backend on; what is returned runs it, see `_as_main`.

    Raises UsageError if there is no such file, and for a setting that `mica.fast.enable` refuses.
    """
    program, places = _program(args.script, args.module)

    import torch

    import mica.fast

    settings = {
        "lora": args.lora,
        "device": args.device,
        "recompute": args.recompute,
        "memory": args.memory,
    }
    if args.compute_dtype is not None:
        settings["compute_dtype"] = getattr(torch, args.compute_dtype)
    with explained(f"--device {args.device}", ValueError):
        mica.fast.enable(**{name: value for name, value in settings.items() if value is not None})
    models = []
    if args.explain and os.environ.get("RANK", "0") == "0":
        models = _wrapped_from_now_on()
    return partial(_as_main, args, program, places, models)


def _program(script: str, is_module: bool) -> tuple[Callable[[], object], list[str]]:
    """What runs the script in the main module, and what python, except by -P, puts before `sys.path` for it.

    For modules, folders and zip files python itself calls this function of runpy's. The public ones put
    another main module back at the end, at which threads and exit handlers may look.
    """
    path = os.path.join(os.getcwd(), script)  # as python does: neither normalised nor resolved
    if is_module:
        return partial(runpy._run_module_as_main, script), [os.getcwd()]
    if script == "-":
        return partial(_execute, sys.stdin.buffer.read(), "<stdin>", BuiltinImporter), [""]
    if pkgutil.get_importer(path) is not None:
        return partial(_execute_contents, path), []
    with explained(script, OSError), io.open_code(path) as file:
        program = partial(_execute, file.read(), path, SourceFileLoader(_MAIN, path))
    return program, [os.path.dirname(os.path.realpath(path))]


def _wrapped_from_now_on() -> list:
    """A list to which every model is added that PEFT puts adapters into, and which keeps them alive."""
    from peft.tuners.tuners_utils import BaseTuner

    models = []
    begin = BaseTuner.__init__

    @wraps(begin)
    def remember(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.model not in models:
            models.append(self.model)

    BaseTuner.__init__ = remember
    return models


def _as_main(args: argparse.Namespace, program: Callable[[], object], places: list[str], models: list) -> int:
    """Run ``program`` with what python gives to a script. What it raises ends the process as it would there.

    Its main module stays that to the end of the process. A traceback is shown without our frames, by whatever
    hook the program has set.
    """
    sys.argv = [args.script, *args.arguments]
    if not getattr(sys.flags, "safe_path", False):  # new in Python 3.11
        sys.path[:1] = places
    main = ModuleType(_MAIN)
    main.__annotations__ = {}
    main.__builtins__ = builtins
    sys.modules[_MAIN] = main
    try:
        program()
    except SystemExit:
        raise
    except BaseException as error:
        _hide_our_frames(error)
        raise
    finally:
        fast = sys.modules["mica.fast"]
        for model in models:
            tell(str(fast.explain(model)))
        if args.memory and not args.explain and os.environ.get("RANK", "0") == "0":
            tell(fast.checkpointing.summary())
    return 0


def _execute(source: bytes, file: str, loader: object) -> None:
    """Run a script in the main module."""
    main = sys.modules[_MAIN]
    main.__file__ = file
    main.__cached__ = None
    main.__loader__ = loader
    exec(compile(source, file, "exec"), vars(main))


def _execute_contents(path: str) -> None:
    """Run the __main__.py of a folder or a zip file, which is searched for modules also by python -P."""
    sys.path.insert(0, path)
    runpy._run_module_as_main(_MAIN, alter_argv=False)


def _hide_our_frames(error: BaseException) -> None:
    """Have Python show the traceback of ``error``, which ends the program, without what is ours in it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    show = sys.excepthook
    sys.excepthook = lambda kind, error, _: show(kind, error.with_traceback(trace), trace)
