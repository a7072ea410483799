"""One small model twice: adapted by the backend, and by stock PEFT. What is done to both must come out equal.

Rounding must not pile up over a long run, so after every comparison the twin takes over the values of the
backend's model. Where stock has one of the bugs in mica/fast/README.md, the twin is put right the same way:

| stock's fault | what is done |
| --- | --- |
| B is another basis of the same space, rounded to the base dtype | A and B of a new adapter are copied |
| an embedding's A and B of a 16-bit model become trainable at every cast | these flags are copied |
| an adapter that was edited while merged is unmerged by its present values | weights and their copies, too |
| a 16-bit merge rounds twice and cannot be undone | compared within the dtype's rounding, then copied |
| MiCA on `target_parameters` is refused | the twin's is plain LoRA, then marked as MiCA, A and B are copied |
| experts in fp64 have no grouped product | they are switched to "eager" |
| hotswapping without DoRA's magnitudes sets them to 0 | it is not done to the twin, and ours must refuse |

Not drawn for experts, because stock refuses it there: dropout.
"""

import copy
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import mica.fast
from mica.fast.forward.expert_params import weight_name
from tests.fuzz.compare import (
    Outcome,
    attempt,
    attributes,
    check_counts,
    distance,
    factors,
    furthest,
    is_base,
    is_same,
    judge,
    layers,
    rounded_otherwise,
    take_for_mica,
)
from tests.fuzz.models import KINDS, MIXTURES, build, run, tokens
from tests.support.counts import whatever_language
from tests.support.tolerances import RELATIVE

# Over the relative error of one layer: a model has a few, and gradients go through all of them twice.
OUTPUTS, GRADIENTS, WEIGHTS = 10, 30, 4


