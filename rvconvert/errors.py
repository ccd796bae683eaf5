"""Errors: what was refused, where, why, and the next line to type."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rvconvert.report import Row

__all__ = [
    "CheckpointError",
    "ConversionError",
    "NoReparameterizationError",
    "NonGaussianError",
    "TracingError",
    "TransferError",
    "UnsupportedOperationError",
]


class ConversionError(Exception):
    """Base of every error that rvconvert raises about a model, a call or a file."""


class UnsupportedOperationError(ConversionError, TypeError):
    """One or more operations on a random variable have no rule.

    ``rows`` holds one report row for each of them, with module path, file:line, reason and hint.
    """

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class NonGaussianError(ConversionError):
    """The model draws from a distribution that mean and variance cannot stand for."""


class NoReparameterizationError(ConversionError):
    """No Gaussian noise source reaches the output, so there is nothing to convert."""


class TracingError(ConversionError):
    """The model could not be captured as a graph that replays equal to eager execution."""


class TransferError(ConversionError):
    """Weights do not fit the target model; every difference is listed."""


class CheckpointError(ConversionError):
    """A file is missing, truncated, foreign, or would need unpickling code to be read."""
