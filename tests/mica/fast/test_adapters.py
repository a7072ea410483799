"""Several adapters at once, mixed batches, and adapters as files: the results of PEFT's own code."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file

import mica.fast
from tests.support.models import TARGETS, adapted_layers, bases, gradients, net, randomise, tiny_llama
from tests.support.moe_models import second
from tests.support.stock import as_stock, counted, step
from tests.support.tolerances import RELATIVE, error
from tests.support.training import batches, llama, report, train
from tests.support.without_mica import logits_without_mica

pytestmark = pytest.mark.usefixtures("one_thread")

INDICES = torch.tensor([[1, 2, 3, 28], [0, 7, 7, 3], [5, 6, 11, 12]])
FP32 = 3 * RELATIVE[torch.float32]


def several(second_rank=4, **kwargs):
    """A net with the MiCA adapters "default" and "second", both with values in A."""
    return randomise(second(net(**kwargs), r=second_rank, lora_alpha=3))


def activate(model, *names):
    model.base_model.set_adapter(list(names))


class Logits(torch.nn.Module):
    """A model for `torch.export`: tensors in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


def compare(model, tolerance=FP32, **kwargs):
    """Output and gradients with the backend on and off are the same; returns the output."""
    out, grads = as_stock(lambda: step(model, INDICES, **kwargs), tolerance)
    assert not any("lora_B" in name or "lora_embedding_B" in name for name in grads)
    return out


def path(model):
    return mica.fast.explain(model).counts()


# ---------------------------------------------------------------------------------------------------
# several adapters
# ---------------------------------------------------------------------------------------------------


def test_switching():
    model = several(second_rank=3)
    first = compare(model)
    model.set_adapter("second")
    assert path(model) == {"reference": 4}
    second = compare(model)
    assert error(second, first) > 0.01
    assert {name for name in gradients(model) if "default" in name} == set()
    with model.disable_adapter():
        base = compare(model)
    assert error(base, first) > 0.01
    model.set_adapter("default")
    assert torch.equal(compare(model), first)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(compare(model), second)


def test_deleting_and_adding_the_same_name_again():
    model = several()
    first_B = bases(model)
    config = copy.deepcopy(model.peft_config["second"])
    before = compare(model)
    model.delete_adapter("second")
    model.add_adapter("second", config)
    assert torch.equal(compare(model), before)
    model.set_adapter("second")
    assert path(model) == {"reference": 4}
    with model.disable_adapter():
        base = model(INDICES)
    assert error(compare(model), base) <= FP32  # a new adapter: A = 0
    for name, B in bases(model, "second").items():
        assert not B.requires_grad
        assert error(B, first_B[name]) <= FP32  # the same weights, the same subspace
    model.delete_adapter("second")
    assert torch.equal(compare(model), before)


COMBINATIONS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS += [f"{name}_svd" for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune")]


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_weighted_adapter(combination, dtype):
    """The same factors as stock makes of the same adapters, and a layer on the fast path with them."""
    ranks_may_differ = combination == "cat" or "svd" in combination
    model = several(second_rank=3 if ranks_may_differ else 4, dtype=dtype)
    stock = copy.deepcopy(model)

    def add(model):
        torch.manual_seed(7)  # dare_* drop at random
        density = {} if combination in ("linear", "cat", "svd") else {"density": 0.6}
        weights = [0.7, 0.5]
        model.add_weighted_adapter(["default", "second"], weights, "both", combination, **density)
        model.set_adapter("both")

    add(model)
    with mica.fast.disabled():
        add(stock)
    for layer, other in zip(adapted_layers(model).values(), adapted_layers(stock).values(), strict=True):
        ours, theirs = layer.get_delta_weight("both"), other.get_delta_weight("both")
        assert ours.norm() > 0
        assert error(ours, theirs) <= 30 * RELATIVE[torch.float32]
    assert path(model) == {"reference": 4}
    compare(model.eval(), 3 * RELATIVE[dtype])
    assert not any(B.requires_grad for B in bases(model, "both").values())


def test_add_weighted_adapter_that_fails_leaves_no_adapter(monkeypatch):
    """Stock leaves one that has what initialised it; here its B would be 0, and A never get a gradient."""
    model = several()
    name = "_generalized_task_arithmetic_weighted_adapter"

    def fail(self, *args):
        raise RuntimeError("in between")

    monkeypatch.setattr(f"peft.tuners.lora.model.LoraModel.{name}", fail)
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match="in between"):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.5], "both", "linear")
    assert list(model.state_dict()) == before
    assert list(model.peft_config) == ["default", "second"]
    assert model.active_adapters == ["default"]
    monkeypatch.undo()
    model.add_weighted_adapter(["default", "second"], [0.7, 0.5], "both", "linear")
    assert "both" in model.peft_config


