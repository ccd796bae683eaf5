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
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.quadrature import flushed, legendre, quadrature

Function = Callable[[Tensor], Tensor]

_END, _CELLS_P, _CELLS_Q = 8, 1024, 64
_DENSER = 2.0  # cells of q lie by 1 + this more densely at v = 0, by as much less at infinity
_PER_CELL = _CELLS_P / (2 * _END)  # cells for one unit of p
_SPACING, _CHEBYSHEV = 24, 33  # where quadrature is done: nodes for one unit of p, points of q
_MIX = 0.1  # keeps the logarithm smooth where f'' is 0


class Table(NamedTuple):
    """Fifteen coefficients of every cell, (15, cells), the width c, and whether f has the same slope at both ends."""

    coefficients: Tensor
    width: float
    level: bool


# ---- filling -----------------------------------------------------------------------------------------------------


def integrals(f: Function, mean: Tensor, var: Tensor, width: float, nodes: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """E[f(X)], E[f'(X)] and what a line does not explain of Var f(X), over v; float64, (n,), var > 0.

    Gauss-Legendre of ``nodes`` on each of four panels, which meet at 0 and at four widths from it.
    """
    s = var.sqrt()
    bends = [((at * width - mean) / s).clamp(-8.5, 8.5) for at in (-4.0, 0.0, 4.0)]
    ends = torch.stack([torch.full_like(s, -8.5), *bends, torch.full_like(s, 8.5)], -1)
    centre, half = (ends[:, 1:] + ends[:, :-1]) / 2, (ends[:, 1:] - ends[:, :-1]) / 2
    x, w = (torch.tensor(each, dtype=s.dtype) for each in zip(*legendre(nodes), strict=True))
    z = (centre[..., None] + half[..., None] * x).flatten(1)
    weight = (half[..., None] * w).flatten(1) * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    at_mean = f(mean)
    change = f(torch.addcmul(mean[:, None], s[:, None], z)) - at_mean[:, None]
    shift, gain = ((weight * each).sum(1, keepdim=True) for each in (change, change * z))
    rest = (weight * (change - shift - gain * z).square()).sum(1)
    return at_mean + shift[:, 0], gain[:, 0] / s, rest / var


def _in_p(at: np.ndarray) -> np.ndarray:
    """(n, nodes): interpolation at ``at``, in cells, by the polynomial through the eight nearest nodes."""
    nodes = 2 * _END * _SPACING + 1
    at = at * ((nodes - 1) / _CELLS_P)
    first = np.clip(np.floor(at).astype(int) - 3, 0, nodes - 8)
    matrix = np.zeros((len(at), nodes))
    for j in range(8):
        others = np.delete(np.arange(8), j)
        matrix[np.arange(len(at)), first + j] = ((at - first)[:, None] - others).prod(1) / (j - others).prod()
    return matrix


def _points_in_q() -> np.ndarray:
    return 0.5 - 0.5 * np.cos(np.pi * (np.arange(_CHEBYSHEV) + 0.5) / _CHEBYSHEV)


def _in_q(at: np.ndarray) -> np.ndarray:
    """(n, points): interpolation at ``at``, in cells, by the polynomial through all points (barycentric)."""
    q = at / ((1 + _DENSER) * _CELLS_Q - _DENSER * at)
    signs = (-1.0) ** np.arange(_CHEBYSHEV)
    terms = signs * np.sqrt(_points_in_q() * (1 - _points_in_q())) / (q[:, None] - _points_in_q())
    return terms / terms.sum(1, keepdims=True)


def _polynomials(interpolation: Callable[[np.ndarray], np.ndarray], cells: int, nodes: list[float]) -> list[np.ndarray]:
    """Coefficients on each cell of 1, u, u², ... in u, counted from its start, by interpolation at ``nodes``: matrices."""
    values = np.stack([interpolation(np.arange(cells) + u) for u in nodes])
    return list(np.tensordot(np.linalg.inv(np.vander(nodes, increasing=True)), values, 1))


@functools.cache
def _maps() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """In p quadratics and cubics, at Chebyshev's points; in q quadratics, through the ends of a cell, as v = 0 is one."""
    quadratic, cubic = ([0.5 * math.cos((k + 0.5) * math.pi / n) for k in range(n)] for n in (3, 4))
    return (
        _polynomials(lambda at: _in_p(at + 0.5), _CELLS_P, quadratic),
        _polynomials(lambda at: _in_p(at + 0.5), _CELLS_P, cubic),
        _polynomials(_in_q, _CELLS_Q, [0.0, 0.5, 1.0]),
    )


def fill(f: Function, width: float) -> Table:
    """The table of f: some 9,000 quadratures in float64, then interpolation onto the cells; milliseconds."""
    p, q = np.linspace(-_END, _END, 2 * _END * _SPACING + 1), _points_in_q()
    root = width / (1 - q)[:, None]
    mean, var = np.broadcast_arrays(p * root, root**2 - width**2)
    found = integrals(f, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), width)
    expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
    far = f(width * torch.tensor([-61.0, -60.0, 60.0, 61.0], dtype=torch.float64)).numpy()
    slopes = (far[1] - far[0]) / width, (far[3] - far[2]) / width
    level = bool(abs(slopes[0] - slopes[1]) < 1e-6)
    spread = rest * root**2 / var + _MIX * gain**2
    logarithm = np.log2((spread * (root / width) ** 2 if level else spread) + 1e-300)
    quadratic, cubic, in_q = _maps()
    made = [each @ (expected / root) @ quadratic[0].T for each in in_q]
    for value, in_p in ((gain, cubic), (logarithm, quadratic)):
        for a, b in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2), *((k, 0) for k in range(3, len(in_p)))):
            cells = in_q[b] @ value @ in_p[a].T
            if a or value is gain:  # the outermost cells reach to infinity, where f is a line
                cells[:, [0, -1]] = 0.0 if a or b else slopes
            made.append(cells)
    return Table(torch.from_numpy(np.stack(made).reshape(len(made), -1)), width, level)


