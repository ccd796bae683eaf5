"""Moments of a smooth function that is a line far out, from a table that quadrature fills once.

X ~ N(m, v). With c the width on which f bends and S² = c² + v, the half-plane of (m, v) is covered by p = m/S in [-8, 8], beyond
which a Gaussian sees f's asymptotes only, and q = 1 - c/S in [0, 1]. Each cell of (p, q) holds quadratics of

    g = E[f'(X)],    L = log2((K + MIX g²) N),    K = (Var f(X) - v g²) S²/v²,

N = S²/c² where f has one slope at both ends (K falls as 1/S² then), else 1, and a quadratic in q of E[f(X)]/S, whose
dependence on p is the integral of g. So Var = v (g² + K v/S²): the linear part of f and the rest, neither negative, without
a difference of large numbers, exact as v goes to 0. Its gradients: dE/dm = g and dE/dv = E[f'']/2 (Stein).
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rvconvert.moments.quadrature import flushed, quadrature
from rvconvert.moments.table import CURVES, DENSER, Cell, Curve, Function, Grid, coefficients, integrals, polynomials, tabulated

if TYPE_CHECKING:
    from torch import Tensor

_GRID = Grid(end=8, in_p=1024, in_q=64, spacing=24)
_CHEBYSHEV = 33  # points of q where quadrature is done
_MIX = 0.1  # keeps the logarithm smooth where f'' is 0


# ---- filling -----------------------------------------------------------------------------------------------------


def _points_in_q() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(np.pi * (np.arange(_CHEBYSHEV) + 0.5) / _CHEBYSHEV)


def _in_q(at: np.ndarray) -> np.ndarray:
    """(n, points): interpolation at ``at``, in cells, by the polynomial through all points (barycentric)."""
    q = _GRID.q(at)
    signs = (-1.0) ** np.arange(_CHEBYSHEV)
    terms = signs * np.sqrt(_points_in_q() * (1 - _points_in_q())) / (q[:, None] - _points_in_q())
    return terms / terms.sum(1, keepdims=True)


@functools.cache
def _in_q_of_cells() -> list[np.ndarray]:
    """From values at the points to each cell's quadratics in q, through the ends of a cell, as v = 0 is one."""
    return polynomials(_in_q, _GRID.in_q, [0.0, 0.5, 1.0])


class Smooth(Curve):
    """A smooth elementwise function that is a line beyond some eight ``width`` from 0 on either side.

    Args:
        function: as of ``Curve``.
        width: the scale on which it bends: 1 for tanh, 2 for the sigmoid.
    """

    def __init__(self, function: Function, width: float) -> None:
        super().__init__(function)
        self.width = width

    @functools.cached_property
    def slopes(self) -> tuple[float, float]:
        """Far out on the left and on the right."""
        far = self.function(self.width * torch.tensor([-61.0, -60.0, 60.0, 61.0], dtype=torch.float64, device="cpu")).tolist()
        return (far[1] - far[0]) / self.width, (far[3] - far[2]) / self.width

    @property
    def level(self) -> bool:
        """True if both are the same."""
        return abs(self.slopes[0] - self.slopes[1]) < 1e-6

    def fill(self) -> Tensor:
        """Some 9,000 quadratures in float64, then interpolation onto the cells; milliseconds."""
        p, q, width = _GRID.nodes(), _points_in_q(), self.width
        root = width / (1 - q)[:, None]
        mean, var = np.broadcast_arrays(p * root, root**2 - width**2)
        found = integrals(self.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), (-4 * width, 0.0, 4 * width))
        expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
        spread = rest * root**2 / var + _MIX * gain**2
        logarithm = np.log2((spread * (root / width) ** 2 if self.level else spread) + 1e-300)
        made = []
        for k, (a, b, cells) in enumerate(coefficients(_GRID, _in_q_of_cells(), expected / root, gain, logarithm)):
            if 3 <= k < 10 or a:  # of the gain; the outermost cells reach to infinity, where f is a line
                cells[:, [0, -1]] = 0.0 if a or b else self.slopes
            made.append(cells)
        return torch.from_numpy(np.stack(made).reshape(len(made), -1))

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """By a table of this call's own, in float32 on the processor: to be held against something."""
        return _kernel(mean, var, self.table, self.width, self.level)


