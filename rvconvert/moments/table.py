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
from collections.abc import Callable, Sequence
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
_LEGENDRE, _AT_ONCE = 40, 1024  # nodes of a panel; integrals whose nodes stay in a core's cache
_MIX = 0.1  # keeps the logarithm smooth where f'' is 0


class Table(NamedTuple):
    """Sixteen coefficients of every cell, (16, cells), the width c, and whether f has the same slope at both ends."""

    coefficients: Tensor
    width: float
    level: bool


# ---- filling -----------------------------------------------------------------------------------------------------


def integrals(f: Function, mean: Tensor, var: Tensor, bends: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """E[f(X)], E[f'(X)] and what a line does not explain of Var f(X), over v; float64, (n,), var > 0.

    Gauss-Legendre on each panel; panels meet at ``bends``.
    """
    parts = [_integrals(f, *part, bends) for part in zip(mean.split(_AT_ONCE), var.split(_AT_ONCE), strict=True)]
    expected, gain, rest = (torch.cat(each) for each in zip(*parts, strict=True))
    return expected, gain, rest


def _integrals(f: Function, mean: Tensor, var: Tensor, bends: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    s = var.sqrt()
    inner = [((at - mean) / s).clamp(-8.5, 8.5) for at in bends]
    ends = torch.stack([torch.full_like(s, -8.5), *inner, torch.full_like(s, 8.5)], -1)
    centre, half = (ends[:, 1:] + ends[:, :-1]) / 2, (ends[:, 1:] - ends[:, :-1]) / 2
    x, w = (torch.tensor(each, dtype=s.dtype) for each in zip(*legendre(_LEGENDRE), strict=True))
    z = torch.addcmul(centre[..., None], half[..., None], x).flatten(1)
    weight = (half[..., None] * (w / math.sqrt(2 * math.pi))).flatten(1).mul_(torch.exp((-0.5 * z).mul_(z)))
    at_mean = f(mean)
    change = f(torch.addcmul(mean[:, None], s[:, None], z)).sub_(at_mean[:, None])
    weighted = weight * change
    shift, gain = weighted.sum(1, keepdim=True), torch.linalg.vecdot(weighted, z)[:, None]
    left = change.sub_(shift).addcmul_(gain, z, value=-1)
    rest = torch.linalg.vecdot(weight, left.square_())
    return at_mean + shift[:, 0], gain[:, 0] / s, rest / var


def nodes_in_p(end: int, spacing: int) -> np.ndarray:
    """Where quadrature is done, along p in [-end, end]: ``spacing`` nodes for one unit."""
    return np.linspace(-end, end, 2 * end * spacing + 1)


def _in_p(at: np.ndarray, cells: int, nodes: int) -> np.ndarray:
    """(n, nodes): interpolation at ``at``, in cells, by the polynomial through the eight nearest nodes."""
    at = at * ((nodes - 1) / cells)
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


def _polynomials(interpolation: Callable[[np.ndarray], np.ndarray], cells: int, at: list[float]) -> list[np.ndarray]:
    """Coefficients on each cell of 1, u, u², ... in u, counted from its start, by interpolation ``at`` these: matrices."""
    values = np.stack([interpolation(np.arange(cells) + u) for u in at])
    return list(np.tensordot(np.linalg.inv(np.vander(at, increasing=True)), values, 1))


@functools.cache
def in_p(cells: int, nodes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """From values at the nodes to each cell's coefficients of quadratics and of cubics, at Chebyshev's points."""
    points = ([0.5 * math.cos((k + 0.5) * math.pi / n) for k in range(n)] for n in (3, 4))
    quadratics, cubics = (_polynomials(lambda at: _in_p(at + 0.5, cells, nodes), cells, each) for each in points)
    return quadratics, cubics


@functools.cache
def _in_q_of_cells() -> list[np.ndarray]:
    """The same in q, quadratics, through the ends of a cell, as v = 0 is one."""
    return _polynomials(_in_q, _CELLS_Q, [0.0, 0.5, 1.0])


def fill(f: Function, width: float) -> Table:
    """The table of f: some 9,000 quadratures in float64, then interpolation onto the cells; milliseconds."""
    p, q = nodes_in_p(_END, _SPACING), _points_in_q()
    root = width / (1 - q)[:, None]
    mean, var = np.broadcast_arrays(p * root, root**2 - width**2)
    found = integrals(f, torch.tensor(mean.ravel()), torch.tensor(var.ravel()), (-4 * width, 0.0, 4 * width))
    expected, gain, rest = (each.numpy().reshape(mean.shape) for each in found)
    far = f(width * torch.tensor([-61.0, -60.0, 60.0, 61.0], dtype=torch.float64)).numpy()
    slopes = (far[1] - far[0]) / width, (far[3] - far[2]) / width
    level = bool(abs(slopes[0] - slopes[1]) < 1e-6)
    spread = rest * root**2 / var + _MIX * gain**2
    logarithm = np.log2((spread * (root / width) ** 2 if level else spread) + 1e-300)
    (quadratics, cubics), in_q = in_p(_CELLS_P, len(p)), _in_q_of_cells()
    made = [each @ (expected / root) @ quadratics[0].T for each in in_q]
    for value, along in ((gain, cubics), (logarithm, quadratics)):
        for a, b in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2), *((k, 0) for k in range(3, len(along)))):
            cells = in_q[b] @ value @ along[a].T
            if a or value is gain:  # the outermost cells reach to infinity, where f is a line
                cells[:, [0, -1]] = 0.0 if a or b else slopes
            made.append(cells)
    return Table(torch.from_numpy(np.stack(made).reshape(len(made), -1)), width, level)


# ---- reading -----------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where (m, v) lies: the cell, and from its middle d in p and from its start e in q, in cells."""

    cell: Tensor
    d: Tensor
    e: Tensor
    inverse: Tensor  # 1/S
    by_mean: Tensor  # cells of p by m
    share: Tensor  # v/S²
    ratio: Tensor  # c/S
    dense: Tensor  # (1 + c/S) over this + _DENSER v/S²


def _place(mean: Tensor, var: Tensor, width: float) -> _Place:
    inverse = torch.rsqrt(var + width * width)
    by_mean = inverse * _PER_CELL
    ratio = inverse * width
    share = var * inverse * inverse  # q = v/(S (S + c)), without a difference
    widened = ratio + 1
    denominator = torch.add(widened, share, alpha=_DENSER)
    x = mean * by_mean
    y = share / denominator * ((1 + _DENSER) * _CELLS_Q)
    i = torch.floor(x).clamp_(-_CELLS_P // 2, _CELLS_P // 2 - 1)
    j = torch.floor(y).clamp_(0, _CELLS_Q - 1)
    cell = torch.add(i, j, alpha=_CELLS_P).add_(_CELLS_P // 2).to(torch.int32)
    return _Place(cell, (x - i).sub_(0.5), y - j, inverse, by_mean, share, ratio, widened / denominator)


def read(coefficients: Tensor, cell: Tensor, first: int, count: int) -> list[Tensor]:
    """``count`` coefficients, from the ``first`` on, of each element's cell."""
    read = torch.index_select(coefficients[first : first + count], 1, cell.reshape(-1))
    return list(read.view(count, *cell.shape).unbind())


def quadratic(c: Sequence[Tensor], d: Tensor, e: Tensor) -> Tensor:
    """Of six coefficients; a seventh is that of d³."""
    along = c[2] if len(c) < 7 else torch.addcmul(c[2], d, c[6])
    along = torch.addcmul(torch.addcmul(c[1], d, along), e, c[4])
    return torch.addcmul(torch.addcmul(c[0], d, along), e, torch.addcmul(c[3], e, c[5]))


def _spread(c: Sequence[Tensor], at: _Place, level: bool) -> Tensor:
    """K + MIX g²."""
    spread = torch.exp2(quadratic(c, at.d, at.e))
    return spread * at.ratio * at.ratio if level else spread


def _kernel(mean: Tensor, var: Tensor, coefficients: Tensor, width: float, level: bool) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, width)
    d, e = at.d, at.e
    a0, a1, a2, *c = read(coefficients, at.cell, 0, 16)
    gain = quadratic(c[:7], d, e)
    # The integral of g along d: d (g0 + g3 e + g5 e² + d/2 (g1 + g4 e + d (2/3 g2 + d g6/2))).
    slope = torch.addcmul(c[1], d, torch.addcmul(c[2], d, c[6], value=0.75), value=2 / 3)
    along = torch.addcmul(c[0], e, torch.addcmul(c[3], e, c[5]))
    along = torch.addcmul(along, d, torch.addcmul(slope, e, c[4]), value=0.5)
    out = torch.addcmul(a0, e, torch.addcmul(a1, e, a2))
    out = torch.addcmul(out, d, along, value=1 / _PER_CELL) / at.inverse
    gain2 = gain * gain
    rest = torch.sub(_spread(c[7:], at, level), gain2, alpha=_MIX)
    return out, torch.addcmul(gain2, at.share, rest) * var


def _backward(
    mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor, coefficients: Tensor, width: float, level: bool
) -> tuple[Tensor, Tensor]:
    at = _place(mean, var, width)
    d, e, share, by_mean = at.d, at.e, at.share, at.by_mean
    c = read(coefficients, at.cell, 3, 13)
    gain = quadratic(c[:7], d, e)
    curvature = torch.addcmul(c[1], d, torch.addcmul(c[2], d, c[6], value=1.5), value=2)
    curvature = torch.addcmul(curvature, e, c[4]) * by_mean  # E[f'']
    third = torch.addcmul(c[2], d, c[6], value=3) * by_mean * by_mean  # dg/dv = E[f''']/2 (Stein)
    _, l1, l2, l3, l4, l5 = c[7:]
    rest = share * _spread(c[7:], at, level)
    log_by_mean = torch.addcmul(torch.addcmul(l1, d, l2, value=2), e, l4) * by_mean  # of L, a logarithm to the base of 2
    log_by_y = torch.addcmul(torch.addcmul(l3, d, l4), e, l5, value=2)
    # dy/dv = (1 + _DENSER) CELLS c dense²/(2S³), dp/dv = -p/(2S²): the logarithm by v, times -2S².
    down = torch.addcmul(mean * log_by_mean, log_by_y * at.ratio, at.dense * at.dense, value=-(1 + _DENSER) * _CELLS_Q)
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
    out: tuple[Tensor, Tensor] = _Tabulated.apply(mean, var, _coefficients(number, mean.device), curve.width, _is_level(number))
    return out
