"""What variables know of each other: the same one, a copy, a transpose, a reduction of its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rvconvert.core.random_variable import RandomVariable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_KEEP_ORDER = frozenset("view view_as reshape reshape_as unsqueeze".split())
_SPREAD = frozenset("expand expand_as broadcast_to".split())


def is_same(a: Any, b: RandomVariable) -> bool:
    """True where ``a`` is the variable ``b``, a snapshot of it or what was selected of one variable in the same way."""
    return isinstance(a, RandomVariable) and a.key == b.key


def copied(x: RandomVariable) -> Iterator[RandomVariable]:
    """The variable, and those that it is a copy of, nearest first."""
    yield x
    while x.origin is not None and x.origin.line == (1.0, 0.0):
        x = x.origin.parent
        yield x


def transposes(a: RandomVariable, b: RandomVariable) -> bool:
    """True where the matrices ``a`` are known to be the transposes of ``b``."""
    turned = [x.transposed for x in copied(a) if x.transposed is not None]
    return any(is_same(x, y) for each in turned for x in copied(each) for y in copied(b))


class OfRows(NamedTuple):
    """Carried by what reduces a variable over one dimension, and by the variable ``shifted`` by that."""

    of: RandomVariable
    dim: int
    by: str
    shifted: bool = False

    @property
    def kept(self) -> torch.Size:
        """The shape in which the reduction broadcasts against the variable."""
        shape = list(self.of.shape)
        shape[self.dim] = 1
        return torch.Size(shape)


def reducing(made: RandomVariable, x: RandomVariable, dim: Any, by: str) -> RandomVariable:
    """``made``, which knows that it is ``x`` reduced over ``dim``, if that is one dimension."""
    dims = dim if isinstance(dim, (list, tuple)) else (dim,)
    one = len(dims) == 1 and isinstance(dims[0], int) and x.ndim > 0
    return made.carrying(OfRows(x.snapshot(), dims[0] % x.ndim, by)) if one else made


def rows_of(x: Any, by: str | None = None) -> OfRows | None:
    """What ``x``, or what it is a copy of, is a reduction of, in a shape that meets that element by element."""
    if not isinstance(x, RandomVariable):
        return None
    found = next((each.carried for each in copied(x) if isinstance(each.carried, OfRows)), None)
    if found is None or by not in (None, found.by):
        return None
    return found if found.shifted or x.shape in (found.kept, found.of.shape) else None


def rows_moved(made: RandomVariable, x: RandomVariable, func: Callable[..., Any], args: tuple[Any, ...]) -> RandomVariable:
    """``made``, a view of a reduction ``x``, which is a reduction still where its dimension is put back or spread."""
    rows, name = x.carried, getattr(func, "__name__", "")
    if not isinstance(rows, OfRows) or rows.shifted:
        return made
    inserts = name in _KEEP_ORDER or (name in ("__getitem__", "getitem") and _inserts(args[1]))
    put_back = inserts and made.shape == rows.kept and made.numel() == x.numel()
    spread = name in _SPREAD and x.shape == rows.kept and made.shape == rows.of.shape
    return made.carrying(rows) if put_back or spread else made


def _inserts(index: Any) -> bool:
    """True for an index that takes all there is: ``[:, None]``."""
    return all(each is None or each is ... or each == slice(None) for each in (index if isinstance(index, tuple) else (index,)))
