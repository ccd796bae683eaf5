"""Noise sources: how a random variable starts in each covariance mode."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from rvconvert.core.mode import MODES, Mode, Sampler
from rvconvert.core.random_variable import Density, RandomVariable, Settings
from rvconvert.errors import ConversionError
from rvconvert.rules.density import UNIFORM, open_interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "all_entering",
    "entering",
    "known_moments",
    "nth_source",
    "standard_normal",
    "standard_uniform",
]


def _independent(zeros: torch.Tensor, settings: Settings) -> RandomVariable:
    return RandomVariable._make(zeros, torch.ones_like(zeros), settings)


MODES["independent"] = Mode(_independent, needs_rules=True)


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
    if settings.covariance not in MODES:
        raise ConversionError(f"covariance={settings.covariance!r} is not one of {', '.join(map(repr, MODES))}")
    return MODES[settings.covariance].normal(zeros, settings).derived(latent=True)


def standard_uniform(zeros: torch.Tensor, settings: Settings) -> RandomVariable:
    """A variable uniform on (0, 1) shaped like ``zeros``; on paths it is the normal law's probability of each path's noise.

    So the paths of a pair hold u and 1 - u, and whatever quantile function the model's own code applies is antithetic.
    """
    if settings.needs_rules:
        half = torch.full_like(zeros, 0.5)
        made = RandomVariable._make(half, torch.full_like(zeros, 1 / 12), settings)
        return made.derived(latent=True).distributed(UNIFORM)
    uniform = MODES[settings.covariance].uniform
    if uniform is not None:
        return uniform(zeros, settings).derived(latent=True)
    noise: Any = standard_normal(zeros, settings)
    u: RandomVariable = open_interval(torch.special.ndtr(noise))
    return u.derived(latent=True)


def known_moments(
    mean: torch.Tensor, var: torch.Tensor, sampler: Sampler, settings: Settings, density: Density | None = None
) -> RandomVariable:
    """A variable of a law without a quantile function: its moments, and ``sampler(n, generator)`` for its paths.

    Args:
        mean: expected values.
        var: variances, same shape.
        sampler: draws (n, *shape) independent values.
        settings: the covariance mode.
        density: its law as nodes, if it has them.
    """
    if settings.needs_rules:
        return RandomVariable._make(mean, var, settings).derived(latent=True).distributed(density)
    drawn = MODES[settings.covariance].drawn
    if drawn is None:
        raise ConversionError(f"covariance={settings.covariance!r} has no paths for a law without a quantile function")
    return drawn(sampler, torch.zeros_like(mean), settings).derived(latent=True)
