"""Low-rank covariance: rows of factors on the latent noises, and an independent remainder."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from rvconvert import RandomVariable
from rvconvert.covariance.lowrank import LowRankVariable, signed_probes, standard_normal
from rvconvert.random_variable import Settings

LATENT = 5


def latent(mean: Tensor, std: Tensor, rank: int | None = None, seed: int | None = None) -> LowRankVariable:
    settings = Settings(covariance="lowrank", rank=rank, seed=seed)
    return mean + standard_normal(torch.zeros_like(mean), settings) * std


def monte_carlo(function, mean: Tensor, std: Tensor, n: int = 40_000) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of ``function`` of the latent of each sample, and its covariance with each noise."""
    means, variances, covariances = [], [], []
    for m, s in zip(mean, std, strict=True):
        e = torch.randn(n, mean.shape[1], dtype=mean.dtype)
        y = function(m + s * e)
        means.append(y.mean(0))
        variances.append(y.var(0))
        covariances.append(torch.einsum("nk,n...->k...", e, y - y.mean(0)) / n)
    return torch.stack(means), torch.stack(variances), torch.stack(covariances, 1)


@pytest.fixture
def moments():
    torch.manual_seed(0)
    return torch.randn(3, LATENT), 0.2 + torch.rand(3, LATENT)


def test_a_linear_network_is_exact(moments):
    mean, std = moments
    network = nn.Sequential(
        nn.Linear(LATENT, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), nn.BatchNorm2d(3),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2), nn.PixelShuffle(2),
        nn.Flatten(), nn.Linear(64, 7),
    ).double().eval()  # fmt: skip
    y = network(latent(mean.double(), std.double()))
    jacobian = torch.func.jacrev(lambda z: network(z[None])[0])(mean[0].double())
    assert torch.allclose(y.mean, network(mean.double()))
    assert torch.allclose(y.factors, torch.einsum("ok,bk->kbo", jacobian, std.double()))
    assert y.remainder.abs().max() == 0
    assert torch.allclose(y.var, torch.einsum("ok,bk->bo", jacobian.square(), std.double().square()))


def test_skips_sums_and_products_keep_correlation(moments):
    mean, std = (x.double() for x in moments)
    first, second = nn.Linear(LATENT, 8).double(), nn.Linear(LATENT, 8).double()

    def function(z):
        a, b = first(z), second(z)
        c = torch.cat((a * b, a + 2 * b), 1)
        return c - 0.5 * c.flip(1) + a.repeat(1, 2)

    y = function(latent(mean, std))
    true_mean, true_var, covariance = monte_carlo(function, mean, std, 200_000)
    assert torch.allclose(y.mean, true_mean, atol=0.03)
    assert torch.allclose(y.var.sum(), true_var.sum(), rtol=0.03)
    assert torch.allclose(y.factors, covariance, atol=0.06)
    zero = first(latent(mean, std))
    assert (zero - zero).var.abs().max() < 1e-10


def test_elementwise_functions_have_exact_marginals_and_stein_rows(moments):
    mean, std = moments
    linear = nn.Linear(LATENT, 6)
    x = linear(latent(mean, std))
    functions = [
        F.relu, F.leaky_relu, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus, F.elu, torch.exp, torch.square, torch.sin,
        torch.abs, lambda v: v * torch.sigmoid(v), lambda v: torch.clamp(v, -0.5, 1.0), lambda v: 3 * v - 1, lambda v: v**3,
        lambda v: F.prelu(v, torch.tensor([0.2])), lambda v: torch.maximum(v, torch.tensor(0.3)),
    ]  # fmt: skip
    draws = torch.randn(400_000, LATENT)
    values = linear(mean[0] + std[0] * draws)
    for function in functions:
        y = function(x)
        f = function(values)
        scale = f.std(0) + 0.01
        assert ((y.mean[0] - f.mean(0)).abs() / scale).max() < 0.02, function
        assert torch.allclose(y.var[0], f.var(0), rtol=0.05, atol=1e-4), function
        covariance = draws.T @ (f - f.mean(0)) / len(draws)
        assert ((y.factors[:, 0] - covariance).abs() / scale).max() < 0.03, function
        independent = function(RandomVariable(x.mean, x.var))
        assert torch.allclose(independent.mean, y.mean, atol=1e-5)
        assert torch.allclose(independent.var, y.var, rtol=2e-3, atol=1e-5), function
        assert (y.remainder >= 0).all()


