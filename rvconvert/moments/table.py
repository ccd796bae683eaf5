"""Tables of two moments: what quadrature finds at the corners of a plane (p, q), read bilinearly by kernels.

Two or three numbers lead to the moments: one to the mean, and the logarithm to the base of 2 of Var/v, or, of a function that
turns, g = E[f'] and the logarithm of what its line leaves. Corners lie as densely as bilinear interpolation asks: what is read
costs time, what is not read costs memory alone. Where f turns they would have to lie denser still; there second differences along
p take the interpolation to third order. Gradients need less: partial derivatives lie between fewer corners.
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
from rvconvert.moments.quadrature import legendre

Function = Callable[[Tensor], Tensor]

DENSER = 2.0  # corners of q lie by 1 + this more densely at v = 0, by as much less at infinity
_BILINEAR, _BORDER = 0, 1  # torch's numbers for two options of grid_sample
_IMAGES, _LEAST = 8, 1 << 13  # how many cores may share its work, and of how many elements
_LEGENDRE, _AT_ONCE = 40, 1024  # nodes of a panel; integrals whose nodes stay in a core's cache


class Grid(NamedTuple):
    """Cells along p in [-end, end] and along q in [0, 1].

    Attributes:
        end, in_p, in_q: of p, and how many cells.
        spacing: nodes for one unit of p where quadrature is done.
    """

    end: int
    in_p: int
    in_q: int
    spacing: int

    def nodes(self) -> np.ndarray:
        """Where quadrature is done, along p."""
        return np.linspace(-self.end, self.end, 2 * self.end * self.spacing + 1)

    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """p and q of the corners."""
        at = np.linspace(0, 1, self.in_q + 1)
        return np.linspace(-self.end, self.end, self.in_p + 1), at / (1 + DENSER - DENSER * at)

    def read(self, table: Tensor, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """The n numbers at a place, bilinear between corners; may be changed in place.

        Args:
            table: (1, n, corners in q, corners in p).
            x: (images, 1, elements), p over ``end``, in [-1, 1]; a processor gives each image to one core.
            y: of its shape, -1 at q = 0, 1 at q = 1, and between as the corners lie; None where there is one row of them.
        """
        if torch.compiler.is_compiling():
            return self._gathered(table, x, y)
        if y is None:  # any number will do
            at = x.unsqueeze(-1).expand(*x.shape, 2)
        else:  # interleaved by way of complex numbers a processor takes a sixth of the time
            at = torch.view_as_real(torch.complex(x, y)) if x.is_cpu else torch.stack((x, y), -1)
        each = torch.grid_sampler_2d(table.expand(x.shape[0], -1, -1, -1), at, _BILINEAR, _BORDER, True).unbind(1)
        return tuple(x.clone() for x in each) if torch.is_grad_enabled() else each  # parts do not change in place under a graph

    def _gathered(self, table: Tensor, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """As ``read``, by indices, which Inductor fuses with what is before and after them."""
        read = torch.ops.aten._unsafe_index  # noqa: SLF001 (the one that asks nothing of each index)
        numbers = table[0].flatten(1).unbind()
        first, along = _cell(x, self.in_p)

        def between(at: Tensor, weight: Tensor | None = None) -> list[Tensor]:
            # What is read is used once: else it would be kept in memory.
            left, right = 1 - along, along
            if weight is not None:
                left, right = left * weight, right * weight
            return [read(number, [at]) * left + read(number, [at + 1]) * right for number in numbers]

        if y is None:
            return tuple(between(first))
        row, across = _cell(y, self.in_q)
        first = first + row * (self.in_p + 1)
        pairs = zip(between(first, 1 - across), between(first + self.in_p + 1, across), strict=True)
        return tuple(a + b for a, b in pairs)

    def bilinear(self, table: Tensor, x: Tensor, y: Tensor | None = None) -> Sequence[Tensor]:
        """As ``read``; the first number is NaN of NaN."""
        first, *rest = self.read(table, x, y)
        return torch.add(first, x, alpha=0), *rest

    def third_order(self, table: Tensor, x: Tensor, y: Tensor) -> Sequence[Tensor]:
        """As ``read``, the first two numbers to third order along p by the last two, their ``curvatures``; x is used up.

        NaN of NaN.
        """
        first, second, *rest, of_first, of_second = self.read(table, x, y)
        t = x.mul_(self.in_p // 2).frac_().abs_()  # from a corner, in cells
        share = t.addcmul_(t, t, value=-1)
        return first.addcmul_(share, of_first), second.addcmul_(share, of_second), *rest


def _cell(x: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Which one of ``cells`` between -1 and 1, and where in it, from 0 to 1; NaN of NaN."""
    place = ((x + 1) * (cells / 2)).clamp(0, cells)
    first = place.long().clamp(0, cells - 1)
    return first, place - first


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


