"""The paper's equations written out by hand, for the decoders of ``models``: an independent propagation in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor, nn

from tests.models import SoftIntroDecoder, VanillaVAE

Moments = tuple[Tensor, Tensor]


def linear(layer: nn.Linear, m: Tensor, v: Tensor) -> Moments:
    """Eqs 2 and 3."""
    return m @ layer.weight.T + layer.bias, v @ (layer.weight * layer.weight).T


def conv(layer: nn.Conv2d, m: Tensor, v: Tensor) -> Moments:
    options = {"stride": layer.stride, "padding": layer.padding}
    return F.conv2d(m, layer.weight, layer.bias, **options), F.conv2d(v, layer.weight**2, None, **options)


def conv_transpose(layer: nn.ConvTranspose2d, m: Tensor, v: Tensor) -> Moments:
    options = {"stride": layer.stride, "padding": layer.padding, "output_padding": layer.output_padding}
    return F.conv_transpose2d(m, layer.weight, layer.bias, **options), F.conv_transpose2d(v, layer.weight**2, None, **options)


def leaky_relu(m: Tensor, v: Tensor, slope: float) -> Moments:
    """Eqs 6 and 9 on both sides: f(x) = relu(x) - slope relu(-x), and relu(x) relu(-x) = 0."""
    s = v.sqrt()
    a = (m / s).detach().numpy()
    phi, cdf = torch.from_numpy(norm.pdf(a)), torch.from_numpy(norm.cdf(a))
    up, down = m * cdf + s * phi, -m * (1 - cdf) + s * phi
    up2 = (m**2 + v) * cdf + m * s * phi
    down2 = (m**2 + v) * (1 - cdf) - m * s * phi
    mean = up - slope * down
    return mean, up2 + slope**2 * down2 - mean**2


def batch_norm(layer: nn.BatchNorm2d, m: Tensor, v: Tensor) -> Moments:
    """Eqs 10 and 11 in training, the running statistics in eval."""
    if layer.training:
        centre = m.mean((0, 2, 3))
        spread = (v + m**2).mean((0, 2, 3)) - centre**2
    else:
        centre, spread = layer.running_mean, layer.running_var
    scale = layer.weight / torch.sqrt(spread + layer.eps)
    shape = (1, -1, 1, 1)
    return (m - centre.view(shape)) * scale.view(shape) + layer.bias.view(shape), v * (scale**2).view(shape)


def tanh(m: Tensor, v: Tensor) -> Moments:
    nodes, weights = (torch.from_numpy(x) for x in __import__("numpy").polynomial.hermite_e.hermegauss(81))
    weights = weights / weights.sum()
    values = torch.tanh(m[..., None] + v.sqrt()[..., None] * nodes)
    mean = (values * weights).sum(-1)
    return mean, ((values - mean[..., None]) ** 2 * weights).sum(-1)


def vanilla_decoder(model: VanillaVAE, m: Tensor, v: Tensor) -> Moments:
    m, v = linear(model.decoder_input, m, v)
    m, v = (x.view(-1, model.hidden[-1], 4, 4) for x in (m, v))
    for block in model.decoder:
        m, v = conv_transpose(block[0], m, v)
        m, v = batch_norm(block[1], m, v)
        m, v = leaky_relu(m, v, 0.01)
    m, v = conv(model.final_layer[0], m, v)
    return tanh(m, v)


def soft_intro_decoder(model: SoftIntroDecoder, m: Tensor, v: Tensor) -> Moments:
    m, v = leaky_relu(*linear(model.fc[0], m, v), 0.0)
    m, v = (F.interpolate(x.view(-1, model.width, 4, 4), scale_factor=2) for x in (m, v))
    skip = (m, v)
    m, v = leaky_relu(*batch_norm(model.bn1, *conv_bias_free(model.conv1, m, v)), 0.2)
    m, v = batch_norm(model.bn2, *conv_bias_free(model.conv2, m, v))
    m, v = leaky_relu(m + skip[0], v + skip[1], 0.2)
    return conv(model.predict, m, v)


def conv_bias_free(layer: nn.Conv2d, m: Tensor, v: Tensor) -> Moments:
    return conv(layer, m, v)
