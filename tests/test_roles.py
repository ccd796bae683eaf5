"""Where L_c is, and how large: over shapes of output and loss, with recordings that are kept and that serve one call."""

from __future__ import annotations

import copy
import math
import operator
import pickle
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Independent,
    MixtureSameFamily,
    Multinomial,
    Normal,
    OneHotCategorical,
    kl_divergence,
)

import rvconvert
from rvconvert import ConversionError
from rvconvert.program.rewrite import _apart_from_sizes, _sort, take_together


class VAE(nn.Module):
    """``result(y, x, z, mu, std, self)`` is what leaves; ``reads``: Python reads a plain value, so no recording is kept."""

    def __init__(self, result: Callable[..., Any], reads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.head = nn.Linear(12, 8), nn.Linear(4, 12), nn.Linear(12, 1)
        self.prior, self.scale = nn.Linear(4, 4), nn.Parameter(torch.full((12,), -0.5))
        self.register_buffer("window", torch.full((1, 1, 3), 1 / 3))
        self.result, self.reads = result, reads

    def forward(self, x: Tensor) -> Any:
        if self.reads and float(x.sum()) == 1e30:
            raise ValueError
        mu, logvar = self.encoder(x).chunk(2, -1)
        std = (0.5 * logvar).exp()
        z = mu + torch.randn_like(mu) * std
        return self.result(self.decoder(z), x, z, mu, std, self)


def sampled_kl(z: Tensor, mu: Tensor, std: Tensor) -> Tensor:
    return (Normal(mu, std).log_prob(z) - Normal(0.0, 1.0).log_prob(z)).sum(1)


def kl_of_a_learned_prior(z: Tensor, mu: Tensor, std: Tensor, vae: VAE) -> Tensor:
    place = vae.prior(z)
    return 0.5 * ((mu - place) ** 2 + std**2 - 1 - 2 * std.log()).sum(1)


@torch.no_grad()
def without_gradient(y: Tensor) -> Tensor:
    return y * 1


def bce_by_hand(y: Tensor, x: Tensor) -> Tensor:
    return -(x * torch.log(y + 1e-6) + (1 - x) * torch.log(1 - y + 1e-6))


Result = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, VAE], Any]
LINEAR: dict[str, Result] = {
    "alone": lambda y, x, z, mu, std, m: y,
    "beside the latent": lambda y, x, z, mu, std, m: (y, z, mu),
    "beside tanh of the latent": lambda y, x, z, mu, std, m: (torch.tanh(z), y),
    "beside its own mean": lambda y, x, z, mu, std, m: (y, y.mean(1)),
    "beside its own mean, kept": lambda y, x, z, mu, std, m: (y, y.mean(1, keepdim=True)),
    "beside a part": lambda y, x, z, mu, std, m: (y, y[:, :3]),
    "beside a view": lambda y, x, z, mu, std, m: (y, y.view(-1, 3, 4)),
    "beside a score": lambda y, x, z, mu, std, m: (y, m.head(y)),
    "beside logits of the latent": lambda y, x, z, mu, std, m: (y, m.prior(z)),
    "beside the decoded mean": lambda y, x, z, mu, std, m: (y, m.decoder(mu), mu),
    "beside the decoded mean and logits": lambda y, x, z, mu, std, m: (y, m.decoder(mu), m.prior(z)),
    "beside what zeros give": lambda y, x, z, mu, std, m: (y, m.decoder(torch.zeros_like(z))),
    "beside a kept picture of the mean": lambda y, x, z, mu, std, m: (y, m.decoder(mu).detach()),
    "a loss beside that of the mean": lambda y, x, z, mu, std, m: F.mse_loss(y, x) + 0.1 * F.mse_loss(m.decoder(mu), x),
    "the size of a residual, beside its loss": lambda y, x, z, mu, std, m: (y, (x + y).abs().mean()),
    "beside scores of it and of the input": lambda y, x, z, mu, std, m: (y, m.head(y), m.head(x)),
    "scores of it and of the input": lambda y, x, z, mu, std, m: (m.head(y), m.head(x)),
    "beside a loss of scores": lambda y, x, z, mu, std, m: (y, (m.head(y) - m.head(x)).square().mean()),
    "a loss of scores": lambda y, x, z, mu, std, m: (m.head(y) - m.head(x)).square().mean(),
    "a loss beside a picture in bytes": lambda y, x, z, mu, std, m: (F.mse_loss(y, x), ((y + 1) / 2 * 255).clamp(0, 255)),
    "beside a loss of what it is decoded from": lambda y, x, z, mu, std, m: (
        m.decoder(c := z + 0 * m.prior(z)),
        F.mse_loss(c, m.encoder(x)[:, :4]),
    ),
    "beside a score of the latent": lambda y, x, z, mu, std, m: {"y": y, "score": m.prior(z).sum(1)},
    "beside a KL vector": lambda y, x, z, mu, std, m: (y, kl_of_a_learned_prior(z, mu, std, m)),
    "beside a sampled KL": lambda y, x, z, mu, std, m: (y, sampled_kl(z, mu, std)),
    "beside a draw of the likelihood": lambda y, x, z, mu, std, m: (y, Normal(y, 0.1).sample()),
    "a view with a loss": lambda y, x, z, mu, std, m: (y.view(-1, 3, 4), F.mse_loss(y, x) + sampled_kl(z, mu, std).mean()),
    "mse_loss": lambda y, x, z, mu, std, m: F.mse_loss(y, x),
    "mse_loss beside it": lambda y, x, z, mu, std, m: (y, F.mse_loss(y, x), mu),
    "mse_loss and a sampled KL": lambda y, x, z, mu, std, m: F.mse_loss(y, x) + sampled_kl(z, mu, std).mean(),
    "mse_loss and a learned prior": lambda y, x, z, mu, std, m: (
        100 * F.mse_loss(y, x) + kl_of_a_learned_prior(z, mu, std, m).mean()
    ),
    "hinge": lambda y, x, z, mu, std, m: F.hinge_embedding_loss(y, torch.where(x > 0.5, 1.0, -1.0)),
    "BCE with logits": lambda y, x, z, mu, std, m: F.binary_cross_entropy_with_logits(y, x),
    "beside a sample of the likelihood, by hand": lambda y, x, z, mu, std, m: (y, y + m.scale.exp() * torch.randn(y.shape), mu),
    "beside a sample and its deviation's noise": lambda y, x, z, mu, std, m: (y + m.scale.exp() * torch.randn_like(y), y),
    "a copy for a log, with a loss": lambda y, x, z, mu, std, m: {"recon": y.detach(), "loss": F.mse_loss(y, x)},
    "a copy without a gradient, with a loss": lambda y, x, z, mu, std, m: (without_gradient(y), ((y - x) ** 2).mean()),
    "a picture of it, with a loss": lambda y, x, z, mu, std, m: ((y > 0).float(), F.mse_loss(y, x)),
    "a picture in bytes, with a loss": lambda y, x, z, mu, std, m: ((255 * y).clamp(0, 255).byte(), F.mse_loss(y, x)),
    "an accuracy in whole numbers, with a loss": lambda y, x, z, mu, std, m: (
        F.mse_loss(y, x),
        ((y > 0.5).long() == (x > 0.5).to(torch.int64)).float().mean(),
    ),
    "add with alpha": lambda y, x, z, mu, std, m: torch.add(y, x, alpha=-1).square().mean(),
    "by hand": lambda y, x, z, mu, std, m: ((x - y) ** 2).sum(1).mean(),
    "by hand, absolute": lambda y, x, z, mu, std, m: (y - x).abs().mean(),
    "per element": lambda y, x, z, mu, std, m: (y - x) ** 2,
    "per example": lambda y, x, z, mu, std, m: ((y - x) ** 2).sum(1),
    "per example, log-softmax": lambda y, x, z, mu, std, m: -(F.log_softmax(y, 1) * x).sum(1),
    "log-softmax by hand": lambda y, x, z, mu, std, m: -((y - y.logsumexp(1, keepdim=True)) * x).sum(1).mean(),
    "Categorical": lambda y, x, z, mu, std, m: -Categorical(logits=y).log_prob(x.argmax(1)).mean(),
    "OneHotCategorical": lambda y, x, z, mu, std, m: (
        -OneHotCategorical(logits=y).log_prob(F.one_hot(x.argmax(1), 12).float()).mean()
    ),
    "Multinomial": lambda y, x, z, mu, std, m: -Multinomial(12, logits=y, validate_args=False).log_prob((9 * x).round()).mean(),
    "mse_loss per element": lambda y, x, z, mu, std, m: F.mse_loss(y, x, reduction="none"),
    "log_prob": lambda y, x, z, mu, std, m: -Normal(y, 0.5).log_prob(x).sum(1),
    "of several results, one": lambda y, x, z, mu, std, m: torch.max(y.unsqueeze(0), 0)[0],
    "log_prob of a learned scale": lambda y, x, z, mu, std, m: -Normal(y, m.scale.exp()).log_prob(x).sum(1),
    "in a dict, loss and all": lambda y, x, z, mu, std, m: {"loss": F.mse_loss(y, x), "recon": y, "z": z},
}
SIGMOID: dict[str, Result] = {
    "sigmoid": lambda y, x, z, mu, std, m: torch.sigmoid(y),
    "logits and sigmoid": lambda y, x, z, mu, std, m: (y, torch.sigmoid(y)),
    "sigmoid, loss of the logits": lambda y, x, z, mu, std, m: (torch.sigmoid(y), F.binary_cross_entropy_with_logits(y, x)),
    "BCE": lambda y, x, z, mu, std, m: F.binary_cross_entropy(torch.sigmoid(y), x),
    "BCE by hand": lambda y, x, z, mu, std, m: bce_by_hand(torch.sigmoid(y), x).sum(1).mean(),
    "BCE by hand, per example, beside it": lambda y, x, z, mu, std, m: (
        (p := torch.sigmoid(y)),
        bce_by_hand(p, x).sum(1),
    ),
    "Bernoulli": lambda y, x, z, mu, std, m: -Bernoulli(probs=torch.sigmoid(y)).log_prob((x > 0.5).float()).sum(1).mean(),
    "a draw of the likelihood": lambda y, x, z, mu, std, m: (
        lambda p: {"mean": p, "sample": (torch.rand_like(p) < p).float(), "mu": mu}
    )(torch.sigmoid(y)),
}
SHAPES = {**{k: (v, False) for k, v in LINEAR.items()}, **{k: (v, True) for k, v in SIGMOID.items()}}


def reference(x: Tensor, sigmoid: bool) -> Tensor:
    """L_c of the reconstruction alone."""
    vae = VAE((lambda y, *rest: torch.sigmoid(y)) if sigmoid else (lambda y, *rest: y), False)
    return rvconvert.variance_penalty(rvconvert.convert(vae, output="distribution")(x))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_penalty_is_that_of_the_reconstruction(name: str, reads: bool) -> None:
    result, sigmoid = SHAPES[name]
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    rv = rvconvert.convert(VAE(result, reads), example_inputs=x)
    rv(x)
    assert rv.last_penalty is not None, "no penalty"
    torch.testing.assert_close(rv.last_penalty, reference(x, sigmoid), rtol=0.01, atol=0)


@pytest.mark.parametrize("covariance", ["calibrated", "sampled", "lowrank"])
@pytest.mark.parametrize("name", [name for name in SHAPES if name not in ("beside a draw of the likelihood",)])
def test_in_other_modes_it_is_in_the_gradient_of_a_loss(name: str, covariance: str) -> None:
    result, _ = SHAPES[name]
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    grads = []
    for penalty in (50.0, 0.0):
        torch.manual_seed(2)
        rv = rvconvert.convert(VAE(result, False), penalty=penalty, covariance=covariance, seed=0)
        torch.manual_seed(2)
        leaving = [leaf for leaf in tensors(rv(x)) if leaf.requires_grad]
        torch.stack([leaf.mean() for leaf in leaving]).sum().backward()
        grads.append(rv.decoder.weight.grad)
    assert not torch.allclose(*grads, atol=1e-9)


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_a_copy_without_a_gradient_leaves_without_one(covariance: str) -> None:
    vae = VAE(lambda y, x, z, mu, std, m: (y.detach(), without_gradient(y), F.mse_loss(y, x)), False)
    copied, other, loss = rvconvert.convert(vae, covariance=covariance)(torch.rand(8, 12))
    assert loss.requires_grad and not copied.requires_grad and not other.requires_grad


class Ladder(nn.Module):
    """Two latents, and a decoder that gives mean and log deviation: fewer or more numbers than any input has."""

    def __init__(self, result: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.top, self.bottom, self.prior, self.decoder = nn.Linear(7, 6), nn.Linear(7, 6), nn.Linear(3, 6), nn.Linear(3, 14)
        self.result = result

    def forward(self, x: Tensor) -> Any:
        mu, logvar = self.top(x).chunk(2, 1)
        place, scale = self.prior(mu + torch.randn_like(mu) * (0.5 * logvar).exp()).chunk(2, 1)
        shift, by = self.bottom(x).chunk(2, 1)
        z = place + shift + torch.randn_like(shift) * (scale + by).exp()
        return self.decoder(z), *self.result(place, scale)


PRIORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "its deviation": lambda place, scale: (place, scale.exp()),
    "the law itself": lambda place, scale: (Normal(place, scale.exp()),),
}


@pytest.mark.parametrize("name", PRIORS)
def test_parameters_of_a_lower_latent_s_prior_are_no_reconstruction(name: str) -> None:
    x, found = torch.rand(8, 7, generator=torch.Generator().manual_seed(1)), []
    for result in (lambda place, scale: (), PRIORS[name]):
        rv = rvconvert.convert(Ladder(result), example_inputs=x)
        rv(x)
        found.append(rv.last_penalty)
    torch.testing.assert_close(*found)


class SpatialLadder(nn.Module):
    """Two latents in space; its image leaves beside the lower one's divergences, ``shown`` for each pixel or not."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shown = shown
        self.top, self.prior, self.bottom, self.decoder = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 4), (2, 4), (1, 4), (2, 1))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        posteriors = [Normal(mean, (0.5 * logvar).exp()) for mean, logvar in (f(x).chunk(2, 1) for f in (self.top, self.bottom))]
        mean, logvar = self.prior(posteriors[0].rsample()).chunk(2, 1)
        divergences = torch.distributions.kl_divergence(posteriors[1], Normal(mean, (0.5 * logvar).exp()))
        image = self.decoder(posteriors[1].rsample())
        return (image, divergences.sum((1, 2, 3)), *([divergences.sum(1)] if self.shown else []))


def test_a_map_of_divergences_is_no_reconstruction() -> None:
    x, found = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)), []
    for shown in (False, True):
        rv = rvconvert.convert(SpatialLadder(shown))
        rv(x)
        found.append(rv.last_penalty)
    torch.testing.assert_close(*found)


OF_A_LATENT: dict[str, Callable[[Tensor], Tensor]] = {
    "mse_loss": lambda z: F.mse_loss(z, torch.zeros_like(z)),
    "mse_loss, summed": lambda z: F.mse_loss(z, torch.ones(z.shape), reduction="sum"),
    "mse_loss, each": lambda z: F.mse_loss(z, torch.ones(z.shape), reduction="none"),
    "the module": lambda z: nn.MSELoss()(z, torch.zeros_like(z)),
    "l1_loss": lambda z: F.l1_loss(z, torch.zeros_like(z)),
    "gaussian_nll_loss": lambda z: F.gaussian_nll_loss(z, torch.zeros_like(z), torch.ones_like(z), full=True),
    "smooth_l1_loss": lambda z: F.smooth_l1_loss(z, torch.zeros_like(z), beta=0.5),
    "huber_loss": lambda z: F.huber_loss(z, torch.zeros_like(z), delta=0.5),
}


@pytest.mark.parametrize("covariance", ["independent", "sampled"])
@pytest.mark.parametrize("name", OF_A_LATENT)
def test_a_loss_function_of_a_latent_is_its_expected_value(name: str, covariance: str) -> None:
    """At the mean -log p(z) would have no gradient for the posterior's variance, which then grows without bound."""
    vae = VAE(lambda y, x, z, mu, std, m: (F.mse_loss(y, x), OF_A_LATENT[name](z)), False)
    x = torch.rand(64, 12, generator=torch.Generator().manual_seed(1))
    pairs = {"pairs": 64, "seed": 0} if covariance == "sampled" else {}
    rv = rvconvert.convert(vae, covariance=covariance, **pairs)
    found = rv(x)[1]
    with torch.no_grad():
        truth = torch.stack([vae(x)[1] for _ in range(400)]).mean(0)
    assert (found.mean() / truth.mean() - 1).abs() < 0.06
    found.mean().backward()
    assert rv.encoder.bias.grad[4:].min() > 0  # more variance, more loss


@pytest.mark.parametrize("covariance", ["independent", "sampled"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_prior_s_draw_in_eval_mode_goes_on_drawing(learned: bool, covariance: str) -> None:
    class Conditional(VAE):
        def forward(self, c: Tensor, x: Tensor | None = None) -> Any:
            if x is not None and self.training:
                mu, logvar = self.encoder(torch.cat([x, c], 1)).chunk(2, -1)
                z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            else:
                z = torch.randn(len(c), 4)
            return self.decoder(torch.cat([z[:, :2], (self.prior(c) if learned else c)[:, :2]], 1))

    x, c = torch.rand(8, 8), torch.rand(8, 4)
    rv = rvconvert.convert(Conditional(None, False), covariance=covariance)  # type: ignore[arg-type]
    assert torch.equal(rv(c, x).mean(), rv(c, x).mean()) or covariance == "sampled"
    rv.eval()
    assert not torch.allclose(rv(c), rv(c))


def test_a_kernel_over_a_hidden_layer_is_taken_of_a_draw() -> None:
    class Kernel(VAE):
        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, -1)
            hidden = torch.relu(self.prior(mu + torch.randn_like(mu) * (0.5 * logvar).exp()))
            apart = (hidden.unsqueeze(1) - hidden.unsqueeze(0)).square().sum(-1)
            return F.mse_loss(self.decoder(hidden), x), (-apart / torch.tensor([1e-6, 1.0]).view(-1, 1, 1)).exp().mean()

    x, vae = torch.rand(8, 12), Kernel(None, False)  # type: ignore[arg-type]
    rv = rvconvert.convert(vae, example_inputs=x)
    found = torch.stack([rv(x)[1] for _ in range(200)])
    with torch.no_grad():
        truth = torch.stack([vae(x)[1] for _ in range(200)])
    assert found.std() > 0
    assert (found.mean() - truth.mean()).abs() < 4 * (found.std() + truth.std()) / 200**0.5
    assert [row.operation for row in rvconvert.plan(vae, example_inputs=x) if row.role == "reconstruction"] == ["Linear"]


OF_EACH: dict[str, Callable[[Tensor], Tensor]] = {
    "rate": lambda s: torch.exp(0.5 * s) + 0.1,
    "elu written out": lambda s: torch.where(s > 0, s, 0.5 * (torch.exp(s) - 1)),
}


@pytest.mark.parametrize("name", OF_EACH)
def test_an_exponential_of_each_example_that_leaves_has_its_moments(name: str) -> None:
    """One number for each example, summed from what a decoder gives, is no score: nothing sums its exponential."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        return y, OF_EACH[name]((y * m.scale).sum(1, keepdim=True))

    x = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
    vae = VAE(result, False)
    rv = rvconvert.convert(vae, example_inputs=x)
    with torch.no_grad():
        found, draws = rv(x)[1], torch.stack([vae(x)[1] for _ in range(2000)])
    assert torch.equal(found, rv(x)[1])
    assert bool(((found - draws.mean(0)).abs() < 5 * draws.std(0) / 2000**0.5 + 0.02 * draws.std(0)).all())


class Shared(nn.Module):
    """``parts(self, h, p)`` gives reconstructions of h, made of the input, and p, made of z; ``inside``: their loss."""

    def __init__(self, parts: Callable[..., Any], inside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.posterior, self.first = nn.Linear(12, 9), nn.Linear(9, 6), nn.Linear(3, 9)
        self.decoder = nn.Sequential(nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 12))
        self.norm, self.refiner = nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 12))
        self.parts, self.inside = parts, inside

    def forward(self, x: Tensor) -> Any:
        h = self.encoder(self.norm(x))
        mu, logvar = self.posterior(h).chunk(2, 1)
        found = self.parts(self, h, self.first(mu + torch.randn_like(mu) * (0.5 * logvar).exp()))
        return sum(F.mse_loss(y, x) for y in found) if self.inside else found


SHARED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "two stages": (lambda m, h, p: (y := m.decoder(p), m.refiner(y)), lambda m, h, p: (y := m.decoder(p), m.refiner(y))),
    "a deterministic branch": (lambda m, h, p: (m.decoder(h), m.decoder(p)), lambda m, h, p: (m.decoder(p),)),
    "the encoder's norm at its end": (lambda m, h, p: (m.norm(m.decoder(p)),), lambda m, h, p: (m.norm(m.decoder(p)),)),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_a_layer_that_a_decoder_shares_is_a_decoder_s(name: str, inside: bool) -> None:
    parts, expected = SHARED[name]
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    rv = rvconvert.convert(Shared(parts, inside), example_inputs=x)
    left = rv(x)
    alone = rvconvert.convert(Shared(expected, False), output="distribution")(x)
    torch.testing.assert_close(rv.last_penalty, sum(rvconvert.variance_penalty(y) for y in alone), rtol=1e-4, atol=0)
    (left if inside else sum(y.square().sum() for y in left)).backward()
    assert all(p.grad is not None for p in rv.first.parameters())


class Autoregressive(nn.Module):
    """Steps in a list, each made of the one before."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.start, self.cell, self.out = nn.Linear(16, 6), nn.Linear(3, 5), nn.GRUCell(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
        h = self.start(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))
        y, steps = torch.zeros(len(x), 4), []
        for _ in range(4):
            h = self.cell(y, h)
            y = self.out(h)
            steps.append(y)
        return steps, mu


