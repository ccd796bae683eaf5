"""L_c, the term that drives the variance of the output to zero (paper eq. 14), and how it joins the loss."""

from __future__ import annotations

from typing import Any

import torch

from rvconvert.core.random_variable import RandomVariable
from rvconvert.errors import ConversionError
from rvconvert.moments.quadrature import flushed

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
    return weight * (y.var.square() if kind == "squared" else y.var).mean()


class _Attach(torch.autograd.Function):
    """Identity on the mean; backward adds the penalty's gradient to the variance."""

    @staticmethod
    def forward(ctx: Any, mean: torch.Tensor, var: torch.Tensor, factor: float, kind: str) -> torch.Tensor:
        ctx.save_for_backward(var)
        ctx.factor, ctx.kind = factor, kind
        return mean.view_as(mean)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (var,) = ctx.saved_tensors
        slope = 2 * var if ctx.kind == "squared" else torch.ones_like(var)
        return grad, flushed(slope * (ctx.factor / var.numel())), None, None


def attach_penalty(y: RandomVariable, weight: float = 50.0, kind: str = "squared", scale: float = 1.0) -> torch.Tensor:
    """The mean of ``y``, with L_c joining whatever loss is computed from it, at backward.

    Forward is the identity on the mean, so a reported loss does not change; backward hands
    scale * weight * 2 var / n to the variance (eq. 14 differentiated).
    """
    return _Attach.apply(y.mean, y.var, float(weight) * float(scale), kind)  # type: ignore[no-any-return]
