"""Softmax and its kin, and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Composite, add_rule, full_precision, moments, own_python


def softmax(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Second order in the mean, p + diag(Hessian) v / 2, and first order in the variance, (J * J) v.

    The mean is written softmax(m + v (1 - 2p)/2), which is the same to that order and stays a distribution.
    """
    p = torch.softmax(mean, dim)
    p = torch.softmax(mean + 0.5 * var * (1 - 2 * p), dim)
    # J_ij = p_i (d_ij - p_j).
    return p, p.square() * (var * (1 - 2 * p) + (p.square() * var).sum(dim, keepdim=True))


def _dim(input: Any, dim: int | None) -> int:
    if dim is not None:
        return dim
    return 0 if input.ndim in (0, 1, 3) else 1  # torch's own, deprecated default


def _softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    x = input if dtype is None else input.to(dtype)
    with full_precision(x):
        return x.with_moments(*softmax(x.mean, x.var, _dim(x, dim)))


def _softmin(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return _softmax(-input, _dim(input, dim), dtype=dtype)


def _log_softmax(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """x_i - log sum exp(x): second order in the mean; in the variance J_ij = d_ij - p_j."""
    x = input if dtype is None else input.to(dtype)
    dim = _dim(x, dim)
    with full_precision(x):
        p = torch.softmax(x.mean, dim)
        curvature = (p * (1 - p) * x.var).sum(dim, keepdim=True)
        total = (p.square() * x.var).sum(dim, keepdim=True)
        mean = torch.log_softmax(x.mean, dim) - 0.5 * curvature
        return x.with_moments(mean, x.var * (1 - 2 * p) + total)


_SOFTMAX = "elements are independent; second order at the mean, so for variances up to about 1"
add_rule("softmax", Composite(_softmax, joins=True), Exactness.APPROXIMATE, _SOFTMAX, modules=(nn.Softmax, nn.Softmax2d))
add_rule("softmin", Composite(_softmin, joins=True), Exactness.APPROXIMATE, _SOFTMAX, modules=(nn.Softmin,))
add_rule("log_softmax", Composite(_log_softmax, joins=True), Exactness.APPROXIMATE, _SOFTMAX, modules=(nn.LogSoftmax,))


def attend(scores: Any, value: Any, dropout: float, masked: bool) -> RandomVariable:
    """o = sum_j softmax(scores)_j value_j, to first order in the scores: do/ds_j = p_j (value_j - o).

    So weights that sum to 1 move no output whose values agree. With dropout each weight is masked by itself.
    """
    (s, s_var), (x, x_var) = moments(scores), moments(value)
    like = scores if isinstance(scores, RandomVariable) else value
    if masked:
        closed = torch.isneginf(s).all(-1, keepdim=True)  # a query with every key masked attends to nothing, as in torch
        s = s.masked_fill(closed, 0.0)
    p, p_var = (torch.softmax(s, -1), None) if s_var is None else softmax(s, s_var, -1)
    if masked:
        p, p_var = p.masked_fill(closed, 0.0), None if p_var is None else p_var.masked_fill(closed, 0.0)
    mean = torch.matmul(p, x)
    second = p.square() if p_var is None else p.square() + p_var
    var = torch.zeros_like(mean)
    if s_var is not None:
        # sum_j a_j (x_j - o)^2 expanded about the keys' average, as products of matrices; rounding may leave it below 0.
        a = p.square() * s_var
        centre = x.mean(-2, keepdim=True)
        near, far = x - centre, mean - centre
        spread = torch.matmul(a, near.square()) - 2 * far * torch.matmul(a, near) + far.square() * a.sum(-1, keepdim=True)
        var = var + spread.clamp(min=0)
    if x_var is not None:
        var = var + torch.matmul(second, x_var)
    if dropout > 0:
        raw = x.square() if x_var is None else x.square() + x_var
        var = var + dropout / (1 - dropout) * torch.matmul(second, raw)
    return like.with_moments(mean, var)


def _scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(q k' scale + mask) v."""
    if enable_gqa:
        key, value = (torch.repeat_interleave(x, query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query, torch.transpose(key, -2, -1)) * scale
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool:
        scores = torch.masked_fill(scores, ~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    with full_precision(query):
        return attend(scores, value, dropout_p, masked=attn_mask is not None)


_multi_head_attention = own_python(F.multi_head_attention_forward)


def _multi_head_attention_forward(*args: Any, average_attn_weights: bool = True, **kwargs: Any) -> Any:
    # The mean over heads is taken here: torch's own code writes x.mean(dim), which is not a method of x here.
    out, weights = _multi_head_attention(*args, average_attn_weights=False, **kwargs)
    return out, torch.mean(weights, -3) if average_attn_weights and weights is not None else weights


_ATTENTION = "queries, keys and values are independent of each other, as are the scores; first order in the scores"
add_rule("scaled_dot_product_attention", Composite(_scaled_dot_product_attention), Exactness.APPROXIMATE, _ATTENTION)
add_rule(
    "multi_head_attention_forward",
    Composite(_multi_head_attention_forward),
    Exactness.APPROXIMATE,
    _ATTENTION,
    modules=(nn.MultiheadAttention,),
)
