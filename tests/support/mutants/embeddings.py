"""Wrong edits of what trains embeddings."""

_TESTS = "tests/mica/cli/adapt/test_embeddings.py"
_RECORD = "tests/mica/cli/adapt/test_trained_on.py"
EMBEDDINGS = {
    ("mica/cli/adapt/embeddings.py", _TESTS): {
        "config": [('"ensure_weight_tying": tied', '"ensure_weight_tying": False')],
        "in_float32": [("module.float()", "module"), (".original_module.to(dtype)", ".original_module")],
        "separate": [('"lr": rate', '"lr": group["lr"]')],
        "round_to_base": [("wrapper.original_module.weight.dtype", "torch.float32")],
        "add": [("wrapper.original_module.weight.float() + added", "copy.weight")],
        "check_adapter": [("if tied != _is_tied(found)", "if False")],
    },
    ("mica/cli/adapt/embeddings.py", _RECORD): {
        "update": [
            ('"auto" if before is None else before["dtype"]', '"auto"'),
            ('before["hashes"].get(name) != fingerprint(start)', "False"),
            ("start = start.to(weight.dtype)", "pass"),
        ],
    },
    ("mica/cli/adapt/trained_on.py", _RECORD): {
        "of": [("earlier = checkpoint or args.adapter", "earlier = None")],
        "is_base": [("return found == recorded", "return True")],
        "_recorded": [("checkpoints.marked_facts(folder) or {}", "{}")],
    },
    ("mica/cli/adapt/config.py", _TESTS): {"_derive": [("/ 10", "/ 5")]},
    ("mica/cli/adapt/corpus.py", _TESTS): {"Corpus.cost": [("<= DEAR", "<= 3 * DEAR")]},
}
