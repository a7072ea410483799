"""Where the adapter of a run comes from: new, a checkpoint's, or that of --adapter."""

import pytest
import torch

from mica.cli.adapt import adapter
from mica.errors import UsageError
from tests.support.adapt_runs import adapter_settings as settings
from tests.support.adapt_runs import factors, poison_solver, write_adapter
from tests.support.tiny_cli import tiny_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of an adapter on q_proj and down_proj, rank 4 and alpha 8, and the model with it."""
    folder = tmp_path_factory.mktemp("made")
    return folder, write_adapter(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["checkpoint", "--adapter"])
def test_b_is_kept_to_the_bit_and_nothing_is_solved(option, dtype, made, monkeypatch):
    folder, before = made
    poison_solver(monkeypatch)
    args = settings(adapter=None if option == "checkpoint" else folder, dropout=0.125)
    base = tiny_llama().to(dtype)
    base.name_or_path = "another/name"
    model = adapter.start(base, args, folder if option == "checkpoint" else None)
    for factor in "AB":
        expected = factors(before, factor)
        assert expected
        for name, weight in factors(model, factor).items():
            assert torch.equal(weight, expected[name]), name
            assert weight.dtype == torch.float32
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == set(factors(model, "A"))
    config = model.peft_config["default"]
    assert (config.lora_dropout, config.base_model_name_or_path) == (0.125, "another/name")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": "q_proj"}, r"^--target-modules q_proj: .*down_proj only in the adapter"),
        ({"target_modules": "q_proj,down_proj,v_proj"}, r"v_proj not in the adapter$"),
    ],
)
def test_options_that_the_adapter_contradicts(changes, message, made):
    with pytest.raises(UsageError, match=message):
        adapter.start(tiny_llama(), settings(adapter=made[0], **changes))
    with pytest.raises(UsageError, match=message.replace("--adapter", "--resume")):
        adapter.start(tiny_llama(), settings(**changes), made[0])
