"""Functions in pieces: bounded below or above, shrunk to 0 in the middle, with a jump, hardswish, elu and its kin."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.kinked_table import Kinked, Shape, hardswish_moments, kinked_moments
from rvconvert.moments.normal import Moments, at_least_float32, mills, standardize
from rvconvert.moments.quadrature import density, quadrature
from rvconvert.moments.table import CURVES
from rvconvert.moments.two_slopes import relu


@at_least_float32
def softshrink(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Moments:
    """x moved towards 0 by lambd, exact: relu(x - lambd) - relu(-x - lambd)."""
    up, up_var = relu(mean - lambd, var)
    down, down_var = relu(-mean - lambd, var)
    return up - down, up_var + down_var + 2 * up * down


class _Exceedance(torch.autograd.Function):
    """P(X > 0) = Phi(a), a = mean/s; at var = 0 the step, 0 at mean = 0."""

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        *_, t = standardize(mean, var)
        below = density(t) * mills(t)
        return torch.where(mean > 0, 1.0 - below, below)

    @staticmethod
    def backward(ctx, grad):
        mean, var = ctx.saved_tensors
        _, inverse, t = standardize(mean, var)
        slope = density(t) * inverse
        return grad * slope, grad * (-0.5 * mean * inverse) * (slope * inverse)


def _jump(mean: Tensor, var: Tensor, height: float) -> Moments:
    """(x + height) above 0, else 0."""
    r, r_var = relu(mean, var)
    above = _Exceedance.apply(mean, var)
    below = _at_most_zero(mean, var, above)
    return r + height * above, r_var + height * height * above * below + 2 * height * r * below


def _at_most_zero(mean: Tensor, var: Tensor, above: Tensor) -> Tensor:
    # P(X <= 0) from the lower tail; at var = 0 and mean = 0 both tails say 0, and the point belongs here.
    return torch.where(mean > 0, _Exceedance.apply(-mean, var), 1.0 - above)


@at_least_float32
def hardshrink(mean: Tensor, var: Tensor, lambd: float = 0.5) -> Moments:
    """x where abs(x) > lambd, else 0, exact."""
    up, up_var = _jump(mean - lambd, var, lambd)
    down, down_var = _jump(-mean - lambd, var, lambd)
    return up - down, up_var + down_var + 2 * up * down


@at_least_float32
def threshold(mean: Tensor, var: Tensor, threshold: float, value: float) -> Moments:
    """x where x > threshold, else value, exact; value > threshold loses accuracy where the terms cancel."""
    up, up_var = _jump(mean - threshold, var, threshold - value)
    return up + value, up_var


def _clamped(mean: Tensor, var: Tensor, lo: float | Tensor, hi: float | Tensor) -> Moments:
    return quadrature(lambda x: torch.clamp(x, lo, hi), mean, var, (lo, hi))  # type: ignore[arg-type]


_FAR = 1e30  # a bound that no one meets, such as the least number of a dtype
_CLAMP = Kinked(lambda t: t.clamp(0.0, 2.0), Shape(left=0.0, right=1.0, width=1.0, level=True, odd=True), middle=1.0)


@at_least_float32
def clamp(mean: Tensor, var: Tensor, min: float | Tensor | None = None, max: float | Tensor | None = None) -> Moments:
    """min(max(x, min), max), exact; either bound may be None; tensors broadcast and get their gradient."""
    if min is None or (isinstance(min, float) and min <= -_FAR):
        if max is None or (isinstance(max, float) and max >= _FAR):
            return mean, var
        down, down_var = relu(max - mean, var)
        return max - down, down_var
    if max is None or (isinstance(max, float) and max >= _FAR):
        up, up_var = relu(mean - min, var)
        return up + min, up_var
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        lo, hi = (torch.as_tensor(b, dtype=mean.dtype, device=mean.device).expand_as(mean) for b in (min, max))
        return _clamped(mean, var, lo, hi)
    if mean.dtype == torch.float64 or not min < max:
        return _clamped(mean, var, min, max)
    return kinked_moments(_CLAMP, mean, var, (float(min), float(max)), width=(max - min) / 2)


def relu6(mean: Tensor, var: Tensor) -> Moments:
    """min(max(x, 0), 6), exact."""
    return clamp(mean, var, 0.0, 6.0)


def hardtanh(mean: Tensor, var: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Moments:
    """min(max(x, min_val), max_val), exact."""
    return clamp(mean, var, min_val, max_val)


def hardsigmoid(mean: Tensor, var: Tensor) -> Moments:
    """relu6(x + 3) / 6, exact."""
    clamped, clamped_var = clamp(mean + 3.0, var, 0.0, 6.0)
    return clamped / 6.0, clamped_var / 36.0


_HARDSWISH = Kinked(
    lambda t: (t - 3.0) * t.clamp(0.0, 6.0) / 6.0, Shape(left=0.0, right=-0.5, width=3.0, hardswish=True), middle=3.0
)


@at_least_float32
def hardswish(mean: Tensor, var: Tensor) -> Moments:
    """x relu6(x + 3) / 6, exact."""
    if mean.dtype == torch.float64:
        return quadrature(F.hardswish, mean, var, (-3.0, 3.0))
    return hardswish_moments(_HARDSWISH, mean, var)


def _elu(x: Tensor, alpha: float, rate: float) -> Tensor:
    return torch.clamp(x, min=0.0) + alpha * torch.expm1(rate * torch.clamp(x, max=0.0))


_ELU: dict[float, int] = {}
_MOST = 16  # tables, of 22 MB each: a slope that changes with every step is not to have one for each


@torch.compiler.assume_constant_result
def _elu_curve(slope: float) -> int | None:
    """The number of the curve that is x above 0, slope (e^x - 1) below; None where there are too many already."""
    if slope not in _ELU:
        if len(_ELU) == _MOST:
            return None
        shape = Shape(left=slope, right=1.0, width=2.0, exponential=True)
        _ELU[slope] = Kinked(lambda x: _elu(x, slope, 1.0), shape).number
    return _ELU[slope]


@at_least_float32
def elu(mean: Tensor, var: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Moments:
    """scale (x above 0, alpha (e^(input_scale x) - 1) below)."""
    number = None if mean.dtype == torch.float64 or input_scale <= 0 else _elu_curve(round(alpha * input_scale, 12))
    if number is None:
        out, out_var = quadrature(lambda x: _elu(x, alpha, input_scale), mean, var, (0.0,))
        return scale * out, scale * scale * out_var
    curve, ratio = CURVES[number], scale / input_scale
    if input_scale != 1:
        mean, var = mean * input_scale, var * input_scale**2
    out, out_var = kinked_moments(curve, mean, var)
    return (out, out_var) if ratio == 1 else (ratio * out, ratio * ratio * out_var)


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


def selu(mean: Tensor, var: Tensor) -> Moments:
    """SELU: elu with Klambauer's alpha and scale."""
    return elu(mean, var, SELU_ALPHA, SELU_SCALE)


def celu(mean: Tensor, var: Tensor, alpha: float = 1.0) -> Moments:
    """x above 0, alpha (e^(x/alpha) - 1) below."""
    return elu(mean, var, alpha, 1.0, 1.0 / alpha)


def _softsign_increment(m: Tensor, d: Tensor) -> Tensor:
    x = m + d
    return (d + (x * m.abs() - m * x.abs())) / ((1 + m.abs()) * (1 + x.abs()))


@at_least_float32
def softsign(mean: Tensor, var: Tensor) -> Moments:
    """x/(1 + abs(x)), by quadrature."""
    return quadrature(F.softsign, mean, var, (0.0,), _softsign_increment)
