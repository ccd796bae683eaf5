"""Laws that are not Gaussian, as nodes and weights: what a function of such a variable is integrated over."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rvconvert.moments.quadrature import legendre

if TYPE_CHECKING:
    from collections.abc import Callable

    from rvconvert.core.random_variable import Density, RandomVariable

__all__ = ["UNIFORM", "Bernoulli", "Beta", "Gamma", "Uniform", "moments_under", "open_interval"]

Nodes = tuple[Tensor, Tensor]
_UNIFORM_NODES = 48
_PANEL_NODES = 14
_JOINT_NODES = 512
_MOST_JOINT = 1 << 22  # numbers in the joint nodes of one root: 16 MiB of float32
_TAIL = -18.4  # log of the probability that a tail may hold


def open_interval(u: Any, margin: float = 0.5) -> Any:
    """``u``, a tensor or a random variable, kept off 0 and 1, where logarithms end, by ``margin`` of its dtype's steps at 1."""
    step = margin * torch.finfo(u.dtype).eps
    return torch.clamp(u, step, 1 - step)


def moments_under(function: Callable[[Tensor], Tensor], root: RandomVariable, joint: bool) -> tuple[Tensor, Tensor]:
    """Mean and variance of ``function(x)``, x of the law of ``root``; its gradients call the function again.

    Args:
        function: maps a tensor of the root's shape to a tensor.
        root: a variable that has a density.
        joint: the function joins elements of the root, which then vary together on the nodes.
    """
    density = root.density
    assert density is not None

    def integrate() -> tuple[Tensor, Tensor]:
        nodes, weights = (density.joint_nodes(root) if joint else None) or density.nodes(root)
        values = _on_nodes(function, nodes)
        values = values if values.is_floating_point() else values.to(nodes.dtype)
        weights = weights.to(values.dtype)
        if weights.ndim == 1:
            weights = weights.reshape(-1, *(1,) * (values.ndim - 1))
        mean = (weights * values).sum(0)
        return mean, (weights * (values - mean).square()).sum(0)

    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(integrate, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return integrate()


def _on_nodes(function: Callable[[Tensor], Tensor], nodes: Tensor) -> Tensor:
    try:
        return torch.vmap(function)(nodes)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return torch.stack([function(each) for each in nodes.unbind(0)])  # a real error comes again


class Uniform:
    """Uniform on (0, 1), every element alike; its nodes crowd at the ends, where quantile functions go to infinity."""

    name = "uniform"

    def nodes(self, root: RandomVariable) -> Nodes:
        """Gauss-Legendre in v with u = v^3 (10 - 15 v + 6 v^2), which flattens a logarithm at either end."""
        mean = root.mean
        u, weights = (torch.tensor(x, dtype=mean.dtype, device=mean.device) for x in _uniform_rule())
        # Eight steps, so that 1 - u and u - 1/2 keep digits, and the roots and logarithms of these finite slopes.
        return open_interval(u, 8).reshape(-1, *(1,) * mean.ndim).expand(-1, *mean.shape), weights

    def joint_nodes(self, root: RandomVariable) -> Nodes | None:
        """A Latin hypercube: on each of n equal parts of (0, 1) every element has one node, in an order of its own."""
        mean = root.mean
        count = min(_JOINT_NODES, _MOST_JOINT // max(mean.numel(), 1)) // 2 * 2
        if count < 32:
            return None
        u = (_orders(count, mean.numel()).to(mean) + 0.5) / count
        return u.reshape(count, *mean.shape), torch.full((count,), 1 / count, dtype=mean.dtype, device=mean.device)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Density:
        """The density of the elements that ``move`` selects or moves."""
        return self

    def below(self, value: Tensor) -> Tensor | None:
        """P(X < value)."""
        return torch.clamp(value, 0.0, 1.0)


UNIFORM = Uniform()


@lru_cache
def _uniform_rule() -> tuple[list[float], list[float]]:
    found = [(0.5 * (1 + x), 0.5 * w) for x, w in legendre(_UNIFORM_NODES)]
    u = [v**3 * (10 - 15 * v + 6 * v * v) for v, _ in found]
    weights = [w * 30 * (v * (1 - v)) ** 2 for v, w in found]
    total = sum(weights)
    return u, [w / total for w in weights]


@torch.compiler.assume_constant_result
def _orders(count: int, elements: int) -> Tensor:
    """(count, elements): each column a fixed random order of 0 .. count - 1; second half mirrors the first."""
    return _kept_orders(count, elements)


@lru_cache(maxsize=4)
def _kept_orders(count: int, elements: int) -> Tensor:
    with torch.inference_mode(False):  # what is kept must serve everywhere
        generator = torch.Generator().manual_seed(0)
        half = torch.rand(count // 2, elements, generator=generator).argsort(0)
        mirrored = torch.rand(count // 2, elements, generator=generator) < 0.5
        low = torch.where(mirrored, count - 1 - half, half)
        return torch.cat((low, count - 1 - low))


class _Parametric:
    """A density whose parameters are tensors of the root's shape, by panels of Gauss-Legendre nodes."""

    name = ""

    def __init__(self, *parameters: Tensor) -> None:
        self.parameters = parameters

    def nodes(self, root: RandomVariable) -> Nodes:
        """(n, *shape) each: values and weights."""
        raise NotImplementedError

    def joint_nodes(self, root: RandomVariable) -> Nodes | None:
        """None: its elements are integrated over one by one."""
        return None

    def moved(self, move: Callable[[Tensor], Tensor]) -> Density:
        """The density of the elements that ``move`` selects or moves."""
        return type(self)(*(move(x) for x in self.parameters))

    def below(self, value: Tensor) -> Tensor | None:
        """P(X < value) where there is a closed form."""
        return None


def _panels(ends: list[Tensor], log_density: Callable[[Tensor], Tensor]) -> Nodes:
    """Nodes on panels between ``ends`` and weights by a density known up to a factor; nodes take no gradient."""
    nodes, widths = [], []
    for left, right in pairwise(ends):
        for x, w in legendre(_PANEL_NODES):
            nodes.append(0.5 * (left + right) + 0.5 * (right - left) * x)
            widths.append(0.5 * (right - left) * w)
    t, width = torch.stack(nodes).detach(), torch.stack(widths).detach()
    log_weight = log_density(t) + torch.where(width > 0, width, torch.finfo(t.dtype).tiny).log()
    return t, torch.softmax(log_weight, 0)


def _ends(low: Tensor, centre: Tensor, high: Tensor) -> list[Tensor]:
    """Panels that are short about the centre and reach to both tails."""
    below = centre - torch.clamp((centre - low) / 2, max=3.0)
    above = centre + torch.clamp((high - centre) / 2, max=3.0)
    return [low, below, centre, above, high]


class Gamma(_Parametric):
    """Gamma(alpha) of rate 1, integrated over t = log x with density exp(alpha t - e^t)."""

    name = "Gamma"

    def nodes(self, root: RandomVariable) -> Nodes:
        """(n, *shape) each: nodes and weights, which carry the gradient in alpha."""
        (alpha,) = self.parameters
        alpha = alpha.clamp(min=1e-3)
        centre = (alpha + 0.3).log()
        low = (_TAIL + torch.lgamma(alpha + 1)) / alpha  # P(X < x) <= x^alpha / Gamma(alpha + 1)
        high = (alpha + 8 * alpha.sqrt() + 20).log()
        t, weights = _panels(_ends(low, centre, high), lambda t: alpha * t - t.exp())
        return t.exp().clamp(min=torch.finfo(t.dtype).tiny), weights


class Beta(_Parametric):
    """Beta(a, b), as each element of a Dirichlet variable, integrated over t = logit x."""

    name = "Beta"

    def nodes(self, root: RandomVariable) -> Nodes:
        """(n, *shape) each: nodes and weights, which carry the gradient in a and b."""
        a, b = (x.clamp(min=1e-3) for x in self.parameters)
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        centre = (a / b).log()
        low = torch.minimum((_TAIL + a.log() + log_beta) / a, centre - 1)
        high = torch.maximum(-(_TAIL + b.log() + log_beta) / b, centre + 1)

        def log_density(t: Tensor) -> Tensor:
            return a * torch.nn.functional.logsigmoid(t) + b * torch.nn.functional.logsigmoid(-t)

        t, weights = _panels(_ends(low, centre, high), log_density)
        return open_interval(torch.sigmoid(t)), weights


class Bernoulli(_Parametric):
    """1 with probability p, else 0: two nodes."""

    name = "Bernoulli"

    def nodes(self, root: RandomVariable) -> Nodes:
        """(2, *shape) each: the two values and their probabilities."""
        (p,) = self.parameters
        return torch.stack((torch.zeros_like(p), torch.ones_like(p))), torch.stack((1 - p, p))
