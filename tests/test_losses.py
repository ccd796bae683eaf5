"""Losses of a distribution, against many samples and against the Gaussian likelihood itself."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rvconvert
from rvconvert import RandomVariable


def distribution(shape=(5, 3, 4), dtype=torch.float64):
    torch.manual_seed(0)
    return RandomVariable(torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype)), torch.randn(shape, dtype=dtype)


def test_expected_squared_error_is_the_mean_over_samples():
    y, x = distribution()
    samples = torch.stack([F.mse_loss(y.mean + y.std * torch.randn_like(x), x) for _ in range(20_000)])
    error = 4 * float(samples.std()) / math.sqrt(len(samples))
    assert float(rvconvert.expected_squared_error(y, x)) == pytest.approx(float(samples.mean()), abs=error)


def test_expected_squared_error_is_the_squared_error_and_the_expected_penalty():
    y, x = distribution()
    other = F.mse_loss(y.mean, x) + rvconvert.variance_penalty(y, 1.0, "expected")
    torch.testing.assert_close(rvconvert.expected_squared_error(y, x), other)


def test_optimal_sigma_is_the_best_of_all_gaussian_likelihoods():
    y, x = distribution()
    elements = x[0].numel()

    def expected_nll(sigma):
        terms = ((y.mean - x).square() + y.var) / (2 * sigma**2) + math.log(sigma) + 0.5 * math.log(2 * math.pi)
        return float(terms.sum() / len(x))

    found = float(rvconvert.optimal_sigma_nll(y, x)) + elements / 2 * (1 + math.log(2 * math.pi))
    best = min(expected_nll(math.exp(s / 1000)) for s in range(-1000, 2000))
    assert found == pytest.approx(best, rel=1e-5)


def test_gradients_reach_mean_and_variance_and_are_those_of_the_likelihood():
    y, x = distribution()
    mean, var = y.mean.clone().requires_grad_(), y.var.clone().requires_grad_()
    errors = (y.mean - x).square() + y.var
    rvconvert.optimal_sigma_nll(RandomVariable(mean, var), x).backward()
    sigma2 = errors.mean()  # at the optimum the deviation itself has no slope
    torch.testing.assert_close(mean.grad, (y.mean - x) / sigma2 / len(x))
    torch.testing.assert_close(var.grad, torch.full_like(var, 0.5 / float(sigma2) / len(x)))


def test_a_perfect_reconstruction_is_finite():
    x = torch.rand(2, 3)
    mean = x.clone().requires_grad_()
    loss = rvconvert.optimal_sigma_nll(RandomVariable(mean, torch.zeros_like(x)), x)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(mean.grad).all()


@pytest.mark.parametrize("loss", [rvconvert.expected_squared_error, rvconvert.optimal_sigma_nll])
def test_refuses_what_has_no_distribution_or_another_shape(loss):
    y, x = distribution()
    with pytest.raises(rvconvert.ConversionError, match="output='distribution'"):
        loss(x, x)
    with pytest.raises(rvconvert.ConversionError, match=r"\(5, 3, 4\), the data \(5, 12\)"):
        loss(y, x.flatten(1))


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_a_layer_that_is_called_with_a_draw_too_steps_once(covariance):
    class Ladder(nn.Module):
        """The prior of the lower latent has a BatchNorm; its scale is taken from a draw, its location as moments."""

        def __init__(self):
            super().__init__()
            self.encoder, self.posterior, self.decoder = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 12)
            self.prior = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            top = mu + torch.randn_like(mu) * (logvar / 2).exp()
            location, scale = self.prior(top).chunk(2, 1)
            mu, logvar = self.posterior(x).chunk(2, 1)
            z = mu + torch.randn_like(mu) * (logvar / 2).exp()
            kl = 0.5 * (scale - logvar + (logvar.exp() + (mu - location) ** 2) / scale.exp() - 1).sum(1).mean()
            return self.decoder(torch.cat([z, location], 1)), kl

    torch.manual_seed(0)
    plain, x = Ladder(), torch.rand(256, 12)
    model = rvconvert.convert(plain, covariance=covariance)
    for _ in range(20):
        sum(each.sum() for each in model(x)).backward()
        plain(x)
    assert int(model.prior[1].num_batches_tracked) == 20
    if covariance == "independent":  # gains are measured from few draws
        torch.testing.assert_close(model.prior[1].running_var, plain.prior[1].running_var, rtol=0.1, atol=0.02)
