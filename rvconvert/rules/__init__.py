"""The rules, by family. Importing this package fills the rule table."""

from rvconvert.rules import (
    activation,
    arithmetic,
    dropout,
    linear,
    noise,
    normalization,
    pooling,
    reduction,
    resampling,
    shape,
)

__all__ = [
    "activation",
    "arithmetic",
    "dropout",
    "linear",
    "noise",
    "normalization",
    "pooling",
    "reduction",
    "resampling",
    "shape",
]
