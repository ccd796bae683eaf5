"""One slope above 0, another one below: relu, leaky_relu, absolute.

With s = sqrt(var) and a = mean/s the moments of relu(X) are max(mean, 0) + s T(abs(a)) and var V(a), and those of
relu(X) - c relu(-X) are, P(a) = P(X > 0) the slope of the mean of relu(X),

    mean above 0, c mean below, + s (1 - c) T(abs(a)),    var ((1 - c)² V(a) + 2 c (1 - c) P(a) + c²):

two functions of one number, in float64 in closed form, in float32 from a table. Backwards the results of relu say all there is:
k = E/sqrt(E² + Var) rises with a, and P and phi sqrt(V) are functions of it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.normal import Moments, affine, at_least_float32, mills, standardize, step
from rvconvert.moments.quadrature import density
from rvconvert.moments.table import Grid, as_table, in_images, kept

# Of a alone; beyond the ends V and T are what they are there: next to nothing, and no denormal number, which is slow to make.
_GRID = Grid(end=11, in_p=3 << 13, in_q=0, spacing=0)
_RESULT_GRID = Grid(end=1, in_p=1 << 14, in_q=0, spacing=0)  # of k
_TABLES = 16  # how many are kept, a slope each, 200 kB


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


@kept(_TABLES)
def _filled(c: float, device: torch.device) -> Tensor:
    """What ``_kernel`` reads: (1, 2, 1, corners) in float32, of Var/v and of the mean's share of s, in units of x."""
    a = torch.from_numpy(_GRID.corners()[0])
    small, _, ratio = _closed(a, torch.ones_like(a))
    ratio = (1 - c) ** 2 * ratio + 2 * c * (1 - c) * torch.special.ndtr(a) + c * c
    return as_table(torch.stack((ratio, _GRID.end * (1 - c) * small))[:, None].numpy()).to(device)


