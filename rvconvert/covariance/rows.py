"""Where the rows of a batch lie in a tensor of paths, and whether an operation lets them meet.

Nodes that are the same for every row serve as long as rows do not meet: a result of two rows would see their noises as one.
Where they do (a set, a graph, attention over the batch), each row's pairs are put in an order of its own, half of them turned
round, by the same fixed draw wherever that row goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Rows", "moved", "reordered", "still"]


@dataclass(frozen=True)
class Rows:
    """The row that each index along one dimension belongs to.

    Attributes:
        dim: that dimension, counted from the last (-1).
        of: (size of dim,) numbers of rows.
        count: how many rows there are.
    """

    dim: int
    of: tuple[int, ...]
    count: int

    @classmethod
    def first(cls, shape: Sequence[int]) -> Rows | None:
        """Rows along the first dimension; None where there is one row or none."""
        return cls(-len(shape), tuple(range(shape[0])), shape[0]) if len(shape) > 1 and shape[0] > 1 else None

    def fits(self, shape: Sequence[int]) -> bool:
        """True where a tensor of this shape may have its rows there."""
        return len(shape) >= -self.dim and shape[self.dim] == len(self.of)

    def kept(self, ndim: int, shape: Sequence[int]) -> Rows | None:
        """Where they may be in a result of this shape, made of a tensor of ``ndim`` dimensions; None if nowhere."""
        for dim in (ndim + self.dim - len(shape), self.dim):  # dims behind them reduced, or dims before them added
            moved = Rows(dim, self.of, self.count)
            if dim < 0 and moved.fits(shape):
                return moved
        return None

    def along(self, values: Tensor, ndim: int) -> Tensor:
        """``values``, whose last dimension is the rows', shaped to broadcast with tensors of ``ndim`` dimensions."""
        return values.reshape(*values.shape[:-1], *(1,) * (ndim + self.dim), -1, *(1,) * (-self.dim - 1))


def moved(rows: Rows, shape: Sequence[int], move: Callable[[Tensor], Any]) -> list[Rows | None]:
    """Where rows are after an operation that only moves elements: of each tensor in its result."""
    numbers = rows.along(torch.tensor(rows.of, dtype=torch.float64), len(shape)).expand(tuple(shape))
    result = move(numbers)
    parts = result if isinstance(result, (list, tuple)) else [result]
    # A cast moves nothing, and a bool is no row's number.
    parts = [numbers if each.dtype != numbers.dtype and each.shape == numbers.shape else each for each in parts]
    return [_found(each, rows.count) if each.dtype == numbers.dtype else None for each in parts]


def _found(numbers: Tensor, count: int) -> Rows | None:
    for dim in range(numbers.ndim):
        line = numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim]) if numbers.numel() else numbers.reshape(0, 0)
        if len(line) and numbers.shape[dim] > 1 and bool((line == line[:1]).all()):
            whole = bool(((line[0] >= 0) & (line[0] < count)).all())  # what is filled in or padded is of no row
            return Rows(dim - numbers.ndim, tuple(map(int, line[0].tolist())), count) if whole else None
    return None


def still(
    rows: Rows, function: Callable[..., Any], values: Sequence[Tensor], others: Sequence[Tensor], result: Tensor
) -> Rows | None:
    """Where the rows are in the result of ``function``; None where they meet in it.

    They do where a row of the result changes when other rows are given other values. ``values`` are one path, of which
    ``result`` is what the function gave, and ``others`` another path.
    """
    after = rows.kept(values[0].ndim, result.shape)
    if after is None:
        return None
    generator = torch.Generator().manual_seed(0)
    changed = torch.rand(rows.count, generator=generator) < 0.5
    changed[torch.randint(rows.count, (1,), generator=generator)] = True
    kept = int(torch.randint(rows.count, (1,), generator=generator))
    changed[kept] = False
    which = changed[list(rows.of)].to(values[0].device)
    mixed = [
        torch.where(rows.along(which, v.ndim), o, v) if rows.fits(v.shape) else v for v, o in zip(values, others, strict=True)
    ]
    again = function(*mixed)
    result = result.detach()
    largest = float(result.nan_to_num(0, 0, 0).abs().max()) if result.is_floating_point() and result.numel() else 0.0
    same = torch.isclose(again, result, rtol=1e-3, atol=1e-5 * largest, equal_nan=True)
    return after if bool((same | after.along(which, result.ndim)).all()) else None


def reordered(paths: Tensor, rows: Rows, base: int) -> Tensor:
    """(2n, *shape): the paths with each row's pairs in an order of its own, within blocks of ``base`` pairs."""
    order, turned = [x.to(paths.device) for x in _orders(base, rows.count)]
    pairs = len(paths) // 2
    block = torch.arange(pairs, device=paths.device).unsqueeze(1) // base * base
    pair = block + order.repeat(pairs // base, 1)
    other = turned.repeat(pairs // base, 1)
    index = torch.cat((pair + pairs * other, pair + pairs * ~other))[:, list(rows.of)]
    return paths.gather(0, rows.along(index, paths.ndim - 1).expand_as(paths))


@torch.compiler.assume_constant_result
def _orders(base: int, count: int) -> tuple[Tensor, Tensor]:
    """(base, count) each: for every row an order of its pairs, and which of them are turned round."""
    return _kept_orders(base, count)


@lru_cache(maxsize=16)
def _kept_orders(base: int, count: int) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # what is kept must serve everywhere
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(base, count, generator=generator).argsort(0)
        return order, torch.rand(base, count, generator=generator) < 0.5
