"""Wrong edits of the operators, the reference and the choice of path."""

from tests.support.mutants.edits import FileEdits

OPERATORS = [
    FileEdits(
        "mica/kernel_path.py",
        tests=[
            "tests/mica/test_kernel_operands.py",
            "tests/mica/test_kernel_plans.py",
            "tests/mica/test_kernel_path.py",
            "tests/mica/ops/test_factors.py",
            "tests/mica/ops/test_operators.py",
            "tests/mica/ops/test_dispatch.py",
        ],
        edits={
            "as_operand": [
                ("lora_A.to(dtype)", "lora_A"),
                ("lora_A.to(dtype)", "lora_A.to(torch.float16)"),
                ("lora_A.shape[0] < WIDE_RANK or", ""),
                ("num_tokens < MANY_TOKENS or", ""),
                ("or lora_A.dtype.itemsize <= dtype.itemsize", ""),
            ],
            "planned_linear": [
                (".to(dtype) if rounded else lora_A", ""),
                ("x), layout(lora_A", "lora_A"),
                ("lora_A), layout(lora_B", "lora_B"),
                ("layout(lora_B), scaling", "scaling"),
                ("scaling, compute_dtype, fp32_setting", "compute_dtype, fp32_setting"),
                ("scaling, compute_dtype, fp32_setting", "scaling, fp32_setting"),
                ("compute_dtype, fp32_setting()", "compute_dtype"),
            ],
            "_planned_backward": [
                (".to(dtype) if rounded else lora_A", ""),
                ("dy), layout(x", "x"),
                ("x), layout(lora_A", "x"),
                ("tensors, scaling, dtype", "tensors, dtype"),
                ("scaling, dtype, fp32_setting", "scaling, fp32_setting"),
                ("scaling, dtype, fp32_setting()", "scaling, dtype"),
            ],
            "down_projection_backward": [
                ("as_operand(lora_A, len(grad_h), grad_h.dtype)", "lora_A"),
                ('"dropout_p": dropout_p, "seed": seed', ""),
                ("0], **options) * scaling", "0], **options)"),
            ],
            "down_projection": [("as_operand(lora_A, len(x), compute_dtype)", "lora_A")],
            "choose_form": [('backend.requested() == "auto"', "True")],
            "linear_backward": [('"dropout_p": dropout_p, "seed": seed', "")],
            "embedding_backward": [("padding_idx=padding_idx,", "")],
            "up_projection": [("y.new_empty(y.shape)", "y"), ("y.new_empty(y.shape)", "torch.empty_like(y)")],
        },
    ),
    FileEdits(
        "mica/backend.py",
        tests=["tests/mica/test_backend.py"],
        edits={
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
    ),
    FileEdits(
        "mica/ops/linear.py",
        tests=[
            "tests/mica/ops/test_operators.py",
            "tests/mica/fast/test_changes.py",
            "tests/mica/test_kernel_path.py",
        ],
        edits={
            "_MicaLinear.forward": [("if needs_x else None", "")],
            "linear_directly": [("(lora_A.requires_grad or x.requires_grad)", "lora_A.requires_grad")],
        },
    ),
    FileEdits(
        "mica/ops/dispatch.py",
        tests=[
            "tests/mica/ops/test_dispatch.py",
            "tests/mica/ops/test_operators.py",
            "tests/mica/test_kernel_path.py",
            "tests/mica/test_kernel_plans.py",
        ],
        edits={
            "compute": [
                ("or (in_capture and of_experts)", ""),
                ("backend.note_missed if in_capture else", ""),
                ("torch._C._functorch.is_legacy_batchedtensor(tensor)", "False"),
            ],
            "run_backward": [
                ("():\n        return plain(body)", "():\n        return body"),
                ("plain(body)(*args) if is_transformed() else operator(*args)", "operator(*args)"),
                ("if not is_direct(*tensors)", "if False"),
            ],
            "below_autograd": [
                ("torch._C._AutoDispatchBelowADInplaceOrView", "torch._C._AutoDispatchBelowAutograd"),
            ],
            "is_direct": [
                ("tensor is not None and type(tensor) not in PLAIN", "False"),
                ("._C._len_torch_dispatch_stack()\n        or torch", ""),
                ("or torch._C._len_torch_function_stack()", ""),
                ("or is_transformed()", ""),
            ],
            "operator.call": [
                ("device_type not in _AUTOCAST or", ""),
                ("torch.is_autocast_enabled(device_type)", "False"),
            ],
        },
    ),
    FileEdits(
        "mica/ops/factors.py",
        tests=["tests/mica/ops/test_factors.py", "tests/mica/ops/test_operators.py"],
        edits={
            "_DownProjection.forward": [("if ctx.needs_input_grad[2] else None", "")],
            "_down_backward": [("to(x_dtype).view", "view")],
            "_down_cast": [("None, *dropout", "compute_dtype, 0.0, None")],
        },
    ),
    FileEdits(
        "mica/reference.py",
        tests=["tests/mica/test_reference.py"],
        edits={
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
    ),
    FileEdits(
        "mica/products.py",
        tests=["tests/mica/test_products.py"],
        edits={
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
            "product_dtype": [
                ("left.shape[0] > FEW_TO_ROUND or", ""),
                ("left.is_cpu or not", ""),
                ("or not has_native(dtype)", ""),
                ("if factor.dtype != torch.float32:\n            return dtype", "pass"),
            ],
            "added": [("return torch.addmm(y, left, right)", "pass")],
        },
    ),
]  # fmt: skip
