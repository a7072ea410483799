"""What the recipes for ms-swift and Unsloth rely on is in those frameworks' sources, which are only read."""

import ast
import dataclasses
import re
import tempfile
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests.support import swift_style
from tests.support.foreign_sources import Source, at_hand, called, download, in_wheels, parameters, texts
from tests.support.processes import ROOT

DISTRIBUTIONS = {"swift": "ms-swift", "unsloth": "unsloth", "unsloth_zoo": "unsloth_zoo"}


@cache
def downloaded(package):
    """What reads the newest wheel, or why there is none."""
    folder = Path(tempfile.mkdtemp(prefix="wheels"))
    why_not = download([DISTRIBUTIONS[package]], folder)
    return why_not or in_wheels(folder, package)


@pytest.fixture(params=["at hand", pytest.param("newest", marks=pytest.mark.slow)])
def source(request):
    """``source(package, path)``; skips the test where there is none."""

    def of(package, path):
        if request.param == "at hand":
            read = at_hand(package)
            if read is None:
                pytest.skip(f"{package} is neither installed nor a wheel in the folder MICA_WHEELS")
        else:
            read = downloaded(package)
            if isinstance(read, str):
                pytest.skip(f"no wheel of {package} from a package index: {read}")
        return Source(read(f"{package}/{path}"))

    return of


# -- ms-swift -----------------------------------------------------------------------------------------


def test_swift_wraps_the_functions_that_the_stand_in_wraps(source):
    tuners = source("swift", "tuners/peft.py")
    wrapped = {"__init__", "_create_and_replace", "_cast_adapter_dtype"}
    expected = {f"LoraModel.{name}" for name in wrapped}
    expected |= {"PeftModel.load_adapter", "PeftConfigMixin.from_pretrained", "LoraModel.__init_origin__"}
    assert expected <= tuners.assigned()
    assert "hot_patch_peft_module" in called(tuners.tree)  # as it is imported
    # signatures that this package does not know, so that it must be imported first
    assert parameters(tuners.function("_create_and_replace_hook"))[-2:] == ["*args", "**kwargs"]
    assert parameters(tuners.function("load_adapter")) == ["self", "model_id", "*args", "**kwargs"]


def test_swift_s_constructor_gives_the_factors_a_forward(source):
    """Of their own; which the recipe undoes."""
    assert "lora.forward" in source("swift", "tuners/peft.py").assigned()


def test_swift_imports_plugins_after_its_tuners(source):
    """The module that trains imports the tuners; plugins are imported once the options have been parsed."""
    training = source("swift", "pipelines/train/tuner.py").tree.body
    assert "swift.tuners" in {node.module for node in training if isinstance(node, ast.ImportFrom)}
    options = source("swift", "arguments/base_args/base_args.py")
    assert "self._import_external_plugins" in called(options.function("BaseArguments.__post_init__"))


def test_swift_passes_the_initialisation_on_to_peft(source):
    tuner = source("swift", "pipelines/train/tuner.py").function("prepare_adapter")
    assert "init_lora_weights" in texts(tuner)
    attributes = {ast.unparse(node) for node in ast.walk(tuner) if isinstance(node, ast.Attribute)}
    assert "args.init_weights" in attributes


def test_swift_has_what_the_script_uses(source):
    assert source("swift", "pipelines/train/pretrain.py").cls("SwiftPretrain")
    assert source("swift", "pipelines/base.py").function("SwiftPipeline.main")
    assert "self.model" in source("swift", "pipelines/train/sft.py").assigned()


def test_swift_has_the_options(source):
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^python mica_swift.py(?:.*\\\n)*.*", page, re.MULTILINE)[0]
    options = set(re.findall(r"--(\w+)", command))
    assert options == {*swift_style.TEXTS, *swift_style.NUMBERS}
    files = ["sft_args.py", "tuner_args.py"]
    files += [f"base_args/{name}_args.py" for name in ("base", "data", "model", "template")]
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for file in files:
        known |= source("swift", f"arguments/{file}").fields()
    assert options - known == set()


# -- Unsloth ------------------------------------------------------------------------------------------


def test_unsloth_s_initialisation_can_be_switched_off(source):
    initialisation = source("unsloth", "models/lora_init.py")
    assert {"UNSLOTH_FAST_LORA_INIT", "0", "mica_init"} <= texts(initialisation.function("fast_lora_init"))
    create = source("unsloth", "models/llama.py").function("FastLlamaModel.get_peft_model")
    assert "fast_lora_init" in called(create)


def test_unsloth_knows_mica(source):
    assert "mica" in texts(source("unsloth", "models/_utils.py").function("validate_init_lora_weights"))


def test_unsloth_s_functions_take_the_arguments_of_the_recipe(source):
    load = parameters(source("unsloth", "models/loader.py").function("FastLanguageModel.from_pretrained"))
    assert {"model_name", "max_seq_length", "load_in_4bit"} <= set(load)
    create = parameters(source("unsloth", "models/llama.py").function("FastLlamaModel.get_peft_model"))
    needed = {"r", "lora_alpha", "lora_dropout", "target_modules", "init_lora_weights"}
    assert needed | {"use_gradient_checkpointing"} <= set(create)


def test_unsloth_s_kernels_decline_variants_such_as_mica(source):
    kernels = source("unsloth", "kernels/fast_lora.py")
    assert "lora_variant" in texts(kernels.function("_needs_peft_forward"))
    assert "_needs_peft_forward" in called(kernels.function("_lora_dropout_and_bias"))
    for name in ("apply_lora_mlp_swiglu", "apply_lora_qkv", "apply_lora_o"):
        assert "_lora_dropout_and_bias" in called(kernels.function(name))


def test_unsloth_names_the_forwards_that_it_rewrites(source):
    """By that name `mica.fast.explain` knows them."""
    rewriting = source("unsloth_zoo", "compiler.py").function("patch_lora_forwards")
    assert {"unsloth_forward", "def unsloth_forward"} <= texts(rewriting)
