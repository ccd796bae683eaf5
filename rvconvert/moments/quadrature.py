"""Moments of f(X), X ~ N(mean, var), by Gauss-Legendre panels split at a function's feature or kinks.

Two ways in. `Activation` holds a function as an exact *increment* f(m + d) - f(m) and its derivative, so that
the variance keeps its relative accuracy in float32 however small var is, and its gradients come from Stein's
identities instead of from stored nodes. `quadrature` takes any elementwise callable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rvconvert.moments.compilation import fused

INV_SQRT_2PI, LOG2_E = 0.3989422804014327, 1.4426950408889634
SMOOTH_NODES = 14  # per panel, two panels: functions as smooth as the sigmoid
STEEP_NODES = 17  # as steep as tanh
KINKED_NODES = 18  # a panel may have to cover the whole window
DOUBLE_NODES = 32  # of every panel in float64


def legendre(n: int) -> list[tuple[float, float]]:
    """Gauss-Legendre nodes and weights on [-1, 1] as Python floats."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return [(float(x), float(w)) for x, w in zip(nodes, weights, strict=True)]


_RULES = {n: legendre(n) for n in (SMOOTH_NODES, STEEP_NODES, KINKED_NODES, DOUBLE_NODES)}


def density(z: Tensor) -> Tensor:
    """Standard normal density."""
    return torch.exp2((-0.5 * LOG2_E) * z * z) * INV_SQRT_2PI  # torch's exp2 takes a processor a quarter of the time of its exp


