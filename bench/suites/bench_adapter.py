"""What happens to an adapter once: initialisation, loading, merging. All linear layers, r = 16.

On a CPU SmolLM2-135M; on an accelerator only the initialisation of a decoder block of random weights in bf16:
stock's SVDs take it longest.
"""

import copy
import functools
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

import mica.fast
from bench.measure.machine import DEVICE, ON_ACCELERATOR
from bench.results.names import EIGH, FAST, MICA, PLAIN_LORA, STOCK
from bench.results.throughput import BYTES, FLOP, MATRICES, gram_flop
from bench.suites.decoder import RANK, SMOLLM2, adapted, config_of
from bench.suites.eigh import least_energy, peft_with_eigh
from bench.suites.harness import build_all, pick
from bench.suites.rounds import Once, prepared, rounds
from tests.support import models

# Stock PEFT runs every SVD in each round, of loading too.
FEWEST = pick(default=5, cuda=1, dry=1)  # rounds
SECONDS = pick(default=180.0, cuda=10.0, dry=0.0)  # of a cell
MERGE_AND_UNMERGE = "merge + unmerge"
MERGE_AND_UNLOAD = "merge_and_unload"
IMPLEMENTATIONS = {STOCK: mica.fast.disabled, FAST: nullcontext}
INITIALISATIONS = {STOCK: mica.fast.disabled, EIGH: peft_with_eigh, FAST: nullcontext}
if ON_ACCELERATOR:  # where stock's SVDs may take all the time there is
    INITIALISATIONS = dict(reversed(INITIALISATIONS.items()))
MODEL = pick(default=SMOLLM2, cuda="Llama-3.2-1B", dry="toy")
NAME = MODEL if MODEL == SMOLLM2 else f"a block of {MODEL}"
DTYPE = "bfloat16" if ON_ACCELERATOR else "float32"
AXES = {"model": NAME, "rank": RANK}
on_a_cpu = pytest.mark.skipif(ON_ACCELERATOR, reason="measured on a CPU")
each_adapter = pytest.mark.parametrize("adapter", [MICA, PLAIN_LORA])


@functools.cache
def base():
    """The model to adapt, which tests copy: it takes 15 s to read SmolLM2."""
    if MODEL == SMOLLM2:
        return models.smollm2()
    torch.manual_seed(0)
    return AutoModel.from_config(config_of(MODEL), dtype=getattr(torch, DTYPE)).to(DEVICE)


def saved_adapter(folder):
    adapted(base(), 0.01).save_pretrained(folder)
    return folder


def weights(model) -> list[torch.Tensor]:
    """The base weight of every adapted layer."""
    return [layer.get_base_layer().weight for layer in models.adapted_layers(model).values()]


def energy(model) -> float:
    """‖BᵀW‖² of all layers, which is larger for any other subspace; and BᵀB has to be 1."""
    total = 0.0
    for (name, basis), weight in zip(models.bases(model).items(), weights(model), strict=True):
        basis = basis.detach()
        error = float((basis.T @ basis - torch.eye(RANK, device=basis.device)).abs().max())
        # stock PEFT rounds B to the dtype of the weight
        limit = 1e-5 if weight.dtype == torch.float32 or mica.fast.is_enabled() else 1e-2
        assert error <= limit, f"{name}: BᵀB is off by {error:.1e}"
        total += float((basis.T @ weight.float()).square().sum())
    return total


def bench_initialisation():
    group = f"get_peft_model, {NAME}, {DTYPE}"
    prepared(group, base)
    axes = {"suite": "initialisation", **AXES, "dtype": DTYPE}
    wrap = functools.partial(models.wrap, rank=RANK, targets="all-linear")

    @functools.cache
    def least() -> float:
        return sum(least_energy(weight, RANK) for weight in weights(adapted(base(), 0.0)))

    def sample(once: Once, name: str) -> None:
        with INITIALISATIONS[name]():
            wrapped = once(wrap, axes, make=lambda: copy.deepcopy(base()), peak=True)
            once.note_growth("peak_mb", 1e6)
            shapes = [weight.shape for weight in weights(wrapped)]
            once.note_work({MATRICES: len(shapes), FLOP: sum(gram_flop(*shape) for shape in shapes)})
            spent = energy(wrapped)
        assert spent <= 1.01 * least(), f"‖BᵀW‖² is {spent}, and can be {least()}"

    rounds(group, INITIALISATIONS, sample, SECONDS, FEWEST)


