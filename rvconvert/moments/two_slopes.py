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
    """Of relu(X) and relu(-X): E on the side on which the mean is not, Var there and on the other; phi, M(t), 1/s, above."""
    s, inverse, t = standardize(mean, var)
    phi = density(t)
    mills, h1, h2 = tail(t)
    tail1 = phi * h1
    small = s * tail1
    small_var = var * phi * torch.addcmul(h2, tail1, h1, value=-1)
    large_var = torch.addcmul(var - small_var, torch.add(small, mean.abs()), small, value=-2)  # relu(x) = x + relu(-x)
    return small, small_var, large_var, phi, mills, inverse, step(mean)


def _upper(mean: Tensor, var: Tensor, up: Tensor, up_var: Tensor) -> tuple[Tensor, Tensor]:
    """P(X > 0) and phi/s from the moments of relu(X), which cost a tenth of making them anew.

    E² + Var = (m² + v) P + m s phi and E = m P + s phi: so v P = Var + E (E - m). Beyond ten deviations P is 0 or 1.
    """
    inverse = 1.0 / var.clamp(min=1e-37)
    far = step(torch.addcmul(-100.0 * var, mean, mean))
    above = torch.lerp(torch.addcmul(up_var, up, up - mean) * inverse, step(mean), far)
    slope = torch.addcmul(up, mean, above, value=-1) * inverse
    return above, torch.addcmul(slope, slope, far, value=-1)


def _relu_kernel(mean, var):
    small, small_var, large_var, *_, above = _sides(mean, var)
    return small + torch.clamp(mean, min=0.0), torch.lerp(small_var, large_var, above)


def _relu_backward(mean, var, out, out_var, grad_mean, grad_var):
    above, slope = _upper(mean, var, out, out_var)
    by_mean = torch.addcmul(grad_mean * above, grad_var, torch.addcmul(out, out, above, value=-1), value=2)
    by_var = torch.addcmul(grad_var * torch.addcmul(above, out, slope, value=-1), grad_mean, slope, value=0.5)
    return flushed(by_mean), flushed(by_var)


class _Relu(torch.autograd.Function):
    """Mean and variance of relu(X): paper equations 6 and 9. Saves its inputs, and its results, which the next layer does too."""

    @staticmethod
    def forward(ctx, mean, var):
        out = fused(_relu_kernel, mean, var)
        ctx.save_for_backward(mean, var, *out)
        return out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return fused(_relu_backward, *ctx.saved_tensors, grad_mean, grad_var)


def _two_slopes_kernel(mean, var, c):
    small, small_var, large_var, *_, above = _sides(mean, var)
    up, down = small + torch.clamp(mean, min=0.0), small - torch.clamp(mean, max=0.0)
    up_var = torch.lerp(small_var, large_var, above)
    down_var = (small_var + large_var) - up_var
    return up - c * down, up_var + (c * c) * down_var + (2 * c) * up * down


def _two_slopes_backward(mean, var, c, grad_mean, grad_var):
    small, small_var, large_var, phi, mills, inverse, above = _sides(mean, var)
    below, slope = phi * mills, phi * inverse
    rest = 1.0 - below
    under_var = torch.lerp(large_var, small_var, above)
    above, under = torch.lerp(below, rest, above), torch.lerp(rest, below, above)
    up, down = small + torch.clamp(mean, min=0.0), small - torch.clamp(mean, max=0.0)
    by_mean = above + c * under, 2 * (1.0 - c) * (up * under + c * (down * above))
    var_by_var = (above - up * slope) + (c * c) * (under - down * slope) + c * ((up + down) * slope)
    by_c = -down, 2 * (c * under_var + up * down)
    partials = (by_mean, (0.5 * (1.0 - c) * slope, var_by_var), by_c)
    return tuple(grad_mean * a + grad_var * b for a, b in partials)


def _one_slope_backward(mean, var, out, out_var, grad_mean, grad_var, c):
    # E and Var of relu(X) from those of f = relu(x) - c relu(-x) and of x = relu(x) - relu(-x).
    up = torch.sub(out, mean, alpha=c) / (1.0 - c)
    down = up - mean
    up_var = torch.addcmul(torch.sub(out_var, var, alpha=c * c), up, down, value=-2 * c * (1.0 - c)) / (1.0 - c * c)
    above, slope = _upper(mean, var, up, up_var)
    under = 1.0 - above
    by_mean, var_by_mean = torch.add(above, under, alpha=c), torch.addcmul(up * under, down, above, value=c)
    var_by_var = torch.add(above, under, alpha=c * c)
    var_by_var = torch.addcmul(var_by_var, torch.sub(up, down, alpha=c), slope, value=c - 1.0)
    return (
        flushed(torch.addcmul(grad_mean * by_mean, grad_var, var_by_mean, value=2 * (1.0 - c))),
        flushed(torch.addcmul(grad_var * var_by_var, grad_mean, slope, value=0.5 * (1.0 - c))),
    )


def _folded_backward(mean, var, out, out_var, grad_mean, grad_var, c):
    """Where the slopes are too much alike, or opposite: from the beginning."""
    return tuple(map(flushed, _two_slopes_backward(mean, var, c, grad_mean, grad_var)[:2]))


class _OneSlope(torch.autograd.Function):
    """Mean and variance of relu(X) - c relu(-X), c a number; saves what ``_Relu`` does."""

    @staticmethod
    def forward(ctx, mean, var, c):
        out = fused(_two_slopes_kernel, mean, var, constants=(c,))
        ctx.save_for_backward(mean, var, *out)
        ctx.c = c
        return out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        kernel = _one_slope_backward if abs(ctx.c) < 0.7 else _folded_backward
        return *fused(kernel, *ctx.saved_tensors, grad_mean, grad_var, constants=(ctx.c,)), None


class _TwoSlopes(torch.autograd.Function):
    """The same with c a tensor of the shape of mean; saves (mean, var, c)."""

    @staticmethod
    def forward(ctx, mean, var, c):
        ctx.save_for_backward(mean, var, c)
        return fused(_two_slopes_kernel, mean, var, c)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return fused(_two_slopes_backward, *ctx.saved_tensors, grad_mean, grad_var)


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
