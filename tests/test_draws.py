"""Draws: one table of them, and the laws that they bring, held against Monte Carlo in each covariance mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as D

import rvconvert
from rvconvert import ConversionError, RandomVariable
from rvconvert.core.random_variable import Settings
from rvconvert.core.registry import operation_name
from rvconvert.rules.draws import DRAWS, one_hot_categorical_like
from tests.drawn import with_draws

K = 12
SAMPLES = 40_000

# ---- the table -----------------------------------------------------------------------------------------------------

_P = torch.tensor([[0.2, 0.7, 0.5], [0.9, 0.4, 0.1]])
_RATE = torch.tensor([[0.5, 2.0, 7.0], [1.0, 3.0, 0.2]])


def _empty() -> Tensor:
    return torch.full((2, 3), 9.0)


# One call of each function that draws.
CALLS: dict[Any, list[Callable[[Any], Any]]] = {
    torch.randn: [lambda f: f(2, 3), lambda f: f((2, 3), dtype=torch.float64), lambda f: f(size=(2, 3))],
    torch.randn_like: [lambda f: f(_P), lambda f: f(_P, dtype=torch.float64)],
    torch.normal: [lambda f: f(_RATE, _P), lambda f: f(_RATE, 0.5), lambda f: f(1.0, _P), lambda f: f(1.0, 2.0, (2, 3))],
    torch.Tensor.normal_: [lambda f: f(_empty()), lambda f: f(_empty(), 1.0, std=0.5)],
    torch.Tensor.log_normal_: [lambda f: f(_empty(), 0.5, 0.4), lambda f: f(_empty(), mean=0.1, std=0.3)],
    torch.rand: [lambda f: f(2, 3), lambda f: f(torch.Size((2, 3)), dtype=torch.float64, device="cpu")],
    torch.rand_like: [lambda f: f(_P), lambda f: f(_P, dtype=torch.float64)],
    torch.Tensor.uniform_: [
        lambda f: f(_empty()),
        lambda f: f(_empty(), -1.0),
        lambda f: f(_empty(), -1.0, 3.0),
        lambda f: f(_empty(), to=4.0),
    ],
    torch.Tensor.exponential_: [lambda f: f(_empty()), lambda f: f(_empty(), 2.0), lambda f: f(_empty(), lambd=0.5)],
    torch.bernoulli: [lambda f: f(_P), lambda f: f(_empty(), 0.3)],
    torch.Tensor.bernoulli: [lambda f: f(_P), lambda f: f(_empty(), 0.3)],
    torch.Tensor.bernoulli_: [lambda f: f(_empty()), lambda f: f(_empty(), 0.3), lambda f: f(_empty(), _P)],
    F.gumbel_softmax: [lambda f: f(_RATE), lambda f: f(_RATE, tau=0.5), lambda f: f(_RATE, 0.7, True, dim=1)],
    one_hot_categorical_like: [lambda f: f(torch.multinomial(_RATE, 1).squeeze(1), _RATE)],
    torch._standard_gamma: [lambda f: f(_RATE)],
    torch._sample_dirichlet: [lambda f: f(_RATE)],
    torch.poisson: [lambda f: f(_RATE)],
    torch.binomial: [lambda f: f(torch.full((2, 3), 5.0), _P)],
    torch.Tensor.geometric_: [lambda f: f(_empty(), 0.4)],
    torch.Tensor.cauchy_: [lambda f: f(_empty(), 2.0)],
    torch.multinomial: [lambda f: f(_P, 2)],
    torch.Tensor.multinomial: [lambda f: f(_P, 2)],
    torch.randint: [lambda f: f(4, (2, 3)), lambda f: f(1, 4, (2, 3))],
    torch.randint_like: [lambda f: f(_P, 4)],
    torch.randperm: [lambda f: f(5)],
    torch.Tensor.random_: [lambda f: f(_empty(), 5)],
}
EACH = [
    pytest.param(func, call, id=f"{operation_name(func)}-{i}") for func, calls in CALLS.items() for i, call in enumerate(calls)
]


def _dtype(plain: Tensor) -> torch.dtype:
    """Of moments: those of whole numbers, one-hot vectors, are none."""
    return plain.dtype if plain.is_floating_point() else torch.get_default_dtype()


def _table() -> dict[Any, Any]:
    return dict(DRAWS.items())


def test_every_draw_has_a_call_here_and_every_function_of_torch_that_draws_a_row():
    assert set(CALLS) == set(_table())
    drawing = "rand randn randint rand_like randn_like randint_like randperm normal bernoulli multinomial poisson".split()
    in_place = "normal_ uniform_ bernoulli_ exponential_ cauchy_ log_normal_ geometric_ random_".split()
    known = [torch.binomial, *(getattr(torch, n) for n in drawing)] + [getattr(torch.Tensor, n) for n in in_place]
    assert [operation_name(f) for f in known if DRAWS.get(f) is None] == []


@pytest.mark.parametrize("func", CALLS, ids=operation_name)
def test_every_row_names_its_law_and_how_its_paths_are_drawn(func):
    draw = DRAWS.get(func)
    assert draw.func is func and draw.law.name
    assert bool(draw.law.paths) == draw.can_be_latent
    assert draw.is_gaussian == (draw.law.name == "Gaussian")


@pytest.mark.parametrize(("func", "call"), EACH)
def test_moments_of_the_draw_itself(func, call):
    draw = DRAWS.get(func)
    if not draw.can_be_latent:
        with pytest.raises(ConversionError, match="cannot be a latent"):
            call(lambda *args, **kwargs: draw.random_variable(*args, **kwargs, settings=Settings()))
        return
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([call(func).double() for _ in range(8000)])
    x = call(lambda *args, **kwargs: draw.random_variable(*args, **kwargs, settings=Settings()))
    plain = call(func)
    assert isinstance(x, RandomVariable) and x.shape == plain.shape and x.dtype == _dtype(plain) and x.latent
    error = 5 * draws.std(0) / len(draws) ** 0.5
    approximate = 0.05 if func is F.gumbel_softmax else 0.0
    assert ((x.mean - draws.mean(0)).abs() <= error + approximate * draws.std(0) + 1e-6).all()
    spread = (draws - draws.mean(0)).square()
    assert ((x.var - spread.mean(0)).abs() <= 5 * spread.std(0) / len(draws) ** 0.5 + 2 * approximate * x.var + 1e-6).all()


@pytest.mark.parametrize(("func", "call"), EACH)
def test_a_draw_at_its_mean_has_the_shape_the_type_and_the_write_of_the_draw(func, call):
    draw = DRAWS.get(func)
    plain = call(func)
    seen = []
    value = call(lambda *args, **kwargs: seen.append(args) or draw.at_mean(func, args, kwargs))
    assert value.shape == plain.shape and value.dtype == (_dtype(plain) if draw.can_be_latent else plain.dtype)
    if operation_name(func).endswith("_"):
        assert value is seen[0][0]
    if draw.can_be_latent:
        expected = call(lambda *args, **kwargs: draw.random_variable(*args, **kwargs, settings=Settings())).mean
        torch.testing.assert_close(value, expected)
    elif draw.law.name == "Cauchy":
        assert (value == 2).all()


@pytest.mark.parametrize("mode", ["sampled", "lowrank"])
@pytest.mark.parametrize(("func", "call"), EACH)
def test_paths_have_the_moments_of_the_law(func, call, mode):
    draw = DRAWS.get(func)
    if not draw.can_be_latent:
        return
    settings = Settings(covariance=mode, pairs=2000, rank=2000, seed=3)
    x = call(lambda *args, **kwargs: draw.random_variable(*args, **kwargs, settings=settings))
    expected = call(lambda *args, **kwargs: draw.random_variable(*args, **kwargs, settings=Settings()))
    assert x.shape == expected.shape
    approximate = 0.15 if func is F.gumbel_softmax else 0.1
    assert ((x.mean - expected.mean).abs() <= approximate * expected.var.sqrt() + 1e-6).all()
    torch.testing.assert_close(x.var, expected.var, rtol=0.25, atol=0.01)


# ---- laws as posteriors of a decoder ---------------------------------------------------------------------------------


class Posterior:
    """Positive and real parameters of one sample, (N, K) after ``of(N)``."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.real = torch.randn(1, K, generator=generator)
        self.scale = 0.2 + 0.6 * torch.rand(1, K, generator=generator)
        self.shape = 1.0 + 3 * torch.rand(1, K, generator=generator)
        self.other = 1.0 + 3 * torch.rand(1, K, generator=generator)

    def of(self, n: int) -> Posterior:
        made = Posterior.__new__(Posterior)
        made.__dict__.update({name: value.expand(n, K) for name, value in self.__dict__.items()})
        return made


