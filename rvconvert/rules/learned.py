"""Functions with learned factors, as models spell them, whose moments need no quadrature: PReLU, snake, Swish.

What a chain of operations makes of x is read off by calling it on a symbol for x. Every step gives one of three forms, or none:

    slopes      x times one slope above 0, and another below it;
    wave        slope x + offset + height cos(rate x + phase);
    scaled      factor f(rate x), f a function of numbers alone, which may be read from a table.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rvconvert.core.registry import REGISTRY
from rvconvert.moments import leaky_relu, wave
from rvconvert.moments.composed import composed_moments
from rvconvert.moments.quadrature import by_rows

__all__ = ["learned_moments"]

Function = Callable[[Tensor], Tensor]
Factor = Tensor | float
_LEAST_RATE = 1e-3  # below which f(rate x)/rate loses its digits


class _NoFormError(Exception):
    """The chain has none of the forms."""


class Slopes(NamedTuple):
    """``above`` x where x > 0, ``below`` x elsewhere."""

    above: Factor
    below: Factor

    def times(self, factor: Factor) -> Slopes:
        return Slopes(self.above * factor, self.below * factor) if self.above is not self.below else _line(self.above * factor)

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        above, below = self
        if isinstance(above, Tensor) or not above:  # from the steeper side, as the other slope over 0 is none
            above, below = (torch.as_tensor(x, dtype=mean.dtype, device=mean.device) for x in self)
            turned = below.abs() > above.abs()
            mean = torch.where(turned, -mean, mean)
            above, below = torch.where(turned, -below, above), torch.where(turned, -above, below)
            below = below / torch.where(above == 0, 1.0, above)
        else:
            below = below / above
        out, out_var = leaky_relu(mean, var.expand_as(mean), below)
        return (out, out_var) if not isinstance(above, Tensor) and above == 1 else (above * out, above * above * out_var)


class Wave(NamedTuple):
    """``slope`` x + ``offset`` + ``height`` cos(``rate`` x + ``phase`` + ``turns`` pi/2), or ``raised``, height (1 + cos)."""

    slope: Factor
    offset: Factor
    height: Factor = 0.0
    rate: Factor = 0.0
    phase: Factor = 0.0
    turns: int = 0
    raised: bool = False

    def times(self, factor: Factor) -> Wave:
        return self._replace(slope=self.slope * factor, offset=self.offset * factor, height=self.height * factor)

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        given = mean, var, self.slope, self.height, self.rate, self.phase, self.turns, self.raised
        if torch.is_grad_enabled():  # of twenty steps nothing is kept: gradients run them again
            run = functools.partial(checkpoint, wave, use_reentrant=False, preserve_rng_state=False)
        else:
            run = wave
        out, out_var = by_rows(run, *given)
        return out + self.offset, out_var


class Scaled(NamedTuple):
    """``factor`` f(``rate`` x), with the ``key`` of f."""

    factor: Factor
    rate: Factor
    function: Function
    key: Hashable

    def times(self, factor: Factor) -> Scaled:
        return self._replace(factor=self.factor * factor)

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.rate
        of_numbers = not isinstance(rate, Tensor) and not isinstance(self.factor, Tensor)  # the whole has no table either
        if of_numbers or (isinstance(rate, Tensor) and bool((rate.abs() < _LEAST_RATE).any())):
            raise _NoFormError
        out, out_var = composed_moments(self.key, self.function, rate * mean, rate * rate * var, wide=True)
        return self.factor * out, self.factor * self.factor * out_var


Form = Slopes | Wave | Scaled


class _Sign(NamedTuple):
    """x > 0, or its contrary."""

    positive: bool


class _Symbol(Tensor):
    """x in a chain of operations, or what they make of it."""

    form: Form | _Sign
    has_gradients: bool

    @staticmethod
    def of(form: Form | _Sign, dtype: torch.dtype) -> _Symbol:
        made: _Symbol = torch.empty((), dtype=dtype).as_subclass(_Symbol)
        made.form, made.has_gradients = form, torch.is_grad_enabled()
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.__name__ == "__get__" or func is Tensor.is_floating_point:
            return super().__torch_function__(func, types, args, kwargs)
        if any(isinstance(x, _Symbol) and x.has_gradients != torch.is_grad_enabled() for x in args):
            raise _NoFormError  # its moments would have another gradient than the function
        rule = REGISTRY.find(func)
        name = _NAMES.get(rule.name, rule.name) if rule is not None else ""
        step = _STEPS.get(name)
        given = [x.form if isinstance(x, _Symbol) else x for x in args]
        named = {key: value for key, value in (kwargs or {}).items() if key != "inplace"}
        form = None
        if step is not None and (name == "where" or not any(isinstance(x, _Sign) for x in given)):
            with contextlib.suppress(TypeError, ZeroDivisionError):  # a step takes what its function would not
                form = step(*given, **named)
        if form is None:
            form = _of_numbers(func, rule, given, named)
        dtype = next(x.dtype for x in args if isinstance(x, _Symbol))
        return cls.of(form, dtype)


def learned_moments(function: Function, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor] | None:
    """Moments of a chain of operations in which tensors take part, X ~ N(mean, var); None if it has no form."""
    try:
        made = function(_Symbol.of(_line(1.0), mean.dtype))
        if isinstance(made, _Symbol) and not isinstance(made.form, _Sign):
            out, out_var = made.form.moments(mean, var)
            return out.expand_as(mean), out_var.expand_as(mean)
    except _NoFormError:
        pass
    return None


# ---- what each operation makes of forms; None where it has no form ---------------------------------------------------


def _line(slope: Factor) -> Slopes:
    return Slopes(slope, slope)


def _slope(form: Any) -> Factor | None:
    """Of a line."""
    return form.above if isinstance(form, Slopes) and form.above is form.below else None


def _as_wave(form: Any) -> Wave | None:
    slope = _slope(form)
    return Wave(slope, 0.0) if slope is not None else form if isinstance(form, Wave) else None


def _is_form(value: Any) -> bool:
    return isinstance(value, (Slopes, Wave, Scaled))


def _times(a: Any, b: Any) -> Form | None:
    if _is_form(a) and _is_form(b):
        return _square(a) if a is b else _by_line(a, b) or _by_line(b, a)
    form, factor = (a, b) if _is_form(a) else (b, a)
    if isinstance(form, Scaled) and not isinstance(factor, Tensor):
        return None  # it belongs to f
    return form.times(factor)  # type: ignore[no-any-return]


def _by_line(line: Any, other: Any) -> Form | None:
    """slope x f(rate x) is slope/rate times another function of rate x."""
    slope = _slope(line)
    if slope is None or not isinstance(other, Scaled) or _equal(other.rate, 0):
        return None
    factor = other.factor if slope is other.rate else other.factor * (slope / other.rate)
    return Scaled(factor, other.rate, lambda u: u * other.function(u), ("times", other.key))


def _divided(a: Any, b: Any) -> Form | None:
    if isinstance(b, Scaled):
        return _by_line(a, Scaled(1 / b.factor, b.rate, lambda u: 1 / b.function(u), ("over", b.key)))
    if not _is_form(a) or _is_form(b):
        return None
    return _times(a, b.reciprocal() if isinstance(b, Tensor) else 1 / b)


def _plus(a: Any, b: Any) -> Form | None:
    if isinstance(a, Slopes) and isinstance(b, Slopes):
        bent = _slope(a) is None or _slope(b) is None
        return Slopes(a.above + b.above, a.below + b.below) if bent else _line(a.above + b.above)
    first, second = (_as_wave(x) if _is_form(x) else Wave(0.0, x) for x in (a, b))
    if first is None or second is None or (_has_height(first) and _has_height(second)):
        return None
    whole, other = (first, second) if _has_height(first) else (second, first)
    if not whole.raised and all(_equal(x, 0) for x in (other.slope, whole.slope, whole.offset)):
        if _equal(other.offset, whole.height):
            return whole._replace(raised=True)
        if _equal(other.offset, -whole.height):  # 1 - cos
            return whole._replace(height=-whole.height, turns=whole.turns + 2, raised=True)
    return whole._replace(slope=first.slope + second.slope, offset=first.offset + second.offset)


def _minus(a: Any, b: Any) -> Form | None:
    return None if isinstance(b, Scaled) else _plus(a, b.times(-1.0) if _is_form(b) else -b)


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b


def _has_height(form: Wave) -> bool:
    return isinstance(form.height, Tensor) or form.height != 0


def _square(a: Any) -> Form | None:
    if not isinstance(a, Wave) or a.raised or any(isinstance(x, Tensor) or x for x in (a.slope, a.offset)):
        return None
    return Wave(0.0, 0.0, a.height * a.height / 2, 2 * a.rate, 2 * a.phase, 2 * a.turns, raised=True)


def _cosine(a: Any, turns: int = 0) -> Form | None:
    form = _as_wave(a)
    return None if form is None or _has_height(form) else Wave(0.0, 0.0, 1.0, form.slope, form.offset, turns)


def _largest(a: Any, b: Any, *, most: bool = True) -> Form | None:
    if not (isinstance(a, Slopes) and isinstance(b, Slopes)):
        return None
    return Slopes(_extreme(a.above, b.above, most=most), _extreme(a.below, b.below, most=not most))


def _smallest(a: Any, b: Any) -> Form | None:
    return _largest(a, b, most=False)


def _extreme(a: Any, b: Any, *, most: bool) -> Factor:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return max(a, b) if most else min(a, b)
    like = a if isinstance(a, Tensor) else b
    return (torch.maximum if most else torch.minimum)(*(torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (a, b)))


def _above(a: Any, b: Any) -> _Sign | None:
    slope: Any = _slope(a)
    known = isinstance(slope, (int, float)) and slope != 0 and isinstance(b, (int, float)) and b == 0
    return _Sign(slope > 0) if known else None


def _below(a: Any, b: Any) -> _Sign | None:
    sign = _above(a, b)
    return None if sign is None else _Sign(not sign.positive)


def _chosen(where: Any, a: Any, b: Any) -> Form | None:
    if not isinstance(where, _Sign) or not isinstance(a, Slopes) or not isinstance(b, Slopes):
        return None
    first, second = (a, b) if where.positive else (b, a)
    return Slopes(first.above, second.below)


def _of_numbers(func: Any, rule: Any, given: list[Any], kwargs: dict[str, Any]) -> Form:
    """The next step of f: a smooth function of f(rate x), or of a line, and of numbers."""
    forms = [x for x in given if isinstance(x, (Slopes, Wave, Scaled, _Sign))]
    numbers = [x for x in (*given, *kwargs.values()) if not any(x is form for form in forms)]
    smooth = hasattr(getattr(rule, "kind", None), "whole_line") and rule.kind.kinks is None
    if len(forms) != 1 or not smooth or not all(isinstance(x, (bool, int, float)) or x is None for x in numbers):
        raise _NoFormError
    slope = _slope(forms[0])
    form = forms[0] if slope is None else Scaled(1.0, slope, lambda u: u, ())
    if not isinstance(form, Scaled) or isinstance(form.factor, Tensor):
        raise _NoFormError

    def function(u: Tensor) -> Tensor:
        value = form.function(u) if form.factor == 1 else form.factor * form.function(u)
        return func(*(value if x is forms[0] else x for x in given), **kwargs)  # type: ignore[no-any-return]

    spelled = tuple("x" if x is forms[0] else x for x in given)
    return Scaled(1.0, form.rate, function, (func, spelled, tuple(sorted(kwargs.items())), form.factor, form.key))


_NAMES = {"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg"}
_STEPS: dict[str, Callable[..., Any]] = {
    "clone": lambda a, **_: a,
    "contiguous": lambda a, **_: a,
    "mul": _times,
    "div": _divided,
    "add": _plus,
    "sub": _minus,
    "rsub": lambda a, b: _minus(b, a),
    "neg": lambda a: None if isinstance(a, Scaled) else a.times(-1.0),
    "square": _square,
    "pow": lambda a, b: _square(a) if isinstance(b, (int, float)) and b == 2 else None,
    "sin": lambda a: _cosine(a, -1),
    "cos": _cosine,
    "relu": lambda a: _largest(a, _line(0.0)),
    "maximum": _largest,
    "minimum": _smallest,
    "max": _largest,
    "min": _smallest,
    "gt": _above,
    "ge": _above,
    "lt": _below,
    "le": _below,
    "where": _chosen,
}
