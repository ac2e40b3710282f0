"""What a chunk needs on the device is copied there at once."""

from __future__ import annotations

import numpy as np
import torch

from comet_megatron.model.chunk_tensors import _on_device

ARRAYS = {
    "ids": np.arange(12, dtype=np.int64).reshape(2, 6),
    "none": np.zeros(0, dtype=np.int64),
    "labels": np.arange(5, dtype=np.int64).reshape(5, 1)[::2],
}


class OneCopy(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the copies that are made."""

    copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.copies += function.overloadpacket is torch.ops.aten._to_copy
        return function(*args, **(kwargs or {}))


def test_arrays_keep_names_shapes_and_values():
    found = _on_device(ARRAYS, torch.device("cpu"))
    assert list(found) == list(ARRAYS)
    assert all(np.array_equal(found[name].numpy(), array) for name, array in ARRAYS.items())


def test_another_device_gets_one_copy_with_the_same_parts(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    with OneCopy() as mode:
        found = _on_device(ARRAYS, torch.device("meta"))
    assert mode.copies == 1
    assert {name: tuple(t.shape) for name, t in found.items()} == {n: a.shape for n, a in ARRAYS.items()}
