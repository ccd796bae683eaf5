"""Converted models inside the training loops of Lightning and Accelerate."""

import pytest
import torch
from torch import nn

import rvconvert
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


@pytest.mark.parametrize("methods", [("training_step",), ("forward",)])
def test_lightning_trains_a_converted_module_and_hears_what_it_returns(methods):
    lightning = package("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(4, 10)

        def forward(self, x):
            mu, logvar = self.encoder(x).chunk(2, 1)
            return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar

        def training_step(self, x, batch_idx):
            y, mu, logvar = self(x)
            error, kl = (y - x).square().mean(), 0.5 * (mu.square() + logvar.exp() - logvar - 1).mean()
            loss = error + self.current_epoch * kl
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log_dict({"error": error, "weight": float(self.current_epoch), "reported": error.item()})
            return {"loss": loss, "error": error.detach(), "kl": kl.detach()}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    seen = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            logged = trainer.callback_metrics
            row = (outputs["loss"], logged["loss_step"], outputs["error"], logged["error"], logged["reported"], outputs["kl"])
            seen.append((trainer.current_epoch, *map(float, row)))

    torch.manual_seed(0)
    model = rvconvert.convert(Module(), methods=methods)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[Watch()], **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(70, 10), batch_size=32))  # whose iterators cannot be copied
    assert len(seen) == 9
    for epoch, loss, logged_loss, error, logged_error, reported, kl in seen:
        assert logged_loss == pytest.approx(loss) and logged_error == reported == pytest.approx(error)
        assert loss == pytest.approx(error + epoch * kl)
    mean = sum(loss * n for (_, loss, *_), n in zip(seen[-3:], (32, 32, 6), strict=True)) / 70
    assert float(trainer.callback_metrics["loss_epoch"]) == pytest.approx(mean)
    assert model.last_penalty is not None
    assert len(model._rvconvert.programs) <= 3  # one for each epoch's weight, whatever the number of the batch


def test_transformers_base_class_converts():
    transformers = package("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "a_vae"

    scope = {"transformers": transformers, "torch": torch, "nn": nn, "Config": Config, "__name__": "module_without_typing"}
    exec(_PRETRAINED, scope)
    model = rvconvert.convert(scope["VAE"](Config()))
    model(torch.randn(3, 10))[0].sum().backward()
    assert model.last_penalty > 0


_PRETRAINED = """
class VAE(transformers.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(4, 10)
        self.post_init()

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar
"""
