"""Sums, products, quotients, powers and comparisons: elementwise functions of one or several variables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rvconvert.random_variable import RandomVariable, random_variables
from rvconvert.registry import Exactness
from rvconvert.rules import gaussian
from rvconvert.rules.kinds import Composite, Elementwise, FixedLinear, add_rule, bind, moments, substitute

_INDEPENDENT = "operands are independent"


def _means(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return func(*substitute(args, lambda x: x.mean), **substitute(kwargs, lambda x: x.mean))


def _spread(var: Tensor, like: Tensor) -> Tensor:
    return var if var.shape == like.shape else var.expand(like.shape)


def _sum(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y = a + alpha b: var = v_a + alpha^2 v_b (with sub and rsub alike, for independent operands)."""
    (a, b, alpha), _, _ = bind(("input", "other", "alpha"), args, kwargs)
    first, second = (b, a) if getattr(func, "__name__", "") in ("rsub", "__rsub__") else (a, b)
    mean = _means(func, args, kwargs)
    var: Any = 0
    if isinstance(first, RandomVariable):
        var = var + first.var
    if isinstance(second, RandomVariable):
        var = var + (second.var if alpha is None or alpha == 1 else second.var * (alpha * alpha))
    return mean, _spread(var, mean)


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
    return mean, _spread(var, mean)


