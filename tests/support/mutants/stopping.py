"""Wrong edits of the best step and early stopping of ``mica adapt``."""

_TESTS = "tests/mica/cli/adapt/test_training_stopping.py"
STOPPING = {
    ("mica/cli/adapt/stopping.py", _TESTS): {
        "best": [("not args.keep_best", "False"), ("if step}", "}"), ("within or trained", "trained")],
        "_rises": [("now - perplexities[0]", "now")],
        "reason": [("waited >= args.patience", "waited > args.patience"), ("len(steps) - 1", "len(steps)")],
        "flaw": [("checkpoints.damaged(checkpoint)", "None")],
    },
    ("mica/cli/adapt/callbacks.py", _TESTS): {
        "Hooks.on_train_begin": [("state.compute_steps(args, state.max_steps)", "pass")],
        "Hooks.on_step_end": [("control.should_evaluate and stopping", "False and stopping")],
        "Hooks.on_evaluate": [("if reason: control.should_save = True", "if reason:")],
    },
    ("mica/cli/adapt/training.py", _TESTS): {
        "_Session.mark": [("KEPT, self._best()", "KEPT")],
        "_state_if_ended": [("or _stopped_by(state, args)", "")],
    },
    ("mica/cli/adapt/result.py", _TESTS): {"save": [("if state is None", "if False")]},
}
