"""The paper's ten cells, each trained by its own example script, and what is measured of a trained one.

All commands share the folder of runs (`--runs`): what one has trained, another reads from its checkpoint, a run that
was cut off goes on from its last epoch, and a cell that a results file already holds is not touched again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

import rvconvert

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "examples"))  # scripts, which import one another as such

import image_sets  # noqa: E402
from common import Run, labelled_grid, sample_normal  # noqa: E402, F401

image_sets.load = lru_cache(maxsize=2)(image_sets.load)  # a face set takes seconds to decode

CELLS = {  # in the order of the paper's Table 1: mean squared errors, original and RV-VAE
    "vae-mnist": (0.0081, 0.0005),
    "vae-cifar10": (0.0763, 0.0107),
    "vae-celeba": (0.0478, 0.0192),
    "beta_tcvae-mnist": (0.0021, 0.0004),
    "beta_tcvae-cifar10": (0.0412, 0.0157),
    "beta_tcvae-celeba": (0.0412, 0.0130),
    "dc_vae-cifar10": (0.1245, 0.1139),
    "soft_intro_vae-mnist": (0.0194, 0.0129),
    "soft_intro_vae-cifar10": (0.0211, 0.0155),
    "soft_intro_vae-faces": (0.0247, 0.0151),
}
SYSTEMS = {"vae": "VAE", "beta_tcvae": "β-TCVAE", "dc_vae": "DC-VAE", "soft_intro_vae": "Soft-Intro-VAE"}
DATASETS = {"digits": "digits", "mnist": "MNIST", "cifar10": "CIFAR-10", "celeba": "CelebA 64×64", "faces": "faces 128×128"}
# The VAE weighs its KL term by batch / training images: on a part of a set it must have the whole set's weight.
WHOLE = {"mnist": 60_000, "cifar10": 50_000, "celeba": 162_770, "faces": 30_000, "digits": 1_500}
VARIANTS = {
    "plain": [],
    "longer": [],
    "rv": ["--rv"],
    "calibrated": ["--rv", "--covariance", "calibrated"],
    "sampled": ["--rv", "--covariance", "sampled", "--pairs", "1"],
    "lowrank": ["--rv", "--covariance", "lowrank", "--rank", "4"],
}
# The plain network at the cost of an RV one: the paper's figure of a step is about 3 times the plain one's time (5.2).
TIMES_THE_EPOCHS = {"longer": 3}


def title(cell: str) -> str:
    system, dataset = cell.split("-")
    return f"{SYSTEMS[system]}, {DATASETS[dataset]}"


@dataclass(frozen=True)
class Setting:
    """One training run. Everything but `variant` is the same on both sides of a comparison, `longer` aside."""

    cell: str
    variant: str
    seed: int
    epochs: int
    images: int | None = None  # training images; None for all
    test_images: int | None = None
    shrink: int = 1
    batch: int | None = None  # None for the example's own
    penalty: float = 50.0
    quirk: str | None = None

    @property
    def length(self) -> int:
        """Epochs of this variant where the others have `epochs`."""
        return self.epochs * TIMES_THE_EPOCHS.get(self.variant, 1)

    def arguments(self, data: Path | None, runs: Path, device: str) -> list[str]:
        """The command line of the example. The folder is that of the run, however many epochs it has by now."""
        system, dataset = self.cell.split("-")
        named = {name: value for name, value in asdict(self).items() if name not in ("epochs", "test_images")}
        folder = runs / "-".join(f"{n}_{v}" if n not in ("cell", "variant") else v for n, v in named.items() if v is not None)
        given = {"--dataset": dataset, "--epochs": self.length, "--seed": self.seed, "--shrink": self.shrink}
        given |= {"--penalty": self.penalty, "--device": device, "--out": folder, "--pictures": 10**6, "--data": data}
        given |= {"--train-images": self.images, "--test-images": self.test_images, "--batch": self.batch}
        if system == "vae":
            given["--kl-weight"] = (self.batch or 64) / WHOLE[dataset]
        line = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
        return [*line, "--resume", *VARIANTS[self.variant]]


def argument_parser(
    description: str, *, cells: list[str] | None = None, variants: str = "plain,longer,rv,calibrated,sampled"
) -> argparse.ArgumentParser:
    """The arguments that all commands understand; the defaults are the paper's protocol."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="as for the examples; without it, only digits")
    parser.add_argument("--cells", default=",".join(cells or CELLS), help="SYSTEM-DATASET, by commas")
    parser.add_argument("--variants", default=variants, help=f"of {', '.join(VARIANTS)}, by commas")
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--images", type=int, metavar="N", help="only the first N training images")
    parser.add_argument("--test-images", type=int, metavar="N", help="only the first N test images")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="all channel counts / N")
    parser.add_argument("--batch", type=int, help="if not the system's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/paper"), metavar="DIR", help="checkpoints, to be resumed")
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR", help="JSON and Markdown")
    return parser