def _uniform(q):
    return q.real + q.scale * (2 * torch.rand_like(q.real) - 1)


def _laplace(q):
    u = torch.rand_like(q.real) - 0.5
    return q.real - q.scale * torch.sign(u) * torch.log1p(-2 * torch.abs(u))


def _logistic(q):
    u = torch.rand_like(q.real)
    return q.real + q.scale * (torch.log(u) - torch.log1p(-u))


def _logistic_torch(q):
    base = D.Uniform(torch.zeros_like(q.real), torch.ones_like(q.real))
    transforms = [D.SigmoidTransform().inv, D.AffineTransform(q.real, q.scale)]
    return D.TransformedDistribution(base, transforms).rsample()


def _gumbel(q):
    return q.real - q.scale * torch.log(-torch.log(torch.rand(q.real.shape)))


def _kumaraswamy(q):
    u = torch.rand_like(q.real)
    return (1 - u ** (1 / q.other)) ** (1 / q.shape)


def _student(q):
    chi2 = 2 * torch._standard_gamma(2.5 + q.shape)
    return q.real + q.scale * torch.randn_like(q.real) * torch.rsqrt(chi2 / (5 + 2 * q.shape))


def _gate(q):
    return q.real * (torch.rand_like(q.real) < torch.sigmoid(q.real)).float()


