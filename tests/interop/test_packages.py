"""VAEs of other packages, unedited: pip install '.[interop]'. Random weights, small configurations."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvconvert
from rvconvert.core.tree import flatten

pytestmark = pytest.mark.filterwarnings("ignore")


def package(name: str) -> Any:
    """The package; where it must be there (RVCONVERT_INTEROP is set), its absence is a failure, not a skip."""
    return importlib.import_module(name) if "RVCONVERT_INTEROP" in os.environ else pytest.importorskip(name)


def pythae(model: str, **options: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    models = package("pythae.models")
    config = getattr(models, next(n for n in (f"{model}Config", f"{model}_Config") if hasattr(models, n)))
    return (
        getattr(models, model)(config(input_dim=(1, 28, 28), latent_dim=4, **options)),
        ({"data": torch.rand(4, 1, 28, 28)},),
        {},
    )


def diffusers(model: str, *shape: int, **options: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made = getattr(package("diffusers"), model)(latent_channels=4, in_channels=3, out_channels=3, **options)
    return made, (torch.randn(*shape),), {"sample_posterior": True}


def monai(model: str, *shape: int, **options: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return getattr(package("monai.networks.nets"), model)(**options), (torch.rand(*shape),), {}


def riffly(
    module: str, model: str, *args: Any, features: int = 48, **options: Any
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    return getattr(package(f"riffly.models.{module}"), model)(*args, **options), (torch.rand(4, features),), {}


def pi_vae() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made = package("pi_vae_pytorch.pivae").PiVAE(10, 3, 2, encoder_hidden_layer_dim=8)
    return made, (torch.rand(4, 10), torch.tensor([0, 1, 2, 1])), {}


def molgen() -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    tokens = torch.randint(1, 10, (4, 7))
    tokens[0, 5:] = 0
    return package("molgen.vae").BetaTCVAE(10, 16, 32, 4, 2, 1, 0, "cpu"), (tokens,), {}


BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
WIDTHS = {"block_out_channels": (8, 16), "norm_num_groups": 4}
MEDICAL = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "num_res_blocks": 1,
    "norm_num_groups": 4,
}

MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]] = {
    **{
        f"pythae.{name}": (lambda name=name: pythae(name)) for name in ("VAE", "BetaVAE", "BetaTCVAE", "INFOVAE_MMD", "VAE_LinNF")
    },
    "pythae.IWAE": lambda: pythae("IWAE", number_samples=3),
    "pythae.VAMP": lambda: pythae("VAMP", number_components=5),
    "diffusers.AutoencoderKL": lambda: diffusers("AutoencoderKL", 2, 3, 16, 16, **BLOCKS, **WIDTHS),
    "diffusers.AsymmetricAutoencoderKL": lambda: diffusers(
        "AsymmetricAutoencoderKL",
        2,
        3,
        16,
        16,
        **BLOCKS,
        down_block_out_channels=(8, 16),
        up_block_out_channels=(8, 16),
        layers_per_down_block=1,
        layers_per_up_block=1,
        norm_num_groups=4,
        sample_size=16,
    ),
    "monai.VarAutoEncoder": lambda: monai(
        "VarAutoEncoder",
        3,
        1,
        16,
        16,
        spatial_dims=2,
        in_shape=(1, 16, 16),
        out_channels=1,
        latent_size=4,
        channels=(4, 8),
        strides=(2, 2),
    ),
    "monai.AutoencoderKL": lambda: monai(
        "AutoencoderKL", 2, 1, 16, 16, channels=(8, 8), attention_levels=(False, True), **MEDICAL
    ),
    "riffly.VAE (music)": lambda: riffly("vae", "VAE", 8, 6, [24], 4, dropout=0.1),
    "riffly.ConvVAE (music)": lambda: riffly("conv_vae", "ConvVAE", 16, 16, 4, base_channels=4, num_stages=2, features=256),
    "riffly.TransformerVAE (music)": lambda: riffly(
        "transformer_vae", "TransformerVAE", 8, 6, d_model=16, nhead=2, num_layers=1, latent_dim=4
    ),
    "pi_vae.PiVAE (neural recordings)": pi_vae,
    "molgen.BetaTCVAE (molecules)": molgen,
}


def tensors(value: Any) -> list[Tensor]:
    return [x for x in flatten(value)[0] if isinstance(x, Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("name", MODELS)
def test_converts_unedited(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    plain = copy.deepcopy(model)
    rv = rvconvert.convert(model, example_inputs=args, example_kwargs=kwargs)
    assert isinstance(rv, type(model)) and list(rv.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        rv.train(training)
        plain.train(training)
        found, expected = rv(*args, **kwargs), plain(*args, **kwargs)
        assert type(found) is type(expected)
        assert [x.shape for x in tensors(found)] == [x.shape for x in tensors(expected)]
        assert all(x.isfinite().all() for x in tensors(found))
        if training:  # some write in place over what their own backward needs, in eval mode
            sum(x.sum() for x in tensors(found) if x.requires_grad).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in rv.parameters())
    report = rvconvert.plan(plain.train(), example_inputs=args, example_kwargs=kwargs)
    assert report.counts["noise"] >= 1 and not report.unsupported
    back = rvconvert.to_plain(rv).eval()
    plain.eval().load_state_dict(rv.state_dict())
    torch.manual_seed(1)
    found = tensors(back(*args, **kwargs))
    torch.manual_seed(1)
    expected = tensors(plain(*args, **kwargs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_pythaes_own_trainer_runs_an_epoch_on_a_converted_model(tmp_path: Path) -> None:
    model, args, _ = MODELS["pythae.VAE"]()
    rv = rvconvert.convert(model, example_inputs=args)
    before = {k: v.clone() for k, v in rv.state_dict().items()}
    trainers, datasets = package("pythae.trainers"), package("pythae.data.datasets")
    config = trainers.BaseTrainerConfig(output_dir=str(tmp_path), num_epochs=1, per_device_train_batch_size=8, learning_rate=1e-3)
    data = datasets.BaseDataset(torch.rand(16, 1, 28, 28), torch.zeros(16))
    trainer = trainers.BaseTrainer(model=rv, train_dataset=data, training_config=config)
    trainer.prepare_training()
    loss = trainer.train_step(epoch=1)
    assert loss == pytest.approx(loss) and rv.last_penalty is not None
    assert any(not torch.equal(v, before[k]) for k, v in rv.state_dict().items())


@pytest.mark.parametrize("deviation", [False, True], ids=["mean", "deviation"])
def test_diffusers_autoencoder_exports_to_onnx_and_draws_nothing(deviation: bool, tmp_path: Path) -> None:
    runtime = package("onnxruntime")
    package("onnxscript")
    torch.manual_seed(0)
    model, (x,), kwargs = MODELS["diffusers.AutoencoderKL"]()
    model.eval()
    expected = rvconvert.to_plain(rvconvert.convert(model, example_inputs=x, example_kwargs=kwargs), latent="mean")(x, **kwargs)
    path = rvconvert.export(model, tmp_path / "vae.onnx", x, example_kwargs=kwargs, deviation=deviation)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == ["output", "deviation"][: 1 + deviation]
    found = [torch.from_numpy(each) for each in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
    if not deviation:
        torch.testing.assert_close(found[0], expected.sample.detach(), rtol=1e-4, atol=1e-4)
        return
    rv = rvconvert.convert(model, example_inputs=x, example_kwargs=kwargs, output="distribution", attach=False)
    propagated = rv(x, **kwargs).sample
    torch.testing.assert_close(found[0], propagated.mean.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], propagated.std.detach(), rtol=1e-3, atol=1e-4)
