"""L_c, the term that drives the variance of the output to zero (paper eq. 14), and how it joins the loss."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from rvconvert.core.random_variable import RandomVariable
from rvconvert.errors import ConversionError
from rvconvert.moments.compilation import flushed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["attach_penalty", "variance_penalty"]

KINDS = ("squared", "expected")


def variance_penalty(y: RandomVariable, weight: float = 50.0, kind: str = "squared") -> torch.Tensor:
    """L_c(y) = weight / n * sum(var_i^2) over the n elements of ``y`` (paper eq. 14).

    Args:
        y: the output of the model, any shape.
        weight: the paper's lambda, 50 in all its experiments.
        kind: ``"squared"``, the paper's; or ``"expected"``, weight / n * sum(var_i), which at weight 1 makes
            mean squared error of the mean plus penalty the exact expectation of the squared error.

    Returns:
        A scalar tensor.

    Raises:
        ConversionError: ``y`` is not a RandomVariable, or ``kind`` is neither of the two.
    """
    if not isinstance(y, RandomVariable):
        raise ConversionError(
            f"variance_penalty takes a RandomVariable, not {type(y).__name__}; convert with "
            "output='distribution' to have the model return one"
        )
    if kind not in KINDS:
        raise ConversionError(f"kind={kind!r} is not one of {KINDS}")
    values = y.var.square() if kind == "squared" else y.var
    return weight * (values.mean() if values.numel() else values.sum())  # of no elements there is none


class _Attach(torch.autograd.Function):
    """Identity on the mean; the first backward pass that accumulates gradients adds the penalty's to the variance."""

    @staticmethod
    def forward(ctx: Any, var: torch.Tensor, factor: float, kind: str, joined: _Joined | None, *means: torch.Tensor) -> Any:
        ctx.save_for_backward(var)
        ctx.factor, ctx.kind, ctx.joined = factor, kind, joined
        # Not a view, which a caller could not write to in place; in plain order, as a caller's view() asks for.
        return tuple(mean.clone(memory_format=torch.contiguous_format) for mean in means)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if ctx.joined is not None and not ctx.joined.joins_now():
            return None, None, None, None, *grads
        (var,) = ctx.saved_tensors
        wide = var.to(torch.promote_types(var.dtype, torch.float32))  # what is small in float32 may be 0 or infinite in half
        slope = 2 * wide if ctx.kind == "squared" else torch.ones_like(wide)
        return flushed(slope * (ctx.factor / max(var.numel(), 1))).to(var.dtype), None, None, None, *grads


class _Joined:
    """Whether L_c has joined a backward pass: once a forward, and never one of ``torch.autograd.grad``."""

    def __init__(self, made_by: Any) -> None:
        self.made_by = made_by  # the node that the variance comes from
        self.done = False

    def joins_now(self) -> bool:
        """True the first time that the backward pass under way accumulates into a leaf that the variance is made of."""
        if self.done:
            return False
        try:
            self.done = self.made_by is None or any(map(torch._C._will_engine_execute_node, _leaves(self.made_by)))
        except RuntimeError:  # torch's answer for the inputs of torch.autograd.grad
            return False
        return self.done


def _leaves(node: Any) -> Iterator[Any]:
    """The nodes that accumulate gradients, of the nearest leaves first."""
    todo, seen = deque([node]), {node}
    while todo:
        node = todo.popleft()
        if type(node).__name__ == "AccumulateGrad":
            yield node
        for each, _ in node.next_functions:
            if each is not None and each not in seen:
                seen.add(each)
                todo.append(each)


def attach_penalty(
    y: RandomVariable, weight: float = 50.0, kind: str = "squared", scale: float = 1.0, beside: Sequence[torch.Tensor] = ()
) -> Any:
    """The mean of ``y``, with L_c joining whatever loss is computed from it, at backward.

    With tensors ``beside`` it (logits, a view) it returns the mean and these, and L_c joins a loss of any of them that has a
    gradient.

    Forward is the identity on the mean, so a reported loss does not change; the first backward pass that accumulates
    gradients hands scale * weight * 2 var / n to the variance (eq. 14 differentiated). A second pass through the same
    graph does not, and neither does ``torch.autograd.grad``.
    """
    var = y.var
    joined = None if torch.compiler.is_compiling() else _Joined(var.grad_fn)
    means = (y.mean, *(x for x in beside if x.requires_grad))
    taken = iter(_Attach.apply(var, float(weight) * float(scale), kind, joined, *means))
    first = next(taken)
    return (first, *(next(taken) if x.requires_grad else x for x in beside)) if beside else first