def _straight_through(q):
    p = torch.sigmoid(q.real)
    return torch.bernoulli(p) + p - p.detach()


def _gumbel_softmax(q):
    g = -torch.log(-torch.log(torch.rand_like(q.real) + 1e-20) + 1e-20)
    return torch.softmax((q.real + g) / 0.7, dim=-1)


def _gumbel_softmax_transposed(q):
    g = -torch.log(-torch.log(torch.rand_like(q.real) + 1e-20) + 1e-20)
    return torch.softmax(((q.real + g) / 0.7).transpose(-1, 0).contiguous(), dim=0).transpose(-1, 0)


def _gumbel_softmax_exponential(q):
    g = -torch.empty_like(q.real).exponential_().log()
    return F.softmax((q.real + g) / 0.7, -1)


def _relaxed_bernoulli(q):
    u = torch.rand_like(q.real)
    return torch.sigmoid((q.real + torch.log(u) - torch.log1p(-u)) / 0.5)


def _relaxed_categorical(q):
    scores = (q.real - torch.log(-torch.log(torch.rand_like(q.real)))) / 0.8
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True))


def _softmax_by_hand(q):
    scores = (q.real - torch.log(-torch.log(torch.rand_like(q.real)))) / 0.8
    e = torch.exp(scores)
    return e / e.sum(-1, keepdim=True)


def _weibull(q):
    return q.scale * (-torch.log(torch.rand_like(q.scale))) ** (1 / q.shape)


