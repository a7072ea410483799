"""That a call which raised has left a model as it was."""

from contextlib import contextmanager

import torch


@contextmanager
def unchanged(model):
    """After the block its modules are of the same types, and its tensors have the same bits and flags."""
    before = _state(model)
    yield
    after = _state(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    for name, bits in after[0].items():
        assert torch.equal(bits, before[0][name]), name


def _state(model):
    """Bits of the tensors, or of this process's parts; those of quantised weights are left out."""
    tensors = {name: t.to_local() if hasattr(t, "to_local") else t for name, t in model.state_dict().items()}
    bits = {
        name: tensor.detach().clone().reshape(-1).view(torch.uint8)
        for name, tensor in tensors.items()
        if type(tensor) is torch.Tensor and not tensor.is_meta
    }
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return bits, flags, [(name, type(module)) for name, module in model.named_modules()]
