"""Normalization layers: the mixture law (paper eqs 10 and 11) over the axes that each layer normalizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from rvconvert.random_variable import RandomVariable, random_variables
from rvconvert.registry import Exactness
from rvconvert.rules.kinds import add_rule, bind, full_precision


def _per_channel(x: Tensor | None, ndim: int) -> Tensor | None:
    """A vector of channels shaped to broadcast over (N, C, ...)."""
    return x if x is None else x.reshape(1, -1, *(1,) * (ndim - 2))


@dataclass(frozen=True)
class BatchNormalization:
    """BatchNorm. Training: the batch is a mixture, mean = mean(m), var = mean((m - mean)^2) + mean(v)."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        (x, mean, var, weight, bias, training, momentum, eps), _, _ = bind(
            ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), args, kwargs
        )
        with full_precision(x):
            centre, scale = self.statistics(
                x, mean, var, weight, bool(training), 0.1 if momentum is None else momentum, 1e-5 if eps is None else eps
            )
            out = (x.mean - centre) * scale
            shift = _per_channel(bias, x.ndim)
            return x.with_moments(out if shift is None else out + shift, x.var * scale.square())

    def statistics(
        self,
        x: RandomVariable,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Centre and scale per channel; in training also updates the running buffers, unbiased, as torch does."""
        if training or running_mean is None or running_var is None:
            axes = [0, *range(2, x.ndim)]
            centre = x.mean.mean(axes, keepdim=True)
            spread = (x.mean - centre).square().mean(axes, keepdim=True) + x.var.mean(axes, keepdim=True)
            if running_mean is not None and running_var is not None:
                n = x.mean.numel() // x.shape[1]
                with torch.no_grad():
                    running_mean.data.lerp_(centre.detach().flatten().to(running_mean.dtype), momentum)
                    unbiased = spread.detach().flatten() * (n / max(n - 1, 1))
                    running_var.data.lerp_(unbiased.to(running_var.dtype), momentum)
        else:
            centre = _per_channel(running_mean, x.ndim)  # type: ignore[assignment]
            spread = _per_channel(running_var, x.ndim)  # type: ignore[assignment]
        scale = torch.rsqrt(spread + eps)
        return centre, scale if weight is None else scale * _per_channel(weight, x.ndim)


_MIXTURE = "the batch is a mixture of its elements; statistics are taken as constants (paper eqs 10, 11)"
add_rule(
    "batch_norm",
    BatchNormalization(),
    Exactness.EXACT_IF_INDEPENDENT,
    _MIXTURE,
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)


@dataclass(frozen=True)
class SampleNormalization:
    """Normalization of each sample over its own axes: c_i / sqrt(S + eps), S = var(m) + (1 - 1/n) mean(v).

    For n <= 16 the second-order terms of the ratio are added (delta method).
    """

    centred: bool = True

    def normalize(self, mean: Tensor, var: Tensor, axes: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
        n = math.prod(mean.shape[a] for a in axes)
        mean_var = var.mean(axes, keepdim=True)
        if self.centred:
            centred = mean - mean.mean(axes, keepdim=True)
            spread = centred.square().mean(axes, keepdim=True) + (1 - 1 / n) * mean_var + eps
            own = var * (1 - 2 / n) + mean_var / n
        else:
            centred = mean
            spread = centred.square().mean(axes, keepdim=True) + mean_var + eps
            own = var
        out = centred * torch.rsqrt(spread)
        out_var = own / spread
        if 1 < n <= 16:
            # s^2 = mean(c^2): Cov(c_i, s^2) = 2 c_i v_i / n, Var(s^2) = mean(4 c^2 v + 2 v^2) / n, to first order.
            cov = 2 * centred * var / n
            var_spread = (4 * centred.square() * var + 2 * var.square()).mean(axes, keepdim=True) / n
            out = out - 0.5 * cov * spread.pow(-1.5) + 0.375 * centred * var_spread * spread.pow(-2.5)
            out_var = self.delta(centred, var, own, spread, axes, n)
        return out, out_var

    def delta(self, centred: Tensor, var: Tensor, own: Tensor, spread: Tensor, axes: Sequence[int], n: int) -> Tensor:
        """Variance through the Jacobian J_ij = (d_ij - 1/n - c_i c_j / (n S)) / sqrt(S): sum_j J_ij^2 v_j."""
        shift = 1 / n if self.centred else 0.0
        ratio = centred / (n * spread)
        cross = (var * (shift + 0 * ratio)).sum(axes, keepdim=True) * shift
        mixed = (var * centred).sum(axes, keepdim=True)
        square = (var * centred.square()).sum(axes, keepdim=True)
        all_j = cross + 2 * shift * ratio * mixed + ratio.square() * square
        diagonal = var * (1 - 2 * (shift + ratio * centred))
        return (diagonal + all_j) / spread

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        raise NotImplementedError


@dataclass(frozen=True)
class LayerNormalization(SampleNormalization):
    """LayerNorm and RMSNorm: over the last axes."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        names = ("input", "normalized_shape", "weight", "bias", "eps") if self.centred else ("input", "normalized_shape", "weight", "eps")
        values, _, _ = bind(names, args, kwargs)
        x, shape, weight, *bias, eps = values
        if eps is None:
            eps = 1e-5 if self.centred else torch.finfo(x.dtype).eps
        with full_precision(x):
            mean, var = self.normalize(x.mean, x.var, list(range(-len(shape), 0)), eps)
            if weight is not None:
                mean, var = mean * weight, var * weight.square()
            if bias and bias[0] is not None:
                mean = mean + bias[0]
            return x.with_moments(mean, var)


@dataclass(frozen=True)
class GroupNormalization(SampleNormalization):
    """GroupNorm: over the channels of each group and all positions."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        (x, groups, weight, bias, eps), _, _ = bind(("input", "num_groups", "weight", "bias", "eps"), args, kwargs)
        with full_precision(x):
            grouped = [part.reshape(x.shape[0], groups, -1) for part in (x.mean, x.var)]
            mean, var = self.normalize(*grouped, [2], 1e-5 if eps is None else eps)
            return _affine(x, mean.reshape(x.shape), var.reshape(x.shape), weight, bias)


def _affine(x: RandomVariable, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> RandomVariable:
    weight, bias = _per_channel(weight, x.ndim), _per_channel(bias, x.ndim)
    if weight is not None:
        mean, var = mean * weight, var * weight.square()
    return x.with_moments(mean if bias is None else mean + bias, var)


@dataclass(frozen=True)
class InstanceNormalization(SampleNormalization):
    """InstanceNorm: over the positions of each channel; with running statistics in use, an affine map."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        (x, running_mean, running_var, weight, bias, use_input, momentum, eps), _, _ = bind(
            ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"), args, kwargs
        )
        eps = 1e-5 if eps is None else eps
        with full_precision(x):
            if use_input is False:
                scale = torch.rsqrt(_per_channel(running_var, x.ndim) + eps)
                return _affine(x, (x.mean - _per_channel(running_mean, x.ndim)) * scale, x.var * scale.square(), weight, bias)
            axes = list(range(2, x.ndim))
            if running_mean is not None:
                with torch.no_grad():
                    centre = x.mean.mean(axes, keepdim=True)
                    spread = (x.mean - centre).square().mean(axes) + x.var.mean(axes)
                    n = x.mean[0, 0].numel()
                    momentum = 0.1 if momentum is None else momentum
                    running_mean.data.lerp_(centre.flatten(1).mean(0), momentum)
                    running_var.data.lerp_(spread.mean(0) * n / max(n - 1, 1), momentum)
            mean, var = self.normalize(x.mean, x.var, axes, eps)
            return _affine(x, mean, var, weight, bias)


_SAMPLE = "elements are independent; the sample's variance is taken at its expectation (second order for n <= 16)"
add_rule("layer_norm", LayerNormalization(), Exactness.APPROXIMATE, _SAMPLE, modules=(nn.LayerNorm,))
add_rule("rms_norm", LayerNormalization(centred=False), Exactness.APPROXIMATE, _SAMPLE, modules=(nn.RMSNorm,))
add_rule("group_norm", GroupNormalization(), Exactness.APPROXIMATE, _SAMPLE, modules=(nn.GroupNorm,))
add_rule(
    "instance_norm",
    InstanceNormalization(),
    Exactness.APPROXIMATE,
    _SAMPLE,
    modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
del random_variables
