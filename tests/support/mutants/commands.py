"""Wrong edits of what the commands find out: targets, models, machines, spectra, tokenizers."""

COMMANDS = {
    ("mica/cli/targets.py", "tests/mica/cli/test_targets.py"): {
        "find_targets": [
            ("stacks_of(model) | parameters", "parameters"),
            ("_without(parameters, stacks_of(model))", "dict(parameters)"),
            ("modules |= _experts_as_modules(_matching_modules(model, ALL_LINEAR))", "pass"),
        ],
        "_refuse_unknown_names": [("if _any_ends(found, name)", "if True"), ("if similar", "if False")],
        "_target_modules": [
            ("or (is_mixture and wanted == ALL_LINEAR)", ""),
            ("if _any_ends(modules, name)]", "]"),
        ],
        "_move_to_parameters": [("features(module) is None or", ""), ("or _leaf(name) in renamed", "")],
        "stacks_of": [("parameter.dim() == 3", "parameter.dim() >= 2")],
        "_expert_blocks": [('and _leaf(name) == "experts"', "and False")],
        "_is_router": [("in (1, num_experts)", "in (num_experts,)"), ("in (1, num_experts)", "in (1,)")],
        "_renamed_by_peft": [("if not config.target_modules", "if False")],
        "_shortened": [("if matched == set(names)", "if True")],
        "saved_parameters": [
            ("reversed(adapted)", "adapted"),
            ('getattr(module, "is_transposed", False)', "False"),
        ],
        "features": [('("nf", "nx"),', "")],
    },
    ("mica/cli/loading.py", "tests/mica/cli/test_loading.py", "-k", "not libraries"): {
        "find_source": [("str(path.absolute())", "str(path)")],
        "note_hub": [("is_local or", ""), ("or not is_first", "")],
        "skeleton": [('with torch.device("meta")', "if True")],
        "find_device": [("if is_distributed and", "if False and")],
        "suit_processor": [('if dtype != "auto"', "if False"), ("if is_busy", "if False")],
    },
    (
        "mica/cli/loading.py",
        "tests/mica/cli/adapt/test_refusals.py",
        "-k",
        "test_model_not_found or test_bad_model or seen_to_be_bad or remote_code_only",
    ): {
        "_looks_like_a_path": [("or len(path.parts) > 2", ""), ('model.endswith(".gguf") or', "")],
        "_refuse_adapter": [("if config_file is None", "if True")],
        "load_tokenizer": [("if is_masked or not is_causal", "if not is_causal")],
        "load_model": [("if missing:", "if False:")],
        "_loading_options": [('options["use_safetensors"] = True', "pass")],
        "check_limits": [("largest_token_id >= entries", "False")],
    },
    ("mica/cli/doctor.py", "tests/mica/cli/test_doctor.py"): {
        "run": [("return 1", "return 0")],
        "examine": [('and row["name"] != "triton"', ""), ("problems.append(", "print(")],
        "_version_row": [
            ("prereleases=True", "prereleases=False"),
            ("if need.marker is None or need.marker.evaluate()", "if True"),
        ],
        "_devices": [('if row["trial"] == "failed"', "if False")],
        "_describe_gpu": [("if not INTERPRETED.value", "if True")],
        "_find_path": [
            ('elif demand != "triton"', "else"),
            ('and demand != "reference"', ""),
            ("torch.cuda.get_device_capability(device) >= runtime.MINIMUM_CAPABILITY", "True"),
        ],
        "_peft": [("if is_patched", "if True"), ('f"{text} (optional)"', "text")],
        "_caches": [("nearest.is_dir() and", "")],
        "_lines_of_versions": [('row["name"] == "peft" and has_note_on_peft', "False")],
        "_times": [('if row["busy"]', "if False")],
        "_cache_line": [('if caches["distrusted"]', "if False")],
    },
    ("mica/cli/inspect.py", "tests/mica/cli/test_inspect.py"): {
        "run": [('if result["layers_found"] == result["layers_unsuitable"]', "if False")],
        "_check_files": [("import mica.cli.plot", "pass")],
        "_measure": [("values[-rank:] = chosen", "pass")],
        "summary": [("for row in solved if row.proven", "for row in solved")],
        "_load": [('str(error).removeprefix("--model ")', "str(error)")],
    },
    ("mica/cli/layer_tables.py", "tests/mica/cli/test_inspect.py"): {
        "_percent": [("100 * share", "share")],
        "_kind_line": [
            ("if first.quantised", "if False"),
            ("kind.smallest('gap')", "kind.largest('gap')"),
            ("kind.largest('energy_share')", "kind.smallest('energy_share')"),
            ("max((row.energy_excess", "min((row.energy_excess"),
        ],
        "_notes": [("if not row.proven", "if row.proven")],
    },
    ("mica/cli/layer_tables.py", "tests/mica/cli/test_layer_tables.py"): {
        "layer_line": [("if row.quantised", "if False"), ("if row.expert is not None", "if False")],
        "_notes": [("if len(different) > 1", "if False")],
        "_names": [("if more > 0", "if False")],
    },
    ("mica/cli/kinds.py", "tests/mica/cli/test_kinds.py"): {
        "by_kind": [("if len(variants[last]) == 1", "if True")],
        "Kind.median": [("statistics.median(values)", "values[0]")],
        "grouped": [("getattr(row, field) for field in _IN_COMMON", "row.shape for field in _IN_COMMON")],
    },
    ("mica/cli/spectra.py", "tests/mica/cli/test_spectra.py"): {
        "_adapted": [("weight.requires_grad_(requires_grad)", "pass")],
        "_worst_expert": [
            ("min(range(len(measured)), key=gap)", "0"),
            ('all(each["proven"]', 'any(each["proven"]'),
            ("max(excesses)", "min(excesses)"),
        ],
        "_measured": [
            ("narrowed(subspace, rank) or", ""),
            ("narrowed(subspace, rank) or minor_subspace(weight, rank)", "subspace"),
            ("if energy:", "if True:"),
        ],
    },
    ("mica/cli/transfer.py", "tests/mica/cli/test_transfer.py"): {
        "_check_place": [("if target in (Path.cwd(), *Path.cwd().parents)", "if False")],
        "_named": [('.replace(f"--model {args.to}: ", f"--to {args.to}: ", 1)', "")],
        "_load": [('getattr(their_config, "quantization_config", None) is not None', "False")],
        "_check_architecture": [("if ours != theirs", "if False")],
        "_architecture_of_base": [("if recorded is not None", "if False")],
        "_tokenizer": [
            ("if moved or not common", "if not common"),
            ("len(theirs) - len(common)", "len(common)"),
        ],
        "_vocabulary_of_adapter": [("places.append(base)", "pass")],
        "_check_output": [("if not args.overwrite", "if False")],
    },
}
