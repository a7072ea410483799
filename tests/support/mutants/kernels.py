"""Wrong edits of the kernels and of the code that launches them."""

from tests.support.mutants.edits import FileEdits

KERNELS = [
    FileEdits(
        "kernels/down_projection.py",
        tests=[
            "tests/kernels/test_down_projection.py",
            "tests/kernels/test_launching.py",
            "tests/kernels/test_split_sum.py",
        ],
        edits={
            "_down_projection_kernel": [
                ("mask = (rows < num_tokens)[:, None] &", "mask = (rows <= num_tokens)[:, None] &"),
                ("(ranks < RANK)[None", "(ranks <= RANK)[None"),
                ("0, BLOCK_K) < last", "0, BLOCK_K) <= last"),
                ("x, 0.0", "0.0, x"),
                ("rows, start + tl", "rows, tl"),
                ("near.to(tl.int64)", "near"),
                ("tl.minimum(rows, num_tokens - 1) if CLAMPED else", ""),
                ("[None, :] if CLAMPED else x_mask & inside", ""),
                ("x_ptrs += step * stride_xk", "x_ptrs += step"),
                ("p_ptrs += step * stride_pk", "p_ptrs += step * stride_xk"),
                ("first = split * k_per_split", "first = split * (k_per_split - 1)"),
                ("first + k_per_split, in_features", "first + k_per_split + 1, in_features"),
                ("ranks < COLUMNS)[None", "ranks < RANK)[None"),
            ],
            "plan_down_projection.plan": [
                ("in_features % config.block_k == 0", "True"),
                ("then is None", "True"),
                ("then,", ""),
            ],
            "plan_down_projection": [("/ (1.0 - dropout_p)", "")],
            "key_of": [
                ("layout(factor),", ""),
                ("tuning.state(),", ""),
                ("fp32_setting() if (compute_dtype", "0 if (compute_dtype"),
            ],
        },
    ),
    FileEdits(
        "kernels/common.py",
        tests=[
            "tests/kernels/test_common.py",
            "tests/kernels/test_down_projection.py",
            "tests/kernels/test_up_projection.py",
        ],
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
        "kernels/split_sum.py",
        tests=["tests/kernels/test_split_sum.py", "tests/kernels/test_down_projection.py"],
        edits={
            "store_sum": [
                ("cast(total * scale", "cast(total"),
                ("cast(acc * scale", "cast(acc"),
                ("== num_splits - 1", "== num_splits - 2"),
                ("tl.store(counter_ptr, 0)", ""),
                ("tl.int64) * stride_split", "tl.int64)"),
            ],
            "_add_parts_kernel": [
                ("cast(total * scale", "cast(total"),
                ("mask = offsets < size", "mask = offsets <= size"),
            ],
            "_sum_of_parts": [
                ("total += tl.load", "total = tl.load"),
                ("in range(num_splits)", "in range(num_splits - 1)"),
                ("tl.cast(split", "tl.cast(num_splits - 1 - split"),
            ],
            "last_arriver_adds": [('target.startswith("sm_")', "True")],
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
        tests=[
            "tests/kernels/test_grad_a.py",
            "tests/kernels/test_launching.py",
            "tests/kernels/test_split_sum.py",
        ],
        edits={
            "plan_grad_a.plan": [
                ("then is None", "True"),
                ("then,", ""),
            ],
            "_grad_a_kernel": [
                ("0, BLOCK_M) < last", "0, BLOCK_M) <= last"),
                ("start + tl.arange(0, BLOCK_M),", "rows,"),
                ("mask = (ranks < RANK)", "mask = (ranks <= RANK)"),
                ("g_ptrs += step * stride_gm", "g_ptrs += step * stride_gr"),
                ("(columns < in_features)[None, :] size", "(columns <= in_features)[None, :]\n    size"),
                ("first + tokens_per_split, num_tokens", "first + tokens_per_split - 1, num_tokens"),
            ],
            "plan_grad_a": [("/ (1.0 - dropout_p)", "")],
            "key_of": [
                ("out_dtype,\n        dropout_p", "dropout_p"),
                ("layout(seed) if dropout_p else", ""),
            ],
        },
    ),
    FileEdits(
        "kernels/launching.py",
        tests=["tests/kernels/test_launching.py", "tests/kernels/test_split_sum.py"],
        edits={
            "Plan.__call__": [
                ("self.then(*[tensors[place] for place in self._passed_on])", "pass"),
                ("math.gcd(16, *addresses) == 16", "True"),
                ("or _is_observed(self.kernel)", ""),
                ("elif index == current_device()", "elif index >= 0"),
            ],
            "Plan._launch": [
                ("bind(tensors).alone()", "bind(tensors)()"),
                ("not is_observed and", ""),
            ],
            "Launch.alone": [("is_capturing(device) and", ""), ("and not self._is_loaded()", "")],
            "_is_observed": [("or runtime.debug", "")],
            "can_run_directly": [('hooks, "x", "y"', "hooks, *seen[9:]")],
            "Plan.__post_init__": [("self.kernel.arg_names[-len(values) :]", "values")],
            "layout": [("dtype, tensor.get_device()", "dtype")],
            "Plans.keep": [("len(self._kept) >= MOST_PLANS", "False")],
            "Choice.first": [
                ("form not in plans.refused", "True"),
                (", *(tensor.dtype for tensor in tensors)", ""),
                ("tuning.is_settled(self.device)", "True"),
            ],
            "_is_refusal": [
                ("not isinstance(error, triton.runtime.errors.InterpreterError)", "True"),
                ('and "PassManager::run failed" in str(error)', ""),
            ],
        },
    ),
    FileEdits(
        "kernels/workspace.py",
        tests=["tests/kernels/test_workspace.py", "tests/kernels/test_split_sum.py"],
        edits={
            "of_split": [("if plan.then is None else parts", "")],
            "counters": [
                ("or torch.cuda.is_current_stream_capturing()", ""),
                ("kept(lambda:", "(lambda make, _: make())(lambda:"),
            ],
            "kept": [
                ("own.wait_stream(caller)", "pass"),
                ("caller.wait_stream(own)", ""),
                ("made.record_stream(caller)", ""),
                ("thread.submit(run).result", "run"),
            ],
        },
    ),
    FileEdits(
        "kernels/configs.py",
        tests=["tests/kernels/test_configs.py", "tests/kernels/test_split_sum.py"],
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
        },
    ),
    FileEdits(
        "kernels/up_projection.py",
        tests=[
            "tests/kernels/test_up_projection.py",
            "tests/kernels/test_tuning.py",
            "tests/kernels/test_launching.py",
        ],
        edits={
            "_up_projection_kernel": [
                ("* scale  # fmt: skip", "# fmt: skip"),
                ("rows, columns, threshold", "columns, rows, threshold"),
                ("(columns < out_features)[None", "(columns <= out_features)[None"),
                ("row_mask = (rows < num_tokens)", "row_mask = (rows <= num_tokens)"),
                ("base.to(tl.float32) +", ""),
                ("rows_64 * stride_om", "rows_64 * stride_bm"),
            ],
            "plan_up_projection.plan": [
                ("/ (1.0 - dropout_p)", ""),
                ("out_features % config.block_n == 0", "True"),
            ],
            "plan_up_projection": [("out,) if out.data_ptr() == base.data_ptr() else (", "")],
            "key_of": [("layout(out),", ""), ("fp32_setting() if", "None if")],
        },
    ),
    FileEdits(
        "kernels/embedding.py",
        tests=["tests/kernels/test_embedding.py", "tests/kernels/test_launching.py"],
        edits={
            "_embedding_kernel": [
                ("(index >= 0) & (index < num_embeddings)", "index >= 0"),
                ("acc, PRECISION) * scale", "acc, PRECISION)"),
            ],
            "_scatter_kernel": [
                ("(index != skipped) &", ""),
                ("(place == 0) | (before != index)", "before != index"),
                ("tl.sum(same.to(tl.int32), axis=0) == BLOCK_M", "False"),
                ("total += tl.sum", "total = tl.sum"),
                ("mask=ranks < RANK", "mask=ranks < COLUMNS"),
            ],
            "grad_a_embedding": [("num_embeddings, padding_idx, out_dtype", "num_embeddings, out_dtype")],
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
            "plan_fused_linear.plan": [("1) if transposed else w.stride(", "")],
            "_fused_linear_descriptor_kernel": [("load([row, start])", "load([row, 0])")],
            "why_not_descriptor": [("row_bytes % 16 or", "")],
            "fused_linear": [("and (x.data_ptr() % 16, w.data_ptr() % 16)", "")],
            "_DescriptorPlan": [
                ("launch_class = _DescriptorLaunch", "pass"),
                ("contextvars.copy_context().run(_with_scratch, ", "_with_scratch("),
            ],
        },
    ),
    FileEdits(
        "kernels/checks.py",
        tests=["tests/kernels/test_up_projection.py", "tests/kernels/test_grad_a.py"],
        edits={
            "ranks_fit": [("max(rank, rows) != padded_columns(min(rank, rows))", "False")],
            "rank": [("if not 1 <=", "if not 0 <=")],
        },
    ),
    FileEdits(
        "kernels/limits.py",
        tests=["tests/mica/ops/test_checks.py", "tests/kernels/test_prepared.py"],
        edits={
            "padded_columns": [("(rank + 15)", "rank")],
            "same_device": [("> 1", "> 2")],
            "dropout": [("or seed.shape != (1,)", ""), ("<= dropout_p < 1.0", "<= dropout_p <= 1.0")],
        },
    ),
    FileEdits(
        "kernels/prepared.py",
        tests=["tests/kernels/test_prepared.py"],
        edits={
            "_kept": [
                ("lora_B._version, lora_B", "lora_B"),
                ("lora_B.data_ptr(),", ""),
                ("state, lora_B.detach()", "state, lora_B[:0].clone()"),
                ("workspace.kept(lambda:", "(lambda make, _: make())(lambda:"),
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
    FileEdits(
        "kernels/tuning.py",
        tests=["tests/kernels/test_tuning.py"],
        edits={
            "_measure": [("tensor.copy_(saved)", "pass")],
            "pick": [("fastest = min", "fastest = max")],
            "_write": [("*load(file), **_read", "*_read")],
            "forget": [("_generation += 1", "")],
            "state": [("(_generation, *(value() for value in _environment))", "_generation")],
        },
    ),
]  # fmt: skip
