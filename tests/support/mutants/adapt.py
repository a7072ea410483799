"""Wrong edits of ``mica adapt``: what a run asks before it goes on, and what it says before it begins."""

_TESTS = "tests/mica/cli/adapt/test_"

ADAPT = {
    ("mica/cli/adapt/global_batch.py", f"{_TESTS}global_batch.py", "-k", "may_differ or sessions"): {
        "check": [("if divided else", "if not divided else")],
        "_reason": [
            ("before[0] != now[0] and divided", "divided and False"),
            ("and read > min(used)", ""),
            ("or used[0] == 0", ""),
        ],
        "_random": [("and not name.startswith(_HEADS)", ""), ("value > 0", "value > 1")],
        "history": [('+ 1): processes', '): processes')],
    },
    ("mica/cli/adapt/checkpoints.py", f"{_TESTS}checkpoints.py"): {
        "to_resume": [("marked(output)", "_complete(output)")],
        "_wrong": [("path.stat().st_size == size", "True")],
    },
    ("mica/cli/adapt/folder.py", f"{_TESTS}folder.py"): {
        "check": [("if not removed.isdisjoint((place, *place.parents))", "if False")],
        "_is_converted": [("and card.read_bytes().startswith(CONVERTED.encode())", "")],
        "held": [("if is_new and not any", "if not any")],
    },
    ("mica/cli/adapt/sources.py", f"{_TESTS}sources.py"): {
        "Source._row_texts": [("FIRST_ROWS", "1")],
        "Source._texts": [("text.encode()", "pass"), ("if value is _TWICE", "if False")],
        "Source._parquet_texts": [("if not file.metadata.num_rows", "if False")],
        "_csv": [("row.pop(None, None)", "row.pop(None, None) and []"), ("row | twice", "row")],
        "_object": [("if len(row) < len(pairs)", "if False")],
        "_find": [('if "::" in str(path.resolve())', "if False")],
    },
    ("mica/cli/adapt/dry_run.py", f"{_TESTS}dry_run.py", "-k", "not two_processes"): {
        "check_disk": [("training.KEPT + 1", "training.KEPT"), ("+ replaced", "")],
        "_Clock.seconds": [("self.times[1:] if", "self.times if")],
        "rehearsal": [("measurements(clock.first,", "measurements(0,")],
    },
    ("mica/cli/adapt/session.py", f"{_TESTS}dry_run.py", "-k", "too_small"): {
        "_run": [("processes.on_main(check_disk, model, args, args.output)", "")],
    },
    ("mica/cli/adapt/processes.py", f"{_TESTS}processes.py", "-k", "not_shared"): {
        "check_shared": [("if not (output / token).is_file()", "if False")],
    },
}  # fmt: skip
