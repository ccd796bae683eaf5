"""Draws: every torch function that draws, the law it draws from, and the random variable that this is.

One row a function. A law with a quantile function is written as that function of a uniform (or normal) variable, in
torch's own operations, so that each covariance mode carries it as it carries the model's code. A law without one gives
its mean and variance and a sampler for its paths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.core.random_variable import RandomVariable, Settings, is_in_place
from rvconvert.core.registry import FunctionTable, operation_name
from rvconvert.errors import ConversionError
from rvconvert.rules.density import Bernoulli, Beta, Gamma
from rvconvert.rules.noise import known_moments, standard_normal, standard_uniform

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CATEGORICAL", "DRAWS", "ONE_HOT", "Draw", "Law", "one_hot_categorical_like"]


@dataclass(frozen=True)
class Law:
    """A probability law.

    Attributes:
        name: as a person calls it (``"Gamma"``).
        paths: in one line, how the paths of ``covariance="sampled"`` are drawn.
        refusal: why no random variable stands for a draw, and what to do instead; empty where one does.
        mean: the value that stands for a draw that is no latent: given the call, a tensor; None draws it as it is.
    """

    name: str
    paths: str = ""
    refusal: str = ""
    mean: Callable[..., Tensor] | None = None


_PAIRS = "antithetic pairs: u and 1 - u through the law's quantile function"
_ALONE = "independent paths: the law has no quantile function in torch"

NORMAL = Law("Gaussian", "antithetic pairs: +e and -e")
UNIFORM = Law("uniform", _PAIRS)
EXPONENTIAL = Law("exponential", _PAIRS)
LOG_NORMAL = Law("log-normal", _PAIRS)
BERNOULLI = Law("Bernoulli", _PAIRS)
GUMBEL_SOFTMAX = Law("Gumbel-softmax", _PAIRS)
GAMMA = Law("Gamma", _ALONE)
DIRICHLET = Law("Dirichlet", _ALONE)
POISSON = Law("Poisson", _ALONE)
BINOMIAL = Law("binomial", _ALONE)
GEOMETRIC = Law("geometric", _ALONE)
CAUCHY = Law(
    "Cauchy",
    refusal="a Cauchy variable has neither a mean nor a variance; a Student t with more than 4 degrees of freedom has both: "
    "torch.distributions.StudentT(5, loc, scale).rsample()",
    mean=lambda input, median=0.0, sigma=1.0, **_: torch.full_like(input, median),
)
ONE_HOT = Law("one-hot categorical", _ALONE)
CATEGORICAL = Law(
    "categorical",
    refusal="an index has no mean and no gradient; F.gumbel_softmax(logits, hard=True) draws the same category as a one-hot "
    "vector that has both, and F.one_hot(index, n) has a mean",
)
INTEGER = Law("integers", refusal="an integer draw is an index or a count, not a latent; it is drawn as it is")


@dataclass(frozen=True)
class Draw:
    """One torch function that draws.

    Attributes:
        func: the torch function.
        law: what it draws from.
        random_variable: called with ``func``'s own arguments and ``settings=``, the random variable that it draws from.
            Raises ConversionError where the law has no moments or no gradient.
    """

    func: Callable[..., Any]
    law: Law
    random_variable: Callable[..., RandomVariable]

    @property
    def is_gaussian(self) -> bool:
        """The law is the Gaussian one."""
        return self.law is NORMAL

    @property
    def can_be_latent(self) -> bool:
        """A random variable can stand for the draw."""
        return not self.law.refusal

    def at_mean(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The draw at its mean: what ``func(*args, **kwargs)`` gives, in shape, dtype and in-place write.

        A Cauchy draw is taken at its median; integers, which have no mean of their own kind, are drawn as they are.
        """
        if self.law.refusal and self.law.mean is None:
            drawn: Tensor = func(*args, **kwargs)
            return drawn
        if self.law.mean is not None:
            value = self.law.mean(*args, **kwargs)
        else:
            value = self.random_variable(*args, **kwargs, settings=Settings()).mean
        if is_in_place(func, kwargs):
            with torch.no_grad():
                written: Tensor = args[0].copy_(value)
            return written
        return value


