"""The models whose speed is measured: the four published systems, and a small VAE with each kind of decoder that people have."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import dc_vae
import soft_intro_vae
from beta_tcvae import BetaTCVAE
from vae import VanillaVAE

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
    "ELU": nn.ELU,
}


class Spelled(nn.Module):
    """An activation that a model spells in several operations, with a factor that it may learn."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.factor = function, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.factor)


SPELLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "GELU by hand": lambda x, a: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "Softsign": lambda x, a: F.softsign(x),
    "Hardswish by hand": lambda x, a: x * F.relu6(x + 3) / 6,
    "learned Swish": lambda x, a: x * torch.sigmoid(a * x),
    "snake": lambda x, a: x + torch.sin(a * x) ** 2 / a,
}


class VAE(nn.Module):
    """mu, logvar = encoder(x); decoder(mu + eps std)."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.encoder(x)
        return out if isinstance(out, tuple) else tuple(out.chunk(2, -1))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        return self.decode(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu, logvar


def convolutional(
    size: int, activation: Callable[[], nn.Module], norm: Callable[[int], nn.Module] = nn.BatchNorm2d, latents: int = 128
) -> VAE:
    """Three (32×32) or four (64×64) strided convolutions each way, a norm and the activation after each."""
    widths = [32, 64, 128, 256][: {32: 3, 64: 4}[size]]
    encoder: list[nn.Module] = []
    for a, b in zip([3, *widths], widths, strict=False):
        encoder += [nn.Conv2d(a, b, 3, 2, 1), norm(b), activation()]
    decoder: list[nn.Module] = [nn.Linear(latents, widths[-1] * 16), nn.Unflatten(1, (widths[-1], 4, 4))]
    for a, b in zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True):
        decoder += [nn.ConvTranspose2d(a, b, 3, 2, 1, 1), norm(b), activation()]
    decoder.append(nn.Conv2d(widths[0], 3, 3, 1, 1))
    return VAE(nn.Sequential(*encoder, nn.Flatten(), nn.Linear(widths[-1] * 16, 2 * latents)), nn.Sequential(*decoder))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


class Steps(nn.Module):
    """A decoder over 40 steps of width 64, from the latent at every step."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.cell = getattr(nn, cell)(64, 64)
        self.out = nn.Linear(64, 64)

    def forward(self, z: Tensor) -> Tensor:
        if isinstance(self.cell, nn.RNNCellBase):
            state, states = z, []
            for _ in range(40):
                state = self.cell(z, state)
                states.append(state)
            return self.out(torch.stack(states, 1))
        return self.out(self.cell(z.expand(40, *z.shape))[0]).transpose(0, 1)


class Attention(nn.Module):
    """A transformer decoder of sets: 32 learned queries, two layers of width 64."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(32, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(64, 64)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.layers(self.queries + z[:, None]))


def sequences(length: int, decoder: nn.Module) -> VAE:
    """Over sequences of 64 numbers at each of ``length`` steps; 64 latents."""
    return VAE(nn.Sequential(nn.Flatten(), nn.Linear(64 * length, 128)), decoder)


def soft_intro() -> VAE:
    channels = soft_intro_vae.SETTINGS["cifar10"].channels
    return VAE(soft_intro_vae.Encoder(3, 128, channels, 32), soft_intro_vae.Decoder(3, 128, channels, 32))


IMAGES_64, IMAGES_32 = (3, 64, 64), (3, 32, 32)
SYSTEMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {  # constructor, shape of an input, batch
    "VanillaVAE": (VanillaVAE, IMAGES_64, 64),
    "beta-TCVAE": (BetaTCVAE, IMAGES_64, 64),
    "DC-VAE": (lambda: VAE(dc_vae.Encoder(128), dc_vae.Decoder(128)), IMAGES_32, 32),
    "Soft-Intro-VAE": (soft_intro, IMAGES_32, 32),
}
DECODERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    **{
        f"{name} {size}": (lambda size=size, make=make: convolutional(size, make), (3, size, size), 64)
        for size in (32, 64)
        for name, make in ACTIVATIONS.items()
    },
    **{
        f"{name} 32": (lambda function=function: convolutional(32, lambda: Spelled(function)), IMAGES_32, 64)
        for name, function in SPELLED.items()
    },
    "GroupNorm + SiLU 32": (lambda: convolutional(32, nn.SiLU, group_norm), IMAGES_32, 64),
    "ReLU, no norm 32": (lambda: convolutional(32, nn.ReLU, nn.Identity), IMAGES_32, 64),
    "LeakyReLU, no norm 32": (lambda: convolutional(32, nn.LeakyReLU, nn.Identity), IMAGES_32, 64),
    "16 latents": (lambda: convolutional(32, nn.ReLU, latents=16), IMAGES_32, 64),  # as many as low rank has rows for
    "attention": (lambda: sequences(32, Attention()), (32, 64), 64),
    "GRU": (lambda: sequences(40, Steps("GRU")), (40, 64), 64),
    "LSTM": (lambda: sequences(40, Steps("LSTM")), (40, 64), 64),
    "GRUCell": (lambda: sequences(40, Steps("GRUCell")), (40, 64), 64),
}
MODELS = SYSTEMS | DECODERS


def sequential(model: nn.Module) -> list[nn.Module | tuple[int, ...]] | None:
    """A published decoder as a list of layers and views, where it is one: what peers can take."""
    if isinstance(model, VanillaVAE):
        layers: list[nn.Module | tuple[int, ...]] = [model.decoder_input, tuple(model.bottom_shape)]
        return layers + [layer for block in (*model.decoder, model.final_layer) for layer in block]
    return None
