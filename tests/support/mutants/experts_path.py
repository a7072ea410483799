"""Wrong edits of the path of a stack of experts, from the formulas to PEFT's wrapper; not of its kernels."""

EXPERTS_PATH = {
    (
        "mica/paths/reference_path.py",
        "tests/mica/paths/test_parity.py",
        "tests/mica/paths/test_reference_path.py",
        "tests/mica/ops/test_experts.py",
        "tests/mica/ops/test_operators.py",
        *("-k", "experts"),
    ): {
        "_by_expert": [
            ("y[end:] = 0", ""),
            ("None if bias is None else _cast(bias[expert], x.dtype)", "None"),
            ("weight[expert]", "weight[0]"),
        ],
        "experts_linear_backward": [
            ("dx[end:] = 0", "pass"),
            ("lora_A.new_zeros", "lora_A.new_empty"),
            ("lora_A[expert],", "lora_A[0],"),
            ("end = rows.stop", ""),
        ],
        "experts_base": [("addmm(bias,", "addmm(None,")],
        "hit": [("start = max(start, end)", "")],
        "_filling": [("or functorch.is_legacy_batchedtensor(tensor)", "")],
    },
    (
        "mica/ops/experts.py",
        "tests/mica/ops/test_experts.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/ops/test_operator_tensors.py",
        "tests/mica/paths/test_parity.py",
        *("-k", "experts"),
    ): {
        "_ExpertsLinear.forward": [
            ("x if needs_A else None", "x"),
            ("tokens if needs_A else None", "None"),
            ("inverse if needs_x else None", "None"),
            ("weight if needs_x else None", "weight"),
            ("lora_A if needs_x else without_values(lora_A)", "lora_A"),
            ("save(ctx, kept_x", "ctx.save_for_backward(kept_x"),
            ("dtype or x.dtype", "x.dtype"),
            ("_, needs_x, _, _, needs_A", "_, needs_A, _, _, needs_x"),
        ],
        "_backward": [("rows if needs_A else None", "rows"), ("weight if needs_x else None", "weight")],
        "_cast": [("x.to(weight.dtype)", "x.bfloat16()")],
        "_ExpertsBase.forward": [("save(ctx, offsets", "ctx.save_for_backward(offsets")],
        "_ExpertsBase.backward": [("weight.mT", "-weight.mT"), ("grad_x if inverse is None else", "")],
    },
    ("mica/ops/routing.py", "tests/mica/ops/test_routing.py", "tests/mica/ops/test_operator_tensors.py"): {
        "route": [("order // top_k", "order % top_k"), ("counts[:-1]", "counts[1:]")],
        "to_experts": [("x.index_select(0, tokens)", "x")],
        "summed": [("grad_rows.index_select(0, inverse)", "grad_rows"), ("if not num_tokens", "if False")],
        "_FromExperts.forward": [
            ("y if ctx.needs_input_grad[1] else None", "y"),
            ("save(ctx, y", "ctx.save_for_backward(y"),
            ("y.index_select(0, inverse)", "y"),
        ],
        "_FromExperts.backward": [
            ("grad_output.index_select(0, tokens)", "grad_output.index_select(0, order // 2)"),
            ("weights.reshape(-1).index_select(0, order)", "weights.reshape(-1)"),
            ("y.index_select(0, inverse)", "y"),
        ],
    },
    (
        "mica/fast/forward/experts.py",
        "tests/mica/fast/test_experts_eligibility.py",
        "tests/mica/fast/test_experts.py",
    ): {
        "Experts.__call__": [
            ("if _has_gate(module) else module.act_fn(hidden)", ""),
            ("call_counts.note(wrapper)", "pass"),
        ],
        "_names": [('"gate_up_proj" if _has_gate(module) else "up_proj"', '"gate_up_proj"')],
        "_projection": [
            ("if module.is_transposed else", "if False else"),
            (" if module.has_bias else None", " if False else None"),
            ("dtype = torch.get_autocast_dtype(device_type)", "pass"),
        ],
        "decide": [
            ("(*wrappers[1:], module)", "(module,)"),
            ("(*wrappers[1:], module)", "wrappers[1:]"),
            ("if adapter is not None", "if True"),
            ("type(chosen) is str", "False"),
        ],
        "_implementation": [
            ("chosen is not None or name", "name"),
            ('not _home(own).startswith("transformers.models.")', "False"),
            ('_home(module._apply_gate).startswith("transformers.")', "True"),
        ],
        "_read_wrapper": [
            ("if wrapper.disable_adapters", "if False"),
            ("if wrapper.merged", "if False"),
            ("len(names) > 1", "False"),
            ("not is_mica(wrapper, name)", "False"),
            ("not expert_params.is_stack(wrapper)", "False"),
            ("type(scaling) is not float", "False"),
            ("lora_A.dtype != lora_B.dtype", "False"),
            ('or why_not_frozen("lora_B", lora_B)', ""),
        ],
        "_why_not_module": [
            ("is not _DISPATCHING", "is None"),
            ('module.__dict__.get("_hf_tp_plan") is not None', "False"),
            ('getattr(module, "_is_expert_parallel", False)', "False"),
            ("reason is None and module.has_bias", "False"),
        ],
        "_why_not_call": [
            ("is_transformed()", "False"),
            ("and implementation is None and module.has_bias", "and False"),
        ],
        "_why_not_dtypes": [
            ("if not fits", "if False"),
            ("fits = True  #", "fits = dtype == weight_dtype  #"),
            ("torch.float64 not in (dtype, weight_dtype)", "True"),
            ("and not is_master", ""),
        ],
    },
}
