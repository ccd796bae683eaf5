"""One slope above 0, another one below: relu, leaky_relu, absolute.

All follow from E and Var of relu(X). With s = sqrt(var) and a = mean/s they are max(mean, 0) + s T(abs(a)) and var V(a): two
functions of one number, in float64 in closed form, in float32 from a table of that form's logarithms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.normal import Moments, at_least_float32, mills, standardize, step
from rvconvert.moments.quadrature import density
from rvconvert.moments.table import Curve, Grid, as_table, in_images, table_of

_GRID = Grid(end=14, in_p=1 << 14, in_q=0, spacing=0)  # of a alone; beyond the ends, V and T are what they are there


def _closed(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s T(abs(a)) and the two moments, in float64.

    With Z standard normal, U = max(Z - t, 0), t >= 0, phi the density and M the Mills ratio, E[U] is phi h1 and E[U²] is
    phi h2, h1 = 1 - t M and h2 = (1 + t²) M - t.
    """
    s, _, t = standardize(mean, var)
    t = t.clamp(max=38.0)  # beyond which phi is 0
    phi = density(t)
    m = mills(t)
    h1 = 1.0 - t * m
    h2 = m - t * h1
    tail1 = phi * h1
    small = s * tail1
    small_var = var * phi * torch.addcmul(h2, tail1, h1, value=-1)
    large_var = torch.addcmul(var - small_var, torch.add(small, mean.abs()), small, value=-2)  # relu(x) = x + relu(-x)
    return small, small + mean.clamp(min=0.0), torch.lerp(small_var, large_var, step(mean))


class _Rectified(Curve):
    """The logarithms of V and T."""

    def fill(self) -> tuple[Tensor, ...]:
        """(1, 2, 1, corners)."""
        a = torch.from_numpy(_GRID.corners()[0])
        small, _, ratio = _closed(a, torch.ones_like(a))
        return (as_table(torch.stack((ratio, small))[:, None].log2().numpy()),)


_RECTIFIED = _Rectified(torch.relu)


def _table(mean: Tensor) -> Tensor | None:
    return None if mean.dtype == torch.float64 else table_of(_RECTIFIED.number, mean.device)[0]


def _upper(mean: Tensor, var: Tensor, up: Tensor, up_var: Tensor) -> tuple[Tensor, Tensor]:
    """P(X > 0) and phi/s from the moments of relu(X), which cost a tenth of making them anew.

    E² + Var = (m² + v) P + m s phi and E = m P + s phi: so v P = Var + E (E - m). Beyond ten deviations P is 0 or 1.
    """
    inverse = var.clamp(min=1e-37).reciprocal_()
    far = step((-100.0 * var).addcmul_(mean, mean))
    above = torch.addcmul(up_var, up, up - mean).mul_(inverse).lerp_(step(mean), far)
    slope = torch.addcmul(up, mean, above, value=-1).mul_(inverse)
    return above, torch.addcmul(slope, slope, far, value=-1)


def _relu_kernel(mean, var, table):
    if table is None:
        return _closed(mean, var)[1:]
    inverse = (var + 1e-37).rsqrt_()
    x = (mean * inverse).mul_(1 / _GRID.end)
    ratio, small = (each.exp2() for each in _GRID.bilinear(table, x, torch.zeros_like(x)))
    return mean.clamp(min=0.0).addcmul_(inverse.mul_(var), small), ratio.mul_(var)


def _relu_backward(mean, var, out, out_var, grad_mean, grad_var):
    above, slope = _upper(mean, var, out, out_var)
    by_mean = (grad_mean * above).addcmul_(grad_var, torch.addcmul(out, out, above, value=-1), value=2)
    by_var = torch.addcmul(above, out, slope, value=-1).mul_(grad_var).addcmul_(grad_mean, slope, value=0.5)
    return by_mean, by_var


