"""The rules, by family. Importing this package fills the rule table."""

from rvconvert.rules import (
    activation,
    arithmetic,
    attention,
    draws,
    dropout,
    extrema,
    linear,
    linearize,
    loss,
    noise,
    normalization,
    pooling,
    recurrent,
    reduction,
    resampling,
    shape,
)

__all__ = [
    "activation",
    "arithmetic",
    "attention",
    "draws",
    "dropout",
    "extrema",
    "linear",
    "linearize",
    "loss",
    "noise",
    "normalization",
    "pooling",
    "recurrent",
    "reduction",
    "resampling",
    "shape",
]
