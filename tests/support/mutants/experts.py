"""Wrong edits of the kernels for stacks of experts and of the code that calls them."""

from tests.support.mutants.edits import FileEdits

EXPERTS = [
    FileEdits(
        "kernels/experts_tiles.py",
        tests=["tests/kernels/test_experts_tiles.py"],
        edits={
            "tile_of": [
                ("+ experts < tile", "+ experts <= tile"),
                ("is_before = is_expert &", "is_before ="),
                ("- expert) * BLOCK_M", ") * BLOCK_M"),
            ],
            "rows_of": [("offsets_ptr + expert - 1", "offsets_ptr + expert"), ("other=num_rows", "other=0")],
            "most_tiles": [("+ num_experts + tail", "+ num_experts"), ("num_rows // block_m +", "")],
        },
    ),
    FileEdits(
        "kernels/experts_down.py",
        tests=["tests/kernels/test_experts_down.py"],
        edits={
            "_experts_down_kernel": [
                ("(expert < num_experts) & (first_row < end)", "first_row < end"),
                ("p_ptr + expert.to(tl.int64) * stride_pe", "p_ptr"),
                ("expert.to(tl.int64)", "expert"),
                ("tl.minimum(rows, end - 1) if CLAMPED else", ""),
                ("mask = (rows < end)[:, None] &", "mask = (rows < num_rows)[:, None] &"),
                ("x_mask = (rows < end)", "x_mask = (rows < end + 9)"),
                ("first = split * k_per_split", "first = split * (k_per_split - 1)"),
                ("(ranks < RANK)[None", "(ranks <= RANK)[None"),
                ("acc, scale, out_ptr", "acc * scale, scale, out_ptr"),
            ],
            "plan_experts_down.plan": [
                ("in_features % config.block_k == 0", "True"),
                ("then is None", "True"),
            ],
        },
    ),
    FileEdits(
        "kernels/experts_up.py",
        tests=["tests/kernels/test_experts_up.py"],
        edits={
            "_experts_up_kernel": [
                ("row_mask = (rows < end)", "row_mask = (rows < num_rows)"),
                ("p_ptr + expert.to(tl.int64) * stride_pe", "p_ptr"),
                ("bias_ptr + expert.to(tl.int64) * stride_be", "bias_ptr"),
                ("if expert < num_experts:", "if True:"),
                ("cast(base + acc, y", "cast(cast(base, y_ptr.dtype.element_ty).to(tl.float32) + acc, y"),
            ],
            "plan_experts_up.plan": [("tail=True", "tail=False")],
        },
    ),
    FileEdits(
        "kernels/experts_grad_a.py",
        tests=["tests/kernels/test_experts_grad_a.py"],
        edits={
            "_experts_grad_a_kernel": [
                ("0, BLOCK_M) < last", "0, BLOCK_M) <= last"),
                ("rows = (first + tl", "rows = (tl"),
                ("expert.to(tl.int64) * RANK + ranks", "expert.to(tl.int64) * BLOCK_R + ranks"),
                ("(ranks < RANK)[:, None]", "(ranks <= RANK)[:, None]"),
                ("g_ptrs += step * stride_gm", "g_ptrs += step"),
            ],
        },
    ),
    FileEdits(
        "mica/kernel_path_experts.py",
        tests=["tests/mica/test_kernel_path_experts.py"],
        edits={
            "experts_linear": [("scale=scaling,", "scale=1.0,"), (", bias=bias)", ")")],
            "experts_linear_backward": [
                ("scale=scaling,", "scale=scaling * scaling,"),
                ("lora_A.shape[1], out_dtype=lora_A.dtype", "lora_A.shape[1]"),
            ],
            "base_product": [
                ("if not _is_aligned(x):", "if False:"),
                (" and _is_aligned(weight := weight.to(x.dtype))", ""),
                ("is_small and ", ""),
                ("features, weight.shape[2]", "features"),
                ("x.stride(0), features, weight.shape[2]", "weight.shape[2]"),
                ("offsets.to(torch.int32)", "offsets"),
            ],
            "_is_grouped": [("or num_experts > _MOST_GROUPS", ""), (">= (8, 0)", ">= (7, 0)")],
            "_is_aligned": [("*tensor.shape[1:]", "")],
        },
    ),
    FileEdits(
        "kernels/prepared.py",
        tests=["tests/kernels/test_prepared.py"],
        edits={"prepare_experts": [("lora_B if lora_B._base is None else lora_B._base", "lora_B")]},
    ),
]
