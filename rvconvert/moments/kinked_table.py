"""Moments of a function that bends at a point, from a table that quadrature fills once.

f(t) is smooth on either side of t = 0, with f(0) = 0; X ~ N(m, v), s = sqrt(v). The half-plane of (m, v) is covered by
p = m/s in [-8, 8], beyond which a Gaussian sees one side only, and q = s/(s + c), c the scale on which f leaves its tangents.
In these coordinates the kink is smooth, however small s is. The table holds (E[f(X)] - f₀(m))/s, f₀ the two tangents, and

    L = log2(Var f(X)/v),

over c²/(s + c)² where f is bounded, as are the partial derivatives of Var. A second kink, the mirror image of the first, is met
by folding m to the near side of the middle. An exponential goes on beyond the table by a law of its own: over a step u from its
edge, moments and gradients grow by e^u and e^2u.

Hardswish is a parabola between its kinks, and f(x) = x + f(-x). Beyond the table its mean is v/6 from f; beside that of the
mean are held

    g = E[f'(X)],    L = log2((Var f(X) - v g²)/v),

of which g becomes 1 - g on the far side, and the rest is as on the near one; beyond the table g goes on by a line.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rvconvert.moments.normal import affine, step
from rvconvert.moments.table import (
    DENSER,
    Curve,
    Function,
    Grid,
    Kernels,
    Partials,
    as_table,
    integrals,
    local,
    moments_at_corners,
    partials_at_corners,
    tabulated,
)

if TYPE_CHECKING:
    from torch import Tensor

_GRID = Grid(end=8, in_p=2048, in_q=1152, spacing=16)
_OF_HARDSWISH = _GRID._replace(end=6, in_p=1664)  # narrower: its mean is curved along q, as p² is
_OF_PARTIALS, _OF_HARDSWISHS = (grid._replace(in_p=grid.in_p // 2, in_q=192) for grid in (_GRID, _OF_HARDSWISH))
_ROWS = 64  # of q where quadrature is done
_LEAST = 1e-30  # of a variance: s is no smaller than its root, and m no nearer to the kink than eight of these


class Shape(NamedTuple):
    """What a kernel knows of a function beside its table; hashable.

    Attributes:
        left, right: its slopes at 0.
        width: c.
        level: f is constant at both ends, so Var/v vanishes as 1/s².
        odd: f(2k - t) = 2f(k) - f(t) about the middle k.
        exponential: f is left (e^t - 1) on the left.
        hardswish: f is F.hardswish(t - 3).
    """

    left: float
    right: float
    width: float
    level: bool = False
    odd: bool = False
    exponential: bool = False
    hardswish: bool = False


class Kinked(Curve):
    """A function with a kink at 0 and perhaps the mirror image of it at ``2 middle``.

    Args:
        function: as of ``Curve``.
        shape: its properties.
        middle: half the distance to the second kink; only m <= middle is ever looked up.
    """

    def __init__(self, function: Function, shape: Shape, middle: float = math.inf) -> None:
        super().__init__(function)
        self.shape, self.middle = shape, middle

    def fill(self) -> tuple[Tensor, ...]:
        """Some 17,000 quadratures in float64, then interpolation onto the corners."""
        shape = self.shape
        grid, of_partials = (_OF_HARDSWISH, _OF_HARDSWISHS) if shape.hardswish else (_GRID, _OF_PARTIALS)
        q = grid._replace(in_q=_ROWS).corners()[1][:, None].clip(1e-5, 1 - 1e-5)
        root = shape.width * q / (1 - q)
        mean, var = np.broadcast_arrays(grid.nodes() * root, root**2)
        bends = sorted([0.0, 2 * self.middle if math.isfinite(self.middle) else -8 * shape.width])
        found = integrals(self.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), bends)
        expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
        ratio = rest if shape.hardswish else rest + gain**2
        ratio = ratio / (1 - q) ** 2 if shape.level else ratio
        logarithm = np.log2(ratio)
        first = expected / root
        for value in (first, logarithm, gain, ratio):  # the first row lies a little beside q = 0, where nothing can be integrated
            value[0] -= (value[1] - value[0]) * (q[0] / (q[1] - q[0]))
        values = (logarithm, gain, first) if shape.hardswish else (logarithm, first)
        moments = moments_at_corners(grid, local(len(q), grid.in_q).T, *values)
        p, at = grid.corners()
        moments[-1] -= np.where(p > 0, shape.right, shape.left) * p
        if shape.hardswish:
            moments[1, :, 0] = 0.0
        else:
            moments[0, :, -1] = math.log2(shape.right**2) - (2 * np.log2((1 - at).clip(1e-5)) if shape.level else 0.0)
        moments[-1] /= grid.end  # in units of x
        at = of_partials.corners()[1]
        by_var, rises = (np.full(len(at), 0.5), at * (1 - at) / 2), at if shape.level else 0.0
        partials = partials_at_corners(of_partials, local(len(q), of_partials.in_q).T, gain, ratio, *by_var, grid.end, rises)
        if shape.hardswish:
            partials[..., 0] = 0.0
            partials[0] -= 0.5
            partials[2] *= -1
            partials[4] *= -2
        else:
            partials = partials[:4]
            if not shape.exponential:
                partials[..., 0] = 0.0
            partials[..., -1] = np.array([shape.right, 0.0, 0.0, shape.right**2])[:, None]
            if shape.level:
                partials[3, :, -1] /= (1 - at).clip(1e-5) ** 2
        return as_table(moments), as_table(partials)


# ---- reading -----------------------------------------------------------------------------------------------------


def _place(t: Tensor, var: Tensor, end: int, width: float) -> tuple[Tensor, Tensor, Tensor]:
    """1/(end s), and x, not yet in [-1, 1], and y of ``Grid.read``."""
    inverse = affine(var, end**2, end**2 * _LEAST).rsqrt_()
    x = (t + 8.5 * math.sqrt(_LEAST)).mul_(inverse)
    # y = 2 (1 + DENSER) q / (1 + DENSER q) - 1, q = 1/(1 + c/s)
    y = affine(inverse, end * width, 1 + DENSER).reciprocal_()
    return inverse, x, affine(y, 2 * (1 + DENSER), -1)


def _from_kink(mean: Tensor, ends: tuple[float, float], shape: Shape) -> tuple[Tensor, Tensor | None]:
    """m from the (nearest) kink, and 1 on the far side of the fold, else 0."""
    t = mean - ends[0] if ends[0] else mean
    if not shape.odd:
        return t, None
    other = ends[1] - mean
    return torch.minimum(t, other), step(t - other)


def _kernel(mean: Tensor, var: Tensor, table: Tensor, ends: tuple[float, float], shape: Shape) -> tuple[Tensor, Tensor]:
    t, far = _from_kink(mean, ends, shape)
    inverse, x, y = _place(t, var, _GRID.end, shape.width)
    u = (x + 1).clamp_(max=0.0).div_(inverse) if shape.exponential else None
    logarithm, out = _GRID.bilinear(table, x.clamp_(-1, 1), y)
    out = out.div_(inverse)
    if shape.left == shape.right:
        out = out.add_(t, alpha=shape.left)
    elif not shape.odd:  # else f₀ is what the clamp adds below
        out = out.add_(t.clamp(min=0.0), alpha=shape.right) if shape.right else out
        out = out.add_(t.clamp(max=0.0), alpha=shape.left) if shape.left else out
    if u is None:
        ratio = logarithm.exp2_()
    else:
        ratio = logarithm.add_(u, alpha=2 / math.log(2)).exp2_()
        out = out.sub_(u, alpha=shape.left)  # as at the edge
        out = torch.addcmul(out, out + shape.left, u.expm1_())
    if far is not None:
        out = out.addcmul_(out, far, value=-2) + mean.clamp(*ends)
    if shape.level:
        size = affine(inverse, _GRID.end, 1 / shape.width).reciprocal_()  # s c/(s + c)
        return out, (ratio * size).mul_(size)
    return out, ratio * var


def _partials(mean: Tensor, var: Tensor, table: Tensor, ends: tuple[float, float], shape: Shape) -> Partials:
    t, far = _from_kink(mean, ends, shape)
    inverse, x, y = _place(t, var, _GRID.end, shape.width)
    u = (x + 1).clamp_(max=0.0).div_(inverse) if shape.exponential else None
    gain, curvature, by_mean, by_var = _OF_PARTIALS.bilinear(table, x.clamp_(-1, 1), y)
    curvature, by_mean = curvature.mul_(inverse), by_mean.mul_(inverse)
    if u is not None:
        growth = torch.exp(u)
        gain, curvature = gain.mul_(growth), curvature.mul_(growth)
        growth = growth * growth
        by_mean, by_var = by_mean.mul_(growth), by_var.mul_(growth)
    if shape.level:
        share = affine(affine(inverse, _GRID.end * shape.width, 1).reciprocal_(), -1, 1).square_()  # c²/(s + c)²
        by_mean, by_var = by_mean.mul_(share), by_var.mul_(share)
    if far is not None:
        sign = affine(far, -2, 1)
        curvature, by_mean = curvature.mul_(sign), by_mean.mul_(sign)
    return Partials(gain, curvature, by_mean.mul_(var), by_var)


def _hardswish_kernel(mean: Tensor, var: Tensor, table: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    inverse, x, y = _place(affine(mean.abs(), -1, 3), var, _OF_HARDSWISH.end, shape.width)
    u = (x - 1).clamp_(min=0.0).div_(inverse)
    logarithm, gain, out = _OF_HARDSWISH.bilinear(table, x.clamp_(-1, 1), y)
    inside = x.clamp_(min=0.0).div_(inverse)  # what lies above the tangents is a parabola
    out = out.div_(inverse).addcmul_(inside, inside, value=-1 / 6).add_(F.hardswish(mean))
    gain = step(mean).sub_(gain.add_(u, alpha=1 / 3))  # its sign is of no matter
    rest = logarithm.exp2_().lerp_(var / 18, u.sign_())
    return out, rest.addcmul_(gain, gain) * var


def _hardswish_partials(mean: Tensor, var: Tensor, table: Tensor, shape: Shape) -> Partials:
    """The table holds g - 1/2, U/2 E[f''], -U dR/dm, R + v dR/dv and -2 v dg/dv, where v R is what the line leaves of Var."""
    inverse, x, y = _place(affine(mean.abs(), -1, 3), var, _OF_HARDSWISH.end, shape.width)
    u = (x - 1).clamp_(min=0.0).div_(inverse)
    gain, curvature, by_mean, by_var, gain_by_var = _OF_HARDSWISHS.bilinear(table, x.clamp_(-1, 1), y)
    far = mean.sign()
    gain = affine(gain.add_(u, alpha=1 / 3).mul_(far), -1, 0.5)
    by_mean = by_mean.mul_(far).addcmul_(gain, curvature, value=4)
    by_var = by_var.addcmul_(gain, torch.addcmul(gain, far, gain_by_var))
    return Partials(gain, curvature * inverse, by_mean.mul_(inverse).mul_(var), by_var)


_KERNELS, _HARDSWISH = Kernels(_kernel, _partials), Kernels(_hardswish_kernel, _hardswish_partials)


def kinked_moments(
    curve: Kinked, mean: Tensor, var: Tensor, ends: tuple[float, float] = (0.0, 0.0), width: float | None = None
) -> tuple[Tensor, Tensor]:
    """Moments of f(X - ends[0]) in the units in which f is ``width`` wide; float32.

    ends: the kink, and the second one where there is one. The result is f(X - ends[0]), for an odd function the value clamped
    to ``ends``.
    """
    shape = curve.shape if width is None else curve.shape._replace(width=width)
    return tabulated(curve, _KERNELS, mean, var, ends, shape)


def hardswish_moments(curve: Kinked, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of F.hardswish(X); float32."""
    return tabulated(curve, _HARDSWISH, mean, var, curve.shape)
