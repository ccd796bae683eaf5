"""Losses that read the whole distribution of an output, not its mean alone."""

from __future__ import annotations

import torch

from rvconvert.core.random_variable import RandomVariable
from rvconvert.errors import ConversionError

__all__ = ["expected_squared_error", "optimal_sigma_nll"]


def expected_squared_error(y: RandomVariable, x: torch.Tensor) -> torch.Tensor:
    """E[(y - x)^2] = (mean - x)^2 + var, averaged over elements: the bias-variance decomposition.

    ``F.mse_loss`` of a sample estimates it with noise; here it is exact as far as mean and variance are.

    Args:
        y: the reconstruction; convert with ``output="distribution"``.
        x: the data, shaped like ``y``.

    Returns:
        A scalar, in squared units of ``x``.

    Raises:
        ConversionError: ``y`` is not a RandomVariable, or the shapes differ.
    """
    return _squared_errors(y, x, "expected_squared_error").mean()


def optimal_sigma_nll(y: RandomVariable, x: torch.Tensor) -> torch.Tensor:
    """D / 2 log mean((mean - x)^2 + var): a Gaussian likelihood at its best shared deviation, up to a constant.

    The deviation sigma that maximises the likelihood is the root mean square error, so that no weight between it and a KL
    divergence is left to choose: the loss is this plus the KL divergence in nats, with weight 1. Source: sigma-VAE (Rybkin,
    Daniilidis & Levine, ICML 2021, arXiv 2006.13202), whose mean squared error of one sample is the exact expectation here.

    Args:
        y: the reconstruction, (N, ...); convert with ``output="distribution"``.
        x: the data, shaped like ``y``.

    Returns:
        A scalar in nats a sample (D elements each), less D / 2 (1 + log(2 pi)); the deviation is shared by the batch.

    Raises:
        ConversionError: ``y`` is not a RandomVariable, or the shapes differ.
    """
    errors = _squared_errors(y, x, "optimal_sigma_nll")
    elements = errors[0].numel() if errors.ndim else 1
    # A perfect batch would be infinitely likely: its deviation is taken as one unit in the last place of a value of 1.
    return elements / 2 * errors.mean().clamp_min(torch.finfo(errors.dtype).eps ** 2).log()


def _squared_errors(y: RandomVariable, x: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(y, RandomVariable):
        raise ConversionError(
            f"{name} takes a RandomVariable, not {type(y).__name__}; convert with output='distribution' to have the model return one"
        )
    if y.shape != x.shape:
        raise ConversionError(f"{name}: the output is {tuple(y.shape)}, the data {tuple(x.shape)}")
    return (y.mean - x).square() + y.var
