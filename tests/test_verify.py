"""``verify``: propagated moments against Monte Carlo, and the line that says where they are lost."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import rvconvert
from rvconvert import ConversionError, RandomVariable
from rvconvert.verify import output_variances, truth_ratio, verify


class VAE(nn.Module):
    """Its decoder adds up features that one latent drives together, where independence loses their variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(16, 6)
        self.first, self.second = nn.Linear(3, 64), nn.Linear(64, 16)
        self.norm, self.dropout = nn.BatchNorm1d(64), nn.Dropout(0.5)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 0.0, 0.0]]).expand(64, 3))
            self.second.weight.copy_(torch.full((16, 64), 1 / 64))

    def decode(self, z):
        return torch.sigmoid(self.second(self.dropout(self.norm(self.first(z)))))

    def forward(self, x):
        mu, logvar = self.encoder(x.flatten(1)).chunk(2, 1)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decode(z), mu, logvar


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE()


def test_rows_hold_truth_and_rule_apart(vae):
    x = torch.rand(12, 1, 4, 4)
    rv = rvconvert.convert(vae)
    result = verify(rv, x, samples=600)
    rows = {row.module or row.operation: row for row in result}
    second = rows["second"]
    assert abs(rows["first"].ratio["independent"] - 1) < 5 * rows["first"].standard_error
    assert second.ratio["independent"] == pytest.approx(1 / 64, rel=0.1)
    assert second.ratio["lowrank"] == pytest.approx(1, abs=5 * second.standard_error)
    assert second.local_ratio == pytest.approx(1, abs=0.05) and second.holds
    assert not result.broken
    worst, row = result.ranked("independent")[0]
    assert row.module == "second" and worst == pytest.approx(1 / 64, rel=0.15)
    line = result.summary("independent")
    assert "second Linear" in line and "test_verify.py" in line
    assert "lost" not in result.summary("lowrank")
    assert result.ratio("lowrank") == pytest.approx(1, abs=0.1)
    assert [row.operation for row in result.outputs] == ["torch.sigmoid"]
    for row in result:
        assert row.shift["lowrank"] < 4 / 600**0.5 + 0.05


def test_truth_is_that_of_the_plain_model_and_its_error_is_honest(vae):
    x = torch.rand(12, 1, 4, 4)
    result = verify(rvconvert.convert(vae), x, samples=400, modes=("lowrank",))
    vae.eval()
    with torch.no_grad():
        true = torch.stack([vae(x)[0] for _ in range(4000)]).double().var(0).sum()
    row = result.outputs[-1]
    assert abs(row.true_var / true - 1) < 5 * row.standard_error
    assert 0.005 < row.standard_error < 0.1


def test_the_model_is_left_as_it_was(vae):
    rv = rvconvert.convert(vae).train()
    rv.norm.eval()
    x = torch.rand(12, 1, 4, 4)
    state, random = {k: v.clone() for k, v in rv.state_dict().items()}, torch.get_rng_state()
    verify(rv, x, samples=5)
    with pytest.warns(UserWarning, match="true output variance"):
        truth_ratio(rv, x, pairs=4)
    assert rv.training and not rv.norm.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in rv.state_dict().items())
    assert rv(x)[0].requires_grad


def test_a_wrong_rule_is_found(vae):
    rules = rvconvert.REGISTRY.overlay()

    @rvconvert.rule(torch.sigmoid, exactness="moment_matched", registry=rules)
    def half(input):
        return RandomVariable(torch.sigmoid(input.mean), 0.5 * input.var / 16)

    result = verify(rvconvert.convert(vae, rules=rules), torch.rand(12, 1, 4, 4), samples=20)
    assert [row.operation for row in result.broken] == ["torch.sigmoid"]
    assert "torch.sigmoid in the model itself is not moment_matched here" in str(result)