# ---- standard variables of a call's shape -------------------------------------------------------------------------


def _zeros(args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """Zeros of the size that a call such as ``torch.rand(*size, dtype=...)`` names."""
    options = {k: v for k, v in options.items() if k not in ("generator", "names", "requires_grad", "pin_memory", "out")}
    return torch.zeros(*args, **options)


def _zeros_like(input: Any, options: dict[str, Any]) -> Tensor:
    options = {k: v for k, v in options.items() if k not in ("generator", "requires_grad")}
    return torch.zeros_like(input, **options)


def _at_mean(value: Any) -> Any:
    """A parameter that must be plain: the mean of a random one."""
    return value.mean if isinstance(value, RandomVariable) else value


def _var_of(value: Any) -> Tensor | float:
    """What a random parameter adds (law of total variance): 0 of a plain one, and of paths, which have their own each."""
    return value.var if type(value) is RandomVariable else 0.0


def _latent(x: Any) -> RandomVariable:
    """``x``, made of a draw in torch's own operations, as the draw that it is."""
    return x.derived(origin=x.origin, latent=True)  # type: ignore[no-any-return]


def _is(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and value == number


# ---- Gaussian ------------------------------------------------------------------------------------------------------


def randn(*size: Any, settings: Settings, **options: Any) -> RandomVariable:
    """``torch.randn`` as a random variable."""
    return standard_normal(_zeros(size, options), settings)


def randn_like(input: Any, *, settings: Settings, **options: Any) -> RandomVariable:
    """``torch.randn_like`` as a random variable."""
    return standard_normal(_zeros_like(input, options), settings)


def normal_(input: Any, mean: Any = 0.0, std: Any = 1.0, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``Tensor.normal_`` as a random variable: the tensor's contents do not matter, only its shape."""
    noise = standard_normal(torch.zeros_like(input), settings)
    return noise if _is(mean, 0) and _is(std, 1) else noise * std + mean


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
        return standard_normal(_zeros((size,), options), settings) * std + mean
    tensors = [x for x in (mean, std) if isinstance(x, (Tensor, RandomVariable))]
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    zeros = torch.zeros(shape, dtype=tensors[0].dtype, device=tensors[0].device)
    return standard_normal(zeros, settings) * std + mean


def log_normal_(input: Any, mean: float = 1.0, std: float = 2.0, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``Tensor.log_normal_`` as a random variable; ``mean`` and ``std`` are those of the logarithm."""
    logarithm: Any = normal_(input, mean, std, settings=settings)
    return _latent(torch.exp(logarithm))


# ---- uniform, and what is a function of a uniform variable -------------------------------------------------------------


def rand(*size: Any, settings: Settings, **options: Any) -> RandomVariable:
    """``torch.rand`` as a random variable."""
    return standard_uniform(_zeros(size, options), settings)


def rand_like(input: Any, *, settings: Settings, **options: Any) -> RandomVariable:
    """``torch.rand_like`` as a random variable."""
    return standard_uniform(_zeros_like(input, options), settings)


def uniform_(input: Any, *bounds: Any, settings: Settings, generator: Any = None, **named: Any) -> RandomVariable:
    """``Tensor.uniform_`` as a random variable; ``from`` is a keyword of Python, so the bounds have no names here."""
    low, high = (bounds[i] if i < len(bounds) else named.get(name, float(i)) for i, name in enumerate(("from", "to")))
    u: Any = standard_uniform(torch.zeros_like(input), settings)
    return u if _is(low, 0) and _is(high, 1) else u * (high - low) + low


def exponential_(input: Any, lambd: float = 1.0, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``Tensor.exponential_`` as a random variable: -log(1 - u)/lambd."""
    u: Any = standard_uniform(torch.zeros_like(input), settings)
    return _latent(-torch.log1p(-u) / lambd)


def bernoulli(input: Any, p: Any = None, *, settings: Settings, generator: Any = None, out: Any = None) -> RandomVariable:
    """``torch.bernoulli(input)`` of probabilities, or of one ``p`` in the shape of ``input``, as a random variable."""
    return _bernoulli(input if p is None else torch.full_like(input, p), settings)


def bernoulli_(input: Any, p: Any = 0.5, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``Tensor.bernoulli_`` as a random variable; ``p`` a number or a tensor."""
    probability = p if isinstance(p, RandomVariable) else torch.as_tensor(p, device=input.device)
    return _bernoulli(probability.to(input.dtype).expand(input.shape), settings)


def _bernoulli(p: Any, settings: Settings) -> RandomVariable:
    p = p if p.is_floating_point() else p.to(torch.get_default_dtype())
    if settings.needs_rules:
        p = _at_mean(p)
        return known_moments(p, p * (1 - p), lambda n, g: p, settings, Bernoulli(p))
    u: Any = standard_uniform(torch.zeros_like(p), settings)
    return _latent((u < p).to(p.dtype))


def gumbel_softmax(
    logits: Any, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1, *, settings: Settings
) -> RandomVariable:
    """``F.gumbel_softmax`` as a random variable.

    Soft: the softmax of logits and Gumbel noise, over joint nodes. Hard: one-hot with the probabilities softmax(logits)
    (the Gumbel-max theorem), exact, their own gradient in the place of the straight-through one.
    """
    if hard and settings.needs_rules:
        found: Any = torch.softmax(logits, dim)
        p = _at_mean(found)
        return known_moments(p, p * (1 - p), lambda n, g: p, settings, Bernoulli(p))
    u: Any = standard_uniform(torch.zeros_like(logits), settings)
    soft: Any = torch.softmax((logits - torch.log(-torch.log(u))) / tau, dim)
    if not hard:
        return _latent(soft)
    index: Any = torch.argmax(soft, dim, keepdim=True)
    one_hot: Any = torch.scatter(torch.zeros_like(soft), dim, index, 1.0)
    return _latent(one_hot - soft.detach() + soft)


def one_hot_categorical_like(index: Tensor, probs: Tensor) -> Tensor:
    """One-hot vectors of the categories ``index`` that were drawn from the rows of ``probs``, one of each."""
    return F.one_hot(index, probs.shape[-1])


def one_hot_categorical(index: Tensor, probs: Any, *, settings: Settings) -> RandomVariable:
    """The same as a random variable: its mean has no gradient, which a model adds by itself, straight through."""
    weights = _at_mean(probs)
    weights = weights / weights.sum(-1, keepdim=True)
    p = weights.reshape(*index.shape, weights.shape[-1])

    def sampler(n: int, generator: torch.Generator | None) -> Tensor:
        drawn = torch.multinomial(weights.detach().reshape(-1, weights.shape[-1]), n, True, generator=generator)
        return F.one_hot(drawn.T, weights.shape[-1]).to(p.dtype).reshape(n, *p.shape)

    return known_moments(p.detach(), p * (1 - p), sampler, settings, Bernoulli(p.detach()))


# ---- laws without a quantile function ---------------------------------------------------------------------------------


def _copies(x: Any, n: int) -> Tensor:
    """(n, *shape): a parameter n times, or as it is on each of n paths."""
    on_paths = getattr(x, "paths", None) if getattr(x, "settings", None) and x.settings.covariance == "sampled" else None
    return on_paths if on_paths is not None else _at_mean(x).expand(n, *x.shape)


def standard_gamma(input: Any, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``torch._standard_gamma`` as a random variable: mean and variance are the concentration."""
    alpha, more = _at_mean(input), _var_of(input)
    law = None if isinstance(input, RandomVariable) else Gamma(alpha)
    return known_moments(alpha, alpha + more, lambda n, g: torch._standard_gamma(_copies(input, n), generator=g), settings, law)


def dirichlet(input: Any, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``torch._sample_dirichlet`` as a random variable: each element is Beta(a, total - a)."""
    alpha: Tensor = _at_mean(input)
    total = alpha.sum(-1, keepdim=True)
    mean = alpha / total
    rest = total - alpha

    def sampler(n: int, generator: torch.Generator | None) -> Tensor:
        # X = Gamma(a + 1) U^(1/a) is Gamma(a) also where that would underflow (Marsaglia & Tsang 2000).
        each = _copies(input, n)
        gammas = torch._standard_gamma(each + 1, generator=generator)
        u = torch.rand(gammas.shape, dtype=alpha.dtype, device=alpha.device, generator=generator)
        return torch.softmax(gammas.log() + u.clamp(min=torch.finfo(u.dtype).tiny).log() / each, -1)

    return known_moments(mean, mean * (1 - mean) / (total + 1), sampler, settings, Beta(alpha, rest))


def poisson(input: Any, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``torch.poisson`` as a random variable: mean and variance are the rate."""
    rate = _at_mean(input)
    return known_moments(rate, rate + _var_of(input), lambda n, g: torch.poisson(_copies(input, n), generator=g), settings)


def binomial(count: Any, prob: Any, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``torch.binomial`` as a random variable: mean n p, variance n p (1 - p)."""
    n_trials, p = torch.broadcast_tensors(_at_mean(count), _at_mean(prob))
    n_trials = n_trials.to(p.dtype)

    def sampler(n: int, generator: torch.Generator | None) -> Tensor:
        each = _copies(prob, n) if isinstance(prob, RandomVariable) else _copies(p, n)
        return torch.binomial(_copies(n_trials, n).contiguous(), each.contiguous(), generator=generator)

    var = n_trials * p * (1 - p) + n_trials * (n_trials - 1) * _var_of(prob)
    return known_moments(n_trials * p, var, sampler, settings)


def geometric_(input: Any, p: Any, *, settings: Settings, generator: Any = None) -> RandomVariable:
    """``Tensor.geometric_`` as a random variable: trials up to the first success, mean 1/p, variance (1 - p)/p^2."""
    p = float(p)
    mean = torch.full_like(input, 1 / p)

    def sampler(n: int, generator: torch.Generator | None) -> Tensor:
        return torch.empty(n, *mean.shape, dtype=mean.dtype, device=mean.device).geometric_(p, generator=generator)

    return known_moments(mean, torch.full_like(mean, (1 - p) / p**2), sampler, settings)


# ---- the table ------------------------------------------------------------------------------------------------------


def _refused(func: Callable[..., Any], law: Law) -> Callable[..., RandomVariable]:
    def refuse(*args: Any, settings: Settings, **kwargs: Any) -> RandomVariable:
        raise ConversionError(f"{operation_name(func)} cannot be a latent: {law.refusal}")

    return refuse


_ROWS: list[tuple[Callable[..., Any], Law, Callable[..., RandomVariable]]] = [
    (torch.randn, NORMAL, randn),
    (torch.randn_like, NORMAL, randn_like),
    (torch.normal, NORMAL, normal),
    (torch.Tensor.normal_, NORMAL, normal_),
    (torch.Tensor.log_normal_, LOG_NORMAL, log_normal_),
    (torch.rand, UNIFORM, rand),
    (torch.rand_like, UNIFORM, rand_like),
    (torch.Tensor.uniform_, UNIFORM, uniform_),
    (torch.Tensor.exponential_, EXPONENTIAL, exponential_),
    (torch.bernoulli, BERNOULLI, bernoulli),
    (torch.Tensor.bernoulli, BERNOULLI, bernoulli),
    (torch.Tensor.bernoulli_, BERNOULLI, bernoulli_),
    (F.gumbel_softmax, GUMBEL_SOFTMAX, gumbel_softmax),
    (one_hot_categorical_like, ONE_HOT, one_hot_categorical),
    (torch._standard_gamma, GAMMA, standard_gamma),
    (torch._sample_dirichlet, DIRICHLET, dirichlet),
    (torch.poisson, POISSON, poisson),
    (torch.binomial, BINOMIAL, binomial),
    (torch.Tensor.geometric_, GEOMETRIC, geometric_),
]
_ROWS += [
    (func, law, _refused(func, law))
    for law, functions in (
        (CAUCHY, (torch.Tensor.cauchy_,)),
        (CATEGORICAL, (torch.multinomial, torch.Tensor.multinomial)),
        (INTEGER, (torch.randint, torch.randint_like, torch.randperm, torch.Tensor.random_)),
    )
    for func in functions
]

# Every torch function that draws (but dropout, which has rules of its own) -> its draw.
DRAWS = FunctionTable({func: Draw(func, law, made) for func, law, made in _ROWS})
