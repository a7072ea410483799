"""Wrong edits of PEFT's backend."""

BACKEND = {
    ("mica/fast/settings.py", "tests/mica/fast/test_patching.py"): {"switch": [("and not _blocks", "")]},
    ("mica/fast/known_peft.py", "tests/mica/fast/test_known_peft.py"): {
        "is_known": [("version in KNOWN", "True")],
        "sentence": [("if known and not left", "if not left")],
        "fingerprint": [("definition.body[1:]", "definition.body")],
        "_outline": [
            ("if isinstance(node, ast.Raise)", "if False"),
            ("name not in _NO_RESULT and", ""),
            ("return repr(node)", 'return ""'),
        ],
    },
    (
        "mica/fast/patching.py",
        "tests/mica/fast/test_patching.py",
        "tests/mica/fast/test_known_peft.py",
        "tests/mica/fast/test_frameworks.py",
    ): {
        "compare": [
            ("left = known_peft.differences()", "pass"),
            ("patch.part is not None and is_there(patch)", "False"),
            ("elif patch.required", "elif False"),
        ],
        "_replaceable": [("patch.part not in known_peft.left and", "")],
        "_other_body": [("known_peft.is_known(peft.__version__) or", "True or")],
        "replaced_since": [("not _wraps(function, replacement)", "function is not replacement")],
    },
    ("mica/fast/frameworks.py", "tests/mica/fast/test_frameworks.py"): {
        "_innermost": [('is_function and _home(call).startswith("mica.")', "False")],
    },
    ("mica/fast/create/initialisation.py", "tests/mica/fast/test_frameworks.py"): {
        "update_layer": [("_start(self, adapter_name)", "self.mica_init(adapter_name)")],
        "inject_adapter": [("_warn_of_another_initialisation(injection, adapter_name)", "pass")],
        "_warn_of_another_initialisation": [
            ("uninitialised.get() is not None or", ""),
            ("not entry.is_initialised and", ""),
        ],
        "_start": [("entry.is_initialised = True", "pass")],
    },
    ("mica/fast/create/initialisation.py", "tests/mica/fast/test_known_peft.py"): {
        "_warn_of_another_initialisation": [("or INITIALISATION in known_peft.left", "")],
    },
    ("mica/fast/explain.py", "tests/mica/fast/test_known_peft.py"): {
        "_why_not_entered": [("known_peft.left.get(_part_of(layer))", "None")],
    },
    (
        "mica/fast/loading.py",
        "tests/mica/fast/test_saving.py",
        "tests/mica/fast/test_adapters.py",
        "-k",
        "hotswap or missing",
    ): {
        "_incomplete": [("if key in missing", "")],
        "_start_anew": [("initialise(adapters)", "pass")],
        "hotswap_adapter_from_state_dict": [("clear_caches()", "pass")],
    },
    ("mica/fast/loading.py", "tests/mica/fast/test_saving.py", "-k", "trains_no_b or do_not_fit"): {
        "load": [("adapter.lora_B.requires_grad_(False)", "pass"), ('"mismatched_keys"', '"none"')],
        "_whole": [("model.delete_adapter(name)", "pass")],
    },
    ("mica/fast/forward/mixed_batch.py", "tests/mica/fast/test_adapters.py", "-k", "mixed or basis"): {
        "MixedBatch._h": [("rank - part.shape[-1] :", ": part.shape[-1]")],
        "_compare": [("torch.equal(group.lora_B[:, -rank:], lora_B)", "True")],
        "_groups": [("B.data_ptr(), B._version,", ""), ("list(weights.values())", "[]")],
    },
    (
        "mica/fast/forward/decide.py",
        "tests/mica/fast/test_layers.py",
        "tests/mica/fast/test_changes.py",
        "tests/mica/fast/test_eligibility.py",
    ): {
        "_multiplies": [("return x.dtype == weight.dtype", "return True")],
        "Fused.__call__": [
            ("not dropout_p and", ""),
            ('settings.compile == "plain" and', ""),
            ("and torch.compiler.is_compiling()", ""),
        ],
        "Added.__call__": [("in self.adapters", "in self.adapters[1:]")],
    },
    (
        "mica/fast/forward/fast_check.py",
        "tests/mica/fast/test_changes.py",
        "tests/mica/fast/test_eligibility.py",
    ): {
        "fused_eager": [
            ("type(layer) is not lora.Linear", "not isinstance(layer, lora.Linear)"),
            ("or not is_eager()", ""),
            ("or type(x) not in TENSOR_TYPES", ""),
            ("len(name) != 1", "not name"),
            ("or type(scaling) is not float", ""),
            ("_is_special(layer, base, name) or", ""),
        ],
        "_are_cast": [
            ("bias is not None and bias.dtype not in _CAST", "False"),
            ("x.dtype in _CAST and", ""),
            ("and weight.dtype in _CAST", ""),
            ("and lora_A.dtype in _CAST", ""),
            ("and lora_B.dtype in _CAST", ""),
        ],
        "_are_multiplied": [
            ("weight.dtype is not dtype or", ""),
            ("lora_B.dtype is not lora_A.dtype or", ""),
            ("is_master and casts_input", "is_master"),
        ],
        "_is_special": [
            ("layer.disable_adapters\n        or", ""),
            ("or bool(layer.merged)", ""),
            ('or "_tp_info" in layer.__dict__', ""),
            ('or "_hf_tp_plan" in base.__dict__', ""),
            ("or type(layer.lora_variant.get(name)) is not MiCALinearVariant", ""),
        ],
        "_are_plain_modules": [
            ("base) is type(", ""),
            ("and type(dropout) is _IDENTITY", ""),
            ("if any(_GLOBAL_HOOKS)", "if False"),
            ("_LINEAR.forward,", "FORWARDS[_LINEAR],"),
            ("_IDENTITY.forward,", "FORWARDS[_IDENTITY],"),
            ("_LINEAR.__call__,", "CALL,"),
            ("_IDENTITY.__call__,", "CALL,"),
            (", functional.linear", ", LINEAR"),
            ("in (base, lora_A", "in (lora_A"),
            ("in (base, lora_A, lora_B", "in (base, lora_B"),
            ("in (base, lora_A, lora_B, dropout):", "in (base, lora_A, dropout):"),
            ("in (base, lora_A, lora_B, dropout):", "in (base, lora_A, lora_B):"),
            ("any(_hooks(module)) or", ""),
            ('or "forward" in module.__dict__', ""),
            ('lora_A._parameters["bias"] is None and', ""),
            ('and lora_B._parameters["bias"] is None', ""),
        ],
        "_are_plain_tensors": [
            ('or hasattr(tensor, "ds_id")', ""),
            ("_facts(weight) != _FROZEN or", ""),
            ("or _facts(lora_B) != _FROZEN", ""),
            ("or _facts(bias) != _FROZEN", ""),
            ("lora_A.is_inference(), x.layout", "False, x.layout"),
            ("x.layout, x.is_nested)", "torch.strided, x.is_nested)"),
            ("x.layout, x.is_nested)", "x.layout, False)"),
        ],
        "_hooks": [
            ('"_forward_hooks", ', ""),
            ('"_forward_pre_hooks", ', ""),
            ('"_backward_hooks", ', ""),
            (', "_backward_pre_hooks"', ""),
        ],
    },
    ("mica/fast/forward/eligibility.py", "tests/mica/fast/test_layer_tensors.py", "-k", "scaling"): {
        "_adapter": [("lora_A.to(wide) * scaling.to(wide)", "lora_A * scaling.to(lora_A.dtype)")],
    },
    (
        "mica/fast/forward/eligibility.py",
        "tests/mica/fast/test_changes.py",
        "tests/mica/fast/test_eligibility.py",
        "tests/mica/fast/test_explain.py",
    ): {
        "OnOperators.explained": [("path = choice.form", "pass"), ("if self.why_called", "if False")],
        "read_adapters": [("not is_mica(layer, name)", "False")],
        "_why_not_state": [
            ("if layer.disable_adapters", "if False"),
            ("if layer.merged", "if False"),
            ('layer.__dict__.get("_tp_info") is not None', "False"),
        ],
        "_why_not_factor": [
            ("type(factor) is not nn.Linear", "False"),
            ('weight_of(factor, "bias") is None', "True"),
        ],
        "_why_not_dropout": [
            ("type(dropout) is not nn.Dropout", "False"),
            ("dropout.p >= 1.0", "False"),
        ],
        "_read_linear": [
            ("and dropout.training", ""),
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
}
