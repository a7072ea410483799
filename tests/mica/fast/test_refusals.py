"""Fault 7 of stock PEFT: what MiCA cannot do is refused, and the way out that is named works."""

import copy
import warnings

import peft
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mica.fast
from mica.fast.forward.eligibility import adapter_weights
from tests.support.merging_models import assert_same_bits, trained, weights
from tests.support.models import (
    INDICES,
    Net,
    adapted_layers,
    assert_same_bases,
    net,
    randomise,
    tiny_llama,
    wrap,
)
from tests.support.moe_models import exact_basis
from tests.support.tolerances import RELATIVE, error
from tests.support.training import train
from tests.support.unchanged import unchanged

TOKENS = torch.arange(24).reshape(2, 12)

# -- tied embeddings ---------------------------------------------------------------------------------


def tied_llama():
    return tiny_llama(tie_word_embeddings=True)


def wrap_tied(targets, **config):
    return wrap(tied_llama(), targets=targets, ensure_weight_tying=True, **config)


def ends(model):
    return model.base_model.model.model.embed_tokens, model.base_model.model.lm_head


def are_tied(model):
    """Whether the two ends of the shared weight get the same update, after A and B have moved."""
    embedding, head = ends(model)
    with torch.no_grad():
        embedding.lora_embedding_A["default"].normal_()
        head.lora_B["default"].weight.mul_(1.5)
    return torch.equal(embedding.get_delta_weight("default"), head.get_delta_weight("default"))