def local(nodes: int, cells: int, by: float = 0.0) -> np.ndarray:
    """(nodes, corners): interpolation ``by`` cells beside the corners, by the polynomial through the eight nearest nodes."""
    at = (np.arange(cells + 1) + by) * ((nodes - 1) / cells)
    first = np.clip(np.floor(at).astype(int) - 3, 0, nodes - 8)
    matrix = np.zeros((nodes, len(at)))
    for j in range(8):
        others = np.delete(np.arange(8), j)
        matrix[first + j, np.arange(len(at))] = ((at - first)[:, None] - others).prod(1) / (j - others).prod()
    return matrix


def curvatures(values: np.ndarray) -> np.ndarray:
    """What t (1 - t) is multiplied by, t the place in a cell along p; at the ends, beyond which no curve is, 0."""
    made = np.zeros_like(values)
    made[..., 1:-1] = values[..., 1:-1] - (values[..., 2:] + values[..., :-2]) / 2
    return made


def moments_at_corners(grid: Grid, in_q: np.ndarray, *values: np.ndarray) -> np.ndarray:
    """(values, q, p).

    Args:
        grid: of the table.
        in_q: (q, rows) interpolation.
        values: (rows, nodes) each.
    """
    in_p = local(len(grid.nodes()), grid.in_p)
    return np.stack([in_q @ (each @ in_p) for each in values])


def partials_at_corners(
    grid: Grid,
    in_q: np.ndarray,
    gain: np.ndarray,
    ratio: np.ndarray,
    falls: np.ndarray,
    grows: np.ndarray,
    unit: float,
    rises: np.ndarray | float = 0.0,
) -> np.ndarray:
    """(5, q, p), U ``unit`` units of p: E[f'], U/2 E[f''], N U/v dVar/dm, N dVar/dv and v times E[f'] by v.

    Of the mean's, dE/dm = E[f'] and dE/dv = E[f'']/2 (Stein).

    Args:
        grid: of the table.
        in_q: (q, rows) interpolation.
        gain, ratio: (rows, nodes) E[f'] and N Var/v, N what a variance that has a limit is held by.
        falls, grows: (q,) -v/p dp/dv and v dq/dv.
        unit: of U.
        rises: (q,) v/N dN/dv.
    """
    step = 0.01
    here, ahead, behind = (local(len(grid.nodes()), grid.in_p, by) for by in (0.0, step, -step))
    slope = (ahead - behind) * (grid.in_p / (4 * grid.end * step))
    p, q = grid.corners()
    gains, ratios, curvatures, slopes = (in_q @ (x @ y) for y in (here, slope) for x in (gain, ratio))

    def by_logarithm_of_var(values: np.ndarray, by_p: np.ndarray) -> np.ndarray:
        return grows[:, None] * np.gradient(values, q, axis=0, edge_order=2) - falls[:, None] * p * by_p

    by_var = ratios * np.expand_dims(1 - rises, -1) + by_logarithm_of_var(ratios, slopes)
    return np.stack([gains, unit / 2 * curvatures, unit * slopes, by_var, by_logarithm_of_var(gains, curvatures)])


def as_table(values: np.ndarray) -> Tensor:
    """What ``Grid.read`` reads, in float32, the numbers of a corner side by side."""
    return torch.from_numpy(values)[None].to(torch.float32, memory_format=torch.channels_last)


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
        """What kernels read, on the processor: for ``tabulated`` moments and partial derivatives (``as_table``)."""
        raise NotImplementedError


