"""Exponential, polynomial and trigonometric functions, in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rvconvert.moments.normal import Moments, affine, at_least_float32, step

_LN_2 = math.log(2)


@at_least_float32
def exp(mean: Tensor, var: Tensor) -> Moments:
    """e^x, exact: the lognormal law."""
    expected = torch.exp(mean + 0.5 * var)
    return expected, torch.expm1(var) * expected * expected


def exp2(mean: Tensor, var: Tensor) -> Moments:
    """2^x, exact."""
    return exp(mean * _LN_2, var * _LN_2**2)


@at_least_float32
def expm1(mean: Tensor, var: Tensor) -> Moments:
    """e^x - 1, exact."""
    expected = torch.exp(mean + 0.5 * var)
    return torch.expm1(mean + 0.5 * var), torch.expm1(var) * expected * expected


@at_least_float32
def square(mean: Tensor, var: Tensor) -> Moments:
    """x², exact."""
    return mean * mean + var, 2 * var * (var + 2 * mean * mean)


@at_least_float32
def sinh(mean: Tensor, var: Tensor) -> Moments:
    """sinh x, exact."""
    return torch.exp(0.5 * var) * torch.sinh(mean), 0.5 * torch.expm1(var) * (torch.exp(var) * torch.cosh(2 * mean) + 1)


@at_least_float32
def cosh(mean: Tensor, var: Tensor) -> Moments:
    """cosh x, exact."""
    # e^v cosh 2m - 1 without cancellation.
    excess = torch.expm1(var) + 2 * torch.exp(var) * torch.sinh(mean).square()
    return torch.exp(0.5 * var) * torch.cosh(mean), 0.5 * torch.expm1(var) * excess


@at_least_float32
def sin(mean: Tensor, var: Tensor) -> Moments:
    """sin x, exact."""
    shrink, spread = torch.exp(-0.5 * var), -torch.expm1(-var)
    return shrink * torch.sin(mean), 0.5 * spread * (spread + 2 * (shrink * torch.cos(mean)) ** 2)


@at_least_float32
def cos(mean: Tensor, var: Tensor) -> Moments:
    """cos x, exact."""
    shrink, spread = torch.exp(-0.5 * var), -torch.expm1(-var)
    return shrink * torch.cos(mean), 0.5 * spread * (spread + 2 * (shrink * torch.sin(mean)) ** 2)


@at_least_float32
def wave(
    mean: Tensor,
    var: Tensor,
    slope: float | Tensor,
    height: float | Tensor,
    rate: float | Tensor,
    phase: float | Tensor,
    turns: int = 0,
    raised: bool = False,
) -> Moments:
    """slope x + height cos(rate x + phase + turns pi/2), exact; the first four broadcast and get their gradients.

    ``raised``: height (1 + cos(...)), as the square of a sine is, without cancellation. With t = rate² v and M the mean of the
    angle, the variance is that of the line of best fit and of what it leaves:

        v (slope - height rate e^(-t/2) sin M)² + height² e^-t ((sinh t - t) + (t - 1 + e^-t) cos² M).
    """
    half, t = 0.5 * rate * mean + 0.5 * phase, rate * rate * var
    drop = torch.expm1(-0.5 * t)  # of which the other exponentials are made
    shrink = 1 + drop
    loss = torch.addcmul(drop, drop, shrink)
    sine = torch.sin(half)
    square, product = sine * sine, sine * torch.cos(half)
    cosine, sine = shrink * affine(square, -2, 1), 2 * shrink * product
    cosine, sine = ((cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine))[turns % 4]
    expected = 1 + cosine if raised else cosine
    if raised and turns % 4 == 2:
        expected = 2 * shrink * square - drop
    small = step((0.01 if t.dtype == torch.float64 else 0.05) - t.detach())
    near, left = t * small, 1 + loss  # near: where the differences would be lost to rounding
    near2 = near * near
    odd = torch.lerp(-0.5 * loss * (1 + left) - t * left, near * near2 * left * affine(near2, 1 / 120, 1 / 6), small)
    series = torch.addcmul(affine(near, -1 / 6, 0.5), near2, affine(near, -1 / 120, 1 / 24))
    even = torch.lerp(t + loss, near2 * series, small)
    gain = slope - height * rate * sine
    rest = torch.addcmul(odd, cosine * cosine, even)
    return slope * mean + height * expected, gain * gain * var + height * height * rest
