"""Moments of a function that bends at a point, from a table that quadrature fills once.

f(t) is smooth on either side of t = 0, with f(0) = 0; X ~ N(m, v), s = sqrt(v). The half-plane of (m, v) is covered by
p = m/s in [-8, 8], beyond which a Gaussian sees one side only, and q = s/(s + c), c the scale on which f leaves its tangents.
In these coordinates the kink is smooth, however small s is. The table holds (E[f(X)] - f₀(m))/s, f₀ the two tangents, and

    L = log2(Var f(X)/v),

over c²/(s + c)² where f is bounded. A second kink, the mirror image of the first, is met by folding m to the near side of the
middle; for the variance on the far side, f that becomes x + f is held with

    g = E[f'(X)],    L = log2((Var f(X) - v g²)/v).

An f that is curved beyond the table goes on from its edge by a law of its own: over a step u, an exponential's moments and
gradients grow by e^u and e^2u, a parabola's mean by a parabola and its gain by a line.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from rvconvert.moments.normal import step
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

_GRID = Grid(end=8, in_p=2048, in_q=1536, spacing=16)
_OF_PARTIALS = _GRID._replace(in_p=1024, in_q=192)
_ROWS = 64  # of q where quadrature is done
_LEAST = 1e-30  # of a variance: s is no smaller than its root, and m no nearer to the kink than eight of these


class Shape(NamedTuple):
    """What a kernel knows of a function beside its table; hashable.

    Attributes:
        left, right: its slopes at 0.
        width: c.
        level: f is constant at both ends, so Var/v vanishes as 1/s².
        fold: None; "odd" for f(2k - t) = 2f(k) - f(t) about the middle k; "even" for f(k + u) = u + f(k - u).
        beyond: what f is beyond the table where it is no line there: "exponential", left (e^t - 1) on the left of it;
            "parabola", t (t - 3)/6 on the right, as hardswish is.
    """

    left: float
    right: float
    width: float
    level: bool = False
    fold: str | None = None
    beyond: str | None = None


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
        q = _GRID._replace(in_q=_ROWS).corners()[1][:, None].clip(1e-5, 1 - 1e-5)
        root = shape.width * q / (1 - q)
        mean, var = np.broadcast_arrays(_GRID.nodes() * root, root**2)
        bends = sorted([0.0, 2 * self.middle if math.isfinite(self.middle) else -8 * shape.width])
        found = integrals(self.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), bends)
        expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
        ratio = rest + gain**2
        logarithm = np.log2(rest if shape.fold == "even" else ratio / (1 - q) ** 2 if shape.level else ratio)
        first = expected / root
        for value in (first, logarithm, gain, ratio):  # the first row lies a little beside q = 0, where nothing can be integrated
            value[0] -= (value[1] - value[0]) * (q[0] / (q[1] - q[0]))
        values = (logarithm, gain, first) if shape.fold == "even" else (logarithm, first)
        moments = moments_at_corners(_GRID, local(len(q), _GRID.in_q).T, *values)
        p, at = _GRID.corners()
        moments[-1] -= np.where(p > 0, shape.right, shape.left) * p
        moments[-1] /= _GRID.end  # in units of x
        if shape.fold == "even":
            moments[1, :, 0] = 0.0
        else:
            moments[0, :, -1] = math.log2(shape.right**2) - (2 * np.log2((1 - at).clip(1e-5)) if shape.level else 0.0)
        at = _OF_PARTIALS.corners()[1]
        by_var = np.full(len(at), 0.5), at * (1 - at) / 2
        partials = partials_at_corners(_OF_PARTIALS, local(len(q), _OF_PARTIALS.in_q).T, gain, ratio, *by_var, _GRID.end)
        partials = partials[: 5 if shape.fold == "even" else 4]
        if shape.beyond != "exponential":
            partials[..., 0] = 0.0
        if shape.beyond != "parabola":
            partials[..., -1] = np.array([shape.right, 0.0, 0.0, shape.right**2, 0.0])[: len(partials), None]
        return as_table(moments), as_table(partials)


# ---- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where (m, v) lies, seen from the kink."""

    t: Tensor  # from the (nearest) kink
    inverse: Tensor  # 1/(end s)
    x: Tensor  # of ``Grid.read``
    y: Tensor
    u: Tensor | None  # from the table's edge, where f goes on beyond it; 0 inside
    far: Tensor | None  # 1 on the far side of the fold, else 0


def _place(mean: Tensor, var: Tensor, ends: tuple[float, float], shape: Shape) -> _Place:
    far = None
    t = mean - ends[0] if ends[0] else mean
    if shape.fold:
        other = ends[1] - mean
        far = step(t - other)
        t = torch.minimum(t, other)
    inverse = torch.rsub(var, _GRID.end**2 * _LEAST, alpha=-(_GRID.end**2)).rsqrt_()
    x = (t + 8.5 * math.sqrt(_LEAST)).mul_(inverse)
    u = None
    if shape.beyond:
        u = (x - 1).clamp_(min=0.0) if shape.beyond == "parabola" else (x + 1).clamp_(max=0.0)
        u = u.div_(inverse)
    # y = 2 (1 + DENSER) q / (1 + DENSER q) - 1, q = 1/(1 + c/s)
    y = torch.rsub(inverse, 1 + DENSER, alpha=-_GRID.end * shape.width).reciprocal_()
    return _Place(t, inverse, x.clamp_(-1, 1), torch.rsub(y, -1, alpha=-2 * (1 + DENSER)), u, far)