def test_every_step_of_a_decoder_that_takes_back_what_it_gave_is_penalised() -> None:
    x = torch.rand(3, 4, 4)
    rv = rvconvert.convert(Autoregressive(), example_inputs=x)
    rv(x)
    steps, _ = rvconvert.convert(Autoregressive(), output="distribution")(x)
    torch.testing.assert_close(rv.last_penalty, torch.stack([rvconvert.variance_penalty(y) for y in steps]).sum())


def by_element(h: Tensor) -> Tensor:
    reversed_ = torch.zeros_like(h)
    for b in range(len(h)):
        reversed_[b, 0:4, :] = h[b].flip(0)
    return reversed_


def by_column(h: Tensor) -> Tensor:
    reversed_ = torch.zeros(len(h), 4, 6)
    for t in range(4):
        reversed_[:, t] = h[:, 3 - t]
    return reversed_


@pytest.mark.parametrize("written", [by_element, by_column])
def test_what_is_written_into_a_buffer_places_a_latent(written: Callable[[Tensor], Tensor]) -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.gru, self.encoder, self.decoder = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 6), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(written(self.gru(x)[0])).chunk(2, -1)
            return self.decoder(mu + torch.randn(mu.size()) * (0.5 * logvar).exp())

    x = torch.rand(3, 4, 5)
    rv = rvconvert.convert(Reversed(), example_inputs=x)
    assert torch.equal(rv(x), rv(x)) and rv.last_penalty > 0


def in_a_column(m: Any, mu: Tensor) -> Tensor:
    h = mu.detach().clone()
    h[:, 0] = torch.randn_like(h[:, 0])
    return h


def beside_a_learned_condition(m: Any, mu: Tensor) -> Tensor:
    return torch.cat([torch.randn(len(mu), 2), m.prior(torch.ones(len(mu), 4))[:, :2]], 1)


@pytest.mark.parametrize("drawn", [in_a_column, beside_a_learned_condition])
def test_a_draw_beside_what_was_learned_is_no_latent(drawn: Callable[[Any, Tensor], Tensor]) -> None:
    x = torch.rand(64, 12)
    vae = VAE(lambda y, x, z, mu, std, m: (y, m.decoder(drawn(m, mu))), False)
    rv = rvconvert.convert(vae, example_inputs=x)
    assert not torch.equal(rv(x)[1], rv(x)[1])
    torch.testing.assert_close(rv.last_penalty, reference(x, False), rtol=0.01, atol=0)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for each in (value.values() if isinstance(value, dict) else value) for t in tensors(each)]


@pytest.mark.parametrize("name", SHAPES)
def test_it_joins_whichever_related_output_is_trained_on(name: str) -> None:
    """The gradient of an output's sum differs by L_c's, once, for one of the outputs at least; never by more."""
    result, sigmoid = SHAPES[name]
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    reference_model = VAE((lambda y, *rest: torch.sigmoid(y)) if sigmoid else (lambda y, *rest: y), False)
    y = (explicit := rvconvert.convert(reference_model, output="distribution"))(x)
    rvconvert.variance_penalty(y).backward()
    wanted = explicit.decoder.weight.grad
    joined = 0
    count = len(tensors(rvconvert.convert(VAE(result, False))(x)))
    for index in range(count):
        grads = []
        for penalty in (50.0, 0.0):
            rv = rvconvert.convert(VAE(result, False), penalty=penalty)
            torch.manual_seed(2)
            leaf = tensors(rv(x))[index]
            if not leaf.requires_grad:
                break
            leaf.sum().backward()
            grad = rv.decoder.weight.grad
            grads.append(torch.zeros_like(wanted) if grad is None else grad)
        if len(grads) == 2 and not torch.allclose(*grads, atol=1e-9):
            joined += 1
            torch.testing.assert_close(grads[0] - grads[1], wanted, rtol=0.02, atol=1e-6)
    both = ("logits and sigmoid", "sigmoid, loss of the logits", "beside a view", "mse_loss beside it")
    assert joined >= (2 if name in both else 1)


def test_a_decoder_without_parameters_has_a_reconstruction() -> None:
    for function in (lambda z: torch.sigmoid(z @ z.t()), lambda z: (-torch.cdist(z, z)).exp()):
        vae = VAE(lambda y, x, z, mu, std, m, f=function: (f(z), mu), False)
        rv = rvconvert.convert(vae)
        rv(torch.rand(6, 12))
        y = rvconvert.convert(vae, output="distribution")(torch.rand(6, 12))[0]
        assert rv.last_penalty > 0 and isinstance(y, rvconvert.RandomVariable)


@pytest.mark.parametrize("named", [False, True])
def test_inner_products_of_the_edges_of_a_graph_are_a_reconstruction(named: bool) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = nn.Linear(12, 8)

        def forward(self, x: Tensor, edges: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, -1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            return (z[edges[0]] * z[edges[1]]).sum(1), mu

    edges = torch.tensor([[0, 1, 2, 5], [1, 2, 3, 0]])
    x, vae = torch.rand(6, 12), Graph()
    places = [row.where for row in rvconvert.plan(vae, example_inputs=(x, edges)) if row.role == "latent"]
    options = {"latent": tuple(places)} if named else {}
    rv = rvconvert.convert(vae, example_inputs=(x, edges), **options)
    y, _ = rvconvert.convert(vae, output="distribution")(x, edges)
    rv(x, edges)
    with torch.no_grad():
        truth = torch.stack([vae(x, edges)[0] for _ in range(4000)])
    torch.testing.assert_close(y.var, truth.var(0), rtol=0.1, atol=0)
    torch.testing.assert_close(rv.last_penalty, rvconvert.variance_penalty(y))


NUISANCE: dict[str, Callable[[Tensor], Tensor]] = {
    "pixel mask": lambda x: x * (torch.rand_like(x) > 0.1),
    "DropPath": lambda x: x * x.new_empty(len(x), 1).bernoulli_(0.9) / 0.9,
    "Bernoulli mask": lambda x: x * torch.bernoulli(torch.full_like(x, 0.8)),
    "dither": lambda x: x + (torch.rand_like(x) - 0.5) / 256,
    "dequantisation": lambda x: (x * 255 + torch.rand_like(x)) / 256,
    "Gaussian noise": lambda x: x + 0.1 * torch.randn_like(x),
    "mixup": lambda x: torch.distributions.Beta(0.5, 0.5).sample() * x + 0.1 * x.flip(0),
    "crop by a mask": lambda x: x * (torch.arange(12) >= torch.randint(0, 3, (len(x), 1))),
    "scale": lambda x: x * (1 + 0.1 * torch.rand(())),
    "dropout": lambda x: F.dropout(x, 0.1),
}


@pytest.mark.parametrize("name", NUISANCE)
@pytest.mark.parametrize("covariance", ["independent", "sampled"])
def test_draws_that_are_no_latent_are_drawn(name: str, covariance: str) -> None:
    class Noisy(VAE):
        noise = True

        def forward(self, x: Tensor) -> Any:
            return super().forward(NUISANCE[name](x) if self.noise else x)

    torch.manual_seed(3)
    vae = Noisy(lambda y, x, z, mu, std, m: (y, mu), False)
    x = torch.rand(512, 12)
    rv = rvconvert.convert(vae, example_inputs=x, covariance=covariance)
    (_, first), (_, second) = rv(x), rv(x)
    assert not torch.equal(first, second)
    noisy = rv.last_penalty
    vae.noise = False
    clean = rvconvert.convert(vae, example_inputs=x, covariance=covariance)
    clean(x)
    torch.testing.assert_close(noisy, clean.last_penalty, rtol=0.25, atol=0)


def test_samples_of_the_prior_inside_forward_stay_diverse() -> None:
    vae = VAE(lambda y, x, z, mu, std, m: (y, m.decoder(torch.randn(len(x), 4))), False)
    x = torch.rand(64, 12)
    _, fakes = rvconvert.convert(vae, example_inputs=x)(x)
    assert fakes.std(0).mean() > 0.5 * vae(x)[1].std(0).mean()


def test_a_shuffle_of_the_batch_for_a_discriminator_is_no_latent() -> None:
    def shuffled(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Tensor:
        columns = [z[torch.randperm(len(z)), i] for i in range(z.shape[1])]
        return F.mse_loss(y, x) + m.prior(torch.stack(columns, 1)).mean() - m.prior(z).mean()

    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    rv = rvconvert.convert(VAE(shuffled, False), example_inputs=x)
    rv(x).backward()
    torch.testing.assert_close(rv.last_penalty, reference(x, False), rtol=0.01, atol=0)


def test_a_draw_of_the_prior_alone_is_refused_with_a_way_to_name_it() -> None:
    class WAE(VAE):
        def forward(self, x: Tensor) -> Any:
            z = self.encoder(x)[:, :4]
            prior = torch.randn_like(z)
            return self.decoder(z), (-(z[:, None] - prior[None]).pow(2).sum(-1)).exp().mean()

    x = torch.rand(8, 12)
    with pytest.raises(ConversionError, match=r"(?s)no latent.*latent=\('test_roles.py:\d+',\)"):
        rvconvert.convert(WAE(lambda *a: None, False), example_inputs=x)


def test_a_factor_of_the_reconstruction_with_a_posterior_of_its_own_is_a_latent() -> None:
    """The size of a library beside its composition; noise of the likelihood is none."""

    def scaled(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Tensor:
        size = mu[:, :1] + std[:, :1] * torch.randn_like(mu[:, :1])
        return torch.exp(size) * F.softmax(y, 1)

    def noisy(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Tensor:
        return y + torch.sigmoid(y) * torch.randn_like(y)

    x = torch.rand(64, 12)
    for result, latents in ((scaled, 2), (noisy, 1)):
        report = rvconvert.plan(VAE(result, False), example_inputs=x)
        assert sum(row.role == "latent" for row in report) == latents
    rv = rvconvert.convert(VAE(scaled, False), covariance="sampled", pairs=64, output="distribution")
    vae = VAE(scaled, False)
    truth = torch.stack([vae(x) for _ in range(500)]).var(0)
    assert float(rv(x).var.sum() / truth.sum()) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("doubly", [True, False])
def test_importance_weights_are_those_of_the_mean_log_weights(doubly: bool) -> None:
    """With several samples of one posterior all weights are alike, and the bound is that of one sample."""

    class IWAE(VAE):
        samples = 3

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, -1)
            posterior = Normal(mu, 10 * logvar.exp())
            z = posterior.rsample((self.samples,))
            score = Normal(0.0, 1.0).log_prob(z).sum(-1) - posterior.log_prob(z).sum(-1)
            score = score + Normal(self.decoder(z), 0.1).log_prob(x).sum(-1)
            if doubly:
                with torch.no_grad():
                    weights = (score - torch.logsumexp(score, 0, keepdim=True)).exp()
                return -(weights * score).sum(0).mean()
            return math.log(self.samples) - torch.logsumexp(score, 0).mean()

    x = torch.rand(8, 12)
    losses = []
    for IWAE.samples in (1, 3):
        rv = rvconvert.convert(IWAE(lambda *a: None, False), example_inputs=x)
        losses.append(rv(x))
        losses[-1].backward()
        assert all(torch.isfinite(p.grad).all() for p in rv.parameters() if p.grad is not None)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)


def log_normals(z: Tensor, k: int) -> Tensor:
    return Normal(torch.zeros(k, 4), 1.0).log_prob(z[:, None]).sum(2)


def _logsumexp_by_hand(a: Tensor) -> Tensor:
    largest, _ = torch.max(a, 1)
    return largest + torch.log(torch.exp(a - largest[:, None]).sum(1))


DENSITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logsumexp": lambda z, w: torch.logsumexp(log_normals(z, len(w)) + w.log(), 1),
    "by hand": lambda z, w: (log_normals(z, len(w)).exp() * w).sum(1).log(),
    "less the largest": lambda z, w: _logsumexp_by_hand(log_normals(z, len(w)) + w.log()),
    "a product": lambda z, w: (log_normals(z, len(w)).exp() @ w).log(),
    "a layer's product": lambda z, w: F.linear(torch.exp(log_normals(z, len(w))), w[None]).log().sum(1),
    "a distribution": lambda z, w: MixtureSameFamily(
        Categorical(w), Independent(Normal(torch.zeros(len(w), 4), torch.ones(len(w), 4)), 1)
    ).log_prob(z),
}


@pytest.mark.parametrize("components", [1, 100])
@pytest.mark.parametrize("name", DENSITIES)
def test_a_mixture_prior_is_estimated_from_a_draw(name: str, components: int) -> None:
    """Of equal components the KL is that to one of them, in value and gradient, however many they are."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        return F.mse_loss(y, x), (
            Normal(mu, std).log_prob(z).sum(1) - DENSITIES[name](z, torch.softmax(m.scale[:1].expand(components), 0))
        ).mean()

    x = torch.rand(1, 12, generator=torch.Generator().manual_seed(1)).expand(20000, 12)
    rv = rvconvert.convert(VAE(result, False), example_inputs=x)
    _, kl = rv(x)
    kl.backward()
    mu, logvar = rv.encoder(x[:1]).chunk(2, 1)
    closed = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum()
    (expected,) = torch.autograd.grad(closed, rv.encoder.bias)
    assert kl.item() == pytest.approx(closed.item(), abs=0.04)
    torch.testing.assert_close(rv.encoder.bias.grad, expected, rtol=0, atol=0.04)


def test_a_kernel_over_latents_is_estimated_from_a_draw() -> None:
    """As a Wasserstein autoencoder compares its latents with the prior's."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        return y, torch.exp(-0.5 * (z[:, None] - z[None]).square().sum(2)).mean()

    x = torch.rand(400, 12)
    vae = VAE(result, False)
    rv = rvconvert.convert(vae, example_inputs=x)
    with torch.no_grad():
        assert rv(x)[1].item() == pytest.approx(vae(x)[1].item(), rel=0.1)


def test_a_latent_that_a_loss_outside_is_made_of_warns_once() -> None:
    rv = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: (y, z, mu, std), False))
    x = torch.rand(4, 12)

    def backward(of_latent: bool) -> None:
        y, z, mu, std = rv(x)
        loss = F.mse_loss(y, x) + 0 * z.mean() + mu.square().mean()
        (loss + sampled_kl(z, mu, std).mean() if of_latent else loss).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(of_latent=False)
    with pytest.warns(UserWarning, match="is no KL"):
        backward(of_latent=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(of_latent=True)


SCALED: dict[str, Result] = {
    "size of a library": lambda y, x, z, mu, std, m: x.sum(1, keepdim=True) * F.softmax(y, 1),
    "temperature": lambda y, x, z, mu, std, m: torch.sigmoid(y) / m.scale[:1].exp(),
    "its own posterior": lambda y, x, z, mu, std, m: torch.exp(z[:, :1]) * F.softplus(y),
}


@pytest.mark.parametrize("name", SCALED)
def test_a_factor_for_each_example_belongs_to_the_reconstruction(name: str) -> None:
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    penalties = []
    for loss in (lambda rate: rate, lambda rate: F.poisson_nll_loss(rate, x, log_input=False), lambda rate: F.mse_loss(rate, x)):
        rv = rvconvert.convert(VAE(lambda *a, f=loss: f(SCALED[name](*a)), False), example_inputs=x)
        rv(x)
        penalties.append(rv.last_penalty)
    assert penalties[0] > 0
    torch.testing.assert_close(penalties[1:], [penalties[0]] * 2)


def test_a_person_may_name_the_latents() -> None:
    vae = VAE(lambda y, x, z, mu, std, m: (y, m.decoder(torch.randn(len(x), 4))), False)
    x = torch.rand(16, 12)
    report = rvconvert.plan(vae, example_inputs=x)
    drawn = {row.role: row.where for row in report if row.operation.startswith("torch.randn")}
    assert set(drawn) == {"latent", "nuisance"}
    both = rvconvert.convert(vae, example_inputs=x, latent=tuple(drawn.values()))
    _, fakes = both(x)
    torch.testing.assert_close(fakes, both.decoder.bias.expand(16, 12))


def test_a_call_in_training_without_a_penalty_warns_once() -> None:
    rv = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: (z, mu), False))
    with pytest.warns(UserWarning, match="attaches no variance penalty"):
        rv(torch.rand(4, 12))
    rv(torch.rand(4, 12))


NORMALISED: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: F.softplus(y) / F.softplus(y).sum(-1, keepdim=True),
    "norm": lambda y: y / y.norm(dim=1, keepdim=True),
    "centred": lambda y: y - y.mean(1, keepdim=True),
    "scores": lambda y: (y - y.mean(1, keepdim=True)) / (y.std(1, keepdim=True) + 1e-2),
    "softmax": lambda y: (y - y.max()).exp() / (y - y.max()).exp().sum(-1, keepdim=True),
    "range": lambda y: (y - y.amin(1, keepdim=True)) / (y.amax(1, keepdim=True) - y.amin(1, keepdim=True)),
}


@pytest.mark.parametrize("inside", [False, True], ids=["returned", "with its loss inside"])
@pytest.mark.parametrize("name", NORMALISED)
def test_a_reconstruction_normalised_by_a_number_for_each_example_is_one(name: str, inside: bool) -> None:
    def result(y: Tensor, x: Tensor, *rest: Any) -> Tensor:
        y = NORMALISED[name](y)
        return F.mse_loss(y, x) if inside else y

    torch.manual_seed(0)
    x = torch.rand(6, 12)
    model = rvconvert.convert(VAE(result, False), covariance="sampled", pairs=512, seed=0).eval()
    model(x)
    plain = VAE(lambda y, *rest: NORMALISED[name](y), False).eval()
    with torch.no_grad():
        expected = 50 * torch.stack([plain(x) for _ in range(4000)]).var(0).square().mean()
    assert float(model.last_penalty) == pytest.approx(float(expected), rel=0.15)
    if not inside:
        as_moments = rvconvert.convert(VAE(result, False), output="distribution", attach=False)
        assert isinstance(as_moments(x), rvconvert.RandomVariable)


class OfTwoHalves(VAE):
    def __init__(self, result: Callable[..., Any]) -> None:
        super().__init__(result, False)
        self.decoder = nn.Linear(4, 24)