def test_remainder_of_a_relu_keeps_what_the_rows_do_not(moments):
    mean, std = moments
    before = nn.Linear(LATENT, 6)(latent(mean, std))
    x = torch.relu(before)
    y = nn.Linear(6, 4)
    out = y(x)
    expected = torch.relu(RandomVariable(before.mean, before.var))
    assert torch.allclose(x.remainder, expected.var - x.factors.square().sum(0), atol=1e-6)
    assert torch.allclose(out.remainder, x.remainder @ y.weight.square().T, rtol=1e-5)


BLOCKS = {
    "layer_norm": lambda x: F.layer_norm(x, (24,)),
    "group_norm": lambda x: F.group_norm(x.unflatten(1, (6, 4)), 2).flatten(1),
    "instance_norm": lambda x: F.instance_norm(x.unflatten(1, (2, 12))).flatten(1),
    "rms_norm": lambda x: F.rms_norm(x, (24,)),
    "softmax": lambda x: F.softmax(x, 1),
    "max_pool": lambda x: F.max_pool1d(x.unflatten(1, (2, 12)), 2).flatten(1),
    "maximum": lambda x: torch.maximum(x[:, :12], x[:, 12:]),
    "minimum": lambda x: torch.minimum(x[:, :12], x[:, 12:]),
    "attention": lambda x: F.scaled_dot_product_attention(*x.reshape(-1, 3, 2, 4).unbind(1)).flatten(1),
    "matmul": lambda x: torch.matmul(x[:, :12].unflatten(1, (3, 4)), x[:, 12:].unflatten(1, (4, 3))).flatten(1),
    "broadcast": lambda x: (x[:, :20].unflatten(1, (4, 5)) * (1 + x[:, 20:, None]) + x[:, 20:, None]).flatten(1),
    "spread constant": lambda x: (x[:, :4, None] * torch.linspace(0.5, 1, 6) + torch.ones(6)).relu().flatten(1),
    "gate": lambda x: F.glu(x, 1),
    "quotient": lambda x: x[:, :12] / (4 + torch.sigmoid(x[:, 12:])),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "write": lambda x: written(x),
    "stack": lambda x: torch.stack((x, torch.zeros_like(x), 2 * x), 1).sum(1),
    "logsumexp": lambda x: torch.logsumexp(x.unflatten(1, (4, 6)), 1),
    "einsum": lambda x: torch.einsum("bij,jk->bik", x.unflatten(1, (4, 6)), torch.ones(6, 2)).flatten(1),
}


def written(x):
    y = x * 1.0
    y[:, 3:9] = 2 * x[:, 5:11]
    return y


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_agree_with_monte_carlo_at_posterior_scales(name, moments):
    mean, std = moments[0], 0.25 * moments[1]
    torch.manual_seed(1)
    linear, last = nn.Linear(LATENT, 24), BLOCKS[name]
    weight = torch.rand(last(linear(mean)).shape[1], 6)  # positive: what is correlated adds up

    def function(z):
        return last(linear(z)) @ weight if isinstance(z, Tensor) else torch.matmul(last(linear(z)), weight)

    with torch.no_grad():
        y = function(latent(mean, std))
        true_mean, true_var, _ = monte_carlo(function, mean, std)
    assert abs(float(y.var.sum() / true_var.sum()) - 1) < 0.1
    if name != "max_pool":  # whose mean is that of independent elements
        shift = (function(mean) - true_mean).norm()
        assert (y.mean - true_mean).norm() < 0.35 * shift + 0.03 * true_var.sum().sqrt()
    if name not in ("softmax", "layer_norm", "attention"):
        rows = y.factors.square().sum() / y.var.sum()
        assert rows > 0.7  # the latents still explain the output


def test_batch_norm_in_training_takes_its_statistics_from_the_total_variance(moments):
    mean, std = moments
    linear, norms = nn.Linear(LATENT, 6), [nn.BatchNorm1d(6), nn.BatchNorm1d(6)]
    x = linear(latent(mean, std))
    y = norms[0](x)
    expected = norms[1](RandomVariable(x.mean, x.var))
    assert torch.allclose(y.mean, expected.mean, atol=1e-5) and torch.allclose(y.var, expected.var, rtol=1e-4)
    for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        assert torch.allclose(a, b)
    assert int(norms[0].num_batches_tracked) == 1
    assert y.factors.shape == (LATENT, 3, 6)


def test_instance_norm_updates_its_statistics_once(moments):
    mean, std = moments
    linear, norms = nn.Linear(LATENT, 12), [nn.InstanceNorm1d(3, track_running_stats=True) for _ in range(2)]
    x = linear(latent(mean, std)).unflatten(1, (3, 4))
    norms[0](x)
    norms[1](RandomVariable(x.mean, x.var))
    for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("dropout", [nn.Dropout(0.3), nn.Dropout2d(0.3), nn.AlphaDropout(0.3)])