class Twins:
    def __init__(self, kind: str, dtype: torch.dtype, config: dict, cast=True, inference=False):
        """``inference``: the base models are made in inference mode, and used outside it."""
        self.kind, self.form = kind, KINDS[kind].form
        self.autocast: torch.dtype | None = None
        self.seed = 0
        self.of_inference = inference
        self.exact = True  # whether unmerging has to give the very bits
        self.edited = False  # whether a merged adapter has changed since
        self.is_lost = False  # whether it is unknown what unmerging gives: plain LoRA's, stock's, trained
        with torch.inference_mode() if inference else nullcontext():
            base = [build(kind).to(dtype) for _ in range(2)]
        self.pristine = build(kind).to(dtype)
        ours, stock = self.configs(config)
        self.ours = get_peft_model(base[0], ours, "one", autocast_adapter_dtype=cast)
        with mica.fast.disabled():
            self.stock = get_peft_model(base[1], stock, "one", autocast_adapter_dtype=cast)
        self.frozen: dict[tuple[str, str], Tensor] = {}
        self.base: dict[str, Tensor] = {}
        self.adopt("one", config["init_lora_weights"] == "mica", 3)
        self.compare()

    # -- both -----------------------------------------------------------------------------------------

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.ours, self.stock

    def each(self, action: Callable[[nn.Module], Any]) -> Outcome:
        """The action on both models: the same result, or an error of the same type. Returns the backend's."""
        self.seed += 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(self.seed)  # `torch.manual_seed` formats the stack
            ours = attempt(action, self.ours)
            torch.default_generator.manual_seed(self.seed)
            with mica.fast.disabled():
                stock = attempt(action, self.stock)
        if type(ours.error) is not type(stock.error):
            message = f"ours: {ours.error!r}, stock: {stock.error!r}"
            raise AssertionError(message) from (ours.error or stock.error)
        if ours.error is None:
            self._same_by_oracle(ours.value, stock.value, lambda change: self._of_a_copy(action, change))
        return ours

    def _same_by_oracle(self, ours, stock, oracle: Callable[[Callable], Any], **tolerances) -> None:
        """In 16 bits, and where a softmax is steep, two good results can be far apart: fp64 judges then.

        A good result is as near to fp64's as stock's are, from its weights or others within their rounding.
        """
        try:
            self.same(ours, stock, **tolerances)
        except AssertionError as error:
            try:
                exact = oracle(nn.Module.double)
            except Exception:  # the action is not one for other dtypes
                raise error from None
            mine, theirs = furthest(ours, exact), furthest(stock, exact)
            for _ in range(4):
                if mine <= 3 * theirs + 3 * self.tolerance:
                    return
                change = partial(rounded_otherwise, autocast=self.autocast)
                theirs = max(theirs, furthest(oracle(change), exact))
            raise AssertionError(f"off by {mine:.1e}, stock by {theirs:.1e} (fp64 judges)") from error

    def _of_a_copy(self, action: Callable[[nn.Module], Any], change: Callable) -> Any:
        """What the action gives on a changed copy, run by stock; on one in fp64 without autocast."""
        autocast = self.autocast
        if change is nn.Module.double:
            self.autocast = None
        try:
            with mica.fast.disabled(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = copy.deepcopy(self.stock)
                self._restore_base(model)
                model = change(model)
                if self.is_mixture:
                    model.set_experts_implementation("eager")
                return action(model)
        finally:
            self.autocast = autocast

    def _restore_base(self, model: nn.Module) -> None:
        """The very weights from before a merge, where the backend has them again: stock's are rounded."""
        if self.is_merged or not self.exact or not self.base:
            return
        own = self.base_parameters
        if own.keys() != self.base.keys() or not all(is_same(own[name], self.base[name]) for name in own):
            return
        for name, parameter in self.base_parameters_of(model).items():
            parameter.copy_(self.base[name])

    def replace(self, action: Callable[[nn.Module], nn.Module]) -> bool:
        """Go on with what the action makes of each; False where it can be made of neither."""
        made = {}
        outcome = self.each(lambda model: made.update({model is self.ours: action(model)}))
        if outcome.error is None:
            self.ours, self.stock = made[True], made[False]
        return outcome.error is None

    def same(self, ours, stock, what="result", limit: float | None = None, scale=0.0) -> None:
        """``limit``: of the relative error."""
        limit = OUTPUTS * self.tolerance if limit is None else limit
        if isinstance(ours, Tensor):
            assert ours.dtype == stock.dtype, f"{what}: {ours.dtype}, stock {stock.dtype}"
            difference = distance(ours, stock, max(scale, 1e-6))
            assert difference <= limit, f"{what}: error {difference:.2e} of {limit:.1e}"
        elif isinstance(ours, dict):
            assert ours.keys() == stock.keys(), f"{what}: {set(ours) ^ set(stock)}"
            for name in ours:
                self.same(ours[name], stock[name], f"{what} {name}", limit, scale)
        elif isinstance(ours, (tuple, list)):
            assert len(ours) == len(stock), what
            for index, pair in enumerate(zip(ours, stock, strict=True)):
                self.same(*pair, f"{what}[{index}]", limit, scale)
        elif isinstance(ours, (str, int, float, bool, type(None))):
            assert ours == stock, f"{what}: {ours}, stock {stock}"

    @property
    def tolerance(self) -> float:
        """The tolerance of the coarsest dtype that is in the models or in autocast."""
        dtypes = {p.dtype for p in self.ours.parameters() if p.is_floating_point()} | {self.autocast}
        return max(RELATIVE[dtype] for dtype in dtypes if dtype is not None)

    # -- state ----------------------------------------------------------------------------------------

    def configs(self, values: dict) -> tuple[LoraConfig, LoraConfig]:
        """Ours and the twin's: plain LoRA where stock alone refuses MiCA."""
        theirs = dict(values)
        if mica.fast.is_enabled() and "target_parameters" in values and values["init_lora_weights"] == "mica":
            theirs["init_lora_weights"] = True
        return LoraConfig(**values), LoraConfig(**theirs)

    @property
    def is_mixture(self) -> bool:
        return self.kind in MIXTURES

    @property
    def adapters(self) -> list[str]:
        return list(self.ours.peft_config)

    @property
    def is_merged(self) -> bool:
        return any(layer.merged for layer in layers(self.ours).values())

    def is_merged_adapter(self, name: str) -> bool:
        return any(name in layer.merged_adapters for layer in layers(self.ours).values())

    @property
    def has_dropout(self) -> bool:
        dropouts = (module for module in self.ours.modules() if isinstance(module, nn.Dropout))
        return any(module.training and module.p > 0 for module in dropouts)

    def adopt(self, adapter: str, is_mica: bool, seed: int, randomise: bool = True) -> None:
        """A new adapter: its B is judged, its A gets values (A = 0 hides everything), the twin gets both."""
        generator = torch.Generator().manual_seed(seed)
        take_for_mica(adapter, self.stock, self.ours)
        twins = layers(self.stock)
        for name, layer in layers(self.ours).items():
            ours, stock = factors(layer, adapter), factors(twins[name], adapter)
            assert (ours is None) == (stock is None), f"{name}: adapter {adapter} on one model only"
            if ours is None:
                continue
            of_ours = is_mica and randomise and mica.fast.is_enabled()
            if of_ours and getattr(layer.get_base_layer(), weight_name(layer)).dtype == torch.float32:
                judge(name, layer, adapter)
            with torch.no_grad():
                if randomise:
                    for factor in ours[: 1 if is_mica else 2]:
                        factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
                for mine, other in zip(ours, stock, strict=True):
                    assert mine.dtype == other.dtype, f"{name}: {mine.dtype}, stock {other.dtype}"
                    other.copy_(mine)
                    # stock may have made these anew, and so trainable: over 16 bits, or from such a file
                    if adapter in layer.lora_embedding_A:
                        other.requires_grad_(mine.requires_grad)
            if is_mica and mica.fast.is_enabled():
                assert not ours[1].requires_grad, f"{name}: B of {adapter} is trainable"
        if self.edited:
            self._take_over_copies(adapter)
        self.remember_bases(adapter)

    @torch.no_grad()
    def _take_over_copies(self, adapter: str) -> None:
        """Those of a base that the twin has unmerged by other values, as an output layer that shares the
        embedding's weight is copied (`modules_to_save`) once that has been unmerged."""
        ours = dict(self.ours.named_parameters())
        for name, other in self.stock.named_parameters():
            if f".modules_to_save.{adapter}." in name:
                other.copy_(ours[name])

    def remember_bases(self, *adapters: str) -> None:
        """What B is from now on, bit for bit."""
        for name, layer in layers(self.ours).items():
            for adapter in adapters or self.adapters:
                self.frozen.pop((name, adapter), None)
                pair = factors(layer, adapter)
                if pair is not None and adapter in layer.lora_variant:
                    self.frozen[name, adapter] = pair[1].detach().clone()

    @property
    def base_parameters(self) -> dict[str, Tensor]:
        return self.base_parameters_of(self.ours)

    @staticmethod
    def base_parameters_of(model: nn.Module) -> dict[str, Tensor]:
        """By the names that they have in the base model, which a new wrapper changes."""
        parameters = model.named_parameters()
        wrapped = re.compile(r"\.(base_layer|original_module)\b")
        return {wrapped.sub("", name): p.detach() for name, p in parameters if is_base(name)}

    def remember_base(self) -> None:
        self.base = {name: parameter.clone() for name, parameter in self.base_parameters.items()}

    def remember_biases(self) -> None:
        """A file may have some; merging leaves them alone."""
        for name, parameter in self.base_parameters.items():
            if name in self.base and name.endswith("bias"):
                self.base[name] = parameter.clone()

    def compare(self) -> None:
        """Everything that both models hold; then the twin takes over the backend's values."""
        # once, not for each tensor: each walks through all modules, which took a third of the time
        limit, is_merged, own = WEIGHTS * self.tolerance, self.is_merged, layers(self.ours)
        ours, stock = dict(self.ours.named_parameters()), dict(self.stock.named_parameters())
        assert ours.keys() == stock.keys(), ours.keys() ^ stock.keys()
        for name, parameter in ours.items():
            other = stock[name]
            assert parameter.dtype == other.dtype, f"{name}: {parameter.dtype}, stock {other.dtype}"
            trained = parameter.requires_grad, other.requires_grad
            assert trained[0] == trained[1], f"{name}: requires_grad {trained[0]}, stock {trained[1]}"
            assert (parameter.grad is None) == (other.grad is None), f"{name}: only one has a gradient"
            if not (self.edited and is_base(name)):
                # stock rounds what it merges and unmerges within autocast, and twice what it has unmerged
                is_rounded = is_base(name) and (self.autocast or not is_merged)
                self.same(parameter.detach(), other.detach(), name, 4 * limit if is_rounded else limit)
        assert self.ours.state_dict().keys() == self.stock.state_dict().keys()
        self.same(attributes(self.ours), attributes(self.stock), "attributes")
        for (name, adapter), before in self.frozen.items():
            pair = factors(own[name], adapter)
            if pair is not None and not pair[1].requires_grad:
                assert torch.equal(pair[1], before), f"{name}: B of {adapter} has changed"
        if not is_merged:
            self._compare_base()
        self.synchronise()

    def _compare_base(self) -> None:
        if self.exact and self.base:
            for name, weight in self.base_parameters.items():
                assert torch.equal(weight, self.base[name]), f"{name}: not the weight from before merging"
        elif self.base and not (self.is_lost and self.edited):  # plain LoRA is unmerged by its present values
            limit = OUTPUTS * self.tolerance
            for name, weight in self.base_parameters.items():
                self.same(weight, self.base[name].to(weight), name, limit)
        self.exact, self.edited, self.is_lost = True, False, False
        self.remember_base()

    def synchronise(self) -> None:
        with torch.no_grad():
            ours = dict(self.ours.named_parameters())  # their order differs: PEFT registers stacks anew
            for name, other in self.stock.named_parameters():
                other.data.copy_(ours[name])

    # -- calls ----------------------------------------------------------------------------------------

    def casting(self):
        return torch.autocast("cpu", self.autocast) if self.autocast else nullcontext()

    def call(self, model: nn.Module, ids: Tensor, **kwargs) -> Tensor:
        with self.casting():
            return run(model, self.form, ids, **kwargs)

    def probe(self, gradients: bool, size: int = 2, length: int = 5) -> None:
        """Output, and gradients of all that is trained; and which operators ran, against `explain`."""
        # stock unmerges in such a forward, with a graph, and a checkpoint's recomputation then differs
        gradients &= not any(layer.merged and layer.disable_adapters for layer in layers(self.ours).values())
        ids = tokens(size, length, self.seed)
        calls: dict[str, int] = {}
        hooks = [
            layer.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
            for name, layer in layers(self.stock).items()
        ]
        counted: dict[str, int] = {}

        def forward(model):
            before = mica.fast.call_counts.copy()
            with torch.enable_grad() if gradients else torch.no_grad():
                out = self.call(model, ids)
            if model is self.ours:
                counted.update(whatever_language(mica.fast.call_counts - before))
            for hook in hooks if model is self.stock else ():
                hook.remove()  # a recomputation in the backward is none of the forward's calls
            return out

        def step(model):
            out = forward(model)
            model.zero_grad(set_to_none=True)
            if gradients and out.requires_grad:
                out.float().square().sum().backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            model.zero_grad(set_to_none=True)
            return out.detach(), grads

        try:
            worked = self.compare_steps(step)
        finally:
            for hook in hooks:
                hook.remove()
        if worked:
            check_counts(self.ours, calls, counted, self.autocast)

    def compare_steps(self, step: Callable[[nn.Module], tuple[Tensor, dict[str, Tensor]]]) -> bool:
        """Outputs and gradients of one step on both; gradients count against the largest. False on errors."""
        ours, stock, exact = {}, {}, {}

        def keeping(model):
            out, grads = step(model)
            kept = ours if model is self.ours else stock if model is self.stock else exact
            kept.update({name: grad.clone() for name, grad in grads.items()})
            return None if self.has_dropout else out

        def oracle(change):
            self._of_a_copy(keeping, change)
            return dict(exact)

        if self.each(keeping).error is not None:
            return False
        assert ours.keys() == stock.keys(), f"gradients of {ours.keys() ^ stock.keys()} on one model only"
        if not self.has_dropout and stock:
            scale = 0.1 * max(grad.norm().item() for grad in stock.values())
            limit = GRADIENTS * self.tolerance
            self._same_by_oracle(ours, stock, oracle, what="gradient of", limit=limit, scale=scale)
        return True