def _kernel(mean: Tensor, var: Tensor, table: Tensor, ends: tuple[float, float], shape: Shape) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, ends, shape)
    logarithm, *gain, out = _GRID.bilinear(table, at.x, at.y)
    out = out.div_(at.inverse)
    t = at.t - at.u if at.u is not None and shape.beyond == "parabola" else at.t  # of which f₀ is the tangent
    if shape.left == shape.right:
        out = out.add_(t, alpha=shape.left)
    elif shape.fold != "odd":  # else f₀ is what the clamp adds below
        out = out.add_(t.clamp(min=0.0), alpha=shape.right) if shape.right else out
        out = out.add_(t.clamp(max=0.0), alpha=shape.left) if shape.left else out
    if at.u is None:
        ratio = logarithm.exp2_()
    elif shape.beyond == "exponential":
        ratio = logarithm.add_(at.u, alpha=2 / math.log(2)).exp2_()
        out = out.sub_(at.u, alpha=shape.left)  # as at the edge
        out = torch.addcmul(out, out + shape.left, F.elu(at.u, inplace=True))
    else:
        out = out.addcmul_(at.u, (at.t - 3).add_(t), value=1 / 6)
        gain = [gain[0].add_(at.u, alpha=1 / 3)]
        ratio = logarithm.exp2_().lerp_(var / 18, at.u.sign_())
    if gain:  # the logarithm is of what the line leaves
        ratio = ratio.addcmul_(gain[0], gain[0])
    if at.far is not None:
        if shape.fold == "odd":
            out = out.addcmul_(out, at.far, value=-2) + mean.clamp(*ends)
        else:  # f(k + u) = u + f(k - u): 1 - g in the place of g
            out = out + (mean - 0.5 * (ends[0] + ends[1])).clamp(min=0.0)
            ratio = ratio.addcmul_(at.far, torch.rsub(gain[0], 1, alpha=2))
    if shape.level:
        size = torch.rsub(at.inverse, 1 / shape.width, alpha=-_GRID.end).reciprocal_()  # s c/(s + c)
        return out, (ratio * size).mul_(size)
    return out, ratio * var


def _partials(mean: Tensor, var: Tensor, table: Tensor, ends: tuple[float, float], shape: Shape) -> Partials:
    at = _place(mean, var, ends, shape)
    gain, curvature, by_mean, by_var, *gain_by_var = _OF_PARTIALS.bilinear(table, at.x, at.y)
    curvature, by_mean = curvature.mul_(at.inverse), by_mean.mul_(at.inverse)
    if at.u is not None and shape.beyond == "exponential":
        growth = torch.exp(at.u)
        gain, curvature = gain.mul_(growth), curvature.mul_(growth)
        growth = growth * growth
        by_mean, by_var = by_mean.mul_(growth), by_var.mul_(growth)
    elif at.u is not None:
        gain, by_mean = gain.add_(at.u, alpha=1 / 3), by_mean.add_(at.u, alpha=2 / 9)
        by_var = by_var.lerp_(torch.addcmul(var / 9, gain, gain), at.u.sign())
    if at.far is not None:
        sign = torch.rsub(at.far, 1, alpha=2)
        if shape.fold == "odd":
            curvature, by_mean = curvature.mul_(sign), by_mean.mul_(sign)
        else:  # Var/v is 1 - 2g more, g becomes 1 - g
            rest = torch.rsub(gain, 1, alpha=2)
            by_mean = by_mean.mul_(sign).addcmul_(at.far, curvature, value=4)
            by_var = by_var.addcmul_(at.far, torch.sub(rest, gain_by_var[0], alpha=2))
            gain = torch.addcmul(gain, at.far, rest)
    return Partials(gain, curvature, by_mean.mul_(var), by_var)


_KERNELS = Kernels(_kernel, _partials)


def kinked_moments(
    curve: Kinked, mean: Tensor, var: Tensor, ends: tuple[float, float] = (0.0, 0.0), width: float | None = None
) -> tuple[Tensor, Tensor]:
    """Moments of f(X - ends[0]) in the units in which f is ``width`` wide; float32.

    ends: the kink, and the second one where there is one. The result is f(X - ends[0]) for a function with no fold,
    the value clamped to ``ends`` for an odd one, x + f(-x) for an even one.
    """
    shape = curve.shape if width is None else curve.shape._replace(width=width)
    return tabulated(curve, _KERNELS, mean, var, ends, shape)