def test_dropout_keeps_the_rows_and_adds_its_own_noise(dropout, moments):
    mean, std = moments
    x = nn.Linear(LATENT, 8)(latent(mean, std)).unflatten(1, (2, 2, 2))
    y = dropout(x)
    expected = dropout(RandomVariable(x.mean, x.var))
    assert torch.allclose(y.mean, expected.mean, atol=1e-6) and torch.allclose(y.var, expected.var, rtol=1e-4)
    assert torch.allclose(y.factors / x.factors, (y.factors / x.factors).flatten()[0].expand_as(y.factors), rtol=1e-3)


def test_sources_do_not_collide(moments):
    mean, std = moments
    weight = torch.rand(LATENT, 4)
    a, b = latent(mean, std), latent(mean, std)
    y = a @ weight + b @ weight
    assert y.factors.shape[0] == 2 * LATENT
    single = (a @ weight).var
    assert torch.allclose(y.var, 2 * single, rtol=1e-5)
    assert torch.allclose((a @ weight + a @ weight).var, 4 * single, rtol=1e-5)
    assert torch.allclose((b * a).var, a.mean**2 * b.var + b.mean**2 * a.var + a.var * b.var, rtol=1e-5)
    joined = torch.cat((a, b), 1)
    assert torch.allclose(joined.sum(1).var, a.var.sum(1) + b.var.sum(1), rtol=1e-5)


def test_samples_of_a_batch_are_independent(moments):
    mean, std = moments
    assert latent(mean, std).factors.shape == (LATENT, 3, LATENT)
    unbatched = latent(mean[0], std[0])
    assert unbatched.factors.shape == (LATENT, LATENT)
    assert torch.allclose(unbatched.sum().var, std[0].square().sum())


def test_probes_keep_every_elements_variance_and_covariances_on_average():
    probes = signed_probes(8, torch.zeros(4000, 20), seed=0)
    assert torch.allclose(probes.square().sum(0), torch.ones(4000, 20), atol=1e-5)
    gram = torch.einsum("rbi,rbj->ij", probes, probes) / 4000
    assert torch.allclose(gram, torch.eye(20), atol=0.05)
    square = signed_probes(4, torch.zeros(10, 8), seed=0)
    assert torch.allclose(torch.einsum("rbi,sbi->brs", square, square), 2 * torch.eye(4).expand(10, 4, 4), atol=1e-5)


def test_rank_bounds_the_rows_of_all_sources_together(moments):
    mean, std = moments
    a, b = latent(mean, std, rank=3, seed=1), latent(mean, std, rank=3, seed=2)
    assert (a + b).factors.shape[0] == 3
    assert torch.allclose(a.var, std.square(), rtol=1e-5)
    full = latent(mean, std, rank=LATENT)
    assert torch.equal(full.factors, latent(mean, std).factors)
    large = latent(torch.zeros(5000, LATENT), torch.ones(5000, LATENT), rank=3)
    weight = torch.rand(LATENT, 2)
    assert torch.allclose((large @ weight).var.mean(0), weight.square().sum(0), rtol=0.05)


def test_coherent_samples_have_the_covariance_of_the_rows(moments):
    mean, std = moments
    y = torch.tanh(nn.Linear(LATENT, 4)(latent(mean, std)))
    draws = y.sample(100_000).detach()
    assert torch.allclose(draws.mean(0), y.mean, atol=0.01)
    for i in range(3):
        rows = y.factors[:, i]
        expected = rows.T @ rows + torch.diag(y.remainder[i])
        assert torch.allclose(torch.cov(draws[:, i].T), expected, atol=0.02)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(LATENT, 16)
        self.rest = nn.Sequential(
            nn.BatchNorm1d(16), nn.LeakyReLU(), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 4, 3, 2, 1, 1),
            nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, z):
        return self.rest(self.first(z))