HETEROSCEDASTIC: dict[str, Callable[..., Any]] = {
    "function": lambda y, x, *rest: (F.gaussian_nll_loss(y[:, :12], x, F.softplus(y[:, 12:])), y[:, :12]),
    "chunk": lambda y, x, *rest: (lambda m, v: (F.gaussian_nll_loss(m, x, F.softplus(v)), m))(*y.chunk(2, -1)),
    "law": lambda y, x, *rest: (lambda m, v: (-Normal(m, F.softplus(v)).log_prob(x).mean(), m))(*y.chunk(2, -1)),
    "split": lambda y, x, *rest: (lambda m, v: (m, F.gaussian_nll_loss(m, x, v.exp())))(*y.split(12, -1)),
}


@pytest.mark.parametrize("mode", ["independent", "calibrated", "sampled", "lowrank"])
@pytest.mark.parametrize("name", HETEROSCEDASTIC)
def test_a_decoder_of_means_and_variances_is_penalised_at_its_mean(name: str, mode: str) -> None:
    x = torch.rand(6, 12)
    found = []
    for result in (HETEROSCEDASTIC[name], lambda y, *rest: y[:, :12]):
        model = rvconvert.convert(OfTwoHalves(result), covariance=mode, seed=0, **({"pairs": 64} if mode == "sampled" else {}))
        left = model(x)
        sum(each.sum() for each in (left if isinstance(left, tuple) else (left,))).backward()
        found.append(float(model.last_penalty))
    assert found[0] == pytest.approx(found[1], rel=0.02)


@pytest.mark.parametrize("name", HETEROSCEDASTIC)
def test_such_a_decoder_that_gives_its_loss_alone_is_penalised_whole(name: str) -> None:
    x = torch.rand(6, 12)

    def loss(*given: Any) -> Tensor:
        return next(each for each in HETEROSCEDASTIC[name](*given) if each.ndim == 0)

    model = rvconvert.convert(OfTwoHalves(loss))
    model(x).backward()
    whole = rvconvert.convert(OfTwoHalves(lambda y, *rest: y))
    whole(x)
    assert float(model.last_penalty) == pytest.approx(float(whole.last_penalty), rel=1e-4)


def test_a_gated_reconstruction_of_one_number_is_no_loss():
    class OneNumber(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(1, 4), nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2), nn.GLU())

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return torch.exp(self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))), mu, logvar

    y, *_ = rvconvert.convert(OneNumber(), output="distribution")(torch.randn(16, 1))
    assert isinstance(y, rvconvert.RandomVariable)
    assert (y.var > 0).all()


class Recurrent(nn.Module):
    """A VRNN with its loss inside: the encoder reads the state before it beside each input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.cell = nn.Linear(4 + 5, 6), nn.Linear(3 + 5, 4), nn.GRUCell(4 + 3, 5)

    def forward(self, x: Tensor) -> Any:
        h, loss, steps = torch.zeros(len(x), 5), torch.zeros(()), []
        for step in x.unbind(1):
            mu, logvar = self.encoder(torch.cat([step, h], 1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            y = self.decoder(torch.cat([z, h], 1))
            steps.append(y)
            h = self.cell(torch.cat([step, z], 1), h)
            kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1).mean()
            loss = loss + F.mse_loss(y, step) + kl
        return (loss, steps) if self.given else loss

    given = False


class Canvas(nn.Module):
    """DRAW: what is left to draw, x - sigmoid(canvas), is encoded; ``kept`` on the model, canvas after canvas."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept, self.given = kept, False
        self.encoder, self.sampler, self.decoder, self.write = (
            nn.LSTMCell(17, 5),
            nn.Linear(5, 6),
            nn.LSTMCell(3, 5),
            nn.Linear(5, 6),
        )

    def forward(self, x: Tensor) -> Any:
        if self.kept:
            self.canvases = [0] * 3
        canvas, h = torch.zeros(len(x), 6), torch.zeros(len(x), 5)
        encoded = decoded = (h, h)
        for t in range(3):
            encoded = self.encoder(torch.cat((x, x - torch.sigmoid(canvas), h), 1), encoded)
            mu, logvar = self.sampler(encoded[0]).chunk(2, 1)
            decoded = self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu), decoded)
            h = decoded[0]
            canvas = canvas + self.write(h)
            if self.kept:
                self.canvases[t] = canvas
        y = torch.sigmoid(canvas)
        loss = F.binary_cross_entropy(y, x)
        return (loss, [y]) if self.given else loss


class Residual(VAE):
    """The last layer adds to what it was given."""

    given = False

    def __init__(self) -> None:
        super().__init__(lambda *rest: None, False)
        self.last = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Any:
        mu, logvar = self.encoder(x).chunk(2, -1)
        h = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
        y = h + torch.tanh(self.last(h))
        loss = F.mse_loss(y, x)
        return (loss, [y]) if self.given else loss


INSIDE: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "VRNN": (Recurrent, (3, 4, 4)),
    "DRAW": (lambda: Canvas(False), (4, 6)),
    "DRAW, canvases kept": (lambda: Canvas(True), (4, 6)),
    "a residual layer": (Residual, (4, 12)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_loss_inside_is_penalised_where_it_compares(name: str) -> None:
    make, shape = INSIDE[name]
    x, model = torch.rand(shape, generator=torch.Generator().manual_seed(1)), make()
    rv = rvconvert.convert(model, example_inputs=x)
    rv(x).backward()
    model.given = True
    _, steps = rvconvert.convert(model, output="distribution")(x)
    torch.testing.assert_close(rv.last_penalty, torch.stack([rvconvert.variance_penalty(y) for y in steps]).sum())


FED_BACK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "argmax": lambda y, target: y.argmax(-1),
    "max": lambda y, target: torch.max(y.data, 1)[1],
    "topk": lambda y, target: y.topk(1)[1].squeeze(-1),
    "stacked": lambda y, target: torch.stack([y.argmax(-1), target], 1)[:, 0],
    "now and then": lambda y, target: torch.where(torch.arange(len(y)) < 2, target, y.argmax(-1)),
    "one_hot": lambda y, target: F.one_hot(y.argmax(-1), 9).argmax(-1),
    "multinomial": lambda y, target: torch.multinomial(F.softmax(1e4 * y, -1), 1)[:, 0],
}


class Tokens(nn.Module):
    """A decoder that takes its own tokens back."""

    def __init__(self, feed: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.feed, self.embedding, self.encoder = feed, nn.Embedding(9, 4), nn.Linear(16, 6)
        self.start, self.cell, self.out = nn.Linear(3, 5), nn.GRUCell(4, 5), nn.Linear(5, 9)
        with torch.no_grad():
            self.encoder.bias[3:] -= 30

    def forward(self, x: Tensor) -> Any:
        mu, logvar = self.encoder(self.embedding(x).flatten(1)).chunk(2, 1)
        h, token, steps = self.start(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), x[:, 0], []
        for t in range(x.shape[1]):
            h = self.cell(self.embedding(token), h)
            steps.append(self.out(h))
            token = self.feed(steps[-1], x[:, t])
        return torch.stack(steps, 1)


@pytest.mark.parametrize("name", FED_BACK)
def test_a_decoder_may_take_back_the_tokens_that_it_gave(name: str) -> None:
    model, x = Tokens(FED_BACK[name]), torch.randint(9, (3, 4), generator=torch.Generator().manual_seed(0))
    rv = rvconvert.convert(model, example_inputs=x)
    torch.testing.assert_close(rv(x), model(x), rtol=1e-4, atol=1e-5)
    assert 0 < rv.last_penalty < 1e-12


@pytest.mark.parametrize("width", [0.01, 1.0, 10.0])
def test_log_q_of_a_draw_around_a_random_location_is_that_of_its_noise(width: float) -> None:
    class Hierarchical(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.decoder = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Any:
            posterior = Normal(self.second(Normal(self.first(x), width).rsample()), 0.5)
            z = posterior.rsample()
            by_hand = posterior.mean - z
            return self.decoder(z), posterior.log_prob(z).sum(-1), by_hand.square().sum(-1)

    _, log_q, squares = rvconvert.convert(Hierarchical())(torch.rand(8, 4))
    entropy = 3 * (0.5 * math.log(2 * math.pi * 0.25) + 0.5)
    torch.testing.assert_close(log_q, torch.full((8,), -entropy), rtol=1e-4, atol=0)
    torch.testing.assert_close(squares, torch.full((8,), 0.75), rtol=1e-4, atol=0)


# ---- beside the reconstruction ------------------------------------------------------------------------------------------


def penalty_of(rv: nn.Module, *args: Tensor) -> float:
    rv(*args)
    return float(rv.last_penalty)


LIKE_IT: dict[str, Callable[[Tensor, Tensor, VAE], Tensor]] = {
    "expand_as": lambda y, x, m: m.scale.expand_as(y),
    "type_as": lambda y, x, m: x.type_as(y),
    "to": lambda y, x, m: x.to(y),
    "view_as": lambda y, x, m: x.view_as(y),
    "reshape_as": lambda y, x, m: x.reshape_as(y),
}


@pytest.mark.parametrize("name", LIKE_IT)
def test_what_takes_its_shape_or_type_from_the_reconstruction_is_plain(name: str) -> None:
    x = torch.rand(4, 12)
    rv = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: (y, LIKE_IT[name](y, x, m)), False), example_inputs=x)
    alone = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: y, False), example_inputs=x)
    assert penalty_of(rv, x) == pytest.approx(penalty_of(alone, x))
    y, other = rv(x)
    assert type(y) is Tensor
    torch.testing.assert_close(other, LIKE_IT[name](y, x, rv))


LIKELIHOODS: dict[str, Callable[[Tensor, Tensor, VAE], Tensor]] = {
    "log_prob": lambda y, x, m: -Normal(y, F.softplus(m.head(y)) + 0.1).log_prob(x).mean(),
    "gaussian_nll_loss": lambda y, x, m: F.gaussian_nll_loss(y, x, F.softplus(m.head(y)).expand(8, 12) + 0.1),
    "GaussianNLLLoss": lambda y, x, m: nn.GaussianNLLLoss()(y, x, torch.exp(m.head(y)).expand(8, 12)),
    "negative binomial": lambda y, x, m: -(x * torch.log(r := F.softplus(y)) - (x + 1) * torch.log(1 + r)).mean(),
    "factor analysis": lambda y, x, m: (
        -torch.distributions.LowRankMultivariateNormal(y, m.decoder.weight[:, :2], m.scale.exp()).log_prob(x).mean()
    ),
    "a window of the model": lambda y, x, m: F.l1_loss(*(F.conv1d(each[:, None], m.window) for each in (y, x))),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_likelihood_inside_has_l_c_on_the_mean_alone(name: str, weighted: bool) -> None:
    x = torch.rand(8, 12)

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Tensor:
        loss = LIKELIHOODS[name](y, x, m)
        return loss * x[0, 0] / x.sum() if weighted else loss

    rv = rvconvert.convert(VAE(result, False), example_inputs=x)
    expected = rvconvert.convert(VAE(lambda y, *_: F.softplus(y) if name == "negative binomial" else y, False), example_inputs=x)
    assert penalty_of(rv, x) == pytest.approx(penalty_of(expected, x), rel=1e-4)


class TwoLevels(nn.Module):
    """``loss(reconstruction error, KL of either level, weights)``, each of each example; ``head``: its labels and loss beside."""

    def __init__(self, loss: Callable[..., Tensor], head: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.posterior = nn.Linear(10, 8), nn.Linear(8, 4), nn.Linear(8, 6)
        self.prior = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))
        self.decoder, self.classifier = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 10)), nn.Linear(3, 5)
        self.loss, self.head = loss, head

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        m2, l2 = self.second(h).chunk(2, -1)
        z2 = m2 + (0.5 * l2).exp() * torch.randn_like(m2)
        (pm, pl), (qm, ql) = self.prior(z2).chunk(2, -1), self.posterior(h).chunk(2, -1)
        z1 = qm + (0.5 * ql).exp() * torch.randn_like(qm)
        error = (self.decoder(z1) - x).square().sum(-1)
        below, above = (Normal(m, (0.5 * v).exp()) for m, v in ((qm, ql), (pm, pl)))
        kl = kl_divergence(below, above).sum(-1) + kl_divergence(Normal(m2, (0.5 * l2).exp()), Normal(0.0, 1.0)).sum(-1)
        loss = self.loss(error, kl, w)
        return loss + F.cross_entropy(self.classifier(z1), w.long()) if self.head else loss


WEIGHTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "no weight": lambda error, kl, w: (error + kl).mean(),
    "of each example": lambda error, kl, w: (w * (error + kl)).sum() / len(w),
    "beta, a tensor": lambda error, kl, w: (error + w[0] * kl).mean(),
    "the sum of a mask": lambda error, kl, w: (error + kl).sum() / w.sum(),
}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_an_input_that_weighs_a_loss_and_a_head_add_no_l_c(name: str, head: bool) -> None:
    x, w = torch.rand(4, 10), torch.ones(4)
    rv = rvconvert.convert(TwoLevels(WEIGHTED[name], head), example_inputs=(x, w))
    expected = rvconvert.convert(TwoLevels(WEIGHTED["no weight"], False), example_inputs=(x, w))
    assert penalty_of(rv, x, w) == pytest.approx(penalty_of(expected, x, w))
    rows = rvconvert.plan(TwoLevels(WEIGHTED[name], head), example_inputs=(x, w))
    assert [row.operation for row in rows if row.role == "reconstruction"] == ["Linear"]


