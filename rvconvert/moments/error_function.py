"""erf: the mean in closed form, the variance as an integral."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rvconvert.moments.normal import Moments, at_least_float32
from rvconvert.moments.quadrature import legendre

_RHO_NODES = [(0.5 + 0.5 * x, 0.5 * w) for x, w in legendre(12)]


class _Erf(torch.autograd.Function):
    """Var erf(X) = (2/pi) ∫_0^θ exp(-h²/(1 + sin u)) du, h = √2 m/√(1+2v), tan θ = 2v/√(1+4v); no term is negative."""

    @staticmethod
    def _geometry(mean, var):
        widened = 1.0 + 2.0 * var
        root = torch.sqrt(1.0 + 4.0 * var)
        angle = torch.atan(2.0 * var / root)
        return widened, root, angle, 2.0 * mean * mean / widened

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        widened, _, angle, square_h = _Erf._geometry(mean, var)
        out = torch.zeros_like(mean)
        for x, w in _RHO_NODES:
            out = out + w * torch.exp(-square_h / (1.0 + torch.sin(angle * x)))
        return torch.erf(mean / torch.sqrt(widened)), (2 / math.pi) * angle * out

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        mean, var = ctx.saved_tensors
        widened, root, angle, square_h = _Erf._geometry(mean, var)
        by_square_h = torch.zeros_like(mean)
        for x, w in _RHO_NODES:
            rest = 1.0 / (1.0 + torch.sin(angle * x))
            by_square_h = by_square_h - w * rest * torch.exp(-square_h * rest)
        by_square_h = (2 / math.pi) * angle * by_square_h
        # sin θ = 2v/(1+2v) and dθ/dv = 2/((1+2v) √(1+4v)).
        at_end = (2 / math.pi) * torch.exp(-square_h * widened / (1.0 + 4.0 * var))
        by_var = at_end * 2.0 / (widened * root) - by_square_h * 2.0 * square_h / widened
        slope = (2 / math.sqrt(math.pi)) * torch.exp(-0.5 * square_h) / torch.sqrt(widened)
        return (
            grad_mean * slope + grad_var * by_square_h * 4.0 * mean / widened,
            grad_var * by_var - grad_mean * slope * mean / widened,
        )


@at_least_float32
def erf(mean: Tensor, var: Tensor) -> Moments:
    """erf x, exact mean; variance by a one-dimensional integral of positive terms (Owen 1956)."""
    return _Erf.apply(mean, var)