@pytest.mark.parametrize(("factor", "blamed"), [(4.0, "overstated"), (0.25, "lost")])
def test_summary_blames_what_takes_the_total_from_the_truth(factor, blamed):
    rules = rvconvert.REGISTRY.overlay()

    @rvconvert.rule(torch.sigmoid, registry=rules)
    def wrong(input):
        return RandomVariable(torch.sigmoid(input.mean), factor * input.var / 16)

    class Small(nn.Module):
        def forward(self, z):
            copies = torch.stack((z, z))  # whose mean loses half the variance under independence
            return torch.sigmoid(copies.mean(0) if factor > 1 else copies[0])

    z = RandomVariable(torch.zeros(64, 3), torch.full((64, 3), 0.01))
    line = verify(rvconvert.convert(Small(), random_inputs=("z",), rules=rules), z, samples=200, modes=("independent",))
    assert f"most is {blamed} at torch.sigmoid" in line.summary("independent")


def test_random_inputs_and_other_modes(vae):
    class Decoder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z, scale=1.0):
            return self.inner.decode(z) * scale

    rv = rvconvert.convert(Decoder(vae), random_inputs=("z",), covariance="lowrank", rank=2)
    z = RandomVariable(torch.randn(8, 3), torch.full((8, 3), 0.3))
    result = verify(rv, z, samples=300, modes=("lowrank", "sampled"), scale=2.0)
    assert set(result.rows[-1].ratio) == {"lowrank", "sampled"}
    assert all(row.local_ratio is None for row in result)
    assert result.ratio("lowrank") == pytest.approx(1, abs=0.3)


def test_a_model_that_is_recorded_anew_is_verified_at_its_outputs(vae):
    forward = type(vae).forward
    reading = type("Reading", (type(vae),), {"forward": lambda self, x: forward(self, x * (1 if x.sum() > -1e9 else 2))})
    vae.__class__ = reading
    rv = rvconvert.convert(vae)
    result = verify(rv, torch.rand(12, 1, 4, 4), samples=300)
    assert len(result) == 1 and result.rows[0].output
    assert result.ratio("lowrank") == pytest.approx(1, abs=0.15)
    assert result.ratio("independent") < 0.1


def test_prints_and_dumps(vae):
    result = rvconvert.verify(rvconvert.convert(vae), torch.rand(4, 1, 4, 4), samples=20)
    text, data = str(result), json.loads(json.dumps(result.to_dict()))
    assert "decode" not in text and "second" in text and "20 runs" in text
    assert data["samples"] == 20 and len(data["rows"]) == len(result)
    assert data["summary"]["independent"] == result.summary("independent")


def test_plot(vae, tmp_path):
    result = verify(rvconvert.convert(vae), torch.rand(4, 1, 4, 4), samples=10)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ConversionError, match=r"rvconvert\[plot\]"):
            result.plot(tmp_path / "ratio.png")
        return
    result.plot(tmp_path / "ratio.png")
    assert (tmp_path / "ratio.png").read_bytes().startswith(b"\x89PNG")


def test_truth_ratio_warns_once_and_only_where_most_is_unseen(vae):
    x = torch.rand(12, 1, 4, 4)
    rv = rvconvert.convert(vae)
    with pytest.warns(UserWarning, match="true output variance"):
        ratio = truth_ratio(rv, x)
    assert ratio == pytest.approx(64, rel=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truth_ratio(rv, x)
        assert truth_ratio(rvconvert.convert(vae, covariance="lowrank"), x) == pytest.approx(1, abs=0.2)
        assert truth_ratio(rvconvert.convert(vae, covariance="sampled", pairs=16), x) == pytest.approx(1, abs=0.3)


class Logits(nn.Module):
    """Returns the same reconstruction twice, before its sigmoid and after."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, -1)
        logits = self.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
        return torch.sigmoid(logits), logits, mu, logvar


def test_a_reconstruction_that_leaves_twice_is_measured_once():
    torch.manual_seed(0)
    model, x = Logits(), torch.rand(12, 6)
    found = output_variances(rvconvert.convert(model), x, pairs=64)
    rates = rvconvert.convert(model, output="distribution", attach=False).eval()(x)[0]
    assert found.propagated == pytest.approx(float(rates.var.mean()), rel=1e-5)
    assert found.true == pytest.approx(found.propagated, rel=0.1)  # every rate is of one linear layer


def test_nothing_propagated_is_no_division_by_zero(vae):
    model = rvconvert.convert(vae)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert truth_ratio(model, torch.rand(4, 1, 4, 4)) == 1


def test_plain_models_are_refused(vae):
    with pytest.raises(ConversionError, match="convert"):
        verify(vae, torch.rand(4, 1, 4, 4))