class StateSpace(nn.Module):
    """``leave`` takes reconstructions, latents, the posterior's and the prior's means, one a step; z is as large as x."""

    def __init__(self, leave: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.posterior, self.prior, self.decoder = nn.Linear(5 + 5, 10), nn.Linear(5, 10), nn.Linear(5, 5)
        self.leave = leave

    def forward(self, x: Tensor) -> Any:
        z, steps = x.new_zeros(len(x), 5), []
        for t in range(x.shape[1]):
            pm, _ = torch.tanh(self.prior(z)).chunk(2, -1)
            qm, ql = self.posterior(torch.cat([z, x[:, t]], -1)).chunk(2, -1)
            z = qm + (0.5 * ql).exp() * torch.randn_like(qm)
            steps.append((self.decoder(z), z, qm, pm))
        return self.leave(*zip(*steps, strict=True))


RETURNED: dict[str, Callable[..., Any]] = {
    "stacked": lambda y, z, q, p: tuple(torch.stack(each, 1) for each in (y, z, q, p)),
    "latents": lambda y, z, q, p: (torch.stack(y, 1), torch.stack(z, 1)),
    "posterior in lists": lambda y, z, q, p: (torch.stack(y, 1), list(q)),
}


@pytest.mark.parametrize("name", RETURNED)
def test_latents_and_their_parameters_that_leave_have_no_l_c(name: str) -> None:
    x = torch.rand(4, 3, 5)
    rv = rvconvert.convert(StateSpace(RETURNED[name]), example_inputs=x)
    alone = rvconvert.convert(StateSpace(lambda y, *_: torch.stack(y, 1)), example_inputs=x)
    assert penalty_of(rv, x) == pytest.approx(penalty_of(alone, x))


def test_a_flow_s_latent_that_a_loss_outside_is_made_of_warns() -> None:
    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        last = z + torch.tanh((z * m.scale[:4]).sum(1, keepdim=True)) * m.prior.bias
        return m.decoder(last), z, last

    x = torch.rand(4, 12)
    rv = rvconvert.convert(VAE(result, False), example_inputs=x)
    y, _, last = rv(x)
    loss = F.mse_loss(y, x) - Normal(0.0, 1.0).log_prob(last).mean()
    with pytest.warns(UserWarning, match="is no KL"):
        loss.backward()


def test_noise_that_is_added_to_a_latent_goes_on_being_drawn() -> None:
    """A diffusion of the latent: the score network's target is the noise."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        t, eps = torch.rand(len(z), 1), torch.randn_like(z)
        return y, F.mse_loss(m.prior(torch.sqrt(1 - t) * z + torch.sqrt(t) * eps), eps)

    x = torch.rand(4, 12)
    roles = [row.role for row in rvconvert.plan(VAE(result, False), example_inputs=x) if row.role in ("latent", "nuisance")]
    assert roles == ["latent", "nuisance", "nuisance"]
    rv = rvconvert.convert(VAE(result, False), example_inputs=x)
    assert not torch.equal(rv(x)[1], rv(x)[1])


BESIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a term": lambda y, b: y + b,
    "a term of its logarithm": lambda y, b: torch.exp(0.1 * y + b),
    "a factor": lambda y, b: y * torch.exp(b),
    "a place": lambda y, b: F.grid_sample(
        y.view(-1, 1, 3, 4), b.view(-1, 1, 1, 2).expand(-1, 3, 4, 2), align_corners=False
    ).flatten(1),
}


@pytest.mark.parametrize("name", BESIDE)
def test_a_latent_that_meets_what_a_decoder_gives_is_one(name: str) -> None:
    class Offset(VAE):
        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, -1)
            first, second = (m + torch.randn_like(m) * (0.5 * v).exp() for m, v in ((mu, logvar), (mu[:, :2], logvar[:, :2])))
            return BESIDE[name](self.decoder(first), second if name == "a place" else second[:, :1])

    x = torch.rand(4, 12)
    rv = rvconvert.convert(Offset(None, False), example_inputs=x)  # type: ignore[arg-type]
    assert torch.equal(rv(x), rv(x))
    rows = rvconvert.plan(Offset(None, False), example_inputs=x)  # type: ignore[arg-type]
    assert [row.role for row in rows if row.role in ("latent", "nuisance")] == ["latent", "latent"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_learned_prior_s_draw_in_eval_mode_goes_on_drawing(shared: bool) -> None:
    """Drawn by the function that draws from the posterior, as from layers of its own."""

    class Conditional(VAE):
        def draw(self, moments: Tensor) -> Tensor:
            mu, logvar = moments.chunk(2, -1)
            return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

        def forward(self, c: Tensor, x: Tensor | None = None) -> Tensor:
            if x is not None:
                z = self.draw(self.encoder(torch.cat([x, c], 1)))
            elif shared:
                z = self.draw(self.encoder(torch.cat([torch.zeros(len(c), 8), c], 1)))
            else:
                z = self.draw(torch.cat([self.prior(c), self.prior(c)], 1))
            return self.decoder(z)

    x, c = torch.rand(8, 8), torch.rand(8, 4)
    rv = rvconvert.convert(Conditional(None, False))  # type: ignore[arg-type]
    assert torch.equal(rv(c, x), rv(c, x))
    rv.eval()
    assert torch.equal(rv(c, x), rv(c, x))
    assert torch.allclose(rv(c), rv(c)) == shared  # by the posterior's own layers it is one


@pytest.mark.parametrize("name", ["train", "eval", "state_dict"])
def test_a_loop_that_calls_nothing_converted_is_told(name: str) -> None:
    rv = rvconvert.convert(VAE(lambda y, *_: y, False))
    x = torch.rand(4, 12)
    mu, logvar = rv.encoder(x).chunk(2, -1)
    F.mse_loss(rv.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), x).backward()
    with pytest.warns(UserWarning, match="never called"):
        getattr(rv, name)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called = rvconvert.convert(VAE(lambda y, *_: y, False))
        called.eval().train()
        called(x).sum().backward()
        getattr(called, name)()


def test_a_latent_s_name_that_names_no_draw_is_refused() -> None:
    x = torch.rand(4, 12)
    with pytest.raises(ConversionError, match=r"latent='test_roles.py:1' names no draw in it; it draws at .*test_roles"):
        rvconvert.convert(VAE(lambda y, *_: y, False), latent="test_roles.py:1", example_inputs=x)


@pytest.mark.parametrize("hard", [False, True])
def test_a_category_drawn_from_what_a_decoder_gives_has_l_c_on_its_logits(hard: bool) -> None:
    def categories(y: Tensor, *_: Any) -> Tensor:
        return F.gumbel_softmax(y.view(-1, 3, 4), tau=0.7, hard=hard).flatten(1)

    x = torch.rand(4, 12)
    rv = rvconvert.convert(VAE(categories, False), example_inputs=x)
    logits = rvconvert.convert(VAE(lambda y, *_: y, False), example_inputs=x)
    assert penalty_of(rv, x) == pytest.approx(penalty_of(logits, x))
    gradients = []
    for penalty in (0.0, 50.0):
        made = rvconvert.convert(VAE(categories, False), penalty=penalty)
        torch.manual_seed(1)
        F.mse_loss(made(x), x).backward()
        gradients.append(made.decoder.weight.grad)
    assert not torch.allclose(*gradients)


def test_a_number_that_changes_with_every_call_is_said() -> None:
    class Annealed(VAE):
        def forward(self, x: Tensor, step: int = 0) -> Any:
            return super().forward(x) * (1 + 0 * min(step, 10))

    rv = rvconvert.convert(Annealed(lambda y, *_: y, False))
    x = torch.rand(2, 12)
    for step in range(16):
        rv(x, step)
    with pytest.warns(UserWarning, match=r"torch.tensor\(step\)"):
        rv(x, 16)


# ---- which draws are latents --------------------------------------------------------------------------------------------

PLACED: dict[str, Callable[..., Tensor]] = {
    "location, then noise": lambda z, m, s, e: (z + m) + s * e,
    "noise, then location": lambda z, m, s, e: (z + s * e) + m,
    "both, then a latent": lambda z, m, s, e: z + (m + s * e),
    "a random walk": lambda z, m, s, e: z + s * e,
    "drift to a location": lambda z, m, s, e: 0.9 * z + 0.1 * m + s * e,
}


@pytest.mark.parametrize("name", PLACED)
def test_a_second_latent_is_one_in_any_order_of_its_terms(name: str) -> None:
    class Second(VAE):
        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, -1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            return self.decoder(PLACED[name](z, self.prior(torch.tanh(mu)), self.scale[:4].exp(), torch.randn_like(z)))

    rows = rvconvert.plan(Second(None, False), example_inputs=torch.rand(4, 12))  # type: ignore[arg-type]
    assert [row.role for row in rows if row.role in ("latent", "nuisance")] == ["latent", "latent"]


class Encoders(VAE):
    """One encoder in training, another one in eval mode, of as many inputs: an average of weights, a second stage."""

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = (self.encoder(x) if self.training else self.other(x)).chunk(2, -1)
        return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())


def test_another_encoder_in_eval_mode_places_the_latent_still() -> None:
    vae, x = Encoders(None, False), torch.rand(4, 12)  # type: ignore[arg-type]
    vae.other = nn.Linear(12, 8)
    rv = rvconvert.convert(vae)
    rv(x)
    rv.eval()
    assert torch.equal(rv(x), rv(x))


class Prior(VAE):
    def forward(self, c: Tensor, x: Tensor | None = None) -> Tensor:
        moments = torch.cat([self.prior(c)] * 2, 1) if x is None else self.encoder(torch.cat([x, c], 1))
        mu, logvar = moments.chunk(2, -1)
        return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())


def saved(rv: nn.Module, path: Path) -> nn.Module:
    rvconvert.save(rv, path, kwargs={"result": None, "reads": False})
    return rvconvert.load(path)


@pytest.mark.parametrize("way", ["as it is", "an evaluation first", "deepcopy", "pickle", "file"])
def test_a_prior_s_draw_in_eval_mode_is_known_after_training(way: str, tmp_path: Path) -> None:
    x, c = torch.rand(8, 8), torch.rand(8, 4)
    rv = rvconvert.convert(Prior(None, False))  # type: ignore[arg-type]
    if way == "an evaluation first":
        rv.eval()(c)
    rv.train()(c, x).mean().backward()
    ways = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "file": lambda model: saved(model, tmp_path / "prior.pt"),
    }
    rv = ways.get(way, lambda model: model)(rv)
    rv.eval()
    assert not torch.allclose(rv(c), rv(c))


BASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda z, basis: torch.matmul(z, basis.t()),
    "einsum": lambda z, basis: torch.einsum("bi,oi->bo", z, basis),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_a_basis_that_the_encoder_reads_the_input_by_decodes(name: str, inside: bool) -> None:
    class Components(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.register_buffer("basis", torch.randn(12, 4))
            self.encoder = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(torch.matmul(x, self.basis)).chunk(2, -1)
            y = BASES[name](mu + torch.randn_like(mu) * (0.5 * logvar).exp(), self.basis)
            return F.mse_loss(y, x) if inside else y

    x = torch.rand(4, 12, generator=torch.Generator().manual_seed(1))
    y = rvconvert.convert(Components(), output="distribution")(x) if not inside else None
    rv = rvconvert.convert(Components(), example_inputs=x)
    found = penalty_of(rv, x)
    assert found > 0
    if y is not None:
        assert found == pytest.approx(float(rvconvert.variance_penalty(y)))


def test_modalities_of_fewer_latents_and_of_a_latent_s_size_have_l_c() -> None:
    class Shared(VAE):
        def forward(self, x: Tensor, w: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, -1)
            shared, own = (mu + torch.randn_like(mu) * (0.5 * logvar).exp() for _ in range(2))
            return self.decoder(shared + own), self.prior(shared), mu, logvar

    rows = rvconvert.plan(Shared(None, False), example_inputs=(torch.rand(4, 12), torch.rand(4, 4)))  # type: ignore[arg-type]
    assert [row.operation for row in rows if row.role == "reconstruction"] == ["Linear", "Linear"]


def test_a_small_term_of_the_reconstruction_is_no_head() -> None:
    x = torch.rand(4, 12)
    result = lambda y, x, z, mu, std, m: F.mse_loss(m.head(y) * torch.linspace(0, 1, 12) + m.decoder(z), x)  # noqa: E731
    rows = rvconvert.plan(VAE(result, False), example_inputs=x)
    assert [row.operation for row in rows if row.role == "reconstruction"] == ["Tensor.add"]


def test_a_closed_form_of_an_inner_posterior_does_not_warn() -> None:
    class Inner(VAE):
        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, -1)
            inner = self.prior(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return self.decoder(inner + torch.randn_like(inner) * 0.1), inner

    x = torch.rand(4, 12)
    rv = rvconvert.convert(Inner(None, False), example_inputs=x)  # type: ignore[arg-type]
    y, inner = rv(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (F.mse_loss(y, x) + kl_divergence(Normal(inner, 0.1), Normal(0.0, 1.0)).mean()).backward()


WITHOUT: dict[str, Callable[[Tensor], Tensor]] = {
    "the first of several": lambda h: h.max(1, keepdim=True)[0],
    "mean and variance": lambda h: torch.var_mean(h, 1, keepdim=True)[1],
    "copied": lambda h: torch.zeros(8, 12).copy_(h),
    "added in place": lambda h: torch.zeros(8, 12).add_(h),
    "scattered": lambda h: torch.zeros(8, 12).index_add_(0, torch.arange(8), h),
}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_made_without_gradients_has_none(name: str, side: str) -> None:
    """At a posterior that does not vary, the gradients are the plain model's."""

    class Centred(VAE):
        def centred(self, h: Tensor) -> Tensor:
            with torch.no_grad():
                rest = WITHOUT[name](h)
            return h - 0.5 * rest

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(x * self.scale)
            mu, logvar = self.encoder(self.centred(h) if side == "encoder" else h).chunk(2, -1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * (logvar - 40)).exp())
            return self.centred(y) if side == "decoder" else y

    vae, x = Centred(None, False), torch.rand(8, 12)  # type: ignore[arg-type]
    rv = rvconvert.convert(vae, penalty=0.0, example_inputs=x)
    for model in (vae, rv):
        F.mse_loss(model(x), x).backward()
    for name_, p in rv.named_parameters():
        if (plain := vae.get_parameter(name_).grad) is not None:
            torch.testing.assert_close(p.grad, plain, rtol=1e-3, atol=1e-6)


MADE: dict[str, Callable[[Tensor, Tensor, VAE], Tensor]] = {
    "a mixture": lambda y, z, m: (
        torch.softmax(m.prior(z), 1).unsqueeze(2) * torch.stack([m.decoder(k * z) for k in (1, 2, 3, 4)], 1)
    ).sum(1),
    "a gate": lambda y, z, m: torch.sigmoid(m.head(y)) * m.decoder(z),
    "a sum of layers": lambda y, z, m: y + m.head(y) * torch.linspace(0, 1, 12),
    "a cumulative sum": lambda y, z, m: y.cumsum(1),
    "the greatest of several": lambda y, z, m: torch.stack([y, m.decoder(torch.tanh(z))], 1).max(1)[0],
    "a stage that another one reads": lambda y, z, m: torch.sigmoid(y) + 0 * m.head(torch.sigmoid(y)),
    "noisy or": lambda y, z, m: 1 - (1 - torch.sigmoid(y)) * (1 - torch.sigmoid(m.decoder(-z))),
    "normalized": lambda y, z, m: F.normalize(y, dim=1),
}


@pytest.mark.parametrize("name", MADE)
def test_l_c_inside_is_where_it_is_if_the_reconstruction_leaves(name: str) -> None:
    x = torch.rand(4, 12)
    inside = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: F.mse_loss(MADE[name](y, z, m), x), False), example_inputs=x)
    returned = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: MADE[name](y, z, m), False), example_inputs=x)
    assert penalty_of(inside, x) == pytest.approx(penalty_of(returned, x), rel=1e-4)


def test_a_long_sequence_in_lists_converts_in_seconds() -> None:
    """Roles of many values that leave: what lies behind each is found once, not for each pair."""
    start = time.perf_counter()
    rvconvert.convert(StateSpace(lambda *steps: tuple(map(list, steps))), example_inputs=torch.rand(4, 30, 5))
    assert time.perf_counter() - start < 20


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled": lambda logvar, drop: logvar.masked_fill(drop > 0, math.inf),
    "large": lambda logvar, drop: logvar + drop * 1e9,
    "infinite": lambda logvar, drop: logvar + drop.masked_fill(drop > 0, math.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_that_is_added_goes_on_drawing(name: str) -> None:
    """As a mask of scores before a softmax is."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Conv1d(1, 6, 3, padding=1), nn.Linear(3, 12)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x.unsqueeze(1)).chunk(2, 1)
            logvar = MASKS[name](logvar, torch.bernoulli(torch.full_like(logvar, 0.1)))
            mu, logvar = (mu * torch.softmax(-logvar, -1)).sum(-1), -torch.logsumexp(-logvar, -1)
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())

    rv, x = rvconvert.convert(Pooled()), torch.rand(4, 12)
    y = rv(x)
    y.sum().backward()
    assert bool(y.isfinite().all()) and not torch.equal(y, rv(x))
    assert rv.last_penalty is not None and 0 < float(rv.last_penalty) < 1
    assert [row.role for row in rvconvert.plan(Pooled(), example_inputs=x) if row.operation == "torch.bernoulli"] == ["nuisance"]


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_draws_with_gradients_alone_may_be_called_without_first(training: bool) -> None:
    class Draws(VAE):
        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            draws = self.training and torch.is_grad_enabled()
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp() if draws else mu)

    rv, x = rvconvert.convert(Draws(None, False)), torch.rand(4, 12)  # type: ignore[arg-type]
    with torch.no_grad():
        first = rv.train(training)(x)
    torch.testing.assert_close(rv.train()(x), first)
    assert rv.last_penalty is not None


COUNTS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "the rate": lambda rate, dropout, scale: rate,
    "dropout beside": lambda rate, dropout, scale: (rate, dropout),
    "scale and dropout beside": lambda rate, dropout, scale: {"px_scale": scale, "px_rate": rate, "px_dropout": dropout},
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_a_library_whose_size_is_a_latent_too(name: str) -> None:
    """The rate, of single cells, is the reconstruction, though it is an elementwise function of a latent."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.library, self.hidden = nn.Linear(10, 8), nn.Linear(10, 2), nn.Linear(4, 16)
            self.scale, self.dropout = nn.Linear(16, 10), nn.Linear(16, 10)

        def draw(self, h: Tensor) -> Tensor:
            mu, logvar = h.chunk(2, 1)
            return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

        def forward(self, x: Tensor) -> Any:
            z, size = self.draw(self.encoder(x)), self.draw(self.library(x))
            h = torch.relu(self.hidden(z))
            scale = torch.softmax(self.scale(h), 1)
            return COUNTS[name](size.exp() * scale, self.dropout(h), scale)

    x = torch.rand(12, 10)
    given = rvconvert.convert(Counts(), output="distribution")(x)
    if isinstance(given, dict):  # the scale is a part of the rate
        given = given["px_rate"], given["px_dropout"]
    values = given if isinstance(given, tuple) else (given,)
    rv = rvconvert.convert(Counts())
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(sum(float(rvconvert.variance_penalty(y)) for y in values))  # type: ignore[arg-type]


JOINED: dict[str, Callable[[Tensor], Tensor]] = {
    "zero sum": lambda y: torch.cat((y[:, :-1], -y[:, :-1].sum(1, keepdim=True)), 1),
    "its norm": lambda y: torch.cat((y, y.norm(dim=1, keepdim=True)), 1)[:, 1:],
    "a coupling of volume 1": lambda y: (
        (s := torch.cat((t := torch.tanh(y[:, :5]), -t.sum(1, keepdim=True)), 1)),
        torch.cat((y[:, 6:] * s.exp(), y[:, :6]), 1),
    )[1],
}


@pytest.mark.parametrize("name", JOINED)
def test_a_sum_that_is_joined_to_its_summands_is_no_loss(name: str) -> None:
    def result(y: Tensor, *rest: Any) -> Any:
        return JOINED[name](y)

    x = torch.rand(8, 12)
    y = rvconvert.convert(VAE(result, False), output="distribution")(x)
    rv = rvconvert.convert(VAE(result, False))
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]


TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "scaled": lambda x: 2 * x - 1,
    "relative": lambda x: x - x[:, :1],
    "standardized": lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_summed_up_before_it_meets_a_target_made_of_the_input(name: str) -> None:
    """Increments of a track, which is compared relative to its first point."""

    def track(y: Tensor, *rest: Any) -> Any:
        return y.view(-1, 6, 2).cumsum(1)

    x = torch.rand(5, 12)
    y = rvconvert.convert(VAE(track, False), output="distribution")(x)
    rv = rvconvert.convert(VAE(lambda y, x, *rest: F.mse_loss(track(y), TARGETS[name](x.view(-1, 6, 2))), False))
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]


@pytest.mark.parametrize("drawn", ["no", "at once", "step by step"])
@pytest.mark.parametrize("picked", [False, True])
def test_weights_that_an_input_picks_decode(picked: bool, drawn: str) -> None:
    """Topics of a document's year, below a latent of the year; drawn from parameters, they are weights too."""

    class Topics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.trend, self.document = nn.Linear(20, 10), nn.Linear(25, 10)
            self.words = nn.Parameter(torch.randn(1, 5, 20).repeat(3, 1, 1))

        def draw(self, h: Tensor) -> Tensor:
            mu, logvar = h.chunk(2, 1)
            return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

        def noisy(self) -> Tensor:
            if drawn == "no":
                return self.words
            if drawn == "at once":
                return self.words + 0.1 * torch.randn_like(self.words)
            made = torch.zeros(3, 5, 20)
            for year in range(3):
                made[year] = self.words[year] + 0.1 * torch.randn_like(self.words[year])
            return made

        def forward(self, counts: Tensor, years: Tensor, trend: Tensor) -> Tensor:
            eta = self.draw(self.trend(trend))
            theta = torch.softmax(self.draw(self.document(torch.cat((counts, eta[years]), 1))), 1)
            beta = torch.softmax(self.noisy(), 2)
            beta = beta[years] if picked else beta[:1].expand(len(counts), -1, -1)
            likelihood = torch.bmm(theta.unsqueeze(1), beta).squeeze(1)
            return (-torch.log(likelihood + 1e-6) * counts).sum()

    torch.manual_seed(0)
    counts, years, trend = torch.rand(12, 20), torch.tensor([0, 1, 2] * 4), torch.rand(3, 20)
    rv = rvconvert.convert(Topics())
    assert torch.equal(rv(counts, years, trend), rv(counts, years, trend)) == (drawn == "no")
    rows = rvconvert.plan(Topics(), example_inputs=(counts, years, trend))
    assert [row.role for row in rows if row.role not in ("", "nuisance")] == ["latent", "latent", "reconstruction", "loss"]


def straight_through(z: Tensor) -> Tensor:
    y = torch.softmax(z, 1)
    _, index = y.max(-1)
    hard = torch.zeros_like(y).scatter_(1, index.view(-1, 1), 1)
    return (hard - y).detach() + y


def packed_and_padded(x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0]


PICKS: dict[str, tuple[bool, Callable[..., Any]]] = {
    "straight through": (True, lambda y, x, z, mu, std, m: m.decoder(straight_through(z))),
    "one hot": (True, lambda y, x, z, mu, std, m: m.decoder(F.one_hot(z.argmax(1), 4).float())),
    "a cluster beside": (False, lambda y, x, z, mu, std, m: (y, z.argmax(1))),
    "an accuracy beside": (False, lambda y, x, z, mu, std, m: (y, (y.argmax(1) == x.argmax(1)).float().mean())),
    "a maximum": (False, lambda y, x, z, mu, std, m: m.decoder(z - z.max(1, keepdim=True)[0])),
    "a packed sequence": (False, lambda y, x, z, mu, std, m: m.decoder(packed_and_padded(z[:, None].expand(-1, 3, -1))[:, 0])),
}


@pytest.mark.parametrize("covariance", ["independent", "sampled"])
@pytest.mark.parametrize("name", PICKS)
def test_an_index_that_a_latent_picks_for_the_decoder_is_told(name: str, covariance: str) -> None:
    told, result = PICKS[name]
    rv = rvconvert.convert(VAE(result, False), covariance=covariance)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rv(torch.rand(8, 12))
    assert any("gumbel_softmax" in str(each.message) for each in said) == (told and covariance == "independent")


HEADS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "a label, one hot": (lambda n: torch.eye(4)[torch.arange(len(n)) % 4], lambda h, t: F.cross_entropy(h, t)),
    "several labels": (lambda n: (torch.rand(len(n), 4) > 0.5).float(), F.binary_cross_entropy_with_logits),
    "a reward": (lambda n: torch.rand(len(n), 4), F.mse_loss),
}


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_with_a_target_that_no_layer_reads_has_no_penalty(name: str, returned: bool) -> None:
    target, loss = HEADS[name]

    class Judged(VAE):
        def forward(self, x: Tensor, t: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            y, head = self.decoder(z), 10 * self.prior(z)
            total = F.mse_loss(y, x) + loss(head, t)
            return (total, y, head) if returned else total

    x = torch.rand(8, 12)
    rows = rvconvert.plan(Judged(None, False), example_inputs=(x, target(x)))  # type: ignore[arg-type]
    assert [row.operation for row in rows if row.role == "reconstruction"] == ["Linear"]
    rv = rvconvert.convert(Judged(None, False))  # type: ignore[arg-type]
    rv(x, target(x))
    y = rvconvert.convert(VAE(lambda y, *rest: y, False), output="distribution")(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]


TAKEN_BY_STEPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "indexed": lambda x, t: x[:, t],
    "selected": lambda x, t: x.select(1, t),
    "unbound": lambda x, t: x.unbind(1)[t],
    "split": lambda x, t: x.split(1, 1)[t].squeeze(1),
}


