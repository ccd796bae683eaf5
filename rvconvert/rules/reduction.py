"""Reductions: sums and means (linear), products, variances and norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.core.registry import Exactness
from rvconvert.moments import sigmoid, softplus
from rvconvert.rules.calls import bind
from rvconvert.rules.extrema import by_pairs
from rvconvert.rules.kinds import Composite, FixedLinear, add_rule, same_map
from rvconvert.rules.normalization import standardized
from rvconvert.rules.relations import reducing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rvconvert.core.random_variable import RandomVariable

_INDEPENDENT = "elements are independent"


def _mean_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    var = args[0] if args else kwargs["input"]
    out = func(*args, **kwargs)
    return out * (out.numel() / var.numel())


@dataclass(frozen=True)
class Total(FixedLinear):
    """A sum, which over one dimension knows what it is the sum of."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        (x, dim), _, _ = bind(("input", "dim"), args, kwargs)
        return reducing(super().__call__(func, args, kwargs), x, dim, "sum")


add_rule("sum", Total(same_map), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
for _name in ("nansum", "cumsum", "trace", "sum_to_size"):
    add_rule(_name, FixedLinear(same_map), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
for _name in ("mean", "nanmean"):
    add_rule(_name, FixedLinear(_mean_square), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def dims_of(x: RandomVariable, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The dims that an argument ``dim`` means: all for None or ()."""
    if dim is None or dim == ():
        return tuple(range(x.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)


# ---- variance and deviation ----------------------------------------------------------------------------------------


def _variance(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
    """A quadratic form x' M x of Gaussians, M = (I - 1/n)/(n - correction): var = 2 tr(MVMV) + 4 m' MVM m."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = dims_of(input, dim)
    n = math.prod([input.shape[d] for d in dims])
    freedom = n - (int(unbiased) if correction is None else correction)
    scale = 1 / freedom if freedom > 0 else math.inf  # torch gives NaN or infinity there
    mean, var = input.mean, input.var
    centred = mean - mean.mean(dims, keepdim=True)

    def total(x: Tensor) -> Tensor:
        return x.sum(dims, keepdim=keepdim)

    out = total(centred.square()) + (1 - 1 / n) * total(var)
    out_var = 2 * ((1 - 2 / n) * total(var.square()) + (total(var) / n).square()) + 4 * total(centred.square() * var)
    return input.with_moments(out * scale, out_var * (scale * scale))


def _std(*args: Any, **kwargs: Any) -> Any:
    return torch.sqrt(_variance(*args, **kwargs))


def _with_mean(spread: Any) -> Any:
    def body(input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Any:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        mean = torch.mean(input, dims_of(input, dim), keepdim=keepdim)
        return spread(input, dim, unbiased, keepdim, correction=correction), mean

    return body


_GAUSSIAN = "elements are Gaussian and independent"
_ROOT = "elements are Gaussian and independent; the variance under the root is taken as lognormal"
add_rule("var", Composite(_variance), Exactness.EXACT_IF_INDEPENDENT, _GAUSSIAN)
add_rule("std", Composite(_std), Exactness.APPROXIMATE, _ROOT)
add_rule("var_mean", Composite(_with_mean(_variance)), Exactness.EXACT_IF_INDEPENDENT, _GAUSSIAN)
add_rule("std_mean", Composite(_with_mean(_std)), Exactness.APPROXIMATE, _ROOT)


# ---- norms and distances -------------------------------------------------------------------------------------------


def _root(total: Any, function: Any) -> Any:
    """The root of a sum of powers; its gradient where that is certainly 0 is 0, as torch's norm has it."""
    nothing = total.mean == 0
    root = function(total.with_moments(torch.where(nothing, 1, total.mean), total.var))
    return root.with_moments(*(torch.where(nothing, 0, x) for x in (root.mean, root.var)))


def _norm(input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, out: Any = None) -> Any:
    dims = dims_of(input, dim)
    if p in (2, "fro", None):
        return _root(torch.sum(input * input, dims, keepdim=keepdim), torch.sqrt)
    if p == 0:
        count = torch.sum((input.mean != 0) | (input.var > 0), dims, keepdim=keepdim).to(input.dtype)
        return input.with_moments(count, torch.zeros_like(count))
    if p == "nuc":
        return torch.linalg.matrix_norm(input, p, (-2, -1) if dim is None else dim, keepdim)
    if p == 1:
        return torch.sum(torch.abs(input), dims, keepdim=keepdim)
    if abs(p) == math.inf:
        return (torch.amax if p > 0 else torch.amin)(torch.abs(input), dims, keepdim=keepdim)
    powers = torch.sum(torch.abs(input) ** p, dims, keepdim=keepdim)
    return _root(powers, lambda total: total ** (1 / p)) if p > 0 else powers ** (1 / p)


def _linalg_norm(x: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _norm(x if dtype is None else x.to(dtype), 2 if ord is None else ord, dim, keepdim)


def _vector_or_matrix_norm(x: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if ord in (None, "fro") or len(dims_of(x, dim)) == 1:
        return _linalg_norm(x, ord, dim, keepdim, dtype=dtype)
    return torch.linalg.matrix_norm(x, ord, (-2, -1) if dim is None else dim, keepdim, dtype=dtype)


def _normalize(input: Any, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None) -> Any:
    dims = dims_of(input, dim)
    if p != 2:
        return input / torch.clamp(_norm(input, p, dims, keepdim=True), min=eps)
    n = math.prod([input.shape[d] for d in dims])
    mean, var = standardized(input.mean, input.var, dims, eps * eps / n, centred=False)
    return input.with_moments(mean / math.sqrt(n), var / n)


def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    first, second = (F.normalize(x, 2.0, dim, eps) for x in torch.broadcast_tensors(x1, x2))
    return torch.sum(first * second, dim)


def _pairwise_distance(x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


def _cdist(x1: Any, x2: Any, p: float = 2.0, compute_mode: Any = None) -> Any:
    return _norm(torch.unsqueeze(x1, -2) - torch.unsqueeze(x2, -3), p, -1)


def _dist(input: Any, other: Any, p: float = 2) -> Any:
    return _norm(input - other, p)


_NORM = "elements are independent; the sum of powers under the root is taken as lognormal"
add_rule(
    "norm",
    Composite(_norm, joins=True),
    Exactness.APPROXIMATE,
    _NORM,
    functions=(torch.norm, torch.Tensor.norm, torch.functional.norm),
)
add_rule(
    "vector_norm",
    Composite(_linalg_norm, joins=True),
    Exactness.APPROXIMATE,
    _NORM,
    functions=(torch.linalg.vector_norm,),
)
add_rule(
    "linalg_norm",
    Composite(_vector_or_matrix_norm, joins=True),
    Exactness.APPROXIMATE,
    f"{_NORM}; of a matrix, first order at the mean",
    functions=(torch.linalg.norm,),
)
add_rule("pairwise_distance", Composite(_pairwise_distance), Exactness.APPROXIMATE, _NORM, modules=(torch.nn.PairwiseDistance,))
add_rule("cdist", Composite(_cdist), Exactness.APPROXIMATE, _NORM)
add_rule("dist", Composite(_dist), Exactness.APPROXIMATE, _NORM)
_UNIT = "elements are independent; the norm is taken at second order about its expectation"
add_rule("normalize", Composite(_normalize, joins=True), Exactness.APPROXIMATE, _UNIT)
add_rule("cosine_similarity", Composite(_cosine_similarity), Exactness.APPROXIMATE, _UNIT, modules=(torch.nn.CosineSimilarity,))


# ---- products and sums of exponentials -----------------------------------------------------------------------------


def _times(a: Tensor, a_var: Tensor, b: Tensor, b_var: Tensor) -> tuple[Tensor, Tensor]:
    return a * b, a_var * (b.square() + b_var) + a.square() * b_var


def _prod(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    dims = dims_of(input, dim)
    out = input.with_moments(*by_pairs(input.mean, input.var, dims, _times))
    return out if keepdim else torch.squeeze(out, dims)


def _cumprod(input: Any, dim: int, *, dtype: Any = None) -> Any:
    parts = [torch.unbind(x, dim) for x in (input.mean, input.var)]
    running = [(parts[0][0], parts[1][0])]
    for mean, var in zip(parts[0][1:], parts[1][1:], strict=True):
        running.append(_times(*running[-1], mean, var))
    return input.with_moments(*(torch.stack(x, dim) for x in zip(*running, strict=True)))


add_rule("prod", Composite(_prod), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)
add_rule("cumprod", Composite(_cumprod, joins=True), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT)


def _exponentials(input: Any, dim: Any) -> tuple[Any, Tensor]:
    """exp(x - top) with the greatest mean as top: no overflow, and -inf stays 0."""
    top = torch.amax(input.mean, dim, keepdim=True).detach()
    top = torch.where(torch.isfinite(top), top, 0)
    return torch.exp(input - top), top


def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    dims = dims_of(input, dim)
    out: Any = input.with_moments(*by_pairs(input.mean, input.var, dims, _log_add))
    made: Any = out if keepdim else torch.squeeze(out, dims)
    return reducing(made, input, dims, "logsumexp")


def _log_add(a: Tensor, a_var: Tensor, b: Tensor, b_var: Tensor) -> tuple[Tensor, Tensor]:
    """log(e^a + e^b) = a + softplus(b - a) of independent Gaussians; Stein's lemma gives the covariance of the two terms."""
    finite = torch.isfinite(a) & torch.isfinite(b)
    difference, spread = torch.where(finite, b - a, 0), a_var + b_var
    more, more_var = softplus(difference, spread)
    share = sigmoid(difference, spread)[0]
    mean = torch.where(finite, torch.where(finite, a, 0) + more, torch.logaddexp(a, b))
    var = (a_var * (1 - 2 * share) + more_var).clamp_min(0)
    return mean, torch.where(finite, var, torch.where(a > b, a_var, b_var))


def _logcumsumexp(input: Any, dim: int) -> Any:
    terms, top = _exponentials(input, dim)
    return torch.log(torch.cumsum(terms, dim)) + top


_BY_TWOS = "elements are Gaussian and independent; two at a time, each result taken as Gaussian"
add_rule("logsumexp", Composite(_logsumexp, joins=True), Exactness.APPROXIMATE, _BY_TWOS)
_LOGNORMAL = "elements are Gaussian and independent; the sum of their exponentials is taken as lognormal"
add_rule("logcumsumexp", Composite(_logcumsumexp, joins=True), Exactness.APPROXIMATE, _LOGNORMAL)
