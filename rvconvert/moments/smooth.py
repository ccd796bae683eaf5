"""Smooth activations, each by its table: silu, mish, softplus, logsigmoid, gelu, tanh, sigmoid, erf."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32
from rvconvert.moments.quadrature import INV_SQRT_2PI, LOG2_E, quadrature
from rvconvert.moments.smooth_table import Smooth, table_moments, table_partials

if TYPE_CHECKING:
    from rvconvert.moments.table import Partials

_GELU_RATE, _GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


# torch's own GELU cancels far below 0; these are the same functions without that.
def _gelu(x: Tensor) -> Tensor:
    return torch.special.erfc(-math.sqrt(0.5) * x).mul_(x).mul_(0.5)


def _gelu_known(mean: Tensor, var: Tensor, inverse: Tensor, at: Tensor) -> Moments:
    """m Phi(t) + v phi(t)/S and Phi(t) + t phi(t)/S², S² = 1 + v and t = m/S."""
    at = at.clamp(-8, 8)  # the square of g is a denormal number further out
    below = torch.special.erfc(-math.sqrt(0.5) * at).mul_(0.5)
    density = (at * at).mul_(-0.5 * LOG2_E).exp2_().mul_(INV_SQRT_2PI).mul_(inverse)
    return (below * mean).addcmul_(density, var), below.addcmul_(density.mul_(at), inverse)


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(_GELU_RATE * x * (1 + _GELU_CUBIC * x * x))


_TANH, _SIGMOID = Smooth(torch.tanh, 1.0, rises=True, bound="range"), Smooth(torch.sigmoid, 2.0, rises=True, bound="probability")
_ERF = Smooth(torch.erf, 0.6, rises=True, bound="range")
_SILU, _MISH = Smooth(F.silu, 2.0), Smooth(F.mish, 2.0)
_SOFTPLUS, _LOGSIGMOID = (
    Smooth(F.softplus, 3.0, rises=True, bound="above"),
    Smooth(F.logsigmoid, 3.0, rises=True, bound="below"),
)
_GELU, _GELU_TANH = Smooth(_gelu, 1.0, known=_gelu_known), Smooth(_gelu_tanh, 0.75)


@at_least_float32
def tanh(mean: Tensor, var: Tensor) -> Moments:
    """tanh x."""
    return table_moments(_TANH, mean, var)


@at_least_float32
def sigmoid(mean: Tensor, var: Tensor) -> Moments:
    """1/(1 + e^-x)."""
    return table_moments(_SIGMOID, mean, var)


@at_least_float32
def erf(mean: Tensor, var: Tensor) -> Moments:
    """The error function."""
    return table_moments(_ERF, mean, var)


def tanh_partials(mean: Tensor, var: Tensor) -> Partials:
    """Partial derivatives of the moments of tanh x, in float32."""
    return table_partials(_TANH, mean, var)


def sigmoid_partials(mean: Tensor, var: Tensor) -> Partials:
    """Partial derivatives of the moments of 1/(1 + e^-x), in float32."""
    return table_partials(_SIGMOID, mean, var)


@at_least_float32
def silu(mean: Tensor, var: Tensor) -> Moments:
    """x sigmoid(x)."""
    return table_moments(_SILU, mean, var)


@at_least_float32
def mish(mean: Tensor, var: Tensor) -> Moments:
    """x tanh(softplus(x))."""
    return table_moments(_MISH, mean, var)


@at_least_float32
def gelu(mean: Tensor, var: Tensor, approximate: str = "none") -> Moments:
    """GELU: "none" is x Phi(x), "tanh" its approximation. Raises ValueError for any other `approximate`."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    return table_moments(_GELU if approximate == "none" else _GELU_TANH, mean, var)


@at_least_float32
def softplus(mean: Tensor, var: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Moments:
    """log(1 + e^(beta x))/beta.

    Torch's linear branch above threshold/beta differs by less than e^-threshold/beta, which is left out for threshold >= 15
    and has its own kink below that.
    """
    if threshold < 15:
        return quadrature(lambda x: F.softplus(x, beta, threshold), mean, var, kinks=(0.0, threshold / beta))
    if beta == 1:
        return table_moments(_SOFTPLUS, mean, var)
    out, out_var = table_moments(_SOFTPLUS, beta * mean, beta * beta * var)
    return out / beta, out_var / (beta * beta)


@at_least_float32
def logsigmoid(mean: Tensor, var: Tensor) -> Moments:
    """log sigmoid(x)."""
    return table_moments(_LOGSIGMOID, mean, var)
