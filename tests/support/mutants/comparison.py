"""Wrong edits of ``mica compare``."""

_FOLDER = "tests/mica/cli/compare"
COMPARISON = {
    ("mica/cli/compare/curves.py", f"{_FOLDER}/test_curves.py"): {
        "course": [("if name in one", ""), ("_mean_of(base, names)", "_mean_of(base, RETAINED)")],
        "at": [("limit / point.forgotten", "0"), ("point.forgotten > limit", "point.forgotten > 2 * limit")],
        "choose": [('if run["seed"] == 0', ""), ("score <= 0", "score < -9")],
        "common_limit": [("max(0.0, median_low(forgotten))", "median_low(forgotten)")],
    },
    ("mica/cli/compare/verdict.py", f"{_FOLDER}/test_verdict.py"): {
        "verdict": [
            ("best.seeds.keys() & choice.seeds.keys()", "best.seeds.keys()"),
            ("2 / len(both)", "0"),
            ("residual, 2", "between, 2"),
            ("_LEVEL / pairs", "_LEVEL * pairs"),
        ],
        "_estimate": [("not spread.degrees", "False"), ("degrees >= _ENOUGH", "degrees")],
        "_residual": [("len(cells) - int(rank)", "len(cells)")],
    },
    ("mica/cli/compare/schedule.py", f"{_FOLDER}/test_schedule.py"): {
        "runs": [('if one["failed"] is None', "")],
        "allowed": [("seconds(plan, least) <= left", "True"), ("min(2, question.seeds)", "question.seeds")],
        "_clock": [("ends.index(min(ends))", "0")],
        "_better_half": [("ordered(limit)[0],", ""), ("-curves.at", "curves.at")],
        "_whole_steps": [("_most(fits, plan.short_steps, question.longest)", "plan.steps")],
        "wanted_seeds": [("if seed == 1 else order[: math.ceil(len(order) / 2)]", "")],
        "_more_seeds": [("> left", "> math.inf")],
    },
    ("mica/cli/compare/store.py", f"{_FOLDER}/test_store.py"): {
        "_made": [("if path.exists(): return True", ""), ("with held(", "with open(")],
    },
    ("mica/cli/compare/settings.py", f"{_FOLDER}/test_settings.py"): {
        "_checked": [("if record.others(output, found):", "if False:")],
        "_refuse_own_input": [("if lost:", "if False:")],
        "_resumed": [("json.loads(json.dumps(old)) != json.loads(json.dumps(new))", "False")],
    },
    ("mica/cli/compare/models.py", f"{_FOLDER}/test_models.py"): {
        "built": [("torch.manual_seed(args.seed)", "pass"), ('if method == "random":', "if False:")],
        "adapted": [("model.unload()", "pass")],
    },
    ("mica/cli/compare/training.py", f"{_FOLDER}/test_training.py"): {
        "_Stops._at_a_stop": [("control.should_training_stop = True", "pass")],
        "_Stops.on_step_end": [("if step in self._stops:", "if True:")],
    },
    ("mica/cli/compare/session.py", f"{_FOLDER}/test_session.py"): {
        "_is_out_of_memory": [("torch.OutOfMemoryError", "KeyError")],
    },
    ("mica/cli/compare/page.py", f"{_FOLDER}/test_page.py"): {
        "_who": [('if not row["tied"]', 'if row["tied"]')],
        "taken": [('if row["tied"]', "")],
        "_is_same": [('report["equal"]["methods"] == report["any"]["methods"]', "True")],
    },
}
