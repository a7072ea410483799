"""Wrong edits of the study of what is learned and forgotten."""

QUALITY = {
    ("bench/quality/runs.py", "tests/bench/quality/test_runs.py"): {
        "resume": [
            ("shutil.rmtree(_folder(path), ignore_errors=True)", "pass"),
            ("_add(found, store.read(_folder(path)))", "pass"),
        ],
        "_add": [("if key not in known", "")],
        "experiment": [
            ("helper.join()", "pass"),
            ("_add(result, store.read(_folder(path)))", "pass"),
            ("torch.get_num_threads() // processes", "torch.get_num_threads()"),
        ],
        "_help": [("torch.set_num_threads(threads)", "pass")],
        "_work.seen": [("watch()", "pass"), ("keep()", "pass")],
        "_work.within_budget": [('_seconds(result["runs"], one.method) <= end', "0 <= end")],
    },
    ("bench/quality/train.py", "tests/bench/quality/test_train.py"): {
        "candidate": [
            ("torch.manual_seed(0)", "torch.manual_seed(seed)"),
            ("replace_b(model, OTHER_B[method.kind])", "pass"),
            ('module.reset_lora_parameters("default", True)', "pass"),
            ("recipe.scaling * rank", "rank"),
        ],
        "train": [("recipe.warm_up * steps", "0"), ("step + 1 in measured", "step in measured")],
    },
    ("bench/quality/energy.py", "tests/bench/quality/test_energy.py"): {
        "shares": [("along[-rank:]", "along[:rank]")],
        "gradients": [("model.zero_grad(set_to_none=True)", "pass")],
    },
}