def _of_standard(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, P(X > 0) and phi sqrt(V), in float64."""
    _, mean, var = _closed(a, torch.ones_like(a))
    return mean * torch.rsqrt(mean.square() + var), torch.special.ndtr(a), density(a) * var.sqrt()


@functools.cache
def _densely() -> list[np.ndarray]:
    """Values of a, and what ``_of_standard`` makes of them."""
    a = torch.linspace(-30, 38, 1 << 19, dtype=torch.float64, device="cpu")
    return [x.numpy() for x in (a, *_of_standard(a))]


@kept()
def _filled_of_result(device: torch.device) -> Tensor:
    """P(X > 0) and phi sqrt(V) of k, (1, 2, 1, corners) in float32; 0 where k < 0, which it never is."""
    _, k, *values = _densely()
    return as_table(np.stack([np.interp(_RESULT_GRID.corners()[0], k, x) for x in values])[:, None]).to(device)


def _of_result(k: Tensor) -> tuple[Tensor, Tensor]:
    """P(X > 0) and phi sqrt(V) of k in float64, with a graph of first order: a step of Newton's from where k is known to be."""
    a, at, *_ = _densely()
    start = torch.from_numpy(np.interp(k.detach().cpu(), at, a)).to(k.device).requires_grad_()
    here = _of_standard(start)[0]
    (slope,) = torch.autograd.grad(here.sum(), start)
    return _of_standard(start.detach() + (k - here.detach()) / slope)[1:]


@torch.compiler.assume_constant_result
def _table(c: float, device: torch.device) -> Tensor:
    return _filled(c, device)


@torch.compiler.assume_constant_result
def _result_table(device: torch.device) -> Tensor:
    return _filled_of_result(device)


def _table_for(x: Tensor, c: float = 0.0) -> Tensor | None:
    return None if x.dtype == torch.float64 else _table(c, x.device)


def _upper(mean: Tensor, var: Tensor, up: Tensor, up_var: Tensor) -> tuple[Tensor, Tensor]:
    """P(X > 0) and phi/s from the moments of relu(X), which cost a tenth of making them anew.

    E² + Var = (m² + v) P + m s phi and E = m P + s phi: so v P = Var + E (E - m). Beyond ten deviations P is 0 or 1.
    """
    inverse = var.clamp(min=1e-37).reciprocal_()
    far = step((-100.0 * var).addcmul_(mean, mean))
    above = torch.addcmul(up_var, up, up - mean).mul_(inverse).lerp_(step(mean), far)
    slope = torch.addcmul(up, mean, above, value=-1).mul_(inverse)
    return above, torch.addcmul(slope, slope, far, value=-1)


def _kernel(mean, var, c, table):
    """Of relu(X) - c relu(-X), c a number."""
    if table is None:
        return _two_slopes_kernel(mean, var, c, None) if c else _closed(mean, var)[1:]
    inverse = affine(var, _GRID.end**2, 1e-37).rsqrt_()
    ratio, small = _GRID.bilinear(table, mean * inverse)
    plain = F.leaky_relu(mean, c) if c else mean.clamp(min=0.0)
    return plain.addcmul_(inverse.mul_(var), small), ratio.mul_(var)


def _relu_backward(out, out_var, grad_mean, grad_var, *more):
    *inputs, table = more
    if inputs:
        above, slope = _upper(inputs[0], inputs[1], out, out_var)
    else:
        var = out_var + 1e-26  # one that was too small to be kept is of a tail, where k is 0
        k = torch.addcmul(var, out, out).rsqrt_() * out
        above, slope = _of_result(k) if table is None else _RESULT_GRID.bilinear(table, k)
        slope = slope.mul_(var.rsqrt_())
    by_mean = (grad_mean * above).addcmul_(grad_var, torch.addcmul(out, out, above, value=-1), value=2)
    by_var = torch.addcmul(above, out, slope, value=-1).mul_(grad_var).addcmul_(grad_mean, slope, value=0.5)
    return by_mean, by_var


class _Relu(torch.autograd.Function):
    """Mean and variance of relu(X): paper equations 6 and 9. In float32 it saves its results alone, as the next layer does."""

    @staticmethod
    def forward(ctx, mean, var):
        table = _table_for(mean)
        out = fused(in_images, mean, var, constants=(_kernel, (0.0, table)))
        ctx.save_for_backward(*out, *((mean, var) if table is None else ()))
        return out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        out, out_var, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and not inputs:  # for a graph of the backward pass (create_graph=True)
            made = _relu_backward(*(x.double() for x in (out, out_var, grad_mean, grad_var)), None)
            return tuple(x.to(out.dtype) for x in made)
        constants = _relu_backward, (None if inputs else _result_table(out.device),)
        return fused(in_images, out, out_var, grad_mean, grad_var, *inputs, constants=constants)


def _two_slopes_kernel(mean, var, c, table):
    # f = (1 - c) relu(x) + c x, and Cov(relu(X), X) = Var relu(X) + E (E - m)
    up, up_var = _kernel(mean, var, 0.0, table)
    both, out_var = up * (up - mean), torch.lerp(up_var, var, c * c)
    share = 2 * c * (1.0 - c)
    out_var = torch.addcmul(out_var, both, share) if isinstance(c, Tensor) else torch.add(out_var, both, alpha=share)
    return torch.lerp(up, mean, c), out_var


def _two_slopes_backward(mean, var, c, grad_mean, grad_var, table):
    up, up_var = _kernel(mean, var, 0.0, table)
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
    return _two_slopes_backward(mean, var, c, grad_mean, grad_var, _table_for(mean))[:2]


class _OneSlope(torch.autograd.Function):
    """Mean and variance of relu(X) - c relu(-X), c a number; saves what ``_Relu`` does."""

    @staticmethod
    def forward(ctx, mean, var, c):
        out = fused(in_images, mean, var, constants=(_kernel, (c, _table_for(mean, c))))
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
        return fused(in_images, mean, var, c, constants=(_two_slopes_kernel, (_table_for(mean),)))

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        if torch.is_grad_enabled():  # for a graph of the backward pass: tables are read in place
            mean, var, c = (x.double() for x in ctx.saved_tensors)
            made = _two_slopes_backward(mean, var, c, grad_mean.double(), grad_var.double(), None)
            return tuple(x.to(grad_mean.dtype) for x in made)
        constants = _two_slopes_backward, (_table_for(grad_mean),)
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
