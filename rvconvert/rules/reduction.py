"""Reductions: sums and means (linear), products, norms and extrema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from rvconvert.random_variable import RandomVariable
from rvconvert.registry import Exactness
from rvconvert.rules.arithmetic import clark_maximum
from rvconvert.rules.kinds import Composite, FixedLinear, add_rule, bind

_INDEPENDENT = "elements are independent"


def _same_map(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return func(*args, **kwargs)


def _mean_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    var = args[0] if args else kwargs["input"]
    out = func(*args, **kwargs)
    return out * (out.numel() / var.numel())


for _name in ("sum", "nansum", "cumsum", "trace", "sum_to_size"):
    add_rule(_name, FixedLinear(_same_map), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
for _name in ("mean", "nanmean"):
    add_rule(_name, FixedLinear(_mean_square), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _dims(x: RandomVariable, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)


def _variance(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = _dims(input, dim)
    n = math.prod(input.shape[d] for d in dims)
    correction = int(unbiased) if correction is None else correction
    centred = input - torch.mean(input, dims, keepdim=True)
    return torch.sum(centred * centred, dims, keepdim=keepdim) / (n - correction)


def _std(*args: Any, **kwargs: Any) -> Any:
    return torch.sqrt(_variance(*args, **kwargs))


add_rule("var", Composite(_variance), Exactness.APPROXIMATE, "deviations from the mean are independent")
add_rule("std", Composite(_std), Exactness.APPROXIMATE, "as var, and a Gaussian variance under the root")


def _var_mean(input: Any, *args: Any, **kwargs: Any) -> Any:
    (dim,), _, options = bind(("dim",), args[:1], kwargs)
    return _variance(input, *args, **kwargs), torch.mean(input, _dims(input, dim), keepdim=options.get("keepdim", False))


add_rule("var_mean", Composite(_var_mean), Exactness.APPROXIMATE, "as var")


def _norm(input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    dims = _dims(input, dim)
    if p in (2, 2.0, "fro", None):
        return torch.sqrt(torch.sum(input * input, dims, keepdim=keepdim))
    if p in (1, 1.0):
        return torch.sum(torch.abs(input), dims, keepdim=keepdim)
    return torch.sum(torch.abs(input) ** p, dims, keepdim=keepdim) ** (1 / p)


def _linalg_norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _norm(x, 2 if ord is None else ord, dim, keepdim)


_NORM = "elements are independent and the sum of powers Gaussian"
add_rule("norm", Composite(_norm), Exactness.APPROXIMATE, _NORM, functions=(torch.norm, torch.Tensor.norm, torch.functional.norm))
add_rule(
    "vector_norm",
    Composite(_linalg_norm),
    Exactness.APPROXIMATE,
    _NORM,
    functions=(torch.linalg.vector_norm, torch.linalg.norm),
)


def _normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    return input / torch.clamp(_norm(input, p, dim, keepdim=True), min=eps)


add_rule("normalize", Composite(_normalize), Exactness.APPROXIMATE, "as div: the norm is independent of each element")


def _extremum(sign: int) -> Any:
    def reduce(input: Any, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, (RandomVariable, torch.Tensor)):
            return (torch.maximum if sign > 0 else torch.minimum)(input, dim)
        dims = _dims(input, dim)
        mean, var = tournament(sign * input.mean, input.var, dims)
        mean = sign * mean
        if not keepdim:
            mean, var = mean.flatten(-len(dims)).squeeze(-1), var.flatten(-len(dims)).squeeze(-1)
        else:
            for d in sorted(x % input.ndim for x in dims):
                mean, var = mean.unsqueeze(d).squeeze(-1), var.unsqueeze(d).squeeze(-1)
        value = input.with_moments(mean, var)
        if isinstance(dim, int):
            index = (torch.max if sign > 0 else torch.min)(input.mean, dim, keepdim=keepdim).indices
            return (torch.return_types.max if sign > 0 else torch.return_types.min)((value, index))
        return value

    return reduce


def tournament(mean: torch.Tensor, var: torch.Tensor, dims: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of the maximum over ``dims`` by pairs (Clark 1961); the dims are moved last and kept as size 1."""
    mean, var = (torch.movedim(x, tuple(dims), tuple(range(-len(dims), 0))) for x in (mean, var))
    kept = mean.shape[: mean.ndim - len(dims)]
    mean, var = mean.reshape(*kept, -1), var.reshape(*kept, -1)
    while mean.shape[-1] > 1:
        n = mean.shape[-1]
        half = n // 2
        top, top_var = clark_maximum(mean[..., :half], var[..., :half], mean[..., half : 2 * half], var[..., half : 2 * half])
        mean = torch.cat((top, mean[..., 2 * half :]), -1)
        var = torch.cat((top_var, var[..., 2 * half :]), -1)
    return mean.reshape(*kept, *(1 for _ in dims)), var.reshape(*kept, *(1 for _ in dims))


_CLARK = "Gaussian, independent elements; each pair's maximum is taken as Gaussian again (Clark 1961)"
for _name, _sign in (("max", 1), ("min", -1), ("amax", 1), ("amin", -1)):
    add_rule(_name, Composite(_extremum(_sign)), Exactness.APPROXIMATE, _CLARK)


def _prod(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = _dims(input, dim)
    second = (input.mean.square() + input.var).movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    mean = input.mean.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
    first, second = mean.prod(-1), second.prod(-1)
    if keepdim and isinstance(dim, int):
        first, second = first.unsqueeze(dim), second.unsqueeze(dim)
    return input.with_moments(first, second - first.square())


add_rule("prod", Composite(_prod), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    top = torch.amax(input.mean, dim, keepdim=True).detach()
    total = torch.sum(torch.exp(input - top), dim, keepdim=True)
    out = torch.log(total) + top
    return out if keepdim else torch.squeeze(out, dim)


add_rule("logsumexp", Composite(_logsumexp), Exactness.APPROXIMATE, "elements are independent and their sum Gaussian")
