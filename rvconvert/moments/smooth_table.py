"""Moments of a smooth function that is a line far out, from a table that quadrature fills once.

X ~ N(m, v). With c the width on which f bends and S² = c² + v, the half-plane of (m, v) is covered by p = m/S in [-8, 8], beyond
which a Gaussian sees f's asymptotes only, and q = 1 - c/S in [0, 1]. The mean is f itself, of c p, stretched by S/c, and

    share (c, stretched) times D,    share = v/S²,

so that it is f(m) as v goes to 0; where f has one slope at both ends it is sheared, not stretched. Of a function that rises
everywhere there is held beside D

    L = log2(N Var f(X)/v),

N = S²/c² where f has the slope 0 at both ends (Var/v falls as 1/S² then), else 1; so are the partial derivatives of Var. Where f
turns, Var/v comes down to 0; there are held

    g = E[f'(X)],    L = log2(K + MIX g²),    K = (Var f(X) - v g²) S²/v²,

and Var = v (g² + K v/S²): the linear part of f and the rest, neither negative, without a difference of large numbers. Where E and
g have closed forms, the table is that of L. Gradients: dE/dm = g and dE/dv = E[f'']/2 (Stein).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rvconvert.moments.normal import affine
from rvconvert.moments.quadrature import quadrature
from rvconvert.moments.table import (
    CURVES,
    DENSER,
    Curve,
    Function,
    Grid,
    Kernels,
    Partials,
    as_table,
    curvatures,
    integrals,
    moments_at_corners,
    partials_at_corners,
    tabulated,
    tabulated_partials,
)

if TYPE_CHECKING:
    from torch import Tensor

_GRID = Grid(end=8, in_p=2048, in_q=320, spacing=24)  # of a function that turns
_OF_RISING = _OF_KNOWN = _GRID._replace(in_p=4096)
_OF_PARTIALS = _GRID._replace(in_q=160)
_CHEBYSHEV = 33  # points of q where quadrature is done
_MIX = 0.4  # keeps the logarithm smooth where f'' is 0

Known = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "tuple[Tensor, Tensor]"]


# ---- filling -----------------------------------------------------------------------------------------------------


def _points_in_q() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(np.pi * (np.arange(_CHEBYSHEV) + 0.5) / _CHEBYSHEV)


@functools.cache
def _in_q(grid: Grid) -> np.ndarray:
    """(corners, points): interpolation by the polynomial through all points (barycentric)."""
    q = grid.corners()[1]
    signs = (-1.0) ** np.arange(_CHEBYSHEV)
    terms = signs * np.sqrt(_points_in_q() * (1 - _points_in_q())) / (q[:, None] - _points_in_q())
    made: np.ndarray = terms / terms.sum(1, keepdims=True)
    return made


class Smooth(Curve):
    """A smooth elementwise function that is a line beyond some eight ``width`` from 0 on either side.

    Args:
        function: as of ``Curve``.
        width: the scale on which it bends: 1 for tanh, 2 for the sigmoid.
        rises: its slope is above 0 everywhere, which makes its table cheaper.
        bound: where the mean lies, which rounding leaves: ``"range"`` in [-1, 1]; ``"probability"`` in [f(m)/2, 1];
            ``"above"`` or ``"below"`` f(m), as of a convex or a concave one (Jensen).
        known: closed forms of E[f(X)] and E[f'(X)], of (m, v, c/S, c p), for a function that turns.
    """

    def __init__(
        self, function: Function, width: float, rises: bool = False, bound: str = "", known: Known | None = None
    ) -> None:
        super().__init__(function)
        self.width, self.rises, self.bound, self.known = width, rises, bound, known

    @functools.cached_property
    def slopes(self) -> tuple[float, float]:
        """Far out on the left and on the right."""
        far = self.function(self.width * torch.tensor([-61.0, -60.0, 60.0, 61.0], dtype=torch.float64, device="cpu")).tolist()
        return (far[1] - far[0]) / self.width, (far[3] - far[2]) / self.width

    @property
    def level(self) -> float | None:
        """The slope if both are the same."""
        left, right = self.slopes
        if abs(left - right) >= 1e-6:
            return None
        return left if abs(left) >= 1e-6 else 0.0

    def fill(self) -> tuple[Tensor, ...]:
        """Some 13,000 quadratures in float64, then interpolation onto the corners; a tenth of a second."""
        p, q, width = _GRID.nodes(), _points_in_q(), self.width
        root = width / (1 - q)[:, None]
        mean, var = np.broadcast_arrays(p * root, root**2 - width**2)
        found = integrals(self.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), (-4 * width, 0.0, 4 * width))
        expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
        plain, share = self.function(torch.tensor(width * p)).numpy(), var / root**2
        if self.level is None:
            first = (expected / root - plain / width) / share
        else:
            first = (expected - plain - self.level * (mean - width * p)) / share
        ratio = (rest + gain**2) * ((root / width) ** 2 if self.level == 0 else 1.0)
        if self.rises:
            moments = moments_at_corners(_OF_RISING, _in_q(_OF_RISING), np.log2(ratio), first)
        else:
            spread = rest * root**2 / var + _MIX * gain**2
            logarithm = np.log2((spread if self.level is None else spread * (root / width) ** 2) + 1e-300)
            if self.known:
                moments = moments_at_corners(_OF_KNOWN, _in_q(_OF_KNOWN), logarithm)
            else:
                numbers = moments_at_corners(_GRID, _in_q(_GRID), gain, first, logarithm)
                moments = np.concatenate((numbers, curvatures(numbers[:2])))
                moments[0][:, [0, -1]] = self.slopes
        far = 1 - _OF_PARTIALS.corners()[1]  # c/S
        falls, grows = (1 - far**2) / 2, (1 - far**2) * far / 2
        rises = 1 - far**2 if self.level == 0 else 0.0
        partials = partials_at_corners(_OF_PARTIALS, _in_q(_OF_PARTIALS), gain, ratio, falls, grows, 1 / width, rises)[:4]
        partials[..., [0, -1]] = 0.0
        partials[0][:, [0, -1]] = self.slopes
        partials[3][:, [0, -1]] = np.square(self.slopes)
        return as_table(moments), as_table(partials)

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """By a table of this call's own, in float32 on the processor: to be held against something."""
        return _kernel(mean[None, None], var[None, None], self.fill()[0], *_constants(self))


# ---- reading -----------------------------------------------------------------------------------------------------


def _place(mean: Tensor, var: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c/S, c p, and x and y of ``Grid.read``."""
    ratio = affine(var, 1 / width**2, 1).rsqrt_()
    at = mean * ratio
    # y = 2 (1 + DENSER) q / (1 + DENSER q) - 1, q = 1 - c/S
    y = affine(ratio, -DENSER, 1 + DENSER).reciprocal_()
    y = affine(y, -2 - 2 / DENSER, 1 + 2 / DENSER)
    return ratio, at, (at * (1 / (_GRID.end * width))).clamp_(-1, 1), y


def _kernel(
    mean: Tensor,
    var: Tensor,
    table: Tensor,
    function: Function,
    width: float,
    level: float | None,
    bound: str,
    known: Known | None,
) -> tuple[Tensor, Tensor]:
    ratio, at, x, y = _place(mean, var, width)
    gain = None
    if known:
        (logarithm,) = _OF_KNOWN.bilinear(table, x, y)
    elif table.shape[1] == 2:  # of a function that rises
        logarithm, change = _OF_RISING.bilinear(table, x, y)
    else:
        gain, change, logarithm = _GRID.third_order(table, x, y)
    share = (var * ratio).mul_(ratio)  # c² times that of the text above
    spread = logarithm.exp2_()
    if known:
        out, gain = known(mean, var, ratio, at)
    elif level is None:
        out = torch.addcmul(function(at), change, share, value=1 / width).div_(ratio)
    else:
        out = torch.addcmul(function(at), change, share, value=1 / width**2)
        out = out.add_(mean - at, alpha=level) if level else out
    out = _bounded(out, mean, function, bound)
    if gain is None:
        return out, spread * (share if level == 0 else var)
    gain2 = gain.mul_(gain)
    rest = (spread if level is None else spread.mul_(ratio).mul_(ratio)).sub_(gain2, alpha=_MIX)
    return out, gain2.addcmul_(share, rest, value=1 / width**2) * var


def _bounded(out: Tensor, mean: Tensor, function: Function, bound: str) -> Tensor:
    """A mean of which rounding is no more than a probability or a rate can be: a logarithm may follow."""
    if bound == "range":
        return out.clamp_(-1, 1)
    if bound == "above":
        return torch.maximum(out, function(mean))
    if bound == "below":
        return torch.minimum(out, function(mean))
    if bound == "probability":  # X is no less than m in half of the cases
        return torch.maximum(out, function(mean).mul_(0.5)).clamp_(max=1)
    return out


def _partials(
    mean: Tensor, var: Tensor, table: Tensor, function: Function, width: float, level: float | None, *unused: Any
) -> Partials:
    ratio, _, x, y = _place(mean, var, width)
    gain, curvature, by_mean, by_var = _OF_PARTIALS.bilinear(table, x, y)
    if level == 0:
        share = ratio * ratio
        by_mean, by_var = by_mean.mul_(share), by_var.mul_(share)
    return Partials(gain, curvature.mul_(ratio), by_mean.mul_(ratio).mul_(var), by_var)


_KERNELS = Kernels(_kernel, _partials)


def table_moments(curve: Smooth, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a curve of X ~ N(mean, var): by its table; in float64, which a table does not serve, by quadrature."""
    if mean.dtype == torch.float64:
        return quadrature(curve.function, mean, var)
    return tabulated(curve, _KERNELS, mean, var, *_constants(curve))


def table_partials(curve: Smooth, mean: Tensor, var: Tensor) -> Partials:
    """Partial derivatives of ``table_moments``, in float32."""
    return tabulated_partials(curve, _KERNELS, mean, var, *_constants(curve))


def _constants(curve: Smooth) -> tuple[Any, ...]:
    return curve.function, curve.width, _level(curve.number), curve.bound, curve.known


@torch.compiler.assume_constant_result
def _level(number: int) -> float | None:
    level: float | None = CURVES[number].level
    return level
