"""Moments of a function that bends at a point, from a table that quadrature fills once.

f(t) is smooth on either side of t = 0, with f(0) = 0; X ~ N(m, v), s = sqrt(v). The half-plane of (m, v) is covered by
p = m/s in [-8, 8], beyond which a Gaussian sees one side only, and q = s/(s + c), c the scale on which f leaves its tangents.
In these coordinates the kink is smooth, however small s is. The table holds (E[f(X)] - f₀(m))/s, f₀ the two tangents, and

    L = log2(Var f(X)/v),

over c²/(s + c)² where f is bounded. A second kink, the mirror image of the first, is met by folding m to the near side of the
middle; for the variance on the far side, f that becomes x + f is held with

    g = E[f'(X)],    L = log2((Var f(X) - v g²)/v).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

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
    moments_at_corners,
    partials_at_corners,
    tabulated,
)

if TYPE_CHECKING:
    from torch import Tensor

_GRID = Grid(end=8, in_p=1024, in_q=192, spacing=16, curved_in_q=True)
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
        """Some 50,000 quadratures in float64, then interpolation onto the corners."""
        shape = self.shape
        q = _GRID.corners()[1][:, None].clip(1e-5, 1 - 1e-5)
        root = shape.width * q / (1 - q)
        mean, var = np.broadcast_arrays(_GRID.nodes() * root, root**2)
        bends = sorted([0.0, 2 * self.middle if math.isfinite(self.middle) else -8 * shape.width])
        found = integrals(self.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), bends)
        expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
        rows, ratio = np.eye(len(q)), rest + gain**2
        scale = (1 - q) ** 2 if shape.level else np.ones_like(q)
        values = (gain, np.log2(rest)) if shape.fold == "even" else (np.log2(ratio / scale),)
        moments = moments_at_corners(_GRID, rows, expected / root, *values)
        partials = partials_at_corners(_GRID, rows, gain, ratio, np.full(len(q), 0.5), (q * (1 - q))[:, 0] / 2)
        partials = partials[: 5 if shape.fold == "even" else 4]
        p = _GRID.corners()[0]
        moments[0] -= np.where(p > 0, shape.right, shape.left) * p
        moments[:: 1 + len(values)] /= _GRID.end  # in units of x
        if shape.fold == "even":
            moments[1, :, 0] = 0.0
        else:
            moments[1, :, -1] = np.log2(shape.right**2 / scale[:, 0])
        if shape.beyond != "exponential":
            partials[..., 0] = 0.0
        if shape.beyond != "parabola":
            partials[..., -1] = np.array([shape.right, 0.0, 0.0, shape.right**2, 0.0])[: len(partials), None]
        for value in (*moments, *partials):  # the first row lies a little beside q = 0, where there is nothing to integrate
            value[0] -= (value[1] - value[0]) * (q[0] / (q[1] - q[0]))
        return as_table(moments), as_table(partials)


# ---- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where (m, v) lies, seen from the kink."""

    t: Tensor  # from the (nearest) kink
    inverse: Tensor  # 1/(end s)
    x: Tensor  # of ``Grid.read``
    y: Tensor
    beyond: Tensor | None  # 1 beyond the table, else 0
    far: Tensor | None  # 1 on the far side of the fold, else 0


def _place(mean: Tensor, var: Tensor, ends: tuple[float, float], shape: Shape) -> _Place:
    far = None
    t = mean - ends[0] if ends[0] else mean
    if shape.fold:
        other = ends[1] - mean
        far = step(t - other)
        t = torch.minimum(t, other)
    inverse = torch.rsqrt(torch.rsub(var, _GRID.end**2 * _LEAST, alpha=-(_GRID.end**2)))
    x = (t + 8.5 * math.sqrt(_LEAST)) * inverse
    beyond = None if shape.beyond is None else step((x if shape.beyond == "parabola" else -x) - 1)
    # y = 2 (1 + DENSER) q / (1 + DENSER q) - 1, q = 1/(1 + c/s)
    y = torch.rsub(inverse, 1 + DENSER, alpha=-_GRID.end * shape.width).reciprocal_()
    return _Place(t, inverse, x.clamp_(-1, 1), torch.rsub(y, -1, alpha=-2 * (1 + DENSER)), beyond, far)


