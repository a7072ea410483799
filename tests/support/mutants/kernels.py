"""Wrong edits of the kernels and of the code that launches them."""

from tests.support.mutants.edits import FileEdits

KERNELS = [
    FileEdits(
        "kernels/down_projection.py",
        tests=["tests/kernels/test_skinny.py", "tests/kernels/test_split_k.py", "-k", "down or split_k"],
        edits={
            "_down_projection_kernel": [
                ("(expert >= num_experts) | (first_row >= end)", "first_row >= end"),
                ("p_ptr += expert.to(tl.int64) * stride_pe", "pass"),
                ("expert.to(tl.int64)", "expert"),
                ("mask = (rows < end)[:, None] &", "mask = (rows <= end)[:, None] &"),
                ("mask = (rows < end)[:, None] &", "mask = (rows < num_rows)[:, None] &"),
                ("(ranks < RANK)[None", "(ranks <= RANK)[None"),
                ("0, BLOCK_K) < last", "0, BLOCK_K) <= last"),
                ("x, 0.0)", "0.0, x)"),
                ("rows, start + tl", "rows, tl"),
                ("tl.minimum(rows, end - 1).to(tl.int64)", "tl.minimum(rows, end - 1)"),
                ("tl.minimum(rows, end - 1)", "rows"),
                ("x_ptrs += step * stride_xk", "x_ptrs += step"),
                ("p_ptrs += step * stride_pk", "p_ptrs += step * stride_xk"),
                ("first = split * per_split", "first = split * (per_split - 1)"),
                ("first + per_split, in_features", "first + per_split + 1, in_features"),
                ("ranks < COLUMNS)[None", "ranks < RANK)[None"),
                ("acc, scale, out_ptr", "acc * scale, scale, out_ptr"),
            ],
            "down_projection.plan": [
                ("in_features % config.block_k == 0", "True"),
                ("/ (1.0 - dropout_p)", ""),
            ],
        },
    ),
    FileEdits(
        "kernels/common.py",
        tests=["tests/kernels/test_common.py", "tests/kernels/test_skinny.py", "-k", "test_common or up"],
        edits={
            "dropout_keep": [
                ("tl.int32) >= threshold", "tl.int32) > threshold"),
                ("z ^= second[:, None]", ""),
                ("+ (seed >> 32).to(tl.uint32)", ""),
            ],
            "cast": [("0x7FFF + ((bits >> 16) & 1)", "0x8000")],
            "dot": [("b, acc, input_precision", "b, input_precision")],
            "wide_product": [
                ("ranks < H_RANK)[None", "ranks < BLOCK_R)[None"),
                ("P_RANK == BLOCK_R and", ""),
                ("= start + tl.arange", "= tl.arange"),
            ],
            "keep_threshold": [("dropout_p * 2**24", "dropout_p * 2**23")],
        },
    ),
    FileEdits(
        "kernels/split_k.py",
        tests=["tests/kernels/test_split_k.py", "tests/kernels/test_skinny.py", "-k", "down or split_k"],
        edits={
            "store_sum": [
                ("cast(total * scale", "cast(total"),
                ("cast(acc * scale", "cast(acc"),
                ("== num_splits - 1", "== num_splits - 2"),
                ("tl.store(counter_ptr + tile, 0)", ""),
                ("split.to(tl.int64) * stride_split", "split.to(tl.int64)"),
                ("total += tl.load", "total = tl.load"),
                ("in range(num_splits)", "in range(num_splits - 1)"),
                ("tl.cast(part,", "tl.cast(num_splits - 1 - part,"),
            ],
            "split_evenly": [
                ("ceil_div(length, per_split", "max(1, length // per_split"),
                ("(8 if is_small else 32)", "8"),
                ("(8 if is_small else 32)", "32"),
                ("length, 2 * block", "length, block"),
            ],
        },
    ),
    FileEdits(
        "kernels/grad_a.py",
        tests=["tests/kernels/test_skinny.py", "tests/kernels/test_split_k.py", "-k", "grad or split_k"],
        edits={
            "_grad_a_kernel": [
                ("0, BLOCK_M) < last", "0, BLOCK_M) <= last"),
                ("start + tl.arange(0, BLOCK_M),", "rows,"),
                ("rows = (first + tl", "rows = (tl"),
                ("mask = (ranks < RANK)", "mask = (ranks <= RANK)"),
                ("g_ptrs += step * stride_gm", "g_ptrs += step * stride_gr"),
                ("(columns < in_features)[None, :] size", "(columns <= in_features)[None, :]\n    size"),
                ("first + per_split, num_rows", "first + per_split - 1, num_rows"),
                ("split.to(tl.int64) * RANK * in_features", "split.to(tl.int64) * BLOCK_R * in_features"),
            ],
            "grad_a.plan": [("/ (1.0 - dropout_p)", "")],
        },
    ),
    FileEdits(
        "kernels/launching.py",
        tests=[
            "tests/kernels/test_launching.py",
            "tests/kernels/test_split_k.py",
            "tests/mica/paths/test_triton_path_plans.py",
        ],
        edits={
            "Plan.__call__": [
                ("math.gcd(16, *addresses) == 16", "True"),
                ("or _is_observed(self.kernel)", ""),
                ("elif index == current_device()", "elif index >= 0"),
            ],
            "Plan._launch": [("not is_observed and", "")],
            "Launch.__call__": [("is_capturing(device) and", ""), ("and not self._is_loaded()", "")],
            "_is_observed": [("or runtime.debug", "")],
            "can_run_directly": [('hooks, "x", "y"', "hooks, *seen[9:]")],
            "Plan.__post_init__": [("self.kernel.arg_names[-len(values) :]", "values")],
            "layout": [("dtype, tensor.get_device()", "dtype")],
            "PlanCache.keep": [("len(self._plans) >= MOST_PLANS", "False")],
            "PlannedCall.launch_first": [("form not in cache.refused", "True"), (", *dtypes)", ")")],
            "Launcher.key": [
                ("fp32_setting(), *map", "*map"),
                ("*map(layout, tensors),", ""),
                (", *numbers.items()", ""),
            ],
            "RecordedLaunches.record": [("len(self._steps) >= MOST_PLANS", "False")],
            "_recorded": [
                ("steps[place] = functools.partial(launcher.run, plan, plan)", "pass"),
                ("steps[place] =", "steps[0] ="),
            ],
            "_is_refusal": [
                ("not isinstance(error, triton.runtime.errors.InterpreterError)", "True"),
                ('and "PassManager::run failed" in str(error)', ""),
            ],
        },
    ),
    FileEdits(
        "kernels/workspace.py",
        tests=["tests/kernels/test_workspace.py", "tests/kernels/test_split_k.py"],
        edits={
            "of_split": [("plan.grid[0]", "1")],
            "counters": [
                ("or torch.cuda.is_current_stream_capturing()", ""),
                ("allocate_persistent(lambda:", "(lambda make, _: make())(lambda:"),
            ],
            "allocate_persistent": [
                ("own.wait_stream(caller)", "pass"),
                ("caller.wait_stream(own)", ""),
                ("made.record_stream(caller)", ""),
                ("thread.submit(run).result", "run"),
            ],
        },
    ),
    FileEdits(
        "kernels/configs.py",
        tests=["tests/kernels/test_configs.py", "tests/kernels/test_split_k.py"],
        edits={
            "down_projection": [("<= (512 if block_r", "<= (256 if block_r")],
            "grad_a": [("narrow, wide] if num_tokens <= 512 else [", "")],
            "up_projection": [("wide, *square, narrow", "*square, wide, narrow")],
            "fused_linear": [
                ("num_tokens >= 4096 and", ""),
                ("and out_features >= 8192", ""),
                ("and not dropout", ""),
            ],
            "_fits": [("limit // bytes_per_stage", "config.num_stages")],
            "forms_of": [("tokens >= row.tokens and", ""), ("and rank <= row.rank", "")],
        },
    ),
    FileEdits(
        "kernels/up_projection.py",
        tests=["tests/kernels/test_skinny.py", "-k", "up"],
        edits={
            "_up_projection_kernel": [
                ("* scale  # fmt: skip", "# fmt: skip"),
                ("rows, columns, threshold", "columns, rows, threshold"),
                ("(columns < out_features)[None", "(columns <= out_features)[None"),
                ("mask = (rows < end)", "mask = (rows <= end)"),
                ("mask = (rows < end)", "mask = (rows < num_rows)"),
                ("cast(base + acc,", "cast(acc,"),
                ("cast(base + acc,", "cast(cast(base, out_ptr.dtype.element_ty).to(tl.float32) + acc,"),
                ("rows_64 * stride_om", "rows_64 * stride_bm"),
                ("p_ptr += expert.to(tl.int64) * stride_pe", "pass"),
                ("bias_ptr + expert.to(tl.int64) * stride_ce", "bias_ptr"),
                ("if expert >= num_experts:", "if False:"),
            ],
            "up_projection_.plan": [
                ("/ (1.0 - dropout_p)", ""),
                ("out_features % config.block_n == 0", "True"),
                ("tail=True", "tail=False"),
                ("om_on=base if out is None else out", "om_on=base"),
            ],
        },
    ),
    FileEdits(
        "kernels/fused_linear.py",
        tests=["tests/kernels/test_fused_linear.py", "tests/kernels/test_launching.py"],
        edits={
            "_tile": [("tl.minimum(tiles_m - first, GROUP)", "GROUP")],
            "_fused_linear_kernel": [
                ("+ inner < in_features)[None, :]", "< in_features)"),
                ("w_ptrs += step * stride_wk", "w_ptrs += step * stride_wn"),
            ],
            "_low_rank": [
                ("* scale  # fmt: skip", "# fmt: skip"),
                ("bias.to(tl.float32)[None, :]", "0.0"),
                ("acc, 0.0", "0.0, acc"),
            ],
            "_fused_linear_descriptor_kernel": [("load([row, start])", "load([row, 0])")],
            "why_not_descriptor": [("row_bytes % 16 or", "")],
            "_run": [("(x.data_ptr() % 16 or w.data_ptr() % 16)", "False")],
            "_DescriptorPlan": [
                ("launch_class = _DescriptorLaunch", "pass"),
                ("contextvars.copy_context().run(_with_scratch, ", "_with_scratch("),
            ],
        },
    ),
    FileEdits(
        "kernels/limits.py",
        tests=["tests/mica/ops/test_checks.py", "tests/kernels/test_prepared_b.py"],
        edits={
            "padded_columns": [("(rank + 15)", "rank")],
            "same_device": [("> 1", "> 2")],
            "dropout": [("or seed.shape != (1,)", ""), ("<= dropout_p < 1.0", "<= dropout_p <= 1.0")],
        },
    ),
    FileEdits(
        "kernels/prepared_b.py",
        tests=["tests/kernels/test_prepared_b.py"],
        edits={
            "_cached": [
                ("lora_B._version, lora_B", "lora_B"),
                ("lora_B.data_ptr(),", ""),
                ("state, lora_B.detach()", "state, lora_B[:0].clone()"),
                ("workspace.allocate_persistent(lambda:", "(lambda make, _: make())(lambda:"),
            ],
            "_is_cacheable": [("and not lora_B.is_inference()", "")],
            "padded": [("lora_B.new_zeros", "lora_B.new_empty")],
        },
    ),
    FileEdits(
        "kernels/runtime.py",
        tests=["tests/kernels/test_runtime.py"],
        edits={
            "trial": [("not torch.equal(down_projection(x, factor), expected)", "False")],
            "why_unavailable": [("torch.cuda.is_current_stream_capturing()", "False")],
            "is_settled": [("device in tried or", "")],
        },
    ),
]  # fmt: skip
