"""Wrong edits of ``mica adapt``: what a run asks before it goes on, and what it says before it begins."""

_TESTS = "tests/mica/cli/adapt/test_"

ADAPT = {
    ("mica/cli/adapt/global_batch.py", f"{_TESTS}global_batch.py", "-k", "may_differ or sessions"): {
        "check": [("if engine else", "if not engine else")],
        "_reason": [
            ('if engine is not None and before["processes"] != now["processes"]', "if False"),
        ],
        "_reads_the_same": [
            ("or total <= min(used_before, used_now)", ""),
            ("if used_before == 0", "if False"),
        ],
        "_random": [("and not name.startswith(_HEADS)", ""), ("value > 0", "value > 1")],
        "history": [('facts.get("step", 0) + 1', 'facts.get("step", 0)')],
    },
    ("mica/cli/adapt/checkpoints.py", f"{_TESTS}checkpoints.py"): {
        "to_resume": [("marked(output)", "_complete(output)")],
        "_of_another_size": [(".stat().st_size != size", ".stat().st_size < 0")],
        "_of_another_hash": [("!= expected", "is None")],
        "_own": [("if path.name in found.files", "if True"), ("is not None or", "is None and")],
        "discard": [("if is_later and damaged(path) is None", "if False")],
        "_remove": [("if record.stranger(output, found, [path.name]) is None", "if True")],
    },
    ("mica/cli/adapt/folder.py", f"{_TESTS}folder.py"): {
        "check": [
            ("_refuse_strangers(output, found, replaced)", ""),
            ("record.refuse_taken(output, found, [*ALWAYS, *more])", ""),
            ("_refuse_strange_checkpoints(output, others)", ""),
            ("if found is not None and found.command != record.ADAPT", "if False"),
        ],
        "_check_without_run": [("if others: limit", "if others and not overwrite:\n        limit")],
        "_check_removal": [("if lost is not None", "if False")],
        "begin": [
            ("record.refuse_taken(output, found, names)", ""),
            ("if found is not None and not resume", "if False"),
        ],
        "held": [("record.recover(output)", ""), ("stack.callback(_leave, output)", "")],
        "_missing": [("(output, *output.parents)", "(output,)")],
    },
    ("mica/cli/record.py", "tests/mica/cli/test_record.py"): {
        "claim": [("refuse_taken(output, found, new)", "")],
        "refuse_taken": [("_places(output / name)", "[output / name]")],
        "_parsed": [('in ("", ".", "..", FILE)', 'in ("", FILE)'), ("isinstance(names, list) and", "")],
        "_marked_by": [('if marker["run"] == run', "if True")],
        "removed_input": [("place == whole or", ""), ("(place, *place.parents)", "(place,)")],
        "read_from": [("if os.path.islink(linked)", "if False")],
        "replace": [
            ("if path not in keep", ""),
            ("write(output, old)", "pass"),
            ("new.ready = [*ready]", "new.ready = []"),
        ],
        "recover": [("os.replace(scratch", "print(scratch")],
        "_recover_replaced": [("if run == record.run", "if False")],
        "stranger": [("set(_names(folder)) - set(listed)", "set(listed) - set(_names(folder))")],
        "write": [("flush(new)", "")],
    },
    ("mica/cli/lock.py", "tests/mica/cli/test_lock.py"): {
        "_acquired": [("if _is_of(path, descriptor)", "if True")],
        "_lock": [("raise HeldError from error", "pass")],
    },
    ("mica/cli/output.py", "tests/mica/cli/test_output.py"): {
        "restore": [("old.rename(path)", "remove(old)")],
        "remove": [("if entry.name != RECORD", "if True")],
        "finish_files": [("path.chmod(mode)", "pass")],
        "beside": [("if len(os.fsencode(name)) > _LONGEST", "if False")],
    },
    ("mica/cli/adapt/run_yaml.py", f"{_TESTS}config.py", "-k", "any_name"): {
        "_escaped": [("if one.isprintable():", "if True:")],
        "as_yaml": [("shown(origins[row.name])", "origins[row.name]")],
    },
    ("mica/cli/transfer.py", "tests/mica/cli/test_transfer.py", "-k", "transfer or overwrite"): {
        "_check_place": [('read["the base of --adapter"] = ', "_ = ")],
        "_is_ours": [
            ("all(entry.name.startswith(record.OWN) for entry in path.iterdir())", "True"),
            ("all(entry.name.startswith(record.OWN) for entry in path.iterdir())", "not any(path.iterdir())"),
        ],
        "_check_output": [
            ("if found is None or", "if found is not None and"),
            ("if stranger is not None", "if False"),
        ],
    },
    ("mica/cli/adapt/sources.py", f"{_TESTS}sources.py"): {
        "Source._row_texts": [("FIRST_ROWS", "1")],
        "Source._texts": [("text.encode()", "pass"), ("if value is _TWICE", "if False")],
        "Source._parquet_texts": [("if not file.metadata.num_rows", "if False")],
        "_csv": [("row.pop(None, None)", "row.pop(None, None) and []"), ("row | repeated", "row")],
        "_object": [("if len(row) < len(pairs)", "if False")],
        "_take_saved_dataset": [('if "::" in str(folder.resolve())', "if False")],
    },
    ("mica/cli/adapt/dry_run.py", f"{_TESTS}dry_run.py", "-k", "not two_processes"): {
        "_to_be_written": [("training.KEPT + 1", "training.KEPT")],
        "_free_space": [("+ _on_disk(output, replaced)", "")],
        "_Clock.measured": [("1 if last > 1 else 0", "0")],
        "rehearsal": [("measurements(clock.first,", "measurements(0,")],
    },
    ("mica/cli/adapt/session.py", f"{_TESTS}dry_run.py", "-k", "too_small"): {
        "_run": [("processes.on_main(check_disk, model, args, args.output)", "")],
    },
    ("mica/cli/adapt/session.py", f"{_TESTS}session.py", "-k", "another_run"): {
        "_adapt": [
            ("processes.on_main(stack.enter_context, folder.held(args.output))", ""),
            ("processes.on_main(_check_again, settings)", ""),
        ],
        "_check_again": [("config.check_output(settings)", "")],
    },
    ("mica/cli/adapt/packing.py", f"{_TESTS}session.py", "-k", "packing"): {
        "suit_packing": [
            ('if settings.origins["packing"] != "default"', "if False"),
            ('settings.origins["packing"] = "the model"', "pass"),
        ],
    },
    ("mica/cli/adapt/session.py", f"{_TESTS}session.py", "-k", "packing or odd_settings or other_base"): {
        "_note_what_is_odd": [("if recorded and recorded != number", "if False")],
        "_check_checkpoint_base": [
            ("checkpoints.check(checkpoint, **fingerprint.facts(source.location))", "pass")
        ],
    },
    ("mica/cli/adapt/base.py", f"{_TESTS}base.py"): {
        "check": [("if args.merge", "if False")],
        "_own_dtype": [('if device.type == "cpu" and not has_native(dtype)', "if False")],
        "_convert": [("if args.resume and (args.output / FOLDER).is_dir()", "if False")],
    },
    ("mica/cli/adapt/processes.py", f"{_TESTS}processes.py", "-k", "(two_processes and not learn) or once"): {
        "alike": [("if value != on_main(lambda: value)", "if False")],
        "largest": [(".max()", ".min()")],
        "one_voice": [("raise SystemExit(2) from None", "raise")],
    },
    ("mica/cli/adapt/base.py", f"{_TESTS}session.py", "-k", "converted_base"): {
        "place_of": [("if scratch.is_dir()", "if False")],
    },
    ("mica/cli/adapt/processes.py", f"{_TESTS}processes.py", "-k", "not_shared"): {
        "check_shared": [("if not (output / token).is_file()", "if False")],
    },
}  # fmt: skip
