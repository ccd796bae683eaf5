"""Moments of a function that bends at a point, from a table that quadrature fills once.

f(t) is smooth on either side of t = 0, with f(0) = 0; X ~ N(m, v), s = sqrt(v). The half-plane of (m, v) is covered by
p = m/s in [-8, 8], beyond which a Gaussian sees one side only, and q = s/(s + c), c the scale on which f leaves its tangents.
In these coordinates the kink is smooth, however small s is. Each cell of (p, q) holds polynomials of

    g = E[f'(X)],    L = log2 of K = (Var f(X) - v g²)/v over what it vanishes with at either end of q,

and of (E[f(X)] - f₀(m))/s, f₀ the two tangents, whose dependence on p is the integral of g - f₀'. So Var = v (g² + K).
A second kink, the mirror image of the first, is met by folding m to the near side of the middle.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.normal import step
from rvconvert.moments.quadrature import flushed
from rvconvert.moments.table import in_p, integrals, nodes_in_p, quadratic, read

Function = Callable[[Tensor], Tensor]
_END, _CELLS_P, _CELLS_Q, _SPACING = 8, 512, 128, 16  # as in ``table``
_DENSER = 2.0
_PER_CELL = _CELLS_P / (2 * _END)
_LEAST = 1e-30  # of a variance: s is no smaller than its root, and m no nearer to the kink than eight of these


class Shape(NamedTuple):
    """What a kernel knows of a function beside its table; hashable.

    Attributes:
        left, right: its slopes at 0.
        width: c.
        smooth: f' does not jump at 0, so K vanishes as s².
        level: f is constant at both ends, so K vanishes as 1/s².
        fold: None; "odd" for f(2k - t) = 2f(k) - f(t) about the middle k; "even" for f(k + u) = u + f(k - u).
        beyond: what f is beyond the table where it is no line there: "exponential", left (e^t - 1) on the left of it;
            "parabola", t (t - 3)/6 on the right, as hardswish is.
    """

    left: float
    right: float
    width: float
    smooth: bool = False
    level: bool = False
    fold: str | None = None
    beyond: str | None = None


class Kinked:
    """A function with a kink at 0 and perhaps the mirror image of it at ``2 middle``.

    Args:
        function: of a tensor, elementwise, in float64.
        shape: its properties.
        middle: half the distance to the second kink; only m <= middle is ever looked up.
    """

    def __init__(self, function: Function, shape: Shape, middle: float = math.inf) -> None:
        self.function, self.shape, self.middle = function, shape, middle

        self.number = len(CURVES)
        CURVES.append(self)

    @functools.cached_property
    def table(self) -> Tensor:
        """(16, cells) coefficients, in float64 on the processor."""
        with torch.no_grad(), torch.device("cpu"):
            return _fill(self)


CURVES: list[Kinked] = []
_COEFFICIENTS: dict[tuple[int, torch.device], Tensor] = {}


@torch.compiler.assume_constant_result  # type: ignore[misc]
def _coefficients(number: int, device: torch.device) -> Tensor:
    """A curve's coefficients in float32 on a device, made at first use; a constant of a compiled graph."""
    key = (number, device)
    if key not in _COEFFICIENTS:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve everywhere
            _COEFFICIENTS[key] = CURVES[number].table.to(device, torch.float32)
    return _COEFFICIENTS[key]


@functools.cache
def _in_q() -> list[np.ndarray]:
    """From the ends and the middle of each cell to quadratics: a second kink is too sharp for one polynomial over all q."""
    made = np.zeros((3, _CELLS_Q, 2 * _CELLS_Q + 1))
    for k, weights in enumerate(np.linalg.inv(np.vander([0.0, 0.5, 1.0], increasing=True))):
        for i, weight in enumerate(weights):
            made[k, np.arange(_CELLS_Q), 2 * np.arange(_CELLS_Q) + i] = weight
    return list(made)


def _fill(curve: Kinked) -> Tensor:
    shape, p = curve.shape, nodes_in_p(_END, _SPACING)
    y = np.linspace(0, _CELLS_Q, 2 * _CELLS_Q + 1)[:, None]
    q = (y / ((1 + _DENSER) * _CELLS_Q - _DENSER * y)).clip(1e-5, 1 - 1e-5)
    root = shape.width * q / (1 - q)
    mean, var = np.broadcast_arrays(p * root, root**2)
    bends = sorted([0.0, 2 * curve.middle if math.isfinite(curve.middle) else -8 * shape.width])
    found = integrals(curve.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), bends)
    expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
    scale = (q**2 if shape.smooth else 1.0) * ((1 - q) ** 2 if shape.level else 1.0)
    values = [expected / root, gain, np.log2(rest / scale + 1e-300)]
    for value in values:  # the first row lies a little beside q = 0, where there is nothing to integrate
        value[0] -= (value[1] - value[0]) * q[0] / (q[1] - q[0])
    expected, gain, logarithm = values
    (quadratics, cubics), in_q = in_p(_CELLS_P, len(p)), _in_q()
    middles = (np.arange(_CELLS_P) + 0.5) / _PER_CELL - _END
    made = [each @ expected @ quadratics[0].T for each in in_q]
    made[0] = made[0] - np.where(middles > 0, shape.right, shape.left) * middles
    for value, along in ((gain, cubics), (logarithm, quadratics)):
        for a, b in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2), *((k, 0) for k in range(3, len(along)))):
            cells = in_q[b] @ value @ along[a].T
            # The outermost cells reach to infinity, where f is a constant on the left, a line on the right.
            if a or value is gain:
                if shape.beyond != "exponential":
                    cells[:, 0] = 0.0
                if shape.beyond != "parabola":
                    cells[:, -1] = 0.0 if a or b else shape.right
            made.append(cells)
    return torch.from_numpy(np.stack(made).reshape(len(made), -1))


