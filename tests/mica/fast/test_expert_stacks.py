"""PEFT's layout of the adapters of a stack of experts, as views."""

import pytest
import torch
from torch.nn.init import normal_

from mica.fast.forward.expert_params import (
    is_stack,
    is_stored_as_in_out,
    is_wrapper,
    lora_A_of,
    lora_B_of,
    parameter_of,
    weight_name,
    weight_of_stack,
)
from tests.support.models import net
from tests.support.moe_models import BUILDERS, ROUTER, STACKS, wrap_experts, wrappers


@pytest.mark.parametrize("kind", BUILDERS)
def test_views_give_the_update_that_peft_adds(kind):
    model = wrap_experts(BUILDERS[kind](), stock=True, target_parameters=[*STACKS, ROUTER[kind]])
    layers = wrappers(model).values()
    assert sorted(map(weight_name, layers)) == sorted(2 * ["gate_up_proj", "down_proj", "weight"])
    for layer in layers:
        normal_(layer.lora_B["default"].weight)
        A, B, weight = lora_A_of(layer, "default"), lora_B_of(layer, "default"), weight_of_stack(layer)
        assert A.shape == (layer.num_experts, 4, layer.in_features)
        assert B.shape == (layer.num_experts, layer.out_features, 4)
        assert weight.shape == (layer.num_experts, layer.out_features, layer.in_features)
        assert is_stack(layer) == (parameter_of(layer).ndim == 3)
        update = layer.scaling["default"] * (B @ A)
        stored = update.mT if is_stored_as_in_out(layer) else update
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(stored.reshape(expected.shape), expected)


@pytest.mark.parametrize("kind", BUILDERS)
def test_views_share_the_memory(kind):
    for layer in wrappers(wrap_experts(BUILDERS[kind](), stock=True)).values():
        pairs = [
            (lora_A_of(layer, "default"), layer.lora_A["default"].weight),
            (lora_B_of(layer, "default"), layer.lora_B["default"].weight),
            (weight_of_stack(layer), getattr(layer.get_base_layer(), layer.parameter_name)),
        ]
        for view, stored in pairs:
            assert view.data_ptr() == stored.data_ptr()
            assert view.untyped_storage().nbytes() == stored.untyped_storage().nbytes()
        assert parameter_of(layer) is pairs[-1][1]
        assert is_stored_as_in_out(layer) == (kind == "gpt_oss")
        lora_B_of(layer, "default").detach()[1, 2, 3] = 5
        assert layer.lora_B["default"].weight[2, 3 * layer.num_experts + 1] == 5


def test_other_layers_are_no_stacks():
    layer = net().base_model.model.up
    assert not is_wrapper(layer)
    assert not is_stack(layer)
    assert weight_name(layer) == "weight"
