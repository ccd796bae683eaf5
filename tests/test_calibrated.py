"""covariance="calibrated": gains that make the independent pass report the true variance."""

import copy
import dataclasses
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rvconvert
from rvconvert import RandomVariable
from rvconvert.converted import conversion_of
from rvconvert.covariance.calibrated import Gain, Gains
from rvconvert.verify import output_variances, truth_ratio
from tests.exact import relu_network_moments

IMAGES = torch.rand(192, 12, generator=torch.Generator().manual_seed(1))


class VAE(nn.Module):
    """Upsampling and convolutions without activation between, where independence loses most of the variance."""

    def __init__(self, norm=False):
        super().__init__()
        self.encoder = nn.Linear(12, 6)
        self.first = nn.Linear(3, 16)
        self.up = nn.ConvTranspose1d(4, 8, 4, 2, 1)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.last = nn.Conv1d(8, 2, 3, padding=1)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar - 0.5)
        h = self.norm(F.silu(self.up(self.first(z).view(-1, 4, 4))))
        return torch.sigmoid(self.last(h)).flatten(1)[:, :12], mu


class Smooth(VAE):
    """Its loss has a gradient inside: how much the decoder changes with the posterior's mean."""

    def forward(self, x):
        y, mu = super().forward(x)
        at = mu.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.last(F.silu(self.up(self.first(at).view(-1, 4, 4)))).sum(), at, create_graph=True)
        return y, slope.square().mean()


@pytest.fixture(scope="module")
def trained():
    """A net trained to reconstruct, so that its weights are not random."""
    torch.manual_seed(0)
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(300):
        x = IMAGES[64 * (step % 2) : 64 * (step % 2) + 64]
        loss = F.mse_loss(model(x)[0], x.sort().values) * 20
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def true_moments(model, x, pairs=4000):
    torch.manual_seed(3)
    paths = torch.stack([model(x)[0] for _ in range(pairs)])
    return paths.mean(0), paths.var(0)


def converted(model, **options):
    return rvconvert.convert(model, covariance="calibrated", output="distribution", attach=False, **options).eval()


@torch.no_grad()
def test_reports_the_true_variance_of_samples_it_was_not_calibrated_on(trained):
    held_out = IMAGES[128:]
    _, true = true_moments(trained, held_out, 2000)
    independent = rvconvert.convert(trained, output="distribution", attach=False).eval()(held_out)[0].var
    model = converted(trained)
    report = rvconvert.calibrate(model, IMAGES[:128])
    var = model(held_out)[0].var
    assert not 0.8 < independent.sum() / true.sum() < 1.25
    assert 0.95 < var.sum() / true.sum() < 1.05
    inside = ((var / true > 0.7) & (var / true < 1.4)).float().mean()
    assert inside > 0.9
    assert 0.95 < report.rows[-1].after < 1.05 and report.rows[-1].standard_error < 0.05
    assert report.rows[-1].before == pytest.approx(float(independent.sum() / true.sum()), rel=0.15)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_gains_measured_at_one_posterior_width_serve_half_and_twice_it(trained, scale):
    model = converted(trained)
    rvconvert.calibrate(model, IMAGES[:128])
    wider = copy.deepcopy(trained)
    wider.encoder.bias[3:] += 2 * torch.log(torch.tensor(scale))
    model.load_state_dict(wider.state_dict())
    _, true = true_moments(wider, IMAGES[128:], 2000)
    assert 0.7 < model(IMAGES[128:])[0].var.sum() / true.sum() < 1.4


