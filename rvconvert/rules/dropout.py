"""Dropout: on a random variable exact moments, and no draw."""

from __future__ import annotations

from typing import Any

from torch import nn

from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Composite, add_rule


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Mean unchanged, var = (v + m^2)/(1 - p) - m^2 = (v + p m^2)/(1 - p)."""
    if not training or p == 0:
        return input
    if p == 1:
        return input * 0.0
    return input.with_moments(input.mean, (input.var + p * input.mean.square()) / (1 - p))


def _alpha_dropout(input: Any, p: float = 0.5, training: bool = False, inplace: bool = False) -> Any:
    """a (x b + alpha (1 - b)) + c with b ~ Bernoulli(1 - p): self-normalizing (Klambauer et al. 2017)."""
    if not training or p == 0:
        return input
    if p == 1:
        return input * 0.0
    alpha = -1.7580993408473766
    keep = 1 - p
    scale = (keep + alpha**2 * keep * p) ** -0.5
    shift = -scale * alpha * p
    mean = keep * input.mean + p * alpha
    var = keep * (input.var + p * (input.mean - alpha).square())
    return input.with_moments(scale * mean + shift, scale**2 * var)


add_rule("dropout", Composite(_dropout), Exactness.EXACT, "element masks", modules=(nn.Dropout,))
for _name, _module in (
    ("dropout1d", nn.Dropout1d),
    ("dropout2d", nn.Dropout2d),
    ("dropout3d", nn.Dropout3d),
    ("feature_dropout", None),
):
    add_rule(
        _name,
        Composite(_dropout),
        Exactness.EXACT_IF_INDEPENDENT,
        "channels are dropped whole; their common mask's covariance is not carried",
        modules=() if _module is None else (_module,),
    )
add_rule("alpha_dropout", Composite(_alpha_dropout), Exactness.EXACT, "element masks", modules=(nn.AlphaDropout,))
add_rule(
    "feature_alpha_dropout",
    Composite(_alpha_dropout),
    Exactness.EXACT_IF_INDEPENDENT,
    "channels are dropped whole; their common mask's covariance is not carried",
    modules=(nn.FeatureAlphaDropout,),
)
