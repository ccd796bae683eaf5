"""A composition of bounded functions stays bounded, however wide its input is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rvconvert
from rvconvert import RandomVariable


def gaussian_bump(z, centres, width=0.57):
    return torch.exp(-(((z - centres) / width) ** 2))


@pytest.mark.parametrize("deviation", [0.1, 0.3, 0.6, 1.5, 30.0])
def test_bumps_are_one_function_of_what_they_are_bumps_of(deviation):
    """exp(-u^2) with u Gaussian, through broadcast constants; the exact mean is a Gaussian integral."""
    torch.manual_seed(0)
    z = RandomVariable(torch.randn(6, 1).double(), torch.full((6, 1), deviation**2).double())
    centres = torch.linspace(-2, 2, 8).double()
    y = gaussian_bump(z, centres)
    assert bool((y.mean >= 0).all() and (y.mean <= 1).all() and (y.var >= 0).all() and (y.var <= 0.25).all())
    if deviation < 2:
        total = 0.57**2 + 2 * deviation**2
        exact = 0.57 / total**0.5 * torch.exp(-((z.mean - centres) ** 2) / total)
        torch.testing.assert_close(y.mean, exact, rtol=0, atol=0.01)


@pytest.mark.parametrize("deviation", [1.0, 9.5, 50.0, 1e4])
def test_logsumexp_of_wide_values_is_finite_and_no_less_than_that_of_the_means(deviation):
    torch.manual_seed(0)
    mean = torch.randn(5, 3).double()
    x = RandomVariable(mean, torch.full((5, 3), deviation**2).double())
    y = torch.logsumexp(x, 1)
    assert bool((y.mean >= torch.logsumexp(mean, 1)).all())  # Jensen
    samples = torch.logsumexp(mean + deviation * torch.randn(200_000, 5, 3, dtype=torch.float64), 2)
    torch.testing.assert_close(y.mean, samples.mean(0), rtol=0, atol=0.02 * deviation)
    torch.testing.assert_close(y.var, samples.var(0), rtol=0.05, atol=0)


def test_logsumexp_leaves_out_what_is_masked():
    mean = torch.tensor([[0.5, -torch.inf], [-torch.inf, -torch.inf]]).double()
    x = RandomVariable(mean, torch.full((2, 2), 0.3).double())
    y = torch.logsumexp(x, 1)
    torch.testing.assert_close(y.mean, torch.tensor([0.5, -torch.inf]).double())
    torch.testing.assert_close(y.var[0], torch.tensor(0.3).double())


def test_an_exponential_of_a_slope_that_is_a_tensor():
    """In double precision inside, which the slopes, of single precision, meet."""
    torch.manual_seed(0)
    mean, slope = torch.linspace(-2, 2, 9), torch.tensor([0.3])
    y = torch.expm1(0.4 * torch.nn.functional.prelu(RandomVariable(mean, torch.full((9,), 0.25)), slope))
    samples = torch.expm1(0.4 * torch.nn.functional.prelu(mean + 0.5 * torch.randn(400_000, 9), slope))
    torch.testing.assert_close(y.mean, samples.mean(0), rtol=0.01, atol=0.002)
    torch.testing.assert_close(y.var, samples.var(0), rtol=0.02, atol=0)


@pytest.mark.parametrize("p", [2, 3])
def test_a_norm_of_nothing_has_no_gradient(p):
    mean = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    var = torch.zeros(2, 2, requires_grad=True)
    y = torch.linalg.vector_norm(RandomVariable(mean, var), p, dim=-1)
    found, by_var = torch.autograd.grad(y.mean.sum(), (mean, var), retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(torch.linalg.vector_norm(mean, p, dim=-1).sum(), mean)[0])
    assert bool(by_var.isfinite().all() and torch.autograd.grad(y.var.sum(), var)[0].isfinite().all())


@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), torch.tensor(float("nan"))])
def test_what_is_not_defined_is_chosen_where_that_is_likelier(nothing):
    """As a Student t's mean, that of two degrees of freedom or more, is written: ``m[df <= 1] = nan``."""
    df = RandomVariable(torch.tensor([3.0, 1.5, 0.5, 0.5]), torch.tensor([0.01, 0.2, 0.01, 0.0]))
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    y = torch.where(df <= 1, nothing, RandomVariable(mean, torch.full((4,), 0.3)))
    torch.testing.assert_close(y.mean[:2], mean[:2])
    torch.testing.assert_close(y.var[:2], torch.full((2,), 0.3))
    assert not bool(y.mean[2:].isfinite().any())
    (found,) = torch.autograd.grad((y.mean[:2] + y.var[:2]).sum(), mean)
    assert bool(found.isfinite().all())


