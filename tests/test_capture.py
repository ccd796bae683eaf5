"""How people spell it: noise sources, output structures, losses inside forward, control flow.

Recordings that are kept and such as serve one call agree.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal
from torch.func import functional_call

import rvconvert
from rvconvert import RandomVariable
from rvconvert.capture.numpy_draws import drawn_by_torch
from rvconvert.errors import ConversionError, NoReparameterizationError, TracingError

ONCE = (False, True)  # the model reads a plain value, so that each call is recorded anew


def assert_read(x: Tensor, once: bool) -> None:
    """Read a plain value, if asked to, and decide nothing by it."""
    if once and not x.is_meta and float(x.sum()) == 1e30:
        raise ValueError


class VAE(nn.Module):
    """A linear VAE whose sampling and whose result are given as functions, as other people would write them inline."""

    def __init__(self, sample: Callable[..., Tensor], result: Callable[..., Any], once: bool = False) -> None:
        super().__init__()
        self.once = once
        self.encoder = nn.Linear(6, 8)
        self.decoder = nn.Linear(4, 6)
        self.sample, self.result = sample, result
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert_read(x, self.once)
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = self.sample(mu, torch.exp(0.5 * logvar))
        return self.result(self.decoder(z), x, mu, z, *args, **kwargs)


@torch.jit.script
def scripted(mu: Tensor, std: Tensor) -> Tensor:
    return mu + torch.randn_like(std) * std


def in_place(mu: Tensor, std: Tensor) -> Tensor:
    z = torch.randn_like(std)
    z.mul_(std)
    z += mu
    return z


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "randn_like": lambda mu, std: mu + torch.randn_like(std) * std,
    "randn(size)": lambda mu, std: mu + torch.randn(mu.size()) * std,
    "randn(*size)": lambda mu, std: mu + torch.randn(*mu.size()) * std,
    "randn(batch, d)": lambda mu, std: mu + torch.randn(mu.size(0), 4) * std,
    "randn(shape, device)": lambda mu, std: mu + torch.randn(mu.shape, device=mu.device, dtype=mu.dtype) * std,
    "addcmul": lambda mu, std: mu.addcmul(std, torch.randn(mu.size())),
    "lerp of zero": lambda mu, std: torch.addcmul(mu, std, torch.randn_like(mu)),
    "in place": in_place,
    "data.new().normal_": lambda mu, std: mu + std * Variable(std.data.new(std.size()).normal_()),
    "FloatTensor": lambda mu, std: mu + std * Variable(torch.FloatTensor(std.size()).normal_()),
    "empty_like.normal_": lambda mu, std: mu + std * torch.empty_like(std).normal_(),
    "zeros.normal_(0, 1)": lambda mu, std: mu + std * torch.zeros_like(std).normal_(0, 1),
    "normal_ with a deviation": lambda mu, std: mu + std * 2.0 * torch.empty_like(std).normal_(std=0.5),
    "torch.normal(mu, std)": lambda mu, std: torch.normal(mu, std),
    "torch.normal(0, 1, size)": lambda mu, std: mu + std * torch.normal(0.0, 1.0, mu.shape),
    "Normal.rsample": lambda mu, std: Normal(mu, std).rsample(),
    "Normal.sample": lambda mu, std: Normal(mu, std).sample(),
    "Independent": lambda mu, std: Independent(Normal(mu, std), 1).rsample(),
    "MultivariateNormal": lambda mu, std: MultivariateNormal(mu, scale_tril=torch.diag_embed(std)).rsample(),
    "two samples, mean": lambda mu, std: torch.cat([Normal(mu, std).rsample((1,))[0], mu], 1)[:, :4],
    "torch.jit.script": lambda mu, std: scripted(mu, std),
    "np.random.normal": lambda mu, std: mu + std * torch.from_numpy(np.random.normal(0, 1, size=std.size())).float(),
    "normal of a deviation": lambda mu, std: mu + std * torch.as_tensor(np.random.normal(scale=0.5, size=std.size())).to(std) * 2,
    "np.random.randn": lambda mu, std: mu + std * torch.tensor(np.random.randn(*std.shape), dtype=torch.float32),
    "randn.astype": lambda mu, std: mu + std * torch.from_numpy(np.random.randn(std.size(0), 4).astype(np.float32)),
    "Variable(standard_normal)": lambda mu, std: mu + std * Variable(torch.FloatTensor(np.random.standard_normal(std.shape))),
    "torch.Tensor(normal)": lambda mu, std: mu + std * torch.Tensor(np.random.normal(size=(len(std), 4))),
}


@pytest.mark.parametrize("once", ONCE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_spelling_of_the_reparameterization(name: str, once: bool) -> None:
    torch.manual_seed(0)
    vae = VAE(SAMPLERS[name], lambda y, x, mu, z: (y, mu, z), once)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x, output="distribution")
    assert rvconvert.plan(vae, example_inputs=x).lifetime == ("once" if once else "kept")
    for batch in (x, x[:2]):
        y, mu, z = rv(batch)
        logvar = rv.encoder(batch)[:, 4:]
        torch.testing.assert_close(z.mean, mu)
        torch.testing.assert_close(z.var, logvar.exp())
        torch.testing.assert_close(y.mean, rv.decoder(mu))
        torch.testing.assert_close(y.var, logvar.exp() @ rv.decoder.weight.square().T)


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: torch.from_numpy(np.random.normal(0.0, 0.1, x.shape)).float(),
    "rand": lambda x: torch.from_numpy(np.random.rand(*x.shape).astype("float32")),
    "normal of one size": lambda x: 0.1 * torch.from_numpy(np.random.normal(size=np.prod(x.shape))).float().view_as(x),
    "uniform": lambda x: torch.as_tensor(np.random.uniform(-1, 1, size=x.shape)).to(x),
    "worked on by numpy": lambda x: torch.from_numpy(np.sqrt(np.random.random(x.shape))).float(),
    "of one value": lambda x: x * float(np.random.normal()),
}


@pytest.mark.parametrize("mode", ["independent", "calibrated", "sampled"])
@pytest.mark.parametrize("name", NOISES)
def test_noise_by_numpy_on_the_input_is_another_one_at_every_call(name: str, mode: str) -> None:
    class Denoising(VAE):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + NOISES[name](x))

    torch.manual_seed(0)
    np.random.seed(0)
    vae = Denoising(SAMPLERS["randn_like"], lambda y, x, mu, z: (y, mu))
    rv, x = rvconvert.convert(vae, covariance=mode).eval(), torch.ones(500, 6)
    with torch.no_grad():
        found, right = ([model(x)[1] for _ in range(3)] for model in (rv, vae.eval()))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    if name != "of one value":
        torch.testing.assert_close(found[1].mean(0), right[0].mean(0), rtol=0, atol=0.08)
        torch.testing.assert_close(found[1].std(0), right[0].std(0), rtol=0.2, atol=0)


def test_numpy_draws_on_the_processor_whatever_the_default_device() -> None:
    original = np.random.normal
    with torch.device("meta"), drawn_by_torch():
        assert np.random.normal(1.0, 0.5, (3, 2)).shape == (3, 2)
        assert np.random.normal() != np.random.normal()
    assert np.random.normal is original


def test_whole_numbers_that_a_draw_rounds_to_are_no_draw() -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        noise = torch.from_numpy(np.random.rand(*x.shape)).float()
        return y + noise, y * torch.BoolTensor(np.ones(x.shape, dtype=bool))

    rows = rvconvert.plan(VAE(SAMPLERS["randn_like"], result), example_inputs=torch.rand(5, 6)).rows
    assert [row.operation for row in rows if "BoolTensor" in row.source] == ["Tensor.add", "Tensor.mul"]


def test_a_draw_that_numpy_works_on_is_no_constant() -> None:
    x = torch.rand(5, 6)
    vae = VAE(lambda mu, std: mu + std * torch.from_numpy(3 * np.random.randn(*std.shape)).float(), lambda y, x, mu, z: y)
    with pytest.raises(NoReparameterizationError, match="Python or numpy draws in it"):
        rvconvert.convert(vae, example_inputs=x)


@dataclasses.dataclass
class Output:
    reconstruction: Tensor
    extra: dict[str, Any]


class Named(NamedTuple):
    reconstruction: Tensor
    mu: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    reconstruction: Tensor
    mu: Tensor


class Record(OrderedDict):
    """A mapping of its own, as model outputs are; its entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


