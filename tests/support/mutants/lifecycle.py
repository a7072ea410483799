"""Wrong edits of how an adapter is created, loaded and merged."""

LIFECYCLE = {
    ("mica/fast/caches.py", "tests/mica/fast/test_adapters.py", "-k", "one_call"): {
        "clear_caches": [("choose.clear_prepared()", ""), ("mixed_batch.clear()", "")],
    },
    (
        "mica/fast/forward/mixed_batch.py",
        "tests/mica/fast/test_adapters.py",
        "-k",
        "basis_that or fsdp or comparison",
    ): {
        "notes_its_changes": [("not lora_B.is_cpu and", ""), ("and limits.is_tracked(lora_B)", "")],
    },
    ("mica/fast/settings.py", "tests/mica/fast/test_patching.py", "-k", "settings_are"): {
        "_check_device": [("(device.index or 0) >= count", "not count"), ('device.type == "meta"', "False")],
        "_device_count": [("return module.device_count()", "return 8")],
    },
    ("mica/fast/loading.py", "tests/mica/fast/test_saving.py", "-k", "without_b or has_nothing"): {
        "load": [("_start_anew(without_b)", ""), ("orphaned, ", "without_b, ")],
        "set_state_dict": [
            ("and layer not in created", ""),
            ("if adapter.lora_B.is_meta", ""),
            ("_start_anew(empty)", ""),
        ],
        "_incomplete": [("if id(adapter.lora_A) not in lacking", "")],
    },
    ("mica/fast/loading.py", "tests/mica/fast/test_adapters.py", "-k", "hotswap"): {
        "hotswap_adapter_from_state_dict": [("_check_has_b(model, state_dict, adapter_name)", "pass")],
        "_check_has_b": [('layer = key.partition(".lora_embedding_A.")[0]', "continue")],
    },
    ("mica/fast/create/solving.py", "tests/mica/fast/test_saving.py", "-k", "without_b or has_nothing"): {
        "NewAdapter.leave_meta_device": [
            ("if lora_A.is_meta:", "if False:"),
            ("if lora_B.is_meta:", "if False:"),
            (", False)", ", True)"),
        ],
    },
    ("mica/fast/create/initialisation.py", "tests/mica/fast/test_saving.py", "-k", "b_alone"): {
        "mica_init": [("loaded.append(adapter)  # the file may lack its B", "pass")],
    },
    (
        "mica/fast/create/initialisation.py",
        "tests/mica/fast/test_unsuitable.py",
        "-k",
        "convolution or variant",
    ): {
        "resolve_lora_variant": [
            ("if others:", "if False:"),
            ('("mica",) not in getattr(self, "lora_variants", {("mica",)})', "False"),
            ("raise UnsuitableLayerError(", "raise ValueError("),
        ],
    },
    (
        "mica/fast/create/initialisation.py",
        "tests/mica/fast/test_quantised.py",
        "-k",
        "repacked or kernel_for",
    ): {
        "inject_adapter": [
            ("quantised.keep_unpacked(model)", "pass"),
            ("if not config.inference_mode:", "if True:"),
        ],
    },
    ("mica/fast/create/quantised.py", "tests/mica/fast/test_quantised.py", "-k", "repacked"): {
        "_unpacked": [
            ("state.original_nested = False", "pass"),
            ("state.absmax = state.absmax.t().reshape(-1)", "pass"),
            ("copy.copy(weight.quant_state)", "weight.quant_state"),
            ("if not is_packed_for_cpu(weight):", "if True:"),
        ],
        "keep_unpacked": [
            ("_unpack(module)", ""),
            ("module.support_avx512bf16_for_cpu = False", ""),
        ],
        "mergeable": [("if not is_packed_for_cpu", "if True or is_packed_for_cpu")],
    },
    ("mica/fast/merge/merging.py", "tests/mica/fast/test_quantised.py", "-k", "merg or dense"): {
        "_dequantised": [
            ("weight = quantised.mergeable(layer, weight)", ""),
            ("sign * layer", "layer"),
        ],
        "_merge": [("if safe and quantised.kind_of(module) is not None", "if False")],
        "unmerge": [("if quantised.kind_of(module) is not None", "if False")],
        "MergeReport.swallowed": [("if self.unmeasured and not self.layers:", "if False:")],
        "merge_report": [("if module in wrapped:", "if False:")],
    },
    ("mica/fast/merge/merging.py", "tests/mica/fast/test_merging.py", "-k", "bit or report"): {
        "merge_into": [
            ("(wide + update).to(weight.dtype)", "wide.to(weight.dtype) + update.to(weight.dtype)"),
            ("values.append(old.flatten()[lost])", "values.append(new.flatten()[lost])"),
        ],
        "unmerge_from": [("if exact:", "if False:")],
    },
    ("mica/fast/merge/unmeasured.py", "tests/mica/fast/test_quantised.py", "-k", "not_measured or dense"): {
        "kind_merged_into": [("return _unloaded.get(layer)", "return None"), ("layer.merged_adapters", "[]")],
        "_kind": [("kind is None or", "")],
    },
    ("mica/fast/refusals.py", "tests/mica/fast/test_explain.py", "-k", "no_model"): {
        "check_model": [("not isinstance(model, nn.Module)", "False")],
    },
}
