"""Moments of f(X), X ~ N(mean, var), for any elementwise f, by Gauss-Legendre panels split at its feature or kinks.

Gradients come from the same nodes, without f', by Stein's lemma: with X = m + s z, v = s², d = f(X) - f(m),

    d/dm E[g(X)] = E[g(X) z]/s,    d/dv E[g(X)] = E[g(X) (z² - 1)]/(2v),    g = d, d².

Of a function with gradients of its own, a learned slope, torch keeps the inputs and runs f again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rvconvert.moments.compilation import is_traced

Function = Callable[[Tensor], Tensor]
Kinks = Sequence[float | Tensor]
Increment = Callable[[Tensor, Tensor], Tensor]

INV_SQRT_2PI, LOG2_E = 0.3989422804014327, 1.4426950408889634
STEEP_NODES = 17  # per panel, two panels: functions as steep as tanh
KINKED_NODES = 22  # a panel may have to cover the whole window
DOUBLE_NODES = 32  # of every panel in float64
BLOCK = 1 << 17  # elements whose nodes are visited together: what is kept for a node stays in the processor's cache


def legendre(n: int) -> list[tuple[float, float]]:
    """Gauss-Legendre nodes and weights on [-1, 1] as Python floats."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return [(float(x), float(w)) for x, w in zip(nodes, weights, strict=True)]


_RULES = {n: legendre(n) for n in (STEEP_NODES, KINKED_NODES, DOUBLE_NODES)}


def density(z: Tensor) -> Tensor:
    """Standard normal density."""
    return torch.exp2((-0.5 * LOG2_E) * z * z) * INV_SQRT_2PI  # torch's exp2 takes a processor a quarter of the time of its exp