STRUCTURES: dict[str, Callable[..., Any]] = {
    "tensor": lambda y, x, mu, z: y,
    "tuple": lambda y, x, mu, z: (y, mu, None, 3),
    "list": lambda y, x, mu, z: [y, x, mu, z],
    "dict": lambda y, x, mu, z: {"recon": y, "latent": {"mu": mu, "z": [z]}},
    "dataclass": lambda y, x, mu, z: Output(y, {"mu": mu, "name": "a"}),
    "slots": lambda y, x, mu, z: Slotted(y, mu),
    "deque": lambda y, x, mu, z: deque([y, mu]),
    "namedtuple": lambda y, x, mu, z: Named(y, mu),
    "mapping": lambda y, x, mu, z: Record(recon=y, mu=mu),
    "distribution": lambda y, x, mu, z: Normal(y, 1.0),
    "independent Bernoulli": lambda y, x, mu, z: Independent(Bernoulli(logits=y), 1),
}


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return type(value), {k: described(v) for k, v in value.items()}
    if isinstance(value, Slotted):
        return Slotted, described(value.reconstruction), described(value.mu)
    if isinstance(value, (list, tuple, deque)):
        return type(value), [described(v) for v in value]
    if hasattr(value, "__dict__"):
        return type(value), {k: described(v) for k, v in vars(value).items()}
    return value


@pytest.mark.parametrize("once", ONCE)
@pytest.mark.parametrize("name", STRUCTURES)
def test_outputs_keep_their_structure(name: str, once: bool) -> None:
    vae = VAE(SAMPLERS["randn_like"], STRUCTURES[name], once)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x)
    assert described(rv(x)) == described(vae(x))
    expected = rv.encoder(x)[:, 4:].exp() @ rv.decoder.weight.square().T
    torch.testing.assert_close(rv.last_penalty, 50 * expected.square().mean())


LOSSES: dict[str, Callable[..., Any]] = {
    "mse_loss": lambda y, x, mu, z: F.mse_loss(y, x) + mu.square().mean(),
    "module": lambda y, x, mu, z: nn.BCEWithLogitsLoss()(y, x),
    "by hand": lambda y, x, mu, z: ((y - x) ** 2).mean(),
    "by hand, reversed": lambda y, x, mu, z: (x - y).pow(2).sum(1).mean(),
    "log_prob": lambda y, x, mu, z: -Normal(y, 1.0).log_prob(x).sum(),
    "cross entropy by hand": lambda y, x, mu, z: (
        -(x * torch.log(torch.sigmoid(y) + 1e-6) + (1 - x) * torch.log(1 - torch.sigmoid(y) + 1e-6)).sum(1).mean()
    ),
    "structure by hand": lambda y, x, mu, z: 1 - ((2 * y * x + 0.1) / (y * y + x * x + 0.1)).mean() ** 0.5,
    "Bernoulli": lambda y, x, mu, z: -Bernoulli(logits=y, validate_args=False).log_prob(x).mean(),
}


@pytest.mark.parametrize("once", ONCE)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_inside_forward_is_that_of_the_mean_with_the_penalty_attached(name: str, once: bool) -> None:
    torch.manual_seed(3)
    vae = VAE(SAMPLERS["randn_like"], LOSSES[name], once)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x)
    loss = rv(x)
    mu = rv.encoder(x)[:, :4]
    torch.testing.assert_close(loss, LOSSES[name](rv.decoder(mu), x, mu, mu))
    loss.backward()
    found = rv.decoder.weight.grad.clone()
    rv.zero_grad()
    var = rv.encoder(x)[:, 4:].exp() @ rv.decoder.weight.square().T
    (LOSSES[name](rv.decoder(mu), x, mu, mu) + 50 * var.square().mean()).backward()
    torch.testing.assert_close(found, rv.decoder.weight.grad)


