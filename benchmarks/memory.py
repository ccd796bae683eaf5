"""What a training step keeps in memory for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept_for_backward(run: Callable[[], Tensor]) -> float:
    """Bytes of the tensors that ``run`` saves for its backward pass, each storage once."""
    kept: dict[int, int] = {}
    held = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(t)  # so that no address is given out twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    del loss
    return float(sum(kept.values()))