def test_two_active_adapters():
    model = several(second_rank=3)
    first = compare(model)
    activate(model, "default", "second")
    both = compare(model)
    assert error(both, first) > 0.01
    assert len([name for name in gradients(model) if "second" in name]) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "names",
    [
        ["default", "second", "__base__"],
        ["__base__", "__base__", "__base__"],
        ["second", "default", "second"],
        ["default", "default", "default"],
    ],
)
def test_mixed_batches(names, dtype):
    model = several(second_rank=3, dtype=dtype).eval()
    mixed = compare(model, 3 * RELATIVE[dtype], adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(INDICES)
        else:
            model.set_adapter(name)
            alone = model(INDICES)
        assert error(mixed[row], alone[row]) <= 3 * RELATIVE[dtype]


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_dropout(p):
    """In evaluation the same, in training the same in expectation: masks come from different generators."""
    model = llama(lora_dropout=p)
    randomise(model)
    ids = batches(1)[0]
    with torch.no_grad():
        sampled = torch.stack([model(ids).logits for _ in range(60)]).mean(0)
        exact = model.eval()(ids).logits
        with mica.fast.disabled():
            stock = model(ids).logits
            sampled_stock = torch.stack([model.train()(ids).logits for _ in range(60)]).mean(0)
    assert error(exact, stock) <= 5 * RELATIVE[torch.float32]
    spread = error(sampled_stock, exact)
    assert spread > 0.01 or p == 0.0
    assert error(sampled, exact) <= 1.5 * spread + FP32


# ---------------------------------------------------------------------------------------------------
# files
# ---------------------------------------------------------------------------------------------------


def test_a_saved_adapter_is_a_plain_peft_adapter(tmp_path):
    """The folder that `push_to_hub` uploads, loaded with this package and in a process without it."""
    model = llama()
    train(model)
    ids = batches(1)[0]
    with torch.no_grad():
        expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 14
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in weights)

    loaded = PeftModel.from_pretrained(tiny_llama(initializer_range=0.3), tmp_path / "adapter")
    assert path(loaded) == {"reference": 14}
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
    resumed = PeftModel.from_pretrained(
        tiny_llama(initializer_range=0.3), tmp_path / "adapter", is_trainable=True
    )
    done = report(resumed, lambda: train(resumed))
    assert done["counts"] == {"linear": 14 * 3, "linear_backward": 14 * 3}
    assert not done["moved"]
    assert all("lora_A" in name for name in done["trained"])
    assert done["losses"][-1] < done["losses"][0]

    tiny_llama(initializer_range=0.3).save_pretrained(tmp_path / "base")
    load = tmp_path / "base", tmp_path / "adapter", "peft"
    (theirs,) = logits_without_mica(tmp_path, ids, load)
    assert error(theirs, expected) <= 5 * RELATIVE[torch.float32]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_export_for_inference(tmp_path, strict):
    """By default the program holds PyTorch's own operators and runs where this package is not.

    ``strict=True`` traces as torch.compile does, and ours are in it; inside `disabled()` they are not.
    """
    model = randomise(llama(num_hidden_layers=1)).eval().requires_grad_(False)
    ids = batches(1)[0]
    dims = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=32)}

    def export():
        shapes = {"input_ids": dims}
        return torch.export.export(
            Logits(model), (), {"input_ids": ids}, dynamic_shapes=shapes, strict=strict
        )

    def operators(program):
        return [str(node.target) for node in program.graph.nodes if "mica" in str(node.target)]

    program = export()
    assert operators(program) == ["mica.linear.default"] * (7 if strict else 0)
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    with torch.no_grad():
        for part in (ids, ids[:2, :5]):
            out, counts = counted(lambda part=part: again(input_ids=part))
            assert counts.get("linear", 0) == len(operators(program))
            assert error(out, model(part).logits) <= 5 * RELATIVE[torch.float32]
    if strict:
        with mica.fast.disabled():
            assert operators(export()) == []


# ---------------------------------------------------------------------------------------------------
# hotswap
# ---------------------------------------------------------------------------------------------------


def saved(folder, seed, rank=4, **config):
    """A trained adapter on the same base, in a folder."""
    model = randomise(net(targets=TARGETS[1:], rank=rank, **config), seed=seed)
    for B in bases(model).values():
        B.data.neg_()  # as after another run: B is not the one that is there
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [2, 4, 6])
def test_hotswap(monkeypatch, tmp_path, backend, dtype, rank):
    """Also on kernels, which keep a prepared copy of B: hotswap edits B behind PyTorch's back."""
    monkeypatch.setenv("MICA_BACKEND", backend)
    model = randomise(net(dtype, targets=TARGETS[1:])).eval()
    folder = saved(tmp_path, 5, rank, lora_alpha=3)
    before = compare(model, 3 * RELATIVE[dtype])
    hotswap_adapter(model, str(folder), "default")
    after = compare(model, 3 * RELATIVE[dtype])
    assert error(after, before) > 0.01
    loaded = PeftModel.from_pretrained(net(dtype, targets=TARGETS[1:]).unload(), folder)
    assert error(after, loaded(INDICES)) <= 3 * RELATIVE[dtype]
    assert path(model) == {"kernel" if backend == "triton" else "reference": 3}


def test_hotswap_of_a_compiled_model(tmp_path):
    """One graph for all adapters: ranks are padded, scalings are tensors."""
    torch.compiler.reset()
    model = randomise(net(targets=TARGETS[1:], rank=3)).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        before = compiled(INDICES)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed, rank in ((5, 6), (6, 2)):
                folder = saved(tmp_path / str(seed), seed, rank, lora_alpha=3)
                hotswap_adapter(model, str(folder), "default")
                out, counts = counted(lambda: compiled(INDICES))
                assert counts["linear"] == 3
                loaded = PeftModel.from_pretrained(net(targets=TARGETS[1:]).unload(), folder)
                assert error(out, loaded(INDICES)) <= FP32
                assert error(out, before) > 0.01