CONTROL: dict[str, Callable[..., Any]] = {
    "branch on batch": lambda y, x, mu, z: y * 2 if x.shape[0] > 3 else y * 3,
    "assert": lambda y, x, mu, z: checked(y),
    "loop over features": lambda y, x, mu, z: torch.stack([y[:, i] * i for i in range(x.size(1))], 1),
    "unpacked shape": lambda y, x, mu, z: y.view(*x.shape),
    "numpy scalar": lambda y, x, mu, z: y.reshape(-1, np.prod([2, 3])),
    "len": lambda y, x, mu, z: y / len(x),
    "numel": lambda y, x, mu, z: y / x.numel() + torch.arange(y.nelement()).view_as(y),
    "flag": lambda y, x, mu, z, double=False: y * 2 if double else y,
    "write": lambda y, x, mu, z: written(y),
    "isinstance": lambda y, x, mu, z: y * 2 if isinstance(y, torch.Tensor) else None,
    "unlike itself": lambda y, x, mu, z: torch.zeros_like(y) if (y != y).any() or bool(torch.ne(z, z).sum()) else y * 2,
    "mean method": lambda y, x, mu, z: y - y.mean(dim=1, keepdim=True),
    "no_grad": lambda y, x, mu, z: y + reference(y),
}


def checked(y: Tensor) -> Tensor:
    assert y.dim() == 2 and not torch.isnan(y).any(), "bad"
    return y


def written(y: Tensor) -> Tensor:
    out = torch.zeros(y.shape[0], 2, 6)
    out[:, 0] = y
    out[:, 1] = y * 2
    return out.flatten(1)


@torch.no_grad()
def reference(y: Tensor) -> Tensor:
    return torch.ones_like(y)


@pytest.mark.parametrize("once", ONCE)
@pytest.mark.parametrize("name", CONTROL)
def test_python_just_runs(name: str, once: bool) -> None:
    """With no variance (std = 0) the converted model is the plain one, at every batch size and flag."""
    vae = VAE(lambda mu, std: mu + 0.0 * std * torch.randn_like(std), CONTROL[name], once)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x)
    for batch in (x, x[:1], torch.rand(7, 6)):
        torch.testing.assert_close(rv(batch), vae(batch))
    if name == "flag":
        torch.testing.assert_close(rv(x, double=True), vae(x, double=True))
        torch.testing.assert_close(rv(x), vae(x))


