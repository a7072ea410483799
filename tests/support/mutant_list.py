"""The wrong edits of `tests/mutants.py`, and which tests must see them."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """``old`` occurs once in ``file``."""

    file: str
    old: str
    new: str


TESTS = {
    "kernels/common.py": ["tests/kernels/test_common.py", "tests/kernels/test_down_projection.py",
                          "tests/kernels/test_up_projection.py"],
    "kernels/configs.py": ["tests/kernels/test_configs.py"],
    "kernels/checks.py": ["tests/kernels/test_up_projection.py", "tests/kernels/test_grad_a.py"],
    "kernels/down_projection.py": ["tests/kernels/test_down_projection.py"],
    "kernels/embedding.py": ["tests/kernels/test_embedding.py"],
    "kernels/fused_linear.py": ["tests/kernels/test_fused_linear.py"],
    "kernels/grad_a.py": ["tests/kernels/test_grad_a.py"],
    "kernels/merge.py": ["tests/kernels/test_merge.py"],
    "kernels/prepared.py": ["tests/kernels/test_prepared.py"],
    "kernels/runtime.py": ["tests/kernels/test_runtime.py"],
    "kernels/tuning.py": ["tests/kernels/test_tuning.py"],
    "kernels/up_projection.py": ["tests/kernels/test_up_projection.py", "tests/kernels/test_tuning.py"],
    "kernels/workspace.py": ["tests/kernels/test_workspace.py"],
    "mica/backend.py": ["tests/mica/test_backend.py"],
    "mica/kernel_path.py": ["tests/mica/test_kernel_path.py"],
    "mica/ops.py": ["tests/mica/test_kernel_path.py", "tests/mica/test_ops.py"],
    "mica/reference.py": ["tests/mica/test_reference.py"],
}  # fmt: skip

_DOWN, _UP, _GRAD = "kernels/down_projection.py", "kernels/up_projection.py", "kernels/grad_a.py"
_COMMON, _EMBED, _FUSED = "kernels/common.py", "kernels/embedding.py", "kernels/fused_linear.py"

MUTANTS = [
    # the skinny product
    Mutant(_DOWN, "mask = (rows < num_tokens)[:, None] & (ranks", "mask = (rows <= num_tokens)[:, None] & (ranks"),
    Mutant(_DOWN, "p_mask = (ranks < RANK)[None, :]", "p_mask = (ranks <= RANK)[None, :]"),
    Mutant(_DOWN, "inside = start + tl.arange(0, BLOCK_K) < last", "inside = start + tl.arange(0, BLOCK_K) <= last"),
    Mutant(_DOWN, '"EVEN_K": in_features % config.block_k == 0', '"EVEN_K": True'),
    Mutant(_DOWN, "x = tl.where(keep, x, 0.0)", "x = tl.where(keep, 0.0, x)"),
    Mutant(_DOWN, "rows, start + tl.arange(0, BLOCK_K), threshold", "rows, tl.arange(0, BLOCK_K), threshold"),
    Mutant(_DOWN, "rows.to(tl.int64)[:, None] * stride_xm", "rows[:, None] * stride_xm"),
    Mutant(_DOWN, "x_ptrs += step * stride_xk", "x_ptrs += step"),
    Mutant(_DOWN, "p_ptrs += step * stride_pk", "p_ptrs += step * stride_xk"),
    Mutant(_DOWN, "first = split * k_per_split", "first = split * (k_per_split - 1)"),
    Mutant(_DOWN, "first + k_per_split, in_features)", "first + k_per_split + 1, in_features)"),
    Mutant(_DOWN, '"scale": float(scale) / (1.0 - dropout_p)', '"scale": float(scale)'),
    Mutant(_COMMON, "cast(total * scale, out_ptr", "cast(total, out_ptr"),
    Mutant(_COMMON, "cast(acc * scale, out_ptr", "cast(acc, out_ptr"),
    Mutant(_COMMON, "                total += tl.load(", "                total = tl.load("),
    Mutant(_DOWN, "& (ranks < COLUMNS)[None, :]", "& (ranks < RANK)[None, :]"),
    Mutant(_DOWN, "return per_split, ceil_div(length, per_split)", "return per_split, max(1, length // per_split)"),
    Mutant(_DOWN, "length * itemsize // (32 * columns)", "length * itemsize // columns"),
    # what all share
    Mutant(_COMMON, "for other in range(num_splits):", "for other in range(num_splits - 1):"),
    Mutant(_COMMON, "== num_splits - 1", "== num_splits - 2"),
    Mutant(_COMMON, "            tl.store(counter_ptr, 0)\n", ""),
    Mutant(_COMMON, "partial_ptr + split.to(tl.int64) * stride_split", "partial_ptr + split.to(tl.int64)"),
    Mutant(_COMMON, ".to(tl.int32) >= threshold", ".to(tl.int32) > threshold"),
    Mutant(_COMMON, "    z ^= second[:, None]\n", ""),
    Mutant(_COMMON, "_mix(first + (seed >> 32).to(tl.uint32))", "_mix(first)"),
    Mutant(_COMMON, "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
    Mutant(_COMMON, "return tl.dot(a, b, acc, input_precision", "return tl.dot(a, b, input_precision"),
    Mutant(_COMMON, "row_mask & (ranks < H_RANK)[None, :]", "row_mask & (ranks < BLOCK_R)[None, :]"),
    Mutant(_COMMON, "if P_RANK == BLOCK_R and EVEN_N:", "if EVEN_N:"),
    Mutant(_COMMON, "ranks = start + tl.arange(0, BLOCK_K)", "ranks = tl.arange(0, BLOCK_K)"),
    Mutant(_COMMON, 'if allowed and not exact else "tf32x3"', 'if allowed else "tf32x3"'),
    Mutant(_COMMON, "round(dropout_p * 2**24)", "round(dropout_p * 2**23)"),
    # the wide product
    Mutant(_UP, "    ) * scale  # fmt: skip", "    )  # fmt: skip"),
    Mutant(_UP, "acc += bias.to(tl.float32)[None, :]", "acc += 0.0"),
    Mutant(_UP, "rows, columns, threshold), acc, 0.0)", "columns, rows, threshold), acc, 0.0)"),
    Mutant(_UP, "row_mask & (columns < out_features)[None, :]", "row_mask & (columns <= out_features)[None, :]"),
    Mutant(_UP, "row_mask = (rows < num_tokens)[:, None]", "row_mask = (rows <= num_tokens)[:, None]"),
    Mutant(_UP, "cast(base.to(tl.float32) + acc,", "cast(acc,"),
    Mutant(_UP, "rows_64 * stride_om", "rows_64 * stride_bm"),
    Mutant(_UP, '"scale": float(scale) / (1.0 - dropout_p)', '"scale": float(scale)'),
    Mutant(_UP, '"EVEN_N": out_features % config.block_n == 0', '"EVEN_N": True'),
    Mutant(_UP, "updates=(out,) if out.data_ptr() == base.data_ptr() else ()", "updates=()"),
    # dA
    Mutant(_GRAD, "inside = (start + tl.arange(0, BLOCK_M) < last)", "inside = (start + tl.arange(0, BLOCK_M) <= last)"),
    Mutant(_GRAD, "dropout_keep(seed, start + tl.arange(0, BLOCK_M), columns", "dropout_keep(seed, rows, columns"),
    Mutant(_GRAD, '"scale": 1.0 / (1.0 - dropout_p)', '"scale": 1.0'),
    Mutant(_GRAD, "mask = (ranks < RANK)[:, None]", "mask = (ranks <= RANK)[:, None]"),
    Mutant(_GRAD, "g_ptrs += step * stride_gm", "g_ptrs += step * stride_gr"),
    Mutant(_GRAD, "& (columns < in_features)[None, :]\n    size", "& (columns <= in_features)[None, :]\n    size"),
    Mutant(_GRAD, "first + tokens_per_split, num_tokens)", "first + tokens_per_split - 1, num_tokens)"),
    # embeddings
    Mutant(_EMBED, "valid = (index >= 0) & (index < num_embeddings)", "valid = index >= 0"),
    Mutant(_EMBED, "(index != skipped) & ", ""),
    Mutant(_EMBED, "is_first = (place == 0) | (before != index)", "is_first = before != index"),
    Mutant(_EMBED, "more = tl.sum(same.to(tl.int32), axis=0) == BLOCK_M", "more = False"),
    Mutant(_EMBED, "cast(p, COMPUTE), acc, PRECISION) * scale", "cast(p, COMPUTE), acc, PRECISION)"),
    Mutant(_EMBED, "total += tl.sum(", "total = tl.sum("),
    Mutant(_EMBED, "grad_ptrs, cast(total, grad_ptr.dtype.element_ty), mask=ranks < RANK",
           "grad_ptrs, cast(total, grad_ptr.dtype.element_ty), mask=ranks < COLUMNS"),
    # the fused product
    Mutant(_FUSED, "height = tl.minimum(tiles_m - first, GROUP)", "height = GROUP"),
    Mutant(_FUSED, "x_mask & (start + inner < in_features)[None, :]", "x_mask & (start < in_features)"),
    Mutant(_FUSED, "    ) * scale  # fmt: skip", "    )  # fmt: skip"),
    Mutant(_FUSED, "acc += bias.to(tl.float32)[None, :]", "acc += 0.0"),
    Mutant(_FUSED, "w.stride(1) if transposed else w.stride(0)", "w.stride(0)"),
    Mutant(_FUSED, "w_ptrs += step * stride_wk", "w_ptrs += step * stride_wn"),
    Mutant(_FUSED, "x = x_desc.load([row, start])", "x = x_desc.load([row, 0])"),
    Mutant(_FUSED, "rows, columns, threshold), acc, 0.0)", "rows, columns, threshold), 0.0, acc)"),
    Mutant(_FUSED, "row_bytes % 16 or ", ""),
    # merge
    Mutant("kernels/merge.py", "exact=True", "exact=False"),
    Mutant("kernels/merge.py", "scale=scale", "scale=1.0"),
    Mutant("kernels/merge.py", "compute_dtype=torch.float32", "compute_dtype=weight.dtype"),
    # what stands around the kernels
    Mutant("kernels/checks.py", "max(rank, rows) != padded_columns(min(rank, rows))", "False"),
    Mutant("kernels/checks.py", "if not 1 <= value <= MAX_RANK:", "if not 0 <= value <= MAX_RANK:"),
    Mutant("kernels/configs.py", "limit // bytes_per_stage", "config.num_stages"),
    Mutant("kernels/prepared.py", "(lora_B._version, lora_B", "(lora_B"),
    Mutant("kernels/prepared.py", "lora_B.data_ptr(), ", ""),
    Mutant("kernels/prepared.py", "_Entry(state, lora_B.detach(),", "_Entry(state, lora_B[:0].clone(),"),
    Mutant("kernels/prepared.py", "        and not lora_B.is_inference()\n", ""),
    Mutant("kernels/prepared.py", "lora_B.new_zeros(", "lora_B.new_empty("),
    Mutant("kernels/runtime.py", "if not torch.equal(down_projection(x, factor), expected):", "if False:"),
    Mutant("kernels/tuning.py", "tensor.copy_(saved)", "pass"),
    Mutant("kernels/tuning.py", "fastest = min(", "fastest = max("),
    Mutant("kernels/tuning.py", "{**_load(file), **_read(), entry: choice}", "{**_read(), entry: choice}"),
    Mutant("kernels/workspace.py", " or torch.cuda.is_current_stream_capturing()", ""),
    Mutant("mica/backend.py", 'if reason and backend == "triton":', "if False:"),
    Mutant("mica/kernel_path.py", 'if backend.requested() == "auto":', "if True:"),
    Mutant("mica/kernel_path.py", 'options = {"dropout_p": dropout_p, "seed": seed}\n        grad_A',
           "options = {}\n        grad_A"),
    Mutant("mica/kernel_path.py", "padding_idx=padding_idx, ", ""),
    Mutant("mica/ops.py", "weight if needs_x else None, lora_A, lora_B, seed)", "weight, lora_A, lora_B, seed)"),
    Mutant("mica/ops.py", "backward = _plain(_linear_backward) if", "backward = _linear_backward if"),
    Mutant("mica/reference.py", "torch.arange(first_row, first_row + rows,", "torch.arange(0, rows,"),
    Mutant("mica/reference.py", "return grad / (1.0 - dropout_p) if dropout_p else grad", "return grad"),
    Mutant("mica/reference.py", "index * _TOKENS_PER_CHUNK, dropout_p", "0, dropout_p"),
]  # fmt: skip
