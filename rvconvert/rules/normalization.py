"""Normalization layers: the mixture law (paper eqs 10 and 11) over the axes that each layer normalizes."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import REGISTRY, Exactness, Rule
from rvconvert.moments.buffers import into_buffer
from rvconvert.moments.compilation import is_traced
from rvconvert.moments.normal import at_least_float32, gradients_with_graph
from rvconvert.rules.calls import bind, full_precision, own_python, recomputed
from rvconvert.rules.kinds import Composite, add_rule

if TYPE_CHECKING:
    from collections.abc import Callable


def _per_channel(x: Any, ndim: int) -> Any:
    """A vector of channels shaped to broadcast over (N, C, ...)."""
    return x if x is None else x.reshape(1, -1, *(1,) * (ndim - 2))


def _affine(x: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    """gain x + shift, each of which has an element for each channel of x."""
    gain, shift = _per_channel(gain, x.ndim), _per_channel(shift, x.ndim)
    if shift is None:
        return into_buffer(torch.mul, x, gain)
    return into_buffer(lambda x, gain, out: torch.addcmul(shift, x, gain, out=out), x, gain)


def update_running(
    running_mean: Tensor | None, running_var: Tensor | None, centre: Tensor, spread: Tensor, n: int | Tensor, momentum: float
) -> None:
    """Move the running buffers towards a batch's statistics of n elements a channel; unbiased, as torch does."""
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.data.lerp_(centre.detach().to(running_mean.dtype), momentum)
            running_var.data.lerp_((spread.detach() * n / max(n - 1, 1)).to(running_var.dtype), momentum)