def panel(left: Tensor, right: Tensor, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Nodes z and weights of the standard normal law on [left, right]; an empty panel has weight 0."""
    centre, half = 0.5 * (left + right), 0.5 * (right - left)
    for x, w in _RULES[DOUBLE_NODES if left.dtype == torch.float64 else n]:
        z = torch.add(centre, half, alpha=x)
        yield z, torch.exp2((-0.5 * LOG2_E) * (z * z)) * ((w * INV_SQRT_2PI) * half)  # exp2 takes a quarter of the time of exp


def window(mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Ends (in deviations) of integration: 7.5 towards 0, where activations bend, 5 away from it; in float64 9.5 and 7."""
    shift, half = 1.25 * torch.clamp(mean / s, -1.0, 1.0), 8.25 if mean.dtype == torch.float64 else 6.25
    return -half - shift, half - shift


class WeightedMoments:
    """Mean and variance of weighted values in one pass (West 1979); the variance is a sum of squares."""

    def __init__(self, like: Tensor):
        self.total = torch.full_like(like, torch.finfo(like.dtype).tiny)
        self.mean = torch.zeros_like(like)
        self.sum_of_squares = torch.zeros_like(like)

    def add(self, weight: Tensor, value: Tensor) -> None:
        before, self.total = self.total, self.total + weight
        share = weight / self.total
        deviation = value - self.mean
        self.mean = torch.addcmul(self.mean, share, deviation)
        self.sum_of_squares = torch.addcmul(self.sum_of_squares, share * before, deviation * deviation)

    @property
    def var(self) -> Tensor:
        return self.sum_of_squares / self.total


class SteinSums:
    """Sums over the nodes that the partial derivatives of the moments are made of.

    Those of the mean are of r = d - f'(m) s z: of a line E[z] and E[z (z² - 1)] are 0, and rounding would give 1/s of it.
    """

    def __init__(self, like: Tensor, s: Tensor, slope: Tensor):
        self.slope, self.line = slope, slope * s
        self.rest, self.rest_by_z, self.rest_by_zz, self.square_by_z, self.square_by_zz = (
            torch.zeros_like(like) for _ in range(5)
        )

    def add(self, weight: Tensor, z: Tensor, value: Tensor) -> None:
        rest = torch.addcmul(value, self.line, z, value=-1).mul_(weight)
        rest_by_z, by_z = rest * z, weight * z * value
        self.rest.add_(rest)
        self.rest_by_z.add_(rest_by_z)
        self.rest_by_zz.addcmul_(rest_by_z, z)
        self.square_by_z.addcmul_(by_z, value)
        self.square_by_zz.addcmul_(by_z * z, value)

    def partials(self, moments: WeightedMoments, s: Tensor, ratio: Tensor) -> tuple[Tensor, ...]:
        """Of the mean and of the variance by m, then of both by the variance."""
        sums = self.rest, self.rest_by_z, self.rest_by_zz, self.square_by_z, self.square_by_zz
        rest, rest_by_z, rest_by_zz, square_by_z, square_by_zz = (total / moments.total for total in sums)
        mean, var, inverse = moments.mean, moments.var, 1 / (s * s)
        gain = self.slope + rest_by_z / s
        var_by_mean = square_by_z / s - 2 * mean * gain
        mean_by_v = 0.5 * (rest_by_zz - rest)
        var_by_v = 0.5 * (square_by_zz - var - mean * mean) - 2 * mean * mean_by_v  # E[d²] = var + mean²
        whole = ratio == 1  # else both moments are a multiple of the variance
        return (
            torch.addcmul(self.slope, ratio, rest_by_z / s),
            ratio * var_by_mean,
            torch.where(whole, mean_by_v, mean) * inverse,
            torch.where(whole, var_by_v, var) * inverse,
        )


def smallest_deviation(dtype: torch.dtype, single: float, double: float) -> float:
    """The least deviation to integrate with: ``double`` in float64, else ``single``."""
    return double if dtype == torch.float64 else single


def _panels(mean: Tensor, s: Tensor, kinks: Sequence[float | Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    low, high = window(mean, s)
    if not kinks:
        # At 0, where a function bends; of a narrow law it is smooth anyway, and panels of like length serve it better.
        end = 7.0 if mean.dtype == torch.float64 else 5.0
        furthest = 2.5 + (end - 2.5) * torch.clamp(0.5 * s - 0.5, 0.0, 1.0)
        middle = torch.minimum(torch.maximum(-mean / s, -furthest), furthest)
        ends = [low, middle, high]
        if not is_traced() and bool((s > 10).any()):  # of a law that is much wider than the bend
            reach = 10 / s
            ends = [low, torch.maximum(low, middle - reach), middle, torch.minimum(high, middle + reach), high]
        for left, right in pairwise(ends):
            yield from panel(left, right, STEEP_NODES)
        return
    if not any(isinstance(kink, Tensor) for kink in kinks):
        kinks = sorted(kinks)
    ends = [low, *(torch.minimum(torch.maximum((kink - mean) / s, low), high) for kink in kinks), high]
    for left, right in pairwise(ends):
        yield from panel(left, right, KINKED_NODES)


def _deviation(mean: Tensor, var: Tensor, kinks: Sequence[float | Tensor], *, exact: bool) -> tuple[Tensor, Tensor]:
    """Deviation to integrate with, and var over its square.

    Nodes closer than a floor would lose f(x) - f(mean) to rounding; below it both moments of a smooth f are linear in
    var. Near a kink they are not (E[relu(X)] grows as s), so there the floor is next to nothing.
    """
    least = smallest_deviation(var.dtype, 1e-6, 1e-9) ** 2
    floor = torch.full_like(var, least if exact else smallest_deviation(var.dtype, 1e-2, 1e-4) ** 2)
    for kink in kinks:
        floor = torch.where((mean - kink) ** 2 < 64 * floor, least, floor)
    v = torch.maximum(var, floor)
    return torch.sqrt(v), var / v


def _summed(f, mean, var, kinks, increment, slope=None, moving=True):
    """Both moments; with ``slope``, f'(m), their partial derivatives too. Without ``moving`` panels a jump has no gradient."""
    s, ratio = _deviation(mean.detach(), var, kinks, exact=increment is not None)
    at_mean = f(mean)
    moments = WeightedMoments(at_mean)
    sums = None if slope is None else SteinSums(at_mean, s, slope)
    # An integral is the same wherever panels meet, but they have to meet at a jump as it moves.
    for z, w in _panels(mean, s, kinks) if kinks and moving else _panels(mean.detach(), s.detach(), kinks):
        value = f(torch.addcmul(mean, s, z)) - at_mean if increment is None else increment(mean, s * z)
        moments.add(w, value)
        if sums is not None:
            sums.add(w, z, value)
    found = at_mean + ratio * moments.mean, ratio * moments.var
    return found if sums is None else (*found, *sums.partials(moments, s, ratio))


def by_rows(run: Callable[..., tuple[Tensor, ...]], mean: Tensor, *more: Any) -> tuple[Tensor, ...]:
    """``run(mean, *more)`` on some examples at a time: of what is shaped as ``mean`` on their rows, of all else on the whole."""
    rows = max(1, BLOCK * len(mean) // max(1, mean.numel())) if mean.ndim else 1
    if mean.ndim == 0 or rows >= len(mean):
        return run(mean, *more)

    def part(x: Any, i: int) -> Any:
        whole = not isinstance(x, Tensor) or x.ndim < mean.ndim or len(x) == 1
        return x if whole else x[i : i + rows]

    parts = [run(*(part(x, i) for x in (mean, *more))) for i in range(0, len(mean), rows)]
    return tuple(torch.cat(each) for each in zip(*parts, strict=True))


def _by_blocks(run, f, mean, var, kinks, increment, *more):
    """``run`` on some examples at a time, where what f closes over serves each of them."""
    if mean.ndim == 0 or f(mean[:1]).shape != mean[:1].shape:
        return run(f, mean, var, kinks, increment, *more)
    n = len(kinks)
    return by_rows(lambda m, v, *rest: run(f, m, v, list(rest[:n]), increment, *rest[n:]), mean, var, *kinks, *more)


def _recomputed(f, mean, var, kinks, increment, slope=None, moving=True):
    return checkpoint(_summed, f, mean, var, kinks, increment, slope, moving, use_reentrant=False, preserve_rng_state=False)


def _slope(value: Tensor, at: Tensor, *, create_graph: bool = False) -> Tensor:
    """f'(at), of the ``value`` f(at) of an elementwise f; 0 where it has none, as an indicator."""
    if not value.requires_grad:
        return torch.zeros_like(at)
    slope = torch.autograd.grad(value.sum(), at, allow_unused=True, create_graph=create_graph)[0]
    return torch.zeros_like(at) if slope is None else slope


class _Integrated(torch.autograd.Function):
    """Mean and variance of a function of numbers alone; saves (mean, var) and the four partial derivatives."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, slope: Tensor, *function: Any) -> tuple[Tensor, Tensor]:
        f, kinks, increment = function
        out, out_var, *partials = _by_blocks(_summed, f, mean, var, kinks, increment, slope)
        ctx.save_for_backward(mean, var, *partials)
        ctx.function = function
        return out, out_var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, mean_by_mean, var_by_mean, mean_by_var, var_by_var = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a graph of the backward pass (create_graph=True)
            f, kinks, increment = ctx.function
            at = mean if mean.requires_grad else mean.detach().requires_grad_()
            partials = _by_blocks(_recomputed, f, mean, var, kinks, increment, _slope(f(at), at, create_graph=True))[2:]
            mean_by_mean, var_by_mean, mean_by_var, var_by_var = partials
        by_mean = torch.addcmul(grad_mean * mean_by_mean, grad_var, var_by_mean)
        by_var = torch.addcmul(grad_mean * mean_by_var, grad_var, var_by_var)
        return by_mean, by_var, *(None,) * (1 + len(ctx.function))


class Detached(torch.autograd.Function):
    """``detach`` for gradients, the identity for the slopes that a function is linearised by."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is needed later."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.clone()


def _is_detached_inside(value: Tensor) -> bool:
    """Its gradients are not those of a function's values, as of a straight-through estimator."""
    todo = [value.grad_fn]
    while todo:
        node = todo.pop()
        if type(node).__name__ == "DetachedBackward":
            return True
        todo += [] if node is None else [each for each, _ in node.next_functions]
    return False


def quadrature(
    f: Function, mean: Tensor, var: Tensor, kinks: Kinks = (), increment: Increment | None = None
) -> tuple[Tensor, Tensor]:
    """Moments of f(X) for any elementwise f.

    f maps a tensor of the shape of `mean` to one of the same shape, and may close over tensors that broadcast
    with it; they get their gradients. It is called 36 times or so, or 22 (len(kinks) + 1) + 2 times.
    kinks: positions where f or a derivative jumps, floats in any order or broadcastable tensors in ascending
    order; the panels of integration end there. Without kinks f should be smooth at the scale of 1 about 0 or at the scale of the
    deviation. increment(m, d): f(m + d) - f(m), where float32 would lose it.
    Var is a sum of squares; at var = 0 the result is exactly (f(mean), 0).
    """
    if is_traced():
        return _summed(f, mean, var, kinks, increment)
    if torch.is_grad_enabled():
        if f(mean.detach()).requires_grad or any(isinstance(kink, Tensor) and kink.requires_grad for kink in kinks):
            return _by_blocks(_recomputed, f, mean, var, kinks, increment)
        if mean.requires_grad or var.requires_grad:
            at = mean.detach().requires_grad_()
            value = f(at)
            if _is_detached_inside(value):
                return _by_blocks(_recomputed, f, mean, var, kinks, increment, None, False)
            return _Integrated.apply(mean, var, _slope(value, at), f, kinks, increment)
    return _by_blocks(_summed, f, mean, var, kinks, increment)
