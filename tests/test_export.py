"""Files for other runtimes: deterministic, equal to torch, nothing drawn in them; in onnxruntime where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvconvert
from rvconvert.cli.demo import DigitVAE
from rvconvert.cli.main import main
from rvconvert.errors import CheckpointError, ConversionError
from tests.interop.test_packages import package
from tests.models import VanillaVAE

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import beta_tcvae  # noqa: E402
import dc_vae  # noqa: E402
import soft_intro_vae  # noqa: E402
import vae  # noqa: E402

# The paper's four systems, small: model, input, and what is exported of it.
SYSTEMS: dict[str, Callable[[], tuple[nn.Module, Tensor, str]]] = {
    "vae": lambda: (vae.VanillaVAE(1, 4, (4, 8), 16), torch.rand(4, 1, 16, 16), "forward"),
    "beta_tcvae": lambda: (beta_tcvae.BetaTCVAE(1, 4, (4, 4, 8, 8), 32, 16), torch.rand(4, 1, 32, 32), "forward"),
    "dc_vae": lambda: (dc_vae.Decoder(4, 1, 8, 32), torch.randn(4, 4), "forward"),
    "soft_intro_vae": lambda: (soft_intro_vae.Decoder(1, 4, (4, 8, 8), 32), torch.randn(4, 4), "forward"),
}


def warmed_up(model: nn.Module, x: Tensor) -> nn.Module:
    """With statistics of its batch norms that are not those of a new model."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


def from_the_mean(model: nn.Module, x: Tensor, method: str) -> Tensor:
    if hasattr(model, "encode"):
        return model.decode(model.encode(x)[0])
    return getattr(model, method)(x)


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a file, in onnxruntime or torch."""
    if path.suffix == ".pt2":
        return list(torch.export.load(path).module()(*inputs))
    session = package("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return [torch.from_numpy(x) for x in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})]


@pytest.fixture(params=[".onnx", ".pt2"])
def suffix(request: pytest.FixtureRequest) -> str:
    if request.param == ".onnx":
        package("onnxscript")
        package("onnxruntime")
    return request.param


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_four_systems_decode_as_torch_does(system: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, method = SYSTEMS[system]()
    warmed_up(model, x)
    path = rvconvert.export(model, tmp_path / f"{system}{suffix}", x, method=method)
    another = torch.rand(7, *x.shape[1:])  # another batch size too
    expected = from_the_mean(model, another, method).detach()
    for _ in range(2):
        torch.testing.assert_close(run(path, another)[0], expected, rtol=1e-4, atol=1e-4)


def test_the_deviation_of_every_pixel_is_an_output(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(4, 3, 16, 16)
    model = warmed_up(VanillaVAE(), x)
    path = rvconvert.export(model, tmp_path / f"vae{suffix}", x, deviation=True)
    expected = rvconvert.convert(model, output="distribution", attach=False)(x)[0]
    found = run(path, x)
    torch.testing.assert_close(found[0], expected.mean.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[-1], expected.std.detach(), rtol=1e-4, atol=1e-5)


def test_a_random_input_is_a_mean_and_a_variance(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6)).eval()
    mean, var = torch.randn(5, 4), torch.rand(5, 4)
    path = rvconvert.export(decoder, tmp_path / f"d{suffix}", mean, deviation=True, random_inputs=("input",))
    options: dict[str, Any] = {"random_inputs": ("input",), "output": "distribution"}
    expected = rvconvert.convert(decoder, **options)(rvconvert.RandomVariable(mean, var))
    found = run(path, mean, var)
    torch.testing.assert_close(found[0], expected.mean.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], expected.std.detach(), rtol=1e-4, atol=1e-5)


def test_a_converted_model_exports_as_the_plain_one(tmp_path: Path) -> None:
    x = torch.rand(4, 3, 16, 16)
    model = warmed_up(VanillaVAE(), x)
    path = rvconvert.export(rvconvert.convert(model), tmp_path / "vae.pt2", x)
    torch.testing.assert_close(run(path, x)[0], from_the_mean(model, x, "forward").detach())


def test_names_say_what_is_what(tmp_path: Path) -> None:
    package("onnxscript")
    path = rvconvert.export(VanillaVAE().eval(), tmp_path / "vae.onnx", torch.rand(4, 3, 16, 16), deviation=True)
    graph = package("onnx").load(path).graph
    assert [each.name for each in graph.input] == ["x"]
    assert [each.name for each in graph.output] == [*(f"output_{i}" for i in range(4)), "deviation"]
    assert not {node.op_type for node in graph.node} & {"RandomNormal", "RandomNormalLike", "RandomUniform", "Bernoulli"}


class Laplace(nn.Module):
    """A Laplace posterior, and a mask on the reconstruction that goes on drawing if ``masked``."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.encoder, self.decoder, self.masked = nn.Linear(3, 4), nn.Linear(2, 3), masked

    def forward(self, x: Tensor) -> Tensor:
        loc, scale = self.encoder(x).chunk(2, -1)
        u = torch.rand_like(loc) - 0.5
        y = self.decoder(loc - scale.exp() * u.sign() * torch.log1p(-2 * u.abs()))
        return torch.where(torch.rand_like(y) > 0.3, y, 0.0) if self.masked else y


