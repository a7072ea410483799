"""As few layers are checkpointed as a batch needs: never more bytes than were given, and the same bits."""

import gc
import random
import warnings
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

import mica.fast
from bench.measure.memory import alive_bytes
from mica.fast import checkpointing
from tests.support import gloo
from tests.support.checkpointed import (
    GIB,
    VOCABULARY,
    adapted,
    batch,
    budget_for,
    layers_of,
    llama,
    most_bytes,
    numbers,
    step,
)

MIB = 2**20
PLENTY, LITTLE = 2**40, 1


@pytest.fixture(autouse=True)
def _before_any_step(monkeypatch):
    monkeypatch.setattr(checkpointing, "_has_stepped", False)


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


# ---------------------------------------------------------------------------------------------------
# what is chosen
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.2}, {"use_dora": True}], ids=str)
def test_losses_and_gradients_are_the_same_to_the_bit(config, use_reentrant):
    model = llama(use_reentrant=use_reentrant, **config)
    lengths = (40, 96, 130, 17, 200, 250, 300)
    expected = [step(model, batch(length), seed=length) for length in lengths]
    chosen = set()
    with budget_for(model, MIB):
        step(model, batch(8))
        for length, one in zip(lengths, expected, strict=True):
            assert same(step(model, batch(length), seed=length), one)
            chosen.update(number[0] for number in numbers() if number)
    assert len(chosen) >= 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_batch_takes_more_than_was_given(attention, monkeypatch):
    """200 batches of any length and size, with gradient accumulation, by what PyTorch's profiler sees."""
    model = llama(attention=attention)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    generator = random.Random(1)
    budget = MIB * (3 if attention == "eager" else 1.3)
    chosen = []
    choose = checkpointing._choose

    def noted(forward, *args):
        choose(forward, *args)
        chosen.append(forward.number if forward.known else None)  # None: all, as nothing is known of them

    monkeypatch.setattr(checkpointing, "_choose", noted)
    with budget_for(model, budget), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(100):
            length = min(256, max(8, int(generator.lognormvariate(4.3, 0.8))))
            batches = [batch(length, size) for size in generator.choices((1, 2), k=generator.choice((1, 2)))]

            def run(batches=batches):
                for inputs in batches:
                    model(**inputs).loss.backward()

            taken = most_bytes(run)
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            numbers_of_layers = chosen[-len(batches) :]
            if not {None, 4} & set(numbers_of_layers):  # all are as much as can be done
                assert taken - gradients <= budget, (number, length, len(batches), numbers_of_layers)
            optimizer.step()
            optimizer.zero_grad()
    assert {0, 1, 2, 3} <= set(chosen)


def test_a_longer_batch_than_any_before_is_safe():
    """Eager attention grows with the square of the length."""
    model = llama(attention="eager")
    with budget_for(model, 6 * MIB):
        for length in (20, 20, 300):
            taken = most_bytes(lambda length=length: step(model, batch(length)))
        assert numbers()[0][0] > 0
    assert taken <= 6 * MIB


def test_the_states_of_an_optimizer_are_expected_and_counted_once():
    model = llama()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    states = 2 * sum(parameter.nbytes for parameter in trained)
    cpu = torch.device("cpu")
    with budget_for(model, PLENTY):
        step(model, batch(8))
        gc.collect()
        _, before = checkpointing._budget(cpu)
        others = 2 * sum(parameter.nbytes for parameter in checkpointing.taken_of(cpu)[1]) - states
        model(**batch(8)).loss.backward()
        optimizer.step()
        gc.collect()
        _, after = checkpointing._budget(cpu)
        optimizer.zero_grad()
        _, without_gradients = checkpointing._budget(cpu)
    assert abs(before - after - others) <= 0.02 * states  # the number of steps of each parameter
    assert after == without_gradients


def test_what_other_models_and_forwards_hold_is_counted():
    model, other = llama(), torch.nn.Linear(1024, 1024)
    with budget_for(model, PLENTY):
        _, with_other = checkpointing._budget(torch.device("cpu"))
        del other
        checkpointing.forget()
        _, without = checkpointing._budget(torch.device("cpu"))
        assert with_other - without >= 4 * MIB
        step(model, batch(64))
        loss = model(**batch(64)).loss
        _, beside = checkpointing._budget(torch.device("cpu"))
        kept = alive_bytes(lambda: model(**batch(64)).loss)
        assert beside - without >= 0.8 * kept
        loss.backward()
        _, after = checkpointing._budget(torch.device("cpu"))
    assert after == without


