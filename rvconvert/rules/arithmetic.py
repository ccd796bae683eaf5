"""Sums, products, quotients, powers and comparisons: elementwise functions of one or several variables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rvconvert import moments as gaussian
from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import Exactness
from rvconvert.errors import UnsupportedOperationError
from rvconvert.moments.quadrature import quadrature
from rvconvert.rules.ancestry import everywhere, interval_of
from rvconvert.rules.calls import at_means, bind, moments, spread, unique
from rvconvert.rules.extrema import constants
from rvconvert.rules.intervals import (
    divisor_keeps_off_zero,
    keeps_off_zero,
    of_either,
    of_negative,
    of_power,
    of_product,
    of_quotient,
    of_reversed_difference,
    of_reversed_quotient,
    of_sum,
    reversed_divisor_keeps_off_zero,
)
from rvconvert.rules.kinds import Composite, Elementwise, add_rule, first_order
from rvconvert.rules.relations import OfRows, copied, is_same, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

_INDEPENDENT = "operands are independent"


def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y = a + alpha b: var = v_a + alpha^2 v_b (with sub and rsub alike, for independent operands)."""
    (a, b, alpha), _, _ = bind(("input", "other", "alpha"), args, kwargs)
    first, second = (b, a) if getattr(func, "__name__", "") in ("rsub", "__rsub__") else (a, b)
    if isinstance(alpha, RandomVariable):
        raise UnsupportedOperationError(f"{func.__name__}: alpha is a random variable; write it as a product")
    mean = at_means(func, args, kwargs)
    var: Any = 0
    if isinstance(first, RandomVariable):
        var = var + first.var
    if isinstance(second, RandomVariable):
        var = var + (second.var if alpha is None or alpha == 1 else second.var * (alpha * alpha))
    return mean, spread(var, mean)


def _product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y = a b: var = m_a^2 v_b + m_b^2 v_a + v_a v_b."""
    (a, b), _, _ = bind(("input", "other"), args, kwargs)
    (a, a_var), (b, b_var) = moments(a), moments(b)
    mean = a * b
    if b_var is None:
        var = a_var * (b * b)
    elif a_var is None:
        var = b_var * (a * a)
    else:
        var = a_var * (b.square() + b_var) + a.square() * b_var
    return mean, spread(var, mean)


def _quotient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y = a / b: exact for a constant b, else a times 1/b with b lognormal (a quotient of Gaussians has no moments)."""
    (a, b, mode), _, _ = bind(("input", "other", "rounding_mode"), args, kwargs)
    if getattr(func, "__name__", "") in ("__rtruediv__", "__rdiv__", "reciprocal"):
        a, b = (1.0, a) if func.__name__ == "reciprocal" else (b, a)
    if mode is not None:
        like = random_variables(args, kwargs)[0]
        quotient: Any = like.with_moments(*_quotient(torch.div, (a, b), {}))
        whole: Any = {"floor": torch.floor, "trunc": torch.trunc}[mode](quotient)
        return whole.mean, whole.var
    divisor = b
    (a, a_var), (b, b_var) = moments(a), moments(b)
    if b_var is None:
        mean = a / b
        return mean, spread(a_var / (b * b), mean)
    inverse, inverse_var = gaussian.reciprocal(b, b_var) if a_var is None else moments(torch.reciprocal(divisor))
    mean = a * inverse
    var = inverse_var * (a * a)
    if a_var is not None:
        var = var + a_var * (inverse.square() + inverse_var)
    return mean, spread(var, mean)


