"""The network, the data and the training loop of the comparison."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # of the model's output, the images and the KL divergence


class ConvVAE(nn.Module):
    """A convolutional VAE for 32x32 grey images in [0, 1]; its decoder is that of the PyTorch-VAE collection, smaller."""

    def __init__(self, latent: int = 8, channels: tuple[int, int, int] = (8, 16, 32)) -> None:
        super().__init__()
        a, b, c = channels

        def down(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.LeakyReLU()]

        def up(before: int, after: int) -> list[nn.Module]:
            return [nn.ConvTranspose2d(before, after, 3, 2, 1, 1), nn.BatchNorm2d(after), nn.LeakyReLU()]

        self.encoder = nn.Sequential(*down(1, a), *down(a, b), *down(b, c), nn.Flatten())
        self.to_mu, self.to_logvar = nn.Linear(16 * c, latent), nn.Linear(16 * c, latent)
        self.decoder_input = nn.Linear(latent, 16 * c)
        self.decoder = nn.Sequential(*up(c, b), *up(b, a), *up(a, a), nn.Conv2d(a, 1, 3, padding=1), nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.encoder(x)
        return self.to_mu(h), self.to_logvar(h)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.decoder_input(z).view(z.shape[0], -1, 4, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return self.decode(z), mu, logvar


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over latents, mean over the batch; in nats."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()


def load_images(path: Path | None, count: int) -> tuple[Tensor, Tensor]:
    """Train (``count`` at most) and test images, (N, 1, 32, 32) in [0, 1].

    ``path``: an npz with uint8 ``x_train`` and ``x_test`` (MNIST, say); None: scikit-learn's digits, enlarged.
    """
    if path is not None:
        with np.load(path) as archive:
            parts = [torch.from_numpy(archive[name]).float().unsqueeze(1) / 255 for name in ("x_train", "x_test")]
        parts = [F.pad(x, [(32 - x.shape[-1]) // 2] * 4) for x in parts]
    else:
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
        images = F.interpolate(images, size=32, mode="bilinear", antialias=True)
        parts = [images[:1500], images[1500:]]
    return parts[0][:count], parts[1][:2000]


def argument_parser(description: str | None, images: int = 6_000) -> argparse.ArgumentParser:
    """What the commands of this folder have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="npz with uint8 x_train and x_test; default scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("truth-results"))
    parser.add_argument("--images", type=int, default=images)
    parser.add_argument("--epochs", type=int, default=5)
    return parser


def settings(args: argparse.Namespace, training: Tensor) -> dict[str, Any]:
    """What all runs in a file of results have in common."""
    return {"data": args.data.name if args.data else "digits", "images": len(training), "epochs": args.epochs}


def made(options: dict[str, Any], *, latent: int = 8, seed: int) -> nn.Module:
    """The VAE of a seed, converted if there are options."""
    torch.manual_seed(seed)
    model = ConvVAE(latent)
    return rvconvert.convert(model, **options) if options else model


def squared_error(kl_weight: float) -> Loss:
    """Mean squared error + kl_weight * KL."""
    return lambda y, x, kl: F.mse_loss(y, x) + kl_weight * kl


def train(model: nn.Module, images: Tensor, loss_of: Loss, *, epochs: int, seed: int, batch: int = 64, lr: float = 2e-3) -> None:
    """Adam on ``loss_of(output, images, KL)``; the penalty of a converted model joins by itself."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            x = images[index]
            y, mu, logvar = model(x)
            loss = loss_of(y, x, kl_divergence(mu, logvar))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


class Results:
    """A file of runs under one set of settings, written after each, from which an interrupted command goes on.

    Raises:
        SystemExit: the file holds runs of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": settings, "runs": []}
        if self.held["settings"] != settings:
            raise SystemExit(f"{path} holds results of other settings: {self.held['settings']}; choose another --out")

    @property
    def runs(self) -> list[dict[str, Any]]:
        """All runs so far."""
        return self.held["runs"]

    def has(self, **run: Any) -> bool:
        """True where a run with these values is held."""
        return any(all(each[key] == value for key, value in run.items()) for each in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs.append(run)
        self.write()

    def write(self) -> None:
        """Write all that is held."""
        self.path.write_text(json.dumps(self.held, indent=1))
