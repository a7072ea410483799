"""That a call which raised has left a model as it was."""

import torch


def snapshot(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return state, flags, [(name, type(m)) for name, m in model.named_modules()]


def assert_unchanged(model, before):
    state, flags, modules = snapshot(model)
    assert (flags, modules) == before[1:]
    assert state.keys() == before[0].keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[0][name]), name
