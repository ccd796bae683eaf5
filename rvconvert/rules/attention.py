"""Softmax and its kin, and attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import Exactness
from rvconvert.moments.compilation import is_traced
from rvconvert.rules.calls import full_precision, moments, own_python, recomputed
from rvconvert.rules.kinds import Composite, add_rule
from rvconvert.rules.relations import OfRows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def softmax(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Second order in the mean, p + diag(Hessian) v / 2, and first order in the variance, (J * J) v.

    The mean is written softmax(m + v (1 - 2p)/2), which is the same to that order and stays a distribution.
    """
    return _softmax_in_parts(mean, var, dim)[:2]


def _softmax_in_parts(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean p and variance, then p^2 v and its sum."""
    p = torch.softmax(mean, dim)
    p = torch.softmax(torch.addcmul(mean, var, torch.rsub(p, 0.5)), dim)
    square = p * p
    part = square * var
    total = part.sum(dim, keepdim=True)
    # J_ij = p_i (d_ij - p_j); a sum of terms that are no less than each of them, so that none comes out negative.
    return p, square * torch.addcmul(total - part, var, (1 - p).square()), part, total


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
        part = p.square() * x.var
        mean = torch.log_softmax(x.mean, dim) - 0.5 * curvature
        made = x.with_moments(mean, torch.addcmul(part.sum(dim, keepdim=True) - part, x.var, (1 - p).square()))
        return made.carrying(OfRows(x.snapshot(), dim % max(x.ndim, 1), "logsumexp", shifted=True))


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
        s_var = None if s_var is None else s_var.masked_fill(closed, 0.0)
    if s_var is None:
        p, p_var = torch.softmax(s, -1), None
    else:
        p, p_var, part, total = _softmax_in_parts(s, s_var, -1)
    if masked:
        p = p.masked_fill(closed, 0.0)
    second = p * p if p_var is None else torch.addcmul(p_var, p, p)
    mean = torch.matmul(p, x)
    var = torch.zeros_like(mean)
    if s_var is not None:
        # sum_j a_j (x_j - o)^2, a = p^2 v, expanded about the keys' average, as products of matrices; rounding may leave it
        # below 0.
        centre = x.mean(-2, keepdim=True)
        near, far = x - centre, mean - centre
        spread = torch.matmul(part, near.square()) - 2 * far * torch.matmul(part, near) + far.square() * total
        var = spread.clamp(min=0)
    if x_var is not None:
        var = var + torch.matmul(second, x_var)
    if dropout > 0:
        raw = x.square() if x_var is None else x.square() + x_var
        var = var + dropout / (1 - dropout) * torch.matmul(second, raw)
    return like.with_moments(mean, var)


_SCORES = 1 << 18  # of a block, whose moments stay in cache


def _in_blocks(attention: Callable[..., Any], operands: Sequence[Any], sizes: Sequence[int], at: int = 0) -> Any:
    """``attention(query, key, value, mask)`` of scores of ``sizes``, a block of batches and queries at a time.

    Scores are far more than what they are made from, so they are made again for the gradients, not kept.
    """
    total, size, dim = math.prod(sizes), sizes[at], at - len(sizes)
    if total > _SCORES and dim < -1:
        step = max(1, size * _SCORES // total)
        count = -(-size // step)

        def parts(x: Any, cut: bool = True) -> Sequence[Any]:
            cut = cut and x is not None and x.ndim >= -dim and x.shape[dim] == size
            return torch.split(x, step, dim) if cut else (x,) * count

        query, key, value, mask = operands
        of_keys = dim < -2
        cut = zip(parts(query), parts(key, of_keys), parts(value, of_keys), parts(mask), strict=True)
        widths = [step] * (count - 1) + [size - step * (count - 1)]
        blocks = [
            _in_blocks(attention, each, (*sizes[:at], n, *sizes[at + 1 :]), at + 1) for each, n in zip(cut, widths, strict=True)
        ]
        return torch.cat(blocks, dim)
    like = next(x for x in operands if isinstance(x, RandomVariable))

    def again(*flat: Any) -> tuple[Tensor, Tensor]:
        pairs = zip(flat[::2], flat[1::2], strict=True)
        out = attention(*(mean if var is None else like.with_moments(mean, var) for mean, var in pairs))
        return out.mean, out.var

    return like.with_moments(*recomputed(again, *(x for each in operands for x in moments(each))))


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
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()

    def attention(query: Any, key: Any, value: Any, mask: Any) -> Any:
        scores = torch.matmul(query * scale, torch.transpose(key, -2, -1))
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            scores = torch.masked_fill(scores, ~mask, -math.inf)
        elif mask is not None:
            scores = scores + mask
        with full_precision(query):
            return attend(scores, value, dropout_p, masked=mask is not None)

    if is_traced():
        return attention(query, key, value, attn_mask)
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
    return _in_blocks(attention, (query, key, value, attn_mask), (*batch, query.shape[-2], key.shape[-2]))


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
