"""The four systems' models in their authors' shape, small, and the awkward things that real decoders do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VanillaVAE(nn.Module):
    """Convolutional VAE with BatchNorm and LeakyReLU; returns a list, as the collections do."""

    def __init__(self, latent: int = 8, hidden: tuple[int, ...] = (8, 16)) -> None:
        super().__init__()
        channels, layers = 3, []
        for width in hidden:
            layers.append(nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.LeakyReLU()))
            channels = width
        self.encoder = nn.Sequential(*layers)
        self.fc_mu = nn.Linear(hidden[-1] * 16, latent)
        self.fc_var = nn.Linear(hidden[-1] * 16, latent)
        self.decoder_input = nn.Linear(latent, hidden[-1] * 16)
        layers = []
        for width, following in zip(hidden[::-1], (*hidden[::-1][1:], hidden[0]), strict=True):
            layers.append(
                nn.Sequential(nn.ConvTranspose2d(width, following, 3, 2, 1, 1), nn.BatchNorm2d(following), nn.LeakyReLU())
            )
        self.decoder = nn.Sequential(*layers)
        self.final_layer = nn.Sequential(nn.Conv2d(hidden[0], 3, 3, padding=1), nn.Tanh())
        self.hidden = hidden

    def encode(self, x: Tensor) -> list[Tensor]:
        result = torch.flatten(self.encoder(x), start_dim=1)
        return [self.fc_mu(result), self.fc_var(result)]

    def decode(self, z: Tensor) -> Tensor:
        result = self.decoder_input(z).view(-1, self.hidden[-1], 4, 4)
        return self.final_layer(self.decoder(result))

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps * std + mu

    def forward(self, x: Tensor, **kwargs: Any) -> list[Tensor]:
        mu, logvar = self.encode(x)
        z = self.reparameterize(mu, logvar)
        return [self.decode(z), x, mu, logvar]

    def loss_function(self, *args: Tensor, kld_weight: float = 0.001) -> dict[str, Tensor]:
        recons, x, mu, logvar = args
        kld = torch.mean(-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), dim=1), dim=0)
        return {"loss": F.mse_loss(recons, x) + kld_weight * kld}

    def sample(self, n: int) -> Tensor:
        return self.decode(torch.randn(n, self.fc_mu.out_features))


class BetaTCVAE(VanillaVAE):
    """Returns the latent too, which leaves as its mean and takes no part in the penalty."""

    def __init__(self, latent: int = 8) -> None:
        super().__init__(latent)
        self.fc = nn.Linear(self.hidden[-1] * 16, self.hidden[-1] * 16)
        self.num_iter = 0

    def encode(self, x: Tensor) -> list[Tensor]:
        result = self.fc(torch.flatten(self.encoder(x), start_dim=1))
        return [self.fc_mu(result), self.fc_var(result)]

    def forward(self, x: Tensor, **kwargs: Any) -> list[Tensor]:
        mu, log_var = self.encode(x)
        z = self.reparameterize(mu, log_var)
        return [self.decode(z), x, mu, log_var, z]


class Cell(nn.Module):
    """A residual upsampling cell: an alias of its input is changed in place, and a module is built in forward."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(channels, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)
        self.n1, self.n2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(nn.ReLU()(self.n1(x)), scale_factor=2, mode="bilinear", align_corners=False)
        h = self.c1(h)
        h_skip = h
        h += self.shortcut(F.interpolate(x, scale_factor=2))
        h = self.c2(nn.ReLU()(self.n2(h)))
        return h + h_skip


class DCDecoder(nn.Module):
    """The DC-VAE generator's shape, from a bare latent."""

    def __init__(self, latent: int = 8, width: int = 8) -> None:
        super().__init__()
        self.l1 = nn.Linear(latent, 4 * 4 * width)
        self.cell1, self.cell2 = Cell(width, width), Cell(width, width)
        self.to_rgb = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 3, 3, 1, 1), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        h = self.l1(z).view(z.shape[0], -1, 4, 4)
        return self.to_rgb(self.cell2(self.cell1(h)))


class SoftIntroDecoder(nn.Module):
    """The Soft-Intro decoder's shape: residual blocks, LeakyReLU in place, upsampling."""

    def __init__(self, latent: int = 8, width: int = 8) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(latent, width * 16), nn.ReLU(True))
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.LeakyReLU(0.2, inplace=True)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.predict = nn.Conv2d(width, 3, 5, padding=2)
        self.width = width

    def forward(self, z: Tensor, y_cond: Tensor | None = None) -> Tensor:
        z = z.view(z.size(0), -1)
        if y_cond is not None:
            z = torch.cat([z, y_cond.view(y_cond.size(0), -1)], dim=1)
        y = self.up(self.fc(z).view(z.size(0), self.width, 4, 4))
        out = self.relu(self.bn1(self.conv1(y)))
        out = self.bn2(self.conv2(out))
        out = self.relu(torch.add(out, y))
        return self.predict(out)
