"""How the cost of conversion and of a training step grows with depth, width, image size and batch.

    python -m benchmarks.scaling --out scaling-results

Doubles one dimension of a convolutional VAE at a time. Writes `scaling.json`, `scaling.md` and `scaling.png`, and prints the
table. The exponent is the slope of a line through the logarithms: 1 is linear. What counts is that a converted model's is not
above the plain one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import rvconvert
from benchmarks.memory import kept_for_backward

VARIED = {"depth": (1, 2, 4, 8), "width": (8, 16, 32, 64), "size": (16, 32, 64, 128), "batch": (4, 8, 16, 32)}
MEASURES = ("convert, s", "plain step, s", "step, s", "plain memory, MB", "memory, MB")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Convolutional blocks at full resolution in the decoder; channels; pixels a side; images."""

    depth: int = 2
    width: int = 16
    size: int = 32
    batch: int = 8


class VAE(nn.Module):
    """A strided encoder; a decoder that upsamples once and then has ``depth`` blocks."""

    def __init__(self, shape: Shape, latent: int = 16) -> None:
        super().__init__()
        width, self.side = shape.width, shape.size // 2
        self.encoder = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.LeakyReLU(), nn.Conv2d(width, 2 * latent, self.side))
        self.start = nn.Sequential(nn.Linear(latent, width), nn.Unflatten(1, (width, 1, 1)), nn.Upsample(size=self.side))
        blocks: list[nn.Module] = [nn.ConvTranspose2d(width, width, 3, 2, 1, 1)]
        for _ in range(shape.depth):
            blocks += [nn.BatchNorm2d(width), nn.LeakyReLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.decoder = nn.Sequential(*blocks, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).flatten(1).chunk(2, 1)
        return self.decoder(self.start(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar))), mu, logvar


def step(model: nn.Module, x: Tensor) -> Tensor:
    y, mu, logvar = model(x)
    loss: Tensor = (y - x).square().mean() + 1e-3 * (mu.square() + logvar.exp() - logvar).mean()
    return loss


def measure(shape: Shape, rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    plain, x = VAE(shape), torch.rand(shape.batch, 3, shape.size, shape.size)
    conversions, times = [], {"plain step, s": [], "step, s": []}  # type: ignore[var-annotated]
    for _ in range(rounds):
        start = time.perf_counter()
        converted = rvconvert.convert(plain, example_inputs=x)
        conversions.append(time.perf_counter() - start)
    models = {"plain step, s": plain, "step, s": converted}
    for model in models.values():
        step(model, x).backward()
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, x).backward()
            times[name].append(time.perf_counter() - start)
    return {
        "convert, s": statistics.median(conversions),
        **{name: statistics.median(seconds) for name, seconds in times.items()},
        "plain memory, MB": kept_for_backward(lambda: step(plain, x)) / 1e6,
        "memory, MB": kept_for_backward(lambda: step(converted, x)) / 1e6,
    }


def exponent(values: tuple[int, ...], costs: list[float]) -> float:
    """Slope of log cost over log value in the upper half, where constants matter less."""
    half = len(values) // 2
    return float(np.polyfit(np.log(values[half - 1 :]), np.log(costs[half - 1 :]), 1)[0])


def markdown(results: dict[str, dict[str, list[float]]]) -> str:
    lines = ["| varied | values | " + " | ".join(MEASURES) + " |", "| --- | --- |" + " --- |" * len(MEASURES)]
    for name, columns in results.items():
        slopes = [f" (exponent {exponent(VARIED[name], columns[m]):.2f})" for m in MEASURES]
        cells = [" ".join(f"{cost:.3g}" for cost in columns[m]) + slope for m, slope in zip(MEASURES, slopes, strict=True)]
        lines.append(f"| {name} | {', '.join(map(str, VARIED[name]))} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    grid = figure.subplots(2, len(results), sharey="row", squeeze=False)
    for column, (name, columns) in enumerate(results.items()):
        for row, unit in enumerate((", s", ", MB")):
            axes = grid[row][column]
            for label in (m for m in MEASURES if m.endswith(unit)):
                axes.loglog(VARIED[name], columns[label], marker="o", label=label.removesuffix(unit))
            axes.set_xticks(VARIED[name], VARIED[name], minor=False)
            axes.minorticks_off()
            axes.set_xlabel(name)
            if column == 0:
                axes.set_ylabel("seconds" if row == 0 else "MB kept for backward")
                axes.legend(fontsize=8)
    figure.suptitle("Cost of conversion and of a training step, plain and converted")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("scaling-results"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rvconvert.moments.compilation.disable()  # tensors of one table would run in two ways
    results: dict[str, dict[str, list[float]]] = {}
    for name, values in VARIED.items():
        rows = [measure(dataclasses.replace(Shape(), **{name: value}), args.rounds) for value in values]
        results[name] = {m: [row[m] for row in rows] for m in MEASURES}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps({"values": VARIED, "results": results}, indent=1))
    (args.out / "scaling.md").write_text(markdown(results))
    plot(results, args.out / "scaling.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