class Counting(VAE):
    """Keeps notes: a buffer that it updates, results that a trainer reads, and a counter."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        self.steps.add_(1)
        y = super().forward(x)
        self.kl = y.sum() * 0 + self.steps
        return y


@pytest.mark.parametrize("once", ONCE)
def test_what_forward_keeps_on_the_model_is_kept(once: bool) -> None:
    rv = rvconvert.convert(Counting(SAMPLERS["randn_like"], STRUCTURES["tensor"], once), example_inputs=torch.rand(5, 6))
    assert rv.steps == 0
    rv(torch.rand(5, 6))
    rv(torch.rand(5, 6))
    assert rv.steps == 2
    assert float(rv.kl) == 2.0
    assert float(copy.deepcopy(rv).kl) == 2.0


def test_a_list_that_the_first_call_makes_grows_as_the_plain_models() -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        loss = F.mse_loss(y, x)
        rv.__dict__.setdefault("losses", []).append(loss)
        return loss

    rv: Any = rvconvert.convert(VAE(SAMPLERS["randn_like"], result))
    for _ in range(3):
        rv(torch.rand(5, 6))
    assert len(rv.losses) == 3


@pytest.mark.parametrize("reset", [True, False])
def test_notes_that_the_next_call_does_not_read_are_no_obstacle(reset: bool) -> None:
    class Noting(VAE):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.calls = 1 if reset else self.calls + 1
            return super().forward(x) * self.calls

    vae = Noting(lambda mu, std: mu + 0.0 * torch.randn_like(std), STRUCTURES["tensor"])
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x)
    for _ in range(3):
        torch.testing.assert_close(rv(x), vae(x))
    assert rvconvert.plan(vae, example_inputs=x).lifetime == "kept"


@pytest.mark.parametrize("matters", [True, False])
def test_a_model_that_asks_whether_gradients_are_on(matters: bool) -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        return y * 2 if torch.is_grad_enabled() and matters else y

    vae = VAE(lambda mu, std: mu + 0.0 * torch.randn_like(std), result)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x)
    torch.testing.assert_close(rv(x), vae(x))
    with torch.no_grad():
        torch.testing.assert_close(rv(x), vae(x))
    assert rvconvert.plan(vae, example_inputs=x).lifetime == ("once" if matters else "kept")


@pytest.mark.parametrize("law", [torch.distributions.Categorical, torch.distributions.OneHotCategorical])
def test_a_law_that_checks_its_sample_serves_every_batch_by_one_recording(law: Any) -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        given = law(logits=x).mode
        return law(logits=y).log_prob(given)

    vae = VAE(lambda mu, std: mu + 0.0 * torch.randn_like(std), result)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae)
    for batch in (x, x[:2], x[:1]):
        torch.testing.assert_close(rv(batch), vae(batch))
    assert len(rvconvert.converted.conversion_of(rv).programs) == 1


def test_python_that_decides_by_a_value_is_recorded_at_each_call() -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        return y * 2 if x.sum() > 10 else y

    vae = VAE(lambda mu, std: mu + 0.0 * torch.randn_like(std), result)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x)
    for batch in (x * 0, x * 10):
        torch.testing.assert_close(rv(batch), vae(batch))
    report = rvconvert.plan(vae, example_inputs=x)
    assert report.lifetime == "once" and "decides by the value" in report.reason and "test_capture.py" in report.reason


def test_value_of_a_random_variable_is_refused() -> None:
    vae = VAE(SAMPLERS["randn_like"], lambda y, x, mu, z: y * 2 if y.sum() > 0 else y)
    with pytest.raises(ConversionError, match="value of a random variable"):
        rvconvert.convert(vae, example_inputs=torch.rand(5, 6))


REPORTS: dict[str, Callable[[Tensor], Any]] = {
    "float": float,
    "item": lambda loss: loss.item(),
    "sums of items": lambda loss: 2 * loss.item() + loss.item(),
    "tolist": lambda loss: loss.tolist(),
    "numpy": lambda loss: loss.detach().numpy(),
    "format": lambda loss: f"{loss:.3f} {loss.item():.3f}",
    "format of an item": lambda loss: f"{loss.item():.3f}",
    "round": lambda loss: round(loss.item(), 4),
    "whole number": lambda loss: round(loss.item()),
    "logarithm": lambda loss: {"psnr": [10 * math.log10(1 / loss.item())]}["psnr"][0],
}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("covariance", ["independent", "sampled"])
def test_a_loss_may_be_reported(name: str, covariance: str) -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Any:
        loss = F.mse_loss(y, x)
        return loss, REPORTS[name](loss)

    rv = rvconvert.convert(VAE(SAMPLERS["randn_like"], result), covariance=covariance)
    x, reports = torch.rand(5, 6), []
    for scale in (1, 100):
        loss, report = rv(scale * x)
        loss.backward()
        assert rv.last_penalty > 0 and not isinstance(report, Tensor)
        reports.append(float(report.split()[-1] if isinstance(report, str) else report))
    assert abs(reports[1] - reports[0]) > 10  # that of its own call


def test_a_number_of_the_inputs_is_that_of_each_call() -> None:
    rv = rvconvert.convert(
        VAE(SAMPLERS["randn_like"], lambda y, x, mu, z: (y, math.sqrt(x.max().item()), f"{x.max().item():.3f}"))
    )
    x = torch.rand(5, 6)
    for scale in (1, 4):
        _, root, text = rv(scale * x)
        assert root == pytest.approx(math.sqrt(scale * x.max())) and text == f"{scale * x.max():.3f}"


@pytest.mark.parametrize("covariance", ["independent", "calibrated"])
def test_an_image_may_be_reported(covariance: str) -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Any:
        return F.mse_loss(y, x), y.detach().cpu().numpy(), z.tolist()

    rv = rvconvert.convert(VAE(SAMPLERS["randn_like"], result), covariance=covariance)
    x, images = torch.rand(5, 6), []
    for _ in range(2):
        loss, image, codes = rv(x)
        loss.backward()
        images.append(image)
        assert rv.last_penalty > 0 and image.shape == (5, 6) and len(codes) == 5
    assert not np.array_equal(*images)  # of a draw, as the plain model reports


@pytest.mark.parametrize("decision", [lambda loss: loss > 0, lambda loss: loss.item() > 0, bool])
def test_a_decision_by_a_loss_is_refused(decision: Callable[[Tensor], Any]) -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        loss = F.mse_loss(y, x)
        return 2 * loss if decision(loss) else loss

    with pytest.raises(ConversionError, match="value of a random variable"):
        rvconvert.convert(VAE(SAMPLERS["randn_like"], result), example_inputs=torch.rand(5, 6))


@pytest.mark.parametrize(
    "use",
    [
        lambda y: y + torch.as_tensor(np.argmax(y.detach().numpy(), 1, keepdims=True)),
        lambda y: y if y.detach().numpy().mean() > 0 else -y,
        lambda y: y / max(map(max, y.tolist())),
        lambda y: y + torch.from_numpy(np.clip(y.detach().numpy(), 0, 1)),
        lambda y: 2 * y if y.detach().numpy().max() > 0.5 else y,
    ],
)
def test_a_reported_image_that_comes_back_is_refused(use: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ConversionError, match="value of a random variable"):
        rvconvert.convert(VAE(SAMPLERS["randn_like"], lambda y, x, mu, z: use(y)), example_inputs=torch.rand(5, 6))


def test_a_write_by_numpy_is_refused() -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Tensor:
        y.detach().numpy()[:, 0] = 0.0
        return y

    with pytest.raises(TracingError, match=r"NumPy writes to the memory of a tensor; write by torch"):
        rvconvert.convert(VAE(SAMPLERS["randn_like"], result), example_inputs=torch.rand(5, 6))


@pytest.mark.parametrize(
    "use",
    [
        lambda loss: loss / float(loss),
        lambda loss: loss * (1 + loss.detach().numpy()).item(),
        lambda loss: loss + torch.tensor(loss.tolist()),
        lambda loss: 2 * loss if float(loss) > 0.5 else loss,
    ],
)
def test_a_reported_value_that_comes_back_is_refused(use: Callable[[Tensor], Any]) -> None:
    def result(y: Tensor, x: Tensor, mu: Tensor, z: Tensor) -> Any:
        return y, use(F.mse_loss(y, x))

    with pytest.raises(ConversionError, match="value of a random variable"):
        rvconvert.convert(VAE(SAMPLERS["randn_like"], result), example_inputs=torch.rand(5, 6))


class OnlyInTraining(VAE):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + logvar.exp() * torch.randn_like(mu) if self.training else mu
        return self.decoder(z)


@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_samples_in_training_alone(training: bool, examples: bool) -> None:
    vae = OnlyInTraining(SAMPLERS["randn_like"], STRUCTURES["tensor"]).train(training)
    x = torch.rand(5, 6)
    rv = rvconvert.convert(vae, example_inputs=x if examples else None)
    for mode in (False, True, False):
        rv.train(mode)
        before = rv.last_penalty
        torch.testing.assert_close(rv(x), rv.decoder(rv.encoder(x)[:, :4]))
        assert (rv.last_penalty is not before) == mode


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm, self.decoder = nn.LazyLinear(8), nn.BatchNorm1d(4), nn.LazyLinear(6)

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.encoder(x).chunk(2, -1)
        return self.decoder(self.norm(mu + logvar.exp() * torch.randn_like(mu)))


class BuiltAtFirst(Lazy):
    """Makes its layers when it sees how wide its input is."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.decoder: Any = None
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.decoder is None:
            self.encoder, self.decoder = nn.Linear(x.shape[1], 8), nn.Linear(4, 6)
        return super().forward(x)