@on_a_cpu
def bench_loading(tmp_path):
    group = f"PeftModel.from_pretrained, {NAME}, float32"
    adapter = prepared(group, lambda: saved_adapter(tmp_path / "adapter"))
    axes = {"suite": "loading", **AXES, "dtype": "float32"}
    load = functools.partial(PeftModel.from_pretrained, model_id=adapter)

    def sample(once: Once, name: str) -> None:
        with IMPLEMENTATIONS[name]():
            loaded = once(load, axes, make=lambda: copy.deepcopy(base()))
        layers = models.adapted_layers(loaded).values()
        once.note_work({MATRICES: len(layers)})
        assert all(layer.lora_A["default"].weight.any() for layer in layers)

    rounds(group, IMPLEMENTATIONS, sample, SECONDS, FEWEST)


@functools.cache
def unmerged(adapter: str):
    """SmolLM2-135M in bf16 with trained adapters, which tests copy."""
    return adapted(copy.deepcopy(base()).to(torch.bfloat16), 0.01, adapter=adapter)


def checked_merge(model, implementation) -> dict[str, float]:
    """Merges and unmerges; which share of the weights that changes, and what the merge report says."""
    facts = {}
    is_exact = False
    before = [weight.clone() for weight in weights(model)]
    model.merge_adapter()
    if implementation == FAST:
        report = mica.fast.merge_report(model)
        facts["swallowed"] = report.swallowed
        is_exact = bool(report.layers)  # merged by mica.fast, not by PEFT's own code
    merged = zip(weights(model), before, strict=True)
    assert not any(torch.equal(weight, old) for weight, old in merged), "merging changes nothing"
    model.unmerge_adapter()
    changed = sum(int((weight != old).sum()) for weight, old in zip(weights(model), before, strict=True))
    if is_exact:
        assert not changed, f"{changed} weights are not what they were before the merge"
    facts["weights_changed"] = changed / sum(weight.numel() for weight in before)
    return facts


def merge_and_unmerge(model) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


@on_a_cpu
@each_adapter
def bench_merge(adapter):
    group = f"{MERGE_AND_UNMERGE}, {adapter}, {NAME}, bfloat16"

    def build(name: str):
        model = copy.deepcopy(unmerged(adapter))
        with IMPLEMENTATIONS[name]():
            return model, checked_merge(model, name)

    built = prepared(group, lambda: build_all(group, IMPLEMENTATIONS, build))
    axes = {"suite": "merge", "adapter": adapter, **AXES, "dtype": "bfloat16", "call": MERGE_AND_UNMERGE}

    def sample(once: Once, name: str) -> None:
        model, facts = built[name]
        # each weight is read and written by the merge, and again by the unmerge
        merged = sum(weight.numel() for weight in weights(model))
        work = {BYTES: 4.0 * merged * torch.bfloat16.itemsize}
        with IMPLEMENTATIONS[name]():
            once(functools.partial(merge_and_unmerge, model), axes, work=work, **facts)

    rounds(group, IMPLEMENTATIONS, sample, SECONDS)


@functools.cache
def exact_sums(adapter: str) -> list[torch.Tensor]:
    """W + s·B·A of every adapted layer of `unmerged`, rounded once to bf16."""
    sums = []
    for layer in models.adapted_layers(unmerged(adapter)).values():
        lora_A, lora_B = models.factors(layer)
        update = layer.scaling["default"] * (lora_B.detach().double() @ lora_A.detach().double())
        sums.append((models.stored(layer).double() + update).to(torch.bfloat16))
    return sums


def check_unloaded(model, names, implementation, adapter: str) -> None:
    """Stock rounds twice: its weights are next to the exact ones."""
    assert not models.adapted_layers(model), "adapters are left"
    limit = 0.001  # where W + s·B·A is next to the middle of two numbers, fp32 may take the other one
    if implementation == STOCK:
        limit = 0.5
    for name, exact in zip(names, exact_sums(adapter), strict=True):
        merged = model.get_submodule(name.removeprefix("base_model.model.")).weight
        other = float((merged != exact).float().mean())
        assert other <= limit, f"{name}: {other:.2%} of the weights are not the rounded sum"


@on_a_cpu
@each_adapter
def bench_merge_and_unload(adapter):
    group = f"{MERGE_AND_UNLOAD}, {adapter}, {NAME}, bfloat16"
    model = prepared(group, lambda: unmerged(adapter))
    axes = {"suite": "merge", "adapter": adapter, **AXES, "dtype": "bfloat16", "call": MERGE_AND_UNLOAD}
    merged = sum(weight.numel() for weight in weights(model))
    work = {BYTES: 2.0 * merged * torch.bfloat16.itemsize}  # each weight is read and written
    names = list(models.adapted_layers(model))
    checked = set()

    def sample(once: Once, name: str) -> None:
        with IMPLEMENTATIONS[name]():
            unloaded = once(
                lambda wrapped: wrapped.merge_and_unload(),
                axes,
                make=lambda: copy.deepcopy(model),
                work=work,
            )
        if name not in checked:
            check_unloaded(unloaded, names, name, adapter)
            checked.add(name)

    rounds(group, IMPLEMENTATIONS, sample, SECONDS)