# ---- reading -----------------------------------------------------------------------------------------------------


def _cell(mean: Tensor, var: Tensor, width: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1/S, the cell, and where in it, from -1/2 to 1/2 in p and q."""
    inverse = torch.rsqrt(var + width * width)
    x = mean * inverse * _PER_CELL
    share = var * inverse * inverse  # q = v/(S (S + c)), without a difference
    y = ((1 + _DENSER) * _CELLS_Q) * share / (1 + width * inverse + _DENSER * share)
    i = torch.floor(x).clamp_(-_CELLS_P // 2, _CELLS_P // 2 - 1)
    j = torch.floor(y).clamp_(0, _CELLS_Q - 1)
    return inverse, torch.add(i, j, alpha=_CELLS_P).add_(_CELLS_P // 2).to(torch.int32), x - i - 0.5, y - j


def _read(coefficients: Tensor, cell: Tensor, first: int, count: int = 6) -> list[Tensor]:
    flat = cell.reshape(-1)
    return [torch.index_select(coefficients[k], 0, flat).view(cell.shape) for k in range(first, first + count)]


def _quadratic(c: list[Tensor], d: Tensor, e: Tensor) -> Tensor:
    """Of six coefficients; a seventh is that of d³."""
    along = c[2] if len(c) < 7 else torch.addcmul(c[2], d, c[6])
    along = torch.addcmul(torch.addcmul(c[1], d, along), e, c[4])
    return torch.addcmul(torch.addcmul(c[0], d, along), e, torch.addcmul(c[3], e, c[5]))


def _spread(coefficients: Tensor, cell: Tensor, d: Tensor, e: Tensor, inverse2: Tensor, width: float, level: bool) -> Tensor:
    """K + MIX g²."""
    spread = torch.exp2(_quadratic(_read(coefficients, cell, 10), d, e))
    return spread * inverse2 * (width * width) if level else spread


def _kernel(mean: Tensor, var: Tensor, coefficients: Tensor, width: float, level: bool) -> tuple[Tensor, Tensor]:
    inverse, cell, d, e = _cell(mean, var, width)
    c = _read(coefficients, cell, 3, 7)
    gain = _quadratic(c, d, e)
    # The integral of g along d: d (g0 + g3 e + g5 e² + d/2 (g1 + g4 e + d (2/3 g2 + d g6/2))).
    slope = torch.addcmul(c[1], d, torch.addcmul((2 / 3) * c[2], d, c[6], value=0.5))
    along = torch.addcmul(c[0], e, torch.addcmul(c[3], e, c[5]))
    along = torch.addcmul(along, d, torch.addcmul(slope, e, c[4]), value=0.5)
    a = _read(coefficients, cell, 0, 3)
    out = torch.addcmul(a[0], e, torch.addcmul(a[1], e, a[2]))
    out = torch.addcmul(out, d, along, value=1 / _PER_CELL) / inverse
    gain2, inverse2 = gain * gain, inverse * inverse
    rest = torch.sub(_spread(coefficients, cell, d, e, inverse2, width, level), gain2, alpha=_MIX)
    return out, torch.addcmul(gain2, inverse2 * var, rest) * var




def _backward(
    mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor, coefficients: Tensor, width: float, level: bool
) -> tuple[Tensor, Tensor]:
    inverse, cell, d, e = _cell(mean, var, width)
    inverse2, per_cell = inverse * inverse, inverse * _PER_CELL  # per_cell: cells by m
    share = var * inverse2  # w = v/S²
    c = _read(coefficients, cell, 3, 7)
    gain = _quadratic(c, d, e)
    curvature = torch.addcmul(c[1], d, torch.addcmul(2 * c[2], d, c[6], value=3))
    curvature = torch.addcmul(curvature, e, c[4]) * per_cell  # E[f'']
    third = torch.addcmul(c[2], d, c[6], value=3) * (per_cell * per_cell)  # dg/dv = E[f''']/2 (Stein)
    c = _read(coefficients, cell, 10)
    spread = torch.exp2(_quadratic(c, d, e))
    by_p = torch.addcmul(torch.addcmul(c[1], d, c[2], value=2), e, c[4]) * (math.log(2) * _PER_CELL)
    by_y = torch.addcmul(torch.addcmul(c[3], d, c[4]), e, c[5], value=2)
    # dp/dv = -p/(2S²); dy/dv = (1 + DENSER) CELLS c (1 + c/S)²/(2S³) over (1 + c/S + DENSER w)², with y the cell in q.
    ratio = width * inverse
    widened = 1 + ratio
    dense = widened / (widened + _DENSER * share)
    y_by_var = by_y * (math.log(2) * (1 + _DENSER) * _CELLS_Q * ratio) * (dense * dense)
    log_by_var = (0.5 * inverse2) * (y_by_var - by_p * (mean * inverse))
    if level:
        spread, log_by_var = spread * (ratio * ratio), log_by_var - inverse2
    # Of Var = v g² (1 - MIX w) + v w (K + MIX g²).
    mixed, gain2 = 1 - _MIX * share, gain * gain
    var_by_mean = var * (2 * gain * curvature * mixed + share * spread * by_p * inverse)
    var_by_var = mixed * (gain2 + 2 * var * gain * third) - _MIX * gain2 * share * (1 - share)
    var_by_var = var_by_var + share * spread * ((2 - share) + var * log_by_var)
    return (
        flushed(torch.addcmul(grad_mean * gain, grad_var, var_by_mean)),
        flushed(torch.addcmul(grad_mean * (0.5 * curvature), grad_var, var_by_var)),
    )


# ---- use ---------------------------------------------------------------------------------------------------------


class Curve:
    """A smooth elementwise function that is a line beyond some eight ``width`` from 0 on either side.

    Args:
        function: of a tensor, elementwise, in any floating-point dtype; it keeps relative accuracy where it vanishes.
        width: the scale on which it bends: 1 for tanh, 2 for the sigmoid.
    """

    def __init__(self, function: Function, width: float) -> None:
        self.function, self.width = function, width
        self.number = len(_CURVES)
        _CURVES.append(self)

    @functools.cached_property
    def table(self) -> Table:
        """The table, in float64 on the processor."""
        with torch.no_grad(), torch.device("cpu"):
            return fill(self.function, self.width)


_CURVES: list[Curve] = []
_COEFFICIENTS: dict[tuple[int, torch.device], Tensor] = {}


@torch.compiler.assume_constant_result
def _coefficients(number: int, device: torch.device) -> Tensor:
    """A curve's coefficients in float32 on a device, made at first use; a constant of a compiled graph."""
    key = (number, device)
    if key not in _COEFFICIENTS:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve everywhere
            _COEFFICIENTS[key] = _CURVES[number].table.coefficients.to(device, torch.float32)
    return _COEFFICIENTS[key]


@torch.compiler.assume_constant_result
def _is_level(number: int) -> bool:
    return _CURVES[number].table.level


class _Tabulated(torch.autograd.Function):
    """Mean and variance of a curve; saves (mean, var) only."""

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


def table_moments(curve: Curve, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of a curve of X ~ N(mean, var): by its table; in float64, which a table does not serve, by quadrature."""
    if mean.dtype == torch.float64:
        return quadrature(curve.function, mean, var)
    number = curve.number
    out: tuple[Tensor, Tensor] = _Tabulated.apply(
        mean, var, _coefficients(number, mean.device), curve.width, _is_level(number)
    )
    return out
