"""A rule, a loss, a draw and a covariance mode of one's own, added from outside the library and used by a model."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rvconvert
from rvconvert.cli.main import _parser
from rvconvert.core.mode import MODES, Mode
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import REGISTRY, Exactness, FunctionTable
from rvconvert.options import Options
from rvconvert.rules.draws import DRAWS, NORMAL, Draw
from rvconvert.rules.kinds import Collapse, add_rule
from rvconvert.rules.noise import standard_normal


class Linear(nn.Module):
    """A linear decoder: the variance of the reconstruction is W² σ²."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)

    def latent(self, x):
        mu, logvar = self.encoder(x).chunk(2, -1)
        return mu, torch.exp(0.5 * logvar)

    def forward(self, x):
        mu, std = self.latent(x)
        return self.decoder(mu + std * torch.randn_like(std))

    def true_var(self, x):
        return self.latent(x)[1].square() @ self.decoder.weight.square().T


def test_a_rule():
    overlay = REGISTRY.overlay()

    @rvconvert.rule(torch.special.i0, registry=overlay, assumption="a test")
    def i0(x):
        return RandomVariable(x.mean, 9 * x.var)

    class Model(Linear):
        def forward(self, x):
            return torch.special.i0(super().forward(x))

    model, x = Model(), torch.randn(4, 6)
    out = rvconvert.convert(model, rules=overlay, output="distribution")(x)
    torch.testing.assert_close(out.var, 9 * model.true_var(x))


def my_sum(x, axis):
    if torch.overrides.has_torch_function((x,)):
        return torch.overrides.handle_torch_function(my_sum, (x,), x, axis=axis)
    return x.cumsum(axis)


def test_a_function_of_ones_own_keeps_its_names():
    overlay = REGISTRY.overlay()

    @rvconvert.rule(my_sum, registry=overlay)
    def rule_of_my_sum(x, axis):
        return RandomVariable(x.mean.cumsum(axis), x.var.cumsum(axis))

    class Model(Linear):
        def forward(self, x):
            return my_sum(super().forward(x), axis=1)

    model, x = Model(), torch.randn(4, 6)
    out = rvconvert.convert(model, rules=overlay, output="distribution")(x)
    torch.testing.assert_close(out.var, model.true_var(x).cumsum(1))


@pytest.fixture
def own_registry(monkeypatch):
    """What a test registers with the library's own table goes again."""
    overlay = REGISTRY.overlay()
    monkeypatch.setattr("rvconvert.rules.kinds.REGISTRY", overlay)
    return overlay


def my_loss(output, target):
    if torch.overrides.has_torch_function((output, target)):
        return torch.overrides.handle_torch_function(my_loss, (output, target), output, target)
    return (output - target).abs().pow(1.5).mean()


def test_a_loss(own_registry):
    add_rule("my_loss", Collapse(), Exactness.APPROXIMATE, "taken at the mean", functions=[my_loss])

    class Model(Linear):
        def forward(self, x):
            return my_loss(super().forward(x), x)

    model, x = Model(), torch.randn(4, 6)
    converted = rvconvert.convert(model, rules=own_registry)
    loss = converted(x)
    torch.testing.assert_close(loss, my_loss(model.decoder(model.latent(x)[0]), x))
    torch.testing.assert_close(converted.last_penalty, 50 * model.true_var(x).square().mean())


def my_noise(like):
    if torch.overrides.has_torch_function((like,)):
        return torch.overrides.handle_torch_function(my_noise, (like,), like)
    return torch.randn_like(like)


def test_a_draw(monkeypatch):
    own = FunctionTable(dict(DRAWS.items()))
    own[my_noise] = Draw(my_noise, NORMAL, lambda like, settings: 2 * standard_normal(torch.zeros_like(like), settings))
    for module in ("capture.recorder", "plain", "rules.linearize"):
        monkeypatch.setattr(f"rvconvert.{module}.DRAWS", own)

    class Model(Linear):
        def forward(self, x):
            mu, std = self.latent(x)
            return self.decoder(mu + std * my_noise(std))

    model, x = Model(), torch.randn(4, 6)
    out = rvconvert.convert(model, output="distribution")(x)
    torch.testing.assert_close(out.var, 4 * model.true_var(x))


def test_a_covariance_mode(monkeypatch):
    """One that starts every latent at half its variance."""

    def half(zeros, settings):
        return RandomVariable._make(zeros, torch.full_like(zeros, 0.5), settings)

    monkeypatch.setitem(MODES, "half", Mode(half, needs_rules=True))
    model, x = Linear(), torch.randn(4, 6)
    out = rvconvert.convert(model, covariance="half", output="distribution")(x)
    torch.testing.assert_close(out.var, model.true_var(x) / 2)
    with pytest.raises(rvconvert.ConversionError, match="'half'"):
        Options(covariance="quarter")
    assert _parser().parse_args(["convert", "m.py:M", "x.pt", "y.pt", "--covariance", "half"]).covariance == "half"


@pytest.mark.parametrize("field", dataclasses.fields(Options), ids=lambda field: field.name)
def test_an_option_is_declared_once(field):
    """From its field alone: it has help, a check, a place in files, and a flag."""
    assert field.metadata["help"] and field.metadata["check"](field.default) is None
    data = Options().to_dict()
    assert (field.name in data) == field.metadata["in_files"]
    assert Options.from_dict(data) == Options()


def test_functional_losses_are_collapses():
    assert isinstance(REGISTRY.find(F.mse_loss).kind, Collapse)