LAWS: dict[str, Callable[[Any], Any]] = {
    "uniform": _uniform,
    "uniform, in place": lambda q: q.real + q.scale * torch.empty_like(q.real).uniform_(-1, 1),
    "uniform, torch": lambda q: D.Uniform(q.real - q.scale, q.real + q.scale).rsample(),
    "Laplace": _laplace,
    "Laplace, torch": lambda q: D.Laplace(q.real, q.scale).rsample(),
    "logistic": _logistic,
    "logistic, torch": _logistic_torch,
    "Gumbel": _gumbel,
    "Gumbel, torch": lambda q: D.Gumbel(q.real, q.scale).rsample(),
    "exponential": lambda q: -q.scale * torch.log(1 - torch.rand_like(q.scale)),
    "exponential, torch": lambda q: D.Exponential(1 / q.scale).rsample(),
    "Gamma": lambda q: torch._standard_gamma(q.shape) * q.scale,
    "Gamma, torch": lambda q: D.Gamma(q.shape, 1 / q.scale).rsample(),
    "Gamma, torch, wide": lambda q: D.Gamma(q.shape / 10, 1 / q.scale).rsample(),
    "inverse Gamma, torch": lambda q: D.InverseGamma(3 + q.shape, q.scale).rsample(),
    "Beta": lambda q: torch._sample_dirichlet(torch.stack((q.shape, q.other), -1))[..., 0],
    "Beta, torch": lambda q: D.Beta(q.shape, q.other).rsample(),
    "Kumaraswamy": _kumaraswamy,
    "Kumaraswamy, torch": lambda q: D.Kumaraswamy(q.shape, q.other).rsample(),
    "Dirichlet": lambda q: torch._sample_dirichlet(q.shape),
    "Dirichlet, torch": lambda q: D.Dirichlet(q.shape / 3).rsample(),
    "Student t": _student,
    "Student t, torch": lambda q: D.StudentT(5 + q.shape, q.real, q.scale).rsample(),
    "log-normal": lambda q: torch.exp(q.real + q.scale * torch.randn_like(q.real)),
    "log-normal, torch": lambda q: D.LogNormal(q.real, q.scale).rsample(),
    "half-normal": lambda q: torch.abs(torch.randn_like(q.scale)) * q.scale,
    "half-normal, torch": lambda q: D.HalfNormal(q.scale).rsample(),
    "Bernoulli gates": _gate,
    "Bernoulli, straight-through": _straight_through,
    "Gumbel-softmax": _gumbel_softmax,
    "Gumbel-softmax, exponential": _gumbel_softmax_exponential,
    "Gumbel-softmax, transposed": _gumbel_softmax_transposed,
    "Gumbel-softmax, torch": lambda q: F.gumbel_softmax(q.real, 0.7),
    "Gumbel-softmax, hard": lambda q: F.gumbel_softmax(q.real.unflatten(1, (4, 3)), 0.7, hard=True).flatten(1),
    "relaxed Bernoulli": _relaxed_bernoulli,
    "relaxed Bernoulli, torch": lambda q: D.RelaxedBernoulli(torch.tensor(0.5), logits=q.real).rsample(),
    "relaxed categorical": _relaxed_categorical,
    "relaxed categorical, softmax by hand": _softmax_by_hand,
    "relaxed categorical, torch": lambda q: D.RelaxedOneHotCategorical(torch.tensor(0.8), logits=q.real).rsample(),
    "Weibull": _weibull,
    "Weibull, torch": lambda q: D.Weibull(q.scale, q.shape).rsample(),
    "Pareto, torch": lambda q: D.Pareto(q.scale, 4 + q.shape).rsample(),
}


def decoder(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(K, 48), nn.ReLU(), nn.Linear(48, 12)).requires_grad_(False)


def monte_carlo(law: Callable[[Any], Any], seed: int) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        y = decoder(seed)(law(Posterior(seed).of(SAMPLES)).float())
    return y.mean(0), y.var(0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", LAWS)
def test_independent_mode_is_near_monte_carlo(name, seed):
    mean, var = monte_carlo(LAWS[name], seed)
    y = decoder(seed)(with_draws(LAWS[name], Posterior(seed).of(2)))
    ratio = float(y.var[0].sum() / var.sum())
    off = float(((y.mean[0] - mean) / var.sqrt()).abs().max())
    assert 0.5 < ratio < 2 and off < 0.35, (ratio, off)


@pytest.mark.parametrize("mode", ["sampled", "lowrank"])
@pytest.mark.parametrize("name", LAWS)
def test_paths_are_near_monte_carlo(name, mode):
    mean, var = monte_carlo(LAWS[name], 0)
    settings = Settings(covariance=mode, pairs=32, rank=32)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        y = decoder(0)(with_draws(LAWS[name], Posterior(0).of(400), settings=settings))
    ratio = float(y.var.mean(0).sum() / var.sum())
    allowed = 0.15 if mode == "sampled" else 0.25
    assert 1 - allowed < ratio < 1 + allowed, ratio
    # Low-rank nodes are the same for every sample, so what they are off by does not average away.
    assert float(((y.mean.mean(0) - mean) / var.sqrt()).abs().max()) < (0.05 if mode == "sampled" else 0.35)


class Coder(nn.Module):
    """A VAE whose posterior is a law with learned parameters."""

    def __init__(self, law: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.law, self.encoder, self.decoder = law, nn.Linear(6, 4 * K), nn.Linear(K, 6)

    def forward(self, x: Tensor) -> Tensor:
        real, scale, shape, other = self.encoder(x).chunk(4, -1)
        shape, other = (1 + F.softplus(each) for each in (shape, other))
        q = SimpleNamespace(real=real, scale=0.3 + 0.4 * torch.sigmoid(scale), shape=shape, other=other)
        return self.decoder(self.law(q).float())


@pytest.mark.parametrize("mode", ["independent", "sampled"])
@pytest.mark.parametrize("name", LAWS)
def test_a_model_with_such_a_posterior_converts_and_trains(name, mode):
    x = torch.rand(32, 6, generator=torch.Generator().manual_seed(1))
    options = {"pairs": 32} if mode == "sampled" else {}
    with torch.random.fork_rng():
        model = Coder(LAWS[name])
        truth = torch.stack([model(x).detach() for _ in range(300)]).var(0).mean()
        rv = rvconvert.convert(model, covariance=mode, output="distribution", **options)
        y = rv(x)
    (y.mean.square().mean() + y.var.mean()).backward()
    assert 0.4 < float(y.var.mean() / truth) < 2.5
    assert torch.isfinite(rv.encoder.weight.grad).all() and rv.encoder.weight.grad.any()


@pytest.mark.parametrize("name", LAWS)
def test_the_parameters_have_gradients(name):
    q = Posterior(0).of(2)
    for key, value in vars(q).items():
        setattr(q, key, value.clone().requires_grad_())
    z = with_draws(LAWS[name], q)
    gradients = torch.autograd.grad(z.mean.sum() + z.var.sum(), list(vars(q).values()), allow_unused=True)
    found = [g for g in gradients if g is not None]
    assert found and all(g.isfinite().all() for g in found)
    assert any((g != 0).any() for g in found)


def test_to_plain_takes_a_latent_of_any_law_at_its_mean_and_draws_the_rest():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(3, 4)

        def forward(self, x):
            loc, scale = self.encoder(x).chunk(2, -1)
            mask = torch.rand_like(x) > 0.3
            z = torch.distributions.Laplace(loc, F.softplus(scale)).rsample()
            return self.decoder(z), mask

    model, x = Model(), torch.randn(4, 4)
    plain = rvconvert.to_plain(rvconvert.convert(model, example_inputs=x), latent="mean")
    (first, mask), (second, other) = plain(x), plain(x)
    torch.testing.assert_close(first, model.decoder(model.encoder(x)[:, :3]))
    torch.testing.assert_close(first, second)
    assert not torch.equal(mask, other)
    torch.testing.assert_close(copy.deepcopy(plain)(x)[0], first)


class BehindALaw(nn.Module):
    """A decoder of one linear layer behind any law."""

    def __init__(self, law):
        super().__init__()
        self.encoder, self.decoder, self.law = nn.Linear(4, 6), nn.Linear(3, 4), law

    def parameters_of(self, x):
        a, b = F.softplus(self.encoder(x)).chunk(2, -1)
        return a + 0.5, b + 0.5

    def forward(self, x):
        return self.decoder(self.law(*self.parameters_of(x)))


WHOLE = {
    "Gamma": lambda a, b: D.Gamma(a + 2, b),
    "Chi2": lambda a, b: D.Chi2(a + 2),
    "StudentT": lambda a, b: D.StudentT(9, a, b),
    "FisherSnedecor": lambda a, b: D.FisherSnedecor(a + 5, b + 20),
    "InverseGamma": lambda a, b: D.InverseGamma(a + 8, b),
    "Beta": lambda a, b: D.Beta(a, b),
    "Laplace": D.Laplace,
    "Gumbel": D.Gumbel,
    "Kumaraswamy": lambda a, b: D.Kumaraswamy(a + 1, b + 1),
    "LogNormal": lambda a, b: D.LogNormal(a, b / 3),
    "HalfNormal": lambda a, b: D.HalfNormal(b),
    "Weibull": lambda a, b: D.Weibull(a, b + 1),
}


@pytest.mark.parametrize("covariance", ["independent", "sampled", "lowrank"])
@pytest.mark.parametrize("law", WHOLE)
def test_a_model_with_a_posterior_of_torch_distributions_converts(law, covariance):
    torch.manual_seed(0)
    model, x = BehindALaw(lambda a, b: WHOLE[law](a, b).rsample()), torch.randn(16, 4)
    a, b = model.parameters_of(x)
    options = {"sampled": {"pairs": 64}}.get(covariance, {})
    with torch.no_grad():
        converted = rvconvert.convert(model, covariance=covariance, output="distribution", **options)
        y = converted(x)
        draws = torch.stack([model.decoder(WHOLE[law](a, b).rsample()) for _ in range(4000)])
    assert 0.6 < float(y.var.sum() / draws.var(0).sum()) < 1.6
    assert float((y.mean - draws.mean(0)).square().sum().sqrt() / draws.var(0).sum().sqrt()) < 0.35
    trained = rvconvert.convert(model, covariance=covariance, **options)
    trained(x).square().mean().backward()
    assert trained.last_penalty > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.parameters())


class OfConstantShape(nn.Module):
    """Its draw is of a law whose shape is a number, placed and scaled by the encoder."""

    def __init__(self, law):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.law = nn.Linear(6, 4), nn.Linear(2, 6), law

    def forward(self, x):
        mu, scale = self.encoder(x).chunk(2, 1)
        return self.decoder(self.law(mu, torch.nn.functional.softplus(scale) + 0.3))


@pytest.mark.parametrize("mode", ["independent", "sampled", "lowrank"])
@pytest.mark.parametrize(
    "law",
    [
        lambda mu, scale: torch.distributions.StudentT(8.0, mu, scale).rsample(),
        lambda mu, scale: mu + scale * torch.distributions.Gamma(2.0, 1.0).rsample(mu.shape),
    ],
    ids=["Student t", "Gamma"],
)
def test_a_law_of_constant_shape_is_a_latent_that_is_not_drawn(law, mode):
    x = torch.rand(4, 6)
    plain = OfConstantShape(law).eval()
    options = {"pairs": 512} if mode == "sampled" else {}
    model = rvconvert.convert(plain, covariance=mode, output="distribution", attach=False, seed=0, **options).eval()
    with torch.no_grad():
        first, second = model(x), model(x)
        draws = torch.stack([plain(x) for _ in range(4000)])
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.var, second.var)
    assert float(first.var.mean()) == pytest.approx(float(draws.var(0).mean()), rel=0.35)
    assert ((first.mean - draws.mean(0)).abs() < 0.35 * draws.std(0)).all()