def _quotient(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """y = a / b: exact for a constant b, else by the delta method (a quotient of Gaussians has no moments)."""
    (a, b, mode), _, _ = bind(("input", "other", "rounding_mode"), args, kwargs)
    if getattr(func, "__name__", "") in ("__rtruediv__", "__rdiv__", "reciprocal"):
        a, b = (1.0, a) if func.__name__ == "reciprocal" else (b, a)
    (a, a_var), (b, b_var) = moments(a), moments(b)
    if mode is not None:
        raise NotImplementedError(f"division of a random variable with rounding_mode={mode!r}")
    mean = a / b
    if b_var is None:
        var = a_var / (b * b)
    else:
        relative = b_var / b.square()
        var = mean.square() * relative + (0 if a_var is None else a_var / b.square())
        mean = mean * (1 + relative)
    return mean, _spread(var, mean)


add_rule("add", Elementwise(_sum, _sum), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("sub", Elementwise(_sum, _sum), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("rsub", Elementwise(_sum, _sum), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("subtract", Elementwise(_sum, _sum), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("mul", Elementwise(_product, _product), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("multiply", Elementwise(_product, _product), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
for _name in ("div", "divide", "true_divide", "rdiv", "reciprocal"):
    add_rule(
        _name,
        Elementwise(_quotient, _quotient),
        Exactness.APPROXIMATE,
        "exact for a constant divisor; a random one is taken by the delta method and must stay away from 0",
        keeps_latent=True,
    )


def _negative(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return -args[0].mean, args[0].var


for _name in ("neg", "negative"):
    add_rule(_name, Elementwise(_negative), Exactness.EXACT, keeps_latent=True)


def _addcmul(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return input + (tensor1 * tensor2 if value == 1 else value * (tensor1 * tensor2))


def _addcdiv(input: Any, tensor1: Any, tensor2: Any, *, value: float = 1) -> Any:
    return input + value * (tensor1 / tensor2)


def _lerp(input: Any, end: Any, weight: Any) -> Any:
    return input * (1 - weight) + weight * end


add_rule("addcmul", Composite(_addcmul), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)
add_rule("addcdiv", Composite(_addcdiv), Exactness.APPROXIMATE, "as div", keeps_latent=True)
add_rule("lerp", Composite(_lerp), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, keeps_latent=True)


def _power(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    (x, exponent), _, _ = bind(("input", "exponent"), args, kwargs)
    if isinstance(x, RandomVariable) and isinstance(exponent, (int, float)):
        if exponent == 2:
            return gaussian.square(x.mean, x.var)
        if exponent == 1:
            return x.mean, x.var
        return gaussian.quadrature(lambda value: value**exponent, x.mean, x.var)
    if isinstance(x, RandomVariable) and not isinstance(exponent, RandomVariable):
        return gaussian.quadrature(lambda value: torch.pow(value, exponent), x.mean, x.var)
    if isinstance(exponent, RandomVariable) and not isinstance(x, RandomVariable):
        return gaussian.quadrature(lambda value: torch.pow(x, value), exponent.mean, exponent.var)
    return _delta(func, args, kwargs)


def _delta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """First order at the means: var = sum of (df/dx_i)^2 v_i over independent operands."""
    inputs = list({id(x): x for x in random_variables(args, kwargs)}.values())
    shape = torch.broadcast_shapes(*(x.shape for x in inputs))
    means = [x.mean.expand(shape) for x in inputs]

    def function(*values: Tensor) -> Tensor:
        value = {id(x): each for x, each in zip(inputs, values, strict=True)}
        return func(*substitute(args, lambda x: value[id(x)]), **substitute(kwargs, lambda x: value[id(x)]))

    mean = function(*means)
    var = torch.zeros_like(mean)
    for i, x in enumerate(inputs):
        tangents = tuple(torch.ones_like(m) if i == j else torch.zeros_like(m) for j, m in enumerate(means))
        _, slope = torch.func.jvp(function, tuple(means), tangents)
        var = var + slope.square() * x.var.expand(shape)
    return mean, var


add_rule(
    "pow", Elementwise(_power, _delta), Exactness.MOMENT_MATCHED, "a Gaussian input; a square is exact", keeps_latent=True
)


def _rpow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return _power(torch.pow, (args[1], args[0]), {})


add_rule("rpow", Elementwise(_rpow), Exactness.MOMENT_MATCHED, "a Gaussian input")
for _name in ("atan2", "hypot", "logaddexp", "logaddexp2", "xlogy", "copysign", "fmod", "remainder", "floor_divide"):
    add_rule(
        _name,
        Elementwise(None, _delta),
        Exactness.APPROXIMATE,
        "a Gaussian input for one random operand; first order at the means for two",
    )


def clark_maximum(a: Tensor, a_var: Tensor, b: Tensor, b_var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of max(A, B) for independent Gaussians (Clark 1961), as b + relu(a - b) plus what b varies."""
    total = a_var + b_var
    safe = torch.where(total > 0, total, 1)
    theta = safe.sqrt()
    alpha = (a - b) / theta
    above = torch.where(total > 0, torch.special.ndtr(alpha), (a > b).to(a.dtype))
    excess, excess_var = gaussian.relu(a - b, total)
    # max = B + (A-B)+ and Cov(B, (A-B)+) = -v_b P(A > B), by Stein's rule.
    return b + excess, b_var + excess_var - 2 * b_var * above


def _maximum(sign: int) -> Any:
    def combine(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (a, b), _, _ = bind(("input", "other"), args, kwargs)
        (a, a_var), (b, b_var) = moments(a), moments(b)
        if a_var is None:
            a, a_var, b, b_var = b, b_var, a, a_var
        b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
        if b_var is None:
            mean, var = gaussian.relu((a - b) * sign, a_var.expand(torch.broadcast_shapes(a.shape, b.shape)))
            return b + sign * mean, var
        mean, var = clark_maximum(sign * a, a_var, sign * b, b_var)
        return sign * mean, var

    return combine


def _bound_kinks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    """Constant numbers that a random variable is compared with."""
    return tuple(float(x) for x in (*args, *kwargs.values()) if isinstance(x, (int, float)) and not isinstance(x, bool))


for _name, _sign in (("maximum", 1), ("minimum", -1), ("fmax", 1), ("fmin", -1)):
    add_rule(
        _name,
        Elementwise(_maximum(_sign), _maximum(_sign), kinks=_bound_kinks),
        Exactness.EXACT_IF_INDEPENDENT,
        "Gaussian, independent operands (Clark 1961)",
    )


def _comparison(above: bool) -> Any:
    def probability(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (a, b), _, _ = bind(("input", "other"), args, kwargs)
        (a, a_var), (b, b_var) = moments(a), moments(b)
        difference = (a - b) if above else (b - a)
        var = (0 if a_var is None else a_var) + (0 if b_var is None else b_var)
        certain = (difference > 0).to(difference.dtype)
        std = torch.where(var > 0, var, 1).sqrt()
        p = torch.where(var > 0, torch.special.ndtr(difference / std), certain)
        return p, p * (1 - p)

    return probability


for _name, _above in (("gt", True), ("ge", True), ("lt", False), ("le", False), ("greater", True), ("less", False)):
    add_rule(
        _name,
        Elementwise(_comparison(_above), _comparison(_above), kinks=_bound_kinks),
        Exactness.EXACT_IF_INDEPENDENT,
        "Gaussian, independent operands; the result is the indicator's mean and variance",
    )


def _where_independent(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """E = p a + (1-p) b, the mixture's variance; operands independent of each other."""
    (condition, a, b), _, _ = bind(("condition", "input", "other"), args, kwargs)
    if getattr(func, "__qualname__", "").startswith("TensorBase") or func is torch.Tensor.where:
        condition, a = a, condition
    p = condition.mean if isinstance(condition, RandomVariable) else condition
    (a, a_var), (b, b_var) = moments(a), moments(b)
    if not isinstance(condition, RandomVariable):
        mean = torch.where(p, a, b)
        return mean, torch.where(p, 0 if a_var is None else a_var, 0 if b_var is None else b_var).to(mean.dtype)
    mean = p * a + (1 - p) * b
    var = p * (0 if a_var is None else a_var) + (1 - p) * (0 if b_var is None else b_var) + p * (1 - p) * (a - b) ** 2
    return mean, _spread(var, mean)


add_rule(
    "where",
    Elementwise(_where_independent, _where_independent),
    Exactness.EXACT_IF_INDEPENDENT,
    "condition and branches are independent, unless all are functions of one variable",
)
for _name in ("logical_not", "logical_and", "logical_or", "bitwise_not", "heaviside", "sign", "sgn", "round", "floor", "ceil", "trunc", "frac"):
    add_rule(_name, Elementwise(None, _delta), Exactness.APPROXIMATE, "a Gaussian input; steps are smoothed by quadrature")


def _squares(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return func(*args, **kwargs)


for _name in ("cumsum",):
    add_rule(_name, FixedLinear(_squares), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
