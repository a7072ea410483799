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
            ("if not dropout_p:", "if True:"),
            ('form == "mixed"', "False"),
            ("torch.addmm(bias, h, factor)", "torch.mm(h, factor)"),
            ("update_alone.addmm_(x, weight.t())", "update_alone"),
        ],
        "linear_backward": [
            ("if not dropout_p:", "if True:"),
            (
                "reference_path.grad_h(grad_output, lora_B, scaling, compute_dtype)",
                "reference_path.grad_h(grad_output, lora_B, 1.0, compute_dtype)",
            ),
            ("as_operand(lora_A, g.shape[0], compute_dtype)", "lora_A"),
            ("layout(grad_output), layout(x)", "layout(x)"),
            ("layout(x), layout(lora_A)", "layout(x)"),
            ("layout(lora_A), scaling, compute_dtype", "layout(lora_A), compute_dtype"),
            ("scaling, compute_dtype, dropout_p, fp32", "scaling, dropout_p, fp32"),
            ("dropout_p, fp32_setting()", "dropout_p"),
            ("shaped | dropped, dropped", "shaped, dropped"),
            ("shaped | dropped, dropped", "shaped | dropped, {}"),
            ("seed, dropout_p=dropout_p)", "seed)"),
            ("update_alone.addmm_(grad_output, weight)", "update_alone"),
        ],
        "down_projection_backward": [
            ("as_operand(lora_A, grad_h.shape[0], grad_h.dtype)", "lora_A"),
            ("seed, scale=scaling, dropout_p=dropout_p)", "seed, scale=scaling)"),
            (", dropout_p=dropout_p) * scaling", ", dropout_p=dropout_p)"),
        ],
        "down_projection": [("as_operand(lora_A, x.shape[0], compute_dtype)", "lora_A")],
        "up_projection": [("y.new_empty(y.shape)", "y"), ("y.new_empty(y.shape)", "torch.empty_like(y)")],
    },
    ("mica/paths/choose.py", "tests/mica/paths/test_choose.py"): {
        "decide": [
            ("key = (setting(), native", "key = (native"),
            ("native.setting(), _interpreting(),", "_interpreting(),"),
            ("native.setting(), _interpreting(),", "native.setting(),"),
            ("dtypes, function, is_layer)\n    choice", "dtypes, is_layer)\n    choice"),
            ("dtypes, function, is_layer)\n    choice", "dtypes, function)\n    choice"),
            ("runtime.is_settled(device)", "True"),
            ("choice is _ON_KERNELS and rows is not None", "rows is not None"),
            ("if has_dropout and", "if"),
            ('and device.type != "cpu"', ""),
        ],
        "_choose": [
            ('if requested() == "triton"', "if False"),
            ("_without_kernels(reason, device, dtypes, is_layer)", "Choice(REFERENCE, reason)"),
        ],
        "_without_kernels": [
            ("if not is_layer", "if False"),
            ("NATIVE if why_python is None else REFERENCE", "NATIVE"),
            ("reason, why_python)", "reason)"),
        ],
        "_why_not_native": [
            ("if reason is not None", "if False"),
            ("in (row_dtype, product_dtype)", "in (row_dtype,)"),
            ("in (row_dtype, product_dtype)", "in (product_dtype,)"),
            ('device.type == "cpu" and', ""),
            ("and not products.has_native(dtype)", "and False"),
        ],
        "_why_not_suited": [
            ("if form == REFERENCE", "if False"),
            ("if are_narrow(*rows.strides)", "if are_narrow(rows.out_features)"),
            ("rows.has_dropout or", ""),
            ("or not _is_host_bound(device, rows)", ""),
            ("has_one_dtype or", ""),
            ("has_one_dtype or (is_layer and native.why_not() is None)", "True"),
            ("has_one_dtype or (is_layer and native.why_not() is None)", "has_one_dtype"),
            ("is_layer and", ""),
            ("and native.why_not() is None", ""),
        ],
        "_form_of_layer": [
            ("_without_kernels(reason, device, dtypes, is_layer)", "Choice(REFERENCE, reason)"),
            ('setting() not in ("triton", b"triton")', "True"),
            ('elif form == REFERENCE:\n        form = "split"', "elif False:\n        pass"),
            ("product_dtype.itemsize == 2", "True"),
            ("product_dtype is row_dtype and", ""),
            (" and not rows.has_dropout", ""),
            ('form in ("first", "mixed")', 'form == "mixed"'),
            (
                'if form == "mixed":\n            suits = suits and',
                "if False:\n            suits = suits and",
            ),
            ('form if rows.is_aligned else "split"', "form"),
            ('forms.backward if function == "linear_backward" else forms.forward', "forms.forward"),
        ],
        "_is_host_bound": [
            ("<= configs.host_bound_of", "< configs.host_bound_of"),
            ("configs.host_bound_of(device_name(device))", "configs.HOST_BOUND"),
        ],
        "_why_narrow": [("if are_narrow(rows.in_features, rows.out_features)", "if True")],
        "forward_rows": [("x.stride(0), out_features", "x.shape[1], out_features")],
        "backward_rows": [
            ("(grad_output.stride(0), x_stride", "(out_features, x_stride"),
            ("x_stride, in_features)", "in_features)"),
        ],
        "give_up": [("_choices.clear()\n    warnings", "warnings")],
    },
    (
        "mica/ops/linear.py",
        "tests/mica/ops/test_operator_tensors.py",
        "tests/mica/ops/test_operator.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/fast/test_changes.py",
        "tests/mica/paths/test_triton_path.py",
    ): {
        "_MicaLinear.forward": [
            ("weight if needs_x else None", "weight"),
            ("lora_A if needs_x else without_values(lora_A)", "lora_A"),
            ("lora_A if needs_x else without_values(lora_A)", "without_values(lora_A)"),
        ],
        "_MicaLinear.backward": [("torch.is_grad_enabled() or", ""), ("or not is_eager(grad_output, x)", "")],
        "_cast": [("seed, x.dtype", "seed, None")],
        "linear_eager": [
            ("(lora_A.requires_grad or x.requires_grad)", "lora_A.requires_grad"),
            ("with no_autocast():", "if True:"),
            ("below_autograd(), no_autocast()", "below_autograd()"),
            ("dropout_p, seed, autocast_dtype", "0.0, None, autocast_dtype"),
            ("dropout_p, seed, autocast_dtype", "dropout_p, seed, None"),
            ("x, weight = x.to(autocast_dtype), weight.to(autocast_dtype)", "x = x.to(autocast_dtype)"),
        ],
    },
    ("mica/ops/linear.py", "tests/mica/fast/test_changes.py", "-k", "dropout or autocast or variable"): {
        "_native": [("grad_dtype, dropout_p, seed)", "grad_dtype, 0.0, None)")],
    },
    ("mica/ops/linear.py", "tests/mica/ops/test_kept.py"): {
        "_MicaLinear.forward": [("kept.input_of(x) if needs_A", "(kept._SAVED, (x,)) if needs_A")],
    },
    ("mica/ops/kept.py", "tests/mica/ops/test_kept.py"): {
        "Shared.value": [
            ("if torch.is_grad_enabled():", "if False:"),
            ("x is not None and x._version == 0", "False"),
            ("if self._value is None:", "if True:"),
            ("self._served >= self._layers", "False"),
            ("self._served >= self._layers", "True"),
        ],
        "input_of": [("if shared is None or not shared.is_of(x)", "if True")],
        "_recipe_of": [
            ("x._version or", ""),
            ("has_hooks or", ""),
            ("2 if _norms else 1", "1"),
            ("2 if _norms else 1", "2"),
            ("except RuntimeError", "except ZeroDivisionError"),
        ],
        "_described": [
            (".to(dtype)", ""),
            ("or products == 0", ""),
            ('"other", 1', '"other", 0'),
        ],
        "_factor": [
            ('getattr(raw, "unpack_hook", None) is not None', "False"),
            ("tensors.append(factor)", "tensors.insert(0, factor)"),
        ],
    },
    ("mica/ops/linear.py", "tests/mica/paths/test_triton_path.py", "-k", "which_form"): {
        "_native": [("choice.form != NATIVE", "False")],
    },
    ("mica/ops/linear.py", "tests/mica/ops/test_operators.py", "-k", "test_autocast"): {
        "_native": [("operands, grad_dtype, dropout_p", "operands, None, dropout_p")],
    },
    ("mica/ops/linear.py", "tests/mica/native/test_layer.py", "-k", "autocast"): {
        "linear_eager": [
            ("choice.form == NATIVE", "False"),
            ("operands, autocast_dtype, dropout_p", "operands, None, dropout_p"),
        ],
    },
    ("mica/ops/linear.py", "tests/mica/fast/test_layer_tensors.py", "-k", "without_dimensions"): {
        "_choice": [("if x.dim() == 0", "if False")],
    },
    ("mica/ops/linear.py", "tests/mica/fast/test_explain_runs.py"): {
        "_choice": [
            ("if x.dtype is not dtype", "if False"),
            ("dtype = autocast_dtype or x.dtype", "dtype = x.dtype"),
            ("is_layer=True", "is_layer=False"),
        ],
    },
    (
        "mica/ops/embedding.py",
        "tests/mica/ops/test_embedding.py",
        "tests/mica/ops/test_operator_tensors.py",
        *("-k", "embedding"),
    ): {
        "_MicaEmbedding.forward": [
            ("without_values(lora_A)", "lora_A"),
            ("save(ctx, indices", "ctx.save_for_backward(indices"),
        ],
        "_embedding": [("like((*indices.shape, out.shape[-1]), out)", "out.view(*indices.shape, -1)")],
        "mica_embedding": [("padding_idx += lora_A.shape[1]", "pass")],
    },
    ("mica/ops/checks.py", "tests/mica/ops/test_checks.py"): {
        "_check_dense": [
            ("if not isinstance(tensor, Tensor)", "if False"),
            ("if tensor.is_nested", "if False"),
            ("if tensor.layout is not torch.strided", "if False"),
        ],
        "_check_number": [("isinstance(value, bool) or", "")],
        "check_up_projection": [("and h.dim() >= 1", "")],
        "_check_padding_idx": [("-num_embeddings <= padding_idx <", "padding_idx <")],
    },
    ("mica/memory.py", "tests/mica/test_memory.py", "tests/mica/ops/test_operator_tensors.py"): {
        "in_memory": [
            ("tensor._is_zerotensor()", "False"),
            ("tensor.resolve_neg() if tensor.is_neg() else tensor", "tensor"),
        ],
    },
    ("mica/ops/operator.py", "tests/mica/fast/test_layer_tensors.py"): {
        "as_matrix": [("tensor.dim() == 0", "False")],
    },
    (
        "mica/ops/operator.py",
        "tests/mica/ops/test_operator_tensors.py",
        "tests/mica/ops/test_operator.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/paths/test_triton_path.py",
        "tests/mica/paths/test_triton_path_plans.py",
    ): {
        "save": [
            ("torch._C._set_grad_enabled(True)", "pass"),
            ("tensor.view_as(tensor)", "tensor"),
            ("tensor.view_as(tensor)", "tensor.detach()"),
            ("tensor.view_as(tensor)", "tensor.data"),
        ],
        "without_values": [("tensor.data", "tensor")],
        "like": [("_unsafe_view(matrix,", "matrix.view(")],
        "operator.batched": [("not torch.is_autocast_enabled(device_type)", "True")],
        "VMAP": [('"FuncTorchBatchedDecomposition"', '"ZeroTensor"')],
        "run_formula": [
            ("in_memory(arg) if isinstance(arg, Tensor) else arg", "arg"),
            ('in_capture and name.startswith("experts_")', "False"),
            ("is_batched or", ""),
            ("choose.note_missed if in_capture else", ""),
        ],
        "run_backward": [
            ("():\n        return on_reference(body)", "():\n        return body"),
            ("on_reference(body)(*args) if is_transformed() else operator(*args)", "operator(*args)"),
            ("if not is_eager(*tensors)", "if False"),
        ],
        "below_autograd": [
            ("torch._C._AutoDispatchBelowADInplaceOrView", "torch._C._AutoDispatchBelowAutograd")
        ],
        "is_eager": [
            ("tensor is not None and type(tensor) not in TENSOR_TYPES", "False"),
            ("_len_torch_dispatch_stack()\n        or ", ""),
            ("or _len_torch_function_stack()", ""),
            ("or _are_functorch_transforms_active()", ""),
            ("or forward_ad._current_level >= 0", ""),
        ],
        "operator.call": [
            ("device_type not in AUTOCAST or", ""),
            ("torch.is_autocast_enabled(device_type)", "False"),
        ],
    },
    (
        "mica/ops/low_rank.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/ops/test_operator_tensors.py",
        "tests/mica/paths/test_parity.py",
    ): {
        "_DownProjection.forward": [
            ("x if needs_A else None", "x"),
            ("lora_A if needs_x else without_values(lora_A)", "lora_A"),
            ("save(ctx, kept_x", "ctx.save_for_backward(kept_x"),
        ],
        "_UpProjection.forward": [("save(ctx, lora_B)", "ctx.save_for_backward(lora_B)")],
        "_down_backward": [("grad_x.to(x_dtype)", "grad_x")],
        "_down_cast": [("None, *dropout", "compute_dtype, 0.0, None")],
    },
    (
        "mica/paths/reference_path.py",
        "tests/mica/paths/test_reference_path.py",
        "tests/mica/paths/test_parity.py",
    ): {
        "_scaled_product": [("dtype))).mul_(scaling", "dtype))")],
        "linear_backward": [
            ("product_dtype(grad_output, (lora_A, lora_B), compute_dtype)", "compute_dtype"),
        ],
        "linear": [
            ("product_dtype(x, (lora_A, lora_B), compute_dtype or x.dtype)", "compute_dtype or x.dtype"),
        ],
        "_is_exact": [
            ("dtype != torch.float16 and", ""),
            ("frexp(scaling)[0] in (0.5, -0.5)", "True"),
            ("frexp(scaling)[0] in (0.5, -0.5)", "False"),
        ],
        "grad_a": [
            ("g.dtype is grad_dtype and", ""),
            ("and multiplies_itself(g)", ""),
            ("grad is None", "start >= 0"),
        ],
    },
    ("mica/paths/reference_path.py", "tests/mica/paths/test_reference_path.py", "-k", "dropout or wide"): {
        "down_projection": [("scaling / (1.0 - dropout_p)", "scaling")],
        "down_projection_backward": [
            ("scaling = scaling / (1.0 - dropout_p)", "pass"),
            ("lora_A * scaling, keep", "lora_A * scaling"),
            ("dropout.applied(keep, x)", "x"),
        ],
        "grad_x": [("and keep is None", "")],
        "linear_backward": [
            ("scaling / (1.0 - dropout_p)", "scaling"),
            ("g, lora_A, keep)", "g, lora_A)"),
            ("dropout.applied(keep, x)", "x"),
        ],
        "grad_a": [("whole = _by_native(g, x)", "pass")],
        "_by_native": [("or not multiplies_itself(g)", "")],
    },
    ("mica/paths/dropout.py", "tests/mica/paths/test_reference_path.py", "tests/mica/paths/test_parity.py"): {
        "dropout_keep": [
            ("is_readable and not _are", "not _are"),
            ("and not _are_functorch_transforms_active()", ""),
        ],
        "keep_by_torch": [("arange(first_row, first_row +", "arange(0,")],
        "keep_by_numpy": [
            ("arange(first_row, first_row +", "arange(0,"),
            ("(seed >> 32)", "(seed >> 31)"),
            ("min(start + step, rows)", "start + step"),
            ("second[block, None])", "second[None, :1])"),
            ("np.greater_equal", "np.greater"),
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
            ("or is_transformed()", ""),
            ("or right.requires_grad", ""),
            ("torch.is_grad_enabled() and", ""),
        ],
        "is_transformed": [("or forward_ad._current_level >= 0", "")],
        "product_dtype": [
            ("left.shape[0] > FEW_TO_ROUND or", ""),
            ("left.is_cpu or not", ""),
            ("or not has_native(dtype)", ""),
            ("if factor.dtype != torch.float32:\n            return dtype", "pass"),
        ],
        "added": [("return torch.addmm(y, left, right)", "pass")],
    },
}
