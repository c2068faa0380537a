"""How many bytes autograd keeps from the forward for the backward: what decides the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

EXPLANATION = "what autograd keeps from forward to backward: each storage once, parameters and buffers not counted"


def saved_bytes(forward: Callable[[], object], own: Iterable[Tensor] = ()) -> int:
    """Bytes of the storages that autograd saves in `forward`, each counted once.

    Args:
        forward: runs the forward and returns something that holds its graph.
        own: tensors that exist anyway, parameters and buffers: what shares a storage with them is not counted.
    """
    owned = {tensor.untyped_storage().data_ptr() for tensor in own}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        graph = forward()  # alive, so that no two storages are at the same place
    total = sum(sizes.values())
    del graph
    return total
