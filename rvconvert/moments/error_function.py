"""erf and GELU: exact means; Var f(X) as an integral over the correlation rho of two copies of X."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rvconvert.moments.by_quadrature import gelu_tanh
from rvconvert.moments.normal import Moments, at_least_float32, ndtr
from rvconvert.moments.quadrature import density, legendre

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


class _Gelu(torch.autograd.Function):
    """Moments of x Phi(x).

    With X, Y ~ N(m, v) of correlation rho and f'' = phi(x)(2 - x²):
    Var f(X) = v E[f']² + v² ∫_0^1 (1 - rho) B(rho) d rho, B = E[f''(X) f''(Y)] >= 0.
    B is Gaussian times a polynomial in (X + Y)/√2 and (X - Y)/√2, which are independent.
    """

    @staticmethod
    def _first(mean, var):
        """S², phi(h)/S, E[f'] and E[f''], h = m/S."""
        widened = 1.0 + var
        root = torch.sqrt(widened)
        h = mean / root
        peak = density(h) / root
        return (
            widened,
            h,
            peak,
            ndtr(h) + mean * peak / widened,
            peak * (2 - (mean * mean / widened + var) / widened),
        )

    @staticmethod
    def _tilted(mean, var, rho):
        """A, D = 1 + v (1 ± rho), exp(-m²/A)/(2 pi √(A D)), and of the tilted sum and difference mu, p, q."""
        a, d = 1.0 + var * (1 + rho), 1.0 + var * (1 - rho)
        scale = torch.exp(-mean * mean / a) * torch.rsqrt(a * d) * (0.5 / math.pi)
        return a, d, scale, math.sqrt(2) * mean / a, var * (1 + rho) / a, var * (1 - rho) / d

    @staticmethod
    def forward(ctx, mean, var):
        ctx.save_for_backward(mean, var)
        _, h, peak, slope, _ = _Gelu._first(mean, var)
        out = torch.zeros_like(mean)
        for rho, w in _RHO_NODES:
            _, _, scale, mu, p, q = _Gelu._tilted(mean, var, rho)
            mu2 = mu * mu
            # E[(2 - X²)(2 - Y²)] as (2 - mu²/2)² and the terms that the variances add.
            fourth = 0.25 * (6 * mu2 * p + 3 * p * p - 2 * (mu2 + p) * q + 3 * q * q)
            out = out + (w * (1 - rho)) * scale * ((2 - 0.5 * mu2) ** 2 - 2 * (p + q) + fourth)
        return mean * ndtr(h) + var * peak, var * (slope * slope + var * out)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        mean, var = ctx.saved_tensors
        widened, _, peak, slope, curvature = _Gelu._first(mean, var)
        out = by_m = by_v = torch.zeros_like(mean)
        for rho, w in _RHO_NODES:
            a, d, scale, mu, p, q = _Gelu._tilted(mean, var, rho)
            a_v, d_v, mu2 = 1 + rho, 1 - rho, mu * mu
            fourth = 0.25 * (6 * mu2 * p + 3 * p * p - 2 * (mu2 + p) * q + 3 * q * q)
            poly = (2 - 0.5 * mu2) ** 2 - 2 * (p + q) + fourth
            by_mu = mu * (mu2 - 4 + 3 * p - q)
            by_p = -2 + 1.5 * (mu2 + p) - 0.5 * q
            by_q = -2 - 0.5 * (mu2 + p) + 1.5 * q
            mean_a = mean / a
            log_v = mean_a * mean_a * a_v - 0.5 * a_v / a - 0.5 * d_v / d
            poly_v = -by_mu * mu * a_v / a + by_p * a_v / (a * a) + by_q * d_v / (d * d)
            weight = (w * (1 - rho)) * scale
            out = out + weight * poly
            by_m = by_m + weight * (by_mu * (math.sqrt(2) / a) - 2 * mean_a * poly)
            by_v = by_v + weight * (log_v * poly + poly_v)
        mu = mean / widened
        third = -peak * mu * (2 - mu * mu - var / widened + 2 / widened)
        var_by_mean = var * (2 * slope * curvature + var * by_m)
        var_by_var = slope * slope + var * (slope * third + 2 * out + var * by_v)
        return grad_mean * slope + grad_var * var_by_mean, grad_mean * 0.5 * curvature + grad_var * var_by_var


@at_least_float32
def gelu(mean: Tensor, var: Tensor, approximate: str = "none") -> Moments:
    """GELU: "none" is x Phi(x), exact mean, variance by a one-dimensional integral; "tanh" by quadrature.

    Raises ValueError for any other `approximate`.
    """
    if approximate == "tanh":
        return gelu_tanh(mean, var)
    if approximate != "none":
        raise ValueError(f"approximate must be 'none' or 'tanh', not {approximate!r}")
    return _Gelu.apply(mean, var)
