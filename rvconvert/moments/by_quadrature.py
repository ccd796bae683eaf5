"""Activations by quadrature: silu, mish, softplus, logsigmoid, softsign, elu, selu, celu, gelu's approximation by tanh."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32
from rvconvert.moments.quadrature import KINKED_NODES, STEEP_NODES, Activation, activation_moments, quadrature


def _expm1(x: Tensor) -> Tensor:
    """e^x - 1 for x up to a few units; Inductor's own is exp - 1, which cancels near 0."""
    t = torch.tanh(0.5 * x)
    return 2.0 * t / (1.0 - t)


def _exp_increment(m: Tensor, d: Tensor) -> Tensor:
    """e^(m + d) - e^m from the larger of the two, which cannot overflow on the way."""
    return torch.copysign(torch.exp(m + torch.clamp(d, min=0.0)) * -_expm1(-d.abs()), d)


def _sigmoid_increment(m: Tensor, d: Tensor) -> Tensor:
    # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)) for a < b, with one division; the last factor as in
    # _expm1. What depends on m alone is common to all nodes.
    up, x = d > 0, m + d
    t = torch.tanh(0.5 * d)
    at_m = 1.0 + torch.where(up, torch.exp(m), torch.exp(-m))
    return 2.0 * t / (at_m * (1.0 + torch.exp(torch.where(up, -x, x))) * (1.0 + t.abs()))


_SILU = Activation(
    F.silu,
    lambda m, d: d * torch.sigmoid(m + d) + m * _sigmoid_increment(m, d),
    lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
)


def _softplus_increment(m: Tensor, d: Tensor) -> Tensor:
    # softplus(x) = x + softplus(-x) brings m to the lower half, where values only cancel for small steps.
    positive = m > 0
    m, e = torch.where(positive, -m, m), torch.where(positive, -d, d)
    near = torch.log1p(torch.sigmoid(m) * _expm1(torch.clamp(e, max=2.0)))
    step = torch.where(e > 2.0, F.softplus(m + e) - F.softplus(m), near)
    return torch.where(positive, d + step, step)


_SOFTPLUS = Activation(F.softplus, _softplus_increment, torch.sigmoid)

_LOGSIGMOID = Activation(F.logsigmoid, lambda m, d: -_softplus_increment(-m, -d), lambda x: torch.sigmoid(-x))

_GELU_RATE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


def _gelu_tanh_value(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_GELU_RATE * x * (1 + _GELU_CUBIC * x * x))


def _gelu_tanh_increment(m: Tensor, d: Tensor) -> Tensor:
    inner = _GELU_RATE * m * (1 + _GELU_CUBIC * m * m)
    step = _GELU_RATE * d * (1 + _GELU_CUBIC * (3 * m * (m + d) + d * d))
    return d * torch.sigmoid(inner + step) + m * _sigmoid_increment(inner, step)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    inner = _GELU_RATE * x * (1 + _GELU_CUBIC * x * x)
    rate = _GELU_RATE * x * (1 + 3 * _GELU_CUBIC * x * x)
    return torch.sigmoid(inner) * (1 + rate * torch.sigmoid(-inner))


# torch's own float32 value cancels below -4; x sigmoid(...) is the same function without that.
_GELU_TANH = Activation(_gelu_tanh_value, _gelu_tanh_increment, _gelu_tanh_slope, STEEP_NODES)

_MISH_END = 20.0  # tanh(softplus(x)) is 1 beyond


def _mish_gate(x: Tensor) -> tuple[Tensor, Tensor]:
    """w = e^x and n = w (w + 2); tanh(softplus(x)) = n/(n + 2)."""
    w = torch.exp(torch.clamp(x, max=_MISH_END))
    return w, w * (w + 2)


def _mish_increment(m: Tensor, d: Tensor) -> Tensor:
    (w0, n0), (w, n) = _mish_gate(m), _mish_gate(m + d)
    step = torch.where(
        m < _MISH_END, torch.clamp(d, max=_MISH_END - m), torch.clamp(d + (m - _MISH_END), max=0.0)
    )
    gate_step = 2 * _exp_increment(torch.clamp(m, max=_MISH_END), step) * (w + w0 + 2) / (n + 2) / (n0 + 2)
    return d * (n / (n + 2)) + m * gate_step


def _mish_slope(x: Tensor) -> Tensor:
    w, n = _mish_gate(x)
    return n / (n + 2) + x * 4 * w * (w + 1) / (n + 2) / (n + 2)


_MISH = Activation(F.mish, _mish_increment, _mish_slope)


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
def silu(mean: Tensor, var: Tensor) -> Moments:
    """x sigmoid(x), by quadrature of 28 nodes."""
    return activation_moments(_SILU, mean, var)


@at_least_float32
def mish(mean: Tensor, var: Tensor) -> Moments:
    """x tanh(softplus(x)), by quadrature of 28 nodes."""
    return activation_moments(_MISH, mean, var)


@at_least_float32
def logsigmoid(mean: Tensor, var: Tensor) -> Moments:
    """log sigmoid(x), by quadrature of 28 nodes."""
    return activation_moments(_LOGSIGMOID, mean, var)


@at_least_float32
def softsign(mean: Tensor, var: Tensor) -> Moments:
    """x/(1 + abs(x)), by quadrature of two panels of 18 nodes."""
    return activation_moments(_SOFTSIGN, mean, var)


@at_least_float32
def gelu_tanh(mean: Tensor, var: Tensor) -> Moments:
    """GELU's approximation by tanh, by quadrature of 34 nodes."""
    return activation_moments(_GELU_TANH, mean, var)


@at_least_float32
def softplus(mean: Tensor, var: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Moments:
    """log(1 + e^(beta x))/beta, by quadrature; torch's linear branch above threshold/beta differs by less than
    e^-threshold/beta, which is left out for threshold >= 15 and has its own kink below that.
    Panels also end at 0, where it bends."""
    if threshold < 15:
        return quadrature(lambda x: F.softplus(x, beta, threshold), mean, var, kinks=(0.0, threshold / beta))
    out, out_var = activation_moments(_SOFTPLUS, beta * mean, beta * beta * var)
    return out / beta, out_var / (beta * beta)


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
