"""Pooling: averages are linear maps; maxima are taken pairwise (Clark 1961)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.core.registry import Exactness
from rvconvert.rules.calls import bind
from rvconvert.rules.extrema import by_pairs, clark_maximum, maximum_over
from rvconvert.rules.kinds import Composite, FixedLinear, Shape, add_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

_INDEPENDENT = "elements are independent"
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n


def _average_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Each output is w sum(x): its variance w^2 sum(v), with w and the sum over ones from the pool itself."""
    (var, *shape, include, divisor), _, _ = bind(_POOL, args, kwargs)
    n = int(func.__name__[-2])
    average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[n]
    options: dict[str, Any] = {k: v for k, v in zip(_POOL[1:5], shape, strict=True) if v is not None}
    ones = var.new_ones(1, 1, *var.shape[-n:])
    # Counting the padding, every window of avg_pool1d divides by its size (but for one that ceil_mode cuts).
    extra = {} if divisor is None else {"divisor_override": divisor}
    weight = average(ones, **options, count_include_pad=include is not False, **extra)
    count, total = _window_sums(ones, n, options), _window_sums(var, n, options)
    return total * (weight / count).square().reshape(weight.shape[-n:])


def _window_sums(x: Tensor, n: int, options: dict[str, Any]) -> Tensor:
    """The sum of each pooling window; in one dimension as a row of two, for a divisor can be given there."""
    if n > 1:
        return (F.avg_pool2d if n == 2 else F.avg_pool3d)(x, **options, divisor_override=1)
    neutral = {"kernel_size": 1, "stride": 1, "padding": 0}
    rows: dict[str, Any] = {k: (neutral[k], *_tuple(v, 1)) if k in neutral else v for k, v in options.items()}
    return F.avg_pool2d(x.unsqueeze(-2), **rows, divisor_override=1).squeeze(-2)