@pytest.mark.parametrize("examples", [True, False])
@pytest.mark.parametrize("covariance", ["independent", "sampled", "lowrank", "calibrated"])
@pytest.mark.parametrize("cls", [Lazy, BuiltAtFirst])
def test_layers_made_at_the_first_call_are_the_models(cls: type[nn.Module], covariance: str, examples: bool) -> None:
    x = torch.rand(5, 6)
    rv: Any = rvconvert.convert(cls(), covariance=covariance, example_inputs=x if examples else None)
    rv(x).square().mean().backward()
    assert rv.last_penalty > 0
    assert all(p.grad is not None for p in rv.parameters()) and len(rv.state_dict()) == 9
    assert rv.norm.num_batches_tracked == 1
    made = rv.decoder.weight
    rv(x)
    assert rv.decoder.weight is made
    rvconvert.to_plain(rv)(x)


def test_several_latents_of_a_hierarchy() -> None:
    class Ladder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.prior, self.d = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            m1, s1 = self.e(x).chunk(2, -1)
            z1 = m1 + s1.exp() * torch.randn_like(s1)
            m2, s2 = self.prior(z1).chunk(2, -1)
            z2 = m2 + F.softplus(s2) * torch.randn_like(s2)
            return self.d(torch.cat([z1, z2], 1)), z2, m2

    x = torch.rand(5, 6)
    model = Ladder()
    y = rvconvert.convert(model, example_inputs=x, output="distribution")(x)[0]
    rv = rvconvert.convert(model, example_inputs=x)
    rv(x)
    torch.testing.assert_close(rv.last_penalty, 50 * y.var.square().mean())


def test_wrapped_tied_frozen_shared_and_on_meta() -> None:
    x = torch.rand(5, 6)
    vae = VAE(SAMPLERS["randn_like"], STRUCTURES["tensor"])
    vae.tied = nn.Linear(4, 6)
    vae.tied.weight = vae.decoder.weight
    vae.same = vae.decoder
    for parameter in vae.encoder.parameters():
        parameter.requires_grad_(False)
    rv = rvconvert.convert(nn.DataParallel(vae), example_inputs=x)
    assert rv.module.tied.weight is rv.module.decoder.weight and rv.module.same is rv.module.decoder
    rv(x).sum().backward()
    assert rv.module.encoder.weight.grad is None and rv.module.decoder.weight.grad is not None
    assert rvconvert.convert(copy.deepcopy(vae).to("meta"), example_inputs=x.to("meta"))(x.to("meta")).shape == (5, 6)
    assert rvconvert.convert(copy.deepcopy(vae).double(), example_inputs=x.double())(x.double()).dtype == torch.float64


def test_a_hook_on_a_container_still_runs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = VAE(SAMPLERS["randn_like"], STRUCTURES["tensor"])

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, calls = Model(), []
    model.inner.register_forward_hook(lambda *a: calls.append("container"))
    model.inner.decoder.register_forward_hook(lambda *a: calls.append("layer"))
    rv = rvconvert.convert(model, example_inputs=torch.rand(5, 6))
    calls.clear()
    rv(torch.rand(5, 6))
    assert calls == ["layer", "container"]


def test_backward_hooks_of_a_decoder_s_modules_are_told_of() -> None:
    """A mean and a variance have no gradient of a module; an encoder's layer has, and its hook is called."""
    calls: list[str] = []
    rv = rvconvert.convert(VAE(SAMPLERS["randn_like"], STRUCTURES["tensor"]))
    rv.encoder.register_full_backward_hook(lambda *a: calls.append("encoder"))
    x = torch.rand(5, 6, requires_grad=True)
    rv(x).sum().backward()
    assert calls == ["encoder"]
    rv.decoder.register_full_backward_hook(lambda *a: calls.append("decoder"))
    with pytest.warns(UserWarning, match=r"backward hooks of decoder are not called"):
        rv(x)


STATES = {
    "weights of its own": lambda m, z: functional_call(m.layers, {k: 0.5 * v for k, v in m.layers.named_parameters()}, (z,)),
    "conditioned": lambda m, z: functional_call(m.layers[3], {"bias": m.shift(m.layers[0](z[:1]))[0]}, (m.layers[0](z),)),
    "in eval mode for a call": lambda m, z: (m.layers.eval(), m.layers(z), m.layers.train())[1],
    "a layer's mode": lambda m, z: (m.layers[1].train(False), m.layers(z), m.layers[1].train())[1],
    "slope": lambda m, z: (setattr(m.layers[2], "negative_slope", 0.9), m.layers(z), setattr(m.layers[2], "negative_slope", 0.1))[
        1
    ],
}


@pytest.mark.parametrize("name", STATES)
def test_a_layer_is_called_in_the_state_that_it_has_at_the_call(name: str) -> None:
    """By functional_call, hypernetworks and teachers; by eval() and train(), the second pass of an introspective model."""

    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.1), nn.Linear(8, 12)
            self.encoder, self.layers, self.shift = nn.Linear(12, 6), nn.Sequential(*layers), nn.Linear(8, 12)
            layers[1].running_mean.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.encoder(x).chunk(2, 1)
            return STATES[name](self, mu + torch.randn_like(mu) * (0.5 * logvar - 20).exp())

    x, plain = torch.rand(5, 12), Stateful()
    rv = rvconvert.convert(plain)
    for _ in range(2):
        y, expected = rv(x), plain(x)
        torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    for (path, own), other in zip(rv.named_parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None), path
    assert rv.last_penalty >= 0


class Quantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.codes = nn.Linear(6, 6), nn.Embedding(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(self.layer(x), self.codes.weight).argmin(1)
        return self.layer(self.codes(nearest))


def test_vector_quantization_is_refused() -> None:
    with pytest.raises(NoReparameterizationError, match=r"vector quantization.*test_capture.py"):
        rvconvert.convert(Quantizer(), example_inputs=torch.rand(5, 6))


def test_dropout_in_the_encoder_stays_plain() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.d, self.dropout = nn.Linear(6, 8), nn.Linear(4, 6), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = self.e(self.dropout(x)).chunk(2, -1)
            return self.d(mu + torch.randn_like(mu) * logvar.exp())

    x = torch.rand(5, 6)
    rv = rvconvert.convert(Model(), example_inputs=x)
    assert not torch.equal(rv(x), rv(x))
    assert torch.equal(rv.eval()(x), rv(x))


def written_through_view(z, linear):
    h = linear(z)
    h.view(-1, 2, 3).relu_()
    return h


def written_under_view(z, linear):
    h = linear(z)
    view = h[:, :3]
    h.mul_(2.0)
    return view


def written_through_detached(z, linear):
    h = linear(z)
    kept = h.detach()
    h.mul_(3.0)
    return kept * 1


def added_to_stale_view(z, linear):
    h = linear(z)
    other = h.flip(1)
    h.view(-1, 2, 3).relu_()
    other += h
    return other


def diagonal_of_a_matrix(z, linear):
    h = linear(z)[:, :4].reshape(-1, 2, 2).contiguous()
    h.view(-1, 4)[:, ::3] += 1  # as torch.distributions.LowRankMultivariateNormal does
    return h


def augmented_slice(z, linear):
    h = linear(z)
    h[:, 0] += 1.0
    h[:, 1:3] *= 2.0
    return h


def contiguous_is_itself(z, linear):
    h = linear(z)
    kept = h.contiguous()
    h.mul_(3.0)
    return kept


def rebound_view(z, linear):
    h = linear(z)
    h = h.view(-1, 2, 3)
    h.relu_()
    h = h.flatten(1)
    h += 1
    return h


def clamped_without_gradient(z, linear):
    h = linear(z)
    h.detach().clamp_(min=0.1)  # as torch.distributions.Gamma does
    return h


def decoder_of(function, once=False):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, z):
            assert_read(self.linear.weight, once)
            return function(z, self.linear)

    torch.manual_seed(0)
    return Decoder()


STALE = [written_under_view, written_through_detached]


@pytest.mark.parametrize("function", STALE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("once", ONCE)
def test_memory_written_through_a_view_is_refused(function, once):
    """The base of a view would miss what was written through it."""
    z = RandomVariable(torch.randn(3, 4), torch.rand(3, 4))
    with pytest.raises(rvconvert.ConversionError, match=r"in place through a view|in-place write through a view"):
        rvconvert.convert(decoder_of(function, once), random_inputs=("z",))(z)


SEEN = [
    augmented_slice, contiguous_is_itself, rebound_view, clamped_without_gradient, written_through_view, added_to_stale_view,
    diagonal_of_a_matrix,
]  # fmt: skip


@pytest.mark.parametrize("function", SEEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("covariance", ["independent", "lowrank", "sampled"])
def test_writes_that_every_holder_sees_are_not_refused(function, covariance):
    decoder, mean = decoder_of(function, True), torch.randn(3, 4)
    rv = rvconvert.convert(decoder, random_inputs=("z",), covariance=covariance)
    with torch.no_grad():
        assert torch.allclose(rv(RandomVariable(mean, torch.zeros(3, 4))), decoder(mean), atol=1e-6)
    if function is clamped_without_gradient:
        rv(RandomVariable(mean, torch.zeros(3, 4))).sum().backward()
        decoder(mean).sum().backward()
        torch.testing.assert_close(rv.linear.weight.grad, decoder.linear.weight.grad)


@pytest.mark.parametrize("name", ["T", "mT", "H", "mH", "real", "data"])
@pytest.mark.parametrize("once", ONCE)
def test_views_spelled_as_properties_of_a_tensor_are_converted(name, once):
    """Once refused as operations without a rule."""
    decoder = decoder_of(lambda z, linear: getattr(linear(z), name) * 2, once)
    mean, var = torch.randn(3, 4), torch.rand(3, 4)
    y = rvconvert.convert(decoder, random_inputs=("z",), output="distribution")(RandomVariable(mean, var))
    with torch.no_grad():
        assert torch.allclose(y.mean, decoder(mean), atol=1e-6)
        plain = var @ decoder.linear.weight.square().T
        assert torch.allclose(y.var, 4 * getattr(plain, name), atol=1e-6)


def function_of_overwritten(z, linear):
    h = linear(z)
    a, b = torch.relu(h), torch.sigmoid(h)
    h.mul_(5.0)
    return a * b


def function_and_its_successor(z, linear):
    h = linear(z)
    a = torch.tanh(h)
    b = h.sigmoid_()
    return a * b


def augmented_by_a_function_of_itself(z, linear):
    h = linear(z)
    h += torch.relu(h)
    return h


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (function_of_overwritten, lambda x: torch.relu(x) * torch.sigmoid(x)),
        (function_and_its_successor, lambda x: torch.tanh(x) * torch.sigmoid(x)),
        (augmented_by_a_function_of_itself, lambda x: x + torch.relu(x)),
    ],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("once", ONCE)
def test_functions_of_a_variable_stay_so_when_it_is_overwritten(function, same, once):
    """Once wrong: they were taken as functions of what was written, or as independent of each other."""
    decoder = decoder_of(function, once)
    z = RandomVariable(torch.randn(3, 4), torch.rand(3, 4))
    y = rvconvert.convert(decoder, random_inputs=("z",), output="distribution")(z)
    expected = same(decoder.linear(z))
    assert torch.allclose(y.mean, expected.mean, atol=1e-6)
    assert torch.allclose(y.var, expected.var, atol=1e-6)


class WritesToItsInput(VAE):
    def forward(self, x):
        return super().forward(x.mul_(2.0))


@pytest.mark.parametrize("once", ONCE)
def test_a_model_that_writes_to_its_input_gives_the_same_at_the_first_call(once):
    """Once captured on the caller's own tensors, which were then scaled twice or more before they were used."""
    torch.manual_seed(0)
    vae = WritesToItsInput(lambda mu, std: mu + std * torch.randn_like(mu), lambda y, mu, logvar, z: (y, mu))
    x = torch.randn(3, 6)
    rv = rvconvert.convert(vae)
    given = x.clone()
    with torch.no_grad():
        mu = rv(given)[1]
        assert torch.allclose(given, 2 * x)
        assert torch.allclose(mu, vae(x.clone())[1])
        decoder = decoder_of(lambda z, linear: linear(z) + z.mul_(3.0)[:, :1])
        mean = torch.randn(3, 4)
        latent = RandomVariable(mean.clone(), torch.zeros(3, 4))
        y = rvconvert.convert(decoder, random_inputs=("z",))(latent)
        assert torch.allclose(y, decoder(mean.clone()), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_maximum_of_two_lines_is_split_where_they_meet(dtype):
    """Once off by a third of the deviation where that was small: the kink of maximum(x, 0.2 x) was not known."""
    x = RandomVariable(torch.linspace(-0.01, 0.01, 9, dtype=dtype), torch.full((9,), 1e-5, dtype=dtype))
    for written, named in (
        (torch.maximum(x, 0.2 * x), F.leaky_relu(x, 0.2)),
        (torch.minimum(1 - x, 1 + x), 1 - x.abs()),
        (torch.where(x > -x, x, x * 0), F.relu(x)),
    ):
        assert torch.allclose(written.mean, named.mean, atol=1e-7)
        assert torch.allclose(written.var, named.var, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("once", ONCE)
def test_a_cast_to_its_own_type_is_the_variable_itself(once):
    """Once another variable, so that x * x.float() was a product of independent ones."""
    decoder = decoder_of(lambda z, linear: (lambda h: h * h.float().contiguous())(linear(z)), once)
    z = RandomVariable(torch.randn(3, 4), torch.rand(3, 4))
    y = rvconvert.convert(decoder, random_inputs=("z",), output="distribution")(z)
    expected = decoder.linear(z).square()
    assert torch.allclose(y.mean, expected.mean, atol=1e-5)
    assert torch.allclose(y.var, expected.var, rtol=1e-3)


FIELDS = [lambda x: torch.sort(x, 1).values, lambda x: x.max(-1).values, lambda x: torch.topk(x, 2).values]


@pytest.mark.parametrize("function", FIELDS, ids=("sort", "max", "topk"))
@pytest.mark.parametrize("once", ONCE)
def test_a_named_field_of_several_results_is_converted_without_example_inputs(function, once):
    decoder = decoder_of(lambda z, linear: function(linear(z)), once)
    mean = torch.randn(3, 4)
    y = rvconvert.convert(decoder, random_inputs=("z",))(RandomVariable(mean, torch.zeros(3, 4)))
    assert torch.allclose(y, decoder(mean), atol=1e-6)


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "clamp_": lambda m: m.scale.clamp_(0, 1),
    "copy_": lambda m: m.scale.copy_(m.scale.clamp(0, 1)),
    "assigned": lambda m: setattr(m, "scale", m.scale.clamp_(0, 1)),
    "a layer's": lambda m: m.decoder.weight.clamp_(-0.1, 0.1),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_parameter_that_forward_keeps_in_a_range_without_gradients(name: str) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)
            self.scale = nn.Parameter(torch.tensor([1.5, -0.5, 0.5]))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                WRITES[name](self)
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(self.scale * mu + torch.randn_like(mu) * (0.5 * logvar - 20).exp())

    plain, x = Clamped(), torch.rand(5, 6)
    rv = rvconvert.convert(plain)
    for _ in range(3):
        for model in (plain, rv):
            model(x).square().sum().backward()
            with torch.no_grad():
                model.scale.add_(0.3)
                model.decoder.weight.mul_(3)
        for a, b in zip(plain.parameters(), rv.parameters(), strict=True):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_variable_of_a_tensor_has_no_gradient_of_it(requires_grad: bool) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            mu, logvar = (torch.autograd.Variable(h, requires_grad=requires_grad) for h in self.encoder(x).chunk(2, 1))
            return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp())

    rv = rvconvert.convert(Wrapped())
    rv(torch.rand(5, 6)).sum().backward()
    assert rv.encoder.weight.grad is None and rv.decoder.weight.grad is not None


def test_a_batch_that_forward_writes_into_and_returns_is_the_caller_s() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(3, 6)

        def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch["mu"], batch["logvar"] = self.encoder(batch["x"]).chunk(2, 1)
            batch["output"] = self.decoder(batch["mu"] + torch.randn_like(batch["mu"]) * (0.5 * batch["logvar"]).exp())
            return batch

    rv = rvconvert.convert(Writes())
    for size in (5, 4, 5):
        batch = {"x": torch.rand(size, 6), "output": None, "name": "a"}
        result = rv(batch)
        assert result is batch and list(batch) == ["x", "output", "name", "mu", "logvar"]
        torch.testing.assert_close(batch["output"], rv.decoder(batch["mu"]))
        batch["output"].sum().backward()
        assert rv.encoder.weight.grad is not None


@torch.compile(backend="eager")
def compiled_error(y, x):
    return (y - x).square().view(x.shape[0] * x.shape[1]).mean()


def test_functions_that_are_compiled_on_their_own_are_recorded_as_python():
    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(3, 8)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu))
            return y, compiled_error(y, x)

    x = torch.rand(4, 8)
    y, loss = rvconvert.convert(Compiled())(x)
    assert float(loss) == pytest.approx(float((y - x).square().mean()))


