"""The oracle of the rules: seeded Monte Carlo through the plain operation, with its own standard error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rvconvert import RandomVariable

SAMPLES = 8192
SAMPLES_WITHOUT_VMAP = 2048
DEVIATIONS = 6.0  # of the oracle's own standard error


class Constants:
    """Weights, masks and modules of a case: made once, in the order they are asked for, then the same at each call."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.scale, self.dtype = scale, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.made: list[Any] = []
        self.next = 0

    def start(self) -> Constants:
        self.next = 0
        return self

    def _constant(self, make: Callable[[], Any]) -> Any:
        if self.next == len(self.made):
            self.made.append(make())
        self.next += 1
        return self.made[self.next - 1]

    def __call__(self, *shape: int) -> torch.Tensor:
        """Normal numbers, times the scale of the case."""
        return self._constant(
            lambda: (self.scale * torch.randn(shape, dtype=torch.float64, generator=self.generator)).to(self.dtype)
        )

    def positive(self, *shape: int) -> torch.Tensor:
        return self._constant(lambda: torch.rand(shape, dtype=torch.float64, generator=self.generator).add(0.5).to(self.dtype))

    def mask(self, *shape: int) -> torch.Tensor:
        return self._constant(lambda: torch.rand(shape, generator=self.generator) > 0.5)

    def index(self, high: int, *shape: int) -> torch.Tensor:
        return self._constant(lambda: torch.randint(high, shape, generator=self.generator))

    def tensor(self, *values: Any) -> torch.Tensor:
        return self._constant(lambda: torch.tensor(values))

    def module(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module with its own initial weights, times the scale of the case."""

        def build() -> nn.Module:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                module = make().to(self.dtype)
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.mul_(self.scale)
                    for name, buffer in module.named_buffers():
                        if name.endswith("running_var"):
                            buffer.uniform_(0.5, 2.0)
                        elif name.endswith("running_mean"):
                            buffer.normal_()
                return module

        return self._constant(build)


@dataclass(frozen=True)
class Case:
    """One call of an operation, as the oracle and the laws run it.

    Attributes:
        rule: the name of the rule under test.
        call: ``call(w, *inputs)`` with ``w`` the constants and one input for each of ``shapes``.
        shapes: shapes of the random inputs.
        var: variances are drawn up to this; ``spread`` and ``offset`` scale and shift the means.
        mean_error, var_error: for an approximate rule, the error allowed beside the oracle's own, relative to the
            deviation and to the variance of the element or, where that is greater, of the average element.
        batch: the dim of each input that is the batch, or None where there is none or samples are mixed.
        kinked: the function jumps, so that dense quadrature is not to be trusted beyond 1e-3.
        modules: modules that are the same operation.
        composed: several operations with correlated values between them, of which the laws alone are asked.
        random: the operation draws by itself (dropout).
        scales: of the constants.
        label: what is particular to the case.
    """

    rule: str
    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    var: float = 0.5
    spread: float = 1.0
    offset: float = 0.0
    mean_error: float = 0.0
    var_error: float = 0.0
    batch: int | None = 0
    kinked: bool = False
    modules: tuple[Callable[[], nn.Module], ...] = ()
    composed: bool = False
    random: bool = False
    label: str = ""
    scales: tuple[float, ...] = (1.0, 3.0)

    def __str__(self) -> str:
        return f"{self.rule}[{self.label}]" if self.label else self.rule

    def moments(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Means and variances of the inputs; about one element in eight does not vary at all."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for shape in self.shapes:
            mean = self.offset + self.spread * torch.randn(shape, dtype=torch.float64, generator=generator)
            var = self.var * torch.rand(shape, dtype=torch.float64, generator=generator)
            var = torch.where(torch.rand(shape, generator=generator) < 0.125, 0.0, var)
            made.append((mean.to(dtype), var.to(dtype)))
        return made

    def run(self, constants: Constants, inputs: list[Any]) -> Any:
        return self.call(constants.start(), *inputs)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a plain result, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in tensors(each)]
    return []


def leaves(value: Any) -> list[Any]:
    """The tensors and random variables of a result, in order."""
    if isinstance(value, (torch.Tensor, RandomVariable)):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for each in value for t in leaves(each)]
    return []


@dataclass
class Estimate:
    """Sample moments of one output, and how far they may be off: six of their standard errors."""

    mean: torch.Tensor
    var: torch.Tensor
    mean_error: torch.Tensor = field(repr=False)
    var_error: torch.Tensor = field(repr=False)


def monte_carlo(case: Case, constants: Constants, moments: list[tuple[torch.Tensor, torch.Tensor]]) -> list[Estimate]:
    """Moments of each floating-point (or boolean) output of a case under independent Gaussian inputs."""
    generator = torch.Generator().manual_seed(7)
    case.run(constants, [m.clone() for m, _ in moments])  # constants are made outside vmap

    def draw(samples: int) -> list[torch.Tensor]:
        return [m + v.sqrt() * torch.randn(samples, *m.shape, dtype=m.dtype, generator=generator) for m, v in moments]

    def once(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(t.to(torch.float64) for t in tensors(case.run(constants, list(inputs))) if _counts(t))

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        try:
            results = torch.func.vmap(once, randomness="different")(*draw(SAMPLES))
        except Exception:
            draws = [once(*inputs) for inputs in zip(*draw(SAMPLES_WITHOUT_VMAP), strict=True)]
            results = tuple(torch.stack(each) for each in zip(*draws, strict=True))
    return [_estimate(x) for x in results]


def monte_carlo_of(
    function: Callable[..., torch.Tensor], moments: list[tuple[torch.Tensor, torch.Tensor]], seed: int = 7
) -> Estimate:
    """Moments of one function's result under independent Gaussian inputs, the function vectorised over the draws."""
    generator = torch.Generator().manual_seed(seed)
    draws = [m + v.sqrt() * torch.randn(SAMPLES, *m.shape, dtype=m.dtype, generator=generator) for m, v in moments]
    with torch.no_grad():
        return _estimate(torch.func.vmap(function)(*draws))


def _counts(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.dtype == torch.bool


def _estimate(x: torch.Tensor) -> Estimate:
    n = x.shape[0]
    centre = x.mean(0)
    deviation = torch.where(torch.isinf(x), 0.0, x - centre)  # a masked -inf stays one
    var = deviation.square().sum(0) / (n - 1)
    fourth = deviation.pow(4).mean(0)
    # A rare event has a standard error of its own that few samples, or none, have seen.
    rare = 8 * deviation.abs().amax(0) / n
    if _indicator(x):
        rare = torch.full_like(centre, 8 / n)
    return Estimate(
        centre,
        var,
        DEVIATIONS * (var / n).sqrt() + rare,
        DEVIATIONS * ((fourth - var.square()).clamp(min=0) / n).sqrt() + rare * deviation.abs().amax(0).clamp(min=_indicator(x)),
    )


def _indicator(x: torch.Tensor) -> float:
    """1 for samples of an indicator, else 0."""
    return float(((x == 0) | (x == 1)).all())
