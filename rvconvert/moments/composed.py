"""Moments of a function that a model spells in several operations, ``x * sigmoid(1.702 * x)``: by a table made on the spot.

A table serves what is smooth and a line far out on either side; it is held against quadrature before it is used. What has
kinks may be a function that torch has. Everything else is integrated at each call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rvconvert.moments.compilation import is_traced
from rvconvert.moments.quadrature import quadrature
from rvconvert.moments.recognized import recognized
from rvconvert.moments.smooth_table import Smooth, table_moments
from rvconvert.moments.table import integrals

if TYPE_CHECKING:
    from rvconvert.moments.normal import Moments

Function = Callable[[Tensor], Tensor]

_MOST = 16  # tables, of 21 MB each: a function whose numbers change with every step is not to have one for each
_WIDTHS = tuple(0.1 * 1.15**k for k in range(34))
_POINTS = 1024
_MOST_RECOGNIZED = 256
_found: dict[Hashable, Smooth | None] = {}
_recognized: dict[Hashable, Callable[[Tensor, Tensor], Moments] | None] = {}
_lock = threading.RLock()


def composed_moments(
    key: Hashable | None,
    function: Function,
    mean: Tensor,
    var: Tensor,
    kinks: Sequence[float] = (),
    *,
    read: Callable[[Function, Tensor, Tensor], Moments | None] | None = None,
    wide: bool = False,
) -> Moments:
    """Moments of f(X), X ~ N(mean, var).

    Args:
        key: equal for equal functions of numbers alone; None for one that nothing is known of.
        function: elementwise, on the whole line.
        mean, var: of one shape.
        kinks: where the function or a derivative jumps.
        read: gives the moments of what it knows by its operations.
        wide: the function is computed in double precision: what is divided by may be lost to rounding far from the mean.
    """
    found = None
    if key is not None and mean.dtype == torch.float32 and not is_traced():
        if kinks:
            moments = _kept(_recognized, _MOST_RECOGNIZED, key, lambda: recognized(function, kinks))
            found = moments and moments(mean, var)
        else:
            curve = _kept(_found, _MOST, key, lambda: fitted(function))
            found = curve and table_moments(curve, mean, var)
    if found is None and read is not None and not is_traced():
        found = read(function, mean, var)
    if found is not None:
        return found
    if wide and mean.dtype == torch.float32 and mean.device.type != "mps":
        return quadrature(lambda x: function(x.double()).to(x.dtype), mean, var, kinks)
    return quadrature(function, mean, var, kinks)


def _kept(kept: dict[Hashable, Any], most: int, key: Hashable, make: Callable[[], Any]) -> Any:
    if key not in kept:
        with _lock, torch.no_grad(), torch.inference_mode(False), torch.device("cpu"):
            if key not in kept and len(kept) < most:
                kept[key] = make()
    return kept.get(key)


def fitted(function: Function) -> Smooth | None:
    """A table that agrees with quadrature, of the least width beyond which the function is a line; None if there is none."""
    widths = torch.tensor(_WIDTHS, dtype=torch.float64)
    ends = torch.stack([side * at * widths for side in (-1.0, 1.0) for at in (8.0, 9.0, 16.0, 17.0, 60.0, 61.0)])
    values = function(ends)
    if values.shape != ends.shape or values.dtype != ends.dtype or not values.isfinite().all():
        return None
    slopes = (values[1::2] - values[::2]) / (ends[1::2] - ends[::2])
    near, middle, far = slopes.view(2, 3, -1).unbind(1)  # on the left and on the right
    line = (((near - far).abs() < 1e-6) & ((middle - far).abs() < 1e-6)).all(0).nonzero()

    for first in line[:1].flatten().tolist():
        for width in _WIDTHS[first : first + 7 : 3]:
            curve = Smooth(_continued(function, 60 * _WIDTHS[first], *far[:, first].tolist()), width)
            if _agrees(curve):
                return curve
    return None


def _continued(function: Function, end: float, left: float, right: float) -> Function:
    """In double precision, as several operations cancel far from 0; beyond ``end`` a line, as an exponential overflows there."""

    def continued(x: Tensor) -> Tensor:
        wide = x if x.device.type == "mps" else x.double()
        inside = wide.clamp(-end, end)
        beyond = wide - inside
        return (function(inside) + left * beyond.clamp(max=0.0) + right * beyond.clamp(min=0.0)).to(x.dtype)

    return continued


def _agrees(curve: Smooth) -> bool:
    """To the accuracy that tables have, or that quadrature has in single precision, at points of no pattern."""
    generator = torch.Generator().manual_seed(0)
    m, s = torch.rand(2, _POINTS, dtype=torch.float64, generator=generator)
    mean, var = 16 * curve.width * (m - 0.5), (curve.width * 5 * 10 ** (-4 * s)).square()
    mean, var = mean.float(), var.float()
    bends = tuple(curve.width * k for k in range(-10, 11, 2))
    expected, gain, rest = integrals(curve.function, mean.double(), var.double(), bends)
    variance = var * (gain.square() + rest)
    seen = variance > 1e-6 * var

    def errors(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
        out, out_var = (x.flatten() for x in found)
        of_mean, of_var = (out - expected).abs() / (expected.square() + variance).sqrt(), (out_var - variance).abs() / variance
        return float(of_mean[seen].max()), float(of_var[seen].max())

    if not bool(seen.any()):
        return False
    own, other = errors(curve.moments(mean, var)), errors(quadrature(curve.function, mean, var))
    return own[0] < max(1e-5, min(other[0], 1e-3)) and own[1] < max(1e-4, min(other[1], 1e-2))