def adaptive_average_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The window of output i is [floor(i n/m), ceil((i+1) n/m)): an average of its elements."""
    (var, size), _, _ = bind(("input", "output_size"), args, kwargs)
    n = int(func.__name__[-2])
    out = func(*args, **kwargs)
    for axis, target in zip(range(-n, 0), _tuple(size, n), strict=True):
        window = torch.tensor([b - a for a, b in _adaptive_ends(var.shape[axis], target)], dtype=var.dtype, device=var.device)
        out = out / window.reshape(-1, *(1,) * (-axis - 1))
    return out


def _adaptive_ends(length: int, target: int | None) -> list[tuple[int, int]]:
    """Where each window of adaptive pooling begins and ends: [floor(i n/m), ceil((i+1) n/m))."""
    target = length if target is None else target
    return [(i * length // target, -(-(i + 1) * length // target)) for i in range(target)]


for _n, _average, _adaptive in (
    (1, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    (2, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    (3, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
):
    add_rule(f"avg_pool{_n}d", FixedLinear(_average_square), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(_average,))
    add_rule(
        f"adaptive_avg_pool{_n}d",
        FixedLinear(adaptive_average_square),
        Exactness.EXACT_IF_INDEPENDENT,
        _INDEPENDENT,
        modules=(_adaptive,),
    )


def _windows(x: Tensor, shape: Sequence[tuple[int, ...]], ceil_mode: bool, value: float) -> Tensor:
    """(..., *out, kernel elements): the elements of each pooling window, ``value`` where it is padded."""
    pads: list[int] = []
    dims = len(shape[0])
    for axis, (k, s, p, d) in reversed(list(enumerate(zip(*shape, strict=True)))):
        size, span = x.shape[axis - dims], d * (k - 1) + 1
        left_over = (size + 2 * p - span) % s
        extra = s - left_over if ceil_mode and left_over else 0
        if (size + 2 * p + extra - span) // s * s >= size + p:
            extra = 0  # torch drops a window that would start in the right padding
        pads += [p, p + extra]
    x = F.pad(x, pads, value=value)
    for k, s, _, d in zip(*shape, strict=True):  # each unfolding moves the next axis to the same place
        x = x.unfold(-dims, d * (k - 1) + 1, s)[..., ::d]
    return x.flatten(-dims)


def _max_pool(n: int) -> Any:
    indexed = {1: F.max_pool1d_with_indices, 2: F.max_pool2d_with_indices, 3: F.max_pool3d_with_indices}[n]

    def pool(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        kernel = _tuple(kernel_size, n)
        shape = (kernel, _tuple(stride, n) if stride else kernel, _tuple(padding, n), _tuple(dilation, n))
        floor: Any = 0.0  # where nothing is padded: the digits of all stay, however low one of them is
        if any(shape[2]) or ceil_mode:  # padding must never win, yet is finite: it lies far below every element of its channel
            floor = (input.mean - 12 * input.var.sqrt()).detach().amin(tuple(range(-n, 0)), keepdim=True) - 1
        mean = _windows(input.mean - floor, shape, ceil_mode, 0.0)
        var = _windows(input.var, shape, ceil_mode, 0.0)
        mean, var = by_pairs(mean, var, (-1,), clark_maximum)
        out = input.with_moments(mean.squeeze(-1) + floor, var.squeeze(-1))
        if not return_indices:
            return out
        return out, indexed(input.mean, kernel_size, stride, padding, dilation, ceil_mode)[1]

    return pool


def _adaptive_max_pool(n: int) -> Any:
    indexed = (F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices)[n - 1]

    def pool(input: Any, output_size: Any, return_indices: bool = False) -> Any:
        x = input
        for axis, target in zip(range(-n, 0), _tuple(output_size, n), strict=True):
            ends = _adaptive_ends(x.shape[axis], target)
            parts: list[Any] = [maximum_over(torch.narrow(x, axis, a, b - a), axis, keepdim=True) for a, b in ends]
            x = torch.cat(parts, axis)
        return (x, indexed(input.mean, output_size)[1]) if return_indices else x

    return pool


def _with_indices(body: Any) -> Any:
    def pool(*args: Any, **kwargs: Any) -> Any:
        return body(*args, **{**kwargs, "return_indices": True})

    return pool


_CLARK = "Gaussian, independent elements; each pair's maximum is taken as Gaussian again (Clark 1961)"
for _n, _max, _adaptive_max in (
    (1, nn.MaxPool1d, nn.AdaptiveMaxPool1d),
    (2, nn.MaxPool2d, nn.AdaptiveMaxPool2d),
    (3, nn.MaxPool3d, nn.AdaptiveMaxPool3d),
):
    for _name, _pool, _module in (
        (f"max_pool{_n}d", _max_pool(_n), _max),
        (f"adaptive_max_pool{_n}d", _adaptive_max_pool(_n), _adaptive_max),
    ):
        add_rule(_name, Composite(_pool), Exactness.APPROXIMATE, _CLARK, modules=(_module,))
        add_rule(f"{_name}_with_indices", Composite(_with_indices(_pool)), Exactness.APPROXIMATE, _CLARK)
for _n, _unpool in ((1, nn.MaxUnpool1d), (2, nn.MaxUnpool2d), (3, nn.MaxUnpool3d)):
    add_rule(f"max_unpool{_n}d", Shape(), Exactness.EXACT, "the indices are constant", modules=(_unpool,))


def _lp_pool(n: int) -> Any:
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[n - 1]

    def pool(input: Any, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Any:
        size = math.prod(_tuple(kernel_size, n))
        return (average(input**norm_type, kernel_size, stride, 0, ceil_mode) * size) ** (1 / norm_type)

    return pool


for _n, _lp in ((1, nn.LPPool1d), (2, nn.LPPool2d), (3, nn.LPPool3d)):
    add_rule(
        f"lp_pool{_n}d",
        Composite(_lp_pool(_n)),
        Exactness.APPROXIMATE,
        "elements are independent; the sum of powers is positive and lognormal",
        modules=(_lp,),
    )
