"""Functions in pieces: bounded below or above, shrunk to 0 in the middle, with a jump, hardswish."""

from __future__ import annotations

import torch
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32, ndtr, standardize, tail
from rvconvert.moments.quadrature import SMOOTH_NODES, WeightedMoments, density, floored, panel, smallest_deviation
from rvconvert.moments.two_slopes import relu


@at_least_float32
def softshrink(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Moments:
    """x moved towards 0 by lambd, exact: relu(x - lambd) - relu(-x - lambd)."""
    up, up_var = relu(mean - lambd, var)
    down, down_var = relu(-mean - lambd, var)
    return up - down, up_var + down_var + 2 * up * down


class _Exceedance(torch.autograd.Function):
    """P(X > 0) = Phi(a), a = mean/s; at var = 0 the step, 0 at mean = 0."""

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        *_, t = standardize(mean, var)
        below = density(t) * tail(t)[0]
        return torch.where(mean > 0, 1.0 - below, below)

    @staticmethod
    def backward(ctx, grad):
        mean, var = ctx.saved_tensors
        _, inverse, t = standardize(mean, var)
        slope = density(t) * inverse
        return grad * slope, grad * (-0.5 * mean * inverse) * (slope * inverse)


def _jump(mean: Tensor, var: Tensor, height: float) -> Moments:
    """(x + height) above 0, else 0."""
    r, r_var = relu(mean, var)
    above = _Exceedance.apply(mean, var)
    below = _at_most_zero(mean, var, above)
    return r + height * above, r_var + height * height * above * below + 2 * height * r * below


def _at_most_zero(mean: Tensor, var: Tensor, above: Tensor) -> Tensor:
    # P(X <= 0) from the lower tail; at var = 0 and mean = 0 both tails say 0, and the point belongs here.
    return torch.where(mean > 0, _Exceedance.apply(-mean, var), 1.0 - above)


@at_least_float32
def hardshrink(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Moments:
    """x where abs(x) > lambd, else 0, exact."""
    up, up_var = _jump(mean - lambd, var, lambd)
    down, down_var = _jump(-mean - lambd, var, lambd)
    return up - down, up_var + down_var + 2 * up * down


@at_least_float32
def threshold(mean: Tensor, var: Tensor, threshold: float, value: float) -> Moments:
    """x where x > threshold, else value, exact; value > threshold loses accuracy where the terms cancel."""
    up, up_var = _jump(mean - threshold, var, threshold - value)
    return up + value, up_var


def _reach(t: Tensor) -> Tensor:
    """How far beyond t >= 0 the normal density matters: u with t u + u²/2 = 28."""
    return 56.0 / (t + torch.sqrt(t * t + 56.0))


def _between(lower: Tensor, upper: Tensor):
    """Nodes z and weights of the standard normal law on [lower, upper], wherever that lies: two panels."""
    left, right = torch.clamp(lower, min=0.0), torch.clamp(-upper, min=0.0)
    top = torch.minimum(upper, left + _reach(left))
    bottom = torch.maximum(lower, -right - _reach(right))
    middle = torch.minimum(torch.maximum(torch.zeros_like(bottom), bottom), top)
    yield from panel(bottom, middle, SMOOTH_NODES)
    yield from panel(middle, top, SMOOTH_NODES)


def _clamp_geometry(mean, var, lo, hi):
    s = torch.sqrt(floored(var, smallest_deviation(mean.dtype, 1e-6, 1e-9)))
    lower, upper = (lo - mean) / s, (hi - mean) / s
    at_mean = torch.minimum(torch.maximum(mean, lo), hi)
    return s, lower, upper, at_mean, ndtr(lower), ndtr(-upper)


class _Clamp(torch.autograd.Function):
    """Moments of min(max(X, lo), hi), lo < hi tensors of the shape of mean.

    Two atoms of known weight and one panel between them, centred at f(mean): the closed form's truncated second
    moments cancel in float32.
    """

    @staticmethod
    def forward(ctx, mean, var, lo, hi):
        ctx.save_for_backward(mean, var, lo, hi)
        s, lower, upper, at_mean, below, above = _clamp_geometry(mean, var, lo, hi)
        ratio = var / (s * s)
        moments = WeightedMoments(mean)
        moments.add(below, lo - at_mean)
        moments.add(above, hi - at_mean)
        offset = mean - at_mean
        for z, w in _between(lower, upper):
            moments.add(w, offset + s * z)
        return at_mean + ratio * moments.mean, ratio * moments.var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        mean, var, lo, hi = ctx.saved_tensors
        s, lower, upper, at_mean, below, above = _clamp_geometry(mean, var, lo, hi)
        offset = mean - at_mean
        total = first = cross = torch.zeros_like(mean)
        for z, w in _between(lower, upper):
            weighted = w * (offset + s * z)
            total, first, cross = total + w, first + weighted, cross + weighted * z
        # Var by mean = 2 Cov(f, f'), by var = E[(f - E) f' Z] / s, with f' = 1 inside.
        expected = first + below * (lo - at_mean) + above * (hi - at_mean)
        edge = density(lower) - density(upper)
        mean_by_var, var_by_var = edge / (2 * s), (cross - expected * edge) / s
        var_by_mean = 2 * (first - expected * total)
        lo_dev, hi_dev = lo - at_mean - expected, hi - at_mean - expected
        return (
            grad_mean * total + grad_var * var_by_mean,
            grad_mean * mean_by_var + grad_var * var_by_var,
            below * (grad_mean + 2 * grad_var * lo_dev),
            above * (grad_mean + 2 * grad_var * hi_dev),
        )


@at_least_float32
def clamp(
    mean: Tensor, var: Tensor, min: float | Tensor | None = None, max: float | Tensor | None = None
) -> Moments:
    """min(max(x, min), max), exact; either bound may be None; tensors broadcast and get their gradient."""
    if min is None and max is None:
        return mean, var
    if min is not None and max is None:
        up, up_var = relu(mean - min, var)
        return up + min, up_var
    if max is not None and min is None:
        down, down_var = relu(max - mean, var)
        return max - down, down_var
    lo, hi = (torch.as_tensor(b, dtype=mean.dtype, device=mean.device).expand_as(mean) for b in (min, max))
    return _Clamp.apply(mean, var, lo, hi)


def relu6(mean: Tensor, var: Tensor) -> Moments:
    """min(max(x, 0), 6), exact."""
    return clamp(mean, var, 0.0, 6.0)


def hardtanh(mean: Tensor, var: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Moments:
    """min(max(x, min_val), max_val), exact."""
    return clamp(mean, var, min_val, max_val)


def hardsigmoid(mean: Tensor, var: Tensor) -> Moments:
    """relu6(x + 3) / 6, exact."""
    clamped, clamped_var = clamp(mean + 3.0, var, 0.0, 6.0)
    return clamped / 6.0, clamped_var / 36.0


class _HardswishLower(torch.autograd.Function):
    """Moments and E[f'] of x relu6(x + 3)/6 for mean <= 0: an atom, a panel of the parabola, a linear tail."""

    @staticmethod
    def _parts(mean, var):
        s = torch.sqrt(floored(var, smallest_deviation(mean.dtype, 1e-6, 1e-9)))
        lower, upper = (-3.0 - mean) / s, (3.0 - mean) / s
        start = torch.clamp(mean, min=-3.0)
        at_mean = start * (start + 3.0) / 6.0
        phi, (mills, h1, h2) = density(upper), tail(upper)
        nodes = ((z, w, (mean - start) + s * z) for z, w in _between(lower, upper))
        return s, lower, upper, start, at_mean, phi, mills, h1, h2, nodes

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        s, lower, _, start, at_mean, phi, mills, h1, h2, nodes = _HardswishLower._parts(mean, var)
        moments, slopes = WeightedMoments(mean), phi * mills
        moments.add(ndtr(lower), -at_mean)
        excess = h1 / mills
        moments.add(phi * mills, 3.0 - at_mean + s * excess, s * s * (h2 / mills - excess * excess))
        for _, w, d in nodes:
            moments.add(w, d * ((2 * start + 3.0) + d) / 6.0)
            slopes = slopes + w * (2 * (start + d) + 3.0) / 6.0
        ratio = var / (s * s)
        return at_mean + ratio * moments.mean, ratio * moments.var, slopes

    @staticmethod
    def backward(ctx, grad_mean, grad_var, grad_slope):
        mean, var = ctx.saved_tensors
        s, lower, upper, start, at_mean, phi, mills, h1, h2, nodes = _HardswishLower._parts(mean, var)
        above, step = phi * mills, 3.0 - at_mean
        d1 = step * above + s * phi * h1 - at_mean * ndtr(lower)
        g, gz = above, phi
        dg, dgz = step * above + s * phi * h1, step * phi + s * phi * (upper * h1 + h2)
        inside = torch.zeros_like(mean)
        for z, w, d in nodes:
            increment, slope = d * ((2 * start + 3.0) + d) / 6.0, (2 * (start + d) + 3.0) / 6.0
            d1, g, gz, inside = d1 + w * increment, g + w * slope, gz + w * slope * z, inside + w
            dg, dgz = dg + w * increment * slope, dgz + w * increment * slope * z
        # f'' = 1/3 inside, and f' jumps by -1/2 at -3 and at 3.
        curvature = inside / 3.0 - 0.5 * (density(lower) + phi) / s
        by_mean = grad_mean * g + grad_var * 2 * (dg - d1 * g) + grad_slope * curvature
        third = (density(lower) - phi) / (3.0 * s) - 0.5 * (lower * density(lower) + upper * phi) / (s * s)
        by_var = grad_mean * 0.5 * curvature + grad_var * (dgz - d1 * gz) / s + grad_slope * 0.5 * third
        return by_mean, by_var


@at_least_float32
def hardswish(mean: Tensor, var: Tensor) -> Moments:
    """x relu6(x + 3) / 6, exact; f(x) = x + f(-x) brings mean > 0 to the lower half."""
    lower, lower_var, slope = _HardswishLower.apply(torch.where(mean > 0, -mean, mean), var)
    positive = mean > 0
    return (
        torch.where(positive, mean + lower, lower),
        torch.where(positive, (var + lower_var) - 2 * var * slope, lower_var),
    )
