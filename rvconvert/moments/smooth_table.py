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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rvconvert.moments.quadrature import flushed, quadrature
from rvconvert.moments.table import (
    CURVES,
    DENSER,
    Cell,
    Curve,
    Function,
    Grid,
    Partials,
    as_table,
    coefficients,
    integrals,
    partial_derivatives,
    polynomials,
    tabulated,
)

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

    def fill(self) -> tuple[Tensor, ...]:
        """Some 9,000 quadratures in float64, then interpolation onto the cells; milliseconds."""
        p, q, width = _GRID.nodes(), _points_in_q(), self.width
        root = width / (1 - q)[:, None]
        mean, var = np.broadcast_arrays(p * root, root**2 - width**2)
        found = integrals(self.function, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), (-4 * width, 0.0, 4 * width))
        expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
        spread = rest * root**2 / var + _MIX * gain**2
        logarithm = np.log2((spread * (root / width) ** 2 if self.level else spread) + 1e-300)
        at = _GRID.corners()[1]
        far, at_corners = 1 - _GRID.q(at), _in_q(at)  # c/S
        share = 1 - far**2
        gains, ratios = at_corners @ gain, at_corners @ (rest + gain**2)
        partials = partial_derivatives(_GRID, 1 - far, gains, ratios, share / 2, share * far / 2)[:4]
        partials[..., [0, -1]] = 0.0
        partials[0][:, [0, -1]] = self.slopes
        partials[3][:, [0, -1]] = np.square(self.slopes)
        made = []
        for k, (a, b, cells) in enumerate(coefficients(_GRID, _in_q_of_cells(), expected / root, gain, logarithm)):
            if 3 <= k < 10 or a:  # of the gain; the outermost cells reach to infinity, where f is a line
                cells[:, [0, -1]] = 0.0 if a or b else self.slopes
            made.append(cells)
        return as_table(made, partials)

    def moments(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """By a table of this call's own, in float32 on the processor: to be held against something."""
        return _kernel(mean, var, self.table[0], self.width, self.level)


# ---- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where (m, v) lies."""

    inverse: Tensor  # 1/S
    ratio: Tensor  # c/S
    share: Tensor  # v/S²
    p: Tensor
    along: Tensor  # q/(1 + DENSER q)


def _place(mean: Tensor, var: Tensor, width: float) -> _Place:
    inverse = torch.rsqrt(var + width * width)
    ratio = inverse * width
    share = var * inverse * inverse  # q = v/(S (S + c)), without a difference
    return _Place(inverse, ratio, share, mean * inverse, share / torch.add(ratio, share, alpha=DENSER).add_(1))


def _spread(here: Cell, ratio: Tensor, level: bool) -> Tensor:
    """K + MIX g²."""
    spread = here.power()
    return spread * ratio * ratio if level else spread


def _kernel(mean: Tensor, var: Tensor, table: Tensor, width: float, level: bool) -> tuple[Tensor, Tensor]:
    inverse, ratio, share, p, along = _place(mean, var, width)
    cell, d, e = _GRID.locate(p, along)
    here = Cell.read(table, cell, d, e)
    gain = here.gain()
    out = torch.addcmul(here.middle, d, here.along(), value=1 / _GRID.per_cell) / inverse
    gain2 = gain * gain
    rest = torch.sub(_spread(here, ratio, level), gain2, alpha=_MIX)
    return flushed(out), flushed(torch.addcmul(gain2, share, rest) * var)


def _backward(
    mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor, partials: Tensor, width: float, level: bool
) -> tuple[Tensor, Tensor]:
    inverse, _, _, p, along = _place(mean, var, width)
    gain, curvature, by_mean, by_var = _GRID.bilinear(partials, p, along)
    return Partials(gain, curvature * inverse, by_mean * inverse, by_var).gradients(var, grad_mean, grad_var)


def table_moments(curve: Smooth, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a curve of X ~ N(mean, var): by its table; in float64, which a table does not serve, by quadrature."""
    if mean.dtype == torch.float64:
        return quadrature(curve.function, mean, var)
    return tabulated(curve, _kernel, _backward, mean, var, curve.width, _is_level(curve.number))


@torch.compiler.assume_constant_result
def _is_level(number: int) -> bool:
    level: bool = CURVES[number].level
    return level
