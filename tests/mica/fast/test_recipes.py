"""The recipes in recipes/: the page shows the files, and the files run as they stand, on a tiny model."""

import copy
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModelForCausalLM

import mica.fast
from mica.errors import UsageError
from tests.mica.fast import on_gloo
from tests.support.counts import whatever_language
from tests.support.gloo import METHOD
from tests.support.liger import run_on_any_device
from tests.support.models import adapted_layers, bases, factors, wrap
from tests.support.moe_models import qwen3_moe, wrap_experts
from tests.support.pages import FENCED, read
from tests.support.processes import start
from tests.support.tiny_cli import byte_tokenizer, logits, tiny_llama
from tests.support.tolerances import RELATIVE, error
from tests.support.without_mica import logits_without_mica

RECIPES = Path(__file__).parents[3] / "recipes"
STEPS = 4
KEYS = "gate_up_proj", "down_proj"
FUSED = r"14 layers: 14 (reference|operators \(CPU\))"  # the former with TRITON_INTERPRET, as here

pytestmark = pytest.mark.slow


def test_the_page_shows_the_files():
    shown = [*code_of("python"), *code_of("yaml")]
    files = [path for path in RECIPES.iterdir() if path.suffix in (".py", ".yaml")]
    assert sorted(shown) == sorted(map(read, files))


# -- the recipes, run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny Llama in fp32 and texts of ``STEPS`` batches of 8 blocks of 512 tokens."""
    folder = tmp_path_factory.mktemp("recipes")
    model = tiny_llama(initializer_range=0.3, hidden_size=64, max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = "".join(f"{n} times {n} is {n * n}; " for n in range(2000))
    pieces = [text[start : start + 511] for start in range(0, 511 * 8 * STEPS, 511)]  # and an EOS
    lines = [json.dumps({"text": piece}) for piece in pieces]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return SimpleNamespace(folder=folder, model=str(folder / "model"), texts=str(folder / "texts.jsonl"))


def code_of(language):
    """The blocks in that language on the page."""
    return [code for name, code in FENCED.findall(read(RECIPES / "README.md")) if name == language]


def in_this_process(recipe):
    """What ``recipe()``, which returns its trainer, has done; its adapter is in ``folder``."""
    before = mica.fast.call_counts.copy()
    trainer = recipe()
    return SimpleNamespace(
        losses=losses_of(trainer),
        calls=whatever_language(mica.fast.call_counts - before),
        explanation=mica.fast.explain(trainer.model),
        model=trainer.model,
        folder=Path(trainer.args.output_dir),
    )


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def sft(given):
    def recipe():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["", given.model, given.texts, str(given.folder / "sft")])
            return runpy.run_path(str(RECIPES / "sft_trainer.py"), run_name="__main__")["trainer"]

    return in_this_process(recipe)


@pytest.fixture(scope="module")
def fsdp2(given):
    """What two processes of torchrun's launcher have done; it forks them from ours."""
    where = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": 2, "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(**where, rdzv_backend="c10d", run_id="fsdp2", start_method=METHOD)
    output = given.folder / "fsdp2"
    launched = elastic_launch(config, on_gloo.run)
    done = launched(str(RECIPES / "fsdp2.py"), given.model, given.texts, str(output))
    return SimpleNamespace(processes=[done[0], done[1]], folder=output)


@pytest.fixture(scope="module")
def accelerate(given):
    """What two processes of ``accelerate launch`` have done; FSDP2 comes from its configuration file."""
    output = given.folder / "accelerate"
    results = given.folder / "processes"
    results.mkdir()
    launch = "accelerate.commands.launch", "--config_file", RECIPES / "fsdp2.yaml"
    script = RECIPES / "fsdp2.py", given.model, given.texts, output
    done = start(*launch, "--module", "tests.mica.fast.on_gloo", results, *script)
    assert done.returncode == 0, done.stderr
    processes = [torch.load(results / rank, weights_only=False) for rank in "01"]
    return SimpleNamespace(processes=processes, folder=output)


def learned(losses):
    assert len(losses) == STEPS
    assert losses[0] - losses[-1] > 0.05, losses


def test_a_trainer_s_recipe_runs_on_the_fast_path(sft):
    learned(sft.losses)
    assert sft.explanation.counts() == {"reference": 14}
    assert all(row.calls for row in sft.explanation.rows)
    assert sft.calls == {"linear": 14 * STEPS, "linear_backward": 14 * STEPS}  # nothing is checkpointed