@pytest.mark.parametrize("name", TAKEN_BY_STEPS)
def test_a_reward_beside_steps_of_an_input_has_no_penalty_and_columns_of_the_input_have(name: str) -> None:
    class World(VAE):
        def forward(self, x: Tensor, reward: Tensor) -> Any:
            total = torch.zeros(())
            for t in range(2):
                step, target = TAKEN_BY_STEPS[name](x, t), TAKEN_BY_STEPS[name](reward, t)
                mu, logvar = self.encoder(step).chunk(2, 1)
                z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
                total = total + F.mse_loss(self.decoder(z), step) + F.mse_loss(10 * self.prior(z)[:, 0], target)
            return total

    class Table(VAE):
        def forward(self, x: Tensor, reward: Tensor) -> Any:
            mu, logvar = self.encoder(x[:, 0]).chunk(2, 1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return F.mse_loss(y[:, :8], x[:, 0, :8]) + F.cross_entropy(y[:, 8:], x[:, 0, 8:].argmax(1)) + 0 * reward.sum()

    x, reward = torch.rand(8, 2, 12), torch.rand(8, 2)
    rv = rvconvert.convert(World(None, False))  # type: ignore[arg-type]
    rv(x, reward)
    y = [rvconvert.convert(VAE(lambda y, *rest: y, False), output="distribution")(x[:, t]) for t in range(2)]
    assert float(rv.last_penalty) == pytest.approx(sum(float(rvconvert.variance_penalty(each)) for each in y))  # type: ignore[arg-type]
    rv = rvconvert.convert(Table(None, False))  # type: ignore[arg-type]
    rv(x, reward)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y[0])))  # type: ignore[arg-type]


PREDICTED: dict[str, Callable[[Tensor, Tensor], torch.distributions.Distribution]] = {
    "gamma": lambda a, b: torch.distributions.Gamma(a, b),
    "negative binomial": lambda a, b: torch.distributions.NegativeBinomial(a, logits=torch.log(10 * b)),
    "student": lambda a, b: torch.distributions.StudentT(a + 3, a, b),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_a_draw_of_the_likelihood_beside_its_mean_goes_on_drawing(name: str) -> None:
    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        a, b = F.softplus(y) + 1, F.softplus(m.decoder(-z)) + 1
        return a, PREDICTED[name](a, b).sample()

    x = torch.rand(8, 12)
    rows = rvconvert.plan(VAE(result, False), example_inputs=x)
    assert [row.operation for row in rows if row.role == "latent"] == ["torch.randn_like"]
    torch.manual_seed(0)
    plain, rv = VAE(result, False), rvconvert.convert(VAE(result, False))
    with torch.no_grad():
        plain.encoder.bias[4:] = rv.encoder.bias[4:] = -12.0  # type: ignore[index]
        drawn = [torch.stack([model(x)[1] for _ in range(600)]) for model in (plain, rv)]
    assert float(drawn[1].var(0).mean()) == pytest.approx(float(drawn[0].var(0).mean()), rel=0.15)


MIXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gated": lambda y, other: torch.sigmoid(other) * y,
    "a mixture": lambda y, other: 0.3 * torch.softmax(y, 1) + 0.7 * torch.softmax(other, 1),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_is_mixed_before_a_multinomial_likelihood_has_the_penalty(name: str) -> None:
    def mixed(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Tensor:
        return MIXED[name](y, m.decoder(-z))

    x = torch.rand(8, 12)
    y = rvconvert.convert(VAE(mixed, False), output="distribution")(x)
    rv = rvconvert.convert(VAE(lambda y, x, *rest: -(F.log_softmax(mixed(y, x, *rest), 1) * x).sum(1).mean(), False))
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]


@pytest.mark.parametrize("training", [True, False])
def test_a_switch_that_gives_what_the_encoder_gives_may_be_used_first(training: bool) -> None:
    class Switched(VAE):
        def forward(self, x: Tensor, logits: bool = False) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return mu if logits else self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())

        @torch.no_grad()
        def codes(self, x: Tensor) -> Tensor:
            return self(x, logits=True).argmax(1)

    plain, x = Switched(None, False).train(training), torch.rand(4, 12)  # type: ignore[arg-type]
    rv = rvconvert.convert(plain)
    assert torch.equal(rv.codes(x), plain.codes(x))
    rv.train()(x)
    assert rv.last_penalty is not None


@pytest.mark.parametrize("learned", [True, False])
def test_factors_of_the_other_side_decode(learned: bool) -> None:
    """As of items, in collaborative filtering by two autoencoders."""

    class Bilateral(VAE):
        def forward(self, x: Tensor, items: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            return torch.sigmoid(z.mm((self.decoder.weight if learned else items).t())), mu, logvar

    rv, x = rvconvert.convert(Bilateral(None, False)), torch.rand(4, 12)  # type: ignore[arg-type]
    y = rvconvert.convert(Bilateral(None, False), output="distribution")(x, rv.decoder.weight.detach())[0]  # type: ignore[arg-type]
    rv(x, rv.decoder.weight.detach())
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]


class Flow(nn.Module):
    """An additive coupling of two halves, turned."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n // 2, 6), nn.Tanh(), nn.Linear(6, n // 2))

    def forward(self, z: Tensor) -> Tensor:
        a, b = z.chunk(2, 1)
        return torch.flip(torch.cat([a, b + self.net(a)], 1), [1])


class PriorFlow(VAE):
    """The latent through a flow, compared with a prior that an input or the model has given, as VITS does."""

    def __init__(self, flows: int, prior: str, given: int) -> None:
        super().__init__(None, False)  # type: ignore[arg-type]
        self.encoder, self.flows = nn.Linear(given, 8), nn.Sequential(*(Flow(4) for _ in range(flows)))
        self.to_prior, self.kind = nn.Linear(3, 4), prior

    def forward(self, x: Tensor, c: Tensor) -> Any:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        u = self.flows(z)
        m_p = {"raw": x[:, :4], "learned": self.to_prior(c), "none": 0.0}[self.kind]
        kl = (0.5 * (u - m_p).square() - 0.5 * logvar).sum(1).mean()
        return self.decoder(z), kl, (z, u, mu, logvar)


@pytest.mark.parametrize(("prior", "given"), [("raw", 12), ("learned", 12), ("learned", 4), ("none", 12)])
@pytest.mark.parametrize("flows", [1, 2, 3])
def test_what_a_flow_makes_of_a_latent_for_its_prior_is_no_reconstruction(flows: int, prior: str, given: int) -> None:
    """Though it be as large as an input."""
    torch.manual_seed(0)
    plain, x, c = PriorFlow(flows, prior, given), torch.rand(8, given), torch.rand(8, 3)
    y = rvconvert.convert(plain, output="distribution")(x, c)[0]
    rv = rvconvert.convert(plain)
    kl = rv(x, c)[1]
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]
    expected = torch.stack([plain(x, c)[1].detach() for _ in range(400)]).mean()
    assert float(kl) == pytest.approx(float(expected), rel=0.1)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda h: torch.gather(h, 1, torch.argsort(torch.rand(h.shape[:2]), 1)[:, :4, None].expand(-1, -1, 6)),
    "topk": lambda h: torch.gather(h, 1, torch.rand(h.shape[:2]).topk(4, 1).indices[..., None].expand(-1, -1, 6)),
    "index": lambda h: h[torch.arange(len(h))[:, None], torch.rand(h.shape[:2]).argsort(1)[:, :4]],
}


@pytest.mark.parametrize("name", ORDERS)
def test_tokens_that_are_kept_at_random_before_attention_go_on_being_drawn(name: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder, self.decoder = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Any:
            h = ORDERS[name](self.embed(x))
            h = F.scaled_dot_product_attention(h, h, h)
            mu, logvar = self.encoder(h).chunk(2, -1)
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), mu

    torch.manual_seed(0)
    rv, x = rvconvert.convert(Masked()), torch.randn(6, 8, 5)
    assert len({float(rv(x)[1].detach().sum()) for _ in range(6)}) == 6
    assert [row.operation for row in rvconvert.plan(Masked(), example_inputs=x) if row.role == "latent"] == ["torch.randn_like"]


OF_LOGITS: dict[str, Callable[[Tensor], torch.distributions.Distribution]] = {
    "Bernoulli": lambda y: torch.distributions.Bernoulli(logits=y),
    "ContinuousBernoulli": lambda y: torch.distributions.ContinuousBernoulli(logits=y),
    "Independent": lambda y: torch.distributions.Independent(torch.distributions.Bernoulli(logits=y), 1),
}


@pytest.mark.parametrize("name", OF_LOGITS)
def test_probabilities_that_leave_beside_a_likelihood_of_their_logits_have_l_c_once(name: str) -> None:
    class Binary(VAE):
        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return torch.sigmoid(y), -OF_LOGITS[name](y).log_prob(x).mean()

    plain, x = Binary(None, False), (torch.rand(8, 12) > 0.5).float()  # type: ignore[arg-type]
    y = rvconvert.convert(plain, output="distribution")(x)[0]
    rv = rvconvert.convert(plain)
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]
    assert of_l_c(plain, lambda rv: rv(x)[1]) == pytest.approx(of_l_c(plain, lambda rv: rv(x)[0].sum()), rel=1e-3)


def of_l_c(plain: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    """The norm of the gradient that L_c gives the encoder, whose own loss's gradient is taken away."""
    found = []
    for penalty in (0.0, 50.0):
        rv = rvconvert.convert(plain, penalty=penalty)
        torch.manual_seed(0)
        loss(rv).backward()
        found.append(rv.encoder.weight.grad)  # type: ignore[union-attr]
    return float((found[1] - found[0]).norm())


def feature_loss(y: Tensor, x: Tensor, m: VAE) -> Tensor:
    given, made = torch.tanh(m.head(torch.cat([x, y]))).chunk(2)
    return (given - made).square().mean()


COMPARED: dict[str, Callable[[Tensor, Tensor, VAE], Tensor]] = {
    "error": lambda y, x, m: F.mse_loss(y, x),
    "features of both in one batch": feature_loss,
    "means over a batch of both": lambda y, x, m: (torch.cat([x, y]).mean(0) - x.mean(0)).square().sum(),
    "stacked": lambda y, x, m: torch.stack([x, y]).std(0).mean(),
    "a head": lambda y, x, m: F.softplus(-m.head(y)).mean(),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", COMPARED)
def test_l_c_arrives_by_a_loss_inside_whether_the_reconstruction_leaves_too_or_not(name: str, together: bool) -> None:
    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        loss = COMPARED[name](y, x, m)
        return (y, loss) if together else loss

    if name == "a head" and not together:
        pytest.skip("what a network alone sees is its features")
    plain, x = VAE(result, False), torch.rand(8, 12)
    y = rvconvert.convert(VAE(lambda y, *rest: y, False), output="distribution")(x)
    rv = rvconvert.convert(plain)
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]
    alone = of_l_c(VAE(lambda y, *rest: y, False), lambda rv: rv(x).sum())
    assert of_l_c(plain, lambda rv: rv(x)[1] if together else rv(x)) == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("by_hand", [True, False])
def test_l_c_of_a_mean_and_a_deviation_arrives_by_their_likelihood(by_hand: bool) -> None:
    def parts(y: Tensor, m: VAE) -> tuple[Tensor, Tensor]:
        return y, F.softplus(m.decoder(m.prior(y[:, :4]))) + 0.1

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        y, sd = parts(y, m)
        nll = torch.log(sd) + 0.5 * ((x - y) / sd).square() if by_hand else -Normal(y, sd).log_prob(x)
        return nll.mean(), y, sd

    x = torch.rand(8, 12)
    apart = of_l_c(VAE(result, False), lambda rv: sum(v.sum() for v in rv(x)[1:]))  # type: ignore[arg-type,return-value]
    assert of_l_c(VAE(result, False), lambda rv: rv(x)[0]) == pytest.approx(apart, rel=1e-3)


def test_a_latent_without_a_location_is_one_in_eval_mode_after_training_too() -> None:
    class Direction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 1), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            k = F.softplus(self.encoder(x))
            v = F.normalize(torch.randn(len(x), 4), dim=-1)
            return self.decoder((k + 0.3 * k * torch.randn_like(k)) * v)

    torch.manual_seed(0)
    rv, x = rvconvert.convert(Direction(), output="distribution"), torch.randn(5, 6)
    first, second = rv.train()(x), rv.eval()(x)
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.var, second.var)


def test_a_warp_by_a_latent_field_decodes() -> None:
    """As in registration of images: no layer acts on the velocity that is drawn."""

    class Registration(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mean, self.logvar = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            axis = torch.linspace(-1, 1, 8)
            self.register_buffer("grid", torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)[None])

        def forward(self, source: Tensor, target: Tensor) -> Any:
            x = torch.cat([source, target], 1)
            mu, logvar = self.mean(x), self.logvar(x) - 4
            field = (mu + (logvar / 2).exp() * torch.randn_like(mu)) / 4
            return F.grid_sample(source, self.grid + field.permute(0, 2, 3, 1), align_corners=True), mu, logvar

    given = torch.rand(3, 1, 8, 8), torch.rand(3, 1, 8, 8)
    y = rvconvert.convert(Registration(), output="distribution")(*given)[0]
    rv = rvconvert.convert(Registration())
    rv(*given)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]


class Estimates(nn.Module):
    """``term(z, w)`` of two latents inside, beside a reconstruction."""

    def __init__(self, term: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.scale = nn.Linear(6, 4), nn.Linear(4, 12), nn.Parameter(torch.full((4,), -0.2))
        self.term = term

    def forward(self, x: Tensor) -> Any:
        mu, other = self.encoder(x[:, :6]), self.encoder(x[:, 6:])
        z, w = (m + self.scale.exp() * torch.randn_like(m) for m in (mu, other))
        return self.decoder(z), self.term(z, w)


def kernel(z: Tensor) -> Tensor:
    return torch.exp(-(z[:, None] - z[None]).square().sum(-1) / 4)


def hsic(z: Tensor, w: Tensor) -> Tensor:
    centre = torch.eye(16) - torch.ones(16, 16) / 16
    return torch.trace(kernel(z) @ centre @ kernel(w) @ centre) / 16


PRECISION = torch.eye(4) * 2 + 0.5


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(1, keepdim=True) + b.square().sum(1)[None] - 2 * a @ b.t()


def mmd(z: Tensor, k: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    p = torch.randn_like(z)
    return k(z, z).mean() + k(p, p).mean() - 2 * k(z, p).mean()


ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MMD, inverse multiquadric": lambda z, w: mmd(z, lambda a, b: 8 / (8 + squared_distances(a, b))),
    "MMD, inverse multiquadric of cdist": lambda z, w: mmd(z, lambda a, b: 8 / (8 + torch.cdist(a, b) ** 2)),
    "MMD of expanded values": lambda z, w: mmd(
        z, lambda a, b: 8 / (8 + (a[:, None].expand(-1, 16, -1) - b[None].expand(16, -1, -1)).square().sum(2))
    ),
    "MMD, Gaussian": lambda z, w: mmd(z, lambda a, b: torch.exp(-squared_distances(a, b) / 4)),
    "quadratic form": lambda z, w: ((z @ PRECISION) * z).sum(1).mean(),
    "quadratic form, solved": lambda z, w: (z.t() * torch.linalg.solve(PRECISION, z.t())).sum() / 16,
    "quadratic form, einsum": lambda z, w: torch.einsum("bi,ij,bj->b", z, PRECISION, z).mean(),
    "quadratic form, bilinear": lambda z, w: F.bilinear(z, z, PRECISION[None]).mean(),
    "linear HSIC": lambda z, w: (z @ z.t() * (w @ w.t())).mean(),
    "isometry": lambda z, w: F.mse_loss(torch.cdist(z, z), torch.cdist(w, w)),
    "isometry of differences": lambda z, w: F.mse_loss((z[:, None] - z).square().sum(2), (w[:, None] - w).square().sum(2)),
    "exponential of a sum": lambda z, w: torch.exp(z.sum(1) / 4).mean(),
    "logsumexp of sums": lambda z, w: torch.logsumexp(z.sum(1) / 2, 0),
    "a score of two": lambda z, w: (z * w).sum(1).mean() / 8 - torch.exp((z * w).sum(1) / 8 - 1).mean(),
    "HSIC": hsic,
    "cross entropy": lambda z, w: F.cross_entropy(z, torch.arange(16) % 4),
    "logits of pairs": lambda z, w: F.binary_cross_entropy_with_logits((z * w).sum(1), torch.ones(16)),
    "triplets": lambda z, w: F.triplet_margin_loss(z, w, z.roll(1, 0)),
    "covariance": lambda z, w: torch.cov(z.t()).square().mean(),
    "sliced distance": lambda z, w: (z.sort(0)[0] - torch.linspace(-2, 2, 16)[:, None]).square().mean(),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_term_of_latents_alone_has_the_value_and_gradient_of_the_model_s_own_estimate(name: str) -> None:
    """Once at the mean, with no gradient for the posterior's width, or of elements taken as independent."""
    x = torch.rand(16, 12, generator=torch.Generator().manual_seed(0))
    found = []
    for model in (Estimates(ESTIMATES[name]), rvconvert.convert(Estimates(ESTIMATES[name]), penalty=0.0)):
        values, slopes = [], []
        for seed in range(200):
            torch.manual_seed(seed)
            value = model(x)[1]
            values.append(float(value.detach()))
            slopes.append(torch.autograd.grad(value, model.scale)[0].sum())  # type: ignore[arg-type]
        found.append((torch.tensor(values), torch.stack(slopes)))
    for plain, converted in zip(*found, strict=True):
        error = math.hypot(float(plain.std()), float(converted.std())) / math.sqrt(200)
        assert abs(float(plain.mean() - converted.mean())) < 4 * error


@pytest.mark.parametrize("name", [*ESTIMATES, "relation to inputs"])
def test_a_term_of_latents_alone_has_no_penalty(name: str) -> None:
    """A decoder of one layer, whose L_c is known by hand; once it was on the latents' own distances."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        inputs = F.mse_loss(torch.cdist(z, z), torch.cdist(x, x)) + ((z @ z.t()) * (x @ x.t())).mean()
        return F.mse_loss(y, x), ESTIMATES[name](z, z.roll(1, 1)) if name in ESTIMATES else inputs

    rv, x = rvconvert.convert(VAE(result, False)), torch.rand(16, 12)
    rv(x)
    mu, logvar = rv.encoder(x).chunk(2, -1)
    expected = rvconvert.variance_penalty(rv.decoder(rvconvert.RandomVariable(mu, logvar.exp())))
    torch.testing.assert_close(rv.last_penalty, expected.detach())


def test_a_full_covariance_s_density_at_its_own_draw_is_bounded() -> None:
    class Full(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)
            self.factor = nn.Parameter(torch.tensor([[1.0, 0.0], [1.5, 0.5]]))

        def forward(self, x: Tensor) -> Any:
            mu = self.encoder(x)
            factor = self.factor.tril() * (1 + 0.1 * torch.tanh(mu))[:, :, None]
            q = torch.distributions.MultivariateNormal(mu, scale_tril=factor)
            p = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
            z = q.rsample()
            return self.decoder(z), (q.log_prob(z) - p.log_prob(z)).mean(), kl_divergence(q, p).mean()

    rv = rvconvert.convert(Full(), penalty=0.0)
    _, found, exact = rv(torch.randn(4000, 4))
    assert float(found) == pytest.approx(float(exact), abs=0.1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mixed", ["sum", "mean", "einsum"])
def test_a_mixture_whose_weights_leave_too_has_l_c(mixed: str, first: bool) -> None:
    class Slots(VAE):
        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            each, weights = torch.stack([self.decoder(z), self.decoder(-z)], 1).split([9, 3], 2)
            weights = weights.repeat(1, 1, 3).softmax(1)
            ways = {"sum": (each * weights).sum(1), "mean": (each * weights).mean(1)}
            y = torch.einsum("bkp,bkp->bp", each, weights) if mixed == "einsum" else ways[mixed]
            return (weights, y) if first else (y, weights)

    plain, x = Slots(None, False), torch.rand(8, 12)  # type: ignore[arg-type]
    y = rvconvert.convert(plain, output="distribution")(x)[1 if first else 0]
    rv = rvconvert.convert(plain)
    rv(x)
    assert float(rv.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))  # type: ignore[arg-type]
    assert of_l_c(plain, lambda rv: rv(x)[1 if first else 0].sum()) > 0


COMPARED_LOGARITHMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "a spectrogram": (lambda y: torch.log(F.softplus(10 * y) + 1e-3), F.mse_loss),
    "a difference": (lambda y: torch.log1p(F.softplus(10 * y)), lambda y, x: (x - y).square().mean()),
    "logits": (lambda y: torch.log(F.softplus(10 * y)), lambda y, x: -(F.log_softmax(y, 1) * x).sum()),
}
LIKELIHOODS_LOGARITHMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Bernoulli": lambda y, x: -(x * torch.log(y) + (1 - x) * torch.log(1 - y)).mean(),
    "categorical": lambda y, x: -(x * torch.log(y)).sum(),
    "kl_div": lambda y, x: F.kl_div(torch.log(y), x),
    "of logarithms": lambda y, x: F.mse_loss(torch.log(y), torch.log(x + 0.1)),
}


@pytest.mark.parametrize("name", COMPARED_LOGARITHMS)
def test_a_logarithm_that_is_held_against_the_input_is_the_reconstruction(name: str) -> None:
    logarithm, loss = COMPARED_LOGARITHMS[name]
    x, penalties = torch.rand(8, 12), []
    for result in (lambda y, x, *_: loss(logarithm(y), x), lambda y, *_: logarithm(y)):
        torch.manual_seed(1)
        rv = rvconvert.convert(VAE(result, False), example_inputs=x)
        rv(x)
        penalties.append(float(rv.last_penalty))
    assert penalties[0] == pytest.approx(penalties[1])


@pytest.mark.parametrize("name", LIKELIHOODS_LOGARITHMS)
def test_a_logarithm_of_a_likelihood_is_none(name: str) -> None:
    x, penalties = torch.rand(8, 12), []
    for result in (lambda y, x, *_: LIKELIHOODS_LOGARITHMS[name](torch.sigmoid(y), x), lambda y, *_: torch.sigmoid(y)):
        torch.manual_seed(1)
        rv = rvconvert.convert(VAE(result, False), example_inputs=x)
        rv(x)
        penalties.append(float(rv.last_penalty))
    assert penalties[0] == pytest.approx(penalties[1])


RECURRENT: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {
    "LSTM": (nn.LSTM(3, 7, batch_first=True), lambda layer, z: layer(z)[0]),
    "its last state": (nn.LSTM(3, 7, batch_first=True), lambda layer, z: layer(z)[1][0].transpose(0, 1).expand(-1, 5, 7)),
    "GRU": (nn.GRU(3, 7, batch_first=True), lambda layer, z: torch.sigmoid(layer(z)[0])),
    "RNN, both ways": (nn.RNN(3, 7, batch_first=True, bidirectional=True), lambda layer, z: layer(z)[0][..., :7] * 2),
    "LSTMCell": (nn.LSTMCell(3, 7), lambda layer, z: layer(z.flatten(0, 1))[0].unflatten(0, (-1, 5))),
    "attention": (nn.MultiheadAttention(3, 1, batch_first=True), lambda layer, z: layer(z, z, z)[0]),
}


class EndsIn(nn.Module):
    """Its decoder's last layer gives several results."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.encoder, self.decoder, self.decode = nn.Linear(7, 6), *RECURRENT[name]

    def reconstruct(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        return self.decode(self.decoder, mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))

    def forward(self, x: Tensor) -> Tensor:
        y = self.reconstruct(x)
        return F.mse_loss(y, x[..., : y.shape[-1]])


@pytest.mark.parametrize("name", RECURRENT)
def test_a_last_layer_of_several_results_has_l_c_on_the_one_that_a_loss_takes(name: str) -> None:
    torch.manual_seed(0)
    vae, x = EndsIn(name), torch.rand(4, 5, 7)
    inside = rvconvert.convert(vae)
    inside(x)
    given = rvconvert.convert(vae, methods=("reconstruct",), output="distribution")
    assert float(inside.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(given.reconstruct(x))), rel=1e-4)


STEPWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a density": lambda y, x: -torch.distributions.Normal(y, 1.0).log_prob(x).sum(),
    "a function": lambda y, x: F.mse_loss(y, x, reduction="sum"),
    "by hand": lambda y, x: (y - x).square().sum(),
}


