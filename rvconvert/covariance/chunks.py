"""Paths in chunks: a processor is asked for no tensor so large that the system maps its memory anew at every step.

The paths of a variable are one tensor, or several that follow one another along the paths. What an operation takes is cut alike,
into chunks of some megabytes; statistics over the batch are those of all chunks together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.compilation import is_traced
from rvconvert.moments.normal import gradients_with_graph
from rvconvert.rules.normalization import update_running

if TYPE_CHECKING:
    from collections.abc import Sequence

Chunks = tuple[Tensor, ...]

# Bytes of an operation's largest input: its result, perhaps four times as large, stays below the 32 MB from which glibc maps.
_CHUNK = 1 << 22


def joined(chunks: Chunks) -> Tensor:
    """All paths in one tensor."""
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)


def alike(stacks: Sequence[Chunks]) -> list[Chunks]:
    """Several variables' paths, as many in each, cut at the same places; as they are where that serves."""
    first = stacks[0]
    count = sum(map(len, first))
    if count <= 2 or not first[0].is_cpu or is_traced():  # by an antithetic pair nothing is gained
        return [(joined(each),) for each in stacks]
    largest = max(sum(x.numel() * x.element_size() for x in each) for each in stacks) // count  # bytes of one path
    size = len(first[0])
    same = all([len(x) for x in each] == [len(x) for x in first] for each in stacks)
    if same and size * largest <= 2 * _CHUNK and (size == count or 4 * size * largest >= _CHUNK):
        return list(stacks)
    size = max(1, min(count, _CHUNK // max(largest, 1)))
    return [_cut(each, size) for each in stacks]


def _cut(chunks: Chunks, size: int) -> Chunks:
    if len(chunks) > 1 and all(len(x) % size == 0 for x in chunks):
        return tuple(part for x in chunks for part in x.split(size))
    return joined(chunks).split(size)


class JointBatchNorm(torch.autograd.Function):
    """BatchNorm in training with the statistics of all chunks, each (paths, batch, channels, ...); saves them.

    By torch's own kernels, as in eval mode, given these statistics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        *chunks: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = [x.flatten(0, 1) for x in chunks]
        counts = [x.numel() // x.shape[1] for x in rows]
        n = sum(counts)
        share = torch.tensor([count / n for count in counts], dtype=rows[0].dtype)[:, None]
        centres, spreads = map(torch.stack, zip(*(torch.batch_norm_update_stats(x, None, None, 0.0) for x in rows), strict=True))
        mean = (share * centres).sum(0)
        var = (share * (spreads + (centres - mean).square())).sum(0)
        update_running(running_mean, running_var, mean, var, n, momentum)
        ctx.save_for_backward(mean, var, weight, bias, *chunks)
        ctx.eps, ctx.n = eps, n
        each = (torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0] for x in rows)
        return tuple(y.view(x.shape) for x, y in zip(chunks, each, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight, bias, *chunks = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a graph of the backward pass (create_graph=True)

            def normalized(weight: Tensor | None, bias: Tensor | None, *chunks: Tensor) -> list[Tensor]:
                x = torch.cat(chunks)
                return [F.batch_norm(x.flatten(0, 1), None, None, weight, bias, True, 0.0, ctx.eps).view(x.shape)]

            by = gradients_with_graph(normalized, (weight, bias, *chunks), [torch.cat(grads)])
            return None, None, *by[:2], None, None, *by[2:]
        one = torch.ones_like(mean) if weight is None else weight
        each = [
            torch.ops.aten.native_batch_norm_backward(
                grad.flatten(0, 1), x.flatten(0, 1), one, mean, var, None, None, False, ctx.eps, [True, True, True]
            )
            for grad, x in zip(grads, chunks, strict=True)
        ]
        by_weight, by_bias = (sum(by[k] for by in each) for k in (1, 2))
        # What the statistics pass on: scale/n (sum of grad + x̂ times sum of grad x̂).
        scale = torch.rsqrt(var + ctx.eps)
        by_x, shared = -one * scale * scale * by_weight / ctx.n, -one * scale * by_bias / ctx.n
        shape = (-1, *(1,) * (chunks[0].ndim - 3))
        slope, shift = by_x.view(shape), (shared - mean * by_x).view(shape)
        by_chunks = [by[0].view(x.shape).addcmul_(x, slope).add_(shift) for by, x in zip(each, chunks, strict=True)]
        return None, None, None if weight is None else by_weight, None if bias is None else by_bias, None, None, *by_chunks
