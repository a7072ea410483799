"""Wrong edits of what the commands take and tell: arguments, YAML, files of text, amounts, adapters."""

_TESTS = "tests/mica/cli/adapt/test_"

VALUES = {
    ("mica/cli/adapt/opening.py", f"{_TESTS}opening.py"): {
        "_Frames.readinto": [("if self._frame is not None", "if False")],
        "_Frames._read_frame": [("self._frame.unused_data", 'b""')],
    },
    ("mica/cli/adapt/flat_yaml.py", f"{_TESTS}flat_yaml.py"): {
        "parse": [("if key in entries", "if False"), ("except RecursionError", "except ZeroDivisionError")],
        "_is_null": [("and node.style is None", "")],
        "_value": [("if _is_null(one)", "if False")],
        "_scalar": [("if node.tag not in _UNTAGGED", "if False")],
    },
    ("mica/cli/adapt/run_yaml.py", f"{_TESTS}config.py"): {
        "_arguments": [("if name in names", "if False")],
        "_entry": [('[f"{option.flag}={one}" for one in value]', "[option.flag, *value]")],
    },
    ("mica/cli/adapt/config.py", f"{_TESTS}config.py"): {
        "_check_text_weights": [("if max(weights) / min(weights) > FARTHEST", "if False")],
        "_flattened": [("values |= dict.fromkeys(_LENGTHS)", "pass")],
        "_recorded": [("origins |= found.origins", "pass")],
        "_refuse_others": [("_plain(fixed[name]) == _plain(value)", "fixed[name] == value")],
        "_of_adapter": [('own.keys() - {"dropout"}', "own.keys()")],
    },
    ("mica/cli/adapt/options.py", f"{_TESTS}options.py"): {
        "RECIPES": [('"learning_rate": 1e-3', '"learning_rate": 1e-4')],
        "_add": [
            ('"nargs": "+", "action": "extend"', '"nargs": "+"'),
            ("default=argparse.SUPPRESS, **keywords", "**keywords"),
            ("if option.by_run:", "if True:"),
        ],
    },
    (
        "mica/cli/adapt/__init__.py",
        f"{_TESTS}refusals.py",
        "-k",
        "missing_library or __file__ or bad_value",
    ): {
        "run": [("config.check_output(settings)", "pass")],
        "check_libraries": [("if importlib.util.find_spec(module) is None", "if False")],
    },
    ("mica/cli/adapt/fingerprint.py", f"{_TESTS}fingerprint.py"): {
        "_of": [
            ("if key not in _VOLATILE", ""),
            ("total.update(file.read(size))", "file.read(size)"),
        ],
        "_weight_files": [("if whole.is_file()", "if True")],
        "_header": [("min(size, 10**8)", "size")],
    },
    ("mica/cli/adapt/card.py", f"{_TESTS}card.py"): {
        "_recipe": [("option.is_path or", "")],
        "hub_name": [("path.exists() or", "")],
        "_eval_results": [("or not math.isfinite(value)", "")],
        "_cell": [('.replace("|", "\\\\|")', "")],
    },
    ("mica/cli/adapt/packing.py", f"{_TESTS}packing.py", "-k", "weights"): {
        "mix": [("if wanted.sum() > LONGEST * sizes.sum()", "if False")],
    },
    ("mica/cli/adapt/amount.py", f"{_TESTS}amount.py", "-k", "not record"): {
        "Amount.round_blocks": [("if self.processes == 1", "if False")],
        "Amount.epoch_steps": [
            (
                "math.ceil(self.epoch_rounds / self.accumulation)",
                "max(1, self.epoch_rounds // self.accumulation)",
            )
        ],
        "Amount.blocks_after": [
            ("min(more * self.accumulation, self.epoch_rounds)", "more * self.accumulation")
        ],
        "Amount.epochs": [
            (
                "self.sequence_length * self.blocks",
                "self.sequence_length * self.epoch_rounds * self.round_blocks",
            )
        ],
        "measurements": [("first // every", "(first - 1) // every"), ("(last - 1)", "last")],
        "Pace.left": [("+ ahead * a_measurement", "")],
    },
    ("mica/cli/adapt/callbacks.py", f"{_TESTS}callbacks.py", "-k", "time_left"): {
        "Hooks._seconds_left": [
            ("- self._pace.measuring", ""),
            ("measurements(now - 1, last", "measurements(now, last"),
        ],
    },
    ("mica/cli/adapt/adapter.py", f"{_TESTS}adapter.py", "-k", "value or rank or factors"): {
        "_check_ranks": [("if rows != rank and not is_stack", "if False")],
        "_is_rank": [("and not isinstance(value, bool)", ""), ("value > 0", "value >= 0")],
        "_is_mapping_to": [("_is_pattern(key) and", "")],
        "adapted_layers": [("or a[0] != b[1]", "")],
    },
    ("mica/cli/adapt/hub.py", f"{_TESTS}hub.py", "-k", "waited"): {
        "within": [("thread.join(seconds)", "thread.join()")],
    },
    ("mica/cli/adapt/hub.py", f"{_TESTS}hub.py"): {
        "check": [('if token.get("role") == "read"', "if False")],
        "push": [
            ("private=True", "private=False"),
            ('pattern += "/*"', "pass"),
        ],
    },
    ("mica/cli/adapt/checkpoints.py", f"{_TESTS}checkpoints.py", "-k", "does_not_count"): {
        "_read": [("if sizes and", "if")],
    },
    ("mica/cli/arguments.py", "tests/mica/cli/test_mistakes.py"): {
        "a_source": [("a_path(text)", "pass")],
        "a_name": [("text.strip()", "True")],
        "_look_at": [
            ("if error.errno not in _ABSENT", "if False"),
            ("and not os.access(path, os.R_OK | os.X_OK)", "and False"),
        ],
        "with_suggestion": [("message + similar(found[1], choices)", "message")],
    },
    ("mica/cli/__init__.py", "tests/mica/cli/test_mistakes.py", "-k", "one_line"): {
        "_Parser.parse_known_args": [("self._refuse_unknown(given)", "pass")],
    },
    ("mica/cli/inspect.py", "tests/mica/cli/test_mistakes.py", "-k", "beyond"): {
        "_load": [("if outline is not None", "if False")],
        "_targets": [("max(ranks.values()) < args.rank", "False")],
    },
}
