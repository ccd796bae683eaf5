"""The declared fallbacks: a differentiable function without a rule, linearised at the means; one of autograd, on nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.overrides
from torch import Tensor

from rvconvert.core.registry import REGISTRY, Exactness, Rule, as_constant, operation_name
from rvconvert.errors import UnsupportedOperationError
from rvconvert.rules.calls import full_precision, join, out_of_place, substitute, unique
from rvconvert.rules.draws import DRAWS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rvconvert.core.random_variable import RandomVariable

__all__ = ["LINEARIZED", "ON_NODES", "Linearized", "chooser", "on_nodes", "probes"]

MOST_PROBES = 64
PAIRS = 8


def probes(shapes: Sequence[torch.Size], like: Tensor) -> list[Tensor]:
    """Signs (K, *shape) for each input, such that mean_k (J (e_k * s))^2 estimates sum_j J_ij^2 s_j^2.

    Rows of a Hadamard matrix: the cross terms of two elements with different columns vanish. Elements of one
    sample have columns of their own, so the estimate is exact where a result depends on one sample alone and
    a sample has at most 64 elements (or all samples together have). Elsewhere elements that share a column
    carry fixed pseudo-random signs, and the relative standard error of the estimate is about (2/64)^(1/2).
    """
    whole = sum(math.prod(shape) for shape in shapes) <= MOST_PROBES
    sizes = [math.prod(shape if whole else shape[1:]) for shape in shapes]
    count = min(MOST_PROBES, 1 << max(0, sum(sizes) - 1).bit_length())
    signs, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        element = torch.arange(math.prod(shape), device=like.device)
        column = (start + element % max(size, 1)) % count
        flip = _parity((element + start) * 0x9E3779B1 // 1024 % 1024) if not whole else torch.zeros_like(element)
        row = torch.arange(count, device=like.device).unsqueeze(1)
        parity = _parity(row & column) ^ flip
        signs.append((1 - 2 * parity).to(like.dtype).reshape(count, *shape))
        start += size
    return signs


def _parity(x: Tensor) -> Tensor:
    """The parity of the bits of integers below 1024."""
    for shift in (8, 4, 2, 1):
        x = x ^ (x >> shift)
    return x & 1


@dataclass(frozen=True)
class Linearized:
    """mean = f(means), var = sum_j (df/dx_j)^2 v_j by forward derivatives along probes."""

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = out_of_place(func)
        inputs = unique(args, kwargs)
        like = inputs[0]

        def call(*values: Tensor) -> Any:
            value = {id(x): each for x, each in zip(inputs, values, strict=True)}
            return function(*substitute(args, lambda x: value[id(x)]), **substitute(kwargs, lambda x: value[id(x)]))

        with full_precision(like):
            means = tuple(x.mean for x in inputs)
            mean = call(*means)
            if not _real(mean) or any(x.is_complex() for x in _tensors(mean)):
                raise UnsupportedOperationError(f"{operation_name(func)} gives no real tensor to linearise; it needs a rule")
            signs = probes([m.shape for m in means], like.mean)
            deviations = [_deviation(x) for x in inputs]

            def derivative(*directions: Tensor) -> Any:
                tangents = tuple(s * d for s, d in zip(deviations, directions, strict=True))
                return torch.func.jvp(lambda *values: tuple(_real(call(*values))), means, tangents)[1]

            try:
                found = torch.func.vmap(derivative, chunk_size=MOST_PROBES)(*signs)
            except NotImplementedError as error:
                raise UnsupportedOperationError(
                    f"{operation_name(func)} has neither a rule nor a forward derivative to linearise it by; give it one with "
                    "@rvconvert.rule, or take it along each path: covariance='sampled'"
                ) from error
            variances = iter([each.square().mean(0) for each in found])
            return join(mean, _rebuilt(mean, variances), like)


def on_nodes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Mean and variance of ``func`` over antithetic nodes of its inputs, whose own backward the gradients take.

    The nodes' sizes are strata of a half-normal and their signs those of ``probes``: exact for a linear function of one
    element, as the reversal of a gradient is; close for an elementwise one; an estimate where elements are mixed.
    """
    inputs = unique(args, kwargs)
    like = inputs[0]

    def call(value: Callable[[RandomVariable], Tensor]) -> Any:
        return func(*substitute(args, value), **substitute(kwargs, value))

    with full_precision(like):
        sizes = _strata(like.mean)
        signs = probes([x.mean.shape for x in inputs], like.mean)
        steps = {
            id(x): [size * sign[k % len(sign)] * _deviation(x) for k, size in enumerate(sizes)]
            for x, sign in zip(inputs, signs, strict=True)
        }
        above = [call(lambda x, k=k: x.mean + steps[id(x)][k]) for k in range(PAIRS)]  # type: ignore[misc]
        below = [call(lambda x, k=k: x.mean - steps[id(x)][k]) for k in range(PAIRS)]  # type: ignore[misc]
        return _moments(call(lambda x: x.mean), above + below, like)


