"""Moments of elementwise functions of a Gaussian variable: f(mean, var, ...) -> (mean, var) of f(X), X ~ N(mean, var).

Tensors of one shape and dtype in, the same out; parameters are floats, or tensors that broadcast where the
docstring says so. For each function `gain(function, mean, var, ...)` is E[f'(X)], the derivative of the output mean
by the input mean, which carries correlations through f (Stein's lemma). Half-precision inputs are computed
in float32. var = 0 gives (f(mean), 0) and finite gradients.

Notation: s = sqrt(var), a = mean/s, phi and Phi the standard normal density and distribution function,
M(t) = Phi(-t)/phi(t) the Mills ratio.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.compilation import fused
from rvconvert.rules.quadrature import (
    KINKED_NODES,
    SMOOTH_NODES,
    STEEP_NODES,
    Activation,
    WeightedMoments,
    activation_gain,
    activation_moments,
    density,
    floored,
    flushed,
    legendre,
    panel,
    quadrature,
    quadrature_gain,
    smallest_deviation,
)

Moments = tuple[Tensor, Tensor]
GAINS: dict[Callable[..., Moments], Callable[..., Tensor]] = {}
_RHO_NODES = [(0.5 + 0.5 * x, 0.5 * w) for x, w in legendre(12)]


def gain(function: Callable[..., Moments], mean: Tensor, var: Tensor, *args, **kwargs) -> Tensor:
    """E[f'(X)] for a moment function of this module, with the same arguments; differentiable once.

    Raises KeyError for a function that has none.
    """
    return GAINS[function](mean, var, *args, **kwargs)


def _widened(function):
    """Half-precision inputs are computed in float32 and the results rounded back."""

    @functools.wraps(function)
    def wrapper(mean, var, *args, **kwargs):
        if mean.dtype not in (torch.float16, torch.bfloat16):
            return function(mean, var, *args, **kwargs)
        out = function(mean.float(), var.float(), *args, **kwargs)
        return tuple(o.to(mean.dtype) for o in out) if isinstance(out, tuple) else out.to(mean.dtype)

    return wrapper


def _gain_of(function):
    def register(body):
        GAINS[function] = body = _widened(body)
        return body

    return register


# ---- the tail of the normal law --------------------------------------------------------------------------

# h2(t) (t + k)^3 as a polynomial in (t - k)/(t + k), relative error 7e-8 on [0, 14] and 1e-14 on [0, 38],
# beyond which phi(t) is 0 in float32 and in float64. Fitted for this file by reweighted least squares.
_SINGLE = (
    14.0,
    4.5,
    (
        12.484004676347805, -26.865622757237112, 32.00817524483562, -25.555960295854433, 13.787971753676809,
        -4.276770580766265, -0.030664055533496937, 0.6706102135243723, -0.16315574515509199, -0.094167353931323,
    ),
)  # fmt: skip
_DOUBLE = (
    38.0,
    3.5,
    (
        10.983868018334988, -19.739136446851848, 16.992974302429552, -7.238659931230993, 0.09522382943080199,
        1.3064424753200647, -0.2558149919465437, -0.24026830082586753, 0.06023578936747081, 0.05498456834477279,
        -0.008769330221758718, -0.01413798910652563, -0.00043469850899260866, 0.0034293532205561194,
        0.0009818198329218178, -0.0006258924131224766, -0.000448798459086335, 3.314309927698039e-05,
        0.00012305585274021972, 2.326947364250091e-05, -1.7372709765269675e-05, -6.0740881839431305e-06,
        1.889420562154888e-07,
    ),
)  # fmt: skip


def _tail(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """M(t), h1 = 1 - t M and h2 = (1 + t²) M - t, for t >= 0.

    With U = max(Z - t, 0): E[U] = phi h1, E[U²] = phi h2. One division and one polynomial; h2 is the fitted one,
    as M and h1 follow from it without cancellation.
    """
    limit, k, coefficients = _DOUBLE if t.dtype == torch.float64 else _SINGLE
    t = torch.clamp(t, max=limit)
    q = 1.0 / (t + k)
    u = (t - k) * q
    h2 = torch.full_like(u, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        h2 = h2 * u + c
    h2 = h2 * (q * q * q)
    h1 = (1.0 - t * h2) / (1.0 + t * t)
    return h2 + t * h1, h1, h2


def _ndtr(x: Tensor) -> Tensor:
    """Phi(x), relative accuracy kept in the lower tail; no gradient."""
    t = x.abs()
    below = density(t) * _tail(t)[0]
    return torch.where(x > 0, 1.0 - below, below)


def _standardize(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """s and t = abs(mean)/s, where var = 0 is put far into the tail (with s = 1, so that nothing divides by 0)."""
    random = var > 0
    s = torch.sqrt(torch.where(random, var, torch.ones_like(var)))
    return s, torch.where(random, mean.abs() / s, torch.full_like(var, 1e4))


def _sides(mean: Tensor, var: Tensor):
    """E and Var of relu(X) and of relu(-X) on the side on which the mean is not and on the other one, with phi, s, Phi(-t)."""
    s, t = _standardize(mean, var)
    phi = density(t)
    mills, h1, h2 = _tail(t)
    below = phi * mills
    small = s * phi * h1
    small_var = var * phi * (h2 - phi * h1 * h1)
    large_var = (var - small_var) - 2 * (mean.abs() + small) * small  # relu(x) = x + relu(-x)
    return s, phi, below, small, small_var, large_var


def _relu_kernel(mean, var):
    *_, small, small_var, large_var = _sides(mean, var)
    return small + torch.clamp(mean, min=0.0), torch.where(mean > 0, large_var, small_var)


def _relu_backward(mean, var, grad_mean, grad_var):
    s, phi, below, small, _, _ = _sides(mean, var)
    above = torch.where(mean > 0, 1.0 - below, below)  # P(X > 0)
    expected = small + torch.clamp(mean, min=0.0)
    slope = phi / s
    by_mean = grad_mean * above + grad_var * (2 * expected * (1.0 - above))
    by_var = grad_mean * (0.5 * slope) + grad_var * (above - expected * slope)
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
    *_, small, small_var, large_var = _sides(mean, var)
    positive = mean > 0
    up, down = small + torch.clamp(mean, min=0.0), small - torch.clamp(mean, max=0.0)
    up_var, down_var = torch.where(positive, large_var, small_var), torch.where(positive, small_var, large_var)
    return up - c * down, up_var + c * c * down_var + 2 * c * up * down


def _two_slopes_partials(mean, var, c):
    """The gradients of mean and variance by mean, by var and by c."""
    s, phi, below, small, small_var, large_var = _sides(mean, var)
    positive = mean > 0
    above, under = torch.where(positive, 1.0 - below, below), torch.where(positive, below, 1.0 - below)
    up, down = small + torch.clamp(mean, min=0.0), small - torch.clamp(mean, max=0.0)
    slope = phi / s
    by_mean = above + c * under, 2 * (1.0 - c) * (up * under + c * down * above)
    var_by_var = (above - up * slope) + c * c * (under - down * slope) + c * (up + down) * slope
    by_c = -down, 2 * (c * torch.where(positive, small_var, large_var) + up * down)
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


class _Exceedance(torch.autograd.Function):
    """P(X > 0) = Phi(a); at var = 0 the step, 0 at mean = 0."""

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        _, t = _standardize(mean, var)
        below = density(t) * _tail(t)[0]
        return torch.where(mean > 0, 1.0 - below, below)

    @staticmethod
    def backward(ctx, grad):
        mean, var = ctx.saved_tensors
        s, t = _standardize(mean, var)
        slope = density(t) / s
        a = torch.where(mean > 0, t, -t)
        return grad * slope, grad * (-0.5 * a * slope / s)


# ---- piecewise-linear functions ------------------------------------------------------------------------


@_widened
def relu(mean: Tensor, var: Tensor) -> Moments:
    """max(x, 0), exact (paper equations 6, 9; Frey and Hinton 1999)."""
    return _Relu.apply(mean, var)


@_gain_of(relu)
def _relu_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _Exceedance.apply(mean, var)


@_widened
def leaky_relu(mean: Tensor, var: Tensor, negative_slope: float | Tensor = 0.01) -> Moments:
    """x above 0, negative_slope x below, exact; the slope may be a tensor that broadcasts (PReLU, RReLU)."""
    if isinstance(negative_slope, Tensor):
        return _TwoSlopes.apply(mean, var, negative_slope.to(mean).expand_as(mean))
    return _OneSlope.apply(mean, var, float(negative_slope))


@_gain_of(leaky_relu)
def _leaky_relu_gain(mean: Tensor, var: Tensor, negative_slope: float | Tensor = 0.01) -> Tensor:
    above = _Exceedance.apply(mean, var)
    return above + negative_slope * (1.0 - above)


@_widened
def absolute(mean: Tensor, var: Tensor) -> Moments:
    """abs(x), exact: the folded normal law."""
    return _OneSlope.apply(mean, var, -1.0)


@_gain_of(absolute)
def _absolute_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _Exceedance.apply(mean, var) - _Exceedance.apply(-mean, var)


@_widened
def softshrink(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Moments:
    """x moved towards 0 by lambd, exact: relu(x - lambd) - relu(-x - lambd)."""
    up, up_var = _Relu.apply(mean - lambd, var)
    down, down_var = _Relu.apply(-mean - lambd, var)
    return up - down, up_var + down_var + 2 * up * down


@_gain_of(softshrink)
def _softshrink_gain(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Tensor:
    return _Exceedance.apply(mean - lambd, var) + _Exceedance.apply(-mean - lambd, var)


def _jump(mean: Tensor, var: Tensor, height: float) -> Moments:
    """(x + height) above 0, else 0."""
    r, r_var = _Relu.apply(mean, var)
    above = _Exceedance.apply(mean, var)
    below = _at_most_zero(mean, var, above)
    return r + height * above, r_var + height * height * above * below + 2 * height * r * below


def _at_most_zero(mean: Tensor, var: Tensor, above: Tensor) -> Tensor:
    # P(X <= 0) from the lower tail; at var = 0 and mean = 0 both tails say 0, and the point belongs here.
    return torch.where(mean > 0, _Exceedance.apply(-mean, var), 1.0 - above)


@_widened
def hardshrink(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Moments:
    """x where abs(x) > lambd, else 0, exact."""
    up, up_var = _jump(mean - lambd, var, lambd)
    down, down_var = _jump(-mean - lambd, var, lambd)
    return up - down, up_var + down_var + 2 * up * down


def _jump_gain(mean: Tensor, var: Tensor, height: float) -> Tensor:
    s, _ = _standardize(mean, var)
    a = torch.where(var > 0, mean / s, torch.full_like(mean, 1e4))
    return _Exceedance.apply(mean, var) + height * density(a) / s


@_gain_of(hardshrink)
def _hardshrink_gain(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Tensor:
    return _jump_gain(mean - lambd, var, lambd) + _jump_gain(-mean - lambd, var, lambd)


@_widened
def threshold(mean: Tensor, var: Tensor, threshold: float, value: float) -> Moments:
    """x where x > threshold, else value, exact; value > threshold loses accuracy where the terms cancel."""
    up, up_var = _jump(mean - threshold, var, threshold - value)
    return up + value, up_var


@_gain_of(threshold)
def _threshold_gain(mean: Tensor, var: Tensor, threshold: float, value: float) -> Tensor:
    return _jump_gain(mean - threshold, var, threshold - value)


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
    return s, lower, upper, at_mean, _ndtr(lower), _ndtr(-upper)


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


@_widened
def clamp(
    mean: Tensor, var: Tensor, min: float | Tensor | None = None, max: float | Tensor | None = None
) -> Moments:
    """min(max(x, min), max), exact; either bound may be None; tensors broadcast and get their gradient."""
    if min is None and max is None:
        return mean, var
    if min is not None and max is None:
        up, up_var = _Relu.apply(mean - min, var)
        return up + min, up_var
    if max is not None and min is None:
        down, down_var = _Relu.apply(max - mean, var)
        return max - down, down_var
    lo, hi = (torch.as_tensor(b, dtype=mean.dtype, device=mean.device).expand_as(mean) for b in (min, max))
    return _Clamp.apply(mean, var, lo, hi)


@_gain_of(clamp)
def _clamp_gain(mean, var, min=None, max=None) -> Tensor:
    if min is None and max is None:
        return torch.ones_like(mean)
    if max is None:
        return _Exceedance.apply(mean - min, var)
    if min is None:
        return _Exceedance.apply(max - mean, var)
    # P(min < X < max) as a difference of the two smaller tails.
    centred = mean - 0.5 * (min + max)
    right = centred > 0
    outer = torch.where(right, _Exceedance.apply(max - mean, var), _Exceedance.apply(mean - min, var))
    inner = torch.where(right, _Exceedance.apply(min - mean, var), _Exceedance.apply(mean - max, var))
    return outer - inner


def relu6(mean: Tensor, var: Tensor) -> Moments:
    """min(max(x, 0), 6), exact."""
    return clamp(mean, var, 0.0, 6.0)


@_gain_of(relu6)
def _relu6_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _clamp_gain(mean, var, 0.0, 6.0)


def hardtanh(mean: Tensor, var: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Moments:
    """min(max(x, min_val), max_val), exact."""
    return clamp(mean, var, min_val, max_val)


@_gain_of(hardtanh)
def _hardtanh_gain(mean: Tensor, var: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    return _clamp_gain(mean, var, min_val, max_val)


def hardsigmoid(mean: Tensor, var: Tensor) -> Moments:
    """relu6(x + 3) / 6, exact."""
    clamped, clamped_var = clamp(mean + 3.0, var, 0.0, 6.0)
    return clamped / 6.0, clamped_var / 36.0


@_gain_of(hardsigmoid)
def _hardsigmoid_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _clamp_gain(mean, var, -3.0, 3.0) / 6.0


class _HardswishLower(torch.autograd.Function):
    """Moments and gain of x relu6(x + 3)/6 for mean <= 0: an atom, a panel of the parabola, a linear tail."""

    @staticmethod
    def _parts(mean, var):
        s = torch.sqrt(floored(var, smallest_deviation(mean.dtype, 1e-6, 1e-9)))
        lower, upper = (-3.0 - mean) / s, (3.0 - mean) / s
        start = torch.clamp(mean, min=-3.0)
        at_mean = start * (start + 3.0) / 6.0
        phi, (mills, h1, h2) = density(upper), _tail(upper)
        nodes = ((z, w, (mean - start) + s * z) for z, w in _between(lower, upper))
        return s, lower, upper, start, at_mean, phi, mills, h1, h2, nodes

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        s, lower, _, start, at_mean, phi, mills, h1, h2, nodes = _HardswishLower._parts(mean, var)
        moments, slopes = WeightedMoments(mean), phi * mills
        moments.add(_ndtr(lower), -at_mean)
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
        d1 = step * above + s * phi * h1 - at_mean * _ndtr(lower)
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


@_widened
def hardswish(mean: Tensor, var: Tensor) -> Moments:
    """x relu6(x + 3) / 6, exact; f(x) = x + f(-x) brings mean > 0 to the lower half."""
    lower, lower_var, slope = _HardswishLower.apply(torch.where(mean > 0, -mean, mean), var)
    positive = mean > 0
    return (
        torch.where(positive, mean + lower, lower),
        torch.where(positive, (var + lower_var) - 2 * var * slope, lower_var),
    )


@_gain_of(hardswish)
def _hardswish_gain(mean: Tensor, var: Tensor) -> Tensor:
    slope = _HardswishLower.apply(torch.where(mean > 0, -mean, mean), var)[2]
    return torch.where(mean > 0, 1.0 - slope, slope)


# ---- exponential, polynomial and trigonometric functions ---------------------------------------------------


@_widened
def exp(mean: Tensor, var: Tensor) -> Moments:
    """e^x, exact: the lognormal law."""
    expected = torch.exp(mean + 0.5 * var)
    return expected, torch.expm1(var) * expected * expected


@_gain_of(exp)
def _exp_gain(mean: Tensor, var: Tensor) -> Tensor:
    return torch.exp(mean + 0.5 * var)


@_widened
def expm1(mean: Tensor, var: Tensor) -> Moments:
    """e^x - 1, exact."""
    expected = torch.exp(mean + 0.5 * var)
    return torch.expm1(mean + 0.5 * var), torch.expm1(var) * expected * expected


GAINS[expm1] = GAINS[exp]


@_widened
def square(mean: Tensor, var: Tensor) -> Moments:
    """x², exact."""
    return mean * mean + var, 2 * var * (var + 2 * mean * mean)


@_gain_of(square)
def _square_gain(mean: Tensor, var: Tensor) -> Tensor:
    return 2 * mean


@_widened
def sinh(mean: Tensor, var: Tensor) -> Moments:
    """sinh x, exact."""
    return torch.exp(0.5 * var) * torch.sinh(mean), 0.5 * torch.expm1(var) * (torch.exp(var) * torch.cosh(2 * mean) + 1)


@_gain_of(sinh)
def _sinh_gain(mean: Tensor, var: Tensor) -> Tensor:
    return torch.exp(0.5 * var) * torch.cosh(mean)


@_widened
def cosh(mean: Tensor, var: Tensor) -> Moments:
    """cosh x, exact."""
    # e^v cosh 2m - 1 without cancellation.
    excess = torch.expm1(var) + 2 * torch.exp(var) * torch.sinh(mean).square()
    return torch.exp(0.5 * var) * torch.cosh(mean), 0.5 * torch.expm1(var) * excess


@_gain_of(cosh)
def _cosh_gain(mean: Tensor, var: Tensor) -> Tensor:
    return torch.exp(0.5 * var) * torch.sinh(mean)


@_widened
def sin(mean: Tensor, var: Tensor) -> Moments:
    """sin x, exact."""
    shrink, spread = torch.exp(-0.5 * var), -torch.expm1(-var)
    return shrink * torch.sin(mean), 0.5 * spread * (spread + 2 * (shrink * torch.cos(mean)) ** 2)


@_gain_of(sin)
def _sin_gain(mean: Tensor, var: Tensor) -> Tensor:
    return torch.exp(-0.5 * var) * torch.cos(mean)


@_widened
def cos(mean: Tensor, var: Tensor) -> Moments:
    """cos x, exact."""
    shrink, spread = torch.exp(-0.5 * var), -torch.expm1(-var)
    return shrink * torch.cos(mean), 0.5 * spread * (spread + 2 * (shrink * torch.sin(mean)) ** 2)


@_gain_of(cos)
def _cos_gain(mean: Tensor, var: Tensor) -> Tensor:
    return -torch.exp(-0.5 * var) * torch.sin(mean)


# ---- erf and GELU: Var f(X) as an integral over the correlation rho of two copies of X -----------------------


class _Erf(torch.autograd.Function):
    """Var erf(X) = (2/pi) ∫_0^θ exp(-h²/(1 + sin u)) du, h = √2 m/√(1+2v), tan θ = 2v/√(1+4v); no term is negative."""

    @staticmethod
    def _geometry(mean, var):
        widened = 1.0 + 2.0 * var
        root = torch.sqrt(1.0 + 4.0 * var)
        angle = torch.atan(2.0 * var / root)
        return widened, root, angle, 2.0 * mean * mean / widened

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        widened, _, angle, square_h = _Erf._geometry(mean, var)
        out = torch.zeros_like(mean)
        for x, w in _RHO_NODES:
            out = out + w * torch.exp(-square_h / (1.0 + torch.sin(angle * x)))
        return torch.erf(mean / torch.sqrt(widened)), (2 / math.pi) * angle * out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        mean, var = ctx.saved_tensors
        widened, root, angle, square_h = _Erf._geometry(mean, var)
        by_square_h = torch.zeros_like(mean)
        for x, w in _RHO_NODES:
            rest = 1.0 / (1.0 + torch.sin(angle * x))
            by_square_h = by_square_h - w * rest * torch.exp(-square_h * rest)
        by_square_h = (2 / math.pi) * angle * by_square_h
        # sin θ = 2v/(1+2v) and dθ/dv = 2/((1+2v) √(1+4v)).
        at_end = (2 / math.pi) * torch.exp(-square_h * widened / (1.0 + 4.0 * var))
        by_var = at_end * 2.0 / (widened * root) - by_square_h * 2.0 * square_h / widened
        slope = (2 / math.sqrt(math.pi)) * torch.exp(-0.5 * square_h) / torch.sqrt(widened)
        return (
            grad_mean * slope + grad_var * by_square_h * 4.0 * mean / widened,
            grad_var * by_var - grad_mean * slope * mean / widened,
        )


@_widened
def erf(mean: Tensor, var: Tensor) -> Moments:
    """erf x, exact mean; variance by a one-dimensional integral of positive terms (Owen 1956)."""
    return _Erf.apply(mean, var)


@_gain_of(erf)
def _erf_gain(mean: Tensor, var: Tensor) -> Tensor:
    widened = 1.0 + 2.0 * var
    return (2 / math.sqrt(math.pi)) * torch.exp(-mean * mean / widened) * torch.rsqrt(widened)


class _Gelu(torch.autograd.Function):
    """Moments and gain of x Phi(x).

    With X, Y ~ N(m, v) of correlation rho and f'' = phi(x)(2 - x²):
    Var f(X) = v E[f']² + v² ∫_0^1 (1 - rho) B(rho) d rho, B = E[f''(X) f''(Y)] >= 0.
    B is Gaussian times a polynomial in (X + Y)/√2 and (X - Y)/√2, which are independent.
    """

    @staticmethod
    def _first(mean, var):
        """S², phi(h)/S, E[f'] and E[f''], h = m/S."""
        widened = 1.0 + var
        root = torch.sqrt(widened)
        h = mean / root
        peak = density(h) / root
        return (
            widened,
            h,
            peak,
            _ndtr(h) + mean * peak / widened,
            peak * (2 - (mean * mean / widened + var) / widened),
        )

    @staticmethod
    def _tilted(mean, var, rho):
        """A, D = 1 + v (1 ± rho), exp(-m²/A)/(2 pi √(A D)), and of the tilted sum and difference mu, p, q."""
        a, d = 1.0 + var * (1 + rho), 1.0 + var * (1 - rho)
        scale = torch.exp(-mean * mean / a) * torch.rsqrt(a * d) * (0.5 / math.pi)
        return a, d, scale, math.sqrt(2) * mean / a, var * (1 + rho) / a, var * (1 - rho) / d

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        _, h, peak, slope, _ = _Gelu._first(mean, var)
        out = torch.zeros_like(mean)
        for rho, w in _RHO_NODES:
            _, _, scale, mu, p, q = _Gelu._tilted(mean, var, rho)
            mu2 = mu * mu
            # E[(2 - X²)(2 - Y²)] as (2 - mu²/2)² and the terms that the variances add.
            fourth = 0.25 * (6 * mu2 * p + 3 * p * p - 2 * (mu2 + p) * q + 3 * q * q)
            out = out + (w * (1 - rho)) * scale * ((2 - 0.5 * mu2) ** 2 - 2 * (p + q) + fourth)
        return mean * _ndtr(h) + var * peak, var * (slope * slope + var * out), slope

    @staticmethod
    def backward(ctx, grad_mean, grad_var, grad_slope):
        mean, var = ctx.saved_tensors
        widened, _, peak, slope, curvature = _Gelu._first(mean, var)
        out = by_m = by_v = torch.zeros_like(mean)
        for rho, w in _RHO_NODES:
            a, d, scale, mu, p, q = _Gelu._tilted(mean, var, rho)
            a_v, d_v, mu2 = 1 + rho, 1 - rho, mu * mu
            fourth = 0.25 * (6 * mu2 * p + 3 * p * p - 2 * (mu2 + p) * q + 3 * q * q)
            poly = (2 - 0.5 * mu2) ** 2 - 2 * (p + q) + fourth
            by_mu = mu * (mu2 - 4 + 3 * p - q)
            by_p = -2 + 1.5 * (mu2 + p) - 0.5 * q
            by_q = -2 - 0.5 * (mu2 + p) + 1.5 * q
            mean_a = mean / a
            log_v = mean_a * mean_a * a_v - 0.5 * a_v / a - 0.5 * d_v / d
            poly_v = -by_mu * mu * a_v / a + by_p * a_v / (a * a) + by_q * d_v / (d * d)
            weight = (w * (1 - rho)) * scale
            out = out + weight * poly
            by_m = by_m + weight * (by_mu * (math.sqrt(2) / a) - 2 * mean_a * poly)
            by_v = by_v + weight * (log_v * poly + poly_v)
        mu = mean / widened
        third = -peak * mu * (2 - mu * mu - var / widened + 2 / widened)
        var_by_mean = var * (2 * slope * curvature + var * by_m)
        var_by_var = slope * slope + var * (slope * third + 2 * out + var * by_v)
        return (
            grad_mean * slope + grad_var * var_by_mean + grad_slope * curvature,
            grad_mean * 0.5 * curvature + grad_var * var_by_var + grad_slope * 0.5 * third,
        )


# ---- functions by quadrature -----------------------------------------------------------------------------------


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1 for x up to a few units; Inductor's own is exp - 1, which cancels near 0."""
    t = torch.tanh(0.5 * x)
    return 2.0 * t / (1.0 - t)


def _exp_increment(m: Tensor, d: Tensor) -> Tensor:
    """e^(m + d) - e^m from the larger of the two, which cannot overflow on the way."""
    return torch.copysign(torch.exp(m + torch.clamp(d, min=0.0)) * -_expm1(-d.abs()), d)


def _sigmoid_increment(m: Tensor, d: Tensor) -> Tensor:
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)) for a < b, with one division; the last factor as in
    # _expm1. What depends on m alone is common to all nodes.
    up, x = d > 0, m + d
    t = torch.tanh(0.5 * d)
    at_m = 1.0 + torch.where(up, torch.exp(m), torch.exp(-m))
    return 2.0 * t / (at_m * (1.0 + torch.exp(torch.where(up, -x, x))) * (1.0 + t.abs()))


def _sigmoid_slope(x: Tensor) -> Tensor:
    tail = torch.exp(-x.abs())
    inverse = 1.0 / (1.0 + tail)
    return tail * inverse * inverse


_SIGMOID = Activation(torch.sigmoid, _sigmoid_increment, _sigmoid_slope)
_TANH = Activation(
    torch.tanh,
    lambda m, d: 2 * _sigmoid_increment(2 * m, 2 * d),
    lambda x: 4 * _sigmoid_slope(2 * x),
    STEEP_NODES,
)
_SILU = Activation(
    F.silu,
    lambda m, d: d * torch.sigmoid(m + d) + m * _sigmoid_increment(m, d),
    lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
)


def _softplus_increment(m: Tensor, d: Tensor) -> Tensor:
    # softplus(x) = x + softplus(-x) brings m to the lower half, where values only cancel for small steps.
    positive = m > 0
    m, e = torch.where(positive, -m, m), torch.where(positive, -d, d)
    near = torch.log1p(torch.sigmoid(m) * _expm1(torch.clamp(e, max=2.0)))
    step = torch.where(e > 2.0, F.softplus(m + e) - F.softplus(m), near)
    return torch.where(positive, d + step, step)


_SOFTPLUS = Activation(F.softplus, _softplus_increment, torch.sigmoid)

_LOGSIGMOID = Activation(F.logsigmoid, lambda m, d: -_softplus_increment(-m, -d), lambda x: torch.sigmoid(-x))

_GELU_RATE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _gelu_tanh_value(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_GELU_RATE * x * (1 + _GELU_CUBIC * x * x))


def _gelu_tanh_increment(m: Tensor, d: Tensor) -> Tensor:
    inner = _GELU_RATE * m * (1 + _GELU_CUBIC * m * m)
    step = _GELU_RATE * d * (1 + _GELU_CUBIC * (3 * m * (m + d) + d * d))
    return d * torch.sigmoid(inner + step) + m * _sigmoid_increment(inner, step)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    inner = _GELU_RATE * x * (1 + _GELU_CUBIC * x * x)
    rate = _GELU_RATE * x * (1 + 3 * _GELU_CUBIC * x * x)
    return torch.sigmoid(inner) * (1 + rate * torch.sigmoid(-inner))


# torch's own float32 value cancels below -4; x sigmoid(...) is the same function without that.
_GELU_TANH = Activation(_gelu_tanh_value, _gelu_tanh_increment, _gelu_tanh_slope, STEEP_NODES)

_MISH_END = 20.0  # tanh(softplus(x)) is 1 beyond


def _mish_gate(x: Tensor) -> tuple[Tensor, Tensor]:
    """w = e^x and n = w (w + 2); tanh(softplus(x)) = n/(n + 2)."""
    w = torch.exp(torch.clamp(x, max=_MISH_END))
    return w, w * (w + 2)


def _mish_increment(m: Tensor, d: Tensor) -> Tensor:
    (w0, n0), (w, n) = _mish_gate(m), _mish_gate(m + d)
    step = torch.where(
        m < _MISH_END, torch.clamp(d, max=_MISH_END - m), torch.clamp(d + (m - _MISH_END), max=0.0)
    )
    gate_step = 2 * _exp_increment(torch.clamp(m, max=_MISH_END), step) * (w + w0 + 2) / (n + 2) / (n0 + 2)
    return d * (n / (n + 2)) + m * gate_step


def _mish_slope(x: Tensor) -> Tensor:
    w, n = _mish_gate(x)
    return n / (n + 2) + x * 4 * w * (w + 1) / (n + 2) / (n + 2)


_MISH = Activation(F.mish, _mish_increment, _mish_slope)


def _softsign_increment(m: Tensor, d: Tensor) -> Tensor:
    x = m + d
    return (d + (x * m.abs() - m * x.abs())) / ((1 + m.abs()) * (1 + x.abs()))


_SOFTSIGN = Activation(
    F.softsign, _softsign_increment, lambda x: (1 + x.abs()) ** -2, KINKED_NODES, kinked=True
)


def _elu_increment(m: Tensor, d: Tensor, alpha: float, rate: float) -> Tensor:
    low, high = torch.clamp(m, max=0.0), torch.clamp(m, min=0.0)
    up, down = torch.maximum(low + d, -high), torch.minimum(high + d, -low)
    return up + alpha * _exp_increment(rate * low, rate * down)


def _elu_slope(x: Tensor, alpha: float, rate: float) -> Tensor:
    return torch.where(x > 0, 1.0, (alpha * rate) * torch.exp(rate * torch.clamp(x, max=0.0)))


def _elu_value(x: Tensor, alpha: float, rate: float) -> Tensor:
    return torch.clamp(x, min=0.0) + alpha * _expm1(rate * torch.clamp(x, max=0.0))


_ELU = Activation(_elu_value, _elu_increment, _elu_slope, KINKED_NODES, kinked=True)


def _by_quadrature(activation: Activation, name: str, doc: str):
    @_widened
    def function(mean: Tensor, var: Tensor) -> Moments:
        return activation_moments(activation, mean, var)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc

    @_gain_of(function)
    def _(mean: Tensor, var: Tensor) -> Tensor:
        return activation_gain(activation, mean, var)

    return function


sigmoid = _by_quadrature(_SIGMOID, "sigmoid", "1/(1 + e^-x), by quadrature of 28 nodes.")
tanh = _by_quadrature(_TANH, "tanh", "tanh x, by quadrature of 34 nodes.")
silu = _by_quadrature(_SILU, "silu", "x sigmoid(x), by quadrature of 28 nodes.")
mish = _by_quadrature(_MISH, "mish", "x tanh(softplus(x)), by quadrature of 28 nodes.")
logsigmoid = _by_quadrature(_LOGSIGMOID, "logsigmoid", "log sigmoid(x), by quadrature of 28 nodes.")
softsign = _by_quadrature(_SOFTSIGN, "softsign", "x/(1 + abs(x)), by quadrature of two panels of 18 nodes.")


@_widened
def gelu(mean: Tensor, var: Tensor, approximate: str = "none") -> Moments:
    """GELU: "none" is x Phi(x), exact mean, variance by a one-dimensional integral; "tanh" by quadrature.

    Raises ValueError for any other `approximate`.
    """
    if approximate == "tanh":
        return activation_moments(_GELU_TANH, mean, var)
    if approximate != "none":
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    return _Gelu.apply(mean, var)[:2]


@_gain_of(gelu)
def _gelu_gain(mean: Tensor, var: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        return activation_gain(_GELU_TANH, mean, var)
    return _Gelu.apply(mean, var)[2]


@_widened
def softplus(mean: Tensor, var: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Moments:
    """log(1 + e^(beta x))/beta, by quadrature; torch's linear branch above threshold/beta differs by less than
    e^-threshold/beta, which is left out for threshold >= 15 and has its own kink below that.
    Panels also end at 0, where it bends."""
    if threshold < 15:
        return quadrature(lambda x: F.softplus(x, beta, threshold), mean, var, kinks=(0.0, threshold / beta))
    out, out_var = activation_moments(_SOFTPLUS, beta * mean, beta * beta * var)
    return out / beta, out_var / (beta * beta)


@_gain_of(softplus)
def _softplus_gain(mean: Tensor, var: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    if threshold < 15:
        return quadrature_gain(lambda x: F.softplus(x, beta, threshold), mean, var, kinks=(0.0, threshold / beta))
    return activation_gain(_SOFTPLUS, beta * mean, beta * beta * var)


@_widened
def elu(
    mean: Tensor, var: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Moments:
    """scale (x above 0, alpha (e^(input_scale x) - 1) below), by quadrature of two panels of 18 nodes."""
    out, out_var = activation_moments(_ELU, mean, var, alpha, input_scale)
    return scale * out, scale * scale * out_var


@_gain_of(elu)
def _elu_gain(mean, var, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return scale * activation_gain(_ELU, mean, var, alpha, input_scale)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def selu(mean: Tensor, var: Tensor) -> Moments:
    """SELU: elu with Klambauer's alpha and scale."""
    return elu(mean, var, SELU_ALPHA, SELU_SCALE)


@_gain_of(selu)
def _selu_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _elu_gain(mean, var, SELU_ALPHA, SELU_SCALE)


def celu(mean: Tensor, var: Tensor, alpha: float = 1.0) -> Moments:
    """x above 0, alpha (e^(x/alpha) - 1) below."""
    return elu(mean, var, alpha, 1.0, 1.0 / alpha)


@_gain_of(celu)
def _celu_gain(mean: Tensor, var: Tensor, alpha: float = 1.0) -> Tensor:
    return _elu_gain(mean, var, alpha, 1.0, 1.0 / alpha)


# ---- functions without Gaussian moments: a positive variable, taken as lognormal -----------------------------------
#
# A Gaussian has no moments under a negative or fractional power or a logarithm (x <= 0 has positive probability).
# A positive variable with the same mean and variance does: the lognormal one, with r = var/mean^2 its deviation's
# square relative to the mean. To first order in r this is the expansion at the mean.


def _relative(mean: Tensor, var: Tensor) -> Tensor:
    """r = var/mean^2; 0 where nothing varies. Bounded, so that a mean of 0 has finite gradients."""
    square = mean * mean
    varies = (var > 0) & (square > 0)
    return torch.clamp(torch.where(varies, var, 0) / torch.where(varies, square, 1), max=1e6)


@_widened
def power(mean: Tensor, var: Tensor, exponent: float) -> Moments:
    """x^exponent: exact for 0, 1, 2, ..., else of a lognormal variable."""
    if exponent >= 0 and exponent == int(exponent):
        return _whole_power(mean, var, int(exponent))
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


@_gain_of(power)
def _power_gain(mean: Tensor, var: Tensor, exponent: float) -> Tensor:
    if exponent >= 0 and exponent == int(exponent):
        return exponent * _whole_power(mean, var, max(int(exponent) - 1, 0))[0]
    r = _relative(mean, var)
    scale = torch.exp(0.5 * exponent * (exponent - 1) * torch.log1p(r))
    return exponent * torch.pow(mean, exponent - 1) * scale * (1 - (exponent - 1) * r / (1 + r))


def reciprocal(mean: Tensor, var: Tensor) -> Moments:
    """1/x of a lognormal variable."""
    return power(mean, var, -1.0)


def sqrt(mean: Tensor, var: Tensor) -> Moments:
    """√x of a lognormal variable."""
    return power(mean, var, 0.5)


def rsqrt(mean: Tensor, var: Tensor) -> Moments:
    """1/√x of a lognormal variable."""
    return power(mean, var, -0.5)


@_gain_of(reciprocal)
def _reciprocal_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _power_gain(mean, var, -1.0)


@_gain_of(sqrt)
def _sqrt_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _power_gain(mean, var, 0.5)


@_gain_of(rsqrt)
def _rsqrt_gain(mean: Tensor, var: Tensor) -> Tensor:
    return _power_gain(mean, var, -0.5)


@_widened
def log(mean: Tensor, var: Tensor, base: float = math.e) -> Moments:
    """log x of a lognormal variable, exact for one; to any base."""
    scale = 1.0 / math.log(base)
    log_scale = torch.log1p(_relative(mean, var))
    return (torch.log(mean) - 0.5 * log_scale) * scale, log_scale * (scale * scale)


@_gain_of(log)
def _log_gain(mean: Tensor, var: Tensor, base: float = math.e) -> Tensor:
    r = _relative(mean, var)
    return (1.0 + r / (1.0 + r)) / (mean * math.log(base))