def test_a_latent_of_another_law_is_put_at_its_mean(tmp_path: Path) -> None:
    model, x = Laplace(masked=False), torch.rand(4, 3)
    path = rvconvert.export(model, tmp_path / "m.pt2", x)
    torch.testing.assert_close(run(path, x)[0], model.decoder(model.encoder(x)[:, :2]).detach())


class NormalPosterior(nn.Module):
    """A posterior of torch.distributions, whose checks of its arguments no exporter follows."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        loc, scale = self.encoder(x).chunk(2, -1)
        return self.decoder(torch.distributions.Normal(loc, scale.exp()).rsample())


def test_a_posterior_of_torch_distributions_exports(tmp_path: Path) -> None:
    model, x, checks = NormalPosterior(), torch.rand(4, 3), torch.distributions.Distribution._validate_args
    path = rvconvert.export(model, tmp_path / "m.pt2", x)
    torch.testing.assert_close(run(path, x)[0], model.decoder(model.encoder(x)[:, :2]).detach())
    assert torch.distributions.Distribution._validate_args is checks


def test_refusals(tmp_path: Path) -> None:
    model, x = Laplace(masked=True), torch.rand(4, 3)
    with pytest.raises(CheckpointError, match=r"must end in \.onnx or \.pt2"):
        rvconvert.export(model, tmp_path / "m.pt", x)
    with pytest.raises(ConversionError, match="draws random numbers other than its latents"):
        rvconvert.export(model, tmp_path / "m.pt2", x)
    sampled = rvconvert.convert(VanillaVAE(), covariance="sampled")
    with pytest.raises(ConversionError, match="draws its paths at each call"):
        rvconvert.export(sampled, tmp_path / "m.pt2", torch.rand(4, 3, 16, 16), deviation=True)
    with pytest.raises(ConversionError, match="export the deviation in calibrated mode"):
        rvconvert.export(VanillaVAE(), tmp_path / "m.pt2", torch.rand(4, 3, 16, 16), deviation=True, covariance="lowrank")
    images = torch.rand(4, 3, 16, 16)
    with pytest.raises(ConversionError, match="covariance: they say what the deviation is: deviation=True"):
        rvconvert.export(VanillaVAE(), tmp_path / "m.pt2", images, covariance="calibrated")
    with pytest.raises(ConversionError, match="covariance: a converted model has its own"):
        rvconvert.export(rvconvert.convert(VanillaVAE()), tmp_path / "m.pt2", images, deviation=True, covariance="calibrated")
    (tmp_path / "there.pt2").touch()
    with pytest.raises(CheckpointError, match="--force"):
        rvconvert.export(VanillaVAE(), tmp_path / "there.pt2", torch.rand(4, 3, 16, 16))
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    model = "rvconvert.cli.demo:DigitVAE"
    rv = rvconvert.convert(DigitVAE()).eval()
    rvconvert.save(rv, "rv.pt", kwargs={})
    common = ["--example-shape", "4,1,8,8", "--checkpoint", "rv.pt"]
    assert main(["export", model, "vae.pt2", *common]) == 0
    assert "vae.pt2: DigitVAE.forward, deterministic" in capsys.readouterr().out
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(run(tmp_path / "vae.pt2", x)[0], from_the_mean(rvconvert.to_plain(rv), x, "forward").detach())
    assert main(["export", model, "std.pt2", *common, "--deviation"]) == 0
    assert len(run(tmp_path / "std.pt2", x)) == 4
    assert main(["export", model, "vae.pt2", *common]) == 1
    assert main(["export", model, "other.pt2"]) == 1
    assert "give --example-shape" in capsys.readouterr().err
