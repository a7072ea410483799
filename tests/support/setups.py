"""The ways to train and use MiCA adapters, and the test of each: the table in mica/fast/README.md."""

from typing import NamedTuple


class Setup(NamedTuple):
    name: str
    works: str  # "yes", "refused" (an error that says why in one sentence) or "no"
    fast: str  # runs on this backend: "yes", "partly" or "no" (PEFT's own code)
    test: str  # path::function


TRAINING = "tests/mica/fast/test_training.py"
DISTRIBUTED = "tests/mica/fast/test_distributed_training.py"
TENSOR_PARALLEL = "tests/mica/fast/test_tensor_parallel.py"
DEEPSPEED = "tests/mica/fast/test_deepspeed.py"
ADAPTERS = "tests/mica/fast/test_adapters.py"
RECIPES = "tests/mica/fast/test_recipes.py"

EXPERTS = "tests/mica/fast/test_experts.py"

QUANTISED = "tests/mica/fast/test_quantised.py"
FOLLOWS = f"{QUANTISED}::test_training_runs_on_the_operators_and_follows_peft"

SETUPS = [
    Setup("bitsandbytes 4-bit: nf4, fp4, double quantisation, any `quant_storage`", "yes", "yes", FOLLOWS),
    Setup("bitsandbytes 8-bit", "yes", "yes", FOLLOWS),
    Setup("HQQ", "yes", "yes", FOLLOWS),
    Setup("torchao int8", "yes", "yes", FOLLOWS),
    Setup("GPTQ, AWQ (tested with stubs of gptqmodel's layers)", "yes", "yes", FOLLOWS),
    Setup(
        "torchao `Int4Tensor`, AQLM, EETQ, Intel Neural Compressor",
        "refused",
        "no",
        "tests/mica/fast/test_quantised_refusals.py::test_a_library_that_is_not_covered_is_named",
    ),
    Setup(
        "an adapter trained on a quantised base, loaded on the unquantised one, and vice versa",
        "yes",
        "yes",
        f"{QUANTISED}::test_to_the_unquantised_base_and_back",
    ),
    Setup("`torch.compile(fullgraph=True)`", "yes", "yes", f"{TRAINING}::test_compile_fullgraph"),
    Setup(
        'CUDA graphs: `torch.compile(mode="reduce-overhead")`, `make_graphed_callables` (tested with stubs of'
        " streams and captures; the tests with real graphs need a GPU)",
        "yes",
        "yes",
        "tests/kernels/test_workspace.py::test_what_is_kept_is_made_by_another_thread_on_the_default_stream",
    ),
    Setup("autocast, bf16", "yes", "yes", f"{TRAINING}::test_autocast_bf16"),
    Setup(
        "one autocast context around the whole training loop",
        "yes",
        "yes",
        f"{TRAINING}::test_autocast_around_the_whole_loop",
    ),
    Setup(
        "autocast, fp16, with `GradScaler`",
        "yes",
        "yes",
        f"{TRAINING}::test_autocast_fp16_with_a_gradient_scaler",
    ),
    Setup("bf16 base, fp32 adapters", "yes", "yes", f"{TRAINING}::test_bf16_base_with_fp32_masters"),
    Setup(
        "gradient checkpointing, reentrant or not", "yes", "yes", f"{TRAINING}::test_gradient_checkpointing"
    ),
    Setup(
        "accelerate: bf16, gradient accumulation",
        "yes",
        "yes",
        f"{TRAINING}::test_accelerate_with_gradient_accumulation",
    ),
    Setup(
        "`transformers.Trainer`, saving and resuming",
        "yes",
        "yes",
        f"{TRAINING}::test_trainer_saves_and_resumes",
    ),
    Setup(
        "trl's `SFTTrainer` with `peft_config`",
        "yes",
        "yes",
        f"{TRAINING}::test_sft_trainer_with_peft_config",
    ),
    Setup(
        "axolotl, by a plugin (tested with a stand-in, and with axolotl 0.19.0 where it is installed)",
        "yes",
        "yes",
        f"{RECIPES}::test_a_trainer_s_recipe_runs_on_the_fast_path",
    ),
    Setup(
        "axolotl's own LoRA kernels (they bypass the layers; the plugin says so)",
        "refused",
        "no",
        f"{RECIPES}::test_axolotl_s_own_kernels_are_refused",
    ),
    Setup(
        "Liger's RMSNorm, rotary embedding, SwiGLU and fused linear cross-entropy",
        "yes",
        "yes",
        "tests/mica/fast/test_liger.py::test_the_losses_of_neither",
    ),
    Setup(
        "rsLoRA, `rank_pattern`, `alpha_pattern`, `modules_to_save`",
        "yes",
        "yes",
        f"{TRAINING}::test_configurations",
    ),
    Setup('`bias="lora_only"`', "yes", "yes", f"{TRAINING}::test_trainable_biases"),
    Setup(
        "base layers with hooks, offloading or trained weights, subclasses of `nn.Linear`",
        "yes",
        "yes",
        "tests/mica/fast/test_eligibility.py::test_base_layer_is_called_and_the_adapter_is_ours",
    ),
    Setup("`lora_bias=True`", "refused", "no", f"{TRAINING}::test_lora_bias_is_refused_as_by_stock"),
    Setup("`lora_dropout > 0` while training", "yes", "yes", f"{ADAPTERS}::test_lora_dropout"),
    Setup(
        "`lora_dropout > 0`: the mask comes from torch's generator, also when checkpointed",
        "yes",
        "yes",
        "tests/mica/fast/test_layers.py::test_dropout_is_drawn_from_torch_s_generator",
    ),
    Setup("switching adapters", "yes", "yes", f"{ADAPTERS}::test_switching"),
    Setup(
        "deleting an adapter and adding another with the same name",
        "yes",
        "yes",
        f"{ADAPTERS}::test_deleting_and_adding_the_same_name_again",
    ),
    Setup(
        "`add_weighted_adapter`, all combination types",
        "yes",
        "yes",
        f"{ADAPTERS}::test_add_weighted_adapter",
    ),
    Setup("two active adapters", "yes", "yes", f"{ADAPTERS}::test_two_active_adapters"),
    Setup("mixed batches (`adapter_names`)", "yes", "yes", f"{ADAPTERS}::test_mixed_batches"),
    Setup(
        "mixed batches whose adapters share `B` (one up-projection)",
        "yes",
        "yes",
        "tests/mica/fast/test_mixed_batch.py::test_adapters_that_share_b_share_one_up_projection",
    ),
    Setup(
        "saving an adapter, loading it with and without this package",
        "yes",
        "yes",
        f"{ADAPTERS}::test_a_saved_adapter_is_a_plain_peft_adapter",
    ),
    Setup(
        "`torch.export` (this package's operators with `strict=True`, otherwise PyTorch's)",
        "yes",
        "partly",
        f"{ADAPTERS}::test_export_for_inference",
    ),
    Setup(
        "`torch.jit.trace`, and ONNX export through it",
        "yes",
        "no",
        "tests/mica/fast/test_eligibility.py::test_what_is_traced_runs_without_this_package",
    ),
    Setup(
        "merging, bit-exact unmerging, deep copies of merged models",
        "yes",
        "yes",
        "tests/mica/fast/test_merging.py::test_a_deep_copy_of_a_merged_model_unmerges_to_the_bit",
    ),
    Setup("hotswapping", "yes", "yes", f"{ADAPTERS}::test_hotswap"),
    Setup("hotswapping in a compiled model", "yes", "yes", f"{ADAPTERS}::test_hotswap_of_a_compiled_model"),
    Setup(
        "experts (`target_parameters`): Qwen3-MoE, Mixtral, gpt-oss, every `experts_implementation`",
        "yes",
        "yes",
        f"{EXPERTS}::test_training_gives_the_losses_of_plain_autograd",
    ),
    Setup(
        "experts, `torch.compile(fullgraph=True)`",
        "yes",
        "yes",
        f"{EXPERTS}::test_compiled_without_a_graph_break",
    ),
    Setup(
        "experts, gradient checkpointing, reentrant or not",
        "yes",
        "yes",
        f"{EXPERTS}::test_gradient_checkpointing_changes_no_bit",
    ),
    Setup(
        "experts, DDP and FSDP2",
        "yes",
        "yes",
        "tests/mica/fast/test_experts_training.py::test_two_processes_follow_one",
    ),
    Setup(
        "experts, `transformers.Trainer`, saving and resuming",
        "yes",
        "yes",
        "tests/mica/fast/test_experts_training.py::test_trainer_saves_and_resumes",
    ),
    Setup(
        "experts, saving, loading in stock PEFT (as LoRA) and here, resuming with `B` frozen",
        "yes",
        "yes",
        "tests/mica/fast/test_experts_saving.py::test_stock_peft_loads_it_and_gives_the_same_logits",
    ),
    Setup(
        "experts, merging and bit-exact unmerging",
        "yes",
        "yes",
        "tests/mica/fast/test_experts_merging.py::test_merges_in_fp32_and_rounds_once_and_unmerges_to_the_bit",
    ),
    Setup(
        "experts in 8 or 4 bits, Llama 4's experts, expert parallelism",
        "refused",
        "no",
        "tests/mica/fast/test_experts_refusals.py::test_packed_experts_are_refused",
    ),
    Setup(
        "routers and other 2-d `target_parameters`",
        "yes",
        "no",
        "tests/mica/fast/test_experts_eligibility.py::test_a_router_keeps_peft_s_path_and_does_not_stop_the_experts",
    ),
    Setup("DDP", "yes", "yes", f"{DISTRIBUTED}::test_ddp"),
    Setup(
        "DDP with gradient checkpointing",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_ddp_with_gradient_checkpointing",
    ),
    Setup("FSDP2", "yes", "yes", f"{DISTRIBUTED}::test_fsdp2"),
    Setup(
        "FSDP2, fp32 adapters over a bf16 base",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_fsdp2_with_fp32_adapters_over_a_bf16_base",
    ),
    Setup("FSDP2, mixed precision", "yes", "yes", f"{DISTRIBUTED}::test_fsdp2_with_mixed_precision"),
    Setup(
        "FSDP2 with gradient checkpointing",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_fsdp2_with_gradient_checkpointing",
    ),
    Setup(
        "FSDP2, saving and resuming",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_fsdp2_saves_resumes_and_leaves_a_plain_adapter",
    ),
    Setup(
        "FSDP2 through accelerate, `cpu_ram_efficient_loading`",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_fsdp2_by_accelerate_with_weights_in_the_first_process_only",
    ),
    Setup(
        "FSDP2 by `transformers.Trainer` and `torchrun`",
        "yes",
        "yes",
        f"{RECIPES}::test_fsdp2_has_the_losses_of_one_process",
    ),
    Setup(
        "FSDP2 with `lora_A` as its own unit",
        "yes",
        "no",
        f"{DISTRIBUTED}::test_fsdp2_with_units_of_lora_a_takes_pefts_path",
    ),
    Setup(
        "FSDP2 with adapted layers, or their base layers, as units",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_fsdp2_with_units_of_layers_and_of_base_layers",
    ),
    Setup(
        "FSDP2 with an adapted embedding as its own unit (accelerate)",
        "yes",
        "yes",
        f"{DISTRIBUTED}::test_fsdp2_with_a_unit_of_the_embedding",
    ),
    Setup(
        "creating an adapter after FSDP2 has sharded the model",
        "refused",
        "no",
        f"{DISTRIBUTED}::test_an_adapter_after_sharding_is_refused",
    ),
    Setup(
        "creating an adapter on a weight on the meta device",
        "refused",
        "no",
        f"{DISTRIBUTED}::test_a_weight_that_is_not_there_is_refused",
    ),
    Setup(
        "tensor parallelism of transformers, with autocast, checkpointing, dropout or a bf16 base",
        "yes",
        "yes",
        f"{TENSOR_PARALLEL}::test_training_follows_one_process_on_the_operators",
    ),
    Setup(
        "tensor parallelism, two active adapters, base layers with hooks, parts of unequal size, biases",
        "yes",
        "yes",
        f"{TENSOR_PARALLEL}::test_gradients_are_those_of_one_process",
    ),
    Setup(
        "tensor parallelism, saving an adapter and loading it in one process",
        "yes",
        "yes",
        f"{TENSOR_PARALLEL}::test_an_adapter_saved_by_two_processes_is_one_process_s",
    ),
    Setup(
        "tensor parallelism, loading an adapter of one process",
        "yes",
        "yes",
        f"{TENSOR_PARALLEL}::test_an_adapter_of_one_process_is_loaded_by_two",
    ),
    Setup(
        "tensor parallelism, an adapted embedding: that layer only",
        "yes",
        "no",
        f"{TENSOR_PARALLEL}::test_an_embedding_takes_peft_s_path",
    ),
    Setup(
        "tensor parallelism, merging",
        "refused",
        "no",
        f"{TENSOR_PARALLEL}::test_a_merge_is_refused",
    ),
    Setup(
        "tensor parallelism, layers with another plan, like the head",
        "refused",
        "no",
        f"{TENSOR_PARALLEL}::test_another_plan_is_refused",
    ),
    Setup("DeepSpeed ZeRO-2", "yes", "yes", f"{DEEPSPEED}::test_zero_2_is_on_the_fast_path"),
    Setup("DeepSpeed ZeRO-3", "yes", "no", f"{DEEPSPEED}::test_zero_3_runs_on_pefts_path"),
]


def table() -> str:
    """The Markdown table of mica/fast/README.md."""
    rows = [("set-up", "works", "fast path", "test"), ("---",) * 4]
    for setup in SETUPS:
        file, _, function = setup.test.partition("::")
        rows.append(
            (setup.name, setup.works, setup.fast, f"[{function.removeprefix('test_')}](../../{file})")
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