@pytest.mark.parametrize("share", [0.5, np.float64(0.5), np.float32(0.5)])
def test_a_share_of_the_batch_may_be_a_number_of_numpy(share):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(8, 6), nn.Linear(3, 8)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            k = int(mu.shape[0] * share)
            mu = torch.cat([mu[:k], 2 * mu[k:]])
            return self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu))

    assert rvconvert.plan(Shared(), example_inputs=torch.rand(6, 8)).lifetime == "kept"


THROUGH_VIEWS = {
    "a mask of a view": "y[:, :3][x[:, 0] > 0.5] = 0",
    "a factor for a mask of a view": "y[:, :3][x[:, 0] > 0.5] *= -1",
    "a view of a view": "y[:, 1:5][:, 2] = y[:, 0]",
    "added to a view of a view": "y[:, 1:5][:, 2] += 1",
    "a function in place": "y[:, 0].mul_(2)",
    "twice, then the whole": "v = y[:, :4]\nv += 1\nv *= 2\ny[:, 2] += 1",
    "the view after the whole was written": "v = y[:, :2]\nv.mul_(2)\ny[:, 2:4] = v",
    "in a loop": "for i in range(4):\n    y[:, i] += y[:, i + 1]",
    "itself": "y[:, :2] = y[:, :2]",
}


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("name", THROUGH_VIEWS)
def test_what_is_written_through_a_view_is_written_in_the_whole(name, counts):
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.decoder, self.calls = nn.Linear(8, 6), nn.Linear(3, 8), 0

        def forward(self, x):
            self.calls += counts
            mu, logvar = self.encoder(x).chunk(2, 1)
            y = self.decoder(mu + (logvar / 2).exp() * torch.randn_like(mu)) * 1
            exec(THROUGH_VIEWS[name], {"y": y, "x": x})
            return y * 2

    plain, x = Written(), torch.rand(6, 8, generator=torch.Generator().manual_seed(1))
    y = rvconvert.convert(plain, output="distribution", covariance="lowrank")(x)
    with torch.no_grad():
        drawn = torch.stack([plain(x) for _ in range(2000)])
    assert ((y.mean - drawn.mean(0)).abs() < 0.15 * drawn.std(0) + 1e-5).all()
    assert float(y.var.sum()) == pytest.approx(float(drawn.var(0).sum()), rel=0.05)