def _line(operation: Callable[..., Any]) -> Any:
    """Slope and shift of ``operation(a, b, alpha)`` where one operand is random and the other a number."""

    def line(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
        (*operands, alpha), _, rest = bind(("input", "other", "alpha"), args, kwargs)
        if rest.get("rounding_mode") or not all(isinstance(x, (int, float, RandomVariable)) for x in operands):
            return None
        shift, end = (
            operation(*(at if isinstance(x, RandomVariable) else x for x in operands), 1 if alpha is None else alpha)
            for at in (0.0, 1.0)
        )
        return end - shift, shift

    return line


@dataclass(frozen=True)
class Sum(Elementwise):
    """A sum or a difference, which knows a location taken from what was drawn around it.

    log q(z) of a draw z = mu + noise of a mu that is random itself, a hierarchy's, is one of ``z - mu``: the noise.
    """

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        (a, b, alpha), _, _ = bind(("input", "other", "alpha"), args, kwargs)
        name = getattr(func, "__name__", "")
        both = isinstance(a, RandomVariable) and isinstance(b, RandomVariable) and alpha in (None, 1)
        rows = rows_of(b) if both and name in ("sub", "sub_", "subtract", "__sub__", "__isub__") else None
        if rows is not None and is_same(a, rows.of):
            return self.shifted(rows, func, args, kwargs)
        if not both or a.shape != b.shape:
            return super().__call__(func, args, kwargs)
        if name in ("add", "add_", "__add__", "__radd__", "__iadd__"):
            made = super().__call__(func, args, kwargs)
            noisy = made.origin is None and (a.latent or b.latent)
            return made.sum_of(a.snapshot(), b.snapshot()) if noisy else made
        first, second = (b, a) if name in ("rsub", "__rsub__") else (a, b)
        rest = _without(first, second)
        if rest is not None:
            return rest.snapshot()
        rest = _without(second, first)
        if rest is not None:
            return -rest  # type: ignore[no-any-return, operator]
        return super().__call__(func, args, kwargs)

    def shifted(self, rows: OfRows, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        """A variable less a reduction of its rows."""
        if rows.by == "logsumexp":
            return torch.log_softmax(rows.of, rows.dim)  # type: ignore[return-value, arg-type]
        return super().__call__(func, args, kwargs).carrying(rows._replace(shifted=True))


def _without(whole: RandomVariable, part: RandomVariable) -> RandomVariable | None:
    """The other term of a sum that ``part`` is one of, or a copy of one."""
    for first, second in (x.terms for x in copied(whole) if x.terms is not None):
        for each in copied(part):
            if is_same(each, first):
                return second
            if is_same(each, second):
                return first
    return None


_LINES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, alpha: a + alpha * b,
    "sub": lambda a, b, alpha: a - alpha * b,
    "subtract": lambda a, b, alpha: a - alpha * b,
    "rsub": lambda a, b, alpha: b - alpha * a,
}
_INTERVALS: dict[str, Callable[..., Any]] = {
    "add": of_sum(1),
    "sub": of_sum(-1),
    "subtract": of_sum(-1),
    "rsub": of_reversed_difference,
}
for _name, _operation in _LINES.items():
    _of_two = Sum(_sum, _sum, line=_line(_operation), affine=everywhere, interval=_INTERVALS[_name])
    add_rule(_name, _of_two, Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
for _name in ("mul", "multiply"):
    _kind = Elementwise(_product, _product, line=_line(lambda a, b, _: a * b), affine=everywhere, interval=of_product)
    add_rule(_name, _kind, Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)


def _over_number(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float] | None:
    """The slope of x / c."""
    (_, b), _, rest = bind(("input", "other"), args, kwargs)
    plain = isinstance(b, (int, float)) and b != 0 and not rest.get("rounding_mode")
    return (1 / b, 0.0) if plain else None


def _constant_divisor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    (_, b), _, rest = bind(("input", "other"), args, kwargs)
    return not isinstance(b, RandomVariable) and not rest.get("rounding_mode")


@dataclass(frozen=True)
class Quotient(Elementwise):
    """A quotient, which knows a softmax written out: exponentials, perhaps of what was shifted first, over their sum."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        (a, b, mode), _, _ = bind(("input", "other", "rounding_mode"), args, kwargs)
        rows = rows_of(b, "sum") if isinstance(a, RandomVariable) and mode is None else None
        if rows is not None and not rows.shifted:
            exponent, summed = _exponent(a), _exponent(rows.of)
            shift = rows_of(exponent)
            if (
                exponent is not None
                and summed is not None
                and (is_same(exponent, summed) or _are_shifted(shift, rows_of(summed)))
            ):
                of: Any = shift.of if shift is not None and shift.shifted and shift.dim == rows.dim else exponent
                return torch.softmax(of, rows.dim)  # type: ignore[return-value]
        return super().__call__(func, args, kwargs)


def _are_shifted(first: OfRows | None, second: OfRows | None) -> bool:
    """One variable, less the same reduction of it."""
    if first is None or second is None or not (first.shifted and second.shifted):
        return False
    return is_same(first.of, second.of) and (first.dim, first.by) == (second.dim, second.by)


def _exponent(x: RandomVariable) -> RandomVariable | None:
    """The variable that ``x`` is the exponential of."""
    for each in copied(x):
        key = None if each.origin is None else each.origin.key
        if isinstance(key, tuple) and getattr(key[0], "__name__", "") == "exp" and key[1:] == ((RandomVariable, ()),):
            return each.origin.parent  # type: ignore[union-attr]
    return None


def _over(name: str) -> Elementwise:
    if name in ("rdiv", "reciprocal"):
        return Elementwise(_quotient, _quotient, joins=reversed_divisor_keeps_off_zero, interval=of_reversed_quotient)
    line, joins = _over_number, divisor_keeps_off_zero
    return Quotient(_quotient, _quotient, line=line, affine=_constant_divisor, joins=joins, interval=of_quotient)


for _name in ("div", "divide", "true_divide", "rdiv", "reciprocal"):
    add_rule(
        _name,
        _over(_name),
        Exactness.APPROXIMATE,
        "exact for a constant divisor; a random one is taken as lognormal, so it must stay away from 0",
        keeps_latent=True,
    )


def _negative(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x = args[0] if args else kwargs["input"]
    return -x.mean, x.var


for _name in ("neg", "negative"):
    _kind = Elementwise(_negative, line=lambda args, kwargs: (-1.0, 0.0), affine=everywhere, interval=of_negative)
    add_rule(_name, _kind, Exactness.EXACT, keeps_latent=True)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return input + (tensor1 * tensor2 if value == 1 else value * (tensor1 * tensor2))


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return input + value * (tensor1 / tensor2)


def _lerp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y = a + w (b - a): var = (1-w)^2 v_a + w^2 v_b + v_w ((b - a)^2 + v_a + v_b)."""
    (a, b, w), _, _ = bind(("input", "end", "weight"), args, kwargs)
    (a, a_var), (b, b_var), (w, w_var) = moments(a), moments(b), moments(w)
    mean = a + w * (b - a)
    a_var, b_var = (0 if v is None else v for v in (a_var, b_var))
    var = (1 - w) ** 2 * a_var + w**2 * b_var
    if w_var is not None:
        var = var + w_var * ((b - a).square() + a_var + b_var)
    return mean, spread(var, mean)


add_rule("addcmul", Composite(_addcmul), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("addcdiv", Composite(_addcdiv), Exactness.APPROXIMATE, "as div", keeps_latent=True)
add_rule("lerp", Elementwise(_lerp, _lerp), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)


def _power(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    (x, exponent), _, _ = bind(("input", "exponent"), args, kwargs)
    if isinstance(exponent, RandomVariable):
        # a^X = e^(X log a), for a positive constant.
        rate = torch.as_tensor(x, dtype=exponent.dtype, device=exponent.device).log()
        mean, var = torch.broadcast_tensors(exponent.mean * rate, exponent.var * rate.square())
        return gaussian.exp(mean, var)
    if isinstance(exponent, Tensor):
        mean, var = _broadcast(x, exponent)
        broken = (exponent != exponent.round()) | exponent.requires_grad
        below = (exponent < 0) | (broken & (mean.square() < 64 * var))  # where a Gaussian has no moments
        found = quadrature(lambda value: torch.pow(value, torch.where(below, 1, exponent)), mean, var)
        positive = gaussian.positive_power(mean, var, torch.where(below, exponent, 1))
        return torch.where(below, positive[0], found[0]), torch.where(below, positive[1], found[1])
    return gaussian.power(x.mean, x.var, exponent)


def _broadcast(x: RandomVariable, other: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(x.shape, other.shape)
    return x.mean.expand(shape), x.var.expand(shape)


def _whole_exponent(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    (_, exponent), _, _ = bind(("input", "exponent"), args, kwargs)
    return isinstance(exponent, (int, float)) and exponent >= 0 and exponent == int(exponent)


def _fraction_of_positive(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A root, or a negative power, of what is known to keep above 0."""
    (x, exponent), _, _ = bind(("input", "exponent"), args, kwargs)
    if not isinstance(exponent, (int, float)) or _whole_exponent(args, kwargs):
        return False
    return interval_of(x)[0] > 0 if exponent > 0 else keeps_off_zero(interval_of(x)) and interval_of(x)[0] > 0


def _joins_power(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    (base, exponent), _, _ = bind(("input", "exponent"), args, kwargs)
    exponential = isinstance(exponent, RandomVariable) and not isinstance(base, RandomVariable)
    return exponential or _fraction_of_positive(args, kwargs)


def _has_a_power(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return _whole_exponent(args, kwargs) or _joins_power(args, kwargs)


add_rule(
    "pow",
    Elementwise(_power, first_order, whole_line=_has_a_power, joins=_joins_power, interval=of_power),
    Exactness.MOMENT_MATCHED,
    "a Gaussian input, whole powers exact; under a negative or fractional power a lognormal one",
    keeps_latent=True,
)


def _float_power(input: Any, exponent: Any) -> Any:
    base, power = (x.double() if hasattr(x, "double") else x for x in (input, exponent))
    return torch.pow(base, power)


add_rule("float_power", Composite(_float_power), Exactness.MOMENT_MATCHED, "as pow")


def _rpow(x: Any, base: Any) -> Any:
    return torch.pow(base, x)


add_rule("rpow", Composite(_rpow), Exactness.MOMENT_MATCHED, "a Gaussian exponent, a positive base")
_TWO = "one random operand: Gaussian, by quadrature; two: first order at the means"
for _name in ("atan2", "arctan2", "hypot", "logaddexp", "logaddexp2", "copysign", "ldexp"):
    add_rule(_name, Elementwise(None, first_order), Exactness.APPROXIMATE, _TWO)
_STEPS = "a Gaussian input; quadrature, which smooths the steps"
for _name in ("fmod", "remainder"):
    add_rule(_name, Elementwise(None, first_order), Exactness.APPROXIMATE, _STEPS)


def _floor_divide(input: Any, other: Any) -> Any:
    return torch.floor(input / other)


add_rule("floor_divide", Composite(_floor_divide), Exactness.APPROXIMATE, _STEPS)


def _xlogy(input: Any, other: Any) -> Any:
    return input * torch.log(other)


add_rule("xlogy", Composite(_xlogy), Exactness.APPROXIMATE, "as log: a positive, lognormal other; operands are independent")


# ---- comparisons: indicators -------------------------------------------------------------------------------------


def _comparison(above: bool) -> Any:
    def probability(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (a, b), _, _ = bind(("input", "other"), args, kwargs)
        (a, a_var), (b, b_var) = moments(a), moments(b)
        difference = (a - b) if above else (b - a)
        var: Any = (0 if a_var is None else a_var) + (0 if b_var is None else b_var)
        certain = at_means(func, args, kwargs).to(difference.dtype)
        std = torch.where(var > 0, var, 1).sqrt()
        p = torch.where(var > 0, torch.special.ndtr(difference / std), certain)
        return p, p * (1 - p)

    return probability


for _name in ("gt", "ge", "lt", "le", "greater", "less", "greater_equal", "less_equal"):
    _above = _name.startswith("g")
    add_rule(
        _name,
        Elementwise(_comparison(_above), _comparison(_above), kinks=constants, meeting=True),
        Exactness.EXACT_IF_INDEPENDENT,
        "Gaussian, independent operands; the result is the indicator's mean and variance",
    )


def _equality(value: float) -> Any:
    """Two variables are equal with probability 0, unless neither varies or both are indicators."""

    def probability(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (a, b), _, _ = bind(("input", "other"), args, kwargs)
        if all(map(_is_indicator, unique(args, kwargs))):
            (none, one), (other_none, other_one) = map(_indicated, (a, b))
            p = none * other_none + one * other_one
            p = p if value else 1 - p
            return p, p * (1 - p)
        (a, a_var), (b, b_var) = moments(a), moments(b)
        varies: Any = ((0 if a_var is None else a_var) + (0 if b_var is None else b_var)) > 0
        p = torch.where(varies | (a != b), 1 - value, value).to(varies.device, unique(args, kwargs)[0].dtype)
        return p, torch.zeros_like(p)

    return probability


for _name, _value in (("eq", 1.0), ("ne", 0.0), ("not_equal", 0.0)):
    add_rule(
        _name,
        Elementwise(_equality(_value), _equality(_value)),
        Exactness.EXACT_IF_INDEPENDENT,
        "a continuous variable meets another value with probability 0",
    )


def _is_indicator(x: RandomVariable) -> bool:
    """A function with the values 0 and 1 alone, as a comparison is, wherever it is asked."""
    if x.origin is None:
        return False
    with torch.no_grad():
        values = [x.origin.function(torch.full_like(x.origin.parent.mean, at)) for at in (-3.1, 0.21, 0.77, 2.9)]
    return all(bool(((each == 0) | (each == 1)).all()) for each in values)


def _indicated(x: Any) -> tuple[Any, Any]:
    """The probabilities of 0 and of 1."""
    return (
        (1 - x.mean, x.mean)
        if isinstance(x, RandomVariable)
        else (torch.as_tensor(x).eq(0) * 1.0, torch.as_tensor(x).eq(1) * 1.0)
    )


def _conjunction(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    p, q = (_probability(x) for x in bind(("input", "other"), args, kwargs)[0])
    name = func.__name__
    both = p * q if "and" in name else p + q - p * q if "xor" not in name else p + q - 2 * p * q
    return both, both * (1 - both)


def _probability(x: Any) -> Tensor:
    """That an indicator (random or not) holds."""
    return x.mean if isinstance(x, RandomVariable) else torch.as_tensor(x).bool().to(torch.get_default_dtype())


def _complement(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x = args[0] if args else kwargs["input"]
    return 1 - x.mean, x.var


_INDICATORS = "operands are indicators (of comparisons), independent unless functions of one variable"
for _name in ("logical_and", "logical_or", "logical_xor"):
    add_rule(_name, Elementwise(_conjunction, _conjunction), Exactness.EXACT_IF_INDEPENDENT, _INDICATORS)
for _name in ("logical_not", "bitwise_not"):
    add_rule(_name, Elementwise(_complement), Exactness.EXACT, "the operand is an indicator")


# ---- selection and steps -----------------------------------------------------------------------------------------


def _where(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """E = p a + (1-p) b, the mixture's variance; operands independent of each other."""
    (condition, a, b), _, _ = bind(("condition", "input", "other"), args, kwargs)
    p, p_var = moments(condition)
    (a, a_var), (b, b_var) = moments(a), moments(b)
    plain = [x for x, v in ((a, a_var), (b, b_var)) if v is None and (isinstance(x, Tensor) or not math.isfinite(x))]
    a_var, b_var = (0.0 if v is None else v for v in (a_var, b_var))
    if p_var is None:
        mean = torch.where(p, a, b)
        return mean, spread(torch.where(p, a_var, b_var).to(mean.dtype), mean)
    if plain:
        p = _chosen_where_defined(p, plain)
        a, b = torch.where(p > 0, a, 0.0), torch.where(p < 1, b, 0.0)
    mean = p * a + (1 - p) * b
    return mean, spread(p * a_var + (1 - p) * b_var + p * (1 - p) * (a - b) ** 2, mean)


def _chosen_where_defined(p: Tensor, constants: list[Any]) -> Tensor:
    """The probability of a branch; a constant that is no number, what is not defined, is taken where it is likelier."""
    undefined = torch.zeros_like(p, dtype=torch.bool)
    for x in constants:
        undefined = undefined | ~torch.isfinite(torch.as_tensor(x, device=p.device))
    return torch.where(undefined, (p > 0.5).to(p.dtype), p)


def _where_method(self: Any, condition: Any, other: Any) -> Any:
    return torch.where(condition, self, other)


_WHERE = "condition and branches are independent, unless all are functions of one variable"
add_rule(
    "where", Elementwise(_where, _where, interval=of_either), Exactness.EXACT_IF_INDEPENDENT, _WHERE, functions=(torch.where,)
)
add_rule("Tensor.where", Composite(_where_method), Exactness.EXACT_IF_INDEPENDENT, _WHERE, functions=(torch.Tensor.where,))
for _name in ("round", "floor", "ceil", "trunc", "fix", "frac"):
    add_rule(_name, Elementwise(), Exactness.APPROXIMATE, _STEPS)


def _sign(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """P(X > 0) - P(X < 0); its square is 1 unless X is 0 for certain."""
    x = args[0] if args else kwargs["input"]
    indicators: Any = torch.gt(x, 0), torch.lt(x, 0)
    above, below = (each.mean for each in indicators)
    mean = above - below
    return mean, (above + below).square() - mean.square()


def _heaviside(input: Any, values: Any) -> Any:
    certain = (input.mean == 0) & (input.var == 0)
    return torch.where(certain, values.to(input.dtype), torch.gt(input, 0))


def _at_zero(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    return (0.0,)


for _name in ("sign", "sgn"):
    add_rule(_name, Elementwise(_sign, kinks=_at_zero), Exactness.MOMENT_MATCHED, "a Gaussian input")
add_rule("heaviside", Composite(_heaviside), Exactness.MOMENT_MATCHED, "a Gaussian input, constant values")


def _scaled_by(factor: float) -> Elementwise:
    """x times a constant that the operation has by itself."""

    def moments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        x = args[0] if args else kwargs["input"]
        return x.mean * factor, x.var * factor**2

    return Elementwise(moments, line=lambda args, kwargs: (factor, 0.0))


for _name, _factor in (("deg2rad", math.pi / 180), ("rad2deg", 180 / math.pi)):
    add_rule(_name, _scaled_by(_factor), Exactness.EXACT)
