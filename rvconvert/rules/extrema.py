"""Maxima and minima, pairwise (Clark 1961), and order statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rvconvert import moments as gaussian
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import Exactness
from rvconvert.errors import UnsupportedOperationError
from rvconvert.rules.calls import bind, moments
from rvconvert.rules.intervals import of_extremum
from rvconvert.rules.kinds import Composite, Elementwise, add_rule
from rvconvert.rules.relations import reducing

__all__ = ["by_pairs", "clark_maximum", "constants", "maximum_over"]

Combine = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def clark_maximum(a: Tensor, a_var: Tensor, b: Tensor, b_var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of max(A, B) for independent Gaussians (Clark 1961).

    With A the one of greater mean, max = A + relu(B - A) and Cov(A, relu(B - A)) = -v_a P(B > A) by Stein's
    rule, so nothing cancels and the variance is never negative.
    """
    first = a >= b
    low, high = torch.where(first, b, a), torch.where(first, a, b)
    high_var = torch.where(first, a_var, b_var)
    total = a_var + b_var
    excess, excess_var = gaussian.relu(low - high, total)
    random = total > 0
    theta = torch.where(random, total, 1).sqrt()
    above = torch.where(random, torch.special.ndtr((low - high) / theta), 0)
    return high + excess, high_var * (1 - 2 * above) + excess_var


def by_pairs(mean: Tensor, var: Tensor, dims: Sequence[int], combine: Combine) -> tuple[Tensor, Tensor]:
    """Reduce moments over ``dims``, kept as size 1, by combining halves until one element is left."""
    order = sorted(d % mean.ndim for d in dims)
    kept = [1 if d in order else size for d, size in enumerate(mean.shape)]
    mean, var = (torch.movedim(x, order, list(range(-len(order), 0))).flatten(-len(order)) for x in (mean, var))
    while mean.shape[-1] > 1:
        half = mean.shape[-1] // 2
        pairs = (x[..., part] for part in (slice(0, half), slice(half, 2 * half)) for x in (mean, var))
        top, top_var = combine(*pairs)
        mean = torch.cat((top, mean[..., 2 * half :]), -1)
        var = torch.cat((top_var, var[..., 2 * half :]), -1)
    return mean.reshape(kept), var.reshape(kept)


def maximum_over(x: Any, dim: Any, keepdim: bool, sign: int = 1) -> Any:
    """The maximum (sign 1) or minimum (sign -1) over one or several dims."""
    dims = tuple(range(x.ndim)) if dim is None or dim == () else (dim,) if isinstance(dim, int) else tuple(dim)
    if not dims:
        return x
    mean, var = by_pairs(sign * x.mean, x.var, dims, clark_maximum)
    out = x.with_moments(sign * mean, var)
    made: Any = out if keepdim else torch.squeeze(out, tuple(d % x.ndim for d in dims))  # type: ignore[call-overload]
    return reducing(made, x, dims, "extremum")


# ---- of two operands ---------------------------------------------------------------------------------------------


def _maximum(sign: int) -> Any:
    def combine(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        (a, b), _, _ = bind(("input", "other"), args, kwargs)
        (a, a_var), (b, b_var) = moments(a), moments(b)
        if a_var is None:
            a, a_var, b, b_var = b, b_var, a, a_var
        b = torch.as_tensor(b, dtype=a.dtype, device=a.device)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if b_var is None:
            mean, var = gaussian.relu((a - b) * sign, a_var.expand(shape))
            return b + sign * mean, var
        mean, var = clark_maximum(sign * a, a_var, sign * b, b_var)
        return sign * mean, var

    return combine


def constants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, ...]:
    """Constant numbers that a random variable is compared with: kinks of the comparison."""
    return tuple(float(x) for x in (*args, *kwargs.values()) if isinstance(x, (int, float)) and not isinstance(x, bool))


for _name, _sign in (("maximum", 1), ("minimum", -1), ("fmax", 1), ("fmin", -1)):
    _interval = of_extremum(max if _sign > 0 else min)
    add_rule(
        _name,
        Elementwise(_maximum(_sign), _maximum(_sign), kinks=constants, meeting=True, interval=_interval),
        Exactness.EXACT_IF_INDEPENDENT,
        "Gaussian, independent operands (Clark 1961)",
    )


# ---- over dims ---------------------------------------------------------------------------------------------------


def _extremum(sign: int) -> Any:
    pair, function, returned = (
        (torch.maximum, torch.max, torch.return_types.max) if sign > 0 else (torch.minimum, torch.min, torch.return_types.min)
    )

    def reduce(input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
        other = dim if isinstance(dim, (RandomVariable, Tensor)) else other
        if other is not None:
            return pair(input, other)
        value: Any = maximum_over(input, dim, keepdim, sign)
        if not isinstance(dim, int):
            return value
        return returned((value, function(input.mean, dim, keepdim=keepdim).indices))

    return reduce


def _amax(sign: int) -> Any:
    def reduce(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
        return maximum_over(input, dim, keepdim, sign)

    return reduce


_CLARK = "Gaussian, independent elements; each pair's maximum is taken as Gaussian again (Clark 1961)"
for _name, _body in (("max", _extremum(1)), ("min", _extremum(-1)), ("amax", _amax(1)), ("amin", _amax(-1))):
    add_rule(_name, Composite(_body), Exactness.APPROXIMATE, _CLARK)


# ---- order statistics --------------------------------------------------------------------------------------------


def _in_order_of_means(function: Callable[..., Any]) -> Any:
    """Values in the order of their means, each with its own variance; indices are those of the means."""

    def body(input: Any, *args: Any, **kwargs: Any) -> Any:
        found = function(input.mean, *args, **kwargs)
        names = ("dim",) if function is torch.sort else ("k", "dim")
        (*_, dim), _, _ = bind(names, args, kwargs)
        dim = -1 if dim is None else dim
        indices = found.indices
        # A dim that was reduced to one index is put back for the gathering.
        at = indices if indices.ndim == input.ndim else indices.unsqueeze(dim)
        value = torch.gather(input, dim, at)
        return type(found)((value.reshape(found.values.shape), indices))

    return body


_ORDER = "the order is that of the means"
_INDEX = "the index is that of the means (a codebook entry, a category); refused by strict=True"
for _name in ("sort", "topk", "kthvalue"):
    add_rule(_name, Composite(_in_order_of_means(getattr(torch, _name))), Exactness.APPROXIMATE, _ORDER)


def _index_at_mean(function: Callable[..., Any]) -> Any:
    def body(input: Any, *args: Any, **kwargs: Any) -> Any:
        if input.settings.strict:
            raise UnsupportedOperationError(
                f"torch.{function.__name__} of a random variable is an index that differs with each draw; without strict=True "
                'it is taken at the mean, and covariance="sampled" takes it on each path'
            )
        return function(input.mean, *args, **kwargs)

    return body


for _name in ("argmax", "argmin", "argsort"):
    add_rule(_name, Composite(_index_at_mean(getattr(torch, _name))), Exactness.APPROXIMATE, _INDEX)
