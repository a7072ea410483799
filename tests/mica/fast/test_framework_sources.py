"""What the recipes for ms-swift and Unsloth rely on is in those frameworks' sources, which are only read.

As installed, from a wheel in the folder MICA_WHEELS, and from the newest wheel of the package index.
"""

import ast
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path

import pytest
from transformers import TrainingArguments

from tests.support import stand_ins
from tests.support.processes import ROOT

pytestmark = pytest.mark.weekly
DISTRIBUTIONS = {"swift": "ms-swift", "unsloth": "unsloth", "unsloth_zoo": "unsloth_zoo"}


def in_wheels(folder, package):
    """What the wheel in the folder that has the package holds, or None."""
    for wheel in sorted(folder.glob("*.whl")):
        if f"{package}/__init__.py" in zipfile.ZipFile(wheel).namelist():
            return zipfile.Path(wheel)
    return None


def at_hand(package):
    """As installed, or in the folder MICA_WHEELS."""
    spec = importlib.util.find_spec(package)  # of a package without a dot it imports nothing
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parents[1]
    folder = os.environ.get("MICA_WHEELS")
    return folder and in_wheels(Path(folder), package)


@cache
def newest(package):
    folder = Path(tempfile.mkdtemp(prefix="wheels"))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--retries", "0", "--timeout", "10", "--dest", str(folder), DISTRIBUTIONS[package]]
    subprocess.run(command, capture_output=True)
    return in_wheels(folder, package)


@pytest.fixture(params=[at_hand, newest])
def source(request):
    """``source(package, path, *names)``: the code of a file, or of what is defined in it, within each other.

    The code as `ast.unparse` writes it. Skips the test where there is no such package.
    """

    def of(package, path, *names):
        folder = request.param(package)
        if folder is None:
            pytest.skip(f"no {package} {request.param.__name__.replace('_', ' ')}")
        return defined((folder / package / path).read_text(encoding="utf-8"), *names)

    return of


def defined(code, *names):
    node = ast.parse(code)
    for name in names:
        inner = [part for part in ast.walk(node) if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
        found = [part for part in inner if part.name == name]
        assert found, f"there is no {name}"
        node = found[0]
    return ast.unparse(node)


def signature(code):
    return re.search("^def .*", code, re.MULTILINE)[0]


# -- ms-swift -----------------------------------------------------------------------------------------


def test_swift_wraps_the_functions_that_the_stand_in_wraps(source):
    tuners = source("swift", "tuners/peft.py")
    wrapped = [f"LoraModel.{name}" for name in ("__init__", "_create_and_replace", "_cast_adapter_dtype")]
    wrapped += ["PeftModel.load_adapter", "PeftConfigMixin.from_pretrained", "LoraModel.__init_origin__"]
    for name in (*wrapped, "lora.forward"):  # the last one: a forward of each factor, which the recipe undoes
        assert f"{name} = " in tuners, name
    assert "hot_patch_peft_module()" in tuners.splitlines()  # as it is imported
    # signatures that this package does not know, so that it must be imported first
    hook = source("swift", "tuners/peft.py", "_create_and_replace_hook")
    assert re.search(r"\*args(: \w+)?, \*\*kwargs", signature(hook))
    load = source("swift", "tuners/peft.py", "load_adapter")
    assert re.search(r"\(self, model_id(: \w+)?, \*args(: \w+)?, \*\*kwargs", signature(load))


def test_swift_imports_plugins_after_its_tuners(source):
    """The module that trains imports the tuners; plugins are imported once the options have been parsed."""
    assert "\nfrom swift.tuners import " in source("swift", "pipelines/train/tuner.py")
    options = source("swift", "arguments/base_args/base_args.py", "BaseArguments", "__post_init__")
    assert "self._import_external_plugins(" in options


def test_swift_passes_the_initialisation_on_to_peft(source):
    tuner = source("swift", "pipelines/train/tuner.py", "prepare_adapter")
    assert "'init_lora_weights'" in tuner
    assert "args.init_weights" in tuner


def test_swift_has_what_the_script_uses(source):
    assert source("swift", "pipelines/train/pretrain.py", "SwiftPretrain")
    assert source("swift", "pipelines/base.py", "SwiftPipeline", "main")
    assert "self.model = " in source("swift", "pipelines/train/sft.py")


def test_swift_has_the_options(source):
    page = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^python mica_swift.py(?:.*\\\n)*.*", page, re.MULTILINE)[0]
    options = set(re.findall(r"--(\w+)", command))
    assert options == {*stand_ins.TEXTS, *stand_ins.NUMBERS}
    files = ["sft_args.py", "tuner_args.py"]
    files += [f"base_args/{name}_args.py" for name in ("base", "data", "model", "template")]
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for file in files:
        known.update(re.findall(r"^    (\w+): ", source("swift", f"arguments/{file}"), re.MULTILINE))
    assert options - known == set()


# -- Unsloth ------------------------------------------------------------------------------------------


def test_unsloth_s_functions_take_the_arguments_of_the_recipe(source):
    load = source("unsloth", "models/loader.py", "FastLanguageModel", "from_pretrained")
    patch = source("unsloth", "models/llama.py", "FastLlamaModel", "patch_peft_model")
    for function, names in (
        (load, ["model_name", "max_seq_length", "load_in_4bit"]),
        (patch, ["model", "use_gradient_checkpointing"]),
    ):
        for name in names:
            assert re.search(rf"[ (]{name}[=:,]", signature(function)), name


def test_unsloth_keeps_b_frozen(source):
    """After it has made every factor of an adapter trainable."""
    patch = source("unsloth", "models/llama.py", "FastLlamaModel", "patch_peft_model")
    made, frozen = (
        patch.index(f"{name}(") for name in ("prepare_model_for_kbit_training", "freeze_peft_variant_weights")
    )
    assert made < frozen
    freeze = source("unsloth", "models/_utils.py", "freeze_peft_variant_weights")
    for text in ("'frozen_peft_weight_names'", "._freeze_non_trainable_peft_weights()"):
        assert text in freeze


def test_unsloth_refuses_mica_over_4_bits_in_its_own_function_only(source):
    create = source("unsloth", "models/llama.py", "FastLlamaModel", "get_peft_model")
    patch = source("unsloth", "models/llama.py", "FastLlamaModel", "patch_peft_model")
    assert "validate_init_lora_weights(" in create
    assert "validate_init_lora_weights(" not in patch
    assert "'mica'" in source("unsloth", "models/_utils.py", "validate_init_lora_weights")


def test_unsloth_switches_off_that_trl_rounds_a(source):
    assert "replace('if _is_quantized_model:', 'if False:')" in source("unsloth", "models/rl.py")


def test_unsloth_s_kernels_decline_variants_such_as_mica(source):
    kernels = "unsloth", "kernels/fast_lora.py"
    assert "'lora_variant'" in source(*kernels, "_needs_peft_forward")
    assert "_needs_peft_forward(" in source(*kernels, "_lora_dropout_and_bias")
    for name in ("apply_lora_mlp_swiglu", "apply_lora_qkv", "apply_lora_o"):
        assert "_lora_dropout_and_bias(" in source(*kernels, name)


def test_unsloth_names_the_forwards_that_it_rewrites(source):
    """By that name `mica.fast.explain` knows them."""
    assert "def unsloth_forward" in source("unsloth_zoo", "compiler.py", "patch_lora_forwards")