def test_penalty_has_the_gradient_of_finite_differences():
    torch.manual_seed(2)
    decoder = Decoder().double()
    rv = rvconvert.convert(decoder, random_inputs=("z",), covariance="lowrank", output="distribution")
    mean = torch.randn(6, LATENT).double().requires_grad_()
    var = (0.1 + torch.rand(6, LATENT).double()).requires_grad_()

    def penalty() -> Tensor:
        return rvconvert.variance_penalty(rv(RandomVariable(mean, var)), weight=50.0)

    parameters = [mean, var, rv.first.weight, rv.rest[0].weight, rv.rest[3].weight, rv.rest[6].weight]
    gradients = torch.autograd.grad(penalty(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        step = 1e-5
        with torch.no_grad():
            parameter += step * direction
            above = penalty()
            parameter -= 2 * step * direction
            below = penalty()
            parameter += step * direction
        assert math.isclose(float((gradient * direction).sum()), float((above - below) / (2 * step)), rel_tol=1e-4, abs_tol=1e-7)


@pytest.mark.parametrize("engine", ["graph", "dispatch"])
def test_converted_vae_leaves_means_and_attaches_the_full_variance(engine):
    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(16, 2 * LATENT), Decoder()

        def forward(self, x):
            mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            return self.decoder(z), mu, logvar

    torch.manual_seed(3)
    vae, x = VAE(), torch.rand(6, 1, 4, 4)
    out, _, _ = (rv := rvconvert.convert(vae, covariance="lowrank", engine=engine))(x)
    y, _, _ = (explicit := rvconvert.convert(vae, covariance="lowrank", engine=engine, output="distribution"))(x)
    assert isinstance(y, LowRankVariable) and torch.allclose(out, y.mean, atol=1e-6)
    F.mse_loss(out, x).backward()
    (F.mse_loss(y.mean, x) + rvconvert.variance_penalty(y)).backward()
    assert torch.allclose(rv.last_penalty, rvconvert.variance_penalty(y), rtol=1e-4)
    for a, b in zip(rv.parameters(), explicit.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_trained_decoder_keeps_the_variance_that_independence_loses():
    torch.manual_seed(4)
    decoder = Decoder()
    z, grid = torch.randn(256, LATENT), torch.linspace(-1, 1, 4)
    target = torch.sigmoid(3 * (z[:, :1, None] * grid[:, None] + z[:, 1:2, None] * grid)).unsqueeze(1)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(decoder(z), target).backward()
        optimizer.step()
    decoder.eval()
    mean, std = z[:64], torch.full((64, LATENT), 0.3)
    with torch.no_grad():
        draws = torch.stack([decoder(mean + std * torch.randn_like(mean)) for _ in range(2000)])
        true = draws.var(0).sum()

        def ratio(**options):
            rv = rvconvert.convert(decoder, random_inputs=("z",), output="distribution", **options).eval()
            return float(rv(RandomVariable(mean, std.square())).var.sum() / true)

        assert 0.9 < ratio(covariance="lowrank") < 1.1
        assert 0.8 < ratio(covariance="lowrank", rank=3, seed=0) < 1.2
        assert ratio() < 0.6


CHOICES = {
    "where": lambda a, b, c: torch.where(a > 0.1, b, c),
    "method": lambda a, b, c: b.where(a > 0.1, 0.3),
    "greater": lambda a, b, c: (a > b).to(a.dtype),
    "and": lambda a, b, c: ((a > 0) & (b > 0.2)).to(a.dtype),
    "or": lambda a, b, c: ((a > 0) | (b > 0.2)).to(a.dtype),
    "xor": lambda a, b, c: ((a > 0) ^ (b > 0.2)).to(a.dtype),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_by_other_variables_carry_rows(name):
    """Once a crash: the plain function was given an indicator's mean where it takes a boolean."""
    torch.manual_seed(5)
    mean, std = torch.randn(3, 6).double(), (0.2 + torch.rand(3, 6)).double()

    def function(z):
        return CHOICES[name](z[:, :2], z[:, 2:4], z[:, 4:])

    y = function(latent(mean, std))
    true_mean, true_var, covariance = monte_carlo(function, mean, std, 200_000)
    assert torch.allclose(y.mean, true_mean, atol=0.01)
    assert torch.allclose(y.var, true_var, atol=0.02, rtol=0.02)
    assert torch.allclose(y.factors, covariance, atol=0.02)
    assert (y.remainder >= 0).all()


def test_expanded_values_and_roots_of_nothing_do_not_crash_or_spoil_the_rows():
    """Once a crash of forward derivatives, and NaN rows where an infinite slope met a row of zeros."""
    mean, std = torch.randn(3, 4).double(), (0.1 + torch.rand(3, 4)).double()
    z = latent(mean, std)
    y = torch.logsumexp(z.unsqueeze(2).expand(-1, -1, 2), -1)
    assert torch.allclose(y.factors, z.factors) and y.mean.isfinite().all()
    nothing = ((z - z) ** 2).sum(-1).sqrt()
    assert (nothing.factors == 0).all() and (nothing.var == 0).all()
