"""Moments of tanh X, X ~ N(mean, var), and so of the sigmoid: the last layer of most decoders, on whole images.

Deviations up to 1.9: the trapezoid rule on z in [-7, 7], x = mean + s z, whose error for tanh falls as exp(-pi² / (s h)).
Nodes come in pairs +-z. With t = tanh(mean), c = 1 - t², e = exp(-2 s z), g = 1 - e, b = 1 + e, u = tanh(s z) = g / b,

    tanh(mean +- s z) - t = +-u c / (1 +- t u),

so a pair takes one division, and e and g of the next pair follow from those of this one by a product: one exponential
serves several nodes, and no term cancels, however small s is. Larger deviations: tanh x = sum_i a_i erf(b_i x) within 2e-7
(Monahan and Stefanski 1992, for the logistic function), whose Gaussian means are closed; E[tanh²] = 1 - dE/dm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.normal import Moments, at_least_float32
from rvconvert.moments.quadrature import flushed

_STEP = 0.32
_WEIGHTS = [math.exp(-0.5 * (j * _STEP) ** 2) for j in range(1, 23)]
_TOTAL = 1 + 2 * sum(_WEIGHTS)
_PAIRS = [(j * _STEP, w / _TOTAL) for j, w in enumerate(_WEIGHTS, 1)]
_CENTRE = 1 / _TOTAL
_RUN = 4  # pairs after which the recurrence starts anew: longer ones take a compiler minutes
_WIDEST = 1.9  # deviation beyond which the sum of error functions takes over
_ERFS = tuple(
    zip(
        (0.01113551, 0.32759868, 0.12196938, 0.15987347, 0.36293052, 0.01649244),
        (0.38739194, 0.71525259, 0.52908372, 1.2855465, 0.96173355, 1.72786944),
        strict=True,
    )
)


def _pairs(s: Tensor, c: Tensor, t2: Tensor):
    """For each pair of nodes: z, its weight, g, e, b, A = g², B = b², and r = 1 / (c B + 4 t² e) = 1 / (B - t² A)."""
    first_e, first_g = _from_centre(_STEP * s)
    four_t2 = 4 * t2
    for j, (z, w) in enumerate(_PAIRS):
        if j % _RUN == 0:
            e, g = _from_centre(z * s)
        b = 1 + e
        square_b = b * b
        yield z, w, g, e, b, g * g, square_b, torch.reciprocal(torch.addcmul(c * square_b, four_t2, e))
        g, e = torch.addcmul(g, e, first_g), e * first_e


def _from_centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-2x) and 1 - exp(-2x), by tanh: Inductor's expm1 is exp - 1, which cancels."""
    e = torch.exp(-2 * x)
    return e, torch.tanh(x) * (1 + e)


