"""The declared fallback: a differentiable function without a rule of its own, linearised at the means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.overrides
from torch import Tensor

from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import REGISTRY, Exactness, Rule, as_constant, operation_name
from rvconvert.errors import UnsupportedOperationError
from rvconvert.rules.draws import DRAWS
from rvconvert.rules.kinds import full_precision, join, out_of_place, substitute, unique

__all__ = ["LINEARIZED", "Linearized", "chooser", "probes"]

MOST_PROBES = 64


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
            results = _tensors(mean)
            if not results or any(not x.is_floating_point() for x in results):
                raise UnsupportedOperationError(f"{operation_name(func)} gives no real tensor to linearise; it needs a rule")
            signs = probes([m.shape for m in means], like.mean)
            deviations = [_deviation(x) for x in inputs]

            def derivative(*directions: Tensor) -> Any:
                tangents = tuple(s * d for s, d in zip(deviations, directions, strict=True))
                return tuple(_tensors(torch.func.jvp(call, means, tangents)[1]))

            try:
                found = torch.func.vmap(derivative, chunk_size=MOST_PROBES)(*signs)
            except NotImplementedError as error:
                raise UnsupportedOperationError(
                    f"{operation_name(func)} has neither a rule nor a forward derivative to linearise it by"
                ) from error
            variances = iter([each.square().mean(0) for each in found])
            return join(mean, _rebuilt(mean, variances), like)


def _deviation(x: RandomVariable) -> Tensor:
    """The standard deviation, with a finite gradient where it is 0."""
    random = x.var > 0
    return torch.where(random, torch.where(random, x.var, 1).sqrt(), 0)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _rebuilt(like: Any, tensors: Any) -> Any:
    if isinstance(like, Tensor):
        return next(tensors)
    return [_rebuilt(each, tensors) for each in like] if isinstance(like, (list, tuple)) else like


LINEARIZED = Rule(
    "linearized",
    Linearized(),
    Exactness.APPROXIMATE,
    "no rule of its own: first order at the mean, derivatives along at most 64 probes",
)

# What reads values into Python, gives no real tensor, or is no function of its arguments' values.
_REFUSED = frozenset(
    "item tolist numpy equal allclose is_nonzero nonzero nonzero_static unique unique_consecutive bincount histc "
    "all any argwhere searchsorted bucketize count_nonzero isin isclose long int short bool byte char "
    "cfloat cdouble chalf complex view_as_complex one_hot embedding embedding_bag "
    "bernoulli multinomial poisson rand_like randint_like randn_like rrelu_with_noise apply_ map_ map2_ backward "
    "register_hook data_ptr storage untyped_storage share_memory_ cauchy geometric random log_normal exponential "
    "fractional_max_pool2d fractional_max_pool3d to_sparse quantize_per_tensor fake_quantize_per_tensor_affine "
    "median mode nanmedian quantile nanquantile cummax cummin".split()
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
    """The rule of an in-place function's twin, else the linearised rule for a function that may have it, else None."""
    if not is_differentiable(func):
        return None
    return REGISTRY.find(out_of_place(func)) or LINEARIZED


REGISTRY.set_fallback(chooser)