class _Closed(NamedTuple):
    """Beyond the table: E[f], E[f'], E[f'']/2, Var/v, its derivative by m, and that of the variance by v."""

    out: Tensor
    gain: Tensor
    curvature: Tensor
    ratio: Tensor
    by_mean: Tensor
    by_var: Tensor


def _closed(at: _Place, var: Tensor, shape: Shape) -> _Closed:
    if shape.beyond == "parabola":
        gain = (at.t - 1.5) / 3
        gain2 = gain * gain
        return _Closed(
            torch.addcmul(var, at.t, at.t - 3) / 6,
            gain,
            torch.full_like(gain, 1 / 6),
            torch.add(gain2, var, alpha=1 / 18),
            gain * (2 / 3),
            torch.add(gain2, var, alpha=1 / 9),
        )
    # Where the mask is 1, v < t²/64; elsewhere numbers need be finite only.
    t = at.t.clamp(max=0.0)
    v = torch.minimum(var, t.square() * (1 / _GRID.end**2)).clamp(max=float(_GRID.end**2))
    gain = torch.exp(torch.add(t, v, alpha=0.5)) * shape.left
    gain2 = gain * gain
    inner = torch.expm1(v)
    ratio = gain2 * (inner / v.clamp(min=_LEAST)).clamp(min=1.0)
    return _Closed(gain - shape.left, gain, gain / 2, ratio, 2 * ratio, torch.addcmul(gain2, gain2, inner, value=2))


def _kernel(mean: Tensor, var: Tensor, table: Tensor, ends: tuple[float, float], shape: Shape) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, ends, shape)
    out, *gain, logarithm = _GRID.moments(table, at.x, at.y)
    out, ratio = out / at.inverse, torch.exp2(logarithm)
    if gain:  # the logarithm is of what the line leaves
        ratio = torch.addcmul(ratio, gain[0], gain[0])
    if shape.fold != "odd":  # else f₀ is what the clamp adds below
        out = torch.add(out, at.t.clamp(min=0.0), alpha=shape.right) if shape.right else out
        out = torch.add(out, at.t.clamp(max=0.0), alpha=shape.left) if shape.left else out
    if at.beyond is not None:
        closed = _closed(at, var, shape)
        out, ratio = torch.lerp(out, closed.out, at.beyond), torch.lerp(ratio, closed.ratio, at.beyond)
        gain = [torch.lerp(each, closed.gain, at.beyond) for each in gain]
    if at.far is not None:
        if shape.fold == "odd":
            out = torch.addcmul(out, out, at.far, value=-2) + mean.clamp(*ends)
        else:  # f(k + u) = u + f(k - u): 1 - g in the place of g
            out = out + (mean - 0.5 * (ends[0] + ends[1])).clamp(min=0.0)
            ratio = torch.addcmul(ratio, at.far, torch.rsub(gain[0], 1, alpha=2))
    if shape.level:
        size = torch.rsub(at.inverse, 1 / shape.width, alpha=-_GRID.end).reciprocal_()  # s c/(s + c)
        return out, ratio * size * size
    return out, ratio * var


def _partials(mean: Tensor, var: Tensor, table: Tensor, ends: tuple[float, float], shape: Shape) -> Partials:
    at = _place(mean, var, ends, shape)
    gain, curvature, by_mean, by_var, *gain_by_var = _GRID.partials(table, at.x, at.y)
    curvature, by_mean = curvature * at.inverse, by_mean * at.inverse
    if at.beyond is not None:
        closed = _closed(at, var, shape)
        pairs = ((gain, closed.gain), (curvature, closed.curvature), (by_mean, closed.by_mean), (by_var, closed.by_var))
        gain, curvature, by_mean, by_var = (torch.lerp(*each, at.beyond) for each in pairs)
    if at.far is not None:
        sign = torch.rsub(at.far, 1, alpha=2)
        if shape.fold == "odd":
            curvature, by_mean = curvature * sign, by_mean * sign
        else:  # Var/v is 1 - 2g more, g becomes 1 - g
            rest = torch.rsub(gain, 1, alpha=2)
            by_mean = torch.addcmul(by_mean * sign, at.far, curvature, value=4)
            by_var = torch.addcmul(by_var, at.far, torch.sub(rest, gain_by_var[0], alpha=2))
            gain = torch.addcmul(gain, at.far, rest)
    return Partials(gain, curvature, by_mean * var, by_var)


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
