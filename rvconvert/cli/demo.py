"""``rvconvert demo``: one VAE trained plainly and converted, on handwritten digits, and compared in every way.

The digits are scikit-learn's (1797 images, 8x8), which come with the package. Everything is trained by the same
function, from the same weights, on the same batches.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shlex
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from rvconvert import render
from rvconvert._convert import convert
from rvconvert.calibration import calibrate
from rvconvert.cli.images import heat, labelled_rows
from rvconvert.errors import CheckpointError
from rvconvert.files import checkpoint
from rvconvert.options import Options
from rvconvert.plain import to_plain
from rvconvert.verify import truth_ratio

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Demo", "DigitVAE", "run"]

EPOCHS, QUICK_EPOCHS, BATCH, TEST_IMAGES = 20, 2, 64, 360
KL_WEIGHT = 2.5e-4  # to a mean squared error per pixel, as the PyTorch-VAE collection has it
MODES: dict[str, dict[str, Any]] = {
    "independent": {},  # the paper
    "calibrated": {"covariance": "calibrated"},
    # the squared error's exact expectation, in place of the paper's L_c
    "sampled": {"covariance": "sampled", "penalty": 1.0, "penalty_kind": "expected"},
}


class DigitVAE(nn.Module):
    """A small convolutional VAE for images (N, 1, 8, 8) in [0, 1]; a plain one, that knows nothing of rvconvert."""

    def __init__(self, latent_dim: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            nn.Flatten(),
        )
        self.mean = nn.Linear(64 * 4 * 4, latent_dim)
        self.logvar = nn.Linear(64 * 4 * 4, latent_dim)
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, 64 * 2 * 2), nn.Unflatten(1, (64, 2, 2)), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 1, 3, padding=1), nn.Sigmoid()),
        )

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and log-variance, (N, latent_dim) each."""
        features = self.encoder(x)
        return self.mean(features), self.logvar(features)

    def sample(self, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        """A draw from the posterior: the reparameterization trick."""
        return mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images from latents (N, latent_dim)."""
        return self.decoder(z)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, logvar = self.encode(x)
        return self.decode(self.sample(mean, logvar)), mean, logvar


def loss_function(x: torch.Tensor, reconstruction: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """Squared error and weighted KL divergence; nothing in it is about random variables."""
    return F.mse_loss(reconstruction, x) + KL_WEIGHT * kl_divergence(mean, logvar)


def kl_divergence(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL divergence of the posterior from N(0, 1), in nats an image."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1).mean()


def train(model: nn.Module, images: torch.Tensor, epochs: int, seed: int, after: Callable[[float], None]) -> float:
    """An ordinary training loop: the same for a plain model and a converted one. Returns seconds."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    start = time.perf_counter()
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = loss_function(images[rows], *model(images[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after(loss.item())
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: errors are test MSE per pixel, None where it has no meaning; KL in nats an image.

    The deviation of a pixel, root mean square, is as the random variable has it, and the true one.
    """

    model: str
    from_mean: float | None
    from_sample: float | None
    random_variable: float | None
    kl: float
    seconds: float
    propagated_std: float | None = None
    true_std: float | None = None


@dataclasses.dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        rows: the table.
        transfer_mse: between the RV-VAE's reconstruction and that of its weights in the plain class, from the mean.
        epochs: of each training. files: what was written. commands: what to try next.
    """

    rows: tuple[Row, ...]
    transfer_mse: float
    epochs: int
    files: dict[str, str]
    commands: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return dataclasses.asdict(self)

    def table(self) -> Any:
        """The table, to print."""
        numeric = ("from the mean", "from a sample", "random variable", "KL", "deviation", "true", "seconds")
        cells = []
        for r in self.rows:
            errors = map(_error, (r.from_mean, r.from_sample, r.random_variable))
            stds = ("-" if std is None else f"{std:.4f}" for std in (r.propagated_std, r.true_std))
            cells.append((r.model, *errors, f"{r.kl:.2f}", *stds, f"{r.seconds:.1f}"))
        title = f"Handwritten digits: MSE of test reconstructions after {self.epochs} epochs"
        return render.table(("model", *numeric), cells, title=title, numeric=numeric)

    def explanation(self) -> str:
        """What the figures say, in words, and what to do next."""
        plain, rv, transferred, calibrated, from_calibrated, _, from_sampled = self.rows
        lines = (
            "What it says, each error against the plain VAE's:",
            f"- As the paper compares, random variable against sample: {_compared(rv.random_variable, plain.from_sample)}.",
            f"- Its weights in the plain class, from the mean: {_compared(transferred.from_mean, plain.from_mean)}; from a "
            f"sample: {_compared(transferred.from_sample, plain.from_sample)}.",
            f"- A pixel's deviation is {rv.propagated_std:.4f} as propagated and {rv.true_std:.4f} in truth: independence loses",
            "  variance, and training uses what it does not see: a wider posterior, a lower KL.",
            f"- covariance='calibrated' has {calibrated.propagated_std:.4f} for {calibrated.true_std:.4f}. Its weights, from a "
            f"sample: {_compared(from_calibrated.from_sample, plain.from_sample)}.",
            "- covariance='sampled' assumes nothing. Its weights, from a sample: "
            f"{_compared(from_sampled.from_sample, plain.from_sample)}.",
        )
        return "\n".join((*lines, "", f"Picture: {self.files['picture']}", "Next:", *(f"  {c}" for c in self.commands)))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


def _compared(value: float | None, reference: float | None) -> str:
    assert value is not None and reference is not None
    change = 100 * (value / reference - 1)
    return f"{value:.5f}, {abs(change):.0f} % {'below' if change < 0 else 'above'}"


def run(
    out: Path, *, epochs: int | None = None, quick: bool = False, seed: int = 0, force: bool = False, truth: bool = False
) -> Demo:
    """Train, convert, transfer, measure, draw; write everything under ``out``.

    Args:
        out: a folder, made if it is not there. force: replace what an earlier demo wrote in it.
        epochs: of each training; default 20, or 2 with ``quick``. seed: of weights and batches.
        truth: warn where training against independence has not seen most of the variance (``verify.truth_ratio``).

    Raises:
        CheckpointError: a file is there already, or cannot be written.
    """
    names = {
        "plain": "vae.pt",
        "independent": "rv_vae.pt",
        "calibrated": "rv_vae_calibrated.pt",
        "sampled": "rv_vae_sampled.pt",
        "images": "digits.npy",
        "picture": "digits.png",
        "results": "results.json",
    }
    files = {key: out / name for key, name in names.items()}
    _make_room(out, files, force)
    epochs = epochs or (QUICK_EPOCHS if quick else EPOCHS)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)[-TEST_IMAGES:]
    training, test = images[:-TEST_IMAGES], images[-TEST_IMAGES:]

    torch.manual_seed(seed)
    initial = DigitVAE()
    models: dict[str, Any] = {"plain": copy.deepcopy(initial)}
    models |= {name: convert(initial, example_inputs=training[:BATCH], **mode) for name, mode in MODES.items()}
    seconds = {}
    with render.progress() as progress:
        for name, model in models.items():
            label = "plain VAE" if name == "plain" else f"RV-VAE, {name}"
            task = progress.add_task(f"training the {label}", total=epochs, note="")

            def after(loss: float, task: Any = task) -> None:
                progress.update(task, advance=1, note=f"loss {loss:.4f}")

            seconds[name] = train(model, training, epochs, seed, after)

    calibrate(models["calibrated"], training, images=256)
    if truth:
        truth_ratio(models["independent"], test)

    plain = models["plain"].eval()
    rows = [_measured("plain VAE", plain, convert(plain), test, seconds["plain"])]
    transferred = {}
    deviations = {}
    for name in MODES:
        start = time.perf_counter()
        transferred[name] = to_plain(models[name]).eval()
        took = time.perf_counter() - start
        deviations[name] = own, true = _deviations(name, transferred[name], training, test)
        row = _measured(f"RV-VAE, {name}", None, models[name], test, seconds[name])
        rows.append(dataclasses.replace(row, propagated_std=_root_mean_square(own), true_std=_root_mean_square(true)))
        rows.append(_measured("  transferred to the plain class", transferred[name], None, test, took))
    views = _views(test, plain, models["independent"], transferred["calibrated"], deviations)

    for name in MODES:
        checkpoint.save(models[name], files[name], kwargs={}, force=force)
    checkpoint.write(plain.state_dict(), files["plain"], force=force)
    checkpoint.write_atomically(files["images"], lambda f: np.save(f, test[:16].numpy()), force=force)
    picture = labelled_rows(_picture_rows(views, labels), title="Handwritten digits of the test set")
    checkpoint.write_atomically(files["picture"], lambda f: picture.save(f, "PNG", optimize=True), force=force)
    demo = Demo(
        tuple(rows),
        F.mse_loss(views["rv"], views["transferred"]).item(),
        epochs,
        {name: str(path) for name, path in files.items()},
        _commands(out),
    )
    text = json.dumps(demo.to_dict(), indent=2)
    checkpoint.write_atomically(files["results"], lambda f: f.write(text.encode()), force=force)
    return demo


def _make_room(out: Path, files: dict[str, Path], force: bool) -> None:
    there = [path.name for path in files.values() if path.exists()]
    if there and not force:
        raise CheckpointError(f"{out} holds an earlier demo ({', '.join(there)}); use --force to replace it, or --out FOLDER")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be made: {error.strerror}") from None


@torch.no_grad()
def _measured(label: str, plain: nn.Module | None, rv: nn.Module | None, test: torch.Tensor, seconds: float) -> Row:
    """Test errors of a plain model (from the mean, and averaged over ten draws) and of a converted one."""
    from_mean = from_sample = random_variable = None
    torch.manual_seed(0)
    some: Any = plain or rv
    mean, logvar = some.eval().encode(test)
    if plain is not None:
        decode: Any = plain.decode
        from_mean = F.mse_loss(decode(mean), test).item()
        draws = [F.mse_loss(plain(test)[0], test).item() for _ in range(10)]
        from_sample = sum(draws) / len(draws)
    if rv is not None:
        runs = [F.mse_loss(rv.eval()(test)[0], test).item() for _ in range(4)]  # the sampled mode draws paths
        random_variable = sum(runs) / len(runs)
    return Row(label, from_mean, from_sample, random_variable, kl_divergence(mean, logvar).item(), seconds)


@torch.no_grad()
def _deviations(
    name: str, transferred: nn.Module, training: torch.Tensor, test: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each pixel of the test set, (N, 1, 8, 8): as the mode has it, and the true one."""
    options = Options(output="distribution", attach=False)
    reading = convert(transferred, options.in_mode(str(MODES[name].get("covariance", "independent"))))
    if name == "calibrated":
        calibrate(reading, training, images=256)
    truth = convert(transferred, options.in_mode("sampled", pairs=32))
    torch.manual_seed(0)
    return reading.eval()(test)[0].std, truth.eval()(test)[0].std


def _root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@torch.no_grad()
def _views(
    test: torch.Tensor,
    plain: nn.Module,
    independent: nn.Module,
    calibrated: nn.Module,
    deviations: dict[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """What the picture shows, for the whole test set: (N, 1, 8, 8) each. ``calibrated``: its weights in the plain class."""
    torch.manual_seed(0)
    views = {"input": test, "plain": plain(test)[0], "rv": independent.eval()(test)[0]}
    views["transferred"] = to_plain(independent, latent="mean").eval()(test)[0]
    views["calibrated, sample"] = calibrated(test)[0]
    for name in ("independent", "calibrated"):
        views[f"{name} std"], views[f"{name} true std"] = deviations[name]
    return views


def _picture_rows(views: dict[str, torch.Tensor], labels: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """One image of each digit; the deviations share one scale, so that rows can be compared."""
    chosen = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    shown = {name: view[chosen] for name, view in views.items()}
    deviations = [f"{name} {key}" for name in ("independent", "calibrated") for key in ("std", "true std")]
    top = max(shown[name].max().item() for name in deviations)
    shown |= {name: heat(shown[name] / top) for name in deviations}
    return [
        ("input", shown["input"]),
        ("plain VAE,\nfrom a sample", shown["plain"]),
        ("RV-VAE, independent,\nrandom variable's mean", shown["rv"]),
        ("its weights in the plain\nclass, from the mean", shown["transferred"]),
        (f"its deviation, as propagated\n(black 0, yellow {top:.2f})", shown["independent std"]),
        ("its deviation, true", shown["independent true std"]),
        ("RV-VAE, calibrated,\nits weights, from a sample", shown["calibrated, sample"]),
        ("its deviation, as calibrated", shown["calibrated std"]),
        ("its deviation, true", shown["calibrated true std"]),
    ]


def _commands(out: Path) -> tuple[str, ...]:
    folder = shlex.quote(str(out))
    return (
        "rvconvert plan rvconvert.cli.demo:DigitVAE --example-shape 4,1,8,8",
        f"rvconvert verify {folder}/rv_vae.pt --images {folder}/digits.npy",
        f"rvconvert transfer {folder}/rv_vae.pt {folder}/transferred.pt --model rvconvert.cli.demo:DigitVAE",
        f"rvconvert convert rvconvert.cli.demo:DigitVAE {folder}/vae.pt {folder}/lowrank.pt --covariance lowrank "
        "--example-shape 4,1,8,8",
    )
