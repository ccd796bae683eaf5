"""Normalization layers: the mixture law (paper eqs 10 and 11) over the axes that each layer normalizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.random_variable import RandomVariable
from rvconvert.registry import Exactness
from rvconvert.rules.kinds import Composite, add_rule, bind, full_precision, own_python


def _per_channel(x: Any, ndim: int) -> Any:
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


_MIXTURE = "exact in eval mode; in training the batch is a mixture, its statistics taken as constants (paper eqs 10, 11)"
add_rule(
    "batch_norm",
    BatchNormalization(),
    Exactness.APPROXIMATE,
    _MIXTURE,
    modules=(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)


# ---- normalization of each sample ----------------------------------------------------------------------------------

# Elements up to which the statistics' own variance counts. An element c deviations from the mean has its variance
# off by 2 c^2/n without it: at n = 24 by a factor of up to 5 against Monte Carlo, at n = 256 by some per cent.
_FEW = 256


def standardized(
    mean: Tensor, var: Tensor, axes: tuple[int, ...], eps: float, centred: bool = True
) -> tuple[Tensor, Tensor]:
    """Moments of c / sqrt(s^2 + eps) over ``axes``, with s^2 at its expectation S = var(m) + (1 - 1/n) mean(v).

    c is x less its mean over the axes, or x itself (RMSNorm) where ``centred`` is False. For n <= 256 the
    second-order terms of the ratio are added (delta method).
    """
    n = math.prod([mean.shape[a] for a in axes])
    mean_var = var.mean(axes, keepdim=True)
    share = 1 / n if centred else 0.0  # of every element in each c
    centre = mean - mean.mean(axes, keepdim=True) if centred else mean
    total = centre.square().mean(axes, keepdim=True) + (1 - share) * mean_var + eps
    own = var * (1 - 2 * share) + share * mean_var
    out = centre * torch.rsqrt(total)
    if not 1 < n <= _FEW:
        return out, own / total
    # s^2 = mean(c^2): Cov(c_i, s^2) = 2 c_i v_i / n and Var(s^2) = mean(4 c^2 v + 2 v^2) / n, to first order.
    cov = 2 * centre * var / n
    var_total = (4 * centre.square() * var + 2 * var.square()).mean(axes, keepdim=True) / n
    out = out - 0.5 * cov * total.pow(-1.5) + 0.375 * centre * var_total * total.pow(-2.5)
    # Variance through the Jacobian (d_ij - share - c_i c_j / (n S)) / sqrt(S).
    ratio = centre / (n * total)
    all_j = (
        share * mean_var
        + 2 * share * ratio * (var * centre).sum(axes, keepdim=True)
        + ratio.square() * (var * centre.square()).sum(axes, keepdim=True)
    )
    return out, (var * (1 - 2 * (share + ratio * centre)) + all_j) / total


def _scaled(x: RandomVariable, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None) -> RandomVariable:
    if weight is not None:
        mean, var = mean * weight, var * weight.square()
    return x.with_moments(mean if bias is None else mean + bias, var)


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
) -> Any:
    with full_precision(input):
        mean, var = standardized(input.mean, input.var, tuple(range(-len(normalized_shape), 0)), eps)
        return _scaled(input, mean, var, weight, bias)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    with full_precision(input):
        mean, var = standardized(input.mean, input.var, tuple(range(-len(normalized_shape), 0)), eps, centred=False)
        return _scaled(input, mean, var, weight, None)


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    with full_precision(input):
        grouped_mean, grouped_var = (part.reshape(input.shape[0], num_groups, -1) for part in (input.mean, input.var))
        mean, var = (part.reshape(input.shape) for part in standardized(grouped_mean, grouped_var, (2,), eps))
        return _scaled(input, mean, var, _per_channel(weight, input.ndim), _per_channel(bias, input.ndim))


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
    weight, bias = _per_channel(weight, x.ndim), _per_channel(bias, x.ndim)
    with full_precision(x):
        if not use_input_stats:
            scale = torch.rsqrt(_per_channel(running_var, x.ndim) + eps)
            return _scaled(x, (x.mean - _per_channel(running_mean, x.ndim)) * scale, x.var * scale.square(), weight, bias)
        axes = tuple(range(2, x.ndim))
        if running_mean is not None:
            n = math.prod(x.shape[2:])
            with torch.no_grad():
                centre = x.mean.mean(axes, keepdim=True)
                spread = (x.mean - centre).square().mean(axes) + (1 - 1 / n) * x.var.mean(axes)
                running_mean.lerp_(centre.flatten(1).mean(0).to(running_mean.dtype), momentum)
                running_var.lerp_((spread.mean(0) * n / max(n - 1, 1)).to(running_var.dtype), momentum)
        return _scaled(x, *standardized(x.mean, x.var, axes, eps), weight, bias)


_SAMPLE = "elements are independent; the sample's variance is taken at its expectation (second order for n <= 256)"
add_rule("layer_norm", Composite(_layer_norm), Exactness.APPROXIMATE, _SAMPLE, modules=(nn.LayerNorm,))
add_rule("rms_norm", Composite(_rms_norm), Exactness.APPROXIMATE, _SAMPLE, modules=(nn.RMSNorm,))
add_rule("group_norm", Composite(_group_norm), Exactness.APPROXIMATE, _SAMPLE, modules=(nn.GroupNorm,))
add_rule(
    "instance_norm",
    Composite(_instance_norm),
    Exactness.APPROXIMATE,
    _SAMPLE,
    modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
add_rule(
    "local_response_norm",
    Composite(own_python(F.local_response_norm)),
    Exactness.APPROXIMATE,
    "elements are independent; the divisor is independent of the element and lognormal",
    modules=(nn.LocalResponseNorm,),
)
