"""Pooling: averages are linear maps; maxima are taken pairwise (Clark 1961)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.random_variable import RandomVariable
from rvconvert.registry import Exactness
from rvconvert.rules.kinds import Composite, FixedLinear, add_rule, bind
from rvconvert.rules.reduction import tournament

_INDEPENDENT = "elements are independent"
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) if len(value) == n else tuple(value) * n


def _average_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Each output is w sum(x): its variance w^2 sum(v), with w and the sum over ones from the pool itself."""
    values, _, _ = bind(_POOL, args, kwargs)
    var = values[0]
    count = torch.ones_like(var[:1, :1])
    weight = func(count, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    n = 1 if func in (F.avg_pool1d, torch.avg_pool1d) else 2 if func is F.avg_pool2d else 3
    options = dict(zip(_POOL[1:5], values[1:5], strict=True))
    options = {k: v for k, v in options.items() if v is not None}
    if n == 1:  # avg_pool1d has no divisor_override
        var, count = var.unsqueeze(-2), count.unsqueeze(-2)
        for name, other in (("kernel_size", 1), ("stride", 1), ("padding", 0)):
            if name in options:
                options[name] = (other, *_tuple(options[name], 1))
        if "stride" not in options:
            options["stride"] = options["kernel_size"]
        total = [F.avg_pool2d(x, **options, divisor_override=1).squeeze(-2) for x in (var, count)]
    else:
        pool = F.avg_pool2d if n == 2 else F.avg_pool3d
        total = [pool(x, **options, divisor_override=1) for x in (var, count)]
    return total[0] * (weight / total[1]).square()


def _adaptive_average_square(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The window of output i is [floor(i n/m), ceil((i+1) n/m)): an average of its elements."""
    (var, size), _, _ = bind(("input", "output_size"), args, kwargs)
    n = 1 if "1d" in func.__name__ else 2 if "2d" in func.__name__ else 3
    sizes = _tuple(size, n)
    out = func(*args, **kwargs)
    for axis, target in zip(range(-n, 0), sizes, strict=True):
        length = var.shape[axis]
        target = length if target is None else target
        window = torch.tensor(
            [-(-(i + 1) * length // target) - i * length // target for i in range(target)], dtype=var.dtype, device=var.device
        )
        out = out / window.reshape(-1, *(1,) * (-axis - 1))
    return out


for _n, _average, _adaptive in (
    (1, nn.AvgPool1d, nn.AdaptiveAvgPool1d),
    (2, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    (3, nn.AvgPool3d, nn.AdaptiveAvgPool3d),
):
    add_rule(
        f"avg_pool{_n}d", FixedLinear(_average_square), Exactness.EXACT_IF_INDEPENDENT, _INDEPENDENT, modules=(_average,)
    )
    add_rule(
        f"adaptive_avg_pool{_n}d",
        FixedLinear(_adaptive_average_square),
        Exactness.EXACT_IF_INDEPENDENT,
        _INDEPENDENT,
        modules=(_adaptive,),
    )


def _windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], value: float, ceil_mode: bool) -> Tensor:
    """(N, C, *out, kernel elements): the elements of each pooling window."""
    pads: list[int] = []
    for axis in range(len(kernel) - 1, -1, -1):
        span = dilation[axis] * (kernel[axis] - 1) + 1
        length = x.shape[axis - len(kernel)] + 2 * padding[axis]
        extra = 0
        if ceil_mode and (length - span) % stride[axis]:
            extra = stride[axis] - (length - span) % stride[axis]
            if length + extra - span >= x.shape[axis - len(kernel)] + padding[axis]:
                extra = 0  # torch drops a window that would start in the right padding
        pads += [padding[axis], padding[axis] + extra]
    x = F.pad(x, pads, value=value)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    return x.flatten(-len(kernel))


def _max_pool(n: int) -> Any:
    def pool(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Any:
        kernel = _tuple(kernel_size, n)
        strides = kernel if stride is None or stride == [] else _tuple(stride, n)
        shape = (kernel, strides, _tuple(padding, n), _tuple(dilation, n))
        # Padding never wins: far below every element, yet finite, so that moments stay finite.
        floor = (input.mean.detach() - 12 * input.var.detach().sqrt()).amin() - 1 if any(shape[2]) or ceil_mode else input.mean.new_zeros(())
        mean = _windows(input.mean - floor, *shape, 0.0, ceil_mode)
        var = _windows(input.var, *shape, 0.0, ceil_mode)
        mean, var = tournament(mean, var, (-1,))
        return input.with_moments(mean.squeeze(-1) + floor, var.squeeze(-1))

    return pool


def _adaptive_max_pool(n: int) -> Any:
    def pool(input: Any, output_size: Any, return_indices: bool = False) -> Any:
        for axis, target in zip(range(-n, 0), _tuple(output_size, n), strict=True):
            length = input.shape[axis]
            target = length if target is None else target
            parts = [
                torch.amax(torch.narrow(input, axis, i * length // target, -(-(i + 1) * length // target) - i * length // target), axis, keepdim=True)
                for i in range(target)
            ]
            input = torch.cat(parts, axis)
        return input

    return pool


_CLARK = "Gaussian, independent elements; each pair's maximum is taken as Gaussian again (Clark 1961)"
for _n, _max, _adaptive_max in (
    (1, nn.MaxPool1d, nn.AdaptiveMaxPool1d),
    (2, nn.MaxPool2d, nn.AdaptiveMaxPool2d),
    (3, nn.MaxPool3d, nn.AdaptiveMaxPool3d),
):
    add_rule(f"max_pool{_n}d", Composite(_max_pool(_n)), Exactness.APPROXIMATE, _CLARK, modules=(_max,))
    add_rule(
        f"adaptive_max_pool{_n}d", Composite(_adaptive_max_pool(_n)), Exactness.APPROXIMATE, _CLARK, modules=(_adaptive_max,)
    )


def _lp_pool(n: int) -> Any:
    average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[n]

    def pool(input: RandomVariable, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False) -> Any:
        size = 1
        for k in _tuple(kernel_size, n):
            size *= k
        return (average(input**norm_type, kernel_size, stride, 0, ceil_mode) * size) ** (1 / norm_type)

    return pool


for _n in (1, 2):
    add_rule(f"lp_pool{_n}d", Composite(_lp_pool(_n)), Exactness.APPROXIMATE, "the sum of powers is Gaussian")
