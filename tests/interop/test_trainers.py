"""Converted models inside the training loops of Lightning and Accelerate."""

import pytest
import torch
from torch import nn

from tests.interop.test_packages import package
from tests.test_distributed import DATA, converted, full_state, loss_of, train

pytestmark = pytest.mark.filterwarnings("ignore")


def test_lightning_trains_one(tmp_path):
    lightning = package("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.vae = converted(nn.BatchNorm1d)

        def training_step(self, x):
            return loss_of(self.vae(x), x)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=None))
    model = converted(nn.BatchNorm1d)
    torch.testing.assert_close(full_state(module.vae), train(model, model, DATA)[2])


def test_accelerate_trains_one():
    accelerate = package("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = converted(nn.BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for x in DATA:
        loss = loss_of(wrapped(x), x)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    other = converted(nn.BatchNorm1d)
    torch.testing.assert_close(full_state(model), train(other, other, DATA)[2])