class ByStep(nn.Module):
    """Sums a loss of each step, and gives the steps joined."""

    def __init__(self, joined: str, loss: str) -> None:
        super().__init__()
        self.joined, self.loss = joined, loss
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, steps, total = torch.zeros_like(x), [], torch.zeros(())
        for t in range(x.shape[1]):
            mu, logvar = self.encoder(x[:, t]).chunk(2, 1)
            step = self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
            total = total + STEPWISE[self.loss](step, x[:, t])
            y[:, t] = step
            steps.append(step)
        return {"written": y, "stacked": torch.stack(steps, 1), "concatenated": torch.cat(steps, 1)}[self.joined], total


@pytest.mark.parametrize("joined", ["written", "stacked", "concatenated"])
@pytest.mark.parametrize("loss", STEPWISE)
def test_l_c_of_steps_that_leave_joined_arrives_by_their_losses(joined: str, loss: str) -> None:
    x, grads = torch.randn(4, 5, 6), []
    for penalty in (0.0, 50.0):
        torch.manual_seed(0)
        rv = rvconvert.convert(ByStep(joined, loss), penalty=penalty)
        rv(x)[1].backward()
        grads.append(rv.decoder.weight.grad)
    torch.manual_seed(0)
    given = rvconvert.convert(ByStep(joined, loss), output="distribution")
    penalty = rvconvert.variance_penalty(given(x)[0])
    (expected,) = torch.autograd.grad(penalty, given.decoder.weight)
    assert float(rv.last_penalty) == pytest.approx(float(penalty))
    torch.testing.assert_close(grads[1] - grads[0], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "assigned": lambda y, mask: assigned(y, ~mask, 0.0),
    "cloned and assigned": lambda y, mask: assigned(y.clone(), ~mask, -1.0),
    "filled": lambda y, mask: y.masked_fill(~mask[..., None], 0.0),
    "chosen": lambda y, mask: torch.where(mask[..., None], y, 0.0),
    "weighed": lambda y, mask: y * mask[..., None],
}


def assigned(y: Tensor, mask: Tensor, value: float) -> Tensor:
    y[mask] = value
    return y