def kept(most: int | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function whose tables, the last ``most`` of them, are made once, at first use, so that they serve everywhere."""

    def decorate(fill: Callable[..., Any]) -> Callable[..., Any]:
        @functools.lru_cache(most)
        @functools.wraps(fill)
        def filled(*arguments: Any) -> Any:
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                return fill(*arguments)

        return filled

    return decorate


CURVES: list[Any] = []


@kept()
def _filled(number: int, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(each.to(device) for each in CURVES[number].fill())


@torch.compiler.assume_constant_result
def table_of(number: int, device: torch.device) -> tuple[Tensor, ...]:
    """A curve's table in float32 on a device; a constant of a compiled graph."""
    made: tuple[Tensor, ...] = _filled(number, device)
    return made


# ---- reading -----------------------------------------------------------------------------------------------------


class Partials(NamedTuple):
    """Of the mean and of the variance of f(X), by the mean and by the variance of X."""

    mean_by_mean: Tensor
    mean_by_var: Tensor
    var_by_mean: Tensor
    var_by_var: Tensor

    def gradients(self, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean and of the variance of X."""
        return (
            (grad_mean * self.mean_by_mean).addcmul_(grad_var, self.var_by_mean),
            (grad_var * self.var_by_var).addcmul_(grad_mean, self.mean_by_var),
        )


Kernel = Callable[..., tuple[Tensor, ...]]


class Kernels(NamedTuple):
    """Of (mean, var, table, *constants), elementwise, in the shape that ``Grid.read`` takes."""

    moments: Callable[..., tuple[Tensor, Tensor]]
    partials: Callable[..., Partials]


def in_images(*arguments: Any) -> tuple[Tensor, ...]:
    """A kernel of tensors in the shape that ``Grid.read`` takes; the last two arguments are the kernel and its constants."""
    *tensors, kernel, constants = arguments
    if torch.compiler.is_compiling():  # reads by indices, in any shape
        results: tuple[Tensor, ...] = kernel(*tensors, *constants)
        return results
    shape, n = tensors[0].shape, tensors[0].numel()
    shared = tensors[0].is_cpu and n >= _LEAST and n % _IMAGES == 0
    rows = [x.reshape(_IMAGES if shared else 1, 1, -1) for x in tensors]
    return tuple(x.reshape(shape) for x in kernel(*rows, *constants))


def _gradients(
    mean: Tensor, var: Tensor, grad_mean: Tensor, grad_var: Tensor, partials: Callable[..., Partials], *constants: Any
) -> tuple[Tensor, Tensor]:
    return partials(mean, var, *constants).gradients(grad_mean, grad_var)


class _Tabulated(torch.autograd.Function):
    """Mean and variance of a curve; saves (mean, var) only."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, kernels: Kernels, table: tuple[Tensor, ...], constants: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, var)
        ctx.kernel = _gradients, (kernels.partials, table[1], *constants)
        out: tuple[Tensor, Tensor] = fused(in_images, mean, var, constants=(kernels.moments, (table[0], *constants)))
        return out

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        return *fused(in_images, *ctx.saved_tensors, grad_mean, grad_var, constants=ctx.kernel), None, None, None


def tabulated(curve: Curve, kernels: Kernels, mean: Tensor, var: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """Both moments by a curve's table, with their gradients; float32."""
    table = table_of(curve.number, mean.device)
    if torch.is_grad_enabled():
        out: tuple[Tensor, Tensor] = _Tabulated.apply(mean, var, kernels, table, constants)
    else:  # a fifth faster on few elements
        out = fused(in_images, mean, var, constants=(kernels.moments, (table[0], *constants)))
    return out


def tabulated_partials(curve: Curve, kernels: Kernels, mean: Tensor, var: Tensor, *constants: Any) -> Partials:
    """The partial derivatives of both moments, without a graph; float32."""
    table = table_of(curve.number, mean.device)
    with torch.no_grad():
        return Partials(*fused(in_images, mean, var, constants=(kernels.partials, (table[1], *constants))))
