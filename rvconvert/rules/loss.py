"""Losses: taken at the mean, as the user's loss is (what the variance costs is the penalty's part), those of a latent excepted.

No penalty stands in for the variance of a latent: -log p(z) by ``mse_loss(z, 0)`` is the expected value, as ``z.square()`` is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from rvconvert.core.random_variable import random_variables
from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Collapse, add_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from rvconvert.rules.calls import Function


_REDUCTIONS: dict[Any, str] = {0: "none", 1: "mean", 2: "sum"}  # by torch._C._nn's numbers


def _reduced(loss: Any, reduction: Any) -> Any:
    reduction = _REDUCTIONS.get(reduction, reduction)
    return loss if reduction == "none" else torch.mean(loss) if reduction == "mean" else torch.sum(loss)


def _of_the_difference(loss: Callable[[Any], Any]) -> Callable[..., Any]:
    def expected(input: Any, target: Any, reduction: Any = "mean") -> Any:
        return _reduced(loss(input - target), reduction)

    return expected


def _huber(input: Any, target: Any, reduction: Any = "mean", delta: float = 1.0) -> Any:
    apart = input - target
    return _reduced(0.5 * (apart.square() - F.softshrink(apart, delta).square()), reduction)


def _smooth(input: Any, target: Any, reduction: Any = "mean", beta: float = 1.0) -> Any:
    return _huber(input, target, reduction, beta) / beta if beta else _reduced((input - target).abs(), reduction)


def _gaussian(input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: Any = "mean") -> Any:
    var = torch.as_tensor(var).clamp(min=eps)
    var = var if var.ndim in (0, input.ndim) else var.unsqueeze(-1)
    loss = 0.5 * ((input - target).square() / var + var.log())
    return _reduced(loss + 0.5 * math.log(2 * math.pi) if full else loss, reduction)


@dataclass(frozen=True)
class Loss(Collapse):
    """At the mean; of latents and constants by ``expected``, the loss in operations that have rules, where there is one."""

    expected: Callable[..., Any] | None = None

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        weighted = bool(given.keys() & {"weight", "size_average", "reduce"})
        if self.expected is None or weighted or not all(x.latent for x in random_variables(args, kwargs)):
            return super().__call__(func, args, kwargs)
        return self.expected(*args, **given)


_LOSSES: dict[str, tuple[type[nn.Module], Callable[..., Any] | None]] = {
    "mse_loss": (nn.MSELoss, _of_the_difference(torch.square)),
    "l1_loss": (nn.L1Loss, _of_the_difference(torch.abs)),
    "smooth_l1_loss": (nn.SmoothL1Loss, _smooth),
    "huber_loss": (nn.HuberLoss, _huber),
    "binary_cross_entropy": (nn.BCELoss, None),
    "binary_cross_entropy_with_logits": (nn.BCEWithLogitsLoss, None),
    "cross_entropy": (nn.CrossEntropyLoss, None),
    "nll_loss": (nn.NLLLoss, None),
    "kl_div": (nn.KLDivLoss, None),
    "gaussian_nll_loss": (nn.GaussianNLLLoss, _gaussian),
    "poisson_nll_loss": (nn.PoissonNLLLoss, None),
    "soft_margin_loss": (nn.SoftMarginLoss, None),
    "cosine_embedding_loss": (nn.CosineEmbeddingLoss, None),
    "hinge_embedding_loss": (nn.HingeEmbeddingLoss, None),
    "margin_ranking_loss": (nn.MarginRankingLoss, None),
    "multi_margin_loss": (nn.MultiMarginLoss, None),
    "multilabel_margin_loss": (nn.MultiLabelMarginLoss, None),
    "multilabel_soft_margin_loss": (nn.MultiLabelSoftMarginLoss, None),
    "triplet_margin_loss": (nn.TripletMarginLoss, None),
    "ctc_loss": (nn.CTCLoss, None),
}
_AT_MEAN = "taken at the mean; the variance is left to the penalty"
for _name, (_module, _expected) in _LOSSES.items():
    _assumption = f"{_AT_MEAN}; of a latent {'from a draw' if _expected is None else 'the expected value'}"
    add_rule(_name, Loss(_expected), Exactness.APPROXIMATE, _assumption, modules=(_module,))
