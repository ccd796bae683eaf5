"""Noise sources: a draw from a Gaussian is replaced by the random variable that it draws from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from rvconvert.core.random_variable import RandomVariable, Settings
from rvconvert.errors import ConversionError

__all__ = ["GAUSSIAN_SOURCES", "NON_GAUSSIAN", "SOURCES", "all_entering", "entering", "nth_source", "standard_normal"]

# How a standard normal variable of a given shape starts in each covariance mode: source(zeros, settings).
SOURCES: dict[str, Callable[[torch.Tensor, Settings], RandomVariable]] = {}


def _independent(zeros: torch.Tensor, settings: Settings) -> RandomVariable:
    return RandomVariable._make(zeros, torch.ones_like(zeros), settings)


SOURCES["independent"] = _independent


def nth_source(settings: Settings, index: int) -> Settings:
    """The settings of the index-th noise source of a model: a fixed seed must not make sources equal."""
    if index == 0:
        return settings
    return replace(settings, source=index, seed=None if settings.seed is None else settings.seed + 1_000_003 * index)


def entering(x: RandomVariable, settings: Settings) -> RandomVariable:
    """A variable that a person gave by its moments, in the covariance mode and with the rules of ``settings``."""
    if type(x) is not RandomVariable:
        return x
    if settings.covariance == "independent":
        return RandomVariable._make(x.mean, x.var, settings).derived(latent=True)
    random = x.var > 0
    std = torch.where(random, torch.where(random, x.var, 1).sqrt(), 0)  # a finite gradient where var = 0
    noise: Any = standard_normal(torch.zeros_like(x.mean), settings)
    return noise * std + x.mean  # type: ignore[no-any-return]


def all_entering(values: Iterable[Any], settings: Settings) -> Iterator[Any]:
    """``values`` with every random variable among them entering, each as a source of its own; the seed is the first one's."""
    index = 0
    for value in values:
        if isinstance(value, RandomVariable):
            value = entering(value, replace(nth_source(settings, index), source=index - 1))
            index -= 1
        yield value


def standard_normal(zeros: torch.Tensor, settings: Settings) -> RandomVariable:
    """A standard normal random variable shaped like ``zeros``, in the covariance mode of ``settings``."""
    if settings.covariance not in SOURCES:
        raise ConversionError(f"covariance={settings.covariance!r} is not one of {', '.join(map(repr, SOURCES))}")
    return SOURCES[settings.covariance](zeros, settings).derived(latent=True)


def randn(*size: Any, settings: Settings, generator: Any = None, **options: Any) -> RandomVariable:
    """``torch.randn`` as a random variable."""
    return standard_normal(torch.zeros(*size, **options), settings)


def randn_like(input: Any, *, settings: Settings, generator: Any = None, **options: Any) -> RandomVariable:
    """``torch.randn_like`` as a random variable."""
    options.pop("requires_grad", None)
    return standard_normal(torch.zeros_like(input, **options), settings)


def new_normal(input: Any, mean: Any = 0.0, std: Any = 1.0, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``Tensor.normal_`` as a random variable: the tensor's contents do not matter, only its shape."""
    noise = standard_normal(torch.zeros_like(input), settings)
    if isinstance(std, (int, float)) and std == 1 and isinstance(mean, (int, float)) and mean == 0:
        return noise
    return noise * std + mean


def normal(
    mean: Any = 0.0,
    std: Any = 1.0,
    size: Any = None,
    *,
    settings: Settings,
    generator: Any = None,
    out: Any = None,
    **options: Any,
) -> RandomVariable:
    """``torch.normal`` as a random variable; the moments of a random mean or deviation add up."""
    if size is not None:
        noise = standard_normal(torch.zeros(size, **options), settings)
    else:
        tensors = [x for x in (mean, std) if isinstance(x, (torch.Tensor, RandomVariable))]
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        noise = standard_normal(torch.zeros(shape, dtype=tensors[0].dtype, device=tensors[0].device), settings)
    return noise * std + mean


GAUSSIAN_SOURCES: dict[Any, Callable[..., RandomVariable]] = {
    torch.randn: randn,
    torch.randn_like: randn_like,
    torch.normal: normal,
    torch.Tensor.normal_: new_normal,
}

NON_GAUSSIAN: dict[Any, str] = {
    torch.rand: "uniform",
    torch.rand_like: "uniform",
    torch.Tensor.uniform_: "uniform",
    torch.bernoulli: "Bernoulli",
    torch.Tensor.bernoulli: "Bernoulli",
    torch.Tensor.bernoulli_: "Bernoulli",
    torch.multinomial: "categorical",
    torch.Tensor.multinomial: "categorical",
    torch.poisson: "Poisson",
    torch.binomial: "binomial",
    torch.Tensor.exponential_: "exponential (as in Gumbel)",
    torch.Tensor.cauchy_: "Cauchy",
    torch.Tensor.log_normal_: "log-normal",
    torch.Tensor.geometric_: "geometric",
    torch._standard_gamma: "Gamma",
    torch._sample_dirichlet: "Dirichlet",
    F.gumbel_softmax: "Gumbel-softmax",
}
