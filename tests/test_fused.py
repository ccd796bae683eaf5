"""``fuse=True``: the variance of a stretch of linear maps is that of the whole map, (J*J) v."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from rvconvert import ConversionError, RandomVariable
from rvconvert.core.random_variable import Settings
from rvconvert.covariance import fused
from rvconvert.files import checkpoint
from rvconvert.rules.noise import standard_normal
from tests.models import VanillaVAE

ENGINES = ("graph", "dispatch")


class Decoder(nn.Module):
    """A decoder made of a function of its layers and the latent."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: Any) -> None:
        super().__init__()
        self.steps = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, z: Tensor) -> Tensor:
        return self.steps(self, z)


def dense(decoder: nn.Module, mean: Tensor, var: Tensor) -> Tensor:
    """(J*J) v, sample by sample, from the Jacobian at the mean."""
    return torch.stack(
        [
            torch.einsum("oi,i->o", jacobian.reshape(-1, v.numel()).square(), v.flatten()).reshape(jacobian.shape[: -v.ndim])
            for m, v in zip(mean, var, strict=True)
            for jacobian in [torch.autograd.functional.jacobian(lambda z: decoder(z[None])[0], m, create_graph=True)]
        ]
    )


def latent(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*shape, dtype=torch.float64, generator=generator)
    return mean, torch.rand(*shape, dtype=torch.float64, generator=generator) + 0.1


def propagate(decoder: nn.Module, mean: Tensor, var: Tensor, **options: Any) -> Any:
    options = {"random_inputs": ("z",), "output": "distribution", "fuse": True, "inplace": True, **options}
    return rvconvert.convert(decoder, **options)(RandomVariable(mean, var))


def trained(decoder: nn.Module) -> nn.Module:
    """Weights with a common sign, as training makes them, and statistics of batch norms that are not 0 and 1."""
    torch.manual_seed(7)
    for module in decoder.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for buffer in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                buffer.uniform_(0.5, 1.5)
    return decoder.double().eval()


def upsampled(scale: Any, **convolution: Any) -> Decoder:
    options = {"kernel_size": 3, "padding": 1, **convolution}
    return Decoder(lambda d, z: d.conv(F.interpolate(z, scale_factor=scale)), conv=nn.Conv2d(4, 6, **options))


