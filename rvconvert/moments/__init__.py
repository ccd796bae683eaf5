"""Moments of elementwise functions of a Gaussian variable: f(mean, var, ...) -> (mean, var) of f(X), X ~ N(mean, var).

Tensors of one shape and dtype in, the same out; parameters are floats, or tensors that broadcast where the docstring says
so. Half-precision inputs are computed in float32. var = 0 gives (f(mean), 0) and finite gradients.
"""

from rvconvert.moments.closed_form import cos, cosh, exp, exp2, expm1, sin, sinh, square, wave
from rvconvert.moments.lognormal import log, positive_power, power, reciprocal, rsqrt, sqrt
from rvconvert.moments.piecewise import (
    celu,
    clamp,
    elu,
    hardshrink,
    hardsigmoid,
    hardswish,
    hardtanh,
    relu6,
    selu,
    softshrink,
    softsign,
    threshold,
)
from rvconvert.moments.smooth import erf, gelu, logsigmoid, mish, sigmoid, silu, softplus, tanh
from rvconvert.moments.two_slopes import absolute, leaky_relu, relu

__all__ = [
    "absolute",
    "celu",
    "clamp",
    "cos",
    "cosh",
    "elu",
    "erf",
    "exp",
    "exp2",
    "expm1",
    "gelu",
    "hardshrink",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "log",
    "logsigmoid",
    "mish",
    "positive_power",
    "power",
    "reciprocal",
    "relu",
    "relu6",
    "rsqrt",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "sinh",
    "softplus",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tanh",
    "threshold",
    "wave",
]