def _with_affine(normalize: Callable[..., Any], *, channels: bool = True) -> Callable[..., Any]:
    """``normalize`` for weight and bias that may be random, as those that a style gives: it normalizes, they scale and shift.

    Args:
        normalize: of (input, ..., weight, bias, ...), either with None.
        channels: weight and bias have an element for each channel, not for each of the last dimensions.
    """
    signature = inspect.signature(normalize)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not random_variables(args[1:], kwargs):
            return normalize(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        found = [given.get("weight"), given.get("bias")]
        random = random_variables(found)
        if not random:
            return normalize(*args, **kwargs)
        x = given["input"]
        if not isinstance(x, RandomVariable):
            x = random[0].with_moments(x, torch.zeros_like(x))
        out = normalize(**{**given, "input": x} | {name: None for name in ("weight", "bias") if name in given})
        weight, bias = (_per_channel(each, x.ndim) for each in found) if channels else found
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    return call


def batch_norm_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Input, running mean and variance, weight, bias, training, momentum and eps of a call of ``F.batch_norm``."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    (*rest, momentum, eps), _, _ = bind(names, args, kwargs)
    return [*rest, 0.1 if momentum is None else momentum, 1e-5 if eps is None else eps]


def _mean_and_var(x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, axes, correction=0)
    return mean, var


class _Batch(NamedTuple):
    """What ``_NormalizedBatch`` keeps: the mixture, and of each channel its statistics, scale = 1/sqrt(spread + eps)."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    centre: Tensor
    spread: Tensor
    scale: Tensor

    @property
    def gain(self) -> Tensor:
        return self.scale if self.weight is None else self.scale * self.weight

    def normalized_mean(self, eps: float) -> Tensor:
        if not self.mean.is_cpu:
            return torch.native_batch_norm(self.mean, self.weight, self.bias, self.centre, self.spread, False, 0.0, eps)[0]
        shift = torch.zeros_like(self.centre) if self.bias is None else self.bias
        return _affine(self.mean, self.gain, torch.addcmul(shift, self.centre, self.gain, value=-1))  # as torch's kernel has it

    def normalized_var(self, eps: float) -> Tensor:
        return _affine(self.var, self.gain.square())


@torch.no_grad()
def _again(moment: Callable[[_Batch, float], Tensor], node: Any) -> Tensor:
    """A moment of ``_NormalizedBatch`` from what it saved."""
    return moment(_Batch(*node.saved_tensors), node.eps)


class _NormalizedBatch(torch.autograd.Function):
    """BatchNorm's moments in training by torch's own kernels: one pass for the statistics, one for the result.

    Given the mixture's statistics, the mean passes as a plain batch does in eval mode, and the variance by the squared
    scale. Saves (mean, var), where composed operations would save five tensors of their size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mean: Tensor,
        var: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        axes = [0, *range(2, mean.ndim)]
        # On CPU three times as fast as torch.var_mean; both find the mean first, so neither cancels.
        centre, spread = torch.batch_norm_update_stats(mean, None, None, 0.0) if mean.is_cpu else _mean_and_var(mean, axes)
        spread = spread + var.mean(axes)
        update_running(running_mean, running_var, centre, spread, mean.numel() // mean.shape[1], momentum)
        scale = torch.rsqrt(spread + eps)
        batch = _Batch(mean, var, weight, bias, centre, spread, scale)
        ctx.save_for_backward(*batch)
        ctx.eps = eps
        return batch.normalized_mean(eps), batch.normalized_var(eps)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        batch = _Batch(*ctx.saved_tensors)
        mean, var, weight, bias, centre, spread, scale = batch
        if torch.is_grad_enabled():
            return _twice_differentiable(ctx.eps, mean, var, weight, bias, grad_mean, grad_var)
        ndim, n = mean.ndim, mean.numel() // mean.shape[1]
        sums = torch.ops.aten.native_batch_norm_backward
        # Over each channel: of grad_mean (x - centre) scale, of grad_mean, and of grad_var var, which a BatchNorm of centre 0 and
        # scale 1 has as its weight's gradient.
        _, by_weight, by_bias = sums(grad_mean, mean, weight, None, None, centre, scale, True, ctx.eps, [False, True, True])
        zero, one = torch.zeros_like(centre), torch.ones_like(spread)
        _, of_var, _ = sums(grad_var, var, one, zero, one, None, None, False, 0.0, [False, True, False])
        gain = batch.gain
        by_spread = -(gain * scale).square() * of_var / n - 0.5 * by_weight * gain * scale / n
        # By the mean: gain (grad_mean - by_bias/n) + 2 by_spread (x - centre).
        shift = torch.addcmul(-gain * by_bias / n, by_spread, centre, value=-2)
        by_mean = _affine(mean, 2 * by_spread, shift).addcmul_(grad_mean, _per_channel(gain, ndim))
        by_var = _affine(grad_var, gain.square(), by_spread)
        by_weight = by_weight + 2 * gain * scale * of_var if weight is not None else None
        return by_mean, by_var, None, None, by_weight, None if bias is None else by_bias, None, None


def _twice_differentiable(
    eps: float, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *grads: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients by composed operations, for a graph of the backward pass (``create_graph=True``)."""
    axes = [0, *range(2, mean.ndim)]

    def normalized(mean: Tensor, var: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        centre = mean.mean(axes, keepdim=True)
        spread = (mean - centre).square().mean(axes, keepdim=True) + var.mean(axes, keepdim=True)
        scale = torch.rsqrt(spread + eps)
        gain = scale if weight is None else scale * _per_channel(weight, mean.ndim)
        return (mean - centre) * gain, var * gain.square()

    by_mean, by_var, by_weight = gradients_with_graph(normalized, (mean, var, weight), grads)
    by_bias = None if bias is None else grads[0].sum(axes)
    return by_mean, by_var, None, None, by_weight, by_bias, None, None


@at_least_float32
def _normalized_batch(mean: Tensor, var: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """``_NormalizedBatch`` with weight and bias in the moments' dtype."""
    running_mean, running_var, weight, bias, momentum, eps = rest
    weight, bias = (x if x is None else x.to(mean.dtype) for x in (weight, bias))
    return _NormalizedBatch.apply(mean, var, running_mean, running_var, weight, bias, momentum, eps)  # type: ignore[no-any-return]


def _normalized_over_the_batch(
    input: RandomVariable, mean: Any, var: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> RandomVariable:
    """BatchNorm with weight and bias that are not random."""
    x = input
    with full_precision(x):
        if not training and mean is not None and var is not None:
            scale = torch.rsqrt(var + eps)
            if not torch.is_grad_enabled() and not is_traced():
                batch = _Batch(x.mean, x.var, weight, bias, mean, var, scale)
                return x.with_moments(batch.normalized_mean(eps), batch.normalized_var(eps))
            scale = scale if weight is None else scale * weight
            out = F.batch_norm(x.mean, mean, var, weight, bias, False, momentum, eps)
            return x.with_moments(out, x.var * _per_channel(scale.square(), x.ndim))
        if not torch.compiler.is_compiling():
            out, out_var = _normalized_batch(x.mean, x.var, mean, var, weight, bias, momentum, eps)
            made = x.with_moments(out, out_var)
            if isinstance(out.grad_fn, BackwardCFunction) and not is_traced():  # not so where half precision was rounded back
                made.remade(*(partial(_again, moment, out.grad_fn) for moment in (_Batch.normalized_mean, _Batch.normalized_var)))
            return made
        axes = [0, *range(2, x.ndim)]
        centre = x.mean.mean(axes, keepdim=True)
        spread = (x.mean - centre).square().mean(axes, keepdim=True) + x.var.mean(axes, keepdim=True)
        update_running(mean, var, centre.flatten(), spread.flatten(), x.mean.numel() // x.shape[1], momentum)
        scale = torch.rsqrt(spread + eps)
        scale = scale if weight is None else scale * _per_channel(weight, x.ndim)
        out, shift = (x.mean - centre) * scale, _per_channel(bias, x.ndim)
        return x.with_moments(out if shift is None else out + shift, x.var * scale.square())


_batch_norm = _with_affine(_normalized_over_the_batch)


@dataclass(frozen=True)
class BatchNormalization:
    """BatchNorm. Training: the batch is a mixture, mean = mean(m), var = mean((m - mean)^2) + mean(v)."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        return _batch_norm(*batch_norm_arguments(args, kwargs))  # type: ignore[no-any-return]


_MIXTURE = "exact in eval mode; in training the batch is a mixture, its statistics taken as constants (paper eqs 10, 11)"
add_rule(
    "batch_norm",
    BatchNormalization(),
    Exactness.APPROXIMATE,
    _MIXTURE,
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce, forward and backward: every process's loss depends on the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        torch.distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def _synchronized(module: nn.SyncBatchNorm, x: RandomVariable) -> RandomVariable:
    """SyncBatchNorm: the mixture is that of the batches of all processes. Runs on any backend, gloo too."""
    training = module.training or module.running_mean is None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    group = (module.process_group or torch.distributed.group.WORLD) if distributed else None
    if not training or group is None or torch.distributed.get_world_size(group) == 1:
        return nn.BatchNorm1d.forward(module, x)  # type: ignore[arg-type, return-value]
    momentum = module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        momentum = 1.0 / float(module.num_batches_tracked) if momentum is None else momentum
    with full_precision(x):
        axes = [0, *range(2, x.ndim)]
        local = x.mean.numel() // x.shape[1]
        total = _SumOverProcesses.apply(torch.cat([x.mean.sum(axes), x.mean.new_tensor([local])]), group)
        n = total[-1].detach()
        centre = total[:-1] / n
        centred = x.mean - _per_channel(centre, x.ndim)
        spread = _SumOverProcesses.apply((centred.square() + x.var).sum(axes), group) / n
        if module.training and module.track_running_stats:
            update_running(module.running_mean, module.running_var, centre, spread, n, momentum or 0.0)
        scale = torch.rsqrt(spread + module.eps)
        mean, var = centred * _per_channel(scale, x.ndim), x.var * _per_channel(scale.square(), x.ndim)
        return _scaled(x, mean, var, _per_channel(module.weight, x.ndim), _per_channel(module.bias, x.ndim))


REGISTRY.register(
    Rule(
        "sync_batch_norm",
        BatchNormalization(),
        Exactness.APPROXIMATE,
        _MIXTURE + "; of all processes",
        modules=(nn.SyncBatchNorm,),
        body=_synchronized,
    ),
    (),
)


# ---- normalization of each sample ----------------------------------------------------------------------------------

# Elements up to which the statistics' own variance counts. An element c deviations from the mean has its variance
# off by 2 c^2/n without it: at n = 24 by a factor of up to 5 against Monte Carlo, at n = 256 by some per cent.
_FEW = 256


def standardized(mean: Tensor, var: Tensor, axes: tuple[int, ...], eps: float, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Moments of c / sqrt(s^2 + eps) over ``axes``, with s^2 at its expectation S = var(m) + (1 - 1/n) mean(v).

    c is x less its mean over the axes, or x itself (RMSNorm) where ``centred`` is False. For n <= 256 the
    second-order terms of the ratio are added (delta method).
    """
    n = math.prod([mean.shape[a] for a in axes])
    share = 1 / n if centred else 0.0  # of every element in each c
    centre = mean - mean.mean(axes, keepdim=True) if centred else mean
    total = centre.square().mean(axes, keepdim=True) + (1 - share) * var.mean(axes, keepdim=True) + eps
    # In units of the root of S, whose powers would overflow where all but eps is 0.
    scale = torch.rsqrt(total)
    c, v = centre * scale, var * scale.square()
    if not 1 < n <= _FEW:
        return c, v * (1 - 2 * share) + share * v.mean(axes, keepdim=True)
    # s^2 = mean(c^2): Cov(c_i, s^2) = 2 c_i v_i / n and Var(s^2) = mean(4 c^2 v + 2 v^2) / n, to first order.
    square = c * c
    total = (square * v).sum(axes, keepdim=True)
    var_total = (4 * total + 2 * v.square().sum(axes, keepdim=True)) / n**2
    out = c * torch.sub(1 + 0.375 * var_total, v, alpha=1 / n)
    # Variance through the Jacobian d_ij - share - c_i c_j / n.
    spread = torch.addcmul(
        torch.add(share * v.mean(axes, keepdim=True), v, alpha=1 - 2 * share),
        square,
        torch.sub(total / n**2, v, alpha=2 / n),
    )
    if centred:
        spread = torch.addcmul(spread, c, (v * c).sum(axes, keepdim=True), value=2 / n**2)
    # A sum of squares, which is 0 where all other elements are alike; expanded, it rounds to either side of 0 there.
    return out, spread.clamp(min=0.0)


def _with_gain(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    if weight is not None:
        mean, var = mean * weight, var * weight.square()
    return mean if bias is None else mean + bias, var


def _scaled(x: RandomVariable, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> RandomVariable:
    return x.with_moments(*_with_gain(mean, var, weight, bias))


def _standardized_and_scaled(
    x: RandomVariable, axes: tuple[int, ...], eps: float, centred: bool, weight: Tensor | None, bias: Tensor | None
) -> RandomVariable:
    def function(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return _with_gain(*standardized(mean, var, axes, eps, centred), weight, bias)

    with full_precision(x):
        return x.with_moments(*recomputed(function, x.mean, x.var))


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Any:
    return _standardized_and_scaled(input, tuple(range(-len(normalized_shape), 0)), eps, True, weight, bias)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _standardized_and_scaled(input, tuple(range(-len(normalized_shape), 0)), eps, False, weight, None)


def _standardized_groups(mean: Tensor, var: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    # A view in any memory order, where reshape would copy.
    grouped, grouped_var = (x.unflatten(1, (groups, -1)) for x in (mean, var))
    mean, var = standardized(grouped, grouped_var, tuple(range(2, mean.ndim + 1)), eps)
    return mean.flatten(1, 2), var.flatten(1, 2)


class _NormalizedGroups(torch.autograd.Function):
    """GroupNorm of groups of n > 256 elements, in few passes over memory, in any order of it; saves (mean, var)."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor]:
        over = _Groups(mean, groups)
        centre, level = over.mean(over.sums(mean)), over.mean(over.sums(var)) / over.n
        centred = into_buffer(torch.sub, mean, over.spread(centre))
        # Of each c, v (1 - 2/n) + level; their mean is (1 - 1/n) mean(v).
        scale = torch.rsqrt(over.mean(over.products(centred, centred)) + level * (over.n - 1) + eps)
        gain = over.each(scale) if weight is None else over.each(scale) * weight
        gain2 = gain * gain
        ctx.save_for_backward(mean, var, weight, bias, centre, level, scale)
        ctx.over, ctx.eps = over, eps
        out = centred.mul_(over.broadcast(gain))
        if bias is not None:
            out += over.broadcast(bias)
        out_var = into_buffer(torch.mul, var, over.broadcast(gain2 * (1 - 2 / over.n)))
        return out, out_var.add_(over.broadcast(gain2 * over.each(level)))

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight, bias, centre, level, scale = ctx.saved_tensors
        over = ctx.over
        if torch.is_grad_enabled():  # for a graph of the backward pass (create_graph=True)

            def normalized(mean: Tensor, var: Tensor, *affine: Tensor | None) -> tuple[Tensor, ...]:
                shaped = [_per_channel(x, mean.ndim) for x in affine]
                return _with_gain(*_standardized_groups(mean, var, over.groups, ctx.eps), *shaped)

            return *gradients_with_graph(normalized, (mean, var, weight, bias), (grad_mean, grad_var)), None, None
        n, one = over.n, scale.new_ones(()) if weight is None else weight
        centred = into_buffer(torch.sub, mean, over.spread(centre))
        # Sums over the positions of each channel: the gradients, and these times what they are gradients of.
        of_mean, of_centred, of_var = over.sums(grad_mean), over.products(grad_mean, centred), over.sums(grad_var)
        of_own = over.products(grad_var, var) * (1 - 2 / n) + of_var * over.each(level)
        scale2 = scale * scale
        by_spread = -scale2 * (0.5 * scale * over.total(of_centred * one) + scale2 * over.total(of_own * one * one))
        gain = over.each(scale) * one
        by_mean = centred.mul_(over.spread(by_spread * (2 / n))).addcmul_(grad_mean, over.broadcast(gain))
        by_mean -= over.spread(scale * over.total(of_mean * one) / n)
        by_var = into_buffer(torch.mul, grad_var, over.broadcast(gain * gain * (1 - 2 / n)))
        total = scale2 * over.total(of_var * one * one) + by_spread
        by_var += over.spread(by_spread * ((1 - 2 / n) / n) + total / n**2)
        by_weight = None if weight is None else (over.each(scale) * (of_centred + 2 * gain * of_own)).sum(0)
        return by_mean, by_var, by_weight, None if bias is None else of_mean.sum(0), None, None


class _Groups:
    """Sums and broadcasts over groups of the channels of tensors (N, C, ...)."""

    def __init__(self, like: Tensor, groups: int) -> None:
        self.groups, self.ndim = groups, like.ndim
        self.n = like[0].numel() // groups  # elements of a group
        self.width = like.shape[1] // groups

    def sums(self, x: Tensor) -> Tensor:
        """(N, C) over positions."""
        return x.sum(tuple(range(2, self.ndim))) if self.ndim > 2 else x

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """(N, C) of products over positions."""
        return self.sums(into_buffer(torch.mul, x, y))

    def total(self, x: Tensor) -> Tensor:
        """(N, groups) of (N, C)."""
        return x.unflatten(1, (self.groups, -1)).sum(2)

    def mean(self, x: Tensor) -> Tensor:
        """(N, groups) of the sums over positions."""
        return self.total(x) / self.n

    def each(self, x: Tensor) -> Tensor:
        """(N, C) of (N, groups)."""
        return x.repeat_interleave(self.width, 1)

    def broadcast(self, x: Tensor) -> Tensor:
        """(N, C) or (C,) against (N, C, ...)."""
        return x.reshape(-1, x.shape[-1], *(1,) * (self.ndim - 2))

    def spread(self, x: Tensor) -> Tensor:
        """(N, groups) against (N, C, ...)."""
        return self.broadcast(self.each(x))


def _by_groups(x: RandomVariable, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> RandomVariable:
    if x.mean.numel() > _FEW * len(x) * groups and not torch.compiler.is_compiling():
        return x.with_moments(*_NormalizedGroups.apply(x.mean, x.var, weight, bias, groups, eps))
    standard = _standardized_groups(x.mean, x.var, groups, eps)
    return _scaled(x, *standard, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim))


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    with full_precision(input):
        return _by_groups(input, num_groups, weight, bias, eps)


def _instance_norm(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """Over the positions of each channel; with running statistics in use, an affine map."""
    x = input
    with full_precision(x):
        if not use_input_stats:
            scale = torch.rsqrt(_per_channel(running_var, x.ndim) + eps)
            mean, var = (x.mean - _per_channel(running_mean, x.ndim)) * scale, x.var * scale.square()
            return _scaled(x, mean, var, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim))
        if running_mean is not None:
            axes, n = tuple(range(2, x.ndim)), math.prod(x.shape[2:])
            with torch.no_grad():
                centre = x.mean.mean(axes, keepdim=True)
                spread = (x.mean - centre).square().mean(axes) + (1 - 1 / n) * x.var.mean(axes)
                running_mean.lerp_(centre.flatten(1).mean(0).to(running_mean.dtype), momentum)
                running_var.lerp_((spread.mean(0) * n / max(n - 1, 1)).to(running_var.dtype), momentum)
        return _by_groups(x, x.shape[1], weight, bias, eps)


_SAMPLE = "elements are independent; the sample's variance is taken at its expectation (second order for n <= 256)"
for _name, _body, _channels, _modules in (
    ("layer_norm", _layer_norm, False, (nn.LayerNorm,)),
    ("rms_norm", _rms_norm, False, (nn.RMSNorm,)),
    ("group_norm", _group_norm, True, (nn.GroupNorm,)),
    ("instance_norm", _instance_norm, True, (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)),
):
    add_rule(_name, Composite(_with_affine(_body, channels=_channels)), Exactness.APPROXIMATE, _SAMPLE, modules=_modules)
add_rule(
    "local_response_norm",
    Composite(own_python(F.local_response_norm)),
    Exactness.APPROXIMATE,
    "elements are independent; the divisor is independent of the element and lognormal",
    modules=(nn.LocalResponseNorm,),
)