def linear_decoders() -> dict[str, tuple[Decoder, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "view, transposed, bn": (
            Decoder(
                lambda d, z: d.bn2(d.up2(d.bn(d.up(d.fc(z).view(-1, 4, 2, 2))))),
                fc=nn.Linear(3, 16), up=nn.ConvTranspose2d(4, 5, 3, 2, 1, 1), bn=nn.BatchNorm2d(5),
                up2=nn.ConvTranspose2d(5, 2, 4, 2, 1), bn2=nn.BatchNorm2d(2),
            ),
            (2, 3),
        ),
        "upsample, conv": (
            Decoder(
                lambda d, z: d.conv2(
                    F.interpolate(d.conv(F.interpolate(d.fc(z).view(-1, 2, 2, 2), scale_factor=2)), size=(8, 12))
                ),
                fc=nn.Linear(3, 8), conv=nn.Conv2d(2, 4, 3, padding=1), conv2=nn.Conv2d(4, 3, 5, padding=2),
            ),
            (3, 3),
        ),
        "bilinear upsampling": (
            Decoder(
                lambda d, z: d.conv(F.interpolate(z, scale_factor=2, mode="bilinear")), conv=nn.Conv2d(2, 3, 3, padding=1)
            ),
            (2, 2, 3, 3),
        ),
        "two branches": (
            Decoder(
                lambda d, z: d.c(d.a(z) - 0.5 * d.b(z) + torch.add(z, 1.0, alpha=2.0)), **{n: nn.Linear(4, 4) for n in "abc"}
            ),
            (3, 4),
        ),
        "residual": (
            Decoder(
                lambda d, z: d.b(z + d.bn(d.a(z))),
                a=nn.Conv2d(2, 2, 3, padding=1), bn=nn.BatchNorm2d(2), b=nn.Conv2d(2, 3, 2),
            ),
            (2, 2, 4, 4),
        ),
        "joined, moved": (
            Decoder(
                lambda d, z: (lambda ones: d.b(
                    F.pixel_shuffle(torch.cat((F.pad(d.a(z), (1, 1, 0, 0)), ones), 1).flip(3).transpose(2, 3), 2)
                    [:, 1:, 1:, None].squeeze(3)
                ))(torch.ones(len(z), 4, 3, 5, dtype=torch.float64)),
                a=nn.Conv2d(2, 8, 1), b=nn.Conv2d(2, 2, 3),
            ),
            (2, 2, 3, 3),
        ),
        "pooled, scaled, summed": (
            Decoder(
                lambda d, z: (F.avg_pool1d(d.a(z) / 3, 2, 1).mean(2, keepdim=True) * d.scales - 1).sum(1) @ d.w.weight,
                a=nn.Conv1d(2, 3, 2), scales=nn.Parameter(torch.arange(1.0, 6)), w=nn.Linear(4, 5),
            ),
            (3, 2, 6),
        ),
        "chunks": (
            Decoder(
                lambda d, z: (lambda a, b: d.c(2 * a + b.neg()) + b)(*d.a(z).chunk(2, dim=1)),
                a=nn.Linear(3, 8), c=nn.Linear(4, 4),
            ),
            (2, 3),
        ),
        "joined to itself": (Decoder(lambda d, z: d.c(torch.cat((z, z[:, :2]), -1)), c=nn.Linear(5, 4)), (2, 3)),
        "repeated": (Decoder(lambda d, z: d.c(z.repeat_interleave(2, dim=1)), c=nn.Linear(6, 4)), (2, 3)),
    }  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", linear_decoders())
def test_variance_is_that_of_the_whole_map(name: str, engine: str):
    decoder, shape = linear_decoders()[name]
    trained(decoder)
    mean, var = latent(*shape)
    y = propagate(decoder, mean, var, engine=engine)
    torch.testing.assert_close(y.mean, decoder(mean), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.var, dense(decoder, mean, var), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(propagate(decoder, mean, var, fuse=False).var, y.var, rtol=1e-2)


UPSAMPLED = {
    "2": upsampled(2),
    "3, kernel 4": upsampled(3, kernel_size=4, padding=1),
    "unequal": upsampled((2, 3), kernel_size=(3, 5), padding=(0, 2)),
    "kernel 2, more padding than it": upsampled(2, kernel_size=2, padding=2),
    "kernel 1": upsampled(4, kernel_size=1, padding=0),
    "same, even": upsampled(2, kernel_size=4, padding="same"),
    "valid, large": upsampled(3, kernel_size=7, padding="valid"),
    "groups": upsampled(2, groups=2),
    "1d": Decoder(lambda d, z: d.c(F.interpolate(z, scale_factor=3)), c=nn.Conv1d(2, 3, 5, padding=2)),
    "3d": Decoder(lambda d, z: d.c(F.interpolate(z, scale_factor=2)), c=nn.Conv3d(2, 2, 3, padding=1)),
    "module, norm": Decoder(
        lambda d, z: d.c(d.bn(d.up(z))), up=nn.Upsample(scale_factor=2), bn=nn.BatchNorm2d(4), c=nn.Conv2d(4, 2, 3, padding=1)
    ),
    "twice": Decoder(
        lambda d, z: d.c(F.interpolate(F.interpolate(z, scale_factor=2), size=(12, 16), mode="nearest-exact")),
        c=nn.Conv2d(4, 2, 3),
    ),
}


@pytest.mark.parametrize("name", UPSAMPLED)
def test_upsampling_then_convolution_at_any_size(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "MOST_ELEMENTS", 0)  # no history: by phases alone
    decoder = trained(UPSAMPLED[name])
    axes = {"1d": 1, "3d": 3}.get(name, 2)
    mean, var = latent(2, 4 if axes == 2 else 2, *(3, 4, 2)[:axes])
    y = propagate(decoder, mean, var)
    torch.testing.assert_close(y.var, dense(decoder, mean, var), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "body",
    [
        lambda d, z: d.conv(F.interpolate(z, scale_factor=2, mode="bilinear")),
        lambda d, z: d.conv(F.interpolate(z, scale_factor=1.5)),
        lambda d, z: d.strided(F.interpolate(z, scale_factor=2)),
        lambda d, z: d.conv(F.pad(F.interpolate(z, scale_factor=2), (1, 1, 1, 1), mode="reflect")),
        lambda d, z: d.conv(z) + z[:, :, 1:-1, 1:-1],
    ],
)
def test_what_is_not_fused_at_large_sizes_is_as_without(body: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "MOST_ELEMENTS", 0)
    decoder = trained(Decoder(body, conv=nn.Conv2d(2, 2, 3), strided=nn.Conv2d(2, 2, 3, 2)))
    mean, var = latent(2, 2, 4, 4)
    assert torch.equal(propagate(decoder, mean, var).var, propagate(decoder, mean, var, fuse=False).var)


def test_an_activation_between_ends_the_stretch():
    decoder = trained(Decoder(lambda d, z: d.b(torch.relu(d.a(z))), a=nn.Linear(3, 8), b=nn.Linear(8, 4)))
    mean, var = latent(4, 3)
    assert torch.equal(propagate(decoder, mean, var).var, propagate(decoder, mean, var, fuse=False).var)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("train", [False, True])
def test_a_model_without_adjacent_linear_maps_is_as_without(engine: str, train: bool):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Linear(3, 32), nn.ReLU(), nn.Unflatten(1, (8, 2, 2)), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.BatchNorm2d(4),
        nn.LeakyReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Sigmoid(),
    ).double().train(train)  # fmt: skip
    mean, var = latent(3, 3)
    decoder = Decoder(lambda d, z: d.body(z), body=body)
    results = [propagate(copy.deepcopy(decoder), mean, var, fuse=f, engine=engine, inplace=False) for f in (True, False)]
    torch.testing.assert_close(results[0].mean, results[1].mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(results[0].var, results[1].var, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "mix",
    [
        lambda y: y.flip(0),
        lambda y: y.roll(1, 0),
        lambda y: y[[1, 0, 2]],
        lambda y: y.t(),
        lambda y: y.transpose(0, 1).reshape(3, 3),
        lambda y: y.cumsum(0),
        lambda y: y * torch.arange(1.0, 4.0).double().unsqueeze(1),
        lambda y: y[torch.tensor([2, 2, 0])],
        lambda y: y.expand(3, 3, 3)[:, 0],
        lambda y: torch.cat((y[1:], y[:1])),
        lambda y: y.view(1, 3, 3).expand(3, 3, 3).diagonal(dim1=1, dim2=2),
    ],
)
def test_samples_that_change_places_take_their_own_variance(mix: Callable[[Tensor], Tensor]):
    """A history holds for sample i of root and variable alike; where samples are mixed, the variable is a root again."""
    decoder = trained(Decoder(lambda d, z: mix(d.a(z)) @ d.b.weight, a=nn.Linear(2, 3), b=nn.Linear(4, 3)))
    mean, var = latent(3, 2)
    moved = mix(RandomVariable(*(x @ w.T for x, w in ((mean, decoder.a.weight), (var, decoder.a.weight.square())))))
    expected = moved.var @ decoder.b.weight.square()
    torch.testing.assert_close(propagate(decoder, mean, var).var, expected, rtol=1e-12, atol=1e-12)


def test_branches_of_different_roots_are_independent():
    decoder = trained(Decoder(lambda d, z: d.a(z) + d.b(torch.tanh(z)), a=nn.Linear(3, 4), b=nn.Linear(3, 4)))
    mean, var = latent(2, 3)
    assert torch.equal(propagate(decoder, mean, var).var, propagate(decoder, mean, var, fuse=False).var)


def test_writing_in_place_keeps_what_was_there():
    def body(d: Any, z: Tensor) -> Tensor:
        y = d.a(z)
        y += z
        y[:, 0] = 0.0
        return d.b(y).mul_(2)

    decoder = trained(Decoder(body, a=nn.Linear(3, 3), b=nn.Linear(3, 4)))
    mean, var = latent(2, 3)
    first = (decoder.a.weight + torch.eye(3)).square()
    expected = 4 * ((var @ first.T) * torch.tensor([0.0, 1, 1])) @ decoder.b.weight.square().T
    for engine in ENGINES:  # the write makes a root of y
        torch.testing.assert_close(propagate(decoder, mean, var, engine=engine).var, expected)


def test_gradients_are_those_of_the_dense_formula():
    for name in ("view, transposed, bn", "upsample, conv", "residual"):
        decoder, shape = linear_decoders()[name]
        trained(decoder)
        mean, var = (x.requires_grad_() for x in latent(*shape))
        wanted = [p for n, p in decoder.named_parameters() if "bias" not in n] + [var]
        y = propagate(decoder, mean, var)
        weight = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        ours = torch.autograd.grad((y.var * weight).sum(), wanted)
        theirs = torch.autograd.grad((dense(decoder, mean, var) * weight).sum(), wanted)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_by_phases(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "MOST_ELEMENTS", 0)
    decoder = trained(upsampled(2))
    mean, var = latent(1, 4, 2, 3)
    var.requires_grad_()
    wanted = [decoder.conv.weight, var]
    ours = torch.autograd.grad(propagate(decoder, mean, var).var.square().sum(), wanted)
    theirs = torch.autograd.grad(dense(decoder, mean, var).square().sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_no_grad_made_does_not_cut_gradients():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    x = F.linear(standard_normal(torch.zeros(1, 2), Settings(fuse=True)), weight)
    with torch.no_grad():
        F.linear(x, weight)
    y = F.linear(x, weight)
    y.var.sum().backward()
    whole = (weight.detach() @ weight.detach()).requires_grad_()
    whole.square().sum().backward()
    square = whole.grad
    torch.testing.assert_close(weight.grad, weight.detach().T @ square + square @ weight.detach().T)


def test_batch_statistics_take_the_whole_map():
    """In training, a batch norm divides by the spread of means and the mean of the true variances."""
    decoder = trained(Decoder(lambda d, z: d.bn(d.b(d.a(z))), a=nn.Linear(3, 6), b=nn.Linear(6, 4), bn=nn.BatchNorm1d(4))).train()
    mean, var = latent(5, 3)
    y = propagate(decoder, mean, var)
    whole = decoder.b.weight @ decoder.a.weight
    before, before_var = decoder.b(decoder.a(mean)), var @ whole.square().T
    spread = before.var(0, unbiased=False) + before_var.mean(0)
    torch.testing.assert_close(y.var, before_var * decoder.bn.weight.square() / (spread + 1e-5))


@pytest.mark.parametrize("engine", ENGINES)
def test_training_runs_and_the_batch_may_change(engine: str):
    torch.manual_seed(0)
    rv = rvconvert.convert(VanillaVAE(), fuse=True, engine=engine)
    optimizer = torch.optim.Adam(rv.parameters(), 1e-3)
    x = torch.rand(4, 3, 16, 16)
    losses = []
    for step in range(8):
        loss = rv.loss_function(*rv(x[: 4 - step % 2]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert rv.last_penalty > 0
    assert losses[-1] < losses[0]
    assert all(torch.isfinite(p).all() for p in rv.parameters())


def test_a_model_compiles_and_runs_under_autocast():
    decoder, shape = linear_decoders()["residual"]
    trained(decoder).float()
    mean, var = (x.float() for x in latent(*shape))
    y = propagate(decoder, mean, var)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = propagate(decoder, mean, var)
    torch.testing.assert_close(lowered.var, y.var)
    rv = rvconvert.convert(decoder, random_inputs=("z",), output="distribution", fuse=True, inplace=True, example_inputs=(mean,))
    x = RandomVariable(mean, var)
    compiled = torch.compile(lambda m, v: rv(RandomVariable(m, v)).var, backend="eager")
    torch.testing.assert_close(compiled(mean, var), rv(x).var)


def test_copies_and_files_keep_it(tmp_path: Any):
    torch.manual_seed(0)
    plain = VanillaVAE(latent=4)
    rv = rvconvert.convert(plain, fuse=True, output="distribution").eval()
    assert rv.state_dict().keys() == plain.state_dict().keys()
    x = torch.rand(2, 3, 16, 16)
    expected = rv(x)[0].var
    without = rvconvert.convert(plain, output="distribution").eval()(x)[0].var
    assert not torch.allclose(expected, without, rtol=1e-2)
    path = tmp_path / "model.pt"
    checkpoint.save(rv, path, kwargs={"latent": 4})
    for other in (pickle.loads(pickle.dumps(rv)), copy.deepcopy(rv), checkpoint.load(path).eval()):
        torch.testing.assert_close(other(x)[0].var, expected)


@pytest.mark.parametrize("covariance", ["lowrank", "sampled"])
def test_other_modes_refuse_it(covariance: str):
    with pytest.raises(ConversionError, match="fuse=True belongs to covariance='independent'"):
        rvconvert.convert(VanillaVAE(), fuse=True, covariance=covariance)


def test_nearest_upsampling_by_whole_factors_copies_blocks():
    """What the phases assume of torch's own index arithmetic."""
    for factor in range(1, 17):
        for length in (1, 2, 7, 64, 113, 300):
            x = torch.arange(length, dtype=torch.float32).reshape(1, 1, -1)
            for mode in ("nearest", "nearest-exact"):
                for how in ({"scale_factor": factor}, {"size": length * factor}):
                    assert torch.equal(F.interpolate(x, mode=mode, **how), x.repeat_interleave(factor, 2))


def test_a_decoder_after_training_loses_less_variance():
    """A decoder trained to draw blobs, against 4,000 draws; the fused stretch is from the latent to the first activation."""
    torch.manual_seed(0)
    decoder = Decoder(
        lambda d, z: d.out(F.relu(d.up2(F.relu(d.bn(d.up(d.fc(z).view(-1, 16, 4, 4))))))),
        fc=nn.Linear(2, 256), up=nn.ConvTranspose2d(16, 8, 4, 2, 1), bn=nn.BatchNorm2d(8),
        up2=nn.ConvTranspose2d(8, 8, 4, 2, 1), out=nn.Conv2d(8, 1, 3, padding=1),
    )  # fmt: skip
    grid = torch.linspace(-1, 1, 16)
    optimizer = torch.optim.Adam(decoder.parameters(), 3e-3)
    for _ in range(60):
        z = torch.rand(32, 2) * 2 - 1
        target = torch.exp(-8 * ((grid - z[:, :1, None]) ** 2 + (grid[:, None] - z[:, 1:, None]) ** 2)).unsqueeze(1)
        optimizer.zero_grad()
        F.mse_loss(decoder(z), target).backward()
        optimizer.step()
    decoder.eval()
    mean, var = torch.zeros(1, 2), torch.full((1, 2), 0.01)
    with torch.no_grad():
        true = decoder(mean + var.sqrt() * torch.randn(4_000, 2)).var(0).sum()
        ratio = {fuse: (propagate(decoder, mean, var, fuse=fuse).var.sum() / true).item() for fuse in (False, True)}
    print(f"ratio of variances to the truth: independent {ratio[False]:.4f}, fused {ratio[True]:.4f}")
    assert 1.3 * ratio[False] < ratio[True] < 1
