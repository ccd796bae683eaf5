"""Tables of two moments: the plane of (p, q) in cells, each with sixteen coefficients, filled by quadrature and read by kernels.

In a cell d runs along p from its middle, e along q from its start, both in cells; coefficients 0 to 2 are a quadratic in e of the
mean, 3 to 9 are g = E[f'], quadratic with d³ beside it, and 10 to 15 a quadratic of a logarithm to the base of 2. Gradients need
less: partial derivatives are held at the corners of cells, and are bilinear between them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rvconvert.moments.compilation import fused
from rvconvert.moments.quadrature import flushed, legendre

Function = Callable[[Tensor], Tensor]

DENSER = 2.0  # cells of q lie by 1 + this more densely at v = 0, by as much less at infinity
_BILINEAR, _ZEROS, _IMAGES = 0, 0, 8  # torch's numbers for two options of grid_sample; how many cores may share it
_LEGENDRE, _AT_ONCE = 40, 1024  # nodes of a panel; integrals whose nodes stay in a core's cache


class Grid(NamedTuple):
    """Cells along p in [-end, end] and along q in [0, 1], and nodes for one unit of p where quadrature is done."""

    end: int
    in_p: int
    in_q: int
    spacing: int

    @property
    def per_cell(self) -> float:
        """Cells for one unit of p."""
        return self.in_p / (2 * self.end)

    @property
    def rise(self) -> float:
        """Cells for one unit of q, at 0."""
        return (1 + DENSER) * self.in_q

    def nodes(self) -> np.ndarray:
        """Where quadrature is done, along p."""
        return np.linspace(-self.end, self.end, 2 * self.end * self.spacing + 1)

    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """Where gradients are held, in cells from the ends of p and of q."""
        return np.arange(2 * self.in_p + 1) / 2, np.arange(2 * self.in_q + 1) / 2

    def q(self, at: np.ndarray) -> np.ndarray:
        """q of a place counted in cells."""
        return at / (self.rise - DENSER * at)

    def locate(self, p: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The cell, and d and e in it; ``along`` is q in cells over ``rise``."""
        x, y = p * self.per_cell, along * self.rise
        i = torch.floor(x).clamp_(-self.in_p // 2, self.in_p // 2 - 1)
        j = torch.floor(y).clamp_(0, self.in_q - 1)
        cell = torch.add(i, j, alpha=self.in_p).add_(self.in_p // 2)
        return numbers(cell, self.in_p * self.in_q), (x - i).sub_(0.5), y - j

    def bilinear(self, partials: Tensor, p: Tensor, along: Tensor) -> tuple[Tensor, ...]:
        """What is at (p, q): bilinear between corners, beyond the ends of p what is at the ends.

        Args:
            partials: (1, n, corners in q, corners in p).
            p, along: (images, elements), as of ``locate``; a processor gives each image to one core.
        """
        x, y = (p * (1 / self.end)).clamp(-1, 1), (along * (2 * (1 + DENSER))).sub_(1)
        # Interleaved by way of complex numbers, a processor takes a sixth of the time.
        at = torch.view_as_real(torch.complex(x, y)) if x.is_cpu else torch.stack((x, y), -1)
        found = torch.grid_sampler_2d(partials.expand(len(x), -1, -1, -1), at[:, None], _BILINEAR, _ZEROS, True)
        first, *rest = found[:, :, 0].unbind(1)
        return torch.add(first, x, alpha=0), *rest  # NaN, which is on no corner, stays NaN


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


def _in_p(at: np.ndarray, cells: int, nodes: int) -> np.ndarray:
    """(n, nodes): interpolation at ``at``, in cells, by the polynomial through the eight nearest nodes."""
    at = at * ((nodes - 1) / cells)
    first = np.clip(np.floor(at).astype(int) - 3, 0, nodes - 8)
    matrix = np.zeros((len(at), nodes))
    for j in range(8):
        others = np.delete(np.arange(8), j)
        matrix[np.arange(len(at)), first + j] = ((at - first)[:, None] - others).prod(1) / (j - others).prod()
    return matrix


def polynomials(interpolation: Callable[[np.ndarray], np.ndarray], cells: int, at: list[float]) -> list[np.ndarray]:
    """Coefficients on each cell of 1, u, u², ... in u, counted from its start, by interpolation ``at`` these: matrices."""
    values = np.stack([interpolation(np.arange(cells) + u) for u in at])
    return list(np.tensordot(np.linalg.inv(np.vander(at, increasing=True)), values, 1))


@functools.cache
def _in_p_of_cells(cells: int, nodes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """From values at the nodes to each cell's coefficients of quadratics and of cubics, at Chebyshev's points."""
    points = ([0.5 * math.cos((k + 0.5) * math.pi / n) for k in range(n)] for n in (3, 4))
    quadratics, cubics = (polynomials(lambda at: _in_p(at + 0.5, cells, nodes), cells, each) for each in points)
    return quadratics, cubics


def coefficients(
    grid: Grid, in_q: list[np.ndarray], mean: np.ndarray, gain: np.ndarray, logarithm: np.ndarray
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(a, b, what d^a e^b is multiplied by in each cell), of the mean, of the gain, of the logarithm, from values at nodes."""
    quadratics, cubics = _in_p_of_cells(grid.in_p, len(grid.nodes()))
    yield from ((0, b, each @ mean @ quadratics[0].T) for b, each in enumerate(in_q))
    for value, in_p in ((gain, cubics), (logarithm, quadratics)):
        for a, b in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (0, 2), *((k, 0) for k in range(3, len(in_p)))):
            yield a, b, in_q[b] @ value @ in_p[a].T


def partial_derivatives(
    grid: Grid, q: np.ndarray, gain: np.ndarray, ratio: np.ndarray, falls: np.ndarray, grows: np.ndarray
) -> np.ndarray:
    """(5, q, p) at the corners, U the unit of p: E[f'], U E[f''], U/v dVar/dm, dVar/dv and v times E[f'] by v.

    Args:
        grid: of the table.
        q: (n,) of the corners along q.
        gain, ratio: (n, nodes) E[f'] and Var/v.
        falls, grows: (n,) -v/p dp/dv and v dq/dv.
    """
    at, step = grid.corners()[0], 0.01
    here, ahead, behind = (_in_p(at + by, grid.in_p, len(grid.nodes())).T for by in (0, step, -step))
    slope = (ahead - behind) * (grid.per_cell / (2 * step))
    p = at / grid.per_cell - grid.end

    def by_logarithm_of_var(values: np.ndarray) -> np.ndarray:
        return grows[:, None] * (np.gradient(values, q, axis=0, edge_order=2) @ here) - falls[:, None] * p * (values @ slope)

    by_var = ratio @ here + by_logarithm_of_var(ratio)
    return np.stack([gain @ here, gain @ slope, ratio @ slope, by_var, by_logarithm_of_var(gain)])


def as_table(moments: list[np.ndarray], partials: np.ndarray) -> tuple[Tensor, Tensor]:
    """What ``tabulated`` reads, of the coefficients in (q, p) and of the partial derivatives at the corners."""
    return torch.from_numpy(np.stack(moments).reshape(len(moments), -1)), torch.from_numpy(partials)[None]


class Curve:
    """An elementwise function whose two moments are read from a table, made at its first use.

    Args:
        function: of a tensor, elementwise, in any floating-point dtype; it keeps relative accuracy where it vanishes.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.number = len(CURVES)  # by which a compiled graph knows it
        CURVES.append(self)

    def fill(self) -> tuple[Tensor, ...]:
        """What kernels read, in float64: for ``tabulated`` (16, cells) and (1, 4 or 5, corners along q, corners along p)."""
        raise NotImplementedError

    @property
    def table(self) -> tuple[Tensor, ...]:
        """In float32 on the processor."""
        with torch.no_grad(), torch.device("cpu"):
            return tuple(each.to(torch.float32) for each in self.fill())


CURVES: list[Any] = []
_TABLES: dict[tuple[int, torch.device], tuple[Tensor, ...]] = {}


@torch.compiler.assume_constant_result
def table_of(number: int, device: torch.device) -> tuple[Tensor, ...]:
    """A curve's table in float32 on a device, made at first use; a constant of a compiled graph."""
    key = (number, device)
    if key not in _TABLES:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must serve everywhere
            _TABLES[key] = tuple(each.to(device) for each in CURVES[number].table)
    return _TABLES[key]


# ---- reading -----------------------------------------------------------------------------------------------------


def numbers(cell: Tensor, count: int) -> Tensor:
    """Cells as integers; of NaN, which no integer holds, one of the ``count`` cells all the same: a power of 2."""
    return cell.to(torch.int32).bitwise_and_(count - 1)


def read(coefficients: Tensor, cell: Tensor, first: int, count: int) -> Tensor:
    """(count, *shape): ``count`` coefficients, from the ``first`` on, of each element's cell."""
    found = torch.index_select(coefficients[first : first + count], 1, cell.reshape(-1))
    return found.view(count, *cell.shape)


def _quadratic(c: Sequence[Tensor], d: Tensor, e: Tensor) -> Tensor:
    """Of six coefficients; a seventh is that of d³."""
    along = c[2] if len(c) < 7 else torch.addcmul(c[2], d, c[6])
    along = torch.addcmul(torch.addcmul(c[1], d, along), e, c[4])
    return torch.addcmul(torch.addcmul(c[0], d, along), e, torch.addcmul(c[3], e, c[5]))


class Cell(NamedTuple):
    """What a kernel reads of the cells its elements lie in: the mean in their middle along p, coefficients, d and e."""

    middle: Tensor
    gains: Sequence[Tensor]
    logarithms: Sequence[Tensor]
    d: Tensor
    e: Tensor

    @classmethod
    def read(cls, table: Tensor, cell: Tensor, d: Tensor, e: Tensor) -> Cell:
        """Of a table of sixteen coefficients."""
        a0, a1, a2, *c = read(table, cell, 0, 16).unbind()
        return cls(torch.addcmul(a0, e, torch.addcmul(a1, e, a2)), c[:7], c[7:], d, e)

    def gain(self) -> Tensor:
        """E[f'(X)]."""
        return _quadratic(self.gains, self.d, self.e)

    def along(self, tangent: float | Tensor | None = None) -> Tensor:
        """The integral of the gain, less ``tangent``, from the middle of the cell to d, over d."""
        # g0 + g3 e + g5 e² + d/2 (g1 + g4 e + d (2/3 g2 + d g6/2))
        c, d, e = self.gains, self.d, self.e
        slope = torch.addcmul(c[1], d, torch.addcmul(c[2], d, c[6], value=0.75), value=2 / 3)
        along = torch.addcmul(c[0] if tangent is None else c[0] - tangent, e, torch.addcmul(c[3], e, c[5]))
        return torch.addcmul(along, d, torch.addcmul(slope, e, c[4]), value=0.5)

    def power(self) -> Tensor:
        """2 to the logarithm."""
        return torch.exp2(_quadratic(self.logarithms, self.d, self.e))


class Partials(NamedTuple):
    """E[f'], E[f''], and of the variance: by m, over v, and by v."""

    gain: Tensor
    curvature: Tensor
    by_mean: Tensor
    by_var: Tensor

    def gradients(self, var: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean and of the variance of X: dE/dm = E[f'], dE/dv = E[f'']/2 (Stein)."""
        return (
            flushed(torch.addcmul(grad_mean * self.gain, grad_var * var, self.by_mean)),
            flushed(torch.addcmul(grad_var * self.by_var, grad_mean, self.curvature, value=0.5)),
        )


Kernel = Callable[..., tuple[Tensor, Tensor]]


def _gradients(
    mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor, backward: Kernel, constants: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """``backward`` of tensors in the shape that ``Grid.bilinear`` takes."""
    images = _IMAGES if mean.is_cpu and mean.numel() % _IMAGES == 0 and not torch.compiler.is_compiling() else 1
    tensors = (x.reshape(images, mean.numel() // images) for x in (mean, var, grad_mean, grad_var))
    by_mean, by_var = backward(*tensors, *constants)
    return by_mean.reshape(mean.shape), by_var.reshape(mean.shape)


class _Tabulated(torch.autograd.Function):
    """Mean and variance of a curve; saves (mean, var) only."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, kernels: tuple[Kernel, Kernel], table: tuple[Tensor, ...], constants: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, var)
        ctx.gradient, ctx.constants = kernels[1], (table[1], *constants)
        out: tuple[Tensor, Tensor] = fused(kernels[0], mean, var, constants=(table[0], *constants))
        return out

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        grads = fused(_gradients, *ctx.saved_tensors, grad_mean, grad_var, constants=(ctx.gradient, ctx.constants))
        return *grads, None, None, None


def tabulated(
    curve: Curve, kernel: Kernel, backward: Kernel, mean: Tensor, var: Tensor, *constants: Any
) -> tuple[Tensor, Tensor]:
    """Both moments by ``kernel(mean, var, moments, *constants)``, with their gradients by ``backward``; float32."""
    table = table_of(curve.number, mean.device)
    out: tuple[Tensor, Tensor] = _Tabulated.apply(mean, var, (kernel, backward), table, constants)
    return out