class Semisupervised(nn.Module):
    """A classifier on as many examples as are labelled; ``loss`` takes what it gives for these, and their labels."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder, self.classifier = nn.Linear(6, 8), nn.Linear(4, 6), nn.Linear(4, 3)
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + torch.randn_like(mu) * (0.5 * logvar).exp()), self.loss(self.classifier, mu, y)


COUNTED: dict[str, tuple[bool, Callable[..., Tensor]]] = {  # whether Python knows how many there are, and the loss
    "mean": (False, lambda f, mu, y: F.cross_entropy(f(mu[y >= 0]), y[y >= 0], reduction="sum") / (1 + (y >= 0).sum())),
    "shape": (False, lambda f, mu, y: f(mu[y >= 0]).sum() / (mu[y >= 0].shape[0] + 1) + f(mu)[y >= 0].chunk(3, 1)[1].sum()),
    "len": (True, lambda f, mu, y: F.cross_entropy(f(mu[y >= 0]), y[y >= 0], reduction="sum") / max(len(y[y >= 0]), 1)),
    "numel": (False, lambda f, mu, y: f(mu[y >= 0]).sum() / (y[y >= 0].numel() + 1)),
    "a branch": (True, lambda f, mu, y: f(mu[(y >= 0).nonzero()[:, 0]]).mean() if (y >= 0).nonzero().size(0) > 2 else mu.sum()),
    "a loop over classes": (True, lambda f, mu, y: torch.stack([f(mu[y == c]).mean() for c in torch.unique(y)]).sum()),
    "a length": (True, lambda f, mu, y: F.cross_entropy(f(mu[y >= 0]), torch.ones(len(mu[y >= 0]), dtype=torch.long))),
    "unbind": (True, lambda f, mu, y: sum(each.square().sum() for each in mu.masked_select((y >= 0)[:, None]).unbind())),
    "a loop": (True, lambda f, mu, y: sum(f(mu[y >= 0][i]).sum() for i in range(mu[y >= 0].size(0)))),
    "a logarithm": (True, lambda f, mu, y: f(mu[y >= 0]).sum() * math.log(1 + mu[y >= 0].size(0)) / mu.size(0)),
    "part of a list": (True, lambda f, mu, y: f(torch.stack(list(mu)[: y[y >= 0].shape[0]])).sum()),
    "the middle of a size": (False, lambda f, mu, y: f(torch.zeros(*mu[y >= 0].shape)).sum()),
    "a number to a tensor's value": (True, lambda f, mu, y: f(mu).sum() * len(torch.arange((y >= 0).sum()))),
    "in Python and in an operation": (
        True,
        lambda f, mu, y: f(mu).sum() / (n := y[y >= 0].shape[0]) * math.log(n),
    ),
    "columns by a mask of the model's": (False, lambda f, mu, y: f(mu)[:, torch.tensor([True, False, True])].sum() / len(y)),
    "a mean of the rows": (False, lambda f, mu, y: f(mu - mu[y >= 0].mean(0)).sum() / len(mu - mu[y >= 0].mean(0))),
    "classes that are counted": (
        False,
        lambda f, mu, y: torch.bincount(y.clamp(min=0), minlength=4)[y.clamp(min=0)].sum() / len(y),
    ),
    "in the middle": (True, lambda f, mu, y: f(mu.t()[:, y >= 0].t()).sum() / len(mu.t()[:, y >= 0].t())),
}


@pytest.mark.parametrize("name", COUNTED)
def test_as_many_rows_as_a_mask_selects_are_counted_at_each_call(name: str) -> None:
    known, loss = COUNTED[name]
    vae = Semisupervised(loss)
    rv = rvconvert.convert(vae)
    x = torch.rand(8, 6, generator=torch.Generator().manual_seed(1))
    for labels in ([0, 1, 2, -1, -1, 0, -1, 2], [0, -1, -1, -1, -1, -1, -1, 1], [0, 1, 2, 0, 1, 0, 1, 2]):
        y = torch.tensor(labels)
        torch.testing.assert_close(rv(x, y)[1], vae(x, y)[1])
    y = torch.tensor([0, 1, 2, -1, -1, 0, -1, 2])
    report = rvconvert.plan(vae, example_inputs=(x, y))
    assert (report.lifetime == "once" and ("decides by the value" in report.reason or "values decide" in report.reason)) == known


def test_as_many_steps_as_the_longest_of_a_packed_batch_are_counted_at_each_call() -> None:
    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.head, self.decoder = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 4), nn.Linear(2, 5)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            steps, last = self.encoder(packed)
            padded, _ = nn.utils.rnn.pad_packed_sequence(steps, batch_first=True)
            mu, logvar = self.head(last[0]).chunk(2, 1)
            z = mu + 1e-4 * torch.randn_like(mu) * logvar
            return torch.stack([self.decoder(z * (t + 1)) for t in range(padded.size(1))], 1)

    vae, x = Sentences(), torch.rand(3, 7, 5)
    rv = rvconvert.convert(vae)
    for lengths in ([3, 2, 1], [7, 1, 2], [1, 1, 1]):
        torch.testing.assert_close(rv(x, torch.tensor(lengths)), vae(x, torch.tensor(lengths)), rtol=0, atol=5e-3)
    more = torch.rand(5, 7, 5), torch.tensor([3, 7, 1, 2, 7])  # whose order torch counts for itself
    torch.testing.assert_close(rv(*more), vae(*more), rtol=0, atol=5e-3)
