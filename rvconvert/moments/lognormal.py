"""Powers, roots and logarithms: a positive variable, taken as lognormal.

A Gaussian has no moments under a negative or fractional power or a logarithm (x <= 0 has positive probability).
A positive variable with the same mean and variance does: the lognormal one, with r = var/mean^2 its deviation's
square relative to the mean. To first order in r this is the expansion at the mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32


def _relative(mean: Tensor, var: Tensor) -> Tensor:
    """r = var/mean^2; 0 where nothing varies. Bounded, so that a mean of 0 has finite gradients."""
    square = mean * mean
    varies = (var > 0) & (square > 0)
    return torch.clamp(torch.where(varies, var, 0) / torch.where(varies, square, 1), max=1e6)


@at_least_float32
def power(mean: Tensor, var: Tensor, exponent: float) -> Moments:
    """x^exponent: exact for 0, 1, 2, ..., else of a lognormal variable."""
    if exponent >= 0 and exponent == int(exponent):
        return _whole_power(mean, var, int(exponent))
    return positive_power(mean, var, exponent)


@at_least_float32
def positive_power(mean: Tensor, var: Tensor, exponent: float | Tensor) -> Moments:
    """x^exponent of a lognormal variable, whatever the exponent."""
    r = _relative(mean, var)
    log_scale = torch.log1p(r)
    # The root of 0 has an infinite slope; with nothing varying it adds nothing to the variance.
    base = torch.where(r > 0, mean, 1)
    out = torch.pow(mean, exponent) * torch.exp(0.5 * exponent * (exponent - 1) * log_scale)
    spread = torch.pow(base, exponent) ** 2 * torch.exp(exponent * (exponent - 1) * log_scale)
    return out, spread * torch.expm1(exponent * exponent * log_scale)


def _whole_power(mean: Tensor, var: Tensor, exponent: int) -> Moments:
    """E[X^p] = m E[X^(p-1)] + (p-1) v E[X^(p-2)] (Stein); Var[f(X)] = sum_k v^k E[f^(k)(X)]^2 / k!, no term negative."""
    raw = [torch.ones_like(mean), mean]
    for p in range(2, exponent + 1):
        raw.append(mean * raw[p - 1] + (p - 1) * var * raw[p - 2])
    out_var = torch.zeros_like(var)
    for k in range(1, exponent + 1):
        out_var = out_var + (math.perm(exponent, k) * raw[exponent - k]).square() * var**k / math.factorial(k)
    return raw[exponent], out_var


def reciprocal(mean: Tensor, var: Tensor) -> Moments:
    """1/x of a lognormal variable."""
    return power(mean, var, -1.0)


def sqrt(mean: Tensor, var: Tensor) -> Moments:
    """√x of a lognormal variable."""
    return power(mean, var, 0.5)


def rsqrt(mean: Tensor, var: Tensor) -> Moments:
    """1/√x of a lognormal variable."""
    return power(mean, var, -0.5)


@at_least_float32
def log(mean: Tensor, var: Tensor, base: float = math.e) -> Moments:
    """log x of a lognormal variable, exact for one; to any base."""
    scale = 1.0 / math.log(base)
    log_scale = torch.log1p(_relative(mean, var))
    return (torch.log(mean) - 0.5 * log_scale) * scale, log_scale * (scale * scale)