VARIANCES = {  # of a draw whose scale is 1
    "StudentT 3": (lambda loc, scale: D.StudentT(3.0, loc, scale), 3.0),
    "StudentT 10": (lambda loc, scale: D.StudentT(10.0, loc, scale), 1.25),
    "InverseGamma": (lambda loc, scale: D.InverseGamma(torch.full_like(scale, 5.0), scale), 1 / 48),
}


@pytest.mark.parametrize("law", VARIANCES)
def test_a_function_of_a_gamma_draw_has_the_variance_of_its_law(law):
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            loc, scale = self.encoder(x).chunk(2, 1)
            return self.decoder(VARIANCES[law][0](loc, F.softplus(scale)).rsample())

    torch.manual_seed(0)
    vae, x = Linear(), torch.randn(6, 10)
    model = rvconvert.convert(vae, output="distribution", attach=False)
    y = model(x)
    scale = F.softplus(vae.encoder(x)[:, 4:])
    expected = scale.square() * VARIANCES[law][1] @ vae.decoder.weight.square().t()
    torch.testing.assert_close(y.var, expected, rtol=5e-3, atol=0.0)
    (given,) = torch.autograd.grad(y.var.sum(), model.encoder.weight)
    (by_hand,) = torch.autograd.grad(expected.sum(), vae.encoder.weight)
    torch.testing.assert_close(given, by_hand, rtol=1e-2, atol=1e-4)


