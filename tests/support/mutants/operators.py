"""Wrong edits of the operators, the reference and the choice of path."""

OPERATORS = {
    (
        "mica/paths/triton_path.py",
        "tests/mica/paths/test_triton_path.py",
        "tests/mica/paths/test_triton_path_plans.py",
        "tests/mica/paths/test_parity.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/ops/test_operator.py",
    ): {
        "as_operand": [
            ("lora_A.to(dtype)", "lora_A"),
            ("lora_A.to(dtype)", "lora_A.to(torch.float16)"),
            ("lora_A.shape[0] < WIDE_RANK or", ""),
            ("num_tokens < MANY_TOKENS or", ""),
            ("or lora_A.dtype.itemsize <= dtype.itemsize", ""),
        ],
        "linear": [
            ("as_operand(lora_A, x.shape[0], dtype)", "lora_A"),
            ("layout(x), layout(lora_A)", "layout(lora_A)"),
            ("layout(lora_A), lora_B", "lora_B"),
            ("layout(lora_A), lora_B.shape[0],", "layout(lora_A),"),
            ("lora_B.shape[0], scaling,", "lora_B.shape[0],"),
            ("scaling, dtype, dropout_p, fp32", "scaling, dropout_p, fp32"),
            ("scaling, dtype, dropout_p, fp32", "scaling, dtype, fp32"),
            ("dropout_p, fp32_setting()", "dropout_p"),
            ("seed if dropout_p else None", "None"),
            ("x.stride(0), weight.shape[0])", "x.stride(0))"),
            ("dropout_p, x.stride(0), weight", "dropout_p, weight"),
            ('form == "mixed"', "False"),
        ],
        "linear_backward": [
            (
                "grad_output.stride(0), in_features if x is None else x.stride(0), in_features",
                "16, in_features",
            ),
            ("x.stride(0), in_features", "x.stride(0), 16"),
            (
                "torch_path.grad_h(grad_output, lora_B, scaling, compute_dtype)",
                "torch_path.grad_h(grad_output, lora_B, 1.0, compute_dtype)",
            ),
            ("as_operand(lora_A, g.shape[0], compute_dtype)", "lora_A"),
            ("layout(grad_output), layout(x)", "layout(x)"),
            ("layout(x), layout(lora_A)", "layout(x)"),
            ("layout(lora_A), scaling, compute_dtype", "layout(lora_A), compute_dtype"),
            ("scaling, compute_dtype, dropout_p, fp32", "scaling, dropout_p, fp32"),
            ("dropout_p, fp32_setting()", "dropout_p"),
            ("shaped | dropped, dropped", "shaped, dropped"),
            ("shaped | dropped, dropped", "shaped | dropped, {}"),
            ("None, seed, dropout_p)", "None)"),
        ],
        "_form": [
            ("or math.gcd(16, *row_strides) != 16", ""),
            ('choose.requested() != "triton"', "True"),
            ('"split" if form == "aten" else form', "form"),
            ("dtype.itemsize == 2 and", ""),
            ("and not dropout_p and", "and"),
            ("and rank % 16 == 0", ""),
            ('"split" if x.data_ptr() % 16 else form', "form"),
        ],
        "_fused": [("and why_not_descriptor(x, w, target_of(x.device)) is None", "")],
        "down_projection_backward": [
            ("as_operand(lora_A, grad_h.shape[0], grad_h.dtype)", "lora_A"),
            ("seed, scale=scaling, dropout_p=dropout_p)", "seed, scale=scaling)"),
            (", dropout_p=dropout_p) * scaling", ", dropout_p=dropout_p)"),
        ],
        "down_projection": [("as_operand(lora_A, x.shape[0], compute_dtype)", "lora_A")],
        "up_projection": [("y.new_empty(y.shape)", "y"), ("y.new_empty(y.shape)", "torch.empty_like(y)")],
    },
    ("mica/paths/choose.py", "tests/mica/paths/test_choose.py"): {
        "_decide": [('reason and backend == "triton"', "False")],
        "use_kernels": [
            ("key = (setting(), _interpreting()", "key = (_interpreting()"),
            ("key = (setting(), _interpreting()", "key = (setting()"),
            ("dtypes, function)\n    verdict", "dtypes)\n    verdict"),
            ("runtime.is_settled(device)", "True"),
        ],
        "give_up": [("_verdicts.clear()\n    warnings", "warnings")],
        "_concerns": [("refused.rank == rank and", "")],
    },
    (
        "mica/ops/linear.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/fast/test_changes.py",
        "tests/mica/paths/test_triton_path.py",
    ): {
        "_MicaLinear.forward": [("if needs_x else None", "")],
        "linear_eager": [("(lora_A.requires_grad or x.requires_grad)", "lora_A.requires_grad")],
    },
    (
        "mica/ops/operator.py",
        "tests/mica/ops/test_operator.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/paths/test_triton_path.py",
        "tests/mica/paths/test_triton_path_plans.py",
    ): {
        "run_formula": [
            ('or (in_capture and name.startswith("experts_"))', ""),
            ("choose.note_missed if in_capture else", ""),
            ("torch._C._functorch.is_legacy_batchedtensor(tensor)", "False"),
        ],
        "run_backward": [
            ("():\n        return on_torch(body)", "():\n        return body"),
            ("on_torch(body)(*args) if is_transformed() else operator(*args)", "operator(*args)"),
            ("if not is_eager(*tensors)", "if False"),
        ],
        "below_autograd": [
            ("torch._C._AutoDispatchBelowADInplaceOrView", "torch._C._AutoDispatchBelowAutograd")
        ],
        "is_eager": [
            ("tensor is not None and type(tensor) not in TENSOR_TYPES", "False"),
            ("._C._len_torch_dispatch_stack()\n        or torch", ""),
            ("or torch._C._len_torch_function_stack()", ""),
            ("or is_transformed()", ""),
        ],
        "operator.call": [
            ("device_type not in _AUTOCAST or", ""),
            ("torch.is_autocast_enabled(device_type)", "False"),
        ],
    },
    ("mica/ops/low_rank.py", "tests/mica/ops/test_operators.py", "tests/mica/paths/test_parity.py"): {
        "_DownProjection.forward": [("if ctx.needs_input_grad[2] else None", "")],
        "_down_backward": [("to(x_dtype).view", "view")],
        "_down_cast": [("None, *dropout", "compute_dtype, 0.0, None")],
    },
    ("mica/paths/torch_path.py", "tests/mica/paths/test_torch_path.py", "tests/mica/paths/test_parity.py"): {
        "_scaled_product": [("dtype))).mul_(scaling", "dtype))")],
        "linear_backward": [
            ("g.mul_(scaling)", "pass"),
            ("product_dtype(grad_output, (lora_A, lora_B), compute_dtype)", "compute_dtype"),
        ],
        "linear": [
            ("t(), alpha=scaling", "t()"),
            ("product_dtype(x, (lora_A, lora_B), compute_dtype or x.dtype)", "compute_dtype or x.dtype"),
        ],
        "_is_simple": [
            ("and multiplies_itself(x)", ""),
            ("and (dtype is None or dtype is own)", ""),
            ("and (scaling == 1.0 or _is_exact(scaling, own))", ""),
        ],
        "_is_exact": [
            ("dtype != torch.float16 and", ""),
            ("frexp(scaling)[0] in (0.5, -0.5)", "True"),
            ("frexp(scaling)[0] in (0.5, -0.5)", "False"),
        ],
        "dropout_keep": [("arange(first_row, first_row +", "arange(0,")],
        "grad_a": [
            ("/ (1.0 - dropout_p) if dropout_p else grad", ""),
            ("x_part, start, dropout_p", "x_part, 0, dropout_p"),
            ("grad is None", "start >= 0"),
        ],
    },
    ("mica/paths/products.py", "tests/mica/paths/test_products.py"): {
        "addmm": [("right in others", "right in others[1:]")],
        "_in_chunks": [
            ("these] if base.dim() == 1 else base[some, these", "..., : out[some, these].shape[1]"),
            ("max(SHORTEST, CHUNK // max(longest, column_step))", "rows"),
            ("min(columns, max(SHORTEST, CHUNK // longest))", "columns"),
            ("torch._C._are_functorch_transforms_active() or", ""),
        ],
        "_rounded": [
            ("total.to(dtype)", "total.to(torch.bfloat16)"),
            ("total, left, right)", "total.to(dtype).float(), left, right)"),
        ],
        "_through_fp32": [("left.shape[0] > FEW_ROWS or right.stride(0) != 1", "True")],
        "query": [("bool(getattr(torch.ops.mkldnn, QUERIES[dtype])())", "True")],
        "has_native": [("max(slowdown(dtype", "min(slowdown(dtype")],
        "unrounded": [
            ("not left.is_cuda or", ""),
            ("or not HAS_WIDE_SUMS", ""),
            ("or needs_grad", ""),
            ("or is_traced", ""),
            ("or right.requires_grad", ""),
            ("torch.is_grad_enabled() and", ""),
            ("or forward_ad._current_level >= 0", ""),
        ],
        "product_dtype": [
            ("left.shape[0] > FEW_TO_ROUND or", ""),
            ("left.is_cpu or not", ""),
            ("or not has_native(dtype)", ""),
            ("if factor.dtype != torch.float32:\n            return dtype", "pass"),
        ],
        "added": [("return torch.addmm(y, left, right)", "pass")],
    },
}