def test_stock_unties_mica_and_says_nothing():
    """Fault 7: what holds for plain LoRA is silently gone with MiCA."""
    assert are_tied(wrap_tied(["embed_tokens", "lm_head"], init_lora_weights=True, stock=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = wrap_tied(["embed_tokens", "lm_head"], stock=True)
    assert not are_tied(model)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("init", ["mica", "MICA"])
@pytest.mark.parametrize(
    "targets",
    [["q_proj", "embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"], r".*\.q_proj|lm_head"],
    ids=["both", "embedding", "head", "regex"],
)
def test_tied_adapters_are_refused_and_the_model_is_as_it_was(targets, init, existing):
    model = wrap(tied_llama(), targets=["q_proj"]) if existing else tied_llama()
    config = {"init_lora_weights": init, "target_modules": targets, "ensure_weight_tying": True}
    config = peft.LoraConfig(r=4, **config)
    as_given = copy.deepcopy(config)
    message = (
        r"adapters of 'model.embed_tokens' and 'lm_head' cannot be tied \(ensure_weight_tying=True\), because"
        r".*leave ensure_weight_tying off .* name 'model.embed_tokens' in modules_to_save, and neither in"
    )
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.add_adapter("second", config) if existing else peft.get_peft_model(model, config)
    assert list(getattr(model, "peft_config", {})) == (["default"] if existing else [])
    as_given.base_model_name_or_path = config.base_model_name_or_path  # stock notes it first, "" before 0.21
    assert config == as_given


@pytest.mark.parametrize("saved", ["model.embed_tokens", "embed_tokens", "lm_head"])
def test_way_out_of_modules_to_save_trains_the_shared_weight(saved):
    model = wrap_tied(["q_proj"], modules_to_save=[saved])
    embedding, head = ends(model)
    train(model, [TOKENS, TOKENS])
    weights = [end.modules_to_save["default"].weight for end in (embedding, head)]
    assert weights[0].data_ptr() == weights[1].data_ptr()
    assert not torch.equal(weights[0], embedding.original_module.weight)
    assert mica.fast.explain(model).counts() == {"reference": 2}
    merged = model.merge_and_unload()
    assert merged.model.embed_tokens.weight.data_ptr() == merged.lm_head.weight.data_ptr()


def test_way_out_of_independent_adapters():
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):  # PEFT's
        model = wrap(tied_llama(), targets=["embed_tokens", "lm_head"])
    assert mica.fast.explain(model).counts() == {"reference": 2}
    before = copy.deepcopy(model)
    train(model, [TOKENS, TOKENS])
    for layer in adapted_layers(model).values():
        assert adapter_weights(layer, "default")[0].any()
    assert_same_bases(model, before)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_what_stock_saved_as_tied_is_refused(tmp_path):
    model = randomise(wrap_tied(["q_proj", "embed_tokens", "lm_head"], stock=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'model.embed_tokens' and 'lm_head' cannot be tied"):
        PeftModel.from_pretrained(tied_llama(), tmp_path)


@pytest.mark.parametrize(
    ("targets", "tie", "config"),
    [
        ("all-linear", True, {}),
        (["q_proj"], True, {}),
        (["embed_tokens"], False, {}),
        (["embed_tokens"], True, {"init_lora_weights": True}),
    ],
    ids=["all-linear", "no embedding", "weights not tied", "plain LoRA"],
)
def test_where_nothing_is_tied_nothing_is_refused(targets, tie, config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's: nothing to tie
        model = wrap(tiny_llama(tie_word_embeddings=tie), targets=targets, ensure_weight_tying=True, **config)
    assert adapted_layers(model)


# -- a weight that is computed -----------------------------------------------------------------------


class Shrunk(nn.Module):
    def forward(self, weight):
        return torch.tanh(weight)


def shrink(module, name):
    parametrize.register_parametrization(module, name, Shrunk())


def _unparametrize(layer):
    parametrize.remove_parametrizations(layer, "weight")


KINDS = {  # name: (what makes the weight computed, the way out)
    "weight_norm": (parametrizations.weight_norm, _unparametrize),
    "spectral_norm": (parametrizations.spectral_norm, _unparametrize),
    "own": (lambda layer: shrink(layer, "weight"), _unparametrize),
    "weight_norm hook": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm hook": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.2),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def computed(kind):
    """A model whose last layer has a computed weight, adapted; A has values."""
    torch.manual_seed(0)
    model = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the hooks are deprecated
        KINDS[kind][0](model.down)
        with torch.no_grad():
            model(INDICES)  # hooks have run
    return randomise(wrap(model).eval())


def test_training_on_a_computed_weight_is_right(computed):
    layer = computed.base_model.model.down
    x = torch.randn(5, 16)
    out = layer(x)
    out.square().sum().backward()
    weight = layer.base_layer.weight.detach().double()
    lora_A, lora_B = (w.detach().double() for w in adapter_weights(layer, "default"))
    expected = x.double() @ (weight + 2 * lora_B @ lora_A).T
    assert error(out, expected) <= RELATIVE[torch.float32]
    grad_A = 2 * lora_B.T @ (2 * expected).T @ x.double()
    assert error(layer.lora_A["default"].weight.grad, grad_A) <= RELATIVE[torch.float32]
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["lora_A.default.weight"]
    minor = exact_basis(weight, 4)
    assert (minor - lora_B @ (lora_B.T @ minor)).norm() <= 1e-3
    assert isinstance(computed.unload(), Net)  # which does not merge


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "merge"])
def test_merging_is_refused_before_any_layer_is_merged(computed, call, safe):
    expected = computed(INDICES)
    layer = computed.base_model.model.down
    called, named = computed, "layer 'down'"
    if call == "merge":
        called, named = layer, f"this {type(layer.base_layer).__name__} layer"
    message = rf"MiCA cannot be merged into {named}, because its weight is computed .* make it a parameter"
    with unchanged(computed), pytest.raises(ValueError, match=message):
        getattr(called, call)(safe_merge=safe)
    assert not any(layer.merged for layer in adapted_layers(computed).values())
    assert torch.equal(computed(INDICES), expected)


def test_stock_loses_the_merge_without_a_word(computed):
    """Fault 7: the update is added to a tensor that is thrown away."""
    layer = computed.base_model.model.down
    expected, weight = computed(INDICES), layer.base_layer.weight.clone()
    with mica.fast.disabled(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        computed.merge_adapter()
    assert error(computed(INDICES), expected) > 0.01
    assert layer.merged
    assert torch.equal(layer.base_layer.weight, weight)  # nothing of the adapter is left


@pytest.mark.filterwarnings("ignore:All adapters are already merged")
def test_way_out_of_a_computed_weight(computed, kind):
    expected = computed(INDICES)
    KINDS[kind][1](computed.base_model.model.down.base_layer)
    computed.merge_adapter()
    assert error(computed(INDICES), expected) <= RELATIVE[torch.float32]
    unloaded = computed.merge_and_unload()
    assert error(unloaded(INDICES), expected) <= RELATIVE[torch.float32]
    assert "down.weight" in unloaded.state_dict()


def test_unmerging_from_a_weight_that_is_computed_since_is_refused():
    model = randomise(net(targets=["up"]))
    expected = model(INDICES)
    model.merge_adapter()
    layer = model.base_model.model.up
    parametrizations.weight_norm(layer.base_layer)
    with pytest.raises(ValueError, match="cannot be unmerged from this ParametrizedLinear layer"):
        model.unmerge_adapter()
    assert layer.merged_adapters == ["default"]
    assert error(model(INDICES), expected) <= RELATIVE[torch.float32]
    parametrize.remove_parametrizations(layer.base_layer, "weight")
    with pytest.warns(UserWarning, match="edited"):
        model.unmerge_adapter()
    assert error(model(INDICES), expected) <= RELATIVE[torch.float32]


# -- merging into a weight of several layers -------------------------------------------------------------


def tied_memory():
    """Two parameters on one memory."""
    model = tiny_llama()
    model.lm_head.weight.data = model.get_input_embeddings().weight.data
    return randomise(wrap(model, targets=["embed_tokens", "lm_head"]))


SHARED = {
    "tied": lambda: randomise(wrap(tied_llama(), targets=["embed_tokens", "lm_head"])),
    "replicated": lambda: randomise(
        wrap(tiny_llama(), targets=["q_proj"], layer_replication=[[0, 1], [0, 1]])
    ),
    "on one memory": tied_memory,
}


@pytest.fixture(params=SHARED)
def sharing(request):
    return SHARED[request.param]().eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_layers_that_share_a_weight_are_not_merged(sharing, call):
    names = [repr(name.removeprefix("base_model.model.")) for name in adapted_layers(sharing)]
    message = f"cannot be merged into layers {' and '.join(names)}, because they share one base weight"
    with unchanged(sharing), pytest.raises(ValueError, match=message):
        getattr(sharing, call)()
    expected = logits(sharing)
    with mica.fast.disabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharing.merge_adapter()
    assert error(logits(sharing), expected) > 1e-3  # stock is silently wrong


def test_way_out_of_a_shared_weight(sharing):
    expected = logits(sharing)
    for layer in adapted_layers(sharing).values():
        layer.base_layer.weight = torch.nn.Parameter(layer.base_layer.weight.clone())
    before = weights(sharing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks at the config only
        sharing.merge_adapter()
    assert error(logits(sharing), expected) <= 10 * RELATIVE[torch.float32]
    sharing.unmerge_adapter()
    assert_same_bits(sharing, before)


def test_of_layers_that_share_a_weight_one_may_be_merged(sharing):
    """By itself; a second one is an edit of it, until that is taken out again."""
    first, last = adapted_layers(sharing).values()
    before = weights(sharing)
    first.merge()
    last.merge()
    last.unmerge()
    first.unmerge()
    assert_same_bits(sharing, before)
    first.merge()
    last.merge()
    with pytest.warns(UserWarning, match="merge of another layer that shares it"):
        first.unmerge()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["embed", "down"])
def test_a_mixed_model_and_an_embedding_are_refused_too(name, mixed):
    model = Net()
    shrink(getattr(model, name), "weight")
    config = peft.LoraConfig(r=4, init_lora_weights="mica", target_modules=["embed", "up", "down"])
    model = randomise(peft.get_peft_model(model, config, mixed=mixed))
    with unchanged(model), pytest.raises(ValueError, match=f"cannot be merged into layer '{name}'"):
        model.merge_and_unload()


def test_a_computed_parameter_is_refused_before_anything_is_merged():
    model = trained("qwen3_moe")
    before = weights(model)
    layer = list(adapted_layers(model).values())[-2]
    base, name = layer.get_base_layer(), layer.parameter_name
    shrink(base, name)
    with pytest.raises(ValueError, match="its weight is computed"):
        model.merge_adapter()
    assert not any(layer.merged_adapters for layer in adapted_layers(model).values())
    parametrize.remove_parametrizations(base, name, leave_parametrized=False)
    assert_same_bits(model, before)
