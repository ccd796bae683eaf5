"""Of which earlier variable a value is a function, what function, and where its values lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rvconvert.core.random_variable import Origin, RandomVariable
from rvconvert.rules.calls import Function, substitute, unique
from rvconvert.rules.density import moments_under

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

Interval = tuple[float, float]
ANYWHERE: Interval = (-math.inf, math.inf)


def interval_of(value: Any) -> Interval:
    """Where a number is, and where the values of a random variable lie, as far as that is known."""
    if isinstance(value, RandomVariable):
        return ANYWHERE if value.origin is None else value.origin.interval
    return (float(value), float(value)) if isinstance(value, (int, float)) else ANYWHERE


def anywhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """Nothing is known of where the values lie."""
    return ANYWHERE


def everywhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The function is defined on the whole line, whatever its arguments."""
    return True


def not_everywhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The function is defined on a part of the line: a logarithm, a root."""
    return False


Line = tuple[float, float]


class Ancestor(NamedTuple):
    """A variable that another one is an elementwise function of, and the function; see ``Origin``."""

    variable: RandomVariable
    function: Function
    kinks: tuple[float, ...]
    whole_line: bool
    line: Line | None
    key: Hashable | None


def ancestors(x: RandomVariable) -> Iterator[Ancestor]:
    """Each variable that ``x`` is an elementwise function of, nearest first.

    Kinks of a later function are known on the axis of an earlier variable where lines alone lie between.
    """
    found = Ancestor(x, identity, (), True, (1.0, 0.0), ())
    yield found
    origin = x.origin
    while origin is not None:
        slope, shift = origin.line or (0.0, 0.0)
        line = found.line
        found = Ancestor(
            origin.parent,
            followed_by(origin.function, found.function),
            (*origin.kinks, *((k - shift) / slope for k in found.kinks if slope)),
            found.whole_line and origin.whole_line,
            (line[0] * slope, line[0] * shift + line[1]) if line and origin.line else None,
            None if origin.key is None or found.key is None else (origin.key, found.key),
        )
        yield found
        origin = origin.parent.origin


def gaussian_ancestor(x: RandomVariable) -> Ancestor | None:
    """The farthest variable that ``x`` is a function of, if the function is bent and defined on the whole line."""
    found, origin = None, x.origin
    bent = False
    for ancestor in ancestors(x):
        if not ancestor.whole_line:
            return None
        found = ancestor
    while origin is not None:
        bent = bent or not origin.affine
        origin = origin.parent.origin
    return found if bent else None


def identity(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself."""
    return x


class _NotSpelledError(Exception):
    pass


def spelling(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], keys: dict[int, Hashable | None]) -> Hashable | None:
    """A call as a key: equal keys are equal functions. None where a tensor takes part, or a function that has none."""

    def spelled(value: Any) -> Hashable:
        if isinstance(value, RandomVariable):
            if (key := keys[id(value)]) is not None:
                return (RandomVariable, key)
        elif isinstance(value, (bool, int, float, str, torch.dtype)) or value is None or value is ...:
            return (type(value), value)
        elif isinstance(value, slice):
            return (slice, *map(spelled, (value.start, value.stop, value.step)))
        elif isinstance(value, (list, tuple)):
            return tuple(map(spelled, value))
        raise _NotSpelledError

    try:
        return (func, *map(spelled, args), *((name, spelled(value)) for name, value in sorted(kwargs.items())))
    except _NotSpelledError:
        return None


@dataclass(frozen=True)
class UnderLaw:
    """A call as a function of one draw that is not Gaussian: its root, the function, and whether it joins elements."""

    root: RandomVariable
    function: Function
    joint: bool

    @property
    def can_join(self) -> bool:
        """The root has nodes for functions that join its elements."""
        return self.root.density is not None and self.root.density.joint_nodes(self.root) is not None

    def result(self, like: RandomVariable, joint: bool = False) -> RandomVariable:
        """The call's moments, integrated over the root's own law."""
        joint = joint or self.joint
        mean, var = moments_under(self.function, self.root, joint)
        return like.with_moments(mean, var).derived(origin=Origin(self.root.snapshot(), self.function, joint=joint))


def under_law(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> UnderLaw | None:
    """The call as a function of a draw that is not Gaussian, if all random variables in it are functions of one."""
    inputs = unique(args, kwargs)
    functions, roots, joint = {}, {}, False
    for x in inputs:
        root, function = x, identity
        while root.origin is not None:
            joint = joint or root.origin.joint
            function = followed_by(root.origin.function, function)
            root = root.origin.parent
        if root.density is None:
            return None
        functions[id(x)] = function
        roots[root.key] = root
    if len(roots) != 1:
        return None

    def call(value: torch.Tensor) -> Any:
        values = {key: function(value) for key, function in functions.items()}
        return func(*substitute(args, lambda x: values[id(x)]), **substitute(kwargs, lambda x: values[id(x)]))

    return UnderLaw(next(iter(roots.values())), call, joint)


def of_floats(function: Function) -> Function:
    """``function`` with numbers in the place of truth values, as a comparison gives."""

    def made(value: torch.Tensor) -> torch.Tensor:
        result = function(value)
        return result if result.is_floating_point() else result.to(value.dtype)

    return made


def as_numbers(x: RandomVariable) -> RandomVariable:
    """Truth values, which comparisons give, as the numbers that are added and multiplied; any other variable itself."""
    origin = x.origin
    with torch.no_grad():
        if origin is None or origin.function(origin.parent.mean).is_floating_point():
            return x
    key = None if origin.key is None else ("numbers", origin.key)
    return x.with_moments(x.mean, x.var).derived(origin=replace(origin, function=of_floats(origin.function), key=key))


def followed_by(first: Function, second: Function) -> Function:
    """``second`` of ``first``."""
    return first if second is identity else lambda x: second(first(x))


def meetings(lines: list[Line]) -> set[float]:
    """Where lines cross."""
    return {(d - b) / (a - c) for i, (a, b) in enumerate(lines) for c, d in lines[:i] if a != c}
