"""Rules of `machine` for quantised bases: whatever was done before, a merge is off by one quantisation.

Stock PEFT is no oracle here: some of its merges ruin the base. The effective weight of a layer is what its
base layer makes of the unit matrix. A merge and an unmerge may round that once to the base's few bits.
Nothing else may change it, least of all an evaluation, in which bitsandbytes repacks 4-bit weights.
"""

import copy

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mica.fast
from tests.fuzz.actions import FLAG, INDEX, SEEDS, SEQUENCES, action, any_of
from tests.fuzz.compare import distance, layers
from tests.support.quantised_models import quantise

KINDS = ("nf4", "nf4", "fp4", "nf4 double, bf16 storage", "int8")
QUANTISATION = {
    "nf4": 0.12,
    "fp4": 0.16,
    "int8": 0.02,
}  # relative, of normally distributed weights: 0.093, 0.12, 0.008
READING = 0.02  # a packed weight is multiplied in bf16, and 8-bit layers quantise what they are given
CHANNELS = 64  # in and out: bitsandbytes repacks whole blocks of 64 weights of 32 rows


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(CHANNELS, 2 * CHANNELS)
        self.down = nn.Linear(2 * CHANNELS, CHANNELS, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def effective(layer: nn.Module) -> Tensor:
    """(out_features, in_features) of the base layer in fp64; in training mode, where nothing is repacked."""
    base = layer.get_base_layer()
    mode = base.training
    base.train()
    with torch.no_grad():
        found = base(torch.eye(layer.in_features))
    base.train(mode)
    bias = 0 if base.bias is None else base.bias.detach().double()
    return (found.double() - bias).t()


def update(layer: nn.Module, adapter: str) -> Tensor:
    lora_A, lora_B = (of[adapter].weight.detach().double() for of in (layer.lora_A, layer.lora_B))
    return layer.scaling[adapter] * lora_B @ lora_A


class Quantised(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.twins = self  # what `action` compares
        self.limit = 0.0
        self.merged: dict[str, Tensor] = {}  # layer -> the update that is in its weight
        self.weights: dict[str, Tensor] = {}  # layer -> its effective weight

    @initialize(kind=st.sampled_from(KINDS), rank=any_of(2, 4), seed=SEEDS, second=FLAG)
    def start(self, kind, rank, seed, second):
        SEQUENCES["quantised models"] += 1
        mica.fast.enable()
        torch.manual_seed(seed)
        self.limit = QUANTISATION[kind.partition(" ")[0]]
        config = LoraConfig(
            init_lora_weights="mica", r=rank, lora_alpha=2 * rank, target_modules=["up", "down"]
        )
        self.model = get_peft_model(quantise(TwoLayers(), kind), config, "one")
        if second:
            self.model.add_adapter("two", config)
        for layer in layers(self.model).values():
            for lora_A in layer.lora_A.values():
                nn.init.normal_(lora_A.weight, std=0.05)
        self.weights = {name: effective(layer) for name, layer in layers(self.model).items()}

    # -- what `action` compares -----------------------------------------------------------------------

    def fingerprint(self):
        values = [parameter.detach().double().sum().item() for _, parameter in self.model.named_parameters()]
        packed = [
            getattr(
                getattr(layer.get_base_layer().weight, "quant_state", None), "packing_format_for_cpu", False
            )
            for layer in layers(self.model).values()
        ]
        return values, packed, self.model.training, self.model.active_adapters, list(self.merged)

    def compare(self) -> None:
        """Nothing but a merge and an unmerge, which say so themselves, has changed a weight."""
        for name, layer in layers(self.model).items():
            off = distance(effective(layer), self.weights[name])
            assert off <= READING, f"{name}: the weight is off by {off:.2f}, and nothing was merged"

    def probe(self, gradients: bool) -> None:
        """Each layer's output, from the weights that it has now; bf16 products of packed weights."""
        for layer in layers(self.model).values():
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
            weight = effective(layer)
            if not layer.merged and not layer.disable_adapters:
                weight = weight + sum(update(layer, adapter) for adapter in layer.active_adapters)
            bias = layer.get_base_layer().bias
            expected = x.double() @ weight.t() + (0 if bias is None else bias.detach().double())
            with torch.set_grad_enabled(gradients):
                off = distance(layer(x), expected)
            assert off <= 2 * READING, f"the output is off by {off:.2f}"

    # -- rules ----------------------------------------------------------------------------------------

    @action(rows=any_of(1, 7), stays=FLAG, disabled=FLAG)
    def evaluate(self, rows, stays, disabled):
        """In eval mode and without a graph, as text is generated. ``stays``: the model stays in that mode."""
        self.model.eval()
        with torch.no_grad():
            if disabled:
                with self.model.disable_adapter():
                    self.model(torch.randn(rows, CHANNELS))
                self._unmerged()  # as PEFT does in such a call
            else:
                self.model(torch.randn(rows, CHANNELS))
        self.model.train(not stays)
        return True

    @precondition(lambda self: not self.merged)
    @action(seed=SEEDS)
    def train_step_quantised(self, seed):
        self.model.train()
        x = torch.randn(6, CHANNELS, generator=torch.Generator().manual_seed(seed))
        self.model(x).square().mean().backward()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)
        self.model.zero_grad(set_to_none=True)

    @precondition(lambda self: not self.merged)
    @action(safe=FLAG)
    def merge_quantised(self, safe):
        adapters = self.model.active_adapters
        added = {
            name: sum(update(layer, adapter) for adapter in adapters)
            for name, layer in layers(self.model).items()
        }
        self.model.merge_adapter(safe_merge=safe)
        self.merged = added
        self._rounded(added, roundings=len(adapters))

    @precondition(lambda self: self.merged)
    @action()
    def unmerge_quantised(self):
        self.model.unmerge_adapter()
        self._unmerged()
        return True

    def _unmerged(self):
        if self.merged and not any(layer.merged for layer in layers(self.model).values()):
            taken = {name: -added for name, added in self.merged.items()}
            self.merged = {}
            self._rounded(taken, roundings=2)

    def _rounded(self, added: dict[str, Tensor], roundings: int) -> None:
        """The weights are those from before and what was added, rounded to the base's bits so many times."""
        for name, layer in layers(self.model).items():
            expected, found = self.weights[name] + added[name], effective(layer)
            off = distance(found, expected)
            limit = roundings * self.limit + READING
            assert off <= limit, f"{name}: the merged weight is off by {off:.2f} of {limit:.2f}"
            self.weights[name] = found

    @precondition(lambda self: not self.merged and len(self.model.peft_config) > 1)
    @action(index=INDEX)
    def switch_quantised(self, index):
        names = list(self.model.peft_config)
        self.model.set_adapter(names[index % len(names)])
        return True

    @action()
    def copy_quantised(self):
        self.model = copy.deepcopy(self.model)
        return True

    @action()
    def reports_quantised(self):
        """They read, and change nothing."""
        str(mica.fast.explain(self.model))
        str(mica.fast.merge_report(self.model))
        return True

    def teardown(self):
        mica.fast.enable()
