"""Wrong edits of the verdicts on servers, and of the end of the demo."""

SERVING = {
    ("mica/cli/serving.py", "tests/mica/cli/test_serving.py"): {
        "traits": [("max(config.r, *ranks.values(), 0)", "config.r")],
        "_traits_of_ranks": [
            ("rank > 16", "rank >= 16"),
            ("if most >= rank", "if most > rank"),
            ("math.sqrt(config.r)", "config.r"),
            ("or (config.rank_pattern and config.use_rslora)", ""),
        ],
        "_traits_of_names": [("partner not in names", "partner in names")],
        "_traits_of_stacks": [("not _is_gate_up_and_down(", "False and _is_gate_up_and_down(")],
        "_traits_of_kind": [("and not config.target_parameters", "")],
        "_is_gate_up_and_down": [
            ("gate_up_in == down_out and", ""),
            ("in (2 * down_in, down_in)", "in (down_in,)"),
            ("in (2 * down_in, down_in)", "in (2 * down_in,)"),
        ],
        "judge": [("any_lora=True", "any_lora=False")],
        "_verdict": [('if not rule["serves"]', 'if rule["serves"]')],
    },
    ("mica/cli/passages.py", "tests/mica/cli/test_passages.py"): {
        "choose": [("len(ids) // 2", "len(ids) // 3"), ("> 2 * NEXT", "> 0")],
        "read": [("labels[: len(passage.context)] = IGNORED", "pass"), ("-measured.loss", "measured.loss")],
        "held_out": [(".held_out)", ".train)")],
    },
    ("mica/cli/demo.py", "tests/mica/cli/test_demo.py"): {
        "readings": [("with model.disable_adapter()", "if True")],
        "main": [
            ('if option != "--resume"', "if option"),
            ("if status or", "if status and"),
        ],
    },
}
