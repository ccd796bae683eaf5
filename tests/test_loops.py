"""What stands around a model in a training loop: files with an optimizer, checkpoints, in-place code, buffers that follow."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rvconvert

MODES = ("independent", "calibrated", "sampled", "lowrank")


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))

    def latent(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return mu + torch.randn_like(mu) * (0.5 * logvar).exp()

    def forward(self, x):
        return self.decoder(self.latent(x))


X = torch.rand(5, 6)


def test_an_optimizer_in_the_same_file_goes_on_with_the_models_parameters():
    model = rvconvert.convert(VAE())
    model.penalty_scale = 0.5
    optimizer = torch.optim.Adam(model.parameters())
    F.mse_loss(model(X), X).backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save({"model": model, "optimizer": optimizer}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded["model"].penalty_scale == 0.5
    for name, parameter in loaded["model"].named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    mine = [p for group in loaded["optimizer"].param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(mine, loaded["model"].parameters(), strict=True))
    assert not any(a is b for a in mine for b in model.parameters())


def test_a_class_of_a_converted_model_called_by_itself_makes_a_plain_one():
    model = rvconvert.convert(VAE())
    with pytest.warns(UserWarning, match="makes a plain VAE"):
        made = type(model)()
    assert type(made) is VAE
    assert made.eval()(X).shape == X.shape
    copied = copy.deepcopy(model)
    copied(X)
    assert copied.last_penalty is not None


def test_the_output_may_be_written_in_place():
    model = rvconvert.convert(VAE())
    y = model(X)
    expected = y.detach().clamp(0, 0.1) - 1
    y.clamp_(0, 0.1).sub_(1)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert model.decoder[0].weight.grad is not None


def test_gains_measured_in_inference_mode_serve_training():
    model = rvconvert.convert(VAE(), covariance="calibrated").eval()
    with torch.inference_mode():
        model(X)
    F.mse_loss(model(X), X).backward()
    assert model.encoder.weight.grad is not None


@pytest.mark.parametrize("mode", MODES)
def test_a_first_call_inside_a_checkpoint_gives_the_gradients_of_any_other(mode):
    found = []
    for around in (lambda model: checkpoint(model, X, use_reentrant=False), lambda model: model(X)):
        model = rvconvert.convert(VAE(), covariance=mode, seed=0)
        torch.manual_seed(1)
        F.mse_loss(around(model), X).backward()
        found.append(model.decoder[0].weight.grad)
    torch.testing.assert_close(*found)


class Following(VAE):
    def __init__(self, follow):
        super().__init__()
        self.register_buffer("centre", torch.zeros(2))
        self.follow = follow

    def forward(self, x):
        z = self.latent(x)
        with torch.no_grad():
            self.follow(self.centre, z.mean(0))
        return self.decoder(z)


FOLLOWING = {
    "mul, add": lambda centre, now: centre.mul_(0.9).add_(0.1 * now),
    "copy": lambda centre, now: centre.copy_(0.9 * centre + 0.1 * now),
    "lerp": lambda centre, now: centre.lerp_(now, 0.1),
    "setitem": lambda centre, now: centre.__setitem__(slice(None), 0.9 * centre + 0.1 * now),
}


@pytest.mark.parametrize("mode", ["independent", "calibrated", "lowrank"])
@pytest.mark.parametrize("way", FOLLOWING)
def test_a_buffer_follows_the_mean_of_the_latent(way, mode):
    model = rvconvert.convert(Following(FOLLOWING[way]), covariance=mode, seed=0)
    expected = torch.zeros(2)
    with torch.no_grad():
        mean = model.encoder(X).chunk(2, 1)[0].mean(0)
    for _ in range(3):
        model(X)
        expected = 0.9 * expected + 0.1 * mean
    torch.testing.assert_close(model.centre, expected, rtol=1e-4, atol=1e-5)


class Normalised(VAE):
    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))


def test_gains_are_renewed_between_two_calls_that_share_a_backward_pass():
    model = rvconvert.convert(Normalised(), covariance="calibrated", recalibrate=1)
    plain = Normalised()
    for each in (model, plain):
        first = each(X)
        (F.mse_loss(first, X) + F.mse_loss(each(X.flip(0)), X)).backward()
    assert model.decoder[1].num_batches_tracked == plain.decoder[1].num_batches_tracked == 2


def test_a_backward_pass_into_far_parameters_alone_has_the_penalty():
    torch.manual_seed(0)
    vae = Deep()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.7)
    x = torch.randn(8, 6)
    found = []
    for penalty in (50.0, 0.0):
        rv_vae = rvconvert.convert(vae, penalty=penalty)
        for inputs in (None, list(rv_vae.encoder.parameters())):
            rv_vae.zero_grad()
            y, *_ = rv_vae(x)
            (y - x).square().mean().backward(inputs=inputs)
            found.append(rv_vae.encoder.weight.grad.clone())
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[3])
    assert (found[0] - found[2]).abs().max() > 0.01


class Deep(nn.Module):
    """Ten layers with parameters between the latent and the output."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        layers = [layer for width in (2, *[5] * 8) for layer in (nn.Linear(width, 5), nn.Tanh())]
        self.decoder = nn.Sequential(*layers, nn.Linear(5, 6))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar
