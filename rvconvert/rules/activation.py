"""Activations and other functions of one element: moments from ``rvconvert.moments``, quadrature for the rest."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from rvconvert import moments as gaussian
from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import Exactness
from rvconvert.rules.ancestry import Interval, anywhere, everywhere, not_everywhere
from rvconvert.rules.calls import bind
from rvconvert.rules.intervals import OFF_ZERO, POSITIVE, is_bounded, keeps_above, monotone, of_clamp, within
from rvconvert.rules.kinds import Composite, Elementwise, Shape, add_rule, first_order
from rvconvert.rules.relations import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

_GAUSSIAN = "a Gaussian input"


def closed_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """Moments by a function of ``gaussian``; its parameters are bound by the names it gives them."""
    names = list(inspect.signature(function).parameters)[2:]

    def moments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = random_variables(args, kwargs)[0]
        values, _, _ = bind(("input", *names), args, kwargs)
        return function(x.mean, x.var, **{n: v for n, v in zip(names, values[1:], strict=True) if v is not None})

    return moments


def kinks_of(positions: Callable[..., tuple[float, ...]]) -> Callable[..., tuple[float, ...]]:
    """Where a function is not smooth, from its own arguments: ``positions`` names and defaults those it needs."""
    names = list(inspect.signature(positions).parameters)

    def kinks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
        values, _, _ = bind(("input", *names), args, kwargs)
        return positions(**{n: v for n, v in zip(names, values[1:], strict=True) if v is not None})

    return kinks


_INTERVALS = {
    **dict.fromkeys("softplus abs absolute exp exp2 square".split(), POSITIVE),
    **dict.fromkeys("hardsigmoid ndtr".split(), (0.0, 1.0)),
    "sigmoid": (POSITIVE[0], 1.0),
    "relu": (0.0, math.inf),
    **dict.fromkeys("tanh softsign erf sin cos".split(), (-1.0, 1.0)),
    **dict.fromkeys(("cosh", "i0"), (1.0, math.inf)),
    "relu6": (0.0, 6.0),
    "erfc": (0.0, 2.0),
    "expm1": (-1.0, math.inf),
    "logsigmoid": (-math.inf, 0.0),
}


@dataclass(frozen=True)
class Exponential(Elementwise):
    """The exponential, which knows a log-softmax: its results are probabilities, and sum to 1."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        rows = rows_of(random_variables(args, kwargs)[0], "logsumexp")
        if rows is not None and rows.shifted:
            return torch.softmax(rows.of, rows.dim)  # type: ignore[return-value, arg-type]
        return super().__call__(func, args, kwargs)


def _interval_of(name: str) -> Callable[..., Interval]:
    return within(*_INTERVALS[name]) if name in _INTERVALS else anywhere


def _activation(
    name: str,
    function: Callable[..., Any],
    *modules: type[nn.Module],
    kinks: Callable[..., tuple[float, ...]] | None = None,
) -> None:
    kind = (Exponential if name == "exp" else Elementwise)(
        closed_form(function),
        kinks=kinks and kinks_of(kinks),
        joins=everywhere if name in ("exp", "exp2", "expm1", "sinh", "cosh") else not_everywhere,
        result_alone=name in ("tanh", "sigmoid"),
        interval=_interval_of(name),
    )
    add_rule(name, kind, Exactness.MOMENT_MATCHED, _GAUSSIAN, modules=modules)


def _at_zero() -> tuple[float, ...]:
    return (0.0,)


_activation("relu", gaussian.relu, nn.ReLU, kinks=_at_zero)
_activation("leaky_relu", gaussian.leaky_relu, nn.LeakyReLU, kinks=_at_zero)
_activation("relu6", gaussian.relu6, nn.ReLU6, kinks=lambda: (0.0, 6.0))
_activation("hardtanh", gaussian.hardtanh, nn.Hardtanh, kinks=lambda min_val=-1.0, max_val=1.0: (min_val, max_val))
_activation("hardsigmoid", gaussian.hardsigmoid, nn.Hardsigmoid, kinks=lambda: (-3.0, 3.0))
_activation("hardswish", gaussian.hardswish, nn.Hardswish, kinks=lambda: (-3.0, 3.0))
_activation("hardshrink", gaussian.hardshrink, nn.Hardshrink, kinks=lambda lambd=0.5: (-lambd, lambd))
_activation("softshrink", gaussian.softshrink, nn.Softshrink, kinks=lambda lambd=0.5: (-lambd, lambd))
_activation("threshold", gaussian.threshold, nn.Threshold, kinks=lambda threshold=0.0: (threshold,))
_activation("elu", gaussian.elu, nn.ELU, kinks=_at_zero)
_activation("selu", gaussian.selu, nn.SELU, kinks=_at_zero)
_activation("celu", gaussian.celu, nn.CELU, kinks=_at_zero)
_activation("gelu", gaussian.gelu, nn.GELU)
_activation("silu", gaussian.silu, nn.SiLU)
_activation("tanh", gaussian.tanh, nn.Tanh)
_activation("sigmoid", gaussian.sigmoid, nn.Sigmoid)
_activation("softplus", gaussian.softplus, nn.Softplus)
_activation("mish", gaussian.mish, nn.Mish)
_activation("softsign", gaussian.softsign, nn.Softsign)
_activation("logsigmoid", gaussian.logsigmoid, nn.LogSigmoid)
_activation("abs", gaussian.absolute, kinks=_at_zero)
_activation("absolute", gaussian.absolute, kinks=_at_zero)
_activation("exp", gaussian.exp)
_activation("exp2", gaussian.exp2)
_activation("expm1", gaussian.expm1)
_activation("square", gaussian.square)
_activation("sin", gaussian.sin)
_activation("sinh", gaussian.sinh)
_activation("cosh", gaussian.cosh)
_activation("cos", gaussian.cos)
_activation("erf", gaussian.erf)