def _one_hot(logits):
    index = torch.multinomial(logits.softmax(-1).flatten(0, 1), num_samples=1).view(logits.shape[:-1])
    return F.one_hot(index, logits.shape[-1]).to(logits.dtype)


ONE_HOT: dict[str, Callable[[Any], Any]] = {
    "OneHotCategoricalStraightThrough": lambda logits: D.OneHotCategoricalStraightThrough(logits=logits).rsample(),
    "Independent": lambda logits: D.Independent(D.OneHotCategoricalStraightThrough(logits=logits), 1).rsample(),
    "straight through by hand": lambda logits: (
        D.OneHotCategorical(logits=logits).sample() + (p := logits.softmax(-1)) - p.detach()
    ),
    "one_hot": lambda logits: _one_hot(logits) + (p := logits.softmax(-1)) - p.detach(),
    "a column": lambda logits: (
        F.one_hot(torch.multinomial(logits.softmax(-1).view(-1, 4), 1)[:, 0], 4).view(logits.shape)
        + (p := logits.softmax(-1))
        - p.detach()
    ),
    "no gradient": _one_hot,
}


class Categories(nn.Module):
    """A discrete latent of three variables, as of a world model."""

    def __init__(self, law: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.law, self.encoder = law, nn.Linear(8, 12)
        self.decoder = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.law(3 * self.encoder(x).view(-1, 3, 4)).flatten(1))


@pytest.mark.parametrize("mode", ["independent", "calibrated", "sampled", "lowrank"])
@pytest.mark.parametrize("name", ONE_HOT)
def test_one_hot_categories_have_the_moments_and_the_gradient_of_the_plain_model(name, mode):
    vae, x = Categories(ONE_HOT[name]), torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    drawn = torch.stack([vae(x) for _ in range(1500)])
    options = {"sampled": {"pairs": 64}, "lowrank": {"rank": 64}}.get(mode, {})
    rv = rvconvert.convert(vae, covariance=mode, output="distribution", **options)
    y = rv(x)
    assert float(y.var.sum() / drawn.var(0).sum()) == pytest.approx(1, abs=0.15)
    assert (y.mean - drawn.mean(0)).abs().mean() < 0.25 * drawn.std(0).mean()
    if name != "no gradient":
        (plain,) = torch.autograd.grad(drawn.mean(0).sum(), vae.encoder.weight)
        (found,) = torch.autograd.grad(y.mean.sum(), rv.encoder.weight)
        assert (found - plain).norm() < 0.25 * plain.norm()
    for batch in (x[:2], x.repeat(2, 1)):
        assert rv(batch).shape == batch.shape
    assert len(rvconvert.converted.conversion_of(rv).programs) == 1


