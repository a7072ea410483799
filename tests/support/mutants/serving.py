"""Wrong edits of the verdicts on servers, and of the end of the demo."""

SERVING = {
    ("mica/cli/serving.py", "tests/mica/cli/test_serving.py"): {
        "traits": [
            ("rank > 16 and", "rank >= 16 and"),
            ("if most >= rank", "if most > rank"),
            ("max(config.r, *ranks.values(), 0)", "config.r"),
            ("math.sqrt(config.r)", "config.r"),
            ("and not config.target_parameters and", "and"),
            ("alphas or (ranks and config.use_rslora)", "alphas"),
            ("pair[1] not in names", "pair[1] in names"),
            ("not _is_gate_up_and_down(", "False and _is_gate_up_and_down("),
        ],
        "_is_gate_up_and_down": [
            ("gate_up_in == down_out and", ""),
            ("in (2 * down_in, down_in)", "in (down_in,)"),
            ("in (2 * down_in, down_in)", "in (2 * down_in,)"),
        ],
        "judge": [('if not rule["serves"]', 'if rule["serves"]'), ("any_lora=True", "any_lora=False")],
    },
    ("mica/cli/demo.py", "tests/mica/cli/test_demo.py"): {
        "continuations": [("with model.disable_adapter()", "if True")],
        "main": [
            ('if option != "--resume"', "if option"),
            ("if status or", "if status and"),
        ],
    },
}
