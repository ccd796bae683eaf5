"""Activations with a kink at 0, by quadrature: softsign, elu, selu, celu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32
from rvconvert.moments.quadrature import KINKED_NODES, Activation, activation_moments


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1 for x up to a few units; Inductor's own is exp - 1, which cancels near 0."""
    t = torch.tanh(0.5 * x)
    return 2.0 * t / (1.0 - t)


def _exp_increment(m: Tensor, d: Tensor) -> Tensor:
    """e^(m + d) - e^m from the larger of the two, which cannot overflow on the way."""
    return torch.copysign(torch.exp(m + torch.clamp(d, min=0.0)) * -_expm1(-d.abs()), d)


def _softsign_increment(m: Tensor, d: Tensor) -> Tensor:
    x = m + d
    return (d + (x * m.abs() - m * x.abs())) / ((1 + m.abs()) * (1 + x.abs()))


_SOFTSIGN = Activation(
    F.softsign, _softsign_increment, lambda x: (1 + x.abs()) ** -2, KINKED_NODES, kinked=True
)


def _elu_increment(m: Tensor, d: Tensor, alpha: float, rate: float) -> Tensor:
    low, high = torch.clamp(m, max=0.0), torch.clamp(m, min=0.0)
    up, down = torch.maximum(low + d, -high), torch.minimum(high + d, -low)
    return up + alpha * _exp_increment(rate * low, rate * down)


def _elu_slope(x: Tensor, alpha: float, rate: float) -> Tensor:
    return torch.where(x > 0, 1.0, (alpha * rate) * torch.exp(rate * torch.clamp(x, max=0.0)))


def _elu_value(x: Tensor, alpha: float, rate: float) -> Tensor:
    return torch.clamp(x, min=0.0) + alpha * _expm1(rate * torch.clamp(x, max=0.0))


_ELU = Activation(_elu_value, _elu_increment, _elu_slope, KINKED_NODES, kinked=True)


@at_least_float32
def softsign(mean: Tensor, var: Tensor) -> Moments:
    """x/(1 + abs(x)), by quadrature of two panels of 18 nodes."""
    return activation_moments(_SOFTSIGN, mean, var)


@at_least_float32
def elu(
    mean: Tensor, var: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Moments:
    """scale (x above 0, alpha (e^(input_scale x) - 1) below), by quadrature of two panels of 18 nodes."""
    out, out_var = activation_moments(_ELU, mean, var, alpha, input_scale)
    return scale * out, scale * scale * out_var


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def selu(mean: Tensor, var: Tensor) -> Moments:
    """SELU: elu with Klambauer's alpha and scale."""
    return elu(mean, var, SELU_ALPHA, SELU_SCALE)


def celu(mean: Tensor, var: Tensor, alpha: float = 1.0) -> Moments:
    """x above 0, alpha (e^(x/alpha) - 1) below."""
    return elu(mean, var, alpha, 1.0, 1.0 / alpha)
