"""One line converts, trains and turns back: the promises of ``convert`` on the four systems' models."""

from __future__ import annotations

import copy
import pickle
import types
from abc import ABC
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from rvconvert import RandomVariable
from rvconvert.errors import NonGaussianError, NoReparameterizationError, TransferError, UnsupportedOperationError
from tests import by_hand
from tests.models import BetaTCVAE, DCDecoder, SoftIntroDecoder, VanillaVAE


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(1)
    return torch.rand(4, 3, 16, 16)


def trained_like(model: nn.Module) -> nn.Module:
    """Weights and statistics far from their initial scale, as after training."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5).add_(0.05 * torch.randn_like(p))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.3, 2.0)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("cls", [VanillaVAE, BetaTCVAE])
def test_whole_vae(cls: type[VanillaVAE], examples: bool, training: bool, images: Tensor) -> None:
    vae = trained_like(cls()).train(training)
    state = copy.deepcopy(vae.state_dict())
    rv = rvconvert.convert(vae, example_inputs=images if examples else None)
    assert isinstance(rv, cls)
    assert rv.training is training
    assert list(rv.state_dict()) == list(state)
    out = rv(images)
    assert isinstance(out, list) and all(type(x) is Tensor for x in out)
    assert torch.equal(rv(images)[0], rv(images)[0])
    mu, logvar = rv.encode(images)
    torch.testing.assert_close(out[2], mu)
    torch.testing.assert_close(out[3], logvar)
    if cls is BetaTCVAE:
        torch.testing.assert_close(out[4], mu)
    rv.loss_function(*out[:4])["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in rv.parameters())
    assert rv.sample(3).shape == (3, 3, 16, 16)
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("training", [True, False])
def test_moments_equal_the_papers_equations(training: bool, images: Tensor) -> None:
    vae = trained_like(VanillaVAE()).double().train(training)
    rv = rvconvert.convert(vae, example_inputs=images.double(), output="distribution")
    y, _, mu, logvar = rv(images.double())
    plain = copy.deepcopy(vae)
    plain.encoder.load_state_dict(vae.encoder.state_dict())
    mean, var = by_hand.vanilla_decoder(plain, mu, logvar.exp())
    torch.testing.assert_close(y.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.var, var, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_bare_decoder_equals_the_papers_equations(training: bool) -> None:
    decoder = trained_like(SoftIntroDecoder()).double().train(training)
    rv = rvconvert.convert(decoder, random_inputs=("z",), output="distribution")
    mean, var = torch.randn(4, 8).double(), torch.rand(4, 8).double()
    y = rv(RandomVariable(mean, var))
    expected = by_hand.soft_intro_decoder(decoder, mean, var)
    torch.testing.assert_close(y.mean, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.var, expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [DCDecoder, SoftIntroDecoder])
def test_decoders_with_aliases_and_modules_built_in_forward(cls: type[nn.Module], training: bool) -> None:
    """With no variance the converted decoder is the plain one, to 1e-6."""
    decoder = trained_like(cls()).double().train(training)
    rv = rvconvert.convert(decoder, random_inputs=("z",))
    z = torch.randn(4, 8).double()
    expected = copy.deepcopy(decoder)(z)
    torch.testing.assert_close(copy.deepcopy(rv)(RandomVariable(z, torch.zeros_like(z))), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(copy.deepcopy(rv)(z), expected, rtol=1e-6, atol=1e-6)


def test_attached_penalty_is_the_explicit_sum(images: Tensor) -> None:
    vae = VanillaVAE().eval()
    attached = rvconvert.convert(vae, example_inputs=images, penalty=7.0)
    out = attached(images)
    loss = F.mse_loss(out[0], images)
    loss.backward()
    explicit = rvconvert.convert(vae, example_inputs=images, output="distribution")
    y = explicit(images)[0]
    penalty = rvconvert.variance_penalty(y, weight=7.0)
    torch.testing.assert_close(attached.last_penalty, penalty.detach())
    (F.mse_loss(y.mean, images) + penalty).backward()
    for (name, a), b in zip(attached.named_parameters(), explicit.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_an_empty_batch_has_no_penalty() -> None:
    vae = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    rv = rvconvert.convert(vae, random_inputs=("input",))
    z = RandomVariable(torch.zeros(0, 3), torch.zeros(0, 3))
    rv(z).square().sum().backward()  # type: ignore[arg-type]
    assert rv.last_penalty == 0
    assert all(p.grad is not None and not p.grad.any() for p in rv.parameters())


def test_penalty_scale_and_detached(images: Tensor) -> None:
    vae = VanillaVAE().eval()
    grads = []
    for scale, attach in ((1.0, True), (3.0, True), (1.0, False)):
        rv = rvconvert.convert(vae, example_inputs=images, attach=attach)
        rv.penalty_scale = scale
        (rv(images)[0] * 0).sum().backward()
        grads.append(rv.decoder_input.weight.grad)
        assert rv.last_penalty > 0
    torch.testing.assert_close(grads[1], 3 * grads[0])
    assert grads[0].abs().max() > 0
    assert grads[2].abs().max() == 0


def test_copies_pickles_and_goes_back(images: Tensor) -> None:
    rv = rvconvert.convert(VanillaVAE().eval(), example_inputs=images)
    expected = rv(images)[0]
    for other in (copy.deepcopy(rv), pickle.loads(pickle.dumps(rv))):
        assert torch.equal(other(images)[0], expected)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in rv.parameters()}
    plain = rvconvert.to_plain(rv)
    assert type(plain) is VanillaVAE
    assert all(torch.equal(v, rv.state_dict()[k]) for k, v in plain.state_dict().items())
    mean = rvconvert.to_plain(rv, latent="mean")
    torch.testing.assert_close(mean(images)[0], rv.decode(rv.encode(images)[0]))
    assert isinstance(pickle.loads(pickle.dumps(mean)), VanillaVAE)


class _Marker:
    __slots__ = ()


@pytest.mark.parametrize("first", [ABC, Generic[TypeVar("T")], _Marker, object], ids=["ABC", "Generic", "slots", "none"])
def test_a_class_whose_first_base_is_no_module(first: Any, images: Tensor) -> None:
    """``class VAE(ABC, nn.Module)``: an instance takes the generated class and gives it back."""
    plain: Any = types.new_class("Mixed", (VanillaVAE,) if first is object else (first, VanillaVAE))
    rv_vae = rvconvert.convert(plain())
    rv_vae(images)
    assert isinstance(rv_vae, plain)
    assert rv_vae.last_penalty > 0
    assert "RV, independent, L_c 50" in repr(rv_vae)
    assert type(rvconvert.to_plain(copy.deepcopy(rv_vae))) is plain


def test_inplace_shares_and_copy_does_not(images: Tensor) -> None:
    vae = VanillaVAE()
    shared = rvconvert.convert(vae, inplace=True)
    assert all(a is b for a, b in zip(shared.parameters(), vae.parameters(), strict=True))
    copied = rvconvert.convert(vae)
    assert not any(a is b for a, b in zip(copied.parameters(), vae.parameters(), strict=True))


def test_decode_of_a_random_variable_is_generation(images: Tensor) -> None:
    rv = rvconvert.convert(VanillaVAE().eval())
    z = torch.randn(2, 8)
    assert torch.equal(rv.decode(z), rvconvert.to_plain(rv).decode(z))
    y = rv.decode(RandomVariable(z, torch.ones_like(z)))
    assert isinstance(y, RandomVariable) and y.shape == (2, 3, 16, 16) and (y.var > 0).all()


def test_training_lowers_the_loss_and_the_weights_transfer(images: Tensor) -> None:
    torch.manual_seed(0)
    rv = rvconvert.convert(VanillaVAE(), example_inputs=images)
    optimizer = torch.optim.Adam(rv.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = rv.loss_function(*rv(images))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    plain = rvconvert.transfer_weights(rv, VanillaVAE())
    assert all(torch.equal(v, rv.state_dict()[k]) for k, v in plain.state_dict().items())


def test_transfer_lists_every_difference() -> None:
    source = VanillaVAE().state_dict()
    source["head.weight"] = source.pop("fc_mu.weight")
    source["extra"] = torch.zeros(2)
    target = VanillaVAE()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(TransferError) as error:
        rvconvert.transfer_weights(source, target)
    for text in ("fc_mu.weight", "head.weight", "rename", "extra"):
        assert text in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_another_batch_size_and_image_size_of_a_recorded_model(images: Tensor) -> None:
    rv = rvconvert.convert(VanillaVAE().eval(), example_inputs=images)
    whole = rv(images)[0]
    torch.testing.assert_close(rv(images[:1])[0], whole[:1])
    torch.testing.assert_close(rv(images[:3])[0], whole[:3])


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.randn(4, 8)
        return self.layer(x + eps * 0.1)


@pytest.mark.parametrize("examples", [True, False])
def test_noise_of_a_constant_shape_is_found(examples: bool) -> None:
    x = torch.randn(4, 8)
    rv = rvconvert.convert(Frozen(), example_inputs=x if examples else None, output="distribution")
    y = rv(x)
    torch.testing.assert_close(y.mean, rv.layer(x))
    torch.testing.assert_close(y.var, (0.01 * rv.layer.weight.square().sum(1)).expand(4, 8))


class Unsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x) + torch.randn_like(x)
        a = torch.linalg.svdvals(z)
        return torch.linalg.qr(z)[0] + a.sum()


@pytest.mark.parametrize("examples", [True, False])
def test_one_error_lists_every_unsupported_operation(examples: bool) -> None:
    with pytest.raises(UnsupportedOperationError) as error:
        rv = rvconvert.convert(Unsupported(), example_inputs=torch.randn(8, 8) if examples else None, strict=True)
        rv(torch.randn(8, 8))
    text = str(error.value)
    assert len(error.value.rows) == 2
    for expected in ("svdvals", "qr", "test_convert.py:", "torch.linalg.qr(z)[0]", "@rvconvert.rule(torch.linalg."):
        assert expected in text


class Cauchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x) + torch.empty_like(x).cauchy_())


@pytest.mark.parametrize("examples", [True, False])
def test_a_law_without_moments_is_refused_by_name_and_line(examples: bool) -> None:
    with pytest.raises(NonGaussianError, match=r"test_convert.py:\d+.*\n.*Cauchy"):
        rvconvert.convert(Cauchy(), example_inputs=torch.randn(4, 8) if examples else None)(torch.randn(4, 8))


@pytest.mark.parametrize("examples", [True, False])
def test_a_model_without_noise_is_refused(examples: bool) -> None:
    with pytest.raises(NoReparameterizationError, match="random_inputs"):
        x = torch.randn(4, 8)
        rvconvert.convert(nn.Sequential(nn.Linear(8, 8)), example_inputs=x if examples else None)(x)


def test_plan_is_read_only_and_names_the_users_lines(images: Tensor) -> None:
    vae = VanillaVAE()
    state = copy.deepcopy(vae.state_dict())
    report = rvconvert.plan(vae, example_inputs=images)
    assert report.counts["noise"] == 1 and not report.unsupported and not report.refusal
    noise = next(row for row in report if row.status == "noise")
    assert "models.py:" in noise.where and "randn_like" in noise.source and noise.role == "latent"
    conv = next(row for row in report if row.module == "final_layer.0")
    assert (conv.rule, conv.exactness, conv.status) == ("conv2d", "exact_if_independent", "random")
    assert [row.operation for row in report if row.role == "reconstruction"] == ["Tanh"]
    assert any(note.startswith("L_c is attached to Tanh at ") for note in report.notes)
    assert "pass example_inputs" in rvconvert.plan(vae).notes[0]
    assert type(vae) is VanillaVAE and "_rvconvert" not in vae.__dict__
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in state.items())
    assert rvconvert.plan(Unsupported(), example_inputs=torch.randn(8, 8), strict=True).unsupported


def test_a_persons_own_rules(images: Tensor) -> None:
    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0e(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.swish = nn.Linear(8, 8), Swish()

        def forward(self, x: Tensor) -> Tensor:
            return self.swish(self.layer(x + torch.randn_like(x)))

    overlay = rvconvert.REGISTRY.overlay()

    @rvconvert.rule(Swish, registry=overlay)
    def swish(module: nn.Module, x: RandomVariable) -> RandomVariable:
        return RandomVariable(module(x.mean), 2 * x.var)

    x = torch.randn(4, 8)
    for options in ({"example_inputs": x}, {}):
        rv = rvconvert.convert(Model(), rules=overlay, output="distribution", **options)
        y = rv(x)
        torch.testing.assert_close(y.mean, torch.special.i0e(rv.layer(x)))
        torch.testing.assert_close(y.var, 2 * rv.layer.weight.square().sum(1).expand(4, 8))
        assert y.settings.registry is overlay
    with pytest.raises(rvconvert.ConversionError, match="registered already"):
        rvconvert.rule(F.relu)(lambda x: x)


def test_bad_calls_say_what_to_type() -> None:
    for call, text in (
        (lambda: rvconvert.convert(3), "torch.nn.Module"),
        (lambda: rvconvert.convert(VanillaVAE(), methods=("nope",)), "nope"),
        (lambda: rvconvert.convert(SoftIntroDecoder(), random_inputs=("w",)), "z"),
        (lambda: rvconvert.convert(VanillaVAE(), output="image"), "distribution"),
        (lambda: rvconvert.convert(VanillaVAE(), covarianc="sampled"), "did you mean 'covariance'"),
        (lambda: rvconvert.convert(VanillaVAE(), pairs=0), "pairs=0"),
        (lambda: rvconvert.convert(VanillaVAE(), rank=-3, covariance="lowrank"), "rank=-3"),
        (lambda: rvconvert.convert(VanillaVAE(), penalty="50"), "penalty='50'"),
        (lambda: rvconvert.convert(VanillaVAE(), penalty=float("nan")), "penalty=nan"),
        (lambda: rvconvert.convert(VanillaVAE(), variance_dtype=torch.int32), "variance_dtype=torch.int32"),
        (lambda: rvconvert.convert(VanillaVAE(), seed="x"), "seed='x'"),
        (lambda: rvconvert.convert(VanillaVAE(), pairs=3), "pairs=3 belongs to covariance='sampled'"),
        (lambda: rvconvert.convert(VanillaVAE(), covariance="full"), "independent"),
        (lambda: rvconvert.convert(rvconvert.convert(VanillaVAE())), "to_plain"),
        (lambda: rvconvert.to_plain(VanillaVAE()), "convert"),
        (lambda: rvconvert.variance_penalty(torch.zeros(3)), "output='distribution'"),
        (lambda: RandomVariable(torch.zeros(3), torch.zeros(4)), "shape"),
        (lambda: RandomVariable(torch.zeros(3), -torch.ones(3)), "negative"),
    ):
        with pytest.raises(rvconvert.ConversionError, match=text):
            call()


def test_a_warning_is_at_the_line_of_the_training_loop():
    rv, x = rvconvert.convert(VanillaVAE(), output="distribution"), torch.rand(2, 3, 16, 16)
    with pytest.warns(UserWarning, match="no L_c is attached") as told:
        rv(x)
    assert told[0].filename == __file__


def test_training_against_independent_moments_is_told_what_they_see_once(monkeypatch, caplog):
    monkeypatch.setattr("rvconvert.advice._SAID", set())
    x = torch.rand(2, 3, 16, 16)
    for covariance in ("calibrated", "sampled", "independent", "independent"):
        rvconvert.convert(VanillaVAE(), covariance=covariance)(x)
    assert len(caplog.records) == 1 and "covariance='calibrated' sees it" in caplog.text


@pytest.mark.parametrize("covariance", ["independent", "calibrated", "lowrank", "sampled"])
def test_a_hook_on_a_latent_scales_the_gradients_of_its_mean_and_its_variance(covariance):
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.mu, self.logvar, self.decoder = nn.Linear(6, 2), nn.Linear(6, 2), nn.Linear(2, 6)

        def forward(self, x, factor):
            mu = self.mu(x)
            z = mu + torch.exp(0.5 * self.logvar(x)) * torch.randn_like(mu)
            if z.requires_grad:
                z.register_hook(lambda grad: factor * grad)
            return self.decoder(z)

    torch.manual_seed(0)
    rv, x = rvconvert.convert(Hooked(), covariance=covariance), torch.randn(32, 6)
    grads = {}
    for factor in (1.0, 0.5, 0.0):
        rv.zero_grad()
        torch.manual_seed(1)
        (rv(x, torch.tensor(factor)) - x).square().mean().backward()
        grads[factor] = torch.cat([rv.mu.bias.grad, rv.logvar.bias.grad])
    assert (grads[1.0] != 0).all()
    torch.testing.assert_close(grads[0.5], 0.5 * grads[1.0])
    assert not grads[0.0].any()
