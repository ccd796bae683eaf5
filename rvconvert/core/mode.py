"""The covariance modes: how a random variable starts in each, and whether rules carry it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from rvconvert.core.random_variable import RandomVariable, Settings

__all__ = ["MODES", "Mode", "Sampler"]

Sampler = Callable[[int, "torch.Generator | None"], torch.Tensor]


@dataclass(frozen=True)
class Mode:
    """A way of carrying covariance.

    Attributes:
        normal: a standard normal variable of a given shape: ``normal(zeros, settings)``.
        uniform: one uniform on (0, 1), where that is not the normal law's probability of each path of ``normal``.
        drawn: a variable whose paths can only be drawn one by one: ``drawn(sampler, zeros, settings)``, with
            ``sampler(n, generator)`` giving (n, *shape). Not needed where rules carry moments.
        needs_rules: means and variances are carried by rules; False where plain functions run on paths, so any function goes.
    """

    normal: Callable[[torch.Tensor, Settings], RandomVariable]
    uniform: Callable[[torch.Tensor, Settings], RandomVariable] | None = None
    drawn: Callable[[Sampler, torch.Tensor, Settings], RandomVariable] | None = None
    needs_rules: bool = False


MODES: dict[str, Mode] = {}