def test_several_forwards_before_a_backward_checkpoint_all():
    model = llama()
    inputs = batch(24)
    with budget_for(model, PLENTY):
        for _ in range(3):
            (model(**inputs).loss + model(**inputs).loss).backward()
        assert numbers() == [(4, 4, 4)]


def test_a_loss_without_a_backward_is_no_forward_that_waits():
    model = llama()
    with budget_for(model, PLENTY):
        for _ in range(3):
            model(**batch(24)).loss.item()
        assert numbers() == [(0, 0, 0)]


MODELS = {
    "Gemma 3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=8)
    ),
    "Falcon H1": lambda: transformers.FalconH1ForCausalLM(
        transformers.FalconH1Config(
            **_SMALL, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8
        )
    ),
    "Mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**_SMALL, num_local_experts=4)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_layer=4, n_head=4, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0
        )
    ),
}
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


@pytest.mark.parametrize("name", MODELS)
def test_models_with_unlike_layers(name):
    torch.manual_seed(0)
    targets = ["c_attn", "c_fc"] if name == "GPT-2" else ["q_proj", "v_proj", "o_proj"]
    model = adapted(MODELS[name]().to(torch.bfloat16), targets=targets, fan_in_fan_out=name == "GPT-2")
    expected = step(model, batch(24, 2))
    with budget_for(model, PLENTY):
        step(model, batch(24, 2))
        assert same(step(model, batch(24, 2)), expected)
        assert numbers() == [(0, 0, 0)]


def test_an_encoder_before_a_decoder_stays_checkpointed():
    """How long the decoder's sequences are, is not known when the encoder runs."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, vocab_size=97, decoder_start_token_id=0
    )
    model = adapted(transformers.T5ForConditionalGeneration(config), targets=["q", "v"])
    inputs = {"input_ids": batch(20)["input_ids"], "labels": batch(9)["input_ids"]}
    expected = step(model, inputs)
    with budget_for(model, PLENTY):
        for _ in range(3):
            assert same(step(model, inputs), expected)
        assert sorted(numbers()) == [(0, 0, 0), (3, 3, 3)]


# ---------------------------------------------------------------------------------------------------
# what is left alone
# ---------------------------------------------------------------------------------------------------


def test_what_nobody_checkpoints_is_not_touched():
    model = llama()
    model.gradient_checkpointing_disable()
    with budget_for(model, LITTLE):
        step(model, batch(16))
        assert numbers() == []
        model.gradient_checkpointing_enable()
        model.eval()
        model(**batch(16))
        model.train()
        with torch.no_grad():
            model(**batch(16))
        assert numbers() == []
    assert "was on in no layer" in checkpointing.summary()


def test_the_class_is_given_back_as_it_was():
    name = "_gradient_checkpointing_func"
    model = llama(layers=1)
    layer = layers_of(model)[0]
    function = getattr(layer, name)
    with budget_for(model, PLENTY):
        assert getattr(layer, name) is not function
        with mica.fast.disabled():
            assert getattr(layer, name) is function
        del layer._gradient_checkpointing_func
        assert not hasattr(layer, name)
        setattr(layer, name, function)
        mica.fast.uninstall()
        assert name not in vars(GradientCheckpointingLayer)
        assert getattr(layer, name) is function
    assert getattr(layer, name) is function


def test_a_compiled_model_is_left_as_it_is():
    model = llama(layers=2, dtype=torch.float32)
    expected = step(model, batch(12))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=False)
    with budget_for(model, PLENTY):
        for _ in range(2):
            for value, other in zip(step(compiled, batch(12)), expected, strict=True):
                torch.testing.assert_close(value, other)
        assert numbers() == []


def test_new_adapters_are_counted_anew():
    model = llama()
    with budget_for(model, PLENTY):
        for _ in range(2):
            step(model, batch(16))
        model.add_adapter("other", model.peft_config["default"])
        assert numbers() == []


# ---------------------------------------------------------------------------------------------------
# what goes wrong
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, -1, float("nan"), float("inf"), True, "much", "12"])
def test_what_is_no_budget_is_refused(memory):
    with pytest.raises(ValueError, match="memory must be a number of GiB above 0, 'auto' or None, but it is"):
        mica.fast.enable(memory=memory)
    assert mica.fast.settings.settings.memory is None


def test_a_budget_that_is_too_small_is_warned_of_once():
    model = llama()
    with budget_for(model, LITTLE):
        step(model, batch(64))
        with pytest.warns(
            UserWarning, match=r"a step takes .* GiB, as counted, with 4 of 4 layers checkpointed"
        ):
            step(model, batch(64))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, batch(64))
        assert numbers() == [(4, 4, 4)]


def test_a_layer_that_needs_values_has_all_checkpointed(monkeypatch):
    model = llama()
    expected = step(model, batch(16))
    norm = layers_of(model)[0].input_layernorm
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) if x.sum().item() < 1e9 else x)
    with budget_for(model, PLENTY):
        with pytest.warns(UserWarning, match="what LlamaDecoderLayer takes cannot be counted without values"):
            step(model, batch(16))
        assert same(step(model, batch(16)), expected)
        assert numbers() == [None]


def test_out_of_memory_is_explained_and_more_is_expected_from_then_on(monkeypatch):
    model = llama()
    with budget_for(model, 3 * MIB):
        for _ in range(2):
            step(model, batch(130))
        before = numbers()[0][0]
        layer = layers_of(model)[-1]

        def fail(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        hook = layer.mlp.register_forward_pre_hook(fail)
        said = r"CUDA out of memory\. mica.fast had \d of 4 layers checkpointed"
        for _ in range(10):
            with pytest.raises(torch.OutOfMemoryError, match=said):
                step(model, batch(130))
        hook.remove()
        step(model, batch(130))
        assert numbers()[0][0] > before


def test_auto_is_what_is_free(monkeypatch):
    free = SimpleNamespace(available=10 * GIB, total=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    mica.fast.enable(memory="auto")
    taken, _ = checkpointing.taken_of(torch.device("cpu"))
    budget, _ = checkpointing._budget(torch.device("cpu"))
    assert budget == taken + 9 * GIB
    mica.fast.enable(memory=3)
    assert checkpointing._budget(torch.device("cpu"))[0] == 3 * GIB


def test_an_accelerator_says_what_is_taken(monkeypatch):
    """What the allocator has cached is free for this process; what others take is not."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda _: 5 * GIB)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _: (10 * GIB, 20 * GIB))
    mica.fast.enable(memory="auto")
    assert checkpointing._budget(device) == ((3 + 2 + 10 - 1) * GIB, 3 * GIB)
    mica.fast.enable(memory=4.0)
    assert checkpointing._budget(device) == (4 * GIB, 3 * GIB)


