"""Sampled covariance: antithetic paths through the plain functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rvconvert
from rvconvert import ConversionError, Options, RandomVariable
from rvconvert.core.random_variable import Settings
from rvconvert.covariance.sampled import SampledVariable, antithetic_normal, orthogonal_normal
from rvconvert.rules.draws import randn, standard_gamma


class Decoder(nn.Module):
    def __init__(self, latent: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(latent, 32)
        self.rest = nn.Sequential(
            nn.BatchNorm1d(32), nn.LeakyReLU(), nn.Unflatten(1, (8, 2, 2)), nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 1, 3, padding=1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.rest(self.first(z))


class VAE(nn.Module):
    def __init__(self, latent: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 2 * latent), Decoder(latent)

    def forward(self, x):
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), z, mu, logvar


def source(shape: tuple[int, ...], pairs: int, seed: int | None = None) -> SampledVariable:
    return antithetic_normal(torch.zeros(shape), Settings(covariance="sampled", pairs=pairs, seed=seed))


def test_draws_are_orthogonal_and_each_is_standard_normal():
    torch.manual_seed(0)
    noise = orthogonal_normal(5, torch.zeros(20_000, 3), None).double()  # two blocks: 3 and 2
    inner = torch.einsum("pbn,qbn->bpq", noise, noise)
    for i, j in ((0, 1), (0, 2), (1, 2), (3, 4)):
        assert inner[:, i, j].abs().max() < 1e-4
    assert inner[:, 0, 3].abs().mean() > 0.5
    for draw in noise:
        assert torch.allclose(draw.T @ draw / len(draw), torch.eye(3).double(), atol=0.05)
        assert abs((draw**4).mean() - 3) < 0.15
        assert abs((draw[:, 0] ** 2 * draw[:, 1] ** 2).mean() - 1) < 0.1


@pytest.mark.parametrize("pairs", [1, 2, 4, 7])
def test_second_moment_is_unbiased(pairs):
    torch.manual_seed(pairs)
    x = source((40_000, 4), pairs)
    y = torch.relu((x * torch.tensor([0.5, 1.0, 0.2, 0.8])) @ torch.tensor([[1.0], [0.5], [-1.0], [0.7]]) + 0.3)
    v = (torch.tensor([0.5, 0.5, -0.2, 0.56]) ** 2).sum()
    s, a = v.sqrt(), 0.3 / v.sqrt()
    second = (0.09 + v) * torch.special.ndtr(a) + 0.3 * s * torch.exp(-a * a / 2) * 0.3989423
    estimates = y.mean.square() + y.var
    assert abs(estimates.mean() - second) < 4 * estimates.std() / 200


def test_variance_of_a_linear_map_is_exact_in_expectation_and_the_mean_exact():
    torch.manual_seed(1)
    weight = torch.randn(4, 3)
    y = source((50_000, 4), 1) @ weight + 1.0
    assert torch.allclose(y.mean, torch.ones_like(y.mean), atol=1e-5)
    assert torch.allclose(y.var.mean(0), weight.square().sum(0), rtol=0.05)


def test_squared_error_of_the_mean_plus_variance_is_the_error_over_the_paths():
    torch.manual_seed(2)
    rv = rvconvert.convert(VAE(), covariance="sampled", pairs=3, seed=5, output="distribution").eval()
    x = torch.rand(7, 1, 4, 4)
    y = rv(x)[0]
    target = torch.rand(7, 1, 4, 4)
    expected = F.mse_loss(y.mean, target) + rvconvert.variance_penalty(y, weight=1.0, kind="expected")
    assert torch.allclose(expected, (y.paths - target).square().mean(), rtol=1e-5)


def test_attached_expected_penalty_has_the_gradient_of_the_error_over_the_paths():
    torch.manual_seed(3)
    vae, x = VAE(), torch.rand(7, 1, 4, 4)
    options = {"covariance": "sampled", "pairs": 2, "seed": 5}
    attached = rvconvert.convert(vae, penalty=1.0, penalty_kind="expected", **options)
    out, z, mu, _ = attached(x)
    assert out.shape == x.shape and torch.allclose(z, mu, atol=1e-6)
    F.mse_loss(out, x).backward()
    explicit = rvconvert.convert(vae, output="distribution", **options)
    y = explicit(x)[0]
    (y.paths - x).square().mean().backward()
    assert torch.allclose(attached.last_penalty, y.var.mean(), rtol=1e-5)
    for a, b in zip(attached.parameters(), explicit.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_batch_norm_sees_all_paths_as_one_batch():
    torch.manual_seed(4)
    decoder = Decoder()
    rv = rvconvert.convert(decoder, random_inputs=("z",), covariance="sampled", pairs=2, seed=1, output="distribution")
    mean, var = torch.randn(9, 6), torch.rand(9, 6)
    y = rv(RandomVariable(mean, var))
    noise = source((9, 6), 2, seed=1).paths
    z = mean + var.sqrt() * noise
    plain = decoder(z.flatten(0, 1)).unflatten(0, (4, 9))
    assert torch.allclose(y.paths, plain, atol=1e-5)
    for a, b in zip(rv.buffers(), decoder.buffers(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert int(decoder.rest[0].num_batches_tracked) == 1


def test_operations_without_any_rule():
    class Odd(nn.Module):
        def forward(self, z):
            h = torch.fft.rfft(z, dim=1).abs()
            h = h.sort(dim=1).values + torch.linalg.cross(z[:, :3], z[:, 1:4]).sum(1, keepdim=True)
            top = h.topk(2, dim=1)
            return torch.cummax(h, 1).values.clone() * top.values.sum(1, keepdim=True) + torch.gather(z, 1, z.argsort(1))[:, :1]

    torch.manual_seed(5)
    model = Odd()
    options = {"random_inputs": ("z",), "covariance": "sampled", "pairs": 2, "seed": 2}
    options |= {"output": "distribution"}
    mean = torch.randn(5, 6)
    y = rvconvert.convert(model, **options)(RandomVariable(mean, torch.ones(5, 6)))
    paths = mean + source((5, 6), 2, seed=2).paths
    assert torch.allclose(y.paths, torch.stack([model(z) for z in paths]), atol=1e-5)


def test_boolean_masks_run_path_by_path():
    x = source((4, 6), 2, seed=0)
    keep = torch.tensor([True, False, True, True])
    assert torch.allclose(x[keep].paths, x.paths[:, keep])
    y = torch.where(x > 0, x, 0.1 * x)
    assert torch.allclose(y.paths, F.leaky_relu(x.paths, 0.1))


def test_writes_in_place_change_this_variable_only():
    x = source((4, 6), 1, seed=0)
    before, other = x.paths.clone(), x.snapshot()
    x.relu_()
    x[:, 0] = 3.0
    x += 1
    expected = before.relu()
    expected[:, :, 0] = 3.0
    assert torch.equal(x.paths, expected + 1) and torch.equal(other.paths, before)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool(x.sum() > 0), lambda x: x.tolist(), lambda x: x.numpy()]
)
def test_reading_a_value_refuses(read):
    with pytest.raises(ConversionError, match="value"):
        read(source((4, 6), 1))


@pytest.mark.parametrize("covariance", ["independent", "calibrated", "lowrank", "sampled"])
def test_classes_and_masks_leave_as_such(covariance):
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(12, 6), nn.Linear(3, 36)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar - 4).exp()).view(-1, 3, 12)
            return y, y.argmax(1), y.max(1)[1], y[:, 0] > 0

    y, largest, index, mask = rvconvert.convert(Classes(), covariance=covariance)(torch.rand(64, 12))
    assert (largest.dtype, index.dtype, mask.dtype) == (torch.int64, torch.int64, torch.bool)
    for found, expected in ((largest, y.argmax(1)), (index, y.argmax(1)), (mask, y[:, 0] > 0)):
        assert float((found == expected).float().mean()) > 0.97


def test_dropout_draws_a_mask_for_each_path():
    x = source((4, 6), 2, seed=0) * 0.0 + 1.0
    masks = F.dropout(x, 0.5, training=True).paths
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_seed_fixes_draws_and_sources_differ():
    class Two(nn.Module):
        def forward(self, x):
            return torch.randn_like(x) + x, torch.randn_like(x) + x

    x = torch.zeros(3, 4)
    rv = rvconvert.convert(Two(), covariance="sampled", seed=1, output="distribution")
    (a, b), (c, _) = rv(x), rv(x)
    assert torch.equal(a.paths, c.paths) and not torch.allclose(a.paths, b.paths)
    fresh = rvconvert.convert(Two(), covariance="sampled", output="distribution")
    assert not torch.equal(fresh(x)[0].paths, fresh(x)[0].paths)


def test_variance_agrees_with_monte_carlo_where_independence_does_not():
    torch.manual_seed(6)
    decoder = Decoder().eval()
    with torch.no_grad():
        decoder.first.weight.copy_(torch.rand(32, 1) @ torch.randn(1, 6) * 0.3)  # one direction drives all features,
        decoder.rest[4].weight.abs_()  # which the next layers add up
        decoder.rest[7].weight.abs_().mul_(0.3)
        mean, var = torch.randn(64, 6), torch.full((64, 6), 0.3)
        draws = torch.stack([decoder(mean + var.sqrt() * torch.randn_like(mean)) for _ in range(2000)])
        true = draws.var(0).sum()
        ratio = {}
        for covariance, more in (("sampled", {"pairs": 16}), ("independent", {})):
            rv = rvconvert.convert(
                decoder, Options().in_mode(covariance, seed=0), random_inputs=("z",), output="distribution", **more
            ).eval()
            ratio[covariance] = float(rv(RandomVariable(mean, var)).var.sum() / true)
    assert 0.93 < ratio["sampled"] < 1.07
    assert ratio["independent"] < 0.5


@pytest.mark.parametrize("law", ["even", "drawn one by one"])
def test_two_pairs_are_enough_for_an_unbiased_variance(law):
    """Of an even function, and of a law without a quantile function, ``var`` lacks a half and a quarter."""
    settings = Settings(covariance="sampled", pairs=2, seed=0)
    if law == "even":
        x = randn(20000, 1, settings=settings).square()
    else:
        x = standard_gamma(torch.full((20000, 1), 2.0), settings=settings)
    assert float(x.unbiased_var().mean()) == pytest.approx(2, rel=0.05)
    assert float(x.var.mean()) == pytest.approx(1 if law == "even" else 1.5, rel=0.05)