class Padded(nn.Module):
    """What its decoder gives of padding is masked."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.encoder, self.decoder = name, nn.Linear(6, 6), nn.Linear(3, 6)

    def reconstruct(self, x: Tensor, mask: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        return MASKED[self.name](self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)), mask)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return F.smooth_l1_loss(self.reconstruct(x, mask), x)


@pytest.mark.parametrize("name", [name for name in MASKED if name != "weighed"])
def test_what_is_masked_may_be_a_term_of_a_sum(name: str) -> None:
    class Residual(Padded):
        def reconstruct(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.decoder(self.encoder(x)[..., :3] + 0.1 * torch.randn_like(x[..., :3]))
            return self.encoder(y) + MASKED[self.name](y, mask)

    torch.manual_seed(0)
    vae, x, mask = Residual(name), torch.randn(4, 5, 6), torch.arange(5) < torch.tensor([[2], [3], [5], [1]])
    inside, given = rvconvert.convert(vae), rvconvert.convert(vae, methods=("reconstruct",), output="distribution")
    inside(x, mask)
    assert float(inside.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(given.reconstruct(x, mask))))


@pytest.mark.parametrize("name", MASKED)
def test_what_is_masked_has_no_part_in_l_c(name: str) -> None:
    torch.manual_seed(0)
    vae, x, mask = Padded(name), torch.randn(4, 5, 6), torch.arange(5) < torch.tensor([[2], [3], [5], [1]])
    inside, given = rvconvert.convert(vae), rvconvert.convert(vae, methods=("reconstruct",), output="distribution")
    inside(x, mask)
    y = given.reconstruct(x, mask)
    assert not y.var[~mask].any()
    assert float(inside.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(y)))


def write_part(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :3] = torch.tanh(y[:, :3])
    return y


IN_PARTS = {
    "parts": lambda y: torch.cat([torch.tanh(y[:, :4]), torch.sigmoid(y[:, 4:])], 1),
    "chunk": lambda y: torch.cat([torch.tanh(y.chunk(2, 1)[0]), y.chunk(2, 1)[1]], 1),
    "columns": lambda y: torch.stack([f(y[:, i]) for i, f in enumerate([torch.tanh, torch.sigmoid] * 3)], 1),
    "written": write_part,
    "softmax": lambda y: torch.cat([torch.tanh(y[:, :3]), torch.softmax(y[:, 3:], 1)], 1),
    "twice": lambda y: torch.relu(torch.cat([torch.tanh(y[:, :4]), y[:, 4:]], 1)),
}


@pytest.mark.parametrize("name", IN_PARTS)
def test_columns_with_activations_of_their_own_are_one_reconstruction(name: str) -> None:
    class Tabular(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)

        def reconstruct(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, -1)
            return IN_PARTS[name](3 * self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)))

        def forward(self, x: Tensor) -> Tensor:
            return F.mse_loss(self.reconstruct(x), x)

    torch.manual_seed(0)
    vae, x = Tabular(), torch.rand(8, 6)
    inside, given = rvconvert.convert(vae), rvconvert.convert(vae, methods=("reconstruct",), output="distribution")
    inside(x).backward()
    expected = rvconvert.variance_penalty(given.reconstruct(x))
    assert float(inside.last_penalty) == pytest.approx(float(expected))


@pytest.mark.parametrize("covariance", ["independent", "lowrank"])
@pytest.mark.parametrize(
    "joined", [lambda x, y: torch.cat([x, y]), lambda x, y: torch.stack([x, y]), lambda x, y: (x - y).square()]
)
def test_a_panel_of_some_images_beside_the_reconstruction_shows_means(joined: Callable[..., Tensor], covariance: str) -> None:
    vae = VAE(lambda y, x, z, mu, std, self: (y, joined(x[:4], y[:4])), reads=False)
    x = torch.rand(8, 12)
    model = rvconvert.convert(vae, covariance=covariance)
    torch.manual_seed(1)
    y, panel = model(x)
    torch.testing.assert_close(panel, joined(x[:4], y[:4]))
    torch.manual_seed(1)
    given = rvconvert.convert(vae, covariance=covariance, output="distribution", attach=False)(x)[0]
    assert float(model.last_penalty) == pytest.approx(float(rvconvert.variance_penalty(given)), rel=1e-5)


class OwnDensity(nn.Module):
    """log q(z2 | z1) at the draw of it, of which the expectation is an entropy: that of z2's noise and E log scale(z1)."""

    def __init__(self, scaled: bool, by_hand: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.mean, self.width, self.decoder = (nn.Linear(n, m) for n, m in ((16, 4), (4, 3), (4, 3), (7, 16)))
        self.log_scale = nn.Parameter(torch.zeros(4))
        self.scaled, self.by_hand = scaled, by_hand

    def forward(self, x: Tensor) -> Any:
        z1 = Normal(self.encoder(x), self.log_scale.exp()).rsample()
        mean = self.mean(z1)
        std = F.softplus(self.width(z1)) + 0.2 if self.scaled else torch.full_like(mean, 0.5)
        if self.by_hand:
            z2 = mean + std * torch.randn_like(mean)
            density = -0.5 * ((z2 - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
        else:
            q = Normal(mean, std)
            z2 = q.rsample()
            density = q.log_prob(z2)
        return F.mse_loss(self.decoder(torch.cat([z1, z2], 1)), x), density.sum(1).mean()


@pytest.mark.parametrize("mode", ["independent", "calibrated"])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_latent_s_density_at_its_own_draw_is_of_that_draw(scaled: bool, by_hand: bool, mode: str) -> None:
    """Once its scale, random itself, was taken as independent of it: -5.7 for -3.8, and a slope by z1's width that is none."""
    model, x = OwnDensity(scaled, by_hand), torch.rand(64, 16, generator=torch.Generator().manual_seed(0))
    rv = rvconvert.convert(model, covariance=mode, penalty=0.0)
    found = []
    for each in (model, rv):
        values, slopes = [], []
        for seed in range(60):
            torch.manual_seed(seed)
            error, value = each(x)
            values.append(float(value.detach()))
            value = value + 0 * error
            (slope,) = torch.autograd.grad(value, each.log_scale, allow_unused=True)  # type: ignore[arg-type]
            slopes.append(torch.zeros(()) if slope is None else slope.sum())  # no scale of z1 is in a known noise
        found.append((torch.tensor(values), torch.stack(slopes)))
    margins = (0.05 if mode == "calibrated" else 1e-4, 1e-4)  # gains are measured on a few draws
    for plain, converted, margin in zip(*found, margins, strict=True):
        error = math.hypot(float(plain.std()), float(converted.std())) / math.sqrt(60)
        assert abs(float(plain.mean() - converted.mean())) < 4 * error + margin


@pytest.mark.parametrize("amplitude", [None, 0.0, 0.1])
def test_a_decoder_s_output_that_is_refined_under_noise_is_a_reconstruction(amplitude: float | None) -> None:
    """The noise is no latent, nor what it is added to a location (HP-VAE-GAN's random mode)."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        v = torch.tanh(y)
        noisy = v if amplitude is None else v + amplitude * torch.randn_like(v)
        return torch.tanh(m.refine(noisy) + v), v

    def model() -> VAE:
        made = VAE(result, False)
        made.refine = nn.Linear(12, 12)
        return made

    x, slopes = torch.rand(8, 12), []
    for penalty in (0.0, 50.0):
        rv = rvconvert.convert(model(), penalty=penalty)
        F.mse_loss(rv(x)[1], x).backward()
        slopes.append(rv.decoder.weight.grad)
    alone = rvconvert.convert(model(), output="distribution", penalty=50.0)
    rvconvert.variance_penalty(alone(x)[1], 50.0).backward()
    torch.testing.assert_close(slopes[1] - slopes[0], alone.decoder.weight.grad)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_logits_of_a_classifier_beside_those_of_a_text_have_no_penalty(tokens: bool) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(9, 9) if tokens else nn.Identity()
            self.encoder, self.decoder, self.head = nn.Linear(9, 4), nn.Linear(13, 9), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            e = self.embed(x)
            mu = self.encoder(e.mean(1))
            z = mu + torch.randn_like(mu)
            return self.decoder(torch.cat([e, z[:, None].expand(-1, x.shape[1], -1)], -1)), mu, self.head(z)

    x = torch.randint(0, 9, (5, 7)) if tokens else torch.rand(5, 7, 9)
    (row,) = [row for row in rvconvert.plan(Text(), example_inputs=x) if row.role == "reconstruction"]
    assert row.module == "decoder"


LIKELIHOODS_OF_A_SCALE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x / exp(y) + y": lambda x, y: x / y.exp() + y,
    "x exp(-y) + y": lambda x, y: x * torch.exp(-y) + y,
    "squared": lambda x, y: x.square() / y.exp() + y,
    "of softplus": lambda x, y: x / F.softplus(y) + F.softplus(y).log(),
}


@pytest.mark.parametrize("name", LIKELIHOODS_OF_A_SCALE)
def test_the_terms_of_a_likelihood_take_one_value(name: str) -> None:
    """As an exponential law's do, of a log power: once they took two, and the loss was below its own minimum."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        return LIKELIHOODS_OF_A_SCALE[name](x, y).mean()

    rv, x = rvconvert.convert(VAE(result, False), penalty=50.0), torch.rand(16, 12) + 0.2
    found = rv(x)
    mu, logvar = rv.encoder(x).chunk(2, -1)
    y = rv.decoder(rvconvert.RandomVariable(mu, logvar.exp()))
    torch.testing.assert_close(found, LIKELIHOODS_OF_A_SCALE[name](x, y.mean).mean())
    torch.testing.assert_close(rv.last_penalty, rvconvert.variance_penalty(y, 50.0).detach())


LEVELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "flattened": lambda y, x: F.cross_entropy(y.permute(0, 2, 3, 1).reshape(-1, 16), x.reshape(-1)),
    "gathered": lambda y, x: -F.log_softmax(y, 1).gather(1, x.unsqueeze(1)).mean(),
}


@pytest.mark.parametrize("name", LEVELS)
def test_a_classifier_beside_logits_of_pixel_levels_has_no_penalty(name: str) -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder, self.head = nn.Linear(16, 6), nn.Linear(3, 256), nn.Linear(3, 5)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            mu, logvar = self.encoder(x.flatten(1) / 15.0).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            return LEVELS[name](self.decoder(z).view(-1, 16, 4, 4), x) + F.cross_entropy(self.head(z), label)

    rv, x = rvconvert.convert(Pixels()), torch.randint(0, 16, (4, 4, 4))
    rv(x, torch.randint(0, 5, (4,)))
    mu, logvar = rv.encoder(x.flatten(1) / 15.0).chunk(2, 1)
    expected = rvconvert.variance_penalty(rv.decoder(rvconvert.RandomVariable(mu, logvar.exp())))
    torch.testing.assert_close(rv.last_penalty, expected.detach())


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("hidden", [False, True])
def test_what_is_no_logits_of_the_tokens_beside_them_has_no_penalty(hidden: bool, shift: int) -> None:
    """Hidden states of a decoder, or a classifier of each text; of as many kinds as are embedded are logits."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.encoder, self.state = nn.Embedding(11, 5), nn.Linear(5, 6), nn.Linear(8, 8)
            self.decoder, self.head = nn.Linear(8, 11), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            e = self.embed(x[:, : x.shape[1] - shift])
            mu, logvar = self.encoder(e.mean(1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            h = torch.tanh(self.state(torch.cat([e, z[:, None].expand(-1, e.shape[1], -1)], -1)))
            return self.decoder(h), h if hidden else self.head(z)

    (row,) = [r for r in rvconvert.plan(Text(), example_inputs=torch.randint(0, 11, (4, 7))) if r.role == "reconstruction"]
    assert row.module == "decoder"


BEFORE = {
    "two heads": lambda a, b: torch.cat([a[:, :1], b], 1),
    "blended": lambda a, b: b.sigmoid() * a + (1 - b.sigmoid()) * a.flip(-1),
    "blurred": lambda a, b: F.avg_pool2d(a + 0 * b, 3, 1, 1),
}
AGAINST = {
    "itself": F.mse_loss,
    "classes": lambda y, x: F.cross_entropy(y, x.argmax(1)),
    "binarised": lambda y, x: F.binary_cross_entropy_with_logits(y, (x > 0.5).float()),
    "logarithm": lambda y, x: (y - x.log1p()).square().mean(),
}


@pytest.mark.parametrize("target", AGAINST)
@pytest.mark.parametrize("join", BEFORE)
def test_what_is_held_against_any_function_of_an_input_has_l_c_as_it_stands_there(join: str, target: str) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)

        def decode(self, z: Any) -> Any:
            return BEFORE[join](self.first(z), self.second(z))

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return AGAINST[target](self.decode(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), x)

    rv, x = rvconvert.convert(Joined()), torch.rand(3, 2, 6, 6)
    rv(x)
    mu, logvar = rv.encoder(x).chunk(2, 1)
    expected = rvconvert.variance_penalty(rv.decode(rvconvert.RandomVariable(mu, logvar.exp())))
    torch.testing.assert_close(rv.last_penalty, expected.detach())


@pytest.mark.parametrize("samples", [1, 4])
def test_samples_beside_each_other_have_l_c_where_they_meet_the_input(samples: int) -> None:
    """A forecast's steps are summed before, and the input broadcasts over its samples."""

    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(3, 12)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            eps = torch.randn(samples, *mu.shape) if samples > 1 else torch.randn_like(mu)
            return (self.decoder(mu + eps * (0.5 * logvar).exp()).cumsum(-1) - x).square().mean()

    rv, x = rvconvert.convert(Forecast()), torch.rand(5, 12)
    rv(x)
    mu, logvar = rv.encoder(x).chunk(2, 1)
    expected = rvconvert.variance_penalty(rv.decoder(rvconvert.RandomVariable(mu, logvar.exp())).cumsum(-1))
    torch.testing.assert_close(rv.last_penalty, expected.detach())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("encoded", [False, True])
def test_logits_of_a_label_that_the_decoder_alone_reads_have_no_l_c(encoded: bool, inside: bool) -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder, self.head = nn.Linear(12, 8), nn.Linear(7, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor, label: Tensor) -> Any:
            condition = F.one_hot(label, 3).float() if encoded else label
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            y, logits = self.decoder(torch.cat([z, condition], 1)), self.head(z)
            return F.mse_loss(y, x) + F.cross_entropy(logits, label) if inside else (y, logits)

    classes = torch.arange(6) % 3
    given = torch.rand(6, 12), classes if encoded else F.one_hot(classes, 3).float()
    (row,) = [r for r in rvconvert.plan(Conditional(), example_inputs=given) if r.role == "reconstruction"]
    assert row.module == "decoder"


FUNCTIONS = {"residual": lambda x, y: x - y, "clipped": lambda x, y: y.clamp(0, 1), "probability": lambda x, y: y.sigmoid()}


@pytest.mark.parametrize("names", [("residual",), ("residual", "clipped"), ("probability", "clipped", "residual")])
def test_one_reconstruction_beside_functions_of_it_has_l_c_once(names: tuple[str, ...]) -> None:
    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(3, 12)

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return y, *(FUNCTIONS[name](x, y) for name in names)

    rv, x = rvconvert.convert(Maps()), torch.rand(6, 12)
    rv(x)
    mu, logvar = rv.encoder(x).chunk(2, 1)
    expected = rvconvert.variance_penalty(rv.decoder(rvconvert.RandomVariable(mu, logvar.exp())))
    torch.testing.assert_close(rv.last_penalty, expected.detach())


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("logged", [False, True])
def test_an_example_for_a_plot_and_a_state_to_go_on_from_are_no_reconstructions(logged: bool, state: bool) -> None:
    """Of a recurrent model with the loss inside, whose steps meet the input's."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder, self.cell = nn.Linear(12, 6), nn.Linear(13, 2), nn.GRUCell(5, 10)

        def forward(self, x: Tensor) -> Any:
            h, loss, examples = x.new_zeros(x.size(1), 10), 0, []
            for step in x:
                mu, logvar = self.encoder(torch.cat([step, h], 1)).chunk(2, 1)
                z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
                y = self.decoder(torch.cat([z, h], 1))
                h = self.cell(torch.cat([step, z], 1), h)
                loss = loss + (step - y).square().sum(1).mean()
                examples.append(y[0])
            return loss, *([examples] if logged else []), *([h] if state else [])

    found = [r for r in rvconvert.plan(Recurrent(), example_inputs=torch.rand(4, 6, 2)) if r.role == "reconstruction"]
    assert [(r.operation, r.module) for r in found] == [("Linear", "decoder")] * 4


@pytest.mark.parametrize("filled", [False, True])
def test_parameters_of_latents_that_steps_fill_a_tensor_with_have_no_penalty(filled: bool) -> None:
    class Filling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder, self.cell = nn.Linear(13, 6), nn.Linear(11, 10), nn.GRUCell(8, 8)

        def forward(self, x: Tensor) -> Any:
            h, q, p = x.new_zeros(len(x), 8), [], []
            of_q, of_p = x.new_zeros(*x.shape[:2], 2, 3), x.new_zeros(*x.shape[:2], 2, 5)
            for t in range(x.shape[1]):
                mu, logvar = self.encoder(torch.cat([x[:, t], h], 1)).chunk(2, 1)
                z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
                mean, spread = self.decoder(torch.cat([z, h], 1)).chunk(2, 1)
                h = self.cell(torch.cat([x[:, t], z], 1), h)
                of_q[:, t, 0], of_q[:, t, 1], of_p[:, t, 0], of_p[:, t, 1] = mu, logvar, mean, spread
                q.append(torch.stack([mu, logvar], 1))
                p.append(torch.stack([mean, spread], 1))
            return (of_q, of_p) if filled else (torch.stack(q, 1), torch.stack(p, 1))

    x = torch.rand(3, 4, 5)
    rv, y = rvconvert.convert(Filling()), rvconvert.convert(Filling(), output="distribution", attach=False)(x)[1]
    rv(x)
    torch.testing.assert_close(rv.last_penalty, rvconvert.variance_penalty(y).detach())


@pytest.mark.parametrize("told", [False, True])
def test_a_distribution_that_leaves_in_training_has_no_l_c_which_is_said(told: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(3, 12)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())

    rv, x = rvconvert.convert(Plain(), output="distribution", attach=not told), torch.rand(3, 12)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        rv(x)
        rv.eval()(x)
    assert ["add rvconvert.variance_penalty(y)" in str(each.message) for each in heard] == [True] * (not told)
    (note,) = [n for n in rvconvert.plan(Plain(), example_inputs=x, output="distribution").notes if "L_c" in n]
    assert "to which no L_c is attached" in note


@pytest.mark.parametrize("masked", [False, True])
def test_a_bag_of_words_beside_a_classifier_is_the_reconstruction(masked: bool) -> None:
    """A topic model: as many logits as words are embedded, one set for each text, gathered at the words in it."""

    class Topics(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.encoder = nn.Embedding(9, 9), nn.Linear(9, 6)
            self.decoder, self.head = nn.Linear(3, 9), nn.Linear(3, 4)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            mu, logvar = self.encoder(self.embed(x).mean(1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            likelihood = F.log_softmax(self.decoder(z), -1).gather(1, x)
            words = -(likelihood * (x > 0)).sum() / (x > 0).sum() if masked else -likelihood.sum(1).mean()
            return words + F.cross_entropy(self.head(z), label)

    given = torch.randint(0, 9, (5, 7)), torch.randint(0, 4, (5,))
    (row,) = [r for r in rvconvert.plan(Topics(), example_inputs=given) if r.role == "reconstruction"]
    assert row.module == "decoder"


@pytest.mark.parametrize("upsampled", [2, 16])
def test_a_latent_of_frames_beside_integers_of_frames_is_no_logits(upsampled: int) -> None:
    """As a voice's pitch and its flags beside what a flow makes of the latent: no more kinds than are embedded."""

    class Voice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.pitch, self.encoder, self.flow = nn.Embedding(9, 4), nn.Conv1d(3, 8, 1), nn.Conv1d(4, 4, 1)
            self.decoder = nn.ConvTranspose1d(4, 1, upsampled, upsampled)

        def forward(self, x: Tensor, pitch: Tensor) -> Any:
            mu, logvar = (self.encoder(x) + torch.cat(2 * [self.pitch(pitch).transpose(1, 2)], 1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            flowed = torch.flip(torch.cat([z[:, :2], z[:, 2:] + self.flow(z)[:, 2:]], 1), [1])
            return self.decoder(z), flowed, mu

    given = torch.rand(2, 3, 12), torch.randint(0, 9, (2, 12))
    (row,) = [r for r in rvconvert.plan(Voice(), example_inputs=given) if r.role == "reconstruction"]
    assert row.module == "decoder"


def test_edges_beside_features_that_another_decoder_gives_have_their_penalty() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.features = nn.Linear(5, 8), nn.Linear(4, 5)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            adjacency = torch.zeros(len(x), len(x)).index_put((edges[0], edges[1]), torch.ones(edges.shape[1]))
            mu, logvar = (adjacency @ self.encoder(x)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            return F.binary_cross_entropy_with_logits(z @ z.t(), adjacency) + F.mse_loss(self.features(z), x)

    rv, x, edges = rvconvert.convert(Graph()), torch.rand(6, 5), torch.randint(0, 6, (2, 9))
    rv(x, edges)
    adjacency = torch.zeros(6, 6).index_put((edges[0], edges[1]), torch.ones(9))
    mu, logvar = (adjacency @ rv.encoder(x)).chunk(2, 1)
    z = rvconvert.RandomVariable(mu, logvar.exp())
    expected = rvconvert.variance_penalty(z @ z.t()) + rvconvert.variance_penalty(rv.features(z))
    torch.testing.assert_close(rv.last_penalty, expected.detach())


COMPOSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a mask": lambda y, s: (torch.sigmoid(s) * y + (1 - torch.sigmoid(s)), torch.sigmoid(s)),
    "a scale": lambda y, s: (y * F.softplus(s), F.softplus(s)),
    "a trend": lambda y, s: (y + s, s),
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", COMPOSED)
def test_a_part_that_leaves_beside_what_it_is_a_part_of_has_no_penalty(name: str, beside: bool) -> None:
    """Once L_c was on the part alone, an opacity or a scale, and what is composed of it had none."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        whole, part = COMPOSED[name](y, m.head(m.decoder(z)))
        return (whole, part) if beside else whole

    rv, x = rvconvert.convert(VAE(result, False)), torch.rand(8, 12)
    rv(x)
    mu, logvar = rv.encoder(x).chunk(2, -1)
    y = rv.decoder(rvconvert.RandomVariable(mu, logvar.exp()))
    expected = rvconvert.variance_penalty(COMPOSED[name](y, rv.head(y))[0])
    torch.testing.assert_close(rv.last_penalty, expected.detach(), rtol=0.02, atol=0)


def test_the_mean_of_a_count_s_law_beside_its_likelihood_is_the_reconstruction() -> None:
    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        law = torch.distributions.NegativeBinomial(F.softplus(y.flip(1)) + 0.1, logits=y)
        return (-law.log_prob(x.round()).mean(), law.mean) if m.training else law.mean

    rv, x = rvconvert.convert(VAE(result, False)), torch.rand(8, 12)
    rv(x)
    found = float(rv.last_penalty)
    with torch.no_grad():
        rv.eval()(x)
    assert found == pytest.approx(float(rv.last_penalty))


DISPLAYED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "detach": lambda y, x: y.detach(),
    "data": lambda y, x: y.data,
    "detached and clipped": lambda y, x: y.detach().clamp(0, 1),
    "bytes": lambda y, x: y.detach() * 255,
    "without gradients": lambda y, x: without_gradient(y) * 255,
    "an error": lambda y, x: (x - y).detach().abs(),
    "threshold": lambda y, x: y > 0.5,
    "threshold, as numbers": lambda y, x: (y > 0.5).float(),
    "sign": lambda y, x: torch.sign(y),
    "levels": lambda y, x: (y * 255).round(),
    "another unit": lambda y, x: y * 30 + 100,
    "clipped": lambda y, x: y.clamp(0, 1),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", DISPLAYED)
def test_what_is_for_display_beside_the_reconstruction_leaves_it_its_l_c(name: str, inside: bool) -> None:
    x, found = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)), []
    for show in (lambda y, x: (), lambda y, x: (DISPLAYED[name](y, x),)):

        def result(y: Tensor, x: Tensor, *_: Any, show: Any = show) -> Any:
            return (F.mse_loss(y, x) if inside else y, *show(y, x))

        grads, penalties = [], []
        for penalty in (50.0, 0.0):
            rv = rvconvert.convert(VAE(result, False), penalty=penalty)
            made = rv(x)[0]
            (made if inside else F.mse_loss(made, x)).backward()
            grads.append(rv.decoder.weight.grad)
            penalties.append(rv.last_penalty)
        found.append((penalties[0], grads[0] - grads[1]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("show", [torch.exp, torch.sigmoid])
def test_what_a_loss_inside_subtracts_the_input_from_has_l_c_and_no_function_of_it(show: Callable[[Tensor], Tensor]) -> None:
    """A log spectrogram beside its magnitudes."""
    x = torch.rand(8, 12)
    rv = rvconvert.convert(VAE(lambda y, x, *_: (F.mse_loss(y, x), show(y)), False))
    assert penalty_of(rv, x) == pytest.approx(penalty_of(rvconvert.convert(VAE(lambda y, *_: y, False)), x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_a_mask_of_a_likelihood_meets_no_parameter_of_it(sliced: bool, masked: bool) -> None:
    def result(y: Tensor, x: Tensor, *_: Any) -> Any:
        loc, scale, df = (y[:, :4], y[:, 4:8], y[:, 8:]) if sliced else y.chunk(3, 1)
        score = torch.distributions.StudentT(F.softplus(df) + 3, loc, F.softplus(scale) + 0.01).log_prob(x[:, :4])
        return -(score * x[:, 4:8] if masked else score).sum(1).mean(), loc

    x = torch.rand(8, 12)
    alone = rvconvert.convert(VAE(lambda y, *_: y[:, :4], False), example_inputs=x)
    assert penalty_of(rvconvert.convert(VAE(result, False)), x) == pytest.approx(penalty_of(alone, x))


def test_a_value_that_l_c_joins_does_not_wait_for_it() -> None:
    """Its size is asked of what is made of the mean."""
    graph = torch.fx.Graph()
    whole = graph.placeholder("whole")
    taken = graph.call_function(take_together, (None, whole, whole))
    mean = graph.call_function(operator.getitem, (taken, 0))
    part = graph.call_method("__getitem__", (mean, 0))
    size = graph.call_method("size", (part, 0))
    value = graph.call_method("expand", (whole, size))
    taken.args = (None, whole, value)
    graph.output((part, graph.call_function(operator.getitem, (taken, 1))))
    _apart_from_sizes(graph, taken)
    _sort(graph)
    seen: set[torch.fx.Node] = set()
    for node in graph.nodes:
        assert seen.issuperset(node.all_input_nodes)
        seen.add(node)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "psnr": lambda y, x: -10 * torch.log10(F.mse_loss(y.detach(), x)),
    "of the clipped": lambda y, x: F.l1_loss(y.detach().clamp(0, 1), x),
    "a map": lambda y, x: (y.detach() - x).square(),
    "a copy": lambda y, x: y.detach(),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_what_has_no_gradient_leaves_without_one(name: str, inside: bool) -> None:
    x = torch.rand(8, 12)
    rv = rvconvert.convert(VAE(lambda y, x, *_: (F.mse_loss(y, x) if inside else y, METRICS[name](y, x)), False))
    loss, metric = rv(x)
    assert loss.requires_grad and not metric.requires_grad
    loss.sum().backward()
    assert rv.encoder.bias.grad[4:].abs().max() > 0  # L_c joins as before


class BottomUp(nn.Module):
    """q(z1 | x), q(z2 | z1); p(z1 | z2) leaves beside the reconstruction for a KL outside."""

    def __init__(self, latents: int, prior: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.prior = prior
        self.first, self.second, self.prior_of_first = nn.Linear(6, 2 * latents), nn.Linear(latents, 4), nn.Linear(2, 2 * latents)
        self.decoder = nn.Linear(latents, 6)

    def draw(self, h: Tensor) -> Tensor:
        mu, logvar = h.chunk(2, -1)
        return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

    def forward(self, x: Tensor) -> Any:
        z = self.draw(self.first(x))
        return self.decoder(z), *(self.prior_of_first(self.draw(self.second(z))).chunk(2, -1) if self.prior else ())


@pytest.mark.parametrize("latents", [3, 6, 8])
def test_a_prior_that_a_further_latent_places_is_no_reconstruction(latents: int) -> None:
    x = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    found = [penalty_of(rvconvert.convert(BottomUp(latents, prior)), x) for prior in (False, True)]
    assert found[0] == pytest.approx(found[1])


def test_a_loss_of_a_detached_reconstruction_has_no_l_c() -> None:
    """A discriminator's step, inside; the reconstruction leaves beside it for pictures."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, vae: VAE) -> Any:
        return F.softplus(vae.head(y.detach())).mean() + vae.head(x).mean(), y

    rv = rvconvert.convert(VAE(result, False))
    rv(torch.rand(8, 12))[0].backward()
    assert rv.decoder.weight.grad is None and rv.encoder.weight.grad is None and rv.head.weight.grad is not None


@pytest.mark.parametrize("kind", [torch.distributions.Categorical, torch.distributions.OneHotCategorical])
@pytest.mark.parametrize("looked", [False, True])
def test_probabilities_that_a_law_works_out_have_no_l_c_beside_its_logits(kind: Any, looked: bool) -> None:
    def result(y: Tensor, *_: Any) -> Any:
        law = kind(logits=y)
        return law if not looked or law.probs.numel() else None

    x = torch.rand(8, 12)
    alone = rvconvert.convert(VAE(lambda y, *_: torch.log_softmax(y, 1), False))
    rv = rvconvert.convert(VAE(result, False))
    assert penalty_of(rv, x) == pytest.approx(penalty_of(alone, x))
    torch.testing.assert_close(rv(x).probs.sum(-1), torch.ones(8))


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_a_posterior_made_of_its_prior_has_the_plain_model_s_divergence(covariance: str) -> None:
    """A ladder: q(z1 | x, z2) is the product of what x says and of p(z1 | z2), whose mean and variance both vary with z2."""

    class Precisions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.bottom, self.top, self.prior, self.decoder = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(2, 6), nn.Linear(3, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mean, logvar = self.top(x).chunk(2, 1)
            p, p_var = self.prior(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).chunk(2, 1)
            q, q_var = self.bottom(x).chunk(2, 1)
            p_var, q_var = F.softplus(p_var), F.softplus(q_var)
            var = 1 / (1 / p_var + 1 / q_var)
            mean = (q / q_var + p / p_var) * var
            divergence = 0.5 * ((mean - p) ** 2 / p_var + var / p_var - 1 + p_var.log() - var.log()).sum(1)
            return self.decoder(mean + torch.randn_like(var) * var.sqrt()), divergence.mean()

    vae, x = Precisions(), torch.rand(16, 8, generator=torch.Generator().manual_seed(1))
    rv = rvconvert.convert(vae, covariance=covariance)
    with torch.no_grad():
        plain, found = (torch.stack([model(x)[1] for _ in range(300)]) for model in (vae, rv))
    assert found.mean() == pytest.approx(float(plain.mean()), rel=0.05)


@pytest.mark.parametrize("detached", [False, True])
def test_an_accuracy_inside_is_the_probability_of_being_right(detached: bool) -> None:
    def result(y: Tensor, x: Tensor, *_: Any) -> Any:
        return y, (((y.detach() if detached else y) > 0) == (x > 0.5)).float().mean()

    vae, x = VAE(result, False), torch.rand(64, 12, generator=torch.Generator().manual_seed(1))
    rv = rvconvert.convert(vae)
    with torch.no_grad():
        plain = torch.stack([vae(x)[1] for _ in range(200)]).mean()
    assert float(rv(x)[1]) == pytest.approx(float(plain), abs=0.03)
    assert penalty_of(rv, x) == pytest.approx(penalty_of(rvconvert.convert(VAE(lambda y, *_: y, False)), x))


ENTERED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a residual": lambda y, mu, std: y + mu.repeat(1, 3),
    "a gain": lambda y, mu, std: y * std.mean(1, keepdim=True),
    "a skip": lambda y, mu, std: y + mu[:, :1],
}


@pytest.mark.parametrize("name", ENTERED)
def test_a_reconstruction_that_a_parameter_of_the_posterior_enters_has_l_c(name: str) -> None:
    x, found = torch.rand(8, 12), []
    for penalty in (50.0, 0.0):
        rv = rvconvert.convert(VAE(lambda y, x, z, mu, std, m: (ENTERED[name](y, mu, std), m.head(y)), False), penalty=penalty)
        F.mse_loss(rv(x)[0], x).backward()
        found.append(rv.decoder.weight.grad)
    assert not torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("normalises", [False, True])
def test_of_a_reconstruction_in_two_units_that_of_the_input_has_l_c(normalises: bool) -> None:
    class InUnits(VAE):
        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder((x - 120) / 60 if normalises else x).chunk(2, -1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return y, y * 60 + 120

    x = 60 * torch.rand(8, 12) + 90
    values = rvconvert.convert(InUnits(None, False), output="distribution", attach=False)(x)  # type: ignore[arg-type]
    rv = rvconvert.convert(InUnits(None, False))  # type: ignore[arg-type]
    assert penalty_of(rv, x) == pytest.approx(float(rvconvert.variance_penalty(values[normalises])))


def test_what_a_comparison_gates_is_a_reconstruction() -> None:
    x = torch.rand(8, 12)
    values = rvconvert.convert(VAE(lambda y, *_: (y, y * (y > 0)), False), output="distribution", attach=False)(x)
    rv = rvconvert.convert(VAE(lambda y, *_: (y, y * (y > 0)), False))
    assert penalty_of(rv, x) == pytest.approx(float(rvconvert.variance_penalty(values[1])))


class FedBack(nn.Module):
    """Each step reads what the one before gave; the loss is inside, or the whole leaves."""

    def __init__(self, cell: str, whole: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.cell, self.decoder = nn.Linear(3, 4), getattr(nn, cell)(5, 6), nn.Linear(6, 3)
        self.whole, self.scored = whole, True

    def step(self, given: Tensor, state: Any) -> Any:
        if isinstance(self.cell, nn.RNNCellBase):
            state = self.cell(given, state)
            return state[0] if isinstance(state, tuple) else state, state
        steps, state = self.cell(given[None], state)
        return steps[0], state

    def forward(self, x: Tensor) -> Any:
        mu, logvar = self.encoder(x.mean(1)).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        given, state, steps = torch.zeros_like(x[:, 0]), None, []
        for _ in range(x.shape[1]):
            hidden, state = self.step(torch.cat([z, given], -1), state)
            steps.append(self.decoder(hidden))
            given = steps[-1].softmax(-1) if self.whole == "tokens" else steps[-1]
        y = torch.stack(steps, 1)
        y = y.cumsum(1) if self.whole == "summed" else y
        if not self.scored:
            return y
        return F.cross_entropy(y.flatten(0, 1), x.argmax(-1).flatten()) if self.whole == "tokens" else F.mse_loss(y, x)


@pytest.mark.parametrize("whole", ["steps", "summed", "tokens"])
@pytest.mark.parametrize("cell", ["GRUCell", "LSTMCell", "GRU", "LSTM"])
def test_steps_that_are_fed_back_have_one_l_c(cell: str, whole: str) -> None:
    x = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(1))
    vae = FedBack(cell, whole)
    found = [penalty_of(rvconvert.convert(vae), x)]
    vae.scored = False
    found.append(penalty_of(rvconvert.convert(vae), x))
    assert found[0] == pytest.approx(found[1])


class WorldModel(nn.Module):
    """Observations and rewards, of which the loss takes a part."""

    def __init__(self, part: str, heads: bool, returned: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = 8 if part in ("whole", "next") else 4
        self.encoder, self.decoder, self.reward = nn.Linear(8, 6), nn.Linear(3, width), nn.Linear(3, 1)
        self.part, self.heads, self.returned = part, heads, returned

    def forward(self, x: Tensor, r: Tensor) -> Any:
        given, target = x, x
        if self.part == "next":
            given, target, r = x[:, :-1], x[:, 1:], r[:, 1:]
        elif self.part == "crop":
            target = x[..., 2:6]
        elif self.part == "half":
            target = F.avg_pool1d(x, 2)
        mu, logvar = self.encoder(given).chunk(2, -1)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        y, reward = self.decoder(z), self.reward(z).squeeze(-1)
        if self.returned:
            return (y, reward, (reward - r).square()) if self.heads else y
        return F.mse_loss(y, target) + (F.mse_loss(reward, r) if self.heads else 0)


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("part", ["whole", "next", "crop", "half"])
def test_a_reward_beside_a_part_of_the_observations_has_no_l_c(part: str, returned: bool) -> None:
    if returned and part in ("crop", "half"):
        pytest.skip("nothing tells what it is held against")
    given = torch.rand(4, 5, 8, generator=torch.Generator().manual_seed(1)), torch.rand(4, 5)
    found = [penalty_of(rvconvert.convert(WorldModel(part, heads, returned)), *given) for heads in (True, False)]
    assert found[0] == pytest.approx(found[1])


def test_every_term_of_a_loss_takes_a_sum_of_parts_at_its_mean() -> None:
    """A trend and a season are summed, and the loss holds their means over time and over channels against the input's too."""

    class Series(VAE):
        inside = True

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            season = self.decoder(z).view(-1, 2, 6).gather(2, (torch.arange(6) // 3).expand(len(x), 2, 6))
            trend = torch.matmul(self.prior(z).view(-1, 2, 2), torch.linspace(0, 1, 12).view(2, 6))
            y = trend.transpose(1, 2) + season.transpose(1, 2)
            return self.loss(y, x) if self.inside else y

        @staticmethod
        def loss(y: Tensor, x: Tensor) -> Tensor:
            return ((x - y) ** 2).sum() + sum(((x.mean(d) - y.mean(d)) ** 2).sum() for d in (1, 2))

    x = torch.rand(4, 6, 2, generator=torch.Generator().manual_seed(1))
    vae = Series(lambda *_: None, False)
    rv = rvconvert.convert(vae)
    found = rv(x)
    vae.inside = False
    outside = rvconvert.convert(vae)
    torch.testing.assert_close(found, vae.loss(outside(x), x))
    torch.testing.assert_close(rv.last_penalty, outside.last_penalty)


def normalised(y: Tensor) -> Tensor:
    return y - y.logsumexp(1, keepdim=True)


# What the decoder gives, and the loss of it; the same L_c as where it leaves.
WOULD_LEAVE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a softmax by hand": (lambda y, m: normalised(y).exp(), F.mse_loss),
    "a union": (lambda y, m: torch.sigmoid(torch.stack([y, 2 * y]).logsumexp(0)), F.mse_loss),
    "log-probabilities": (lambda y, m: normalised(y), F.mse_loss),
    "shifted log-probabilities": (lambda y, m: normalised(y) + m.scale, F.mse_loss),
    "a refinement": (lambda y, m: y + m.refine(torch.tanh(y)), F.mse_loss),
}


@pytest.mark.parametrize("name", WOULD_LEAVE)
def test_where_the_loss_is_inside_the_reconstruction_is_what_would_leave(name: str) -> None:
    decoded, loss = WOULD_LEAVE[name]
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    found = []
    for inside in (False, True):
        vae = VAE(lambda y, x, z, mu, std, m, inside=inside: loss(decoded(y, m), x) if inside else decoded(y, m), False)
        torch.manual_seed(2)
        vae.refine = nn.Linear(12, 12)
        found.append(penalty_of(rvconvert.convert(vae), x))
    assert found[1] == pytest.approx(found[0])


NARROWER: dict[str, Callable[..., Any]] = {
    "logits of classes": lambda y, x, z, mu, std, m: (F.mse_loss(y, x), m.prior(z)),
    "probabilities of classes": lambda y, x, z, mu, std, m: (F.mse_loss(y, x), m.prior(z).softmax(1)),
    "a critic's score": lambda y, x, z, mu, std, m: (F.mse_loss(y, x), m.head(y)),
    "a critic's scores of both": lambda y, x, z, mu, std, m: {"loss": F.mse_loss(y, x), "fake": m.head(y), "real": m.head(x)},
}


@pytest.mark.parametrize("name", NARROWER)
def test_what_leaves_beside_an_inner_loss_and_is_narrower_has_no_l_c(name: str) -> None:
    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    alone = penalty_of(rvconvert.convert(VAE(lambda y, x, *_: F.mse_loss(y, x), False)), x)
    assert penalty_of(rvconvert.convert(VAE(NARROWER[name], False)), x) == pytest.approx(alone)


PICTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda y: (255 * torch.sigmoid(y)).byte(),
    "rounded": lambda y: (255 * torch.sigmoid(y)).round().to(torch.uint8),
    "a view": lambda y: (y > 0).view(-1).long(),
    "joined": lambda y: torch.cat([y > 0, y < 0.1], 1).long(),
    "of numbers": lambda y: (y > 0).float().long(),
    "a sign": lambda y: y.sign().int(),
}


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("name", PICTURES)
def test_whole_numbers_are_those_of_the_mean(name: str, used: bool, covariance: str) -> None:
    """``used``: what they are made of is used otherwise too."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        return (PICTURES[name](y), y, (y > 0).float().mean()) if used else (PICTURES[name](y), y)

    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    picture, y, *_ = rvconvert.convert(VAE(result, False), covariance=covariance)(x)
    assert picture.dtype == PICTURES[name](y).dtype and torch.equal(picture, PICTURES[name](y))


def test_a_mask_of_a_decoded_length_is_no_reconstruction() -> None:
    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Tensor:
        mask = (torch.arange(12) < (12 * torch.sigmoid(m.prior(z)[:, :1])).long()).float()
        return F.mse_loss(y * mask, x * mask)

    x = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    alone = penalty_of(rvconvert.convert(VAE(lambda y, x, *_: F.mse_loss(y, x), False)), x)
    assert penalty_of(rvconvert.convert(VAE(result, False)), x) == pytest.approx(alone)


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_a_term_made_from_a_draw_is_so_where_moments_leave_too(covariance: str) -> None:
    """A kernel of a latent with itself, of a distribution of latents, as MMD has."""

    def result(y: Tensor, x: Tensor, z: Tensor, mu: Tensor, std: Tensor, m: VAE) -> Any:
        return y, torch.exp(-((z[:, None] - z[None]) ** 2).mean(2)).mean()

    vae, x = VAE(result, False), torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    rv = rvconvert.convert(vae, covariance=covariance, output="distribution")
    with torch.no_grad():
        drawn, found = ([model(x)[1] for _ in range(400)] for model in (vae, rv))
    means = [
        torch.stack([v.mean if isinstance(v, rvconvert.RandomVariable) else v for v in each]).mean() for each in (drawn, found)
    ]
    assert float(means[1]) == pytest.approx(float(means[0]), rel=0.03)


def penalty_of_linear(layer: nn.Linear, var: Tensor) -> float:
    """L_c of a linear layer's output whose first inputs have a variance."""
    return 50 * float((var @ layer.weight[:, : var.shape[1]].square().t()).square().mean())


def test_a_head_beside_a_target_that_is_joined_of_several_inputs_has_no_penalty() -> None:
    """A fair VAE decodes what is to be known no more too: no input has the target's size."""

    class Fair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.encoder, self.label, self.decoder = nn.Linear(9, 6), nn.Linear(3, 2), nn.Linear(4, 9)

        def forward(self, x: Tensor, s: Tensor, label: Tensor) -> Tensor:
            mu, logvar = self.encoder(torch.cat([x, s], 1)).chunk(2, 1)
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
            y = self.decoder(torch.cat([z, s], 1))
            return F.binary_cross_entropy_with_logits(y, torch.cat([x, s], 1)) + F.cross_entropy(self.label(z), label)

    fair, x, s = Fair(), torch.rand(8, 8), torch.rand(8, 1).round()
    rv = rvconvert.convert(fair)
    rv(x, s, torch.randint(0, 2, (8,)))
    var = fair.encoder(torch.cat([x, s], 1)).chunk(2, 1)[1].exp()
    assert float(rv.last_penalty) == pytest.approx(penalty_of_linear(fair.decoder, var), rel=1e-4)


@pytest.mark.parametrize("stops", [False, True])
def test_the_size_of_a_label_s_head_is_no_measure_of_others(stops: bool) -> None:
    """Of molecules by trees: logits of nodes, a head that says where a branch ends, and one that scores candidates."""

    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.tokens, self.encoder = nn.Embedding(6, 8), nn.Linear(8, 8)
            self.decoder, self.stop, self.assembly = nn.Linear(10, 6), nn.Linear(10, 1), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor, candidates: Tensor, label: Tensor, stop: Tensor) -> Tensor:
            h = self.tokens(x)
            mu, logvar, mu_2, logvar_2 = self.encoder(h.mean(1)).chunk(4, 1)
            z, z_2 = (m + (v / 2).exp() * torch.randn_like(m) for m, v in ((mu, logvar), (mu_2, logvar_2)))
            h = torch.cat([z[:, None].expand(-1, x.shape[1], -1), h], -1)
            loss = F.cross_entropy(self.decoder(h).flatten(0, 1), x.flatten())
            if stops:
                loss = loss + F.binary_cross_entropy_with_logits(self.stop(h).squeeze(-1), stop)
            return loss + F.cross_entropy(torch.bmm(candidates, self.assembly(z_2)[..., None]).squeeze(-1), label)

    tree, x = Tree(), torch.randint(0, 6, (8, 4), generator=torch.Generator().manual_seed(0))
    rv = rvconvert.convert(tree)
    rv(x, torch.randn(8, 3, 8), torch.randint(0, 3, (8,)), torch.rand(8, 4).round())
    var = tree.encoder(tree.tokens(x).mean(1)).chunk(4, 1)[1].exp()
    assert float(rv.last_penalty) == pytest.approx(penalty_of_linear(tree.decoder, var), rel=1e-4)


ROWS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "by iteration": list,
    "cut": lambda x: [row[:n] for row, n in zip(x, (8, 5, 6, 7), strict=True)],
    "by place": lambda x: [x[i] for i in range(4)],
}


@pytest.mark.parametrize("rows", ROWS)
def test_tokens_that_are_embedded_row_by_row(rows: str) -> None:
    class Strings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.tokens, self.encoder, self.decoder = nn.Embedding(9, 5), nn.Linear(5, 6), nn.Linear(8, 9)

        def forward(self, x: Tensor) -> Tensor:
            held = ROWS[rows](x)
            mu, logvar = self.encoder(torch.stack([self.tokens(row).mean(0) for row in held])).chunk(2, 1)
            z = mu + (logvar / 2).exp() * torch.randn_like(mu)
            x = nn.utils.rnn.pad_sequence(held, batch_first=True)
            y = self.decoder(torch.cat([z[:, None].expand(-1, x.shape[1], -1), self.tokens(x)], -1))
            return F.cross_entropy(y.flatten(0, 1), x.flatten())

    strings, x = Strings(), torch.randint(0, 9, (4, 8), generator=torch.Generator().manual_seed(0))
    rv = rvconvert.convert(strings)
    rv(x)
    var = strings.encoder(torch.stack([strings.tokens(row).mean(0) for row in ROWS[rows](x)])).chunk(2, 1)[1].exp()
    assert float(rv.last_penalty) == pytest.approx(penalty_of_linear(strings.decoder, var), rel=1e-4)


ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda y, x: ((y - x) ** 2).sum(1).mean(),
    "mse_loss": lambda y, x: F.mse_loss(y, x),
    "without reduction": lambda y, x: F.mse_loss(y, x, reduction="none").sum(1).mean(),
    "Bernoulli": lambda y, x: -(x * y.sigmoid().log() + (1 - x) * (1 - y.sigmoid()).log()).sum(1).mean(),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_batch_that_is_put_on_the_model_beforehand_is_an_input(error: str) -> None:
    class Set(VAE):
        def set_input(self, x: Tensor) -> None:
            self.x = x

        def compute_loss(self) -> Tensor:
            mu, logvar = self.encoder(self.x).chunk(2, 1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())
            return ERRORS[error](y, self.x) - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1).mean()

    class Given(Set):
        def forward(self, x: Tensor) -> Tensor:
            self.x = x
            return self.compute_loss()

    rv, other = rvconvert.convert(Set(None, False), methods=("compute_loss",)), rvconvert.convert(Given(None, False))  # type: ignore[arg-type]
    for n in (8, 8, 5):
        x = torch.rand(n, 12)
        rv.set_input(x)
        torch.testing.assert_close(rv.compute_loss(), other(x))
        torch.testing.assert_close(rv.last_penalty, other.last_penalty)
        assert rv.last_penalty > 0


def test_a_prior_that_is_kept_on_the_model_is_no_batch() -> None:
    class Prior(VAE):
        def __init__(self) -> None:
            super().__init__(None, False)  # type: ignore[arg-type]
            self.prior_mean, self.prior_std = torch.zeros(1, 4), torch.ones(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())

        def sample(self, n: int) -> Tensor:
            return self.decoder(self.prior_mean + self.prior_std * torch.randn(n, 4))

    rv = rvconvert.convert(Prior(), methods=("forward", "sample"))
    rv(torch.rand(8, 12))
    with pytest.raises(ConversionError, match="no latent"):
        rv.sample(16)


@pytest.mark.parametrize("function", [torch.log1p, torch.tanh, lambda a: (a > 0.5).float()], ids=["log1p", "tanh", "threshold"])
def test_a_modality_whose_target_is_made_of_an_input_by_a_function_has_its_penalty(function: Callable[[Tensor], Tensor]) -> None:
    """Counts are decoded as their logarithms, beside a larger picture that is decoded as it came."""

    class Both(VAE):
        def __init__(self) -> None:
            super().__init__(None, False)  # type: ignore[arg-type]
            self.joint, self.counts = nn.Linear(18, 8), nn.Linear(4, 6)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            mu, logvar = self.joint(torch.cat([x, counts], 1)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            return F.mse_loss(self.decoder(z), x) + F.mse_loss(self.counts(z), function(counts))

    both, x, counts = Both(), torch.rand(8, 12), torch.rand(8, 6)
    rv = rvconvert.convert(both)
    rv(x, counts)
    var = both.joint(torch.cat([x, counts], 1)).chunk(2, 1)[1].exp()
    expected = penalty_of_linear(both.decoder, var) + penalty_of_linear(both.counts, var)
    assert float(rv.last_penalty) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cut", [False, True])
def test_a_reward_beside_means_and_variances_by_one_layer(cut: bool) -> None:
    """Or beside a reconstruction that is cut from what one layer gives with it: then it is a part of that."""

    class World(VAE):
        def __init__(self) -> None:
            super().__init__(None, False)  # type: ignore[arg-type]
            self.last, self.reward = nn.Linear(4, 25 if cut else 24), nn.Linear(4, 1)

        def forward(self, x: Tensor, r: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
            y = self.last(z)
            m, v = y[:, :24].chunk(2, 1)
            reward = y[:, 24:] if cut else self.reward(z)
            return (0.5 * ((x - m) ** 2 * (-v).exp() + v)).mean() + F.mse_loss(reward, r)

    world, x = World(), torch.rand(8, 12)
    rv = rvconvert.convert(world)
    rv(x, torch.rand(8, 1))
    var = world.encoder(x).chunk(2, 1)[1].exp()
    assert float(rv.last_penalty) == pytest.approx(penalty_of_linear(world.last, var), rel=1e-4)


def test_a_mask_of_as_many_numbers_makes_no_reconstruction_of_a_reward() -> None:
    class World(nn.Module):
        """Steps of a world model whose state an input resets; its reward has a number for each of the mask's."""

        def __init__(self) -> None:
            super().__init__()
            self.cell, self.posterior = nn.GRUCell(6, 8), nn.Linear(28, 8)
            self.decoder, self.reward = nn.Linear(12, 20), nn.Linear(12, 1)

        def forward(self, seen: Tensor, action: Tensor, going: Tensor) -> Any:
            z, h, states = torch.zeros(3, 4), torch.zeros(3, 8), []
            for t in range(len(seen)):
                h = self.cell(torch.cat([z * going[t], action[t]], -1), h * going[t])
                mu, logvar = self.posterior(torch.cat([h, seen[t]], -1)).chunk(2, -1)
                z = mu + torch.randn_like(mu) * (logvar / 2).exp()
                states.append(torch.cat([z, h], -1))
            return self.decoder(torch.stack(states)), self.reward(torch.stack(states)).squeeze(-1)

    inputs = torch.rand(5, 3, 20), torch.randn(5, 3, 2), torch.ones(5, 3, 1)
    plain = World()
    rv = rvconvert.convert(plain)
    rv(*inputs)
    apart, _ = rvconvert.convert(plain, output="distribution", attach=False)(*inputs)
    torch.testing.assert_close(rv.last_penalty, rvconvert.variance_penalty(apart).detach())


@pytest.mark.parametrize("scaled", [lambda x, scale: x / scale, lambda x, scale: x * scale])
def test_an_input_that_is_scaled_first_is_one_to_reconstruct(scaled: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.full((6,), 2.0))
            self.encoder, self.decoder, self.reward = nn.Linear(6, 4), nn.Linear(2, 6), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Any:
            mu, logvar = self.encoder(scaled(x, self.scale)).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (logvar / 2).exp()
            return self.reward(z), self.decoder(z)

    plain, x = Scaled(), torch.rand(5, 6)
    rv = rvconvert.convert(plain)
    rv(x)
    _, apart = rvconvert.convert(plain, output="distribution", attach=False)(x)
    torch.testing.assert_close(rv.last_penalty, rvconvert.variance_penalty(apart).detach())
