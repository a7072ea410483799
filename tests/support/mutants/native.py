"""Wrong edits of how the C++ is built and found."""

_TESTS = (
    "tests/mica/native/test_build.py",
    "tests/mica/native/test_build_files.py",
    "tests/mica/native/test_build_processes.py",
)

NATIVE = {
    ("mica/native/build.py", *_TESTS, "-m", "not slow"): {
        "built": [
            ("_refuse_distrusted(folder)", "pass"),
            ("if not _is_usable(path)", "if not path.exists()"),
            ("mode=0o755, ", ""),
        ],
        "_is_usable": [
            ("if distrusted(path) is not None", "if False"),
            ("hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest()", "content[-_CHECKSUM_BYTES:]"),
        ],
        "_build": [
            ("if _is_usable(path):\n            return\n        _refuse_failed", "_refuse_failed"),
            ("return\n        _refuse_failed(failure)", "return"),
            ("abandoned.unlink(missing_ok=True)", "pass"),
            (", timeout=TIME_LIMIT", ""),
        ],
        "_refuse_failed": [("and time.time() - failure.stat().st_mtime < FAILURE_COUNTS_FOR", "")],
        "_identity": [("os.path.realpath(shutil.which(compiler[0]))", "compiler[0]")],
        "_compile": [
            ("if problem is None and not temporary.exists()", "if False"),
            ("temporary.unlink(missing_ok=True)", "pass"),
            ("failure.write_text(", "print("),
        ],
        "_problem_of": [('errors="replace",', "")],
        "_end": [("os.killpg(process.pid, signal.SIGKILL)", "process.kill()")],
        "_seal": [("path.chmod(0o644)", "pass")],
        "_say": [("contextlib.suppress(OSError, ValueError)", "contextlib.suppress(OSError)")],
        "_compiler": [
            ("shlex.split(setting)", "setting.split()"),
            ("if words and shutil.which(words[0]) is None", "if False"),
        ],
        "_key": [
            ("str(torch.version.git_version),", ""),
            ("digest.update(source.read_bytes())", "source.read_bytes()"),
        ],
        "_FILES": [(', "layer.h"', "")],
    },
    ("mica/native/__init__.py", "tests/mica/native/test_native.py"): {
        "_find": [("with _lock", "if True"), ("_found.get(raw) or _load()", "_load()")],
        "_folder": [('value if value.strip() else "on"', "value")],
        "module_if_built": [
            ("if raw in _not_built:", "if False:"),
            ("folder is None or", ""),
            ("or not build.is_built(folder)", ""),
            ("if raw not in _found:", "if True:"),
        ],
        "_load": [("if folder is None", "if False"), ("_configure(loaded)", "pass")],
    },
    ("mica/native/__init__.py", "tests/mica/native/test_build_files.py", "-k", "not_load"): {
        "_load": [("except ImportError", "except ModuleNotFoundError")],
    },
    ("mica/cli/doctor.py", "tests/mica/cli/test_doctor.py", "-k", "c_plus_plus"): {
        "_native": [('_noted(problems, "the C++ cannot be examined")', '_noted([], "")')],
        "_native_line": [('if native["folder"]', "if True")],
    },
}
