"""Activations and other functions of one element: closed forms from ``gaussian``, quadrature for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rvconvert.random_variable import random_variables
from rvconvert.registry import Exactness
from rvconvert.rules import gaussian
from rvconvert.rules.kinds import Composite, Elementwise, add_rule, bind

_GAUSSIAN = "a Gaussian input"


def closed_form(function: Callable[..., Any]) -> Callable[..., Any]:
    """Moments by a function of ``gaussian``; its parameters are bound by the names it gives them."""
    names = list(inspect.signature(function).parameters)[2:]

    def moments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = random_variables(args, kwargs)[0]
        values, _, _ = bind(("input", *names), args, kwargs)
        return function(x.mean, x.var, **{n: v for n, v in zip(names, values[1:], strict=True) if v is not None})

    return moments


def _activation(
    name: str,
    function: Callable[..., Any],
    *modules: type[nn.Module],
    kinks: Sequence[float] = (),
    functions: Sequence[Callable[..., Any]] | None = None,
    exactness: Exactness = Exactness.MOMENT_MATCHED,
    assumption: str = _GAUSSIAN,
) -> None:
    kind = Elementwise(closed_form(function), kinks=(lambda args, kwargs: tuple(kinks)) if kinks else None)
    add_rule(name, kind, exactness, assumption, modules=modules, functions=functions)


_activation("relu", gaussian.relu, nn.ReLU, kinks=(0.0,))
_activation("leaky_relu", gaussian.leaky_relu, nn.LeakyReLU, kinks=(0.0,))
_activation("relu6", gaussian.relu6, nn.ReLU6, kinks=(0.0, 6.0))
_activation("hardtanh", gaussian.hardtanh, nn.Hardtanh, kinks=(-1.0, 1.0))
_activation("hardsigmoid", gaussian.hardsigmoid, nn.Hardsigmoid, kinks=(-3.0, 3.0))
_activation("hardswish", gaussian.hardswish, nn.Hardswish, kinks=(-3.0, 3.0))
_activation("hardshrink", gaussian.hardshrink, nn.Hardshrink, kinks=(-0.5, 0.5))
_activation("softshrink", gaussian.softshrink, nn.Softshrink, kinks=(-0.5, 0.5))
_activation("threshold", gaussian.threshold, nn.Threshold)
_activation("elu", gaussian.elu, nn.ELU, kinks=(0.0,))
_activation("selu", gaussian.selu, nn.SELU, kinks=(0.0,))
_activation("celu", gaussian.celu, nn.CELU, kinks=(0.0,))
_activation("gelu", gaussian.gelu, nn.GELU)
_activation("silu", gaussian.silu, nn.SiLU)
_activation("tanh", gaussian.tanh, nn.Tanh)
_activation("sigmoid", gaussian.sigmoid, nn.Sigmoid)
_activation("softplus", gaussian.softplus, nn.Softplus)
_activation("mish", gaussian.mish, nn.Mish)
_activation("softsign", gaussian.softsign, nn.Softsign)
_activation("logsigmoid", gaussian.logsigmoid, nn.LogSigmoid)
_activation("abs", gaussian.absolute, kinks=(0.0,))
_activation("absolute", gaussian.absolute, kinks=(0.0,))
_activation("exp", gaussian.exp)
_activation("expm1", gaussian.expm1)
_activation("square", gaussian.square)
_activation("sin", gaussian.sin)
_activation("cos", gaussian.cos)
_activation("erf", gaussian.erf)
_DELTA = "first and second order at the mean; the input must stay away from where the function is singular"
for _name, _function in (("sqrt", gaussian.sqrt), ("rsqrt", gaussian.rsqrt), ("log", gaussian.log)):
    _activation(_name, _function, exactness=Exactness.APPROXIMATE, assumption=_DELTA)


def _clamp_moments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (x, low, high), _, _ = bind(("input", "min", "max"), args, kwargs)
    return gaussian.clamp(x.mean, x.var, low, high)


def _clamp_kinks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    bounds = (*args[1:], *kwargs.values())
    return tuple(float(b) for b in bounds if isinstance(b, (int, float)))


for _name in ("clamp", "clip"):
    add_rule(_name, Elementwise(_clamp_moments, kinks=_clamp_kinks), Exactness.MOMENT_MATCHED, _GAUSSIAN)


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


add_rule(
    "prelu", Elementwise(_prelu, kinks=lambda args, kwargs: (0.0,)), Exactness.MOMENT_MATCHED, _GAUSSIAN, modules=(nn.PReLU,)
)


def _rrelu(input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Any:
    """Eval: the middle slope. Training: the slope is uniform, so its variance adds to the negative side's."""
    slope = (lower + upper) / 2
    out = F.leaky_relu(input, slope)
    if not training:
        return out
    negative = F.relu(-input)
    second = negative.var + negative.mean.square()
    return out.with_moments(out.mean, out.var + (upper - lower) ** 2 / 12 * second)


add_rule("rrelu", Composite(_rrelu), Exactness.MOMENT_MATCHED, _GAUSSIAN, modules=(nn.RReLU,))

_BY_QUADRATURE = (
    "sinh cosh tan asin acos atan arcsin arccos arctan asinh acosh atanh arcsinh arctanh erfc erfinv exp2 log1p log2 "
    "log10 logit sinc i0 ndtr lgamma digamma tanhshrink special_erfcx erfcx log_ndtr deg2rad rad2deg nan_to_num float_power"
).split()
_QUADRATURE_MODULES: dict[str, tuple[type[nn.Module], ...]] = {"tanhshrink": (nn.Tanhshrink,)}
for _name in _BY_QUADRATURE:
    add_rule(
        _name, Elementwise(), Exactness.MOMENT_MATCHED, "a Gaussian input; quadrature", modules=_QUADRATURE_MODULES.get(_name, ())
    )


def _glu(input: Any, dim: int = -1) -> Any:
    first, second = torch.chunk(input, 2, dim)
    return first * torch.sigmoid(second)


add_rule("glu", Composite(_glu), Exactness.MOMENT_MATCHED, "the halves are independent and Gaussian", modules=(nn.GLU,))