def _at(mean: Tensor, var: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s within [least, 1.9], t, c = 1 - t² without cancellation, t²; c is 0 where its square would be denormal, which is slow."""
    s = torch.clamp(torch.sqrt(var), least, _WIDEST)
    tail = F.hardshrink(torch.exp(-2 * mean.abs()), 8 * torch.finfo(mean.dtype).tiny ** 0.5)
    t = torch.tanh(mean)
    return s, t, 4 * tail / ((1 + tail) * (1 + tail)), t * t


def _narrow(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """E[d] and E[d²] - E[d]², d = tanh X - tanh(mean)."""
    s, t, c, t2 = _at(mean, var, 0.0)
    first = second = torch.zeros_like(mean)
    for _, w, _, _, _, a, b2, r in _pairs(s, c, t2):
        ar = a * r
        first = torch.add(first, ar, alpha=w)
        second = torch.addcmul(second, ar, torch.addcmul(b2, t2, a) * r, value=w)
    first = -2 * t * c * first
    return first, 2 * c * c * second - first * first


def _erf_terms(mean: Tensor, var: Tensor):
    """For each a erf(b x) of the sum: a, k = b / sqrt(1 + 2 b² v), k m, and the derivative of its mean by m."""
    var = torch.clamp(var, min=_WIDEST**2)
    for a, b in _ERFS:
        k = b * torch.rsqrt(1 + (2 * b * b) * var)
        x = k * mean
        yield a, k, x, (a * 2 / math.sqrt(math.pi)) * k * torch.exp(-x * x)


def _wide(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """E and Var of tanh X."""
    out = slope = torch.zeros_like(mean)
    for a, _, x, peak in _erf_terms(mean, var):
        out, slope = out + a * torch.erf(x), slope + peak
    return out, 1 - slope - out * out


def _tanh_kernel(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    shift, spread = _narrow(mean, var)
    out, out_var = _wide(mean, var)
    wide = var > _WIDEST**2
    return torch.where(wide, out, torch.tanh(mean) + shift), torch.where(wide, out_var, spread)


def _sigmoid_kernel(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """sigmoid(x) = (1 + tanh(x/2))/2, from sigmoid(mean), which keeps its relative accuracy below."""
    mean2, var2 = 0.5 * mean, 0.25 * var
    shift, spread = _narrow(mean2, var2)
    out, out_var = _wide(mean2, var2)
    wide = var2 > _WIDEST**2
    return torch.where(wide, 0.5 + 0.5 * out, torch.sigmoid(mean) + 0.5 * shift), 0.25 * torch.where(wide, out_var, spread)


def _partials(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dE/dm = E[f'], dE/dv = E[f' Z]/(2s), dVar/dm = 2 Cov(f, f'), dVar/dv = Cov(f, f' Z)/s (Stein)."""
    s, t, c, t2 = _at(mean, var, 1e-6)
    shift = slope = slope_z = cross = cross_z = torch.zeros_like(mean)
    for z, w, g, e, b, a, b2, r in _pairs(s, c, t2):
        er2, ar, ta = e * (r * r), a * r, t2 * a
        odd = er2 * (g * b)
        shift = torch.add(shift, ar, alpha=w)
        slope = torch.addcmul(slope, er2, b2 + ta, value=w)
        slope_z = torch.add(slope_z, odd, alpha=w * z)
        cross = torch.addcmul(cross, er2 * ar, torch.add(ta, b2, alpha=3), value=w)
        cross_z = torch.addcmul(cross_z, odd * r, torch.add(b2, ta, alpha=3), value=w * z)
    shift = -2 * t * c * shift
    slope = c * (_CENTRE + 8 * slope)
    slope_z = -16 * c * t * slope_z / s
    mean_by_var = 0.5 * slope_z
    var_by_mean = -16 * c * c * t * cross - 2 * shift * slope
    var_by_var = 8 * c * c * cross_z / s - shift * slope_z
    out = first = second = third = torch.zeros_like(mean)
    for a, k, x, peak in _erf_terms(mean, var):
        out, first = out + a * torch.erf(x), first + peak
        second, third = second - 2 * k * x * peak, third + k * k * (4 * x * x - 2) * peak
    wide = var > _WIDEST**2
    return (
        torch.where(wide, first, slope),
        torch.where(wide, 0.5 * second, mean_by_var),
        torch.where(wide, -second - 2 * out * first, var_by_mean),
        torch.where(wide, -0.5 * third - out * second, var_by_var),
    )


def _tanh_backward(mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
    by_mean, by_var, var_by_mean, var_by_var = _partials(mean, var)
    return flushed(grad_mean * by_mean + grad_var * var_by_mean), flushed(grad_mean * by_var + grad_var * var_by_var)


def _sigmoid_backward(mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
    by_mean, by_var, var_by_mean, var_by_var = _partials(0.5 * mean, 0.25 * var)
    return (
        flushed(0.25 * grad_mean * by_mean + 0.125 * grad_var * var_by_mean),
        flushed(0.125 * grad_mean * by_var + 0.0625 * grad_var * var_by_var),
    )


_COST = 5  # in processor time, of a ReLU's


class _Sigmoidal(torch.autograd.Function):
    """(mean, var) of tanh X or of the sigmoid, by its two kernels; saves the two inputs only."""

    @staticmethod
    def forward(ctx, mean, var, kernel, backward_kernel):
        ctx.save_for_backward(mean, var)
        ctx.backward_kernel = backward_kernel
        return fused(kernel, mean, var, cost=_COST)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        return *fused(ctx.backward_kernel, *ctx.saved_tensors, grad_mean, grad_var, cost=_COST), None, None


@at_least_float32
def tanh(mean: Tensor, var: Tensor) -> Moments:
    """tanh x, by the trapezoid rule or as a sum of erfs."""
    return _Sigmoidal.apply(mean, var, _tanh_kernel, _tanh_backward)


@at_least_float32
def sigmoid(mean: Tensor, var: Tensor) -> Moments:
    """1/(1 + e^-x), by the trapezoid rule or as a sum of erfs."""
    return _Sigmoidal.apply(mean, var, _sigmoid_kernel, _sigmoid_backward)
