"""Low-rank covariance: cubature over the latents, held against exact moments and against trained decoders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from rvconvert import RandomVariable
from rvconvert.core.random_variable import Settings
from rvconvert.covariance.lowrank import LowRankVariable, cubature_normal, whole_frames
from rvconvert.rules.noise import nth_source

LATENT = 5


def latent(mean: Tensor, std: Tensor, rank: int | None = None, seed: int | None = None, source: int = 0) -> LowRankVariable:
    settings = nth_source(Settings(covariance="lowrank", rank=rank, seed=seed), source)
    return mean + cubature_normal(torch.zeros_like(mean), settings) * std


@pytest.fixture
def moments():
    torch.manual_seed(0)
    return torch.randn(3, LATENT).double(), 0.2 + torch.rand(3, LATENT).double()


def test_a_linear_network_is_exact(moments):
    mean, std = moments
    network = nn.Sequential(
        nn.Linear(LATENT, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), nn.BatchNorm2d(3),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2), nn.PixelShuffle(2),
        nn.Flatten(), nn.Linear(64, 7),
    ).double().eval()  # fmt: skip
    jacobian = torch.func.jacrev(lambda z: network(z[None])[0])(mean[0])
    for rank in (None, LATENT):
        y = network(latent(mean, std, rank))
        assert torch.allclose(y.mean, network(mean))
        assert torch.allclose(y.factors, torch.einsum("ok,bk->kbo", jacobian, std))
        assert y.unexplained.abs().max() < 1e-20
        assert torch.allclose(y.var, torch.einsum("ok,bk->bo", jacobian.square(), std.square()))


def test_means_of_cubics_are_exact_and_rows_and_remainder_make_the_variance(moments):
    mean, std = moments
    weight = torch.randn(4, LATENT).double()

    def cubic(z):
        x = z @ weight.T
        return x**3 - 2 * x**2 + x[:, :1] * x

    for rank in (None, LATENT):
        y = cubic(latent(mean, std, rank))
        total, v = mean @ weight.T, std.square() @ weight.square().T
        with_first = std.square() @ (weight[:1] * weight).T
        expected = total**3 + 3 * total * v - 2 * (total**2 + v) + total[:, :1] * total + with_first
        assert torch.allclose(y.mean, expected)
        assert torch.allclose(y.factors.square().sum(0) + y.unexplained, y.var)
        assert (y.unexplained > 0).all() and y.factors.shape == (LATENT, 3, 4)


def test_whole_frames_have_unit_second_moments_and_the_radii_of_the_normal_law():
    kind = (0, torch.float64, torch.device("cpu"))
    for count, k in ((1, 1), (16, 1), (8, 2), (2, 8), (1, 32)):
        nodes = whole_frames(count, k, *kind)
        assert torch.allclose(nodes.T @ nodes / len(nodes), torch.eye(k).double())
    fourth = whole_frames(64, 2, *kind).square().sum(1).square().mean()
    assert fourth == pytest.approx(8, rel=0.15)  # k (k + 2)


@pytest.mark.parametrize("rank", [None, 3])
def test_directions_are_enough_on_average(rank):
    z = latent(torch.zeros(4000, LATENT), torch.ones(4000, LATENT), rank, seed=0)
    weight = torch.rand(LATENT, 2)
    assert torch.allclose((z @ weight).var.mean(0), weight.square().sum(0), rtol=0.03)
    assert z.factors.shape[0] == rank or LATENT
    assert torch.allclose(latent(torch.zeros(4000, LATENT), torch.ones(4000, LATENT), rank, seed=0).paths, z.paths)


def test_sources_are_independent_however_they_meet(moments):
    mean, std = moments
    a, b, c, d = (latent(mean, std, source=i) for i in range(4))
    wide = latent(torch.randn(3, 24).double(), torch.ones(3, 24).double(), source=4)
    weight, wider = torch.rand(LATENT, 4).double(), torch.rand(24, 4).double()
    x, y, u, v = (each @ weight for each in (a, b, c, d))
    assert torch.allclose((x + y).var, 2 * x.var)
    assert torch.allclose((x - 2 * (x + y)).var, 5 * x.var)  # one that has met another meets it again
    assert torch.allclose((x + y - y).var, x.var)
    assert torch.allclose(((x + y) - (u + v) + y).var, 7 * x.var)  # two that have met meet two others
    assert (x - x).var.abs().max() == 0
    x, y = latent(mean, std, source=0) @ weight, wide @ wider  # other numbers of nodes
    assert torch.allclose((x + y).var.mean(), (x.var + y.var).mean(), rtol=0.25)
    joint = latent(mean, std, rank=4, seed=0) + latent(mean, std, rank=4, seed=9)
    assert joint.paths.shape[0] == 8 and joint.factors.shape[0] == 4  # rank bounds all sources together


def test_two_random_inputs_with_one_seed_are_independent():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    z = RandomVariable(torch.zeros(500, 3), torch.ones(500, 3))
    for options in ({"covariance": "lowrank"}, {"covariance": "lowrank", "rank": 2}, {"covariance": "sampled", "pairs": 4}):
        rv = rvconvert.convert(Sum(), random_inputs=("a", "b"), output="distribution", seed=0, **options)
        assert float(rv(z, z).var.mean()) == pytest.approx(2, abs=0.25)


def test_a_sample_does_not_depend_on_its_batch(moments):
    mean, std = moments
    network = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh()).double()
    whole, alone = network(latent(mean, std)), network(latent(mean[1:2], std[1:2]))
    assert torch.allclose(whole.var[1:2], alone.var) and torch.allclose(whole.factors[:, 1:2], alone.factors)
    unbatched = network(latent(mean[1], std[1]))
    assert unbatched.shape == (8,) and torch.allclose(unbatched.var, alone.var[0])


def test_coherent_samples_have_the_covariance_of_the_rows(moments):
    mean, std = (x.float() for x in moments)
    y = torch.tanh(nn.Linear(LATENT, 4)(latent(mean, std)))
    draws = y.sample(100_000).detach()
    assert torch.allclose(draws.mean(0), y.mean, atol=0.01)
    for i in range(3):
        rows = y.factors[:, i]
        expected = rows.T @ rows + torch.diag(y.unexplained[i])
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


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 2 * LATENT), Decoder()

    def forward(self, x):
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decoder(z), mu, logvar


def test_penalty_has_the_gradient_of_finite_differences():
    torch.manual_seed(2)
    rv = rvconvert.convert(Decoder().double(), random_inputs=("z",), covariance="lowrank", output="distribution")
    mean = torch.randn(6, LATENT).double().requires_grad_()
    var = (0.1 + torch.rand(6, LATENT).double()).requires_grad_()

    def penalty() -> Tensor:
        return rvconvert.variance_penalty(rv(RandomVariable(mean, var)), weight=50.0)

    parameters = [mean, var, rv.first.weight, rv.rest[0].weight, rv.rest[3].weight, rv.rest[6].weight]
    gradients = torch.autograd.grad(penalty(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction, step = torch.randn_like(parameter), 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = penalty()
            parameter -= 2 * step * direction
            below = penalty()
            parameter += step * direction
        assert math.isclose(float((gradient * direction).sum()), float((above - below) / (2 * step)), rel_tol=1e-4, abs_tol=1e-7)


def test_converted_vae_leaves_means_and_attaches_the_full_variance():
    torch.manual_seed(3)
    vae, x = VAE(), torch.rand(6, 1, 4, 4)
    out, _, _ = (rv := rvconvert.convert(vae, covariance="lowrank"))(x)
    y, _, _ = (explicit := rvconvert.convert(vae, covariance="lowrank", output="distribution"))(x)
    assert isinstance(y, LowRankVariable) and torch.allclose(out, y.mean, atol=1e-6)
    F.mse_loss(out, x).backward()
    (F.mse_loss(y.mean, x) + rvconvert.variance_penalty(y)).backward()
    assert torch.allclose(rv.last_penalty, rvconvert.variance_penalty(y), rtol=1e-4)
    for a, b in zip(rv.parameters(), explicit.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_a_compiled_model_is_one_graph():
    torch.manual_seed(3)
    x = torch.rand(6, 1, 4, 4)
    vae = VAE()
    vae.decoder = nn.Sequential(nn.Linear(LATENT, 16), nn.BatchNorm1d(16), nn.LeakyReLU(), nn.Linear(16, 16), nn.Sigmoid())
    rv = rvconvert.convert(vae, covariance="lowrank", example_inputs=x).eval()
    with torch.inference_mode():
        rv(x)  # the frames that it keeps must not be of inference mode
    expected = rv(x)[0]
    expected.sum().backward()
    assert torch.allclose(torch.compile(rv, fullgraph=True, backend="eager")(x)[0], expected, atol=1e-5)


def test_a_model_without_rules_and_a_saved_one_give_the_same(tmp_path):
    class Sorted(VAE):
        def forward(self, x):
            out, mu, logvar = super().forward(x)
            return out.sort(-1).values, mu, logvar

    torch.manual_seed(3)
    x = torch.rand(6, 1, 4, 4)
    rv = rvconvert.convert(Sorted(), covariance="lowrank", strict=True, example_inputs=x).eval()
    path = tmp_path / "rv.pt"
    rvconvert.save(rv, path)
    again = rvconvert.load(path, model=Sorted()).eval()
    assert torch.equal(rv(x)[0], again(x)[0])


DECODERS = {
    "transposed convolutions": lambda k: nn.Sequential(
        nn.Linear(k, 128), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), nn.LeakyReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid(),
    ),
    "linear layers": lambda k: nn.Sequential(
        nn.Linear(k, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))
    ),
    "upsampling": lambda k: nn.Sequential(
        nn.Linear(k, 128), nn.Unflatten(1, (8, 4, 4)), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1),
        nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1), nn.Sigmoid(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_trained_decoders_have_the_variance_and_the_mean_of_monte_carlo(name):
    from sklearn.datasets import load_digits

    torch.manual_seed(5)
    images, k = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16, 6
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2 * k))
    decoder = DECODERS[name](k)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 3e-3)
    for step in range(400):
        x = images[torch.randint(0, len(images), (64,), generator=torch.Generator().manual_seed(step))]
        mu, logvar = encoder(x).chunk(2, 1)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()
        loss = F.mse_loss(decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)), x) + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder.eval()
    rv = rvconvert.convert(decoder, random_inputs=("input",), covariance="lowrank", output="distribution").eval()
    few = rvconvert.convert(decoder, random_inputs=("input",), covariance="lowrank", rank=4, seed=0, output="distribution").eval()
    with torch.no_grad():
        mu, logvar = encoder(images[:16]).chunk(2, 1)
        for std, tolerance in ((torch.exp(0.5 * logvar), 0.1), (torch.full_like(mu, 0.3), 0.1), (torch.ones_like(mu), 0.25)):
            e = torch.randn(1500, 16, k)
            pairs = torch.stack([decoder((mu + sign * std * e).flatten(0, 1)).unflatten(0, (1500, 16)) for sign in (1, -1)])
            mean, total = pairs.mean((0, 1)), pairs.flatten(0, 1).var(0).sum()
            y = rv(RandomVariable(mu, std.square()))
            assert float(y.var.sum() / total) == pytest.approx(1, abs=tolerance)
            assert float(few(RandomVariable(mu, std.square())).var.sum() / total) == pytest.approx(1, abs=2 * tolerance)
            assert (y.mean - mean).norm() < 0.2 * (decoder(mu) - mean).norm()


def test_marginals_far_from_gaussian_are_no_obstacle():
    """Why nodes: three latents, rectified and squashed, at a deviation of 1."""
    torch.manual_seed(6)
    network = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16), nn.Sigmoid())
    with torch.no_grad():
        for layer, bias in ((network[0], -1.0), (network[2], -1.0), (network[4], -5.0)):
            layer.weight.mul_(2)
            layer.weight.abs_()
            layer.bias.fill_(bias)
        truth = network(torch.randn(200_000, 3)).var(0).sum()
        z = RandomVariable(torch.zeros(1, 3), torch.ones(1, 3))
        rv = rvconvert.convert(network, random_inputs=("input",), covariance="lowrank", output="distribution")
        assert float(rv(z).var.sum() / truth) == pytest.approx(1, abs=0.25)


# ---- rows of a batch that meet ---------------------------------------------------------------------------------------


def _meeting_nets(batch: int) -> dict[str, object]:
    adjacency = (torch.rand(batch, batch) < 0.3).float()
    adjacency = adjacency / adjacency.sum(1, keepdim=True).clamp(min=1)
    first, second = nn.Linear(LATENT, 16).requires_grad_(False), nn.Linear(16, 5).requires_grad_(False)
    causal = torch.ones(batch, batch, dtype=torch.bool).triu(1)
    attention = nn.MultiheadAttention(LATENT, 1, batch_first=True).requires_grad_(False).eval()
    return {
        "graph": lambda z: second(F.relu(adjacency @ first(z))),
        "inner products": lambda z: torch.sigmoid(z @ z.t()),
        "pairs": lambda z: (z[:, None] - z[None]).square().sum(-1),
        "attention": lambda z: second(F.relu(first(F.scaled_dot_product_attention(z[None], z[None], z[None])[0]))),
        "layer of attention": lambda z: attention(z[None], z[None], z[None])[0][0],
        "set": lambda z: second(F.relu(first(z - torch.mean(z, 0, keepdim=True)))),
        "mask": lambda z: torch.where((z > 0).bool(), z, torch.mean(z, 0)),
        "mask of a mask": lambda z: torch.where((z > 0).bool().any(0), z, torch.mean(z, 0)),
        "attention by hand": lambda z: second(F.relu(first(torch.softmax((z @ z.t()).masked_fill(causal, -torch.inf), 1) @ z))),
        "pooled": lambda z: second(torch.mean(F.relu(first(z)), 0)),
    }


@pytest.mark.parametrize("name", list(_meeting_nets(1)))
def test_rows_that_meet_get_nodes_of_their_own(name):
    torch.manual_seed(0)
    batch = 24
    net = _meeting_nets(batch)[name]
    mean, std = torch.randn(batch, LATENT), 0.3 + 0.4 * torch.rand(batch, LATENT)
    draws = torch.stack([net(mean + std * torch.randn_like(mean)) for _ in range(1500)])
    y = net(latent(mean, std))
    assert float(y.var.sum() / draws.var(0).sum()) == pytest.approx(1, abs=0.2)  # 1/24 to 10 with one noise for all
    assert y.mean.shape == draws.shape[1:]


def test_rows_that_do_not_meet_keep_common_nodes():
    torch.manual_seed(0)
    z = latent(torch.randn(6, LATENT), torch.ones(6, LATENT))
    nets = (
        nn.Sequential(nn.Linear(LATENT, 16), nn.Unflatten(1, (4, 2, 2)), nn.ConvTranspose2d(4, 3, 3), nn.BatchNorm2d(3)),
        lambda z: F.scaled_dot_product_attention(*(z.unflatten(1, (LATENT, 1)),) * 3).flatten(1).cumsum(1),
        lambda z: nn.GRU(LATENT, 7)(z.expand(3, 6, LATENT))[0].permute(1, 0, 2).softmax(-1),
        lambda z: torch.cat((z, z.sort(-1).values), 1).view(12, LATENT).norm(dim=-1),
        lambda z: torch.softmax(z.masked_fill(torch.arange(LATENT) > 1, -torch.inf), 1).cumsum(1),
    )
    for net in nets:
        assert net(z)._nodes is not None


def test_tensors_own_remainder_is_not_hidden():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return torch.cos(self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()) % 6.28)

    x = torch.rand(4, 6)
    model = rvconvert.convert(Folded(), covariance="lowrank")
    model(x).sum().backward()
    assert float(model.last_penalty) > 0
