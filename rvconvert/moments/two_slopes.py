"""One slope above 0, another one below: relu, leaky_relu, absolute.

Notation: s = sqrt(var), t = abs(mean)/s, phi the standard normal density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.normal import Moments, at_least_float32, standardize, step, tail
from rvconvert.moments.quadrature import density, flushed


def _sides(mean: Tensor, var: Tensor):
    """Of relu(X) and relu(-X): E on the side on which the mean is not, Var there and on the other; phi/s, Phi(-t), above."""
    s, inverse, t = standardize(mean, var)
    phi = density(t)
    mills, h1, h2 = tail(t)
    tail1 = phi * h1
    small = s * tail1
    small_var = var * phi * torch.addcmul(h2, tail1, h1, value=-1)
    large_var = torch.addcmul(var - small_var, torch.add(small, mean.abs()), small, value=-2)  # relu(x) = x + relu(-x)
    return small, small_var, large_var, phi * inverse, phi * mills, step(mean)


def _relu_kernel(mean, var):
    small, small_var, large_var, _, _, above = _sides(mean, var)
    return small + torch.clamp(mean, min=0.0), torch.lerp(small_var, large_var, above)


def _relu_backward(mean, var, grad_mean, grad_var):
    small, _, _, slope, below, above = _sides(mean, var)
    above = torch.lerp(below, 1.0 - below, above)  # P(X > 0)
    expected = small + torch.clamp(mean, min=0.0)
    by_mean = torch.addcmul(grad_mean * above, grad_var, torch.addcmul(expected, expected, above, value=-1), value=2)
    by_var = torch.addcmul(grad_mean * (0.5 * slope), grad_var, torch.addcmul(above, expected, slope, value=-1))
    return flushed(by_mean), flushed(by_var)


class _Relu(torch.autograd.Function):
    """Mean and variance of relu(X): paper equations 6 and 9. Saves (mean, var) only."""

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        return fused(_relu_kernel, mean, var)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return fused(_relu_backward, *ctx.saved_tensors, grad_mean, grad_var)


def _two_slopes_kernel(mean, var, c):
    small, small_var, large_var, _, _, above = _sides(mean, var)
    up, down = small + torch.clamp(mean, min=0.0), small - torch.clamp(mean, max=0.0)
    up_var = torch.lerp(small_var, large_var, above)
    down_var = (small_var + large_var) - up_var
    return up - c * down, up_var + (c * c) * down_var + (2 * c) * up * down


def _two_slopes_partials(mean, var, c):
    """The gradients of mean and variance by mean, by var and by c."""
    small, small_var, large_var, slope, below, above = _sides(mean, var)
    rest = 1.0 - below
    under_var = torch.lerp(large_var, small_var, above)
    above, under = torch.lerp(below, rest, above), torch.lerp(rest, below, above)
    up, down = small + torch.clamp(mean, min=0.0), small - torch.clamp(mean, max=0.0)
    by_mean = above + c * under, 2 * (1.0 - c) * (up * under + c * (down * above))
    var_by_var = (above - up * slope) + (c * c) * (under - down * slope) + c * ((up + down) * slope)
    by_c = -down, 2 * (c * under_var + up * down)
    return by_mean, (0.5 * (1.0 - c) * slope, var_by_var), by_c


def _two_slopes_backward(mean, var, grad_mean, grad_var, c):
    by_mean, by_var, _ = _two_slopes_partials(mean, var, c)
    return tuple(flushed(grad_mean * a + grad_var * b) for a, b in (by_mean, by_var))


def _two_slopes_backward_by_slope(mean, var, c, grad_mean, grad_var):
    return tuple(grad_mean * a + grad_var * b for a, b in _two_slopes_partials(mean, var, c))


class _OneSlope(torch.autograd.Function):
    """Mean and variance of relu(X) - c relu(-X), c a number; saves (mean, var)."""

    @staticmethod
    def forward(ctx, mean, var, c):
        ctx.save_for_backward(mean, var)
        ctx.c = c
        return fused(_two_slopes_kernel, mean, var, constants=(c,))

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return *fused(_two_slopes_backward, *ctx.saved_tensors, grad_mean, grad_var, constants=(ctx.c,)), None


class _TwoSlopes(torch.autograd.Function):
    """The same with c a tensor of the shape of mean; saves (mean, var, c)."""

    @staticmethod
    def forward(ctx, mean, var, c):
        ctx.save_for_backward(mean, var, c)
        return fused(_two_slopes_kernel, mean, var, c)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return fused(_two_slopes_backward_by_slope, *ctx.saved_tensors, grad_mean, grad_var)


@at_least_float32
def relu(mean: Tensor, var: Tensor) -> Moments:
    """max(x, 0), exact (paper equations 6, 9; Frey and Hinton 1999)."""
    return _Relu.apply(mean, var)


@at_least_float32
def leaky_relu(mean: Tensor, var: Tensor, negative_slope: float | Tensor = 0.01) -> Moments:
    """x above 0, negative_slope x below, exact; the slope may be a tensor that broadcasts (PReLU, RReLU)."""
    if isinstance(negative_slope, Tensor):
        return _TwoSlopes.apply(mean, var, negative_slope.to(mean).expand_as(mean))
    return _OneSlope.apply(mean, var, float(negative_slope))


@at_least_float32
def absolute(mean: Tensor, var: Tensor) -> Moments:
    """abs(x), exact: the folded normal law."""
    return _OneSlope.apply(mean, var, -1.0)
