"""A network whose moments are known in closed form: one hidden layer of ReLUs under a Gaussian input."""

import math

import numpy as np
import torch
from scipy.stats import multivariate_normal, norm


def relu_network_moments(hidden, last, mean, var):
    """Exact mean (K,) and variance (K,) of ``last(relu(hidden(z)))``, z ~ N(mean, diag(var)); mean and var (D,).

    The pre-activations are jointly Gaussian, so a pair's product needs the first two moments of a bivariate Gaussian above 0 in
    both variables (Rosenbaum, J. R. Stat. Soc. B 23, 1961).
    """
    weight, bias = (p.detach().double().numpy() for p in (hidden.weight, hidden.bias))
    mean, var = mean.double().numpy(), var.double().numpy()
    m, cov = weight @ mean + bias, (weight * var) @ weight.T
    s = np.sqrt(np.diag(cov))
    h = m / s
    first = m * norm.cdf(h) + s * norm.pdf(h)
    second = np.empty_like(cov)
    for i in range(len(m)):
        second[i, i] = (m[i] ** 2 + s[i] ** 2) * norm.cdf(h[i]) + m[i] * s[i] * norm.pdf(h[i])
        for j in range(i):
            second[i, j] = second[j, i] = _product(m[i], m[j], s[i], s[j], cov[i, j] / (s[i] * s[j]))
    above, shift = (p.detach().double().numpy() for p in (last.weight, last.bias))
    spread = above @ (second - np.outer(first, first)) @ above.T
    return torch.from_numpy(above @ first + shift), torch.from_numpy(np.diag(spread).copy())


def _product(m, n, s, t, r):
    """E[max(x, 0) max(y, 0)] of a bivariate Gaussian: means m, n, deviations s, t, correlation r."""
    h, k, q = m / s, n / t, math.sqrt(1 - r**2)
    both = multivariate_normal([0, 0], [[1, r], [r, 1]]).cdf([h, k])
    edge_x, edge_y = norm.pdf(h) * norm.cdf((k - r * h) / q), norm.pdf(k) * norm.cdf((h - r * k) / q)
    u, v = edge_x + r * edge_y, edge_y + r * edge_x
    corner = q / math.sqrt(2 * math.pi) * norm.pdf(math.sqrt(h**2 - 2 * r * h * k + k**2) / q)
    uv = r * both - r * h * edge_x - r * k * edge_y + corner
    return m * n * both + m * t * v + n * s * u + s * t * uv
