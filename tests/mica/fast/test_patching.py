"""The patches of PEFT: put on, switched, and taken off again to the object."""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mica.fast
from mica.fast import known_peft, patching
from mica.fast.settings import settings
from tests.support.models import Net, bases, net, wrap
from tests.support.processes import printed_by
from tests.support.stock import uninstalled


def attributes():
    return [vars(known_peft.find(p.owner)).get(p.name) for p in patching.PATCHES]


def test_uninstall_gives_back_the_same_objects():
    patched = attributes()
    mica.fast.uninstall()
    stock = attributes()
    assert not mica.fast.is_enabled()
    assert all(a is not b for a, b in zip(patched, stock, strict=True))
    mica.fast.enable()
    assert mica.fast.is_enabled()
    mica.fast.uninstall()
    assert all(a is b for a, b in zip(attributes(), stock, strict=True))
    mica.fast.uninstall()  # twice is harmless


STOCK = """
import sys, torch, warnings; warnings.simplefilter('ignore')
sys.modules['mica'] = None
from torch import nn
from peft import LoraConfig, get_peft_model
torch.manual_seed(0); model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 8))
config = LoraConfig(r=4, init_lora_weights='mica', target_modules=['0', '1'])
model = get_peft_model(model, config)
torch.manual_seed(1)
[p.data.copy_(torch.randn(p.shape)) for n, p in model.named_parameters() if 'lora_A' in n]
x = torch.randn(3, 12, requires_grad=True); model(x).square().sum().backward()
tensors = [p.grad for p in model.parameters() if p.grad is not None] + [x.grad]
tensors += [p.detach() for p in model.parameters()]
"""
ANOTHER_PEFT = """
torch.save(tensors, sys.argv[1])
del sys.modules['mica']
from peft.tuners.lora import variants; del variants.MiCALinearVariant
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always'); import mica.fast
print(mica.fast.is_enabled(), [str(w.message) for w in caught if 'leaves PEFT' in str(w.message)])
"""


@pytest.mark.slow
def test_uninstalled_is_stock_to_the_bit(tmp_path):
    """Against a process that never imported mica; which can be imported there although PEFT is another."""
    printed = printed_by(STOCK + ANOTHER_PEFT, tmp_path / "stock")
    namespace = {}
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "mica"}
    with uninstalled():
        exec(STOCK, namespace)
        sys.modules.update(modules)
    for theirs, ours in zip(torch.load(tmp_path / "stock"), namespace["tensors"], strict=True):
        assert torch.equal(theirs, ours)
    assert printed.startswith("False ['mica.fast leaves PEFT")
    assert "MiCALinearVariant.merge_safe is not there" in printed


def test_enable_disable_and_the_context_manager():
    assert mica.fast.is_enabled()
    with mica.fast.disabled():
        assert not mica.fast.is_enabled()
        with mica.fast.disabled():
            pass
        assert not mica.fast.is_enabled()
    assert mica.fast.is_enabled()
    mica.fast.disable()
    with mica.fast.disabled():
        pass
    assert not mica.fast.is_enabled()  # as it was
    mica.fast.enable()
    with pytest.raises(RuntimeError), mica.fast.disabled():
        raise RuntimeError
    assert mica.fast.is_enabled()
    with mica.fast.disabled():
        mica.fast.disable()  # says what holds after the block
    assert not mica.fast.is_enabled()
    with mica.fast.disabled():
        mica.fast.enable(compute_dtype=torch.float32)
        assert not mica.fast.is_enabled()
    assert mica.fast.is_enabled()
    assert settings.compute_dtype == torch.float32


def test_disabled_in_several_threads():
    """Off as long as one of them is inside, wherever the block was left first; then on again."""
    entered, leave = threading.Barrier(2), threading.Event()

    def wait():
        with mica.fast.disabled():
            entered.wait()
            leave.wait()

    def work(_):
        for _ in range(200):
            with mica.fast.disabled():
                assert not mica.fast.is_enabled()

    with ThreadPoolExecutor(4) as pool:
        waiting = pool.submit(wait)
        with mica.fast.disabled():
            entered.wait()
        assert not mica.fast.is_enabled()  # the other is still inside
        with mica.fast.disabled():
            leave.set()
            waiting.result()
            assert not mica.fast.is_enabled()
        assert mica.fast.is_enabled()
        list(pool.map(work, range(4)))
    assert mica.fast.is_enabled()


def test_disabled_holds_for_the_recomputation_in_another_thread():
    """PyTorch recomputes a checkpointed forward in a thread of its device."""
    model = net()
    with mica.fast.disabled():
        before = mica.fast.call_counts.copy()
        out = checkpoint(model.base_model.model, torch.arange(5), use_reentrant=False)
        thread = threading.Thread(target=out.sum().backward)
        thread.start()
        thread.join()
    assert mica.fast.call_counts == before
    assert model.base_model.model.up.lora_A["default"].weight.grad is not None


def test_settings_are_checked_before_any_changes():
    mica.fast.enable(compute_dtype=torch.float32, recompute="activations")
    for name, wrong in (
        ("compute_dtype", torch.int8),
        ("compute_dtype", "float32"),
        ("recompute", "ignore"),
        ("lora", 2),
    ):
        with pytest.raises(ValueError, match=rf"^{name} must be one of \(.*\), but it is '?{wrong}"):
            mica.fast.enable(**{name: wrong})
    for wrong in ("tpu?", 1.5, None):
        with pytest.raises(ValueError, match=r"^device must be 'auto' or a torch device, but it is"):
            mica.fast.enable(device=wrong)
    for absent in ("cuda:7", torch.device("cuda", 99), "cpu:1", "xla", "meta"):
        with pytest.raises(
            ValueError, match=rf"^device must be .*, but it is '{absent}', and PyTorch sees \d"
        ):
            mica.fast.enable(device=absent)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'compute'"):
        mica.fast.enable(compute=None)
    assert (settings.compute_dtype, settings.recompute) == (torch.float32, "activations")
    mica.fast.enable(recompute="norms")  # changes nothing else
    assert (settings.compute_dtype, settings.recompute) == (torch.float32, "norms")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": "self something_else"}, r"inject_adapter takes \(self model adapter_name"),
        ({"name": "inject"}, "LoraModel.inject is not there"),
        ({"owner": "peft.tuners.lora.nowhere"}, "nowhere.inject_adapter is not there"),
    ],
)
def test_another_peft_is_left_alone_with_a_warning(monkeypatch, change, message):
    mica.fast.uninstall()
    stock = attributes()
    patched, _ = (patch for patch in patching.PATCHES if patch.name == "inject_adapter")
    others = [patch for patch in patching.PATCHES if patch is not patched]
    with monkeypatch.context() as patch:
        patch.setattr(patching, "PATCHES", (*others, patched._replace(**change)))
        with pytest.warns(UserWarning, match=rf"leaves PEFT {peft.__version__} as it is.*{message}"):
            mica.fast.enable()
    assert not mica.fast.is_enabled()
    assert all(a is b for a, b in zip(attributes(), stock, strict=True))
    bases(wrap(Net()))  # and PEFT works


def test_optional_functions_may_be_missing(monkeypatch):
    mica.fast.uninstall()
    patches = [p if p.required else p._replace(name="nothing") for p in patching.PATCHES]
    assert patches != list(patching.PATCHES)
    monkeypatch.setattr(patching, "PATCHES", tuple(patches))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mica.fast.enable()
    assert mica.fast.is_enabled()
    mica.fast.uninstall()
