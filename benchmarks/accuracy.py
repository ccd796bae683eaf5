"""Accuracy of the Gaussian moments of elementwise functions, mean in [-6, 6], deviation in [1e-3, 3].

    python benchmarks/accuracy.py [--dtype float64] [--json accuracy.json] [--markdown benchmarks/results/accuracy.md]

The reference integrates in float64 by composite Gauss-Legendre over panels that end at the kinks. The
error of the mean is relative to √(E² + Var), that of the variance to Var, where that is a millionth of the input's or more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import special

from rvconvert import moments as gaussian
from rvconvert.moments.piecewise import SELU_ALPHA, SELU_SCALE

EXACT, TABLE = "closed form", "a table made by quadrature"
TABULATED = "a table of the closed form"
PANELS = "quadrature"


def log_sigmoid(x):
    return np.where(x < 0, x, 0.0) - np.log1p(np.exp(-np.abs(x)))


def mish_gate(x):
    n = np.exp(np.minimum(x, 40.0)) * (np.exp(np.minimum(x, 40.0)) + 2)
    return n / (n + 2)


def elu(alpha=1.0, scale=1.0, rate=1.0):
    return lambda x: scale * np.where(x > 0, x, alpha * np.expm1(rate * np.minimum(x, 0)))


def elu_slope(alpha=1.0, scale=1.0, rate=1.0):
    return lambda x: scale * np.where(x > 0, 1.0, alpha * rate * np.exp(rate * np.minimum(x, 0)))


def leaky(c):
    return lambda x: np.where(x > 0, x, c * x)


def density(x):
    return np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi)


def erf_difference(x, m):
    return np.where(m > 0, special.erfc(m) - special.erfc(x), special.erfc(-x) - special.erfc(-m))


RATE, CUBIC = 2 * np.sqrt(2 / np.pi), 0.044715


def gelu_tanh(x):
    return x * special.expit(RATE * (x + CUBIC * x**3))


def gelu_tanh_slope(x):
    u = RATE * (x + CUBIC * x**3)
    return special.expit(u) * (1 + x * special.expit(-u) * RATE * (1 + 3 * CUBIC * x * x))


def mish_slope(x):
    w = np.exp(np.minimum(x, 40.0))
    n = w * (w + 2)
    return n / (n + 2) + x * 4 * w * (w + 1) / (n + 2) ** 2


@dataclass(frozen=True)
class Case:
    """A moment function beside the float64 function and derivative that it stands for."""

    name: str
    moments: Callable
    function: Callable
    slope: Callable
    path: str = EXACT
    kinks: tuple[float, ...] = ()
    arguments: tuple = ()
    difference: Callable | None = None  # f(x) - f(m) where float64 values would lose it


def _step(x):
    return (x > 0) * 1.0


CASES = [
    Case("relu", gaussian.relu, lambda x: np.maximum(x, 0), _step, TABULATED, (0,)),
    Case("leaky_relu", gaussian.leaky_relu, leaky(0.01), lambda x: np.where(x > 0, 1, 0.01), TABULATED, (0,)),
    Case(
        "prelu",
        gaussian.leaky_relu,
        leaky(0.25),
        lambda x: np.where(x > 0, 1, 0.25),
        TABULATED,
        (0,),
        arguments=(torch.tensor(0.25),),
    ),
    Case("relu6", gaussian.relu6, lambda x: np.clip(x, 0, 6), lambda x: (abs(x - 3) < 3) * 1.0, TABLE, (0, 6)),
    Case(
        "hardtanh",
        gaussian.hardtanh,
        lambda x: np.clip(x, -1, 1),
        lambda x: (abs(x) < 1) * 1.0,
        TABLE,
        (-1, 1),
    ),
    Case(
        "hardsigmoid",
        gaussian.hardsigmoid,
        lambda x: np.clip(x + 3, 0, 6) / 6,
        lambda x: (abs(x) < 3) / 6,
        TABLE,
        (-3, 3),
    ),
    Case(
        "hardswish",
        gaussian.hardswish,
        lambda x: x * np.clip(x + 3, 0, 6) / 6,
        lambda x: np.where(x > 3, 1, np.where(x < -3, 0, (2 * x + 3) / 6)),
        TABLE,
        (-3, 3),
    ),
    Case(
        "softshrink",
        gaussian.softshrink,
        lambda x: np.sign(x) * np.maximum(abs(x) - 0.5, 0),
        lambda x: (abs(x) > 0.5) * 1.0,
        kinks=(-0.5, 0.5),
    ),
    Case("hardshrink", gaussian.hardshrink, lambda x: x * (abs(x) > 0.5), None, kinks=(-0.5, 0.5)),
    Case(
        "threshold",
        gaussian.threshold,
        lambda x: np.where(x > 0.1, x, -0.3),
        None,
        kinks=(0.1,),
        arguments=(0.1, -0.3),
    ),
    Case("elu", gaussian.elu, elu(), elu_slope(), TABLE, (0,)),
    Case(
        "selu",
        gaussian.selu,
        elu(SELU_ALPHA, SELU_SCALE),
        elu_slope(SELU_ALPHA, SELU_SCALE),
        TABLE,
        (0,),
    ),
    Case("celu", gaussian.celu, elu(0.5, 1, 2), elu_slope(0.5, 1, 2), TABLE, (0,), (0.5,)),
    Case(
        "gelu",
        gaussian.gelu,
        lambda x: x * special.ndtr(x),
        lambda x: special.ndtr(x) + x * density(x),
        TABLE,
    ),
    Case("gelu (tanh)", gaussian.gelu, gelu_tanh, gelu_tanh_slope, TABLE, arguments=("tanh",)),
    Case(
        "silu",
        gaussian.silu,
        lambda x: x * special.expit(x),
        lambda x: special.expit(x) * (1 + x * special.expit(-x)),
        TABLE,
    ),
    # Up to a constant, with the tails accurate.
    Case("tanh", gaussian.tanh, np.tanh, lambda x: 4 * special.expit(2 * x) * special.expit(-2 * x), TABLE),
    Case("sigmoid", gaussian.sigmoid, special.expit, lambda x: special.expit(x) * special.expit(-x), TABLE),
    Case("softplus", gaussian.softplus, lambda x: -log_sigmoid(-x), special.expit, TABLE),
    Case(
        "softplus (beta 3)",
        gaussian.softplus,
        lambda x: -log_sigmoid(-3 * x) / 3,
        lambda x: special.expit(3 * x),
        TABLE,
        arguments=(3.0,),
    ),
    Case("logsigmoid", gaussian.logsigmoid, log_sigmoid, lambda x: special.expit(-x), TABLE),
    Case("mish", gaussian.mish, lambda x: x * mish_gate(x), mish_slope, TABLE),
    Case(
        "softsign",
        gaussian.softsign,
        lambda x: x / (1 + abs(x)),
        lambda x: (1 + abs(x)) ** -2.0,
        PANELS,
        (0,),
    ),
    Case("abs", gaussian.absolute, np.abs, np.sign, TABULATED, (0,)),
    Case("exp", gaussian.exp, np.exp, np.exp),
    Case("expm1", gaussian.expm1, np.expm1, np.exp),
    Case("square", gaussian.square, np.square, lambda x: 2 * x),
    Case("cube", gaussian.power, lambda x: x**3, lambda x: 3 * x * x, arguments=(3,)),
    Case("sin", gaussian.sin, np.sin, np.cos),
    Case("cos", gaussian.cos, np.cos, lambda x: -np.sin(x)),
    Case(
        "erf",
        gaussian.erf,
        special.erf,
        lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x),
        TABLE,
        difference=erf_difference,
    ),
]


def grid(means: int = 97, deviations: int = 29) -> tuple[np.ndarray, np.ndarray]:
    """Means and variances, float32 values in float64, so that both sides see the same numbers."""
    m, s = np.meshgrid(np.linspace(-6, 6, means), np.geomspace(1e-3, 3, deviations))
    return m.ravel().astype(np.float32).astype(np.float64), (s.ravel() ** 2).astype(np.float32).astype(np.float64)


def reference(case: Case, mean: np.ndarray, var: np.ndarray, panels: int = 32, nodes: int = 16):
    """E and Var in float64 by composite Gauss-Legendre over ±20 s, split at kinks and at 0.

    f is integrated as a difference from f(mean). Where that difference is lost to rounding (a saturated tail
    at a small deviation), the variance comes from the Taylor integral of f' instead.
    """
    x, w = np.polynomial.legendre.leggauss(nodes)
    s = np.sqrt(var)
    low, high = np.full_like(mean, -20.0), np.full_like(mean, 20.0)
    inner = [np.clip((k - mean) / s, low, high) for k in sorted({*case.kinks, 0.0})]
    ends = [low, *inner, high]
    z, weight = [], []
    for left, right in pairwise(ends):
        edges = left + (right - left) * np.linspace(0, 1, panels + 1)[:, None]
        for a, b in pairwise(edges):
            node = (a + b) / 2 + (b - a) / 2 * x[:, None]
            z.append(node)
            weight.append(w[:, None] * (b - a) / 2 * density(node))
    z, weight = np.concatenate(z), np.concatenate(weight)
    at_mean = case.function(mean)
    if case.difference is not None:
        difference = case.difference(mean + s * z, mean)
    else:
        difference = case.function(mean + s * z) - at_mean
    if case.slope is not None:
        # f(m + d) - f(m) = d ∫ f'(m + d u) du, free of cancellation where no kink lies between.
        u, wu = (x + 1) / 2, w / 2
        d = s * z
        integral = d * sum(b * case.slope(mean + d * a) for a, b in zip(u, wu, strict=True))
        clear = np.ones_like(d, dtype=bool)
        for k in case.kinks:
            clear &= (mean - k) * (mean + d - k) > 0
        difference = np.where(clear & (abs(d) < 0.5), integral, difference)
    shift = (weight * difference).sum(0)
    variance = (weight * (difference - shift) ** 2).sum(0)
    return at_mean + shift, variance


def errors(case: Case, dtype=torch.float32, points=None):
    """Worst errors of mean and variance, and where, of points at which a millionth of the input's variance or more is left."""
    m, v = grid() if points is None else points
    expected, variance = reference(case, m, v)
    mean, var = torch.tensor(m, dtype=dtype), torch.tensor(v, dtype=dtype)
    got, got_var = (t.double().numpy() for t in case.moments(mean, var, *case.arguments))
    seen = variance > np.maximum(1e-6 * v, 1e-33)
    mean_error = np.where(seen, abs(got - expected) / np.sqrt(np.maximum(expected**2 + variance, 1e-300)), 0)
    var_error = np.where(seen, abs(got_var - variance) / np.maximum(variance, 1e-300), 0)
    where = [(float(m[i]), float(np.sqrt(v[i]))) for i in (mean_error.argmax(), var_error.argmax())]
    return (
        float(mean_error.max()),
        float(var_error.max()),
        where,
        bool((got_var < 0).any()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--json", metavar="FILE", help="write the table as JSON too")
    parser.add_argument("--markdown", metavar="FILE", help="write the table as Markdown too")
    options = parser.parse_args()
    rows = []
    print(f"{'function':<18} {'mean error':>10} {'var error':>10}  path; worst at (mean, s)")
    for case in CASES:
        mean_error, var_error, where, negative = errors(case, getattr(torch, options.dtype))
        worst = " ".join(f"({m:.3g}, {s:.3g})" for m, s in where) + (" NEGATIVE VARIANCE" if negative else "")
        print(f"{case.name:<18} {mean_error:>10.1e} {var_error:>10.1e}  {case.path}; {worst}")
        rows.append(
            {
                "function": case.name,
                "mean_error": mean_error,
                "var_error": var_error,
                "path": case.path,
                "dtype": options.dtype,
            }
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    if options.markdown:
        lines = ["| function | error of the mean | error of the variance | by |", "| --- | ---: | ---: | --- |"]
        lines += [f"| {r['function']} | {r['mean_error']:.1e} | {r['var_error']:.1e} | {r['path']} |" for r in rows]
        note = "Where a millionth of the input's variance or more is left. "
        note += f"Largest over mean in [-6, 6], deviation in [1e-3, 3], {options.dtype}; of the mean relative to √(E² + Var).\n\n"
        with open(options.markdown, "w") as file:
            file.write(note + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