RANGES = {
    "sigmoid": (torch.sigmoid, 0.0, 1.0),
    "tanh": (torch.tanh, -1.0, 1.0),
    "erf": (torch.erf, -1.0, 1.0),
    "softplus": (F.softplus, 0.0, math.inf),
    "logsigmoid": (F.logsigmoid, -math.inf, 0.0),
    "hardsigmoid": (F.hardsigmoid, 0.0, 1.0),
    "softsign": (F.softsign, -1.0, 1.0),
    "relu6": (F.relu6, 0.0, 6.0),
    "written out": (lambda x: 1 / (1 + torch.exp(-x)), 0.0, 1.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_a_mean_stays_in_the_range_of_the_function(name):
    """By rounding it once left [0, 1], which F.binary_cross_entropy refuses after some hundred steps of training."""
    function, low, high = RANGES[name]
    means, deviations = torch.cat((torch.linspace(-60, 60, 2401), torch.tensor([-1e3, 1e3]))), 10 ** torch.linspace(-4, 1.5, 30)
    m, s = (x.reshape(-1) for x in torch.meshgrid(means, deviations, indexing="ij"))
    y = function(RandomVariable(m, s.square()))
    assert float(y.mean.min()) >= low and float(y.mean.max()) <= high and float(y.var.min()) >= 0
    if name == "sigmoid":
        seen = m.abs() < 50
        assert bool((y.mean >= torch.sigmoid(m) / 2)[seen].all())  # a logarithm may follow


SOFTMAX = {
    "exp of log_softmax": lambda h: F.log_softmax(h, -1).exp(),
    "less logsumexp": lambda h: torch.exp(h - h.logsumexp(-1, keepdim=True)),
    "exp over sum": lambda h: h.exp() / h.exp().sum(-1, keepdim=True),
    "less the largest, twice": lambda h: (h - h.amax(-1, True)).exp() / (h - h.max(-1, keepdim=True)[0]).exp().sum(-1, True),
}


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
@pytest.mark.parametrize("name", SOFTMAX)
def test_a_softmax_written_out_gives_probabilities_however_wide_the_logits_are(name, covariance):
    class Decoder(nn.Module):
        def __init__(self, law):
            super().__init__()
            torch.manual_seed(1)
            self.encoder, self.decoder, self.law = nn.Linear(8, 6), nn.Linear(3, 6), law
            self.decoder.weight.data *= 4

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.law(self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()))

    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    vae = Decoder(SOFTMAX[name])
    with torch.no_grad():
        drawn = torch.stack([vae(x) for _ in range(100)])
        y = rvconvert.convert(vae, covariance=covariance, output="distribution")(x)
    assert float(y.mean.mean()) == pytest.approx(float(drawn.mean()), rel=0.01) and float(y.mean.max()) <= 1
    if covariance == "calibrated":
        assert float(y.var.mean() / drawn.var(0).mean()) == pytest.approx(1, abs=0.35)


def test_a_variance_that_overflows_is_told():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(2, 4)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return torch.exp(40 * self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()))

    with pytest.warns(
        UserWarning, match=r"the variance of Exponential's reconstruction overflows: L_c is inf\. rvconvert\.verify"
    ):
        rvconvert.convert(Exponential())(torch.rand(3, 4))
