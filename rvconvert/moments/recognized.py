"""Functions with kinks that a model spells by hand, ``x * relu6(x + 3) / 6``, known by their values: torch has them too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments import piecewise, two_slopes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rvconvert.moments.normal import Moments

_FAR = 50.0  # from a kink, where an exponential is at its end


def recognized(function: Callable[[Tensor], Tensor], kinks: Sequence[float]) -> Callable[[Tensor, Tensor], Moments] | None:
    """Moments of a function that is, but for a place and a scale, one of torch's; None if it is none.

    Args:
        function: elementwise, of numbers alone.
        kinks: where it bends.
    """
    first, last = min(kinks), max(kinks)
    t = torch.linspace(-12.0, 12.0 + last - first, 4999, dtype=torch.float64)
    marks = torch.tensor([first, first - _FAR, first - 1, last, last + 1], dtype=torch.float64)
    values, found = function(first + t), function(marks)
    if values.shape != t.shape or values.dtype != t.dtype or not (values.isfinite().all() and found.isfinite().all()):
        return None
    place = float(found[0])
    low, below, end, above = (round(x - place, 10) for x in found[1:].tolist())

    def is_(other: Tensor) -> bool:
        return torch.allclose(values, place + other, rtol=1e-8, atol=1e-8)

    def moved(moments: Callable[[Tensor, Tensor], Moments], by: float, scale: float) -> Callable[[Tensor, Tensor], Moments]:
        def made(mean: Tensor, var: Tensor) -> Moments:
            out, out_var = moments(mean - by if by else mean, var)
            return scale * out + place, scale * scale * out_var

        return made

    if first == last:
        if above and is_(above * F.leaky_relu(t, -below / above)):
            return moved(lambda mean, var: two_slopes.leaky_relu(mean, var, -below / above), first, above)
        if below and is_(below * F.relu(-t)):
            return moved(lambda mean, var: two_slopes.relu(-mean, var), first, below)
        if above and low and is_(above * F.elu(t, -low / above)):
            return moved(lambda mean, var: piecewise.elu(mean, var, -low / above), first, above)
        return None
    width = last - first
    if end and is_(end / width * t.clamp(0.0, width)):
        return moved(lambda mean, var: piecewise.clamp(mean, var, 0.0, width), first, end / width)
    if width == 6 and is_(above / 4 * F.hardswish(t - 3)):  # 4 at one beyond its kink
        return moved(piecewise.hardswish, first + 3, above / 4)
    return None