# ---- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """As in ``table``, with what a kink needs."""

    cell: Tensor
    d: Tensor
    e: Tensor
    t: Tensor  # from the (nearest) kink
    by_mean: Tensor
    inverse: Tensor
    q: Tensor
    rest: Tensor  # 1 - q
    denser: Tensor  # 1 / (1 + _DENSER q)
    tangent: Tensor  # slope of f₀
    beyond: Tensor | None  # 1 beyond the table, else 0
    far: Tensor | None  # 1 on the far side of the fold, else 0


def _place(mean: Tensor, var: Tensor, ends: tuple[float, float], shape: Shape) -> _Place:
    far = None
    t = mean - ends[0]
    if shape.fold:
        other = ends[1] - mean
        far = step(t - other)
        t = torch.minimum(t, other)
    inverse = torch.rsqrt(var + _LEAST)
    by_mean = inverse * _PER_CELL
    x = (t + 8.5 * math.sqrt(_LEAST)) * by_mean
    reach = 1 / (1 + inverse * shape.width)  # s/(s + c)
    denser = 1 / torch.add(torch.ones_like(reach), reach, alpha=_DENSER)
    y = reach * denser * ((1 + _DENSER) * _CELLS_Q)
    i = torch.floor(x).clamp_(-_CELLS_P // 2, _CELLS_P // 2 - 1)
    j = torch.floor(y).clamp_(0, _CELLS_Q - 1)
    cell = torch.add(i, j, alpha=_CELLS_P).add_(_CELLS_P // 2).to(torch.int32)
    tangent = step(i + 0.5).mul_(shape.right - shape.left).add_(shape.left)
    beyond = None if shape.beyond is None else step((x if shape.beyond == "parabola" else -x) - _CELLS_P // 2)
    d = (x - i).sub_(0.5)
    if beyond is not None:
        d.clamp_(-1, 1)  # what another formula takes the place of stays finite
    return _Place(cell, d, y - j, t, by_mean, inverse, reach, 1 - reach, denser, tangent, beyond, far)


class _Closed(NamedTuple):
    """Beyond the table: E[f], E[f'], E[f''], Var/v, and the derivatives of the variance by m and by v."""

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
            torch.full_like(gain, 1 / 3),
            torch.add(gain2, var, alpha=1 / 18),
            gain * var * (2 / 3),
            torch.add(gain2, var, alpha=1 / 9),
        )
    # Where the mask is 1, v < t²/64; elsewhere numbers need be finite only.
    t = at.t.clamp(max=0.0)
    v = torch.minimum(var, t.square() * (1 / _END**2)).clamp(max=float(_END**2))
    gain = torch.exp(torch.add(t, v, alpha=0.5)) * shape.left
    gain2 = gain * gain
    inner = torch.expm1(v)
    return _Closed(
        gain - shape.left,
        gain,
        gain,
        gain2 * (inner / v.clamp(min=_LEAST)).clamp(min=1.0),
        gain2 * inner * 2,
        torch.addcmul(gain2, gain2, inner, value=2),
    )


def _spread(c: list[Tensor], at: _Place, shape: Shape) -> Tensor:
    spread = torch.exp2(quadratic(c, at.d, at.e))
    if shape.smooth:
        spread = spread * at.q * at.q
    return spread * at.rest * at.rest if shape.level else spread


def _kernel(mean: Tensor, var: Tensor, coefficients: Tensor, ends: tuple[float, float], shape: Shape) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, ends, shape)
    d, e = at.d, at.e
    a0, a1, a2, *c = read(coefficients, at.cell, 0, 16)
    gain = quadratic(c[:7], d, e)
    slope = torch.addcmul(c[1], d, torch.addcmul(c[2], d, c[6], value=0.75), value=2 / 3)
    along = torch.addcmul(c[0] - at.tangent, e, torch.addcmul(c[3], e, c[5]))
    along = torch.addcmul(along, d, torch.addcmul(slope, e, c[4]), value=0.5)
    out = torch.addcmul(a0, e, torch.addcmul(a1, e, a2))
    out = torch.addcmul(out, d, along, value=1 / _PER_CELL) / at.inverse
    ratio = torch.addcmul(_spread(c[7:], at, shape), gain, gain)
    if shape.fold != "odd":
        out = torch.addcmul(out, at.tangent, at.t)
    if at.beyond is not None:
        closed = _closed(at, var, shape)
        pairs = ((out, closed.out), (gain, closed.gain), (ratio, closed.ratio))
        out, gain, ratio = (torch.lerp(*each, at.beyond) for each in pairs)
    if at.far is not None:
        if shape.fold == "odd":
            out = torch.addcmul(out, out, at.far, value=-2) + mean.clamp(*ends)
        else:  # f(k + u) = u + f(k - u): 1 - g in the place of g
            out = out + (mean - 0.5 * (ends[0] + ends[1])).clamp(min=0.0)
            ratio = torch.addcmul(ratio, at.far, torch.rsub(gain, 1, alpha=2))
    return out, ratio * var


def _backward(
    mean: Tensor,
    var: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    coefficients: Tensor,
    ends: tuple[float, float],
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, ends, shape)
    d, e, by_mean = at.d, at.e, at.by_mean
    c = read(coefficients, at.cell, 3, 13)
    gain = quadratic(c[:7], d, e)
    curvature = torch.addcmul(c[1], d, torch.addcmul(c[2], d, c[6], value=1.5), value=2)
    curvature = torch.addcmul(curvature, e, c[4]) * by_mean  # E[f'']
    third = torch.addcmul(c[2], d, c[6], value=3) * (var * by_mean * by_mean)  # v E[f''']/2 = v dg/dv (Stein)
    rest = _spread(c[7:], at, shape)
    _, l1, l2, l3, l4, l5 = c[7:]
    log_by_mean = torch.addcmul(torch.addcmul(l1, d, l2, value=2), e, l4) * by_mean  # of L, a logarithm to the base of 2
    log_by_y = torch.addcmul(torch.addcmul(l3, d, l4), e, l5, value=2)
    # v dp/dv = -p/2; v dq/dv = q (1 - q)/2; dy/dq = (1 + _DENSER) CELLS/(1 + _DENSER q)². Twice v times the logarithm by v:
    grows = torch.addcmul(
        log_by_mean * -at.t, log_by_y * at.q, at.rest * at.denser * at.denser, value=(1 + _DENSER) * _CELLS_Q
    ).mul_(math.log(2))
    if shape.smooth:
        grows = torch.add(grows, at.rest, alpha=2)
    if shape.level:
        grows = torch.sub(grows, at.q, alpha=2)
    var_by_mean = var * torch.addcmul(2 * gain * curvature, rest, log_by_mean, value=math.log(2))
    var_by_var = torch.addcmul(torch.addcmul(rest, gain, gain), gain, third, value=2)
    var_by_var = torch.addcmul(var_by_var, rest, grows, value=0.5)
    if at.beyond is not None:
        closed = _closed(at, var, shape)
        gain, curvature, var_by_mean, var_by_var = (
            torch.lerp(*each, at.beyond)
            for each in (
                (gain, closed.gain),
                (curvature, closed.curvature),
                (var_by_mean, closed.by_mean),
                (var_by_var, closed.by_var),
            )
        )
    if at.far is not None:
        sign = torch.rsub(at.far, 1, alpha=2)
        if shape.fold == "odd":
            curvature, var_by_mean = curvature * sign, var_by_mean * sign
        else:  # the variance is v (1 - 2g) more
            rest = torch.rsub(gain, 1, alpha=2)
            var_by_mean = torch.addcmul(var_by_mean * sign, at.far * var, curvature, value=2)
            var_by_var = torch.addcmul(var_by_var, at.far, rest - third)
            gain = torch.addcmul(gain, at.far, rest)
    return (
        flushed(torch.addcmul(grad_mean * gain, grad_var, var_by_mean)),
        flushed(torch.addcmul(grad_var * var_by_var, grad_mean, curvature, value=0.5)),
    )


# ---- use ---------------------------------------------------------------------------------------------------------


class _Tabulated(torch.autograd.Function):
    """Mean and variance of a kinked function; saves (mean, var) only."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, var)
        ctx.constants = constants
        out: tuple[Tensor, Tensor] = fused(_kernel, mean, var, constants=constants)
        return out

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        grads = fused(_backward, *ctx.saved_tensors, grad_mean, grad_var, constants=ctx.constants)
        return *grads, None, None, None


def kinked_moments(
    curve: Kinked, mean: Tensor, var: Tensor, ends: tuple[float, float] = (0.0, 0.0), width: float | None = None
) -> tuple[Tensor, Tensor]:
    """Moments of f(X - ends[0]) in the units in which f is ``width`` wide; float32.

    ends: the kink, and the second one where there is one. The result is f(X - ends[0]) for a function with no fold,
    the value clamped to ``ends`` for an odd one, x + f(-x) for an even one.
    """
    shape = curve.shape if width is None else curve.shape._replace(width=width)
    out: tuple[Tensor, Tensor] = _Tabulated.apply(mean, var, _coefficients(curve.number, mean.device), ends, shape)
    return out