def test_a_one_hot_category_that_a_decoder_takes_back_is_no_latent():
    class Sentence(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(6, 4)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            logits = self.decoder(torch.cat([z, torch.zeros_like(x)], 1))
            return self.decoder(torch.cat([z, _one_hot(logits[:, None])[:, 0]], 1))

    rows = rvconvert.plan(Sentence(), example_inputs=torch.rand(5, 4))
    assert [row.operation for row in rows if row.role == "latent"] == ["torch.randn_like"]


OF_A_LATENT: dict[str, Callable[[Tensor], Tensor]] = {
    "Gamma": lambda z: D.Gamma(torch.exp(0.3 * z) + 0.5, torch.ones_like(z)).rsample(),
    "Beta": lambda z: D.Beta(torch.exp(z) + 0.5, torch.ones_like(z)).rsample(),
    "Dirichlet": lambda z: D.Dirichlet(torch.exp(z) + 0.5).rsample(),
    "Poisson": lambda z: torch.poisson(torch.exp(z)),
    "binomial": lambda z: torch.binomial(torch.full_like(z, 5.0), torch.sigmoid(z)),
    "Bernoulli": lambda z: torch.bernoulli(torch.sigmoid(2 * z)),
    "Bernoulli, in place": lambda z: torch.empty_like(z).bernoulli_(torch.sigmoid(2 * z)),
}


class TwoStages(nn.Module):
    """A latent, a layer, a law of what it gives, and a decoder of the product of both."""

    def __init__(self, law: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.law, self.encoder, self.layer, self.decoder = law, nn.Linear(3, 8), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        h = self.layer(z)
        return self.decoder(self.law(h) * h)


@torch.no_grad()
@pytest.mark.parametrize("name", OF_A_LATENT)
def test_a_draw_follows_its_random_parameter_on_each_path(name):
    vae, x = TwoStages(OF_A_LATENT[name]), torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).repeat(500, 1)
    torch.manual_seed(3)
    drawn = torch.stack([vae(x) for _ in range(20)])
    y = rvconvert.convert(vae, covariance="sampled", pairs=16, output="distribution")(x)
    mean, second = drawn.mean((0, 1)), drawn.square().mean((0, 1))
    deviation = drawn.std((0, 1))
    assert ((y.mean.mean(0) - mean).abs() < 0.05 * deviation).all()
    assert float(((y.var + y.mean.square()).mean(0) / second - 1).abs().max()) < 0.1


@pytest.mark.parametrize(("name", "var"), [("Gamma", 2.5), ("Poisson", 2.5), ("binomial", 5 * 0.4 * 0.6 + 20 * 0.01)])
def test_a_random_parameter_adds_its_variance(name, var):
    given = RandomVariable(
        torch.full((2, 3), 0.4 if name == "binomial" else 2.0), torch.full((2, 3), 0.01 if name == "binomial" else 0.5)
    )
    func, args = {
        "Gamma": (torch._standard_gamma, (given,)),
        "Poisson": (torch.poisson, (given,)),
        "binomial": (torch.binomial, (torch.full((2, 3), 5.0), given)),
    }[name]
    made = DRAWS.get(func).random_variable(*args, settings=Settings())
    torch.testing.assert_close(made.var, torch.full((2, 3), var))
