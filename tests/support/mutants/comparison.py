"""Wrong edits of ``mica compare``."""

_FOLDER = "tests/mica/cli/compare"
COMPARISON = {
    ("mica/cli/compare/outcomes.py", f"{_FOLDER}/test_outcomes.py"): {
        "Outcome.within": [
            ("limit.value / forgotten", "0"),
            ("forgotten <= limit.value", "forgotten <= 2 * limit.value"),
            ("1 - self.forgotten / forgotten", "0 * self.forgotten"),
            ("limit.blocks / limit.value - 1", "0"),
        ],
        "outcome": [("if name in end", ""), ('run["points"][-1]', 'run["points"][0]')],
        "choose": [('if run["seed"] == 0', ""), ("score <= 0", "score < -9")],
        "common_limit": [("value <= 0", "False"), ("(len(chosen) - 1) // 2", "-1")],
    },
    ("mica/cli/compare/verdict.py", f"{_FOLDER}/test_verdict.py"): {
        "verdict": [("_LEVEL / max", "_LEVEL * max")],
        "Part.half": [("if not self.degrees: return math.inf", "")],
        "_lead": [
            ("best.seeds.keys() & other.seeds.keys()", "best.seeds.keys()"),
            ("residual.variance * 2 / len(seeds)", "0.0"),
            ("_doubt(ours) - _doubt(theirs)", "0 * _doubt(ours)"),
        ],
        "_of_documents": [
            (
                "np.unique(documents, return_inverse=True)",
                "np.unique(range(len(documents)), return_inverse=True)",
            ),
            ("len(weights) < FEWEST", "len(weights) < 2"),
            ("* concentration / unbiased", ""),
        ],
        "_residual": [("len(cells) - int(rank)", "len(cells)")],
    },
    ("mica/cli/compare/advice.py", f"{_FOLDER}/test_advice.py"): {
        "needed": [("if not all(", "if all("), ("seeds / shared", "1.0")],
        "_half": [("part.variance / documents", "part.variance")],
        "_seconds": [("seeds - len(choice.seeds)", "seeds")],
    },
    ("mica/cli/compare/schedule.py", f"{_FOLDER}/test_schedule.py"): {
        "runs": [('if one["failed"] is None', "")],
        "allowed": [
            ("seconds(plan, least) <= left", "True"),
            ("min(2, question.seeds)", "question.seeds"),
            ("if _steps_of(results, SHORT):", "if False:"),
        ],
        "_clock": [("ends.index(min(ends))", "0")],
        "_number_of_better": [("max(2, math.ceil(len(methods) / 2))", "math.ceil(len(methods) / 2)")],
        "_better_half": [("ordered(limit)[0],", ""), ("-outcomes.outcome", "outcomes.outcome")],
        "_short": [("_steps_of(results, SHORT) or", "")],
        "_whole_steps": [
            ("_most(fits, plan.short_steps, question.longest)", "plan.steps"),
            ("or _steps_of(results, WHOLE)", ""),
        ],
        "wanted_seeds": [("order if seed == 1 else better", "order")],
        "_more_seeds": [("> left", "> math.inf")],
    },
    ("mica/cli/compare/again.py", f"{_FOLDER}/test_again.py"): {
        "script": [('row["share"] < 1', "False")],
        "_options": [('learning_rate=row["rate"],', "learning_rate=1.0,")],
    },
    ("mica/cli/compare/store.py", f"{_FOLDER}/test_store.py"): {
        "_made": [("if not path.exists():", "if True:"), ("stack.enter_context(held(", "(open(")],
    },
    ("mica/cli/compare/settings.py", f"{_FOLDER}/test_settings.py"): {
        "_checked": [("if record.others(output, found):", "if False:")],
        "_refuse_own_input": [("if lost:", "if False:")],
        "_resumed": [("not is_same and not", "not"), ("if OPTIONS[name].may_change}", "if False}")],
        "rates": [("found[name].update(some)", "found[name] = set(some)")],
    },
    ("mica/cli/compare/models.py", f"{_FOLDER}/test_models.py"): {
        "built": [("torch.manual_seed(args.seed)", "pass"), ("if method == RANDOM:", "if False:")],
        "adapted": [("model.unload()", "pass")],
    },
    ("mica/cli/compare/training.py", f"{_FOLDER}/test_training.py"): {
        "_Watch.on_step_end": [("if not self.steps:", "if True:")],
        "first_not_finite": [("math.isfinite", "math.isnan")],
    },
    ("mica/cli/compare/session.py", f"{_FOLDER}/test_session.py"): {
        "_is_out_of_memory": [("torch.OutOfMemoryError", "KeyError")],
        "_for_choosing": [("<= wanted", "< 99")],
        "_earlier": [('one["failed"] == _OUT_OF_MEMORY', "False"), ("if not is_known:", "if False:")],
        "_lead": [("settings.withdraw(output)", "pass")],
    },
    ("mica/cli/compare/page.py", f"{_FOLDER}/test_page.py"): {
        "_who": [('if not row["tied"]', 'if row["tied"]')],
        "_advice": [('if not report["undecided"]:', "if True:"), ('if one["missing"]:', "if False:")],
        "_is_same": [('report["equal"]["methods"] == report["any"]["methods"]', "True")],
        "_setting": [("0 < steps < LEAST", "False")],
    },
}