class _Relu(torch.autograd.Function):
    """Mean and variance of relu(X): paper equations 6 and 9. Saves its inputs, and its results, which the next layer does too."""

    @staticmethod
    def forward(ctx, mean, var):
        out = fused(in_images, mean, var, constants=(_relu_kernel, (_table(mean),)))
        ctx.save_for_backward(mean, var, *out)
        return out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return fused(_relu_backward, *ctx.saved_tensors, grad_mean, grad_var)


def _two_slopes_kernel(mean, var, c, table):
    # f = (1 - c) relu(x) + c x, and Cov(relu(X), X) = Var relu(X) + E (E - m)
    up, up_var = _relu_kernel(mean, var, table)
    both, out_var = up * (up - mean), torch.lerp(up_var, var, c * c)
    share = 2 * c * (1.0 - c)
    out_var = torch.addcmul(out_var, both, share) if isinstance(c, Tensor) else torch.add(out_var, both, alpha=share)
    return torch.lerp(up, mean, c), out_var


def _two_slopes_backward(mean, var, c, grad_mean, grad_var, table):
    up, up_var = _relu_kernel(mean, var, table)
    above, slope = _upper(mean, var, up, up_var)
    down, under = up - mean, 1.0 - above
    by_mean = above + c * under, 2 * (1.0 - c) * (up * under + c * (down * above))
    var_by_var = (above - up * slope) + (c * c) * (under - down * slope) + c * ((up + down) * slope)
    by_c = -down, 2 * (c * (var - up_var) + (1.0 - 2.0 * c) * (up * down))
    partials = (by_mean, (0.5 * (1.0 - c) * slope, var_by_var), by_c)
    return tuple(grad_mean * a + grad_var * b for a, b in partials)


def _one_slope_backward(mean, var, out, out_var, grad_mean, grad_var, c):
    # E and Var of relu(X) from those of f = relu(x) - c relu(-x) and of x = relu(x) - relu(-x).
    up = torch.sub(out, mean, alpha=c).div_(1.0 - c)
    down = up - mean
    up_var = torch.sub(out_var, var, alpha=c * c).addcmul_(up, down, value=-2 * c * (1.0 - c)).div_(1.0 - c * c)
    above, slope = _upper(mean, var, up, up_var)
    under = 1.0 - above
    by_mean, var_by_mean = torch.add(above, under, alpha=c), (up * under).addcmul_(down, above, value=c)
    var_by_var = torch.add(above, under, alpha=c * c).addcmul_(torch.sub(up, down, alpha=c), slope, value=c - 1.0)
    return (
        by_mean.mul_(grad_mean).addcmul_(grad_var, var_by_mean, value=2 * (1.0 - c)),
        var_by_var.mul_(grad_var).addcmul_(grad_mean, slope, value=0.5 * (1.0 - c)),
    )


def _folded_backward(mean, var, out, out_var, grad_mean, grad_var, c):
    """Where the slopes are too much alike, or opposite: from the beginning."""
    return _two_slopes_backward(mean, var, c, grad_mean, grad_var, _table(mean))[:2]


class _OneSlope(torch.autograd.Function):
    """Mean and variance of relu(X) - c relu(-X), c a number; saves what ``_Relu`` does."""

    @staticmethod
    def forward(ctx, mean, var, c):
        out = fused(in_images, mean, var, constants=(_two_slopes_kernel, (c, _table(mean))))
        ctx.save_for_backward(mean, var, *out)
        ctx.c = c
        return out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        kernel = _one_slope_backward if abs(ctx.c) < 0.7 else _folded_backward
        return *fused(in_images, *ctx.saved_tensors, grad_mean, grad_var, constants=(kernel, (ctx.c,))), None


class _TwoSlopes(torch.autograd.Function):
    """The same with c a tensor of the shape of mean; saves (mean, var, c)."""

    @staticmethod
    def forward(ctx, mean, var, c):
        ctx.save_for_backward(mean, var, c)
        return fused(in_images, mean, var, c, constants=(_two_slopes_kernel, (_table(mean),)))

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        constants = _two_slopes_backward, (_table(grad_mean),)
        return fused(in_images, *ctx.saved_tensors, grad_mean, grad_var, constants=constants)


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