def test_explain_says_how_many():
    model = llama()
    assert 'enable(memory="auto")' in str(mica.fast.explain(model))
    with budget_for(model, PLENTY):
        for _ in range(2):
            step(model, batch(16))
        (line,) = mica.fast.explain(model).by_memory
        assert line.startswith(
            "gradient checkpointing by memory: 0 of 4 layers in the last batch, 0 to 0 so far"
        )
        assert str(mica.fast.explain(model)).endswith(line)
        assert checkpointing.report(torch.nn.Linear(1, 1)) == []


# ---------------------------------------------------------------------------------------------------
# loops and processes
# ---------------------------------------------------------------------------------------------------


def test_accelerate_with_accumulation():
    model = llama()
    expected = step(model, *map(batch, (40, 90, 20)))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    prepared = accelerator.prepare(model)
    with budget_for(model, 2 * MIB):
        step(model, batch(24))
        torch.manual_seed(0)
        for length in (40, 90, 20):
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch(length)).loss * 3)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert same(gradients, expected[3:])
    assert numbers() == []


def _distributed(rank, how):
    model = llama(dtype=torch.float32)
    shape = model
    if how == "DDP":
        shape = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    results, chosen = [], []
    for memory in (None, PLENTY / GIB, LITTLE / GIB):
        given = memory if rank or memory is None else PLENTY / GIB
        mica.fast.enable(memory=given)
        outcomes = []
        for number in range(3):
            length = 16 + 8 * number + 24 * rank
            torch.manual_seed(0)
            loss = shape(**batch(length, seed=rank)).loss
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
            outcomes += [loss.detach(), *(g.clone() for g in gradients)]
            model.zero_grad()
        results.append(outcomes)
        chosen.append(numbers())
    mica.fast.enable(memory=None)
    return {"same": [same(results[0], other) for other in results[1:]], "chosen": chosen[1:]}


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_two_processes_choose_by_their_own_batches(how):
    """In the last three batches the one checkpoints none and the other all."""
    first, second = gloo.run(_distributed, how)
    for result in (first, second):
        if isinstance(result, Exception):
            raise result
        assert result["same"] == [True, True]
    assert first["chosen"] == [[(0, 0, 0)], [(0, 0, 0)]]
    assert second["chosen"] == [[(0, 0, 0)], [(4, 4, 4)]]
