"""A plain function on each of a stack of values: factor rows, sampled paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from rvconvert.errors import ConversionError

__all__ = ["on_each"]


def on_each(function: Callable[..., Any], stacks: Sequence[Tensor]) -> Any:
    """``function`` along the first dimension of ``stacks``: vectorised, or one by one where torch cannot.

    Returns what ``function`` returns, every tensor in it stacked along a new first dimension.

    Raises:
        ConversionError: ``function`` returns something other than a tensor that differs along the stack.
    """
    try:
        return torch.vmap(function, randomness="different")(*stacks)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        results = [function(*each) for each in zip(*(s.unbind(0) for s in stacks), strict=True)]  # a real error comes again
    leaves, structure = zip(*(_pytree.tree_flatten(each) for each in results), strict=True)
    joined = []
    for values in zip(*leaves, strict=True):
        if isinstance(values[0], Tensor):
            joined.append(torch.stack(values))
        elif all(each == values[0] for each in values):
            joined.append(values[0])
        else:
            raise ConversionError(f"an operation gave {values[0]!r} on one path, {values[-1]!r} on another: not tensors")
    return _pytree.tree_unflatten(joined, structure[0])
