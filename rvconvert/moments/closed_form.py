"""Exponential, polynomial and trigonometric functions, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32


@at_least_float32
def exp(mean: Tensor, var: Tensor) -> Moments:
    """e^x, exact: the lognormal law."""
    expected = torch.exp(mean + 0.5 * var)
    return expected, torch.expm1(var) * expected * expected


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