def _strata(like: Tensor) -> Tensor:
    """Equally likely sizes of a standard normal, of mean square 1."""
    middle = (torch.arange(PAIRS, dtype=torch.float64, device=like.device) + 0.5) / PAIRS
    sizes = torch.special.ndtri(0.5 + middle / 2)
    return (sizes / sizes.square().mean().sqrt()).to(like.dtype)


def _moments(at_mean: Any, found: list[Any], like: Any) -> Any:
    if isinstance(at_mean, Tensor):
        if not at_mean.is_floating_point():
            return at_mean
        values = torch.stack(found)
        return join(values.mean(0), values.var(0, correction=0), like)
    if isinstance(at_mean, (list, tuple)):
        return type(at_mean)(_moments(each, [f[i] for f in found], like) for i, each in enumerate(at_mean))
    return at_mean


def _deviation(x: RandomVariable) -> Tensor:
    """The standard deviation, with a finite gradient where it is 0."""
    random = x.var > 0
    return torch.where(random, torch.where(random, x.var, 1).sqrt(), 0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _real(value: Any) -> list[Tensor]:
    """The results that have a derivative; others, as pivots and error codes beside a factorization, are those of the means."""
    return [x for x in _tensors(value) if x.is_floating_point()]


def _rebuilt(like: Any, tensors: Any) -> Any:
    if isinstance(like, Tensor):
        return next(tensors) if like.is_floating_point() else like
    return [_rebuilt(each, tensors) for each in like] if isinstance(like, (list, tuple)) else like


LINEARIZED = Rule(
    "linearized",
    Linearized(),
    Exactness.APPROXIMATE,
    "no rule of its own: first order at the mean, derivatives along at most 64 probes",
)

ON_NODES = Rule(
    "nodes",
    on_nodes,
    Exactness.APPROXIMATE,
    "a function of autograd, over 16 nodes of its input taken as Gaussian; estimated where it mixes elements",
)

# What reads values into Python, gives no real tensor, or is no function of its arguments' values.
_REFUSED = frozenset(
    "item tolist numpy equal allclose is_nonzero nonzero nonzero_static unique unique_consecutive bincount histc "
    "all any argwhere searchsorted bucketize count_nonzero isin isclose long int short bool byte char "
    "cfloat cdouble chalf complex view_as_complex one_hot embedding embedding_bag "
    "bernoulli multinomial poisson rand_like randint_like randn_like rrelu_with_noise apply_ map_ map2_ backward "
    "register_hook data_ptr storage untyped_storage share_memory_ cauchy geometric random log_normal exponential "
    "fractional_max_pool2d fractional_max_pool3d to_sparse quantize_per_tensor fake_quantize_per_tensor_affine "
    "frexp median mode nanmedian quantile nanquantile cummax cummin".split()
)


@as_constant
def is_differentiable(func: Callable[..., Any]) -> bool:
    """True for a torch function that may be linearised: of tensors' values, to real tensors, writing nowhere."""
    name = getattr(func, "__name__", "")
    plain = out_of_place(func)
    writes = name.endswith("_") and not name.endswith("__") and plain is func
    reads = name.startswith(("__", "is", "to_", "fft", "rfft", "hfft", "stft")) or name in _REFUSED
    reads = reads or (getattr(func, "__module__", None) or "").startswith("torch.autograd")
    # What a library adds to torch has no forward derivative, which torch takes for one of 0.
    foreign = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and not str(func).startswith("aten")
    draws = DRAWS.get(func) is not None
    return not (writes or reads or draws or foreign) and torch.overrides.resolve_name(func) is not None


def chooser(func: Callable[..., Any]) -> Rule | None:
    """The rule of an in-place function's twin, else one that a function of any kind may have, else None."""
    owner = getattr(func, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return ON_NODES
    if not is_differentiable(func):
        return None
    return REGISTRY.find(out_of_place(func)) or LINEARIZED


REGISTRY.set_fallback(chooser)