def settings(args: argparse.Namespace) -> Iterator[Setting]:
    """Every run that the arguments ask for, the variants of a cell and a seed next to each other."""
    for cell in args.cells.split(","):
        if cell.split("-")[0] not in SYSTEMS or cell.split("-")[-1] not in DATASETS:
            raise SystemExit(f"no cell {cell!r}: SYSTEM-DATASET, of {', '.join(SYSTEMS)} and {', '.join(DATASETS)}")
        for seed in range(args.seeds):
            for variant in args.variants.split(","):
                yield Setting(cell, variant, seed, args.epochs, args.images, args.test_images, args.shrink, args.batch)


def train(setting: Setting, args: argparse.Namespace) -> Run:
    """Train, or finish, or load a run. The models of the returned one are trained and in eval mode."""
    from benchmarks.paper.quirks import QUIRKS

    example = importlib.import_module(setting.cell.split("-")[0])
    with QUIRKS[setting.quirk].applied() if setting.quirk else nullcontext():
        run = example.main(setting.arguments(args.data, args.runs, args.device))
    if run.epoch != setting.length:
        raise SystemExit(f"{run.args.out} has {run.epoch} epochs already, more than {setting.epochs}: choose another --runs")
    return run


def measured(run: Run) -> dict[str, object]:
    """The last epoch's test figures and every epoch's validation loss, from the run's own metrics file."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    last = lines[-1]
    figures = {name.removeprefix("test_"): value for name, value in last.items() if name.startswith("test_")}
    figures["validation_loss"] = [line["validation_loss"] for line in lines]
    if "validation_penalty" in last:
        figures["validation_penalty"] = [line["validation_penalty"] for line in lines]
    figures |= {"trained_on": len(run.data.train), "tested_on": len(run.data.test)}
    return figures | {"seconds": round(sum(line["seconds"] for line in lines), 1), **machine(run.args.device)}


def machine(device: str) -> dict[str, object]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


@torch.no_grad()
def posterior(run: Run, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` test images, and the mean and log-variance of their posteriors."""
    x = run.to_range(run.data.test[:count])
    return x, *run.views.encode(x)


@torch.no_grad()
def propagated(run: Run, mu: Tensor, var: Tensor) -> rvconvert.RandomVariable:
    """The whole random variable that a converted run's decoder makes of N(mu, var), under independence."""
    z = rvconvert.RandomVariable(mu, var)
    if "vae" in run.states:
        return run.states["vae"].decode(z)
    return rvconvert.to_plain(run.states["decoder"]).eval()(z)


@torch.no_grad()
def calibrated(run: Run, mu: Tensor, var: Tensor, images: int = 256) -> rvconvert.RandomVariable:
    """The same by gains that are measured on training images."""
    model, method = (run.states["vae"], "decode") if "vae" in run.states else (run.states["decoder"], "forward")
    options = {"covariance": "calibrated", "output": "distribution", "methods": (method,), "random_inputs": ("z",)}
    converted = rvconvert.convert(rvconvert.to_plain(model), **options).eval()
    measured_on, logvar = run.views.encode(run.to_range(run.data.train[:images]))
    rvconvert.calibrate(converted, (rvconvert.RandomVariable(measured_on, logvar.exp()),))
    return getattr(converted, method)(rvconvert.RandomVariable(mu, var))


@torch.no_grad()
def monte_carlo(run: Run, mu: Tensor, logvar: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of the plain decoder's images over draws of the posterior."""
    images = torch.stack([run.views.decode(sample_normal(mu, logvar)) for _ in range(draws)])
    return images.mean(0), images.var(0)


def like(setting: Setting, **changes: object) -> Setting:
    return replace(setting, **changes)  # type: ignore[arg-type]