@pytest.mark.parametrize("launcher", ["fsdp2", "accelerate"])
def test_fsdp2_has_the_losses_of_one_process(launcher, request, given):
    """One that runs PEFT's own code on the same batches of 8; a step logs the mean over both processes."""
    launched = request.getfixturevalue(launcher)
    arguments = given.model, given.texts, str(given.folder / "alone")
    trainer_of = runpy.run_path(str(RECIPES / "fsdp2.py"))["trainer_of"]
    alone = trainer_of(*arguments, per_device_train_batch_size=8)
    with mica.fast.disabled():
        alone.train()
    expected = losses_of(alone)
    learned(expected)
    for process in launched.processes:
        assert process["losses"] == pytest.approx(expected, rel=RELATIVE[torch.float32])
        assert process["paths"] == {"reference": 14}
        assert process["calls"] == {"linear": 14 * STEPS, "linear_backward": 14 * STEPS}
        assert process["sharded"]
    printed = "".join(process["printed"] for process in launched.processes)
    assert len(re.findall(FUSED, printed)) == 1


SMALL = {
    "max_length=512": "max_length=16",
    "per_device_train_batch_size=8": "per_device_train_batch_size=2",
    "learning_rate=1e-3": "learning_rate=1e-2",  # so that the second loss shows the first step
    "num_train_epochs=1": "max_steps=2",
}


