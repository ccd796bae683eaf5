"""Where the values of an elementwise function lie, whatever its input: what a logarithm, a root or a divisor has to know.

``1 / (1 + torch.exp(-x))`` is a function on the whole line, as ``1 + torch.exp(-x)`` keeps off 0. Each function here takes a
call's arguments, and gives an interval, closed; nothing is known of a tensor's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rvconvert.core.random_variable import RandomVariable
from rvconvert.rules.ancestry import ANYWHERE, Interval, interval_of
from rvconvert.rules.calls import bind
from rvconvert.rules.relations import is_same

if TYPE_CHECKING:
    from collections.abc import Callable

POSITIVE = (math.ulp(0.0), math.inf)  # of what is never 0, but at single points
OFF_ZERO = 0.01  # what a clamp holds nearer to 0 is a norm that is divided by, taken as lognormal


def within(low: float, high: float) -> Callable[..., Interval]:
    """Of a function whose values lie there for any input."""
    return lambda args, kwargs: (low, high)


def monotone(function: Callable[[float], float], above: float) -> Callable[..., Interval]:
    """Of a function that rises or falls on the part of the line ``above`` a number."""

    def interval(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        low, high = interval_of(_operands(args, kwargs)[0])
        if not low > above:
            return ANYWHERE
        first, last = function(low), function(high)
        return min(first, last), max(first, last)

    return interval


def keeps_above(least: float) -> Callable[..., bool]:
    """The one operand is a variable of which it is known that it keeps above a number."""
    return lambda args, kwargs: interval_of(_operands(args, kwargs)[0])[0] > least


def is_bounded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The operand is a variable that keeps between two numbers, as no Gaussian does."""
    return all(map(math.isfinite, interval_of(_operands(args, kwargs)[0])))


def keeps_off_zero(interval: Interval) -> bool:
    """Far enough to divide by."""
    return interval[0] >= OFF_ZERO or interval[1] <= -OFF_ZERO


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return bind(("input", "other"), args, kwargs)[0]


def of_sum(sign: int) -> Callable[..., Interval]:
    """a + alpha b, or a - alpha b."""

    def interval(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        (a, b, alpha), _, _ = bind(("input", "other", "alpha"), args, kwargs)
        first, second = interval_of(a), _product(interval_of(sign if alpha is None else sign * alpha), interval_of(b))
        return first[0] + second[0], first[1] + second[1]

    return interval


def of_reversed_difference(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """b - alpha a."""
    (a, b, alpha), _, _ = bind(("input", "other", "alpha"), args, kwargs)
    return of_sum(-1)((b, a, alpha), {})


def of_negative(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """-x."""
    low, high = interval_of(_operands(args, kwargs)[0])
    return -high, -low


def of_product(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """a b; a variable times itself is no negative number."""
    a, b = _operands(args, kwargs)
    return POSITIVE if isinstance(b, RandomVariable) and is_same(a, b) else _product(interval_of(a), interval_of(b))


def _product(a: Interval, b: Interval) -> Interval:
    ends = [0.0 if x == 0 or y == 0 else x * y for x in a for y in b]
    return min(ends), max(ends)


def of_quotient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """a / b."""
    (a, b, mode), _, _ = bind(("input", "other", "rounding_mode"), args, kwargs)
    return ANYWHERE if mode else _product(interval_of(a), _inverse(interval_of(b)))


def of_reversed_quotient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """b / a, 1 / a without b."""
    a, b = _operands(args, kwargs)
    return _product(interval_of(1.0 if b is None else b), _inverse(interval_of(a)))


def _inverse(of: Interval) -> Interval:
    low, high = of
    return (1 / high, 1 / low) if low > 0 or high < 0 else ANYWHERE


def divisor_keeps_off_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The random divisor of a / b."""
    (_, b), _, rest = bind(("input", "other"), args, kwargs)
    return isinstance(b, RandomVariable) and not rest.get("rounding_mode") and keeps_off_zero(interval_of(b))


def reversed_divisor_keeps_off_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """The random divisor of b / a."""
    return keeps_off_zero(interval_of(_operands(args, kwargs)[0]))


def of_power(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """x to a number."""
    (x, exponent), _, _ = bind(("input", "exponent"), args, kwargs)
    if not isinstance(exponent, (int, float)):
        return POSITIVE if isinstance(x, (int, float)) and x > 0 else ANYWHERE
    if exponent > 0 and exponent % 2 == 0:
        return POSITIVE
    low, high = interval_of(x)
    if low <= 0 or exponent == 0:
        return ANYWHERE
    return (low**exponent, high**exponent) if exponent > 0 else (high**exponent, low**exponent)


def of_clamp(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """x between two numbers, either of which may be left out."""
    (x, least, most), _, _ = bind(("input", "min", "max"), args, kwargs)
    low, high = interval_of(x)
    if least is not None:
        low, high = (max(ends) for ends in zip((low, high), interval_of(least), strict=True))
    if most is not None:
        low, high = (min(ends) for ends in zip((low, high), interval_of(most), strict=True))
    return low, high


def of_either(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
    """``where``: one of two values."""
    (_, a, b), _, _ = bind(("condition", "input", "other"), args, kwargs)
    ends = interval_of(a), interval_of(b)
    return min(low for low, _ in ends), max(high for _, high in ends)


def of_extremum(pick: Callable[[float, float], float]) -> Callable[..., Interval]:
    """The greater or the lesser of two values."""

    def interval(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interval:
        (low, high), (other_low, other_high) = map(interval_of, _operands(args, kwargs))
        return pick(low, other_low), pick(high, other_high)

    return interval