def panel(left: Tensor, right: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Nodes z and weights of the standard normal law on [left, right]; an empty panel has weight 0."""
    centre, half = 0.5 * (left + right), 0.5 * (right - left)
    for x, w in _RULES[DOUBLE_NODES if left.dtype == torch.float64 else n]:
        z = centre + half * x
        yield z, (w * half) * density(z)


def window(mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Ends (in deviations) of integration: 7.5 towards 0, where activations bend, 5 away from it; in float64 9.5 and 7."""
    shift, half = 1.25 * torch.clamp(mean / s, -1.0, 1.0), 8.25 if mean.dtype == torch.float64 else 6.25
    return -half - shift, half - shift


def _split(mean: Tensor, s: Tensor, n: int, kinked: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Nodes and weights of N(0, 1) over two panels that meet at x = 0 where that lies in the window."""
    low, high = window(mean, s)
    zero = -mean / s
    if kinked:
        middle = torch.where((zero > low) & (zero < high), zero, torch.zeros_like(zero))
    else:
        middle = torch.clamp(zero, -2.5, 2.5)
    yield from panel(low, middle, n)
    yield from panel(middle, high, n)


class WeightedMoments:
    """Mean and variance of weighted values in one pass (West 1979); the variance is a sum of squares."""

    def __init__(self, like: Tensor):
        self.total = torch.full_like(like, torch.finfo(like.dtype).tiny)
        self.mean = torch.zeros_like(like)
        self.sum_of_squares = torch.zeros_like(like)

    def add(self, weight: Tensor, value: Tensor, inner_var: Tensor | None = None) -> None:
        before, self.total = self.total, self.total + weight
        inverse = 1.0 / self.total
        deviation = value - self.mean
        self.mean = self.mean + (weight * inverse) * deviation
        square = deviation * deviation * (before * inverse)
        self.sum_of_squares = self.sum_of_squares + weight * (
            square if inner_var is None else square + inner_var
        )

    @property
    def var(self) -> Tensor:
        return self.sum_of_squares / self.total


class Activation(NamedTuple):
    """A scalar function for quadrature; `p` are its float parameters.

    value(x, *p) = f(x); increment(m, d, *p) = f(m + d) - f(m) without cancellation; slope(x, *p) = f'(x).
    nodes: per panel, of two. kinked: f' or f'' jumps at x = 0, so no panel may cross it.
    """

    value: Callable[..., Tensor]
    increment: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    nodes: int = SMOOTH_NODES
    kinked: bool = False


def flushed(grad: Tensor) -> Tensor:
    """A gradient with 0 in the place of what is next to a denormal number (1e-26 in float32), which no optimiser can see.

    The tail of an activation and the squared weights of each layer lead there, and a convolution of denormal numbers
    takes a CPU a hundred times as long as one of others.
    """
    return F.hardshrink(grad, 1e12 * torch.finfo(grad.dtype).tiny)


def smallest_deviation(dtype: torch.dtype, single: float, double: float) -> float:
    return double if dtype == torch.float64 else single


def floored(var: Tensor, least_deviation: float) -> Tensor:
    return torch.clamp(var, min=least_deviation**2)


def _moments_kernel(mean, var, activation, p):
    # Below the floor both moments are linear in var, which gives var = 0 its exact value.
    v = floored(var, smallest_deviation(mean.dtype, 1e-6, 1e-9))
    s, ratio = torch.sqrt(v), var / v
    total = first = second = torch.zeros_like(mean)
    for z, w in _split(mean, s, activation.nodes, activation.kinked):
        increment = activation.increment(mean, s * z, *p)
        weighted = w * increment
        total, first, second = total + w, first + weighted, second + weighted * increment
    # The increment is 0 at the median of a monotonic f, and a mean lies within one deviation of the median: so the
    # second moment is at most twice the variance, and the difference is good to a rounding or two.
    first = first / total
    return activation.value(mean, *p) + ratio * first, ratio * (second / total - first * first)


def _moments_backward(mean, var, grad_mean, grad_var, activation, p):
    # The floor keeps rounding of f' from being divided by a vanishing deviation.
    v = floored(var, smallest_deviation(mean.dtype, 1e-3, 1e-6))
    s = torch.sqrt(v)
    centre = activation.slope(mean, *p)
    total = d = g = gz = dg = dgz = torch.zeros_like(mean)
    for z, w in _split(mean, s, activation.nodes, activation.kinked):
        increment, slope = activation.increment(mean, s * z, *p), activation.slope(mean + s * z, *p)
        total, d = total + w, d + w * increment
        g, gz = g + w * (slope - centre), gz + w * (slope - centre) * z
        dg, dgz = dg + w * increment * slope, dgz + w * increment * slope * z
    d, g, gz, dg, dgz = d / total, g / total, gz / total, dg / total, dgz / total
    g = g + centre
    mean_by_mean, mean_by_var = g, gz / (2 * s)
    var_by_mean, var_by_var = 2 * (dg - d * g) * (var / v), (dgz - d * gz) / s
    by_var = grad_mean * mean_by_var + grad_var * var_by_var
    return flushed(grad_mean * mean_by_mean + grad_var * var_by_mean), flushed(by_var)



class _Moments(torch.autograd.Function):
    """(mean, var) of an Activation; saves the two inputs only."""

    @staticmethod
    def forward(ctx, mean, var, activation, p):
        ctx.save_for_backward(mean, var)
        ctx.constants = (activation, p)
        return fused(_moments_kernel, mean, var, constants=ctx.constants)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        grads = fused(_moments_backward, *ctx.saved_tensors, grad_mean, grad_var, constants=ctx.constants)
        return *grads, None, None


def activation_moments(activation: Activation, mean: Tensor, var: Tensor, *p: float) -> tuple[Tensor, Tensor]:
    return _Moments.apply(mean, var, activation, p)


def _generic_panels(
    mean: Tensor, s: Tensor, kinks: Sequence[float | Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    if not kinks:
        yield from _split(mean, s, STEEP_NODES, kinked=False)
        return
    low, high = window(mean, s)
    if not any(isinstance(kink, Tensor) for kink in kinks):
        kinks = sorted(kinks)
    ends = [low, *(torch.minimum(torch.maximum((kink - mean) / s, low), high) for kink in kinks), high]
    for left, right in pairwise(ends):
        yield from panel(left, right, KINKED_NODES)


def _generic_deviation(mean: Tensor, var: Tensor, kinks: Sequence[float | Tensor]) -> tuple[Tensor, Tensor]:
    """Deviation to integrate with, and var over its square.

    Nodes closer than a floor would lose f(x) - f(mean) to rounding; below it both moments of a smooth f are linear in
    var. Near a kink they are not (E[relu(X)] grows as s), so there the floor is next to nothing.
    """
    floor = torch.full_like(var, smallest_deviation(var.dtype, 1e-2, 1e-4) ** 2)
    for kink in kinks:
        floor = torch.where(
            (mean - kink) ** 2 < 64 * floor, smallest_deviation(var.dtype, 1e-6, 1e-9) ** 2, floor
        )
    v = torch.maximum(var, floor)
    return torch.sqrt(v), var / v


def _quadrature(f, mean, var, kinks):
    s, ratio = _generic_deviation(mean.detach(), var, kinks)
    at_mean = f(mean)
    moments = WeightedMoments(at_mean)
    for z, w in _generic_panels(mean.detach(), s.detach(), kinks):
        moments.add(w, f(mean + s * z) - at_mean)
    return at_mean + ratio * moments.mean, ratio * moments.var


def quadrature(
    f: Callable[[Tensor], Tensor], mean: Tensor, var: Tensor, kinks: Sequence[float | Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Moments of f(X) for any elementwise f.

    f maps a tensor of the shape of `mean` to one of the same shape, and may close over tensors that broadcast
    with it; they get their gradients. It is called 35 times, or 18 (len(kinks) + 1) + 1 times.
    kinks: positions where f or a derivative jumps, floats in any order or broadcastable tensors in ascending
    order; the panels of integration end there. Without kinks f should be smooth at the scale of 1 about 0 or at the scale of the
    deviation. Var is a sum of squares; at var = 0 the result is exactly (f(mean), 0).
    Eager autograd stores the inputs only, and calls f again in the backward pass.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(_quadrature, f, mean, var, kinks, use_reentrant=False, preserve_rng_state=False)
    return _quadrature(f, mean, var, kinks)
