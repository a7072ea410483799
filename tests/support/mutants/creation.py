"""Wrong edits of how B is made for new adapters, and of how adapters of experts are merged."""

CREATION = {
    (
        "mica/fast/create/experts.py",
        "tests/mica/fast/test_initialisation.py",
        "tests/mica/fast/test_unsuitable.py",
        "-k",
        "halves or refused_before",
    ): {
        "tasks": [("weight[rows]", "weight"), ("rank // len(parts)", "rank")],
        "is_halved": [("and layer.parameter_name == GATE_UP", "")],
        "_halves": [('"is_concatenated", True', '"is_concatenated", False')],
        "check": [
            ("if _is_mislabelled(layer)", "if False"),
            ("layer.num_experts == 1 and not layer._did_swap_in_out_features", "False"),
            ("if is_halved(layer) and rank % 2", "if False"),
            ("if is_halved(layer) and layer.out_features % 2", "if False"),
        ],
        "_is_mislabelled": [
            ('if hasattr(module, "is_transposed")', "if False"),
            ("(down_columns, 2 * down_rows)", "(down_rows, 2 * down_columns)"),
        ],
        "listed": [("if len(experts) > 1 else", "if len(experts) > 2 else")],
    },
    (
        "mica/fast/create/solving.py",
        "tests/mica/fast/test_unsuitable.py",
        "tests/mica/fast/test_initialisation.py",
        "-k",
        "refused_before or low_level or spans",
    ): {
        "_check_dtype": [("if is_wrapper(adapter.layer)", "if False")],
        "_check_rank": [
            ("max_rank = 2 * min(out_features // 2, in_features)", "pass"),
            ("adapter.rank <= max_rank", "adapter.rank <= max_rank + 1"),
            ("if adapter.is_quantised:", "if False:"),
        ],
        "_check_absence": [("if not is_fsdp_enabled()", "if False")],
        "_check_is_finite": [
            ("if torch.isfinite(extremes(weight)).all()", "if True"),
            ("enumerate(counts) if count", "enumerate(counts)"),
        ],
        "_why_not_whole": [('or getattr(module, "_hf_tp_plan", None) is not None', "")],
        "restore_exact": [("if torch.equal(shard, rounded)", "if True")],
        "_assign": [("place.fill(lora_B.data, basis)", "pass")],
    },
    ("mica/fast/create/solving.py", "tests/mica/fast/test_quantised.py", "-k", "few_dequantised"): {
        "_chunks": [("elements + size > _DEQUANTISED_ELEMENTS", "False")],
    },
    ("mica/fast/create/solving.py", "tests/mica/fast/test_bases.py"): {
        "_solve": [("sorted(messages)", "sorted(messages, reverse=True)")],
    },
    (
        "mica/fast/create/initialisation.py",
        "tests/mica/fast/test_unsuitable.py",
        "tests/mica/fast/test_initialisation.py",
        "-k",
        "skip or nothing or failing_solver or second_adapter or low_level or refused_before or unknown",
    ): {
        "update_layer": [("isinstance(r, bool) or", ""), ("not isinstance(r, Integral)", "False")],
        "inject_adapter": [('get_close_matches(str(kind).lower(), ["mica"])', "True")],
        "_Before.restore": [("parameter.requires_grad_(requires_grad)", "pass")],
        "_refuse_if_all_are_skipped": [("if injection.entries or not injection.skipped", "if True")],
        "_forget_skipped": [("if key not in skipped", "")],
        "_exclude": [("*(config.exclude_modules or ()),", "")],
        "_Entry.undo": [("self.original.delete_adapter(adapter_name)", "pass")],
        "create_and_replace": [
            ("if entry.is_parameter and entry.is_adapted", "if False"),
            ("injection.entries.pop().undo(adapter_name)", "injection.entries.pop()"),
        ],
        "cast_adapter_dtype": [("restore_exact(layer, adapter_name, lora_B)", "pass")],
    },
    ("mica/fast/create/quantised.py", "tests/mica/fast/test_quantised.py", "-k", "large_bias"): {
        "_outputs": [("base.bias = None", "pass")],
        "_gptqmodel": [("if close:", "if True:")],
    },
    ("mica/fast/create/quantised.py", "tests/mica/fast/test_unsuitable.py"): {
        "why_not": [('== "Int4Tensor"', '== "Int8Tensor"')],
        "why_not_read": [("or kind_of(layer) is not None", "")],
        "_bitsandbytes_8bit": [("if base.state.has_fp16_weights", "if True")],
        "_bitsandbytes_4bit": [('getattr(base.weight, "quant_state", None) is None', "False")],
    },
    ("mica/fast/merge/experts.py", "tests/mica/fast/test_merging.py"): {
        "merge": [
            ("if others:", "if False:"),
            ("if safe_merge and not torch.isfinite(merged).all()", "if False"),
            ("self.merged_adapters.append(name)", "pass"),
            (
                "merge_into(self, name, parameter.data, safe_merge)",
                "merge_into(self, name, parameter.data, False)",
            ),
        ],
        "unmerge": [
            ("undo = pop_undo(self, adapter)", "undo = None"),
            ("undo is not None or", ""),
            ("if not self.merged_adapters", "if False"),
        ],
    },
}