def test_trl_s_recipe_with_liger(run_source, monkeypatch):
    """The lines that the page adds, with few tokens: Triton's interpreter runs Liger's kernels on a CPU."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    run_on_any_device(monkeypatch)
    plain = replaced(read(RECIPES / "sft_trainer.py"), SMALL)
    (lines,) = code_of("diff")
    kept, added = lines.splitlines()
    with_liger = replaced(plain, {kept[1:]: f"{kept[1:]}\n{added[1:]}"})

    with mica.fast.disabled():
        expected = losses_of(run_source("without", plain)["trainer"])
    with pytest.warns(FutureWarning, match="use_liger_kernel"):  # trl: until its release 2.0
        done = in_this_process(lambda: run_source("with", with_liger)["trainer"])
    assert done.losses == pytest.approx(expected, rel=RELATIVE[torch.float32])
    assert done.explanation.counts() == {"reference": 14}
    assert all(row.calls for row in done.explanation.rows)
    assert done.calls == {"linear": 14 * 2, "linear_backward": 14 * 2}
    assert all(factors(layer)[0].any() for layer in adapted_layers(done.model).values())
    assert done.model.get_base_model().model.norm._get_name() == "LigerRMSNorm"


@pytest.fixture
def run_source(given, tmp_path, monkeypatch):
    """``run_source(name, source)``: what a script defines as it runs; it saves in a folder of that name."""

    def run_source(name, source):
        script = tmp_path / f"{name}.py"
        script.write_text(source, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["", given.model, given.texts, str(tmp_path / name)])
        return runpy.run_path(str(script), run_name="__main__")

    return run_source


def replaced(text, changes):
    """Each of the old texts, which occurs once, as the new one."""
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


# -- what they leave behind ---------------------------------------------------------------------------


# Recipe: how far losses may differ. Adam divides a gradient by its own size, so rounding alone decides the
# step of an entry with nearly no gradient: 2e-4 in the fourth fp32 loss.
LORA = {"qlora_sft.py": 1e-2, "accelerate_lora.py": 1e-3}


@pytest.mark.parametrize("recipe", LORA)
def test_plain_lora(recipe, run_source, capsys):
    """On this backend, with the losses of stock PEFT, and less kept where the recipe prints how much."""
    source = replaced(read(RECIPES / recipe), {"=2e-4": "=5e-3"})

    def run(name, source):
        torch.manual_seed(0)
        done = run_source(name, source)
        if "trainer" in done:
            return done["trainer"].model, losses_of(done["trainer"])
        return done["trained"], done["losses"]

    _, expected = run("stock", replaced(source, {"lora=True": "lora=False"}))
    model, losses = run("here", source)
    learned(losses)
    assert losses == pytest.approx(expected, rel=LORA[recipe])
    kept = [float(megabytes) for megabytes in re.findall(r"([\d.]+) MB kept", capsys.readouterr().out)]
    assert len(kept) == 2 * (recipe == "qlora_sft.py")
    assert kept == sorted(kept, reverse=True), kept
    explanation = mica.fast.explain(model)
    assert explanation.counts() == {"reference": 14}
    assert all(row.calls for row in explanation.rows)


@pytest.mark.parametrize("name", ["sft", "fsdp2", "accelerate"])
def test_the_saved_adapter(name, request, given, tmp_path):
    """B is the initial one to the bit, A is not; PEFT alone loads it, and its logits are ours."""
    folder = request.getfixturevalue(name).folder
    (theirs,) = logits_without_mica(tmp_path, torch.arange(64).view(2, 32), (given.model, folder, "peft"))
    base = AutoModelForCausalLM.from_pretrained(given.model)
    new = wrap(copy.deepcopy(base), rank=16, lora_alpha=32, targets="all-linear")
    plain = logits(base)
    ours = logits(PeftModel.from_pretrained(base, folder))
    assert error(ours, plain) > 0.01
    assert error(theirs, ours) <= RELATIVE[torch.float32]
    saved = load_file(folder / "adapter_model.safetensors")
    assert len(saved) == 2 * 14
    for layer, B in bases(new).items():
        assert torch.equal(saved[f"{layer}.lora_B.weight"], B), layer
        assert saved[f"{layer}.lora_A.weight"].abs().max() > 0, layer


def test_an_adapter_of_experts_split_for_servers(tmp_path, monkeypatch):
    """One LoRA for each expert and projection; what it adds to them is what the merged stack has gained."""
    model = wrap_experts(qwen3_moe(), target_modules=["q_proj"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    before = {name: value.clone() for name, value in qwen3_moe().state_dict().items()}
    after = model.merge_and_unload().state_dict()

    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "adapter"), str(tmp_path / "split")])
    qwen3_moe(experts=5).save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="but in its base it has 5 x "):
        runpy.run_path(str(RECIPES / "per_expert.py"))
    assert not (tmp_path / "split").exists()
    qwen3_moe().save_pretrained(tmp_path / "base")
    runpy.run_path(str(RECIPES / "per_expert.py"))
    config = json.loads((tmp_path / "split" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_parameters"] is None
    assert set(config["target_modules"]) == {"q_proj", "gate_proj", "up_proj", "down_proj"}
    tensors = load_file(tmp_path / "split" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * (1 + 3 * 6)  # factors, layers, q_proj and 3 projections of 6 experts

    def update(name):
        A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        return config["lora_alpha"] / config["r"] * (B @ A)

    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        merged = {key: after[f"{experts}.{key}"] - before[f"{experts}.{key}"] for key in KEYS}
        for expert in range(6):
            gate, up, down = (update(f"{experts}.{expert}.{name}_proj") for name in ("gate", "up", "down"))
            assert error(torch.cat([gate, up]), merged["gate_up_proj"][expert]) < 1e-5
            assert error(down, merged["down_proj"][expert]) < 1e-5


# -- axolotl ------------------------------------------------------------------------------------------


def test_axolotl_s_own_kernels_are_refused(monkeypatch):
    """axolotl sets all four to true if the file names none of them."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = object
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    plugin = runpy.run_path(str(RECIPES / "mica_axolotl.py"))["MicaPlugin"]()
    config = yaml.safe_load(read(RECIPES / "axolotl.yaml"))
    plugin.pre_model_load(config)
    with pytest.raises(ValueError, match=r"^lora_o_kernel would bypass the adapted layers"):
        plugin.pre_model_load(config | {"lora_o_kernel": True})


@pytest.mark.weekly
def test_axolotl_itself(given, tmp_path):
    """Where it is installed (its pins exclude this package's other tests)."""
    pytest.importorskip("axolotl", reason="axolotl is not installed")
    config = yaml.safe_load(read(RECIPES / "axolotl.yaml"))
    config["datasets"][0]["path"] = given.texts
    config |= {"base_model": given.model, "special_tokens": {"pad_token": "<eos>"}}
    config |= {"output_dir": str(tmp_path / "adapter"), "dataset_prepared_path": str(tmp_path)}
    (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    silent = {"AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    done = start("axolotl.cli.train", tmp_path / "axolotl.yaml", path=RECIPES, **silent)
    assert done.returncode == 0, done.stderr
    assert re.search(FUSED, done.stdout)
    assert "not called" not in done.stdout
    learned([float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout + done.stderr)])
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(given.model), tmp_path / "adapter")
