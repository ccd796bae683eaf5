"""The callbacks log what they say through the trainers' own loggers, and change nothing of the training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvconvert
from rvconvert.callbacks import Monitor, converted_module, for_lightning, for_transformers
from rvconvert.errors import ConversionError
from rvconvert.verify import truth_ratio
from tests.interop.test_packages import package

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
NAMES = {"rv/penalty", "rv/propagated_variance", "rv/true_variance", "rv/between_variance"}


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        reconstruction = self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))
        return {"loss": (reconstruction.detach() * 0 + (reconstruction - x) ** 2).mean(), "reconstruction": reconstruction}


class Plain(VAE):
    def forward(self, x: Tensor) -> Tensor:
        return VAE.forward(self, x)["reconstruction"]


@pytest.fixture
def rv() -> nn.Module:
    torch.manual_seed(0)
    return rvconvert.convert(Plain(), example_inputs=torch.rand(8, 6))


def test_measuring_gives_the_truth_and_leaves_no_trace(rv: nn.Module) -> None:
    x = torch.rand(32, 6)
    rv(x)
    before, state = rv.training, torch.get_rng_state()
    found = Monitor(pairs=64).variances(rv, x)
    assert rv.training is before and torch.equal(torch.get_rng_state(), state)
    assert found["rv/true_variance"] / found["rv/propagated_variance"] == pytest.approx(truth_ratio(rv, x, pairs=64), rel=0.1)
    assert Monitor().penalty(rv) == {"rv/penalty": float(rv.last_penalty)}


def test_a_collapsed_posterior_is_warned_of_once(rv: nn.Module) -> None:
    with torch.no_grad():
        rv.encoder.weight.zero_()  # nothing of the input reaches the latent
    monitor, x = Monitor(pairs=1, patience=2), torch.rand(32, 6)
    monitor.variances(rv, x)
    with pytest.warns(UserWarning, match="posterior seems to have collapsed"):
        monitor.variances(rv, x)
    monitor.variances(rv, x)
    assert monitor.collapsed == 3


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"Linear holds no converted model; call rvconvert\.convert before"):
        converted_module(nn.Linear(2, 2))
    with pytest.raises(ConversionError, match="must be 1 or more"):
        Monitor(every=0)


def test_lightning_logs_the_variances(rv: nn.Module, tmp_path: Path) -> None:
    lightning = package("lightning")
    loggers = package("lightning.pytorch.loggers")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vae = rv

        def training_step(self, batch: Any) -> Tensor:
            return (self.vae(batch[0]) - batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(32, 6)), batch_size=8)
    logger = loggers.CSVLogger(tmp_path, name="run")
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [for_lightning(every=2, pairs=2)]
    lightning.Trainer(max_epochs=1, logger=logger, log_every_n_steps=1, callbacks=callbacks, **options).fit(Module(), data)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= NAMES
    assert all(float(row["rv/penalty"]) > 0 for row in rows)
    measured = [row["rv/true_variance"] for row in rows]  # Lightning repeats a value until there is a new one
    assert not measured[0] and len(set(measured[1:])) == 2


def test_transformers_logs_the_variances(tmp_path: Path) -> None:
    transformers = package("transformers")
    package("accelerate")
    torch.manual_seed(0)
    rv = rvconvert.convert(VAE(), example_inputs=torch.rand(8, 6))
    data = [{"x": row} for row in torch.rand(32, 6)]
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "remove_unused_columns": False}
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=8, **options
    )
    trainer = transformers.Trainer(model=rv, args=arguments, train_dataset=data)
    for_transformers(trainer, every=2, pairs=2)
    trainer.train()
    history = trainer.state.log_history
    assert sum("rv/penalty" in line for line in history) == 4
    assert [line["step"] for line in history if "rv/true_variance" in line] == [2, 4]
    assert sum("loss" in line for line in history) == 4, "the trainer's own logs are still there"