@torch.no_grad()
def test_a_linear_map_of_independent_latents_has_gain_one():
    torch.manual_seed(0)
    model = rvconvert.convert(nn.Linear(5, 7), covariance="calibrated", random_inputs=("input",), output="distribution").eval()
    z = RandomVariable(torch.randn(64, 5), torch.rand(64, 5) + 0.1)
    (row,) = rvconvert.calibrate(model, (z,), pairs=200)
    assert row.before == pytest.approx(1, abs=4 * row.standard_error + 0.02)
    assert row.gain == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_a_variance_that_is_wrong_by_a_known_factor_is_put_right():
    """The sum of k copies of one variable: true variance k^2 v, independent k v."""
    model = nn.Linear(1, 8, bias=False)
    net = nn.Sequential(model, nn.Linear(8, 1, bias=False))
    model.weight.fill_(0.5)
    net[1].weight.fill_(1.0)
    rv = rvconvert.convert(net, covariance="calibrated", random_inputs=("input",), output="distribution").eval()
    z = RandomVariable(torch.randn(64, 1), torch.rand(64, 1) + 0.1)
    first, second = rvconvert.calibrate(rv, (z,), pairs=100)
    assert first.gain == pytest.approx(1, abs=0.1)
    assert second.gain == pytest.approx(8, rel=0.02)
    assert second.before == pytest.approx(1 / 8, rel=0.1)
    torch.testing.assert_close(rv(z).var, 16 * z.var, rtol=0.1, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("recalibrate", [20, 0])
def test_a_model_left_in_train_mode_reads_what_was_measured(trained, calibrate, recalibrate):
    if not (calibrate or recalibrate):
        pytest.skip("nothing has measured, and nothing is to")
    _, true = true_moments(trained, IMAGES[128:], 2000)
    model = converted(copy.deepcopy(trained), recalibrate=recalibrate).train()
    if calibrate:
        rvconvert.calibrate(model, IMAGES[:128])
    assert 0.85 < model(IMAGES[128:])[0].var.sum() / true.sum() < 1.15


@torch.no_grad()
def test_calibrating_changes_nothing_but_the_gains(trained):
    model = converted(copy.deepcopy(trained), example_inputs=IMAGES[:4]).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rvconvert.calibrate(model, IMAGES[:64], pairs=2)
    assert torch.equal(torch.rand(3), expected)
    assert model.training and all(m.training for m in model.modules())
    assert list(model.state_dict()) == list(VAE().state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_data_may_be_a_loader_with_labels_and_is_read_until_there_are_enough(trained):
    read = []

    class Counted(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Counted(IMAGES, torch.zeros(len(IMAGES))), batch_size=48)
    report = rvconvert.calibrate(converted(trained), loader, pairs=2, images=96)
    assert report.samples == 96 and len(read) == 96
    assert len(report) == len(rvconvert.calibrate(converted(trained), (IMAGES[:40],), pairs=2))
    assert rvconvert.calibrate(converted(trained), IMAGES, pairs=1, images=70).samples == 70


def test_refusals_say_what_to_do(trained):
    calibrated = rvconvert.convert(trained, covariance="calibrated")
    with pytest.raises(rvconvert.ConversionError, match=r"\(batch\['image'\] for batch in loader\)"):
        rvconvert.calibrate(calibrated, [{"image": IMAGES, "label": 3}])
    with pytest.raises(rvconvert.ConversionError, match="'reconstruct' is not converted; forward is"):
        rvconvert.calibrate(calibrated, IMAGES, method="reconstruct")
    with pytest.raises(rvconvert.ConversionError, match="not a plain VAE"):
        rvconvert.calibrate(trained, IMAGES)
    with pytest.raises(rvconvert.ConversionError, match=r"covariance='independent' has no gains.*covariance='calibrated'"):
        rvconvert.calibrate(rvconvert.convert(trained), IMAGES)
    with pytest.raises(rvconvert.ConversionError, match="empty"):
        rvconvert.calibrate(converted(trained), [])
    with pytest.raises(rvconvert.ConversionError, match="not int"):
        rvconvert.calibrate(converted(trained), 3)
    with pytest.raises(rvconvert.ConversionError, match="1 or more"):
        rvconvert.calibrate(converted(trained), IMAGES, pairs=0)
    with pytest.raises(rvconvert.ConversionError, match="recalibrate=-1"):
        converted(trained, recalibrate=-1)


@torch.no_grad()
def test_gains_survive_files_pickle_and_deepcopy(trained, tmp_path):
    model = converted(trained)
    rvconvert.calibrate(model, IMAGES[:64], pairs=4)
    expected = model(IMAGES[:8])[0].var
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for suffix in ("pt", "safetensors"):
        path = rvconvert.save(model, tmp_path / f"model.{suffix}", kwargs={})
        copies.append(rvconvert.load(path, model=VAE).eval())
    for each in copies:
        torch.testing.assert_close(each(IMAGES[:8])[0].var, expected)
        assert list(each.state_dict()) == list(trained.state_dict())
    rvconvert.calibrate(copies[0], IMAGES[:64], pairs=1, seed=9)
    torch.testing.assert_close(model(IMAGES[:8])[0].var, expected)


def test_in_training_gains_follow_the_weights(trained):
    """Weights that hide the variance from the independent pass are found out at the next renewal."""
    torch.manual_seed(0)
    model = converted(copy.deepcopy(trained), recalibrate=5).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(41):
        x = IMAGES[64 * (step % 2) : 64 * (step % 2) + 64]
        y, _ = model(x)
        loss = F.mse_loss(y.mean, x) + y.var.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = rvconvert.to_plain(model)
    with torch.no_grad():
        _, true = true_moments(plain, IMAGES[:64], 1000)
        assert 0.75 < model(IMAGES[:64])[0].var.sum() / true.sum() < 1.35
        _, true = true_moments(plain.eval(), IMAGES[128:], 1000)
        assert 0.75 < model.eval()(IMAGES[128:])[0].var.sum() / true.sum() < 1.35  # measured at the first call


def test_a_decoder_that_is_also_given_plain_samples_is_calibrated_in_training():
    """Its first call of every step, and every fourth, has nothing random in it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 32), nn.Unflatten(1, (4, 8)), nn.ConvTranspose1d(4, 8, 4, 2, 1), nn.Conv1d(8, 2, 3), nn.Tanh()
    )
    with torch.no_grad():
        for p in net.parameters():
            p.abs_()  # of one sign, so that independence sees a hundredth of the variance
    decoder = rvconvert.convert(net, random_inputs=("input",), covariance="calibrated", recalibrate=4, output="distribution")
    z = RandomVariable(torch.randn(256, 4), torch.full((256, 4), 0.01))
    for _ in range(3):
        decoder(z.mean)
        y = decoder(z)
        decoder(z), decoder(z)
    with torch.no_grad():
        true = torch.stack([net(z.mean + 0.1 * torch.randn(256, 4)) for _ in range(500)]).var(0)
    assert 0.75 < float(y.var.sum() / true.sum()) < 1.35


def test_each_method_has_gains_in_training():
    """However their calls alternate."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 6))

        def forward(self, mu):
            return self.decoder(mu + torch.randn_like(mu))

        def narrow(self, mu):
            return self.decoder(mu + 0.1 * torch.randn_like(mu))

    model = rvconvert.convert(Two(), methods=("forward", "narrow"), covariance="calibrated", recalibrate=2)
    for _ in range(4):
        model(torch.rand(8, 4))
        model.narrow(torch.rand(8, 4))
    assert {key.partition("/")[0] for key in model.__dict__["_rvconvert"].gains.training} == {"forward", "narrow"}


def test_renewal_leaves_statistics_random_state_and_penalty_alone():
    torch.manual_seed(0)
    plain = VAE(norm=True)
    due = rvconvert.convert(plain, covariance="calibrated", recalibrate=1, example_inputs=IMAGES[:16]).train()
    never = rvconvert.convert(plain, covariance="calibrated", recalibrate=0, example_inputs=IMAGES[:16]).train()
    for model in (due, never):
        torch.manual_seed(4)
        model(IMAGES[:16])
        model.state_after = torch.rand(2)
    assert due.norm.num_batches_tracked == never.norm.num_batches_tracked == 1
    assert torch.equal(due.state_after, never.state_after)
    # once: the mean of an activation, which the gain before it changes a little, is taken in at momentum 0.1
    torch.testing.assert_close(due.norm.running_mean, never.norm.running_mean, rtol=0, atol=1e-3)
    assert float(due.norm.running_mean.abs().max()) > 1e-3
    seen = due.last_penalty.clone()
    conversion = due.__dict__["_rvconvert"]
    conversion.options = dataclasses.replace(conversion.options, recalibrate=0)
    due(IMAGES[:16])
    torch.testing.assert_close(due.last_penalty, seen)  # of the call itself, with the gains just measured
    assert seen != never.last_penalty


def test_a_gain_is_taken_by_channel_where_the_picture_has_another_size():
    gain = Gain(torch.tensor([[0.0, 2.0], [1.0, 3.0]]), torch.zeros(2, 2))
    x = RandomVariable(torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
    torch.testing.assert_close(gain(x, None).var.log(), torch.tensor([1.0, 2.0])[None, :, None].expand(1, 2, 3))
    x = RandomVariable(torch.zeros(1, 5), torch.ones(1, 5))
    torch.testing.assert_close(gain(x, None).var.log(), torch.full((1, 5), 1.5))


def test_foreign_entries_are_no_gains():
    made = Gains.from_tensors({"evaluation|a/b/c/0|slopes": torch.zeros(2, 1), "nonsense": torch.zeros(1)})
    assert made.evaluation == {} and made.stale


def test_products_with_an_activation_of_the_same_value_are_one_function():
    """x sigmoid(x) by hand: the gain on sigmoid(x) must not hide that both factors are functions of x."""

    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, z):
            h = self.linear(z)
            return h * torch.sigmoid(h)

    torch.manual_seed(0)
    z = RandomVariable(torch.randn(64, 3), torch.ones(64, 3))
    net = Swish()
    kinds = {"random_inputs": ("z",), "output": "distribution"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        independent = rvconvert.convert(net, **kinds).eval()(z)
        calibrated = rvconvert.convert(net, covariance="calibrated", recalibrate=0, **kinds).eval()(z)
    torch.testing.assert_close(calibrated.var, independent.var)
    torch.testing.assert_close(calibrated.mean, independent.mean)


def relu_network():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        net[2].weight.abs_()  # features that rise together add up, which independence does not see
    return net.double()


def test_the_closed_form_is_that_of_many_samples():
    net = relu_network()
    z = RandomVariable(torch.tensor([0.3, -0.5], dtype=torch.float64), torch.tensor([0.8, 0.4], dtype=torch.float64))
    mean, var = relu_network_moments(net[0], net[2], z.mean, z.var)
    with torch.no_grad():
        y = net(z.mean + z.std * torch.randn(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(mean, y.mean(0), rtol=0, atol=float(5 * y.std(0).max() / 400_000**0.5))
    torch.testing.assert_close(var, y.var(0), rtol=0.015, atol=0)


@torch.no_grad()
def test_against_the_exact_moments_of_a_relu_network():
    """Calibrated on some Gaussian inputs, held against the closed form on others."""
    net = relu_network()
    draw = torch.Generator().manual_seed(3)
    mean = torch.randn(160, 2, dtype=torch.float64, generator=draw)
    var = 0.1 + 0.4 * torch.rand(160, 2, dtype=torch.float64, generator=draw)
    rv = rvconvert.convert(net, covariance="calibrated", random_inputs=("input",), output="distribution").eval()
    report = rvconvert.calibrate(rv, (RandomVariable(mean[:128], var[:128]),), pairs=64)
    each = [relu_network_moments(net[0], net[2], m, v) for m, v in zip(mean[128:], var[128:], strict=True)]
    exact = [torch.stack(moments) for moments in zip(*each, strict=True)]
    y = rv(RandomVariable(mean[128:], var[128:]))
    torch.testing.assert_close(y.mean, exact[0], rtol=0.02, atol=0.02)
    assert 0.93 < float(y.var.sum() / exact[1].sum()) < 1.07
    assert torch.corrcoef(torch.stack((y.var.flatten(), exact[1].flatten())))[0, 1] > 0.8
    ratio = y.var / exact[1]
    assert float(((ratio > 0.5) & (ratio < 2)).double().mean()) > 0.9
    assert report.rows[-1].before < 0.7


@torch.no_grad()
def test_verify_covers_the_exact_variance_and_compares_the_modes_in_one_table():
    net = relu_network()
    z = RandomVariable(torch.randn(6, 2).double(), torch.full((6, 2), 0.3).double())
    rv = rvconvert.convert(net, covariance="calibrated", random_inputs=("input",)).eval()
    draw = torch.Generator().manual_seed(3)
    data = RandomVariable(torch.randn(128, 2, dtype=torch.float64, generator=draw), torch.full((128, 2), 0.3).double())
    rvconvert.calibrate(rv, (data,))
    result = rvconvert.verify(rv, z, samples=800)
    assert result.modes == ("independent", "calibrated", "lowrank")
    row = result.outputs[-1]
    exact = float(sum(relu_network_moments(net[0], net[2], m, v)[1].sum() for m, v in zip(z.mean, z.var, strict=True)))
    assert abs(row.true_var - exact) < 4 * row.standard_error * exact
    for mode in result.modes:
        low, high = row.interval(mode)
        assert low < row.ratio[mode] < high
        assert high / low == pytest.approx(1 + 4 * row.standard_error, rel=0.1)
    assert row.ratio["independent"] < 0.7 and row.ratio["calibrated"] == pytest.approx(1, abs=0.15)
    text = str(result)
    assert all(f"{mode}: the propagated variance" in text for mode in result.modes)
    assert "95 %" in result.summary("independent")
    assert result.to_dict()["rows"][-1]["interval"]["calibrated"] == row.interval("calibrated")


@torch.no_grad()
def test_verify_names_where_calibration_is_worst(trained):
    model = converted(trained)
    rvconvert.calibrate(model, IMAGES[:128])
    gains = model.__dict__["_rvconvert"].gains
    key = next(key for key in gains.evaluation if "up/" in key)
    gains.evaluation[key] = dataclasses.replace(gains.evaluation[key], offset=gains.evaluation[key].offset + 3, limits=None)
    result = rvconvert.verify(model, IMAGES[128:160], samples=300)
    worst = result.worst("calibrated")
    assert worst is not None and worst.ratio["calibrated"] > 10
    assert f"calibration is worst at {worst.module}" in result.summary("calibrated")


def test_verify_refuses_gains_of_a_model_that_has_none(trained):
    with pytest.raises(rvconvert.ConversionError, match=r"only if it was converted with covariance='calibrated'"):
        rvconvert.verify(rvconvert.convert(trained), IMAGES[:4], modes=("independent", "calibrated"))


@pytest.mark.parametrize("hook", [True, False])
def test_a_model_that_needs_gradients_is_measured_with_them(hook):
    class NeedsGradients(VAE):
        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            if not hook and not torch.is_grad_enabled():
                return self.last(mu.view(-1, 1, 3).expand(-1, 8, 3)).flatten(1)
            z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
            if hook:
                z.register_hook(lambda grad: 2 * grad)
            return self.last(z.view(-1, 1, 3).expand(-1, 8, 3)).flatten(1)

    rv = rvconvert.convert(NeedsGradients(), covariance="calibrated")
    rv(IMAGES).mean().backward()
    assert rv.last_penalty > 0
    assert rv._rvconvert.gains.training
    assert not any(gain.offset.requires_grad for gain in rv._rvconvert.gains.training.values())


def test_a_head_of_no_features_is_left_alone():
    class Empty(VAE):
        def __init__(self):
            super().__init__()
            self.none = nn.Linear(12, 0)

        def forward(self, x):
            y = super().forward(x)[0]
            return y, self.none(y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it initialises nothing
        rv = rvconvert.convert(Empty(), covariance="calibrated")
    rv(IMAGES)[0].mean().backward()
    assert rv.last_penalty > 0


@pytest.mark.parametrize("covariance", ["independent", "calibrated", "sampled", "lowrank"])
def test_memory_that_is_written_step_by_step_may_hold_anything_before(covariance):
    """``torch.empty`` filled in a loop, as solvers and recurrent decoders do."""

    class Steps(VAE):
        def forward(self, x):
            y = super().forward(x)[0]
            out = torch.full((3, *y.shape), math.nan)
            for step in range(3):
                out[step] = y = torch.tanh(2 * y)
            return out

    rv = rvconvert.convert(Steps(), covariance=covariance)
    rv(IMAGES[:24]).square().mean().backward()
    assert rv.last_penalty > 0
    assert all(torch.isfinite(p.grad).all() for p in rv.parameters())


@torch.no_grad()
def test_a_copy_that_is_measured_or_exported_has_the_gains_of_its_model(trained, tmp_path):
    held_out, options = IMAGES[128:], {"covariance": "calibrated", "recalibrate": 0}
    model = rvconvert.convert(trained, **options).eval()
    rvconvert.calibrate(model, IMAGES[:128])
    as_distribution = rvconvert.convert(trained, output="distribution", attach=False, **options).eval()
    conversion_of(as_distribution).gains = rvconvert.converted.conversion_of(model).gains
    expected = as_distribution(held_out)[0]

    found = output_variances(model, held_out, pairs=2)
    assert found.propagated == pytest.approx(float(expected.var.mean()), rel=1e-5)

    path = rvconvert.export(model, tmp_path / "model.pt2", held_out, deviation=True)
    deviation = torch.export.load(path).module()(held_out)[-1]
    torch.testing.assert_close(deviation, expected.std, rtol=1e-4, atol=1e-5)


class Assigned(nn.Module):
    """Items are drawn into groups, each with a decoder of its own (MacridVAE): the draws are no latent."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.decoders = nn.Linear(10, 6), nn.ModuleList(nn.Linear(3, 10) for _ in range(3))
        self.logits = nn.Parameter(torch.randn(10, 3))

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        groups = F.gumbel_softmax(self.logits, tau=1.0, dim=1)
        return sum(decoder(z) * groups[:, k] for k, decoder in enumerate(self.decoders))


@pytest.mark.parametrize("training", [True, False])
def test_gains_are_of_the_same_draws_that_are_no_latent(training):
    x = torch.randn(32, 10, generator=torch.Generator().manual_seed(0))
    found = []
    for seed in range(8):
        penalties = []
        for covariance in ("independent", "calibrated"):
            torch.manual_seed(seed)
            rv = rvconvert.convert(Assigned(), covariance=covariance).train(training)
            if covariance == "calibrated" and not training:
                rvconvert.calibrate(rv, x)
            torch.manual_seed(seed)
            rv(x)
            penalties.append(float(rv.last_penalty))
        found.append(penalties[1] / penalties[0])
    assert min(found) > 0.5 and max(found) < 3  # of gains of other draws up to 10^6


def test_a_batch_in_a_dict_calibrates() -> None:
    class OfDict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            mu, logvar = self.encoder(batch["x"]).chunk(2, 1)
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())

    rv = rvconvert.convert(OfDict(), covariance="calibrated")
    assert rvconvert.calibrate(rv, ({"x": torch.rand(40, 6), "name": "a"},), images=24).samples == 24
    with pytest.raises(rvconvert.ConversionError, match="no tensor"):
        rvconvert.calibrate(rv, ({"name": "a"},))


def test_what_is_given_by_keyword_alone_is_measured_on_with_the_rest() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6))

        def forward(self, x: torch.Tensor, *, labels: torch.Tensor) -> torch.Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(torch.cat((mu + torch.randn_like(mu) * (0.5 * logvar).exp(), labels), 1))

    rv = rvconvert.convert(Conditional(), covariance="calibrated")
    rv(torch.rand(200, 6), labels=torch.rand(200, 2)).sum().backward()
    assert conversion_of(rv).gains.training


class OfAGraph(nn.Module):
    """Edges from the inner products of nodes, as of Kipf and Welling."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mean, self.logvar = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x, adjacency):
        mean, logvar = torch.mm(adjacency, self.mean(x)), torch.mm(adjacency, self.logvar(x))
        z = mean + (logvar / 2).exp() * torch.randn_like(mean)
        return z @ z.t(), mean, logvar


@pytest.mark.parametrize("sparse", [True, False])
def test_a_graph_is_calibrated_and_verified_whole(sparse):
    n = 300  # more nodes than are measured at once
    x, adjacency = torch.rand(n, 5), torch.eye(n) / 2
    given = (x, adjacency.to_sparse() if sparse else adjacency)
    rv = rvconvert.convert(OfAGraph(), covariance="calibrated")
    rv(*given)[0].square().mean().backward()
    rvconvert.calibrate(rv, given, pairs=8)
    assert 0.5 < truth_ratio(rv, given, pairs=8) < 2
    assert len(rvconvert.verify(rv, given, samples=20))


def test_a_gradient_inside_the_model_is_taken_where_gains_are_measured():
    torch.manual_seed(0)
    rv = rvconvert.convert(Smooth(), covariance="calibrated")
    for _ in range(2):
        y, smoothness = rv(IMAGES[:32])
        (F.mse_loss(y, IMAGES[:32]) + smoothness).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rv.parameters())
    assert not any(gain.offset.requires_grad for gain in conversion_of(rv).gains.training.values())
    ratio = rvconvert.verify(rv, IMAGES[:16], samples=200)
    assert rvconvert.calibrate(rv, IMAGES[:32], pairs=4).samples == 32 and len(ratio) > 3
    found = output_variances(rv, IMAGES[:32], pairs=64)
    assert 0.8 < found.propagated / found.true < 1.25
