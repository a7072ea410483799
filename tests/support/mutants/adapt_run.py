"""Wrong edits of what ``mica adapt`` reads, trains, measures and writes."""

_TESTS = "tests/mica/cli/adapt/test_"

ADAPT_RUN = {
    ("mica/cli/adapt/tokens.py", f"{_TESTS}tokens.py", "-k", "not workers"): {
        "_end": [("if not text[newline + 1].isspace()", "if True"), ("last_newline + 1", "limit")],
        "tokenize": [("source.digest(), *dependencies", "*dependencies")],
        "_fill": [("if source.state() != state", "if False")],
        "_Writer.add": [("self._digest.update(ids)", "pass")],
        "_Writer.end_document": [("self._length + len(self._eos)", "self._length")],
        "_pieces": [("if following is None and not", "if not")],
    },
    ("mica/cli/adapt/corpus.py", f"{_TESTS}corpus.py"): {
        "_training_blocks": [
            ("splits[:index] + splits[index + 1 :]", "[]"),
            ("held_out_elsewhere += [store.digests for store in held_out]", ""),
        ],
        "_grouped": [("if args.text_weights is None", "if True")],
        "Corpus._describe_left_out": [("if number", "if True")],
    },
    ("mica/cli/adapt/packing.py", f"{_TESTS}packing.py"): {
        "Blocks.__getitem__": [("if low == offset", "if True")],
        "_by_documents": [("documents.length[first] <= wanted", "documents.length[first] > 0")],
        "_by_ends": [("blocks[first][copy_of]", "blocks")],
        "_by_end": [("is_whole & np.isin", "is_whole & ~np.isin")],
        "keeps_documents_apart": [("mixed > 0 and", "")],
    },
    ("mica/cli/adapt/evaluation.py", f"{_TESTS}evaluation.py"): {
        "Likelihood.perplexity": [("not self.loss < 700", "self.loss >= 700")],
        "collate": [("labels[:, 0] = IGNORED", "pass")],
        "_nll": [("some.float()", "some")],
        "likelihood": [
            ("model.train(was_training)", "pass"),
            ("math.ceil(largest_share / batch_size)", "largest_share // batch_size"),
        ],
    },
    ("mica/cli/adapt/curve.py", f"{_TESTS}curve.py"): {
        "write_curve": [("_print_once(", "print(")],
        "table": [("sorted(rows)", "reversed(rows)")],
        "figure": [("panels[1] if column in _LABELS else panels[0]", "panels[-1]")],
        "_cell": [("if value is None:", "if False:")],
        "_add_token_axis": [("return step * tokens_per_step", "return step")],
    },
    ("mica/cli/adapt/trainer.py", f"{_TESTS}training.py", "-k", "reach or (unbroken and float32)"): {
        "training_arguments": [("logging_nan_inf_filter=False", "logging_nan_inf_filter=True")],
        "build_trainer": [("eval_on_start=checkpoint is None", "eval_on_start=True")],
        "AdapterTrainer.save_model": [
            ("result.write_adapter(model, folder, state)", "super().save_model(output_dir)")
        ],
    },
    ("mica/cli/adapt/training.py", f"{_TESTS}training.py", "-k", "a_run or finished"): {
        "train": [("base.config.use_cache = use_cache", "pass")],
        "_is_unfinished": [("and not has_ended", "")],
        "_mean_loss": [('* (entry["step"] - last)', "")],
    },
    ("mica/cli/adapt/summary.py", f"{_TESTS}training_stopping.py", "-k", "summary_card"): {
        "_perplexities": [("values.get(done.adapter_step)", "values.get(done.steps)")],
    },
    ("mica/cli/adapt/summary.py", f"{_TESTS}session.py", "-k", "before_the_merge"): {
        "finish": [("_write_summary(args.output, report) text", "text")],
    },
    ("mica/cli/adapt/summary.py", f"{_TESTS}adapt.py"): {
        "_layer_rows": [("if uncalled", "if False")],
    },
    ("mica/cli/adapt/result.py", f"{_TESTS}result.py", "-k", "saved or folders or sharded"): {
        "save": [('(scratch / "README.md").unlink(missing_ok=True)', "pass")],
        "_move_files": [("if old.is_dir()", "if False")],
        "gathered": [("module.reshard()", "pass")],
        "merge": [("or _is_sharded(model)", "")],
    },
}
