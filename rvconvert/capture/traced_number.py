"""Numbers that remember the graph node they came from, so that sizes are not baked into a recording.

Once the recording is done they are plain numbers: what a model keeps by size, in a cache, may keep some of them.
"""

from __future__ import annotations

import contextlib
import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["TracedFloat", "TracedInt", "ignored", "is_traced_now", "traced_size", "tracing", "untraced"]

_graphs: list[fx.Graph] = []  # under way, the innermost last


@contextlib.contextmanager
def tracing(graph: fx.Graph) -> Iterator[None]:
    """Within: the numbers of ``graph``, and of no other, are more than plain ones."""
    _graphs.append(graph)
    try:
        yield
    finally:
        _graphs.remove(graph)


def is_traced_now(value: Any) -> bool:
    """A number of the recording that is under way."""
    return isinstance(value, _Traced) and bool(_graphs) and value.node.graph is _graphs[-1]


def ignored(name: str) -> None:
    """What is told of a size that may be fixed."""


class _Traced:
    """Arithmetic makes a new node; whatever fixes the value (a branch, a loop) is reported to the recorder."""

    node: fx.Node
    fixed: Callable[[str], None]  # told where Python fixes the value


class TracedInt(_Traced, int):
    """A size, or an int made of sizes."""

    def __new__(cls, value: Any, node: fx.Node | None = None, fixed: Callable[[str], None] = ignored) -> Any:
        if node is None:  # type(x)(...), of Python's own functions
            return int(value)
        made = super().__new__(cls, value)
        made.node = node
        made.fixed = fixed
        return made

    def __reduce__(self) -> Any:
        return (int, (untraced(self),))

    def __deepcopy__(self, memo: Any) -> int:
        return untraced(self)


class TracedFloat(_Traced, float):
    """A float made of sizes, or read from a tensor that only reports it."""

    def __new__(cls, value: Any, node: fx.Node | None = None, fixed: Callable[[str], None] = ignored) -> Any:
        if node is None:  # type(x)(...), of Python's own functions
            return float(value)
        made = super().__new__(cls, value)
        made.node = node
        made.fixed = fixed
        return made

    def __reduce__(self) -> Any:
        return (float, (untraced(self),))

    def __deepcopy__(self, memo: Any) -> float:
        return untraced(self)


def untraced(value: Any) -> Any:
    """The plain number behind a traced one; anything else as it is."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


def _traced(value: Any, node: fx.Node, fixed: Callable[[str], None]) -> Any:
    if type(value) is int:
        return TracedInt(value, node, fixed)
    if type(value) is float:
        return TracedFloat(value, node, fixed)
    if type(value) is complex:  # a root of a number that is heard as a negative one
        return TracedFloat(math.nan, node, fixed)
    return value


def _both(first: Callable[[str], None], second: Callable[[str], None]) -> Callable[[str], None]:
    def fixed(name: str) -> None:
        first(name)
        second(name)

    return first if first == second else fixed


def _arithmetic(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        if not all(isinstance(x, (int, float)) for x in others) or any(type(x) is bool for x in others):
            return NotImplemented
        others = tuple(float(x) if isinstance(x, np.floating) else x for x in others)  # np.float64 is a float
        operands = (*others, self) if reflected else (self, *others)
        value = function(*map(untraced, operands))
        live = [x for x in operands if is_traced_now(x)]
        if not live:
            return value
        node = live[0].node.graph.call_function(function, tuple(x.node if is_traced_now(x) else untraced(x) for x in operands))
        watched = [x.fixed for x in live if x.fixed is not ignored]
        return _traced(value, node, _both(*watched) if len(watched) > 1 else watched[0] if watched else ignored)

    return method


def _fixing(name: str, base: type) -> Callable[..., Any]:
    plain = getattr(base, name)

    def method(self: Any, *others: Any) -> Any:
        of_text = name in ("__eq__", "__ne__", "__hash__") and any(isinstance(x, str) for x in others)
        if not of_text and is_traced_now(self):
            self.fixed(name)
        return plain(untraced(self), *map(untraced, others))

    return method


for _cls, _base in ((TracedInt, int), (TracedFloat, float)):
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        setattr(_cls, f"__{_name}__", _arithmetic(getattr(operator, _name), reflected=False))
        setattr(_cls, f"__r{_name}__", _arithmetic(getattr(operator, _name), reflected=True))
    for _name, _function in (("neg", operator.neg), ("abs", operator.abs), ("round", round)):
        setattr(_cls, f"__{_name}__", _arithmetic(_function, reflected=False))
    for _name in ("__bool__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__int__", "__float__"):
        setattr(_cls, _name, _fixing(_name, _base))
    for _name in (
        "__floor__",
        "__ceil__",
        "__trunc__",
        "__divmod__",
        "__rdivmod__",
        "is_integer",
        "as_integer_ratio",
    ):
        if hasattr(_base, _name):
            setattr(_cls, _name, _fixing(_name, _base))
for _name in ("__format__", "__str__", "__repr__"):  # a text of a size is that of a message, as a rule
    setattr(TracedFloat, _name, _fixing(_name, float))
setattr(TracedInt, "__index__", _fixing("__index__", int))  # noqa: B010 - set beside its twins above


def traced_size(size: torch.Size, make: Callable[[int, int], TracedInt]) -> torch.Size:
    """A ``torch.Size`` whose entries are traced; ``make(dim, value)`` makes each."""
    return torch.Size([make(dim, value) for dim, value in enumerate(size)])
