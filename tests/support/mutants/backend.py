"""Wrong edits of PEFT's backend."""

from tests.support.mutants.edits import FileEdits

BACKEND = [
    FileEdits(
        "mica/fast/settings.py",
        tests=["tests/mica/fast/test_patching.py"],
        edits={
            "switch": [("and not _blocks", "")],
        },
    ),
    FileEdits(
        "mica/fast/loading.py",
        tests=[
            "tests/mica/fast/test_saving.py",
            "tests/mica/fast/test_adapters.py",
            "-k",
            "hotswap or missing",
        ],
        edits={
            "load": [("if name in missing", ""), ("initialise(lacking)", "pass")],
            "hotswap_adapter_from_state_dict": [
                ("choose.clear_prepared()", ""),
            ],
        },
    ),
    FileEdits(
        "mica/fast/forward/mixed_batch.py",
        tests=["tests/mica/fast/test_adapters.py", "-k", "mixed or basis"],
        edits={
            "MixedBatch._h": [("rank - part.shape[-1] :", ": part.shape[-1]")],
            "_compare": [("torch.equal(group.lora_B[:, -rank:], lora_B)", "True")],
            "_groups": [
                ("B.data_ptr(), B._version,", ""),
                ("list(weights.values())", "[]"),
            ],
        },
    ),
    FileEdits(
        "mica/fast/forward/decide.py",
        tests=["tests/mica/fast/test_changes.py", "tests/mica/fast/test_eligibility.py"],
        edits={
            "_multiplies": [("return x.dtype == weight.dtype", "return True")],
            "Added.products": [("[] if self.why_called else self.base.products()", "self.base.products()")],
            "Added.__call__": [("in self.adapters", "in self.adapters[1:]")],
        },
    ),
    FileEdits(
        "mica/fast/forward/fast_check.py",
        tests=["tests/mica/fast/test_changes.py", "tests/mica/fast/test_eligibility.py"],
        edits={
            "direct": [
                ("type(layer) is not lora.Linear", "not isinstance(layer, lora.Linear)"),
                ("or type(x) not in TENSOR_TYPES", ""),
                ("or not is_eager()", ""),
                ("or torch.is_autocast_enabled(kind)", ""),
                ("len(name) != 1", "not name"),
                ("disable_adapters\n        or layer.", ""),
                ("or layer.merged", ""),
                ('or "_tp_info" in state', ""),
                ('or "_hf_tp_plan" in base.__dict__', ""),
                ("or type(layer.lora_variant.get(name)) is not MiCALinearVariant", ""),
                ("or type(scaling) is not float", ""),
                ("base) is type(", ""),
                ("and type(dropout) is _IDENTITY", ""),
                ("or _LINEAR.forward is not FORWARDS[_LINEAR]", ""),
                ("or _IDENTITY.forward is not FORWARDS[_IDENTITY]", ""),
                ("or _LINEAR.__call__ is not CALL", ""),
                ("or _IDENTITY.__call__ is not CALL", ""),
                ("or functional.linear is not LINEAR", ""),
                ("in (base, lora_A", "in (lora_A"),
                ("base, lora_A, lora_B", "base, lora_B"),
                ("lora_A, lora_B, dropout", "lora_A, dropout"),
                ("lora_A, lora_B, dropout", "lora_A, lora_B"),
                ("or nn_module._global_forward_hooks", ""),
                ('of_A["bias"] is not None or', ""),
                ('or of_B["bias"] is not None', ""),
                ("weight.requires_grad\n        or", ""),
                ("or (bias is not None and bias.requires_grad)", ""),
                ("or B.requires_grad", ""),
                ("or A.is_inference()", ""),
                ("or x.layout is not torch.strided", ""),
                ("or x.is_nested", ""),
                ("weight.dtype is not dtype or", ""),
                ("B.dtype is not adapter_dtype or", ""),
                ("and layer.cast_input_dtype_enabled", ""),
                ("._forward_hooks\n            or module", ""),
                ("or module._forward_pre_hooks", ""),
                ("or module._backward_hooks", ""),
                ("or module._backward_pre_hooks", ""),
                ('or "forward" in module.__dict__', ""),
                ("or tensor.layout is not torch.strided", ""),
                ('or hasattr(tensor, "ds_id")', ""),
            ],
        },
    ),
    FileEdits(
        "mica/fast/forward/eligibility.py",
        tests=["tests/mica/fast/test_changes.py", "tests/mica/fast/test_eligibility.py"],
        edits={
            "read_adapters": [
                ("if layer.disable_adapters", "if False"),
                ("if layer.merged", "if False"),
                ('layer.__dict__.get("_tp_info") is not None', "False"),
                ("not is_mica(layer, name)", "False"),
            ],
            "_read_linear": [
                ("if dropout.training", "if True"),
                ("if global_hooks()", "if False"),
                ("if functional.linear is not LINEAR", "if False"),
            ],
            "_why_not_read_directly": [
                ('"forward" in module.__dict__', "False"),
                ("kind.forward is not FORWARDS[kind]", "False"),
                ("kind.__call__ is not CALL", "False"),
                ("and not is_fx_tracing()", ""),
            ],
            "_has_hooks": [("or module._backward_hooks\n        or module._backward_pre_hooks", "")],
            "why_not_frozen": [("reason is None and tensor.requires_grad", "False")],
        },
    ),
]  # fmt: skip
