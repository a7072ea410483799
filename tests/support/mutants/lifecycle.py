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
        "merge_report": [("if module in wrapped:", "if False:")],
    },
    ("mica/fast/merge/report.py", "tests/mica/fast/test_quantised.py", "-k", "merg or dense"): {
        "MergeReport.swallowed": [("if self.unmeasured and not self.layers:", "if False:")],
    },
    (
        "mica/fast/merge/merging.py",
        "tests/mica/fast/test_merging.py",
        "-k",
        "bit or report or edit or otherwise",
    ): {
        "Update.chunks": [
            ("down[:, start:stop].contiguous()", "down[:, : stop - start].contiguous()"),
            ("slice(first + start, first + stop)", "slice(start, stop)"),
        ],
        "_contiguous": [("return scratch_like(matrix", "return scratch_like(matrix, 'update') or (matrix")],
        "_CorrectionParts.add": [
            ("self.values.append(old.flatten()", "self.values.append(chunk.new.flatten()"),
            ("self.indices.append(chunk.lost + first)", "self.indices.append(chunk.lost)"),
            (
                "self.original_rows.append(fingerprint(old))",
                "self.original_rows.append(fingerprint(chunk.new))",
            ),
            ("self.merged_rows.append(fingerprint(chunk.new))", "self.merged_rows.append(fingerprint(old))"),
        ],
        "merged_by_torch": [
            ('out=scratch_like(update, "recovered, wide")', "out=new_wide"),
            ('converted(new, update.dtype, "sum")', "total"),
            ("recovered.sub_(old_wide)", "recovered"),
        ],
        "unmerge_from": [
            ("if exact:", "if False:"),
            ("exact = _is(weight, correction.original_rows)", ""),
            ("correction is not None and _is(weight, correction.merged_rows)", "correction is not None"),
        ],
    },
    ("mica/fast/merge/merging.py", "tests/mica/fast/merge/test_unloading.py"): {
        "merge_into": [
            ("if needs_no_undo(layer, adapter):", "if True:"),
            ("if needs_no_undo(layer, adapter):", "if False:"),
        ],
        "_warn_of_inexact_unmerge": [("elif undo.correction is None:", "elif False:")],
        "unmerge_from": [("merged = undo.update", "merged = _update_of(layer, adapter)")],
    },
    ("mica/fast/merge/merging.py", "tests/mica/fast/merge/test_report.py"): {
        "_merge_chunks": [
            ("stats.weights += old.numel()", "stats.weights = old.numel()"),
            ("stats.unchanged += chunk", "stats.unchanged = chunk"),
        ],
        "merged_by_torch": [("if old.element_size() > update.element_size():", "if False:")],
    },
    ("mica/fast/merge/unloading.py", "tests/mica/fast/merge/test_unloading.py"): {
        "merging_and_unloading": [
            ("and known_peft.unloads_as_known()", ""),
            ("_unloading.reset(token)", "pass"),
        ],
        "_at_one_place": [("if count == 1", "")],
        "needs_no_undo": [
            ("or layer not in unloading.layers", ""),
            ("if requested is None:", "if True:"),
            ("name in adapted and", ""),
            ("and name not in layer.merged_adapters", ""),
            ("unmerged == [adapter] and", ""),
            ("and not isinstance(layer.base_layer, BaseTunerLayer)", ""),
        ],
    },
    ("mica/fast/merge/scratch.py", "tests/mica/fast/merge/test_scratch.py"): {
        "_Held": [("threading.local", "object")],
        "scratch": [
            ("or shape.numel() * dtype.itemsize > _MOST_BYTES", ""),
            ("with torch.inference_mode(False):", "if True:"),
            ("key = (name, shape, dtype)", "key = (name, shape)"),
        ],
        "_new_view": [
            ("or len(memory) < size", ""),
            ("_held.memory[name] = memory\n        _held.views.clear()", "_held.memory[name] = memory"),
            ("elif len(_held.views) >= _MOST_VIEWS:", "elif False:"),
        ],
        "converted": [("if tensor.dtype == dtype:", "if False:"), (".copy_(tensor)", "")],
    },
    ("mica/fast/merge/bits.py", "tests/mica/fast/merge/test_bits.py"): {
        "positions_that_differ": [("left = _bits(left)\n    right = _bits(right)", "")],
        "count_equal": [("np.equal(left.numpy(), right.numpy()", "np.equal(_bits(left), _bits(right)")],
    },
    ("mica/fast/merge/unmeasured.py", "tests/mica/fast/test_quantised.py", "-k", "not_measured or dense"): {
        "kind_merged_into": [("return _unloaded.get(layer)", "return None"), ("layer.merged_adapters", "[]")],
        "_kind": [("kind is None or", "")],
    },
    ("mica/fast/refusals.py", "tests/mica/fast/test_explain.py", "-k", "no_model"): {
        "check_model": [("not isinstance(model, nn.Module)", "False")],
    },
}
