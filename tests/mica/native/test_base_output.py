"""Whose memory a base layer returns: the update is added there only where it is nobody else's."""

import numpy as np
import pytest
import torch

from tests.support.layer_changes import layer_of
from tests.support.tolerances import RELATIVE, error

FEATURES = 20  # of one token: an output of more would be a view, and its base one more user of the memory


def _from_numpy(y, _):
    buffer = y.numpy().copy()
    return torch.from_numpy(buffer), buffer


def _by_dlpack(y, _):
    owner = y.clone()
    return torch.from_dlpack(torch.utils.dlpack.to_dlpack(owner)), owner


def _from_buffer(y, _):
    buffer = bytearray(y.numpy().tobytes())
    return torch.frombuffer(buffer, dtype=y.dtype), buffer


def _mapped(y, path):
    """Another process would map the file as the second tensor does."""
    y.numpy().tofile(path)
    return tuple(torch.from_file(str(path), shared=True, size=FEATURES) for _ in range(2))


def _shared(y, _):
    """`share_memory_` gives a tensor memory that other processes may have."""
    return y.clone().share_memory_(), None


def _held(y, _):
    return y, y


def _another_s_storage(y, _):
    storage = y.untyped_storage()
    return y.new_empty(0).set_(storage, 0, y.shape), storage


OWNERS = {
    "NumPy": _from_numpy,
    "DLPack": _by_dlpack,
    "a buffer of Python": _from_buffer,
    "a file": _mapped,
    "other processes": _shared,
    "whoever holds the tensor": _held,
    "whoever holds its storage": _another_s_storage,
    "nobody else": lambda y, _: (y.clone(), None),
}


def _bytes(owner):
    if isinstance(owner, torch.UntypedStorage):
        owner = torch.tensor([], dtype=torch.uint8).set_(owner)
    return np.asarray(owner).tobytes()


@pytest.mark.parametrize("has_gradients", [True, False])
@pytest.mark.parametrize("name", OWNERS)
def test_nobody_else_s_memory_is_written(name, has_gradients, tmp_path):
    layer, x = layer_of(), torch.randn(12)
    expected = layer(x).detach()
    base = layer.base_layer(x).detach()
    owners, addresses = [], []

    def forward(_):
        y, owner = OWNERS[name](base.clone(), tmp_path / "y")
        owners.append(owner)
        addresses.append(y.data_ptr())
        return y

    layer.base_layer.forward = forward
    with torch.set_grad_enabled(has_gradients):
        found = layer(x)
    assert error(found, expected) <= RELATIVE[torch.float32]
    (owner,), (address,) = owners, addresses
    assert (found.data_ptr() == address) == (name == "nobody else")
    if name not in ("nobody else", "other processes"):
        assert _bytes(owner) == _bytes(base)
