"""One slope above 0, another one below: relu, leaky_relu, absolute.

All follow from E and Var of relu(X). With s = sqrt(var) and a = mean/s they are max(mean, 0) + s T(abs(a)) and var V(a): two
functions of one number, in float64 in closed form, in float32 from a table of that form's logarithms. Backwards the results
of relu say all there is: c = E/sqrt(E² + Var) rises with a, and P(X > 0) and phi sqrt(V) are functions of it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.normal import Moments, at_least_float32, mills, standardize, step
from rvconvert.moments.quadrature import density
from rvconvert.moments.table import Curve, Grid, as_table, in_images, table_of

# Of a alone; beyond the ends V and T are what they are there: next to nothing, and no denormal number, which is slow to make.
_GRID = Grid(end=11, in_p=1 << 14, in_q=0, spacing=0)
_RESULT_GRID = Grid(end=1, in_p=1 << 14, in_q=0, spacing=0)  # of c


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


def _of_standard(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, P(X > 0) and phi sqrt(V), in float64."""
    _, mean, var = _closed(a, torch.ones_like(a))
    return mean * torch.rsqrt(mean.square() + var), torch.special.ndtr(a), density(a) * var.sqrt()


@functools.cache
def _densely() -> list[np.ndarray]:
    """Values of a, and what ``_of_standard`` makes of them."""
    a = torch.linspace(-30, 38, 1 << 19, dtype=torch.float64, device="cpu")
    return [x.numpy() for x in (a, *_of_standard(a))]


class _Result(Curve):
    """P(X > 0) and phi sqrt(V) of c; 0 where c < 0, which it never is."""

    def fill(self) -> tuple[Tensor, ...]:
        """(1, 2, 1, corners)."""
        _, c, *values = _densely()
        return (as_table(np.stack([np.interp(_RESULT_GRID.corners()[0], c, x) for x in values])[:, None]),)


def _of_result(c: Tensor) -> tuple[Tensor, Tensor]:
    """P(X > 0) and phi sqrt(V) of c in float64, with a graph of first order: a step of Newton's from where c is known to be."""
    a, at, *_ = _densely()
    start = torch.from_numpy(np.interp(c.detach().cpu(), at, a)).to(c.device).requires_grad_()
    here = _of_standard(start)[0]
    (slope,) = torch.autograd.grad(here.sum(), start)
    return _of_standard(start.detach() + (c - here.detach()) / slope)[1:]


_RECTIFIED, _RESULT = _Rectified(torch.relu), _Result(torch.relu)


def _table(curve: Curve, x: Tensor) -> Tensor | None:
    return None if x.dtype == torch.float64 else table_of(curve.number, x.device)[0]


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


def _relu_backward(out, out_var, grad_mean, grad_var, *more):
    *inputs, table = more
    if inputs:
        above, slope = _upper(inputs[0], inputs[1], out, out_var)
    else:
        var = out_var + 1e-26  # one that was too small to be kept is of a tail, where c is 0
        c = torch.addcmul(var, out, out).rsqrt_() * out
        above, slope = _of_result(c) if table is None else _RESULT_GRID.bilinear(table, c, torch.zeros_like(c))
        slope = slope.mul_(var.rsqrt_())
    by_mean = (grad_mean * above).addcmul_(grad_var, torch.addcmul(out, out, above, value=-1), value=2)
    by_var = torch.addcmul(above, out, slope, value=-1).mul_(grad_var).addcmul_(grad_mean, slope, value=0.5)
    return by_mean, by_var


class _Relu(torch.autograd.Function):
    """Mean and variance of relu(X): paper equations 6 and 9. In float32 it saves its results alone, as the next layer does."""

    @staticmethod
    def forward(ctx, mean, var):
        table = _table(_RECTIFIED, mean)
        out = fused(in_images, mean, var, constants=(_relu_kernel, (table,)))
        ctx.save_for_backward(*out, *((mean, var) if table is None else ()))
        return out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        out, out_var, *inputs = ctx.saved_tensors
        if torch.is_grad_enabled() and not inputs:  # for a graph of the backward pass (create_graph=True)
            made = _relu_backward(*(x.double() for x in (out, out_var, grad_mean, grad_var)), None)
            return tuple(x.to(out.dtype) for x in made)
        constants = _relu_backward, (_table(_RESULT, out),)
        return fused(in_images, out, out_var, grad_mean, grad_var, *inputs, constants=constants)


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
    return _two_slopes_backward(mean, var, c, grad_mean, grad_var, _table(_RECTIFIED, mean))[:2]


class _OneSlope(torch.autograd.Function):
    """Mean and variance of relu(X) - c relu(-X), c a number; saves what ``_Relu`` does."""

    @staticmethod
    def forward(ctx, mean, var, c):
        out = fused(in_images, mean, var, constants=(_two_slopes_kernel, (c, _table(_RECTIFIED, mean))))
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
        return fused(in_images, mean, var, c, constants=(_two_slopes_kernel, (_table(_RECTIFIED, mean),)))

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        if torch.is_grad_enabled():  # for a graph of the backward pass: tables are read in place
            mean, var, c = (x.double() for x in ctx.saved_tensors)
            made = _two_slopes_backward(mean, var, c, grad_mean.double(), grad_var.double(), None)
            return tuple(x.to(grad_mean.dtype) for x in made)
        constants = _two_slopes_backward, (_table(_RECTIFIED, grad_mean),)
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