def _of_positive(
    name: str,
    moments: Callable[..., Any],
    function: Callable[[float], float],
    least: float = 0.0,
    assumption: str = "a positive, lognormal input, or a function of a Gaussian that keeps above 0",
) -> None:
    """A monotone function that is defined above ``least``: of what is known to keep above it, one function with that."""
    inside = keeps_above(least if name != "rsqrt" else OFF_ZERO)
    kind = Elementwise(moments, whole_line=inside, joins=inside, interval=monotone(function, least))
    add_rule(name, kind, Exactness.APPROXIMATE, assumption)


def _logarithm(base: float, shift: float = 0.0) -> Any:
    def moments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = random_variables(args, kwargs)[0]
        return gaussian.log(x.mean + shift, x.var, base)

    return moments


_of_positive("sqrt", closed_form(gaussian.sqrt), math.sqrt)
_of_positive("rsqrt", closed_form(gaussian.rsqrt), lambda x: x**-0.5)
_of_positive("log", closed_form(gaussian.log), math.log)
_of_positive("log2", _logarithm(2.0), math.log2)
_of_positive("log10", _logarithm(10.0), math.log10)
_of_positive("log1p", _logarithm(math.e, 1.0), math.log1p, -1.0, "1 + x is positive and lognormal, or as for log")


def _clamp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x, low, high), _, _ = bind(("input", "min", "max"), args, kwargs)
    if any(isinstance(each, RandomVariable) for each in (low, high)) or not isinstance(x, RandomVariable):
        out = x if low is None else torch.maximum(x, low)
        out = out if high is None else torch.minimum(out, high)
        return out.mean, out.var
    shape = torch.broadcast_shapes(*(each.shape for each in (x, low, high) if hasattr(each, "shape")))
    return gaussian.clamp(x.mean.expand(shape), x.var.expand(shape), low, high)


def _clamp_kinks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(b) for b in (*args[1:], *kwargs.values()) if isinstance(b, (int, float)))


_CLAMP = Elementwise(_clamp, _clamp, kinks=_clamp_kinks, joins=is_bounded, interval=of_clamp)
for _name in ("clamp", "clip"):
    add_rule(_name, _CLAMP, Exactness.MOMENT_MATCHED, _GAUSSIAN)


def _clamp_min(input: Any, min: Any) -> Any:
    return torch.clamp(input, min=min)


def _clamp_max(input: Any, max: Any) -> Any:
    return torch.clamp(input, max=max)


add_rule("clamp_min", Composite(_clamp_min), Exactness.MOMENT_MATCHED, _GAUSSIAN)
add_rule("clamp_max", Composite(_clamp_max), Exactness.MOMENT_MATCHED, _GAUSSIAN)


def _prelu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x, weight), _, _ = bind(("input", "weight"), args, kwargs)
    if weight.numel() > 1:
        weight = weight.reshape(1, -1, *(1,) * (x.ndim - 2))
    return gaussian.leaky_relu(x.mean, x.var, weight)


add_rule("prelu", Elementwise(_prelu, kinks=kinks_of(_at_zero)), Exactness.MOMENT_MATCHED, _GAUSSIAN, modules=(nn.PReLU,))


def _rrelu(input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Any:
    """Eval: the middle slope. Training: the slope is uniform, so its variance adds to the negative side's."""
    slope = (lower + upper) / 2
    out: Any = F.leaky_relu(input, slope)
    if not training:
        return out
    negative: Any = F.relu(-input)
    second = negative.var + negative.mean.square()
    return out.with_moments(out.mean, out.var + (upper - lower) ** 2 / 12 * second)


add_rule("rrelu", Composite(_rrelu), Exactness.MOMENT_MATCHED, _GAUSSIAN, modules=(nn.RReLU,))

_BY_QUADRATURE = "atan arctan asinh arcsinh erfc sinc i0 i0e i1e ndtr tanhshrink log_ndtr".split()
_QUADRATURE_MODULES: dict[str, tuple[type[nn.Module], ...]] = {"tanhshrink": (nn.Tanhshrink,)}
for _name in _BY_QUADRATURE:
    _modules = _QUADRATURE_MODULES.get(_name, ())
    _kind = Elementwise(interval=_interval_of(_name))
    add_rule(_name, _kind, Exactness.MOMENT_MATCHED, "a Gaussian input; quadrature", modules=_modules)

# Defined on a part of the line, or with poles: a Gaussian has no moments under them.
_PARTIAL = "asin acos atanh acosh arcsin arccos arctanh arccosh tan logit erfinv lgamma digamma".split()
for _name in _PARTIAL:
    _kind = Elementwise(first_order, whole_line=not_everywhere)
    add_rule(_name, _kind, Exactness.APPROXIMATE, "first order at the mean, inside the domain")
add_rule("nan_to_num", Shape(), Exactness.EXACT, "no element is NaN or infinite")


def _glu(input: Any, dim: int = -1) -> Any:
    first, second = torch.chunk(input, 2, dim)
    return first * torch.sigmoid(second)


add_rule("glu", Composite(_glu), Exactness.MOMENT_MATCHED, "the halves are independent and Gaussian", modules=(nn.GLU,))
