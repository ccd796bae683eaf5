"""What all moment functions share."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Moments = tuple[Tensor, Tensor]


def at_least_float32(function):
    """Half-precision inputs are computed in float32 and the results rounded back."""

    @functools.wraps(function)
    def wrapper(mean, var, *args, **kwargs):
        if mean.dtype not in (torch.float16, torch.bfloat16):
            return function(mean, var, *args, **kwargs)
        return tuple(x.to(mean.dtype) for x in function(mean.float(), var.float(), *args, **kwargs))

    return wrapper


def gradients_with_graph(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Of ``function(*inputs)``, one for each input, None where it has none; for ``backward`` under ``create_graph=True``.

    ``function`` is of composed operations.
    """
    own = [None if x is None else x.view_as(x) for x in inputs]  # one input may be made of another
    wanted = [x for x in own if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(function(*own), wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in own]


def mills(t: Tensor) -> Tensor:
    """Phi(-t)/phi(t) of the standard normal law, t >= 0: the Mills ratio."""
    return math.sqrt(math.pi / 2) * torch.special.erfcx(math.sqrt(0.5) * t)


def standardize(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, 1/s and t = abs(mean)/s; where var = 0, t lies far in the tail, at a mean of 0 too, and 1/s stays finite."""
    inverse = torch.rsqrt(var + 1e-37)
    return var * inverse, inverse, (mean.abs() + 2e-17) * inverse


def affine(x: Tensor, scale: float, offset: float) -> Tensor:
    """scale x + offset, in one operation."""
    if torch.compiler.is_compiling():  # Inductor takes rsub's other number for a whole one where shapes are dynamic
        return x * scale + offset
    return torch.rsub(x, offset, alpha=-scale)


def step(mean: Tensor) -> Tensor:
    """1 where mean > 0, else 0, as a float: torch.where takes a processor twenty times as long as torch.lerp."""
    return torch.sign(mean).clamp_(min=0.0)
