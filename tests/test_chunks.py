"""Paths in chunks give what paths in one tensor give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rvconvert
from rvconvert.core.random_variable import Settings
from rvconvert.covariance import chunks
from rvconvert.covariance.lowrank import cubature_normal
from rvconvert.covariance.sampled import antithetic_normal

named = pytest.mark.parametrize
NORMS = [nn.BatchNorm2d, nn.InstanceNorm2d]


def latent(covariance: str, mean, std):
    source, options = (antithetic_normal, {"pairs": 4}) if covariance == "sampled" else (cubature_normal, {})
    return mean + source(torch.zeros_like(mean), Settings(covariance=covariance, seed=0, **options)) * std


def decoder(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), norm(6, affine=True), nn.SiLU(),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), norm(4), nn.LeakyReLU(), nn.Conv2d(4, 1, 3, padding=1),
    )  # fmt: skip


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [(0.3 + torch.rand(5, 6, generator=generator)).requires_grad_() for _ in range(2)]


def step(norm, covariance, training):
    """In how many chunks the result is; its moments, all gradients and the norms' buffers."""
    model, (mean, std) = decoder(norm).train(training), inputs()
    y = model(latent(covariance, mean, std))
    (y.mean.square().sum() + y.var.sum()).backward()
    gradients = [x.grad for x in (mean, std, *model.parameters())]
    return len(y.chunks), [y.mean.detach(), y.var.detach(), *gradients, *model.buffers()]


@named("training", [True, False])
@named("covariance", ["sampled", "lowrank"])
@named("norm", NORMS)
def test_a_step_is_the_same(norm, covariance, training, monkeypatch):
    count, expected = step(norm, covariance, training)
    assert count == 1
    monkeypatch.setattr(chunks, "_CHUNK", 1 << 11)
    count, found = step(norm, covariance, training)
    assert count > 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_along_paths_and_of_gradients(monkeypatch):
    def run():
        model, (mean, std) = decoder().train(), inputs()
        z = latent("sampled", mean, std)
        hidden = model[:5](z)
        y = model[5:](hidden)
        along = torch.autograd.grad(y.square().sum(), hidden, retain_graph=True)[0].paths
        (first,) = torch.autograd.grad(y.mean.square().sum() + y.var.sum(), mean, create_graph=True)
        return [along, first, *torch.autograd.grad(first.square().sum(), [std, model[2].weight])]

    expected = run()
    monkeypatch.setattr(chunks, "_CHUNK", 1 << 11)
    torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)


def test_a_shape_that_differs_between_chunks_is_refused(monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK", 64)
    mean, std = inputs()
    x = latent("sampled", mean.detach(), std.detach())
    with pytest.raises(rvconvert.ConversionError, match=r"torch\.where"):
        x[x > 0.9]


def test_chunks_are_cut_alike_and_no_finer_than_need_be(monkeypatch):
    monkeypatch.setattr(chunks, "_CHUNK", 64)
    small, large = torch.arange(8.0).view(8, 1), torch.arange(64.0).view(8, 8)
    assert [len(each) for each in chunks.alike([(small,)])] == [1]
    cut = chunks.alike([(small,), tuple(large.split(4))])
    assert [[len(x) for x in each] for each in cut] == [[2] * 4] * 2
    assert all(torch.equal(torch.cat(each), whole) for each, whole in zip(cut, (small, large), strict=True))
    assert [len(x) for x in chunks.alike([tuple(small.split(1))])[0]] == [8]


@pytest.mark.parametrize("batch", [20, 48])
def test_paths_that_do_not_divide_evenly_are_trained_on(batch: int) -> None:
    """Of a decoder with BatchNorm."""

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.up = nn.Linear(256, 16), nn.Linear(8, 16 * 256)
            self.decoder = nn.Sequential(nn.Unflatten(1, (16, 16, 16)), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 1, 3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
            return self.decoder(self.up(mu + torch.randn_like(mu) * (0.5 * logvar).exp()))

    rv = rvconvert.convert(VAE(), covariance="lowrank")
    rv(torch.rand(batch, 1, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in rv.parameters())