# ---- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where (m, v) lies."""

    cell: Tensor
    d: Tensor
    e: Tensor
    inverse: Tensor  # 1/S
    by_mean: Tensor  # cells of p by m
    share: Tensor  # v/S²
    ratio: Tensor  # c/S
    dense: Tensor  # (1 + c/S) over this + DENSER v/S²


def _place(mean: Tensor, var: Tensor, width: float) -> _Place:
    inverse = torch.rsqrt(var + width * width)
    by_mean = inverse * _GRID.per_cell
    ratio = inverse * width
    share = var * inverse * inverse  # q = v/(S (S + c)), without a difference
    widened = ratio + 1
    denominator = torch.add(widened, share, alpha=DENSER)
    _, cell, d, e = _GRID.locate(mean * by_mean, share / denominator * _GRID.rise)
    return _Place(cell, d, e, inverse, by_mean, share, ratio, widened / denominator)


def _spread(here: Cell, at: _Place, level: bool) -> Tensor:
    """K + MIX g²."""
    spread = here.power()
    return spread * at.ratio * at.ratio if level else spread


def _kernel(mean: Tensor, var: Tensor, table: Tensor, width: float, level: bool) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, width)
    here, out = Cell.with_mean(table, at.cell, at.d, at.e)
    gain = here.gain()
    out = torch.addcmul(out, at.d, here.along(), value=1 / _GRID.per_cell) / at.inverse
    gain2 = gain * gain
    rest = torch.sub(_spread(here, at, level), gain2, alpha=_MIX)
    return out, torch.addcmul(gain2, at.share, rest) * var


def _backward(
    mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor, table: Tensor, width: float, level: bool
) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, width)
    share, by_mean = at.share, at.by_mean
    here = Cell.of(table, at.cell, at.d, at.e)
    gain = here.gain()
    curvature = here.curvature() * by_mean  # E[f'']
    third = here.third() * by_mean * by_mean  # dg/dv = E[f''']/2 (Stein)
    rest = share * _spread(here, at, level)
    log_by_mean = here.logarithm_by_d() * by_mean
    # dy/dv = (1 + DENSER) CELLS c dense²/(2S³), dp/dv = -p/(2S²): the logarithm by v, times -2S².
    down = torch.addcmul(mean * log_by_mean, here.logarithm_by_e() * at.ratio, at.dense * at.dense, value=-_GRID.rise)
    # Of Var = v (g² (1 - MIX w) + w (K + MIX g²)), w = v/S².
    mixed, gain2 = torch.rsub(share, 1, alpha=_MIX), gain * gain
    var_by_mean = torch.addcmul(gain * curvature * mixed, rest, log_by_mean, value=0.5 * math.log(2))
    var_by_var = mixed * torch.addcmul(gain2, var, gain * third, value=2)
    var_by_var = torch.addcmul(var_by_var, gain2, torch.addcmul(share, share, share, value=-1), value=-_MIX)
    falls = torch.add(torch.rsub(share, 2, alpha=2 if level else 1), share * down, alpha=-0.5 * math.log(2))
    var_by_var = torch.addcmul(var_by_var, rest, falls)
    return (
        flushed(torch.addcmul(grad_mean * gain, grad_var * var, var_by_mean, value=2)),
        flushed(torch.addcmul(grad_var * var_by_var, grad_mean, curvature, value=0.5)),
    )


def table_moments(curve: Smooth, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a curve of X ~ N(mean, var): by its table; in float64, which a table does not serve, by quadrature."""
    if mean.dtype == torch.float64:
        return quadrature(curve.function, mean, var)
    return tabulated(curve, _kernel, _backward, mean, var, curve.width, _is_level(curve.number))


@torch.compiler.assume_constant_result
def _is_level(number: int) -> bool:
    level: bool = CURVES[number].level
    return level
