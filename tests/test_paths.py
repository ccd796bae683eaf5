"""Modes that run plain functions on paths: what has no rule, or no moments, works there all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rvconvert
from rvconvert import ConversionError, RandomVariable
from rvconvert.core.random_variable import Settings
from rvconvert.core.registry import REGISTRY
from tests.drawn import with_draws

BATCH, LATENT = 3, 4
LENGTHS = torch.tensor([5, 3, 4])
MASK = torch.tensor([True, False, True])


@torch.library.custom_op("rvconvert_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@cube.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _cube_backward(ctx: Any, grad: Tensor) -> Tensor:
    return 3 * ctx.saved_tensors[0].square() * grad


cube.register_autograd(_cube_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


class Nets:
    def __init__(self) -> None:
        self.first, self.second = nn.Linear(LATENT, 8), nn.Linear(8, LATENT)
        self.gru = nn.GRU(LATENT, 6, batch_first=True)

    def packed(self, z):
        steps = z.unsqueeze(1).expand(-1, 5, -1)
        packed = pack_padded_sequence(steps, LENGTHS, batch_first=True, enforce_sorted=False)
        padded, lengths = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        assert lengths.tolist() == LENGTHS.tolist()
        return padded

    def fourier(self, z):
        f = torch.fft.fft(self.first(z))
        return f.real - f.imag

    def spectrum(self, z):
        return torch.fft.rfft(self.first(z)).abs()

    def complex_view(self, z):
        return torch.view_as_real(torch.view_as_complex(z.unflatten(1, (2, 2)).contiguous()) * (1 + 2j))

    def filtered(self, z):
        return torch.fft.irfft(torch.fft.rfft(self.first(z)) * 2j)

    def custom(self, z):
        return cube(self.first(z))

    def packet(self, z):
        return torch.ops.rvconvert_tests.cube(self.first(z))

    def hamiltonian(self, z):
        energy = 0.5 * (self.first(z) - 1).pow(2).sum() + 0.5 * z.pow(2).sum()
        return self.first(z - 0.1 * torch.autograd.grad(energy, z, create_graph=True)[0])

    def langevin(self, z):
        z = z.detach().requires_grad_()
        energy = 0.5 * (self.first(z) - 1).pow(2).sum(1)
        (slope,) = torch.autograd.grad(energy, [z], torch.ones(BATCH), create_graph=True)
        return self.first(z - 0.1 * slope)

    def masked(self, z):
        return torch.index_put(torch.zeros(BATCH, 8), (MASK,), self.first(z[MASK]))


NAMES = [name for name in vars(Nets) if not name.startswith("_")]


def posterior(net: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda mean, std: net(mean + std * torch.randn_like(mean))


def moments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(BATCH, LATENT, generator=generator)
    return mean.requires_grad_(), 0.3 + 0.4 * torch.rand(BATCH, LATENT, generator=generator)


@pytest.mark.parametrize("mode", ["sampled", "lowrank"])
@pytest.mark.parametrize("name", NAMES)
def test_against_monte_carlo(name, mode):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = posterior(getattr(Nets(), name))
        mean, std = moments()
        draws = torch.stack([net(mean, std).detach() for _ in range(1200)])
        y = with_draws(net, mean, std, settings=Settings(covariance=mode, pairs=256))
    ratio = float(y.var.sum() / draws.var(0).sum())
    assert 0.85 < ratio < 1.15, ratio
    off = (y.mean - draws.mean(0)).abs() / draws.var(0).sqrt().clamp(min=1e-3)
    assert float(off.max()) < 0.25
    (gradient,) = torch.autograd.grad(y.mean.sum() + y.var.sum(), mean, allow_unused=True)
    assert gradient is None or gradient.isfinite().all()
    assert gradient is not None or name == "langevin"  # which has none in the plain model either


@pytest.mark.parametrize("name", ["hamiltonian", "langevin"])
def test_a_gradient_inside_the_model_has_no_moments_and_the_refusal_names_the_mode_that_takes_it(name):
    with pytest.raises(ConversionError, match='covariance="sampled"') as caught:
        with_draws(posterior(getattr(Nets(), name)), *moments())
    assert "@rvconvert.rule" not in str(caught.value)


def test_what_a_library_adds_to_torch_is_not_linearised_to_a_variance_of_zero():
    x = RandomVariable(torch.randn(3, 4), torch.ones(3, 4))
    for call in (cube, torch.ops.rvconvert_tests.cube):
        with pytest.raises(ConversionError, match=r"@rvconvert.rule\(torch.ops.rvconvert_tests.cube"):
            call(x)
    own = REGISTRY.overlay()

    @rvconvert.rule(torch.ops.rvconvert_tests.cube.default, registry=own)
    def my_rule(x):
        return RandomVariable(x.mean**3, 9 * x.mean**4 * x.var)

    x._settings = Settings(registry=own)
    assert torch.equal(cube(x).mean, x.mean**3)


@pytest.mark.parametrize("mode", ["sampled", "lowrank"])
def test_a_shape_that_depends_on_a_random_value_is_refused_in_one_sentence(mode):
    def chosen(mean):
        z = mean + torch.randn_like(mean)
        return z[torch.where(z[:, 0] > 0)[0]]

    with pytest.raises(ConversionError, match="shape depends on a random value") as caught:
        with_draws(chosen, torch.zeros(65, 2), settings=Settings(covariance=mode))  # odd: a pair never agrees
    assert len(str(caught.value).splitlines()) == 1


# ---- a codebook -------------------------------------------------------------------------------------------------------


def quantised(mean, codebook):
    z = mean + 0.3 * torch.randn_like(mean)
    distance = (z.unsqueeze(1) - codebook).square().sum(-1)
    code = F.embedding(distance.argmin(1), codebook)
    return z + (code - z).detach()


def test_a_codebook_is_read_at_the_mean_and_strict_refuses():
    generator = torch.Generator().manual_seed(1)
    codebook, mean = torch.randn(5, 2, generator=generator), torch.randn(6, 2, generator=generator)
    nearest = codebook[torch.cdist(mean, codebook).argmin(1)]
    y = with_draws(quantised, mean, codebook)
    torch.testing.assert_close(y.mean, nearest)
    assert next(r for r in REGISTRY if r.name == "argmin").exactness is rvconvert.core.registry.Exactness.APPROXIMATE
    with pytest.raises(ConversionError, match="strict=True"):
        with_draws(quantised, mean, codebook, settings=Settings(strict=True))


@pytest.mark.parametrize("mode", ["sampled", "lowrank"])
def test_a_codebook_is_read_on_each_path(mode):
    generator = torch.Generator().manual_seed(1)
    codebook, mean = torch.randn(5, 2, generator=generator), torch.randn(6, 2, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([quantised(mean, codebook) for _ in range(3000)])
        y = with_draws(quantised, mean, codebook, settings=Settings(covariance=mode, pairs=64, rank=64, strict=True))
    assert float(y.var.sum() / draws.var(0).sum()) == pytest.approx(1, abs=0.15)


# ---- functions of autograd --------------------------------------------------------------------------------------------


class Reversed(torch.autograd.Function):
    """The identity whose gradient is turned round, as domain-adversarial models have it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Halves(torch.autograd.Function):
    """Two results and an index, of one argument and a number."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.tanh(x), scale * x.flip(1), x.argmax(1)

    @staticmethod
    def backward(ctx, first, second, index):
        (x,) = ctx.saved_tensors
        return first * (1 - torch.tanh(x) ** 2) + ctx.scale * second.flip(1), None


class Heads(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.function = nn.Linear(6, 4), nn.Linear(2, 6), function

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return self.function(self.decoder(z))


def test_a_reversed_gradient_keeps_both_moments_and_is_reversed():
    x = torch.rand(5, 6)
    results = {}
    for function in (Reversed.apply, lambda y: y):
        rv = rvconvert.convert(Heads(function), example_inputs=x, output="distribution")
        y = rv(x)
        (y.mean.sum() + y.var.sum()).backward()
        results[function] = y, rv.decoder.weight.grad
    (y, grad), (expected, forward) = results.values()
    torch.testing.assert_close(y.mean, expected.mean)
    torch.testing.assert_close(y.var, expected.var)
    torch.testing.assert_close(grad, -forward, rtol=1e-4, atol=1e-5)


def test_a_function_of_autograd_is_taken_on_nodes_and_strict_refuses():
    x = torch.rand(5, 6)
    rv = rvconvert.convert(Heads(lambda y: Halves.apply(y, 2.0)), example_inputs=x, output="distribution")
    plain = rvconvert.convert(Heads(lambda y: (torch.tanh(y), 2 * y.flip(1))), example_inputs=x, output="distribution")
    tanh, flipped, index = rv(x)
    assert index.dtype == torch.int64
    for got, expected in zip((tanh, flipped), plain(x), strict=True):
        torch.testing.assert_close(got.mean, expected.mean, rtol=0.02, atol=0.02)
        assert float(got.var.sum() / expected.var.sum()) == pytest.approx(1, abs=0.1)
    report = rvconvert.plan(Heads(Reversed.apply), example_inputs=x)
    assert {row.rule for row in report if row.operation == "Reversed"} == {"nodes"}
    with pytest.raises(ConversionError, match=r"(?s)(?s)Reversed.*nothing to look into"):
        rvconvert.convert(Heads(Reversed.apply), example_inputs=x, strict=True)
