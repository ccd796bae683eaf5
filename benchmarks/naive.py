"""The paper's method written the naive way, as a baseline for speed: packed tensors, a ReLU in float64, no fusion.

Method: Nicodemou, Oikonomidis, Argyros, "RV-VAE", 2023, equations 1 to 11. A value is one tensor (2, N, ...): mean, then
variance. LeakyReLU is taken as ReLU and tanh is applied to both halves, as a first implementation would.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear_map(layer: nn.Module, x: Tensor) -> Tensor:
    """Equations 2 and 3, for Linear, Conv2d and ConvTranspose2d."""
    if isinstance(layer, nn.Linear):
        return torch.stack([F.linear(x[0], layer.weight, layer.bias), F.linear(x[1], layer.weight**2)])
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        mean = F.conv2d(x[0], layer.weight, layer.bias, *geometry)
        return torch.stack([mean, F.conv2d(x[1], layer.weight**2, None, *geometry)])
    geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    mean = F.conv_transpose2d(x[0], layer.weight, layer.bias, *geometry)
    return torch.stack([mean, F.conv_transpose2d(x[1], layer.weight**2, None, *geometry)])


def batch_norm(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Equations 10 and 11: the batch is a mixture; moments by E[x^2] - E[x]^2."""
    mean, var = x
    total_mean = mean.mean((0, 2, 3), keepdim=True)
    total_var = (var + mean**2).mean((0, 2, 3), keepdim=True) - total_mean**2
    scale = layer.weight.view(1, -1, 1, 1) / torch.sqrt(total_var + layer.eps)
    return torch.stack([(mean - total_mean) * scale + layer.bias.view(1, -1, 1, 1), var * scale**2])


def relu(x: Tensor) -> Tensor:
    """Equations 6 and 9, in float64 for the sake of their cancellations."""
    mean, var = x.double()
    std = torch.sqrt(var + 1e-10)
    ratio = mean / std
    density = torch.exp(-0.5 * ratio**2) / math.sqrt(2 * math.pi)
    above = 0.5 * (1 + torch.erf(ratio / math.sqrt(2)))
    out = std * density + mean * above
    second = (mean**2 + var) * above + mean * std * density
    return torch.stack([out, torch.clamp(second - out**2, min=1e-10)]).to(x.dtype)


class NaiveDecoder(nn.Module):
    """The layers of a sequential decoder, run one by one on packed tensors; shares their parameters."""

    def __init__(self, layers: list[nn.Module | tuple[int, ...]]) -> None:
        super().__init__()
        self.plan = layers
        self.layers = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))

    def forward(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """(N, latents) means and variances to the image's."""
        x = torch.stack([mean, var])
        for layer in self.plan:
            if isinstance(layer, tuple):
                x = x.view(2, -1, *layer)
            elif isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                x = linear_map(layer, x)
            elif isinstance(layer, nn.BatchNorm2d):
                x = batch_norm(layer, x)
            elif isinstance(layer, (nn.ReLU, nn.LeakyReLU)):
                x = relu(x)
            elif isinstance(layer, nn.Tanh):
                x = torch.tanh(x)
            else:
                raise TypeError(f"no naive form of {type(layer).__name__}")
        return x[0], x[1]
