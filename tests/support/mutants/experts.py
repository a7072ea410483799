"""Wrong edits of the kernels for stacks of experts and of the code that calls them."""

EXPERTS = {
    ("kernels/expert_tiles.py", "tests/kernels/test_expert_tiles.py"): {
        "tile_of": [
            ("+ experts < tile", "+ experts <= tile"),
            ("is_before = is_expert &", "is_before ="),
            ("- expert) * BLOCK_M", ") * BLOCK_M"),
        ],
        "rows_of": [("offsets_ptr + expert - 1", "offsets_ptr + expert"), ("other=num_rows", "other=0")],
        "most_tiles": [("+ num_experts + tail", "+ num_experts"), ("num_rows // block_m +", "")],
    },
    (
        "mica/paths/triton_path.py",
        "tests/mica/paths/test_triton_path_experts.py",
        "tests/mica/paths/test_triton_path_plans.py",
        "tests/mica/ops/test_operators.py",
        "tests/mica/paths/test_parity.py",
        *("-k", "experts"),
    ): {
        "experts_linear": [
            ('"scale": scaling,', '"scale": 1.0,'),
            ("None, None, bias, offsets)", "None, None, None, offsets)"),
            ("dtype, offsets.contiguous()", "dtype, offsets"),
            ("layout(offsets),", ""),
            ("layout(bias),", ""),
            ("layout(bias), lora_B.shape[1]", "layout(bias)"),
            ("*tensors, scaling,", "*tensors,"),
        ],
        "experts_linear_backward": [
            ('"scale": scaling,', '"scale": scaling * scaling,'),
            (', "out_dtype": lora_A.dtype', ""),
            ("layout(offsets), layout(lora_A)", "layout(offsets)"),
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
    ("kernels/prepared_b.py", "tests/kernels/test_prepared_b.py"): {
        "prepare_experts": [("lora_B if lora_B._base is None else lora_B._base", "lora_B")]
    },
}
