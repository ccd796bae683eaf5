"""What training in each mode does to a VAE: sampled and mean error, KL, true and reported output variance.

    python -m benchmarks.truth --data mnist.npz --out results/

Trains one small convolutional VAE (12,000 images of MNIST from an npz; without --data, scikit-learn's digits) in each mode
at two KL weights and some seeds, and holds the moments that each mode reports against Monte Carlo. "loss, sample" is the
plain VAE's own objective on test images, its negative evidence bound: squared error of a sample + KL weight x KL. Writes
`truth.json` after every run, continues from it, and prints the tables as Markdown (also `truth.md`).
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from benchmarks.truth.model import (
    ConvVAE,
    Results,
    argument_parser,
    kl_divergence,
    load_images,
    made,
    settings,
    squared_error,
    train,
)
from rvconvert import RandomVariable

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain, twice as long": {},
    "independent": {"covariance": "independent"},
    "calibrated": {"covariance": "calibrated"},
    "low-rank, 4 rows": {"covariance": "lowrank", "rank": 4},
    "sampled, L_c": {"covariance": "sampled"},
    "sampled, expected": {"covariance": "sampled", "penalty_kind": "expected", "penalty": 1.0},
}
TIMES_THE_EPOCHS = {"plain, twice as long": 2}  # what the other modes cost, about: see the last table
KL_WEIGHTS = (5.3e-3, 2e-4)
RANKS: tuple[int | None, ...] = (None, 4, 8, 16)
MONTE_CARLO = 64


class Decoder(nn.Module):
    """The decoder of a VAE by itself, for moments given from outside."""

    def __init__(self, vae: ConvVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


class Reading(nn.Module):
    """A VAE whose posterior's deviation is ``share`` of its own and ``fixed`` beside it; returns the reconstruction alone."""

    def __init__(self, vae: ConvVAE, share: float = 1.0, fixed: float = 0.0) -> None:
        super().__init__()
        self.vae = vae
        self.register_buffer("share", torch.tensor(share))
        self.register_buffer("fixed", torch.tensor(fixed))

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.vae.encode(x)
        return self.vae.decode(mu + (torch.exp(0.5 * logvar) * self.share + self.fixed) * torch.randn_like(mu))


def calibrated(plain: ConvVAE, images: Tensor) -> nn.Module:
    """The net converted for reading, calibrated on training images at its own posterior's width."""
    rv = rvconvert.convert(Reading(plain), covariance="calibrated", output="distribution").eval()
    rvconvert.calibrate(rv, images, pairs=32)
    return rv


def as_plain(model: nn.Module) -> ConvVAE:
    plain = rvconvert.to_plain(model) if hasattr(model, "last_penalty") else model
    assert isinstance(plain, ConvVAE)
    return plain.eval()


def propagate(decoder: nn.Module, mu: Tensor, var: Tensor, **options: Any) -> RandomVariable:
    rv = rvconvert.convert(decoder, random_inputs=("z",), output="distribution", **options).eval()
    return rv(RandomVariable(mu, var))


@torch.no_grad()
def monte_carlo(decoder: nn.Module, mu: Tensor, var: Tensor, runs: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each pixel over ``runs`` draws."""
    mean, squares = torch.zeros(()), torch.zeros(())
    for n in range(1, runs + 1):
        y = decoder(mu + var.sqrt() * torch.randn_like(mu)).double()
        deviation = y - mean
        mean = mean + deviation / n
        squares = squares + deviation * (y - mean)
    return mean, squares / (runs - 1)


@torch.no_grad()
def evaluate(model: nn.Module, mode: str, images: Tensor, training: Tensor) -> dict[str, float | None]:
    """Figures of one trained net on test images: mean squared error per pixel, KL in nats, variance per pixel.

    The calibrated mode reports what it does after ``calibrate`` on 256 of the training images.
    """
    torch.manual_seed(1)
    plain = as_plain(model)
    decoder = Decoder(plain)
    mu, logvar = plain.encode(images)
    var = logvar.exp()
    _, true = monte_carlo(decoder, mu, var, MONTE_CARLO)
    sampled_error = statistics.fmean(float(F.mse_loss(decoder(mu + var.sqrt() * torch.randn_like(mu)), images)) for _ in range(8))
    reported = None
    if mode == "calibrated":
        rv = calibrated(plain, training[:256])
        reported = statistics.fmean(float(rv(x).var.mean()) for x in images.split(250))
    elif MODES[mode]:
        options = {key: value for key, value in MODES[mode].items() if key in ("covariance", "rank")}
        if options["covariance"] == "sampled":
            options["pairs"] = 16
        chunks = zip(mu.split(250), var.split(250), strict=True)
        reported = statistics.fmean(float(propagate(decoder, m, v, **options).var.mean()) for m, v in chunks)
    return {
        "mse_sampled": sampled_error,
        "mse_mean": float(F.mse_loss(decoder(mu), images)),
        "kl": float(kl_divergence(mu, logvar)),
        "posterior_std": float(var.sqrt().mean()),
        "true_var": float(true.mean()),
        "reported_var": reported,
    }


@torch.no_grad()
def ratios(model: nn.Module, images: Tensor, training: Tensor, runs: int = 500) -> dict[str, dict[str, dict[str, float]]]:
    """Reported over true variance, and the error of the mean over that of decode(mu), at the posterior and at s = 1."""
    plain = as_plain(model)
    decoder = Decoder(plain)
    mu, logvar = plain.encode(images)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for scale, var in (("posterior", logvar.exp()), ("1", torch.ones_like(logvar))):
        torch.manual_seed(2)
        mean, true = monte_carlo(decoder, mu, var, runs)
        base = (decoder(mu) - mean).norm()
        kinds: dict[str, dict[str, Any]] = {"independent": {}, "sampled, 16 pairs": {"covariance": "sampled", "pairs": 16}}
        for rank in RANKS:
            kinds["low-rank" + (f", {rank} rows" if rank else "")] = {"covariance": "lowrank", "rank": rank, "seed": 0}
        found[scale] = {}
        rv = calibrated(plain, training[:256])
        if scale == "1":
            rv.share.zero_()
            rv.fixed.fill_(1.0)
        moments = {name: propagate(decoder, mu, var, **options) for name, options in kinds.items()}
        for name, y in (moments | {"calibrated": rv(images)}).items():
            found[scale][name] = {"variance": float(y.var.sum() / true.sum()), "mean": float((y.mean - mean).norm() / base)}
        found[scale]["noise of the mean"] = {"variance": 1.0, "mean": float((true.sum() / runs).sqrt() / base)}
    return found


def plot_depth(latent: int, training: Tensor, test: Tensor, epochs: int, path: Path) -> None:
    """A picture of what each analytic mode keeps of the variance, operation by operation, in a net trained by the paper."""
    torch.manual_seed(0)
    model = rvconvert.convert(ConvVAE(latent))
    train(model, training, squared_error(KL_WEIGHTS[-1]), epochs=epochs, seed=0)
    rvconvert.verify(model, test[:16], samples=400).plot(path)


def step_cost(latent: int, images: Tensor, repeats: int = 5) -> dict[str, float]:
    """Time of a training step (batch 64) in each mode over the plain one; the least of interleaved repeats."""
    kinds = {n: o for n, o in MODES.items() if n not in TIMES_THE_EPOCHS}
    kinds |= {f"low-rank, {r or 'all'} rows": {"covariance": "lowrank", "rank": r} for r in RANKS}
    models = {n: rvconvert.convert(ConvVAE(latent), **o) if o else ConvVAE(latent) for n, o in kinds.items()}
    best = dict.fromkeys(models, float("inf"))
    x = images[:64]
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            y, mu, logvar = model(x)
            (F.mse_loss(y, x) + 1e-3 * kl_divergence(mu, logvar)).backward()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: seconds / best["plain"] for name, seconds in best.items()}


def markdown(results: dict[str, Any]) -> str:
    """The tables."""
    lines = []
    runs = results["runs"]
    for weight in KL_WEIGHTS:
        chosen = {m: [r for r in runs if r["mode"] == m and r["kl_weight"] == weight] for m in MODES}
        if not any(chosen.values()):
            continue
        lines += [f"KL weight {weight:g}", ""]
        lines.append("| trained with | seeds | MSE, sample | MSE, mean | KL | loss, sample | true var | reported var |")
        lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for mode, rows in chosen.items():
            rows = [row | {"loss": row["mse_sampled"] + weight * row["kl"]} for row in rows]
            if rows:
                keys = ("mse_sampled", "mse_mean", "kl", "loss", "true_var", "reported_var")
                lines.append(f"| {mode} | {len(rows)} | " + " | ".join(_mean(rows, key) for key in keys) + " |")
        lines.append("")
    names = list(dict.fromkeys(n for r in runs for n in r["ratios"]["posterior"] if n != "noise of the mean"))
    lines += ["Reported / true variance (error of the mean / that of decode(mu))", ""]
    lines += ["| net trained with | KL weight | seed | posterior s | scale | " + " | ".join(names) + " |"]
    lines.append("| --- | ---: | ---: | ---: | --- |" + " ---: |" * len(names))
    for r in runs:
        for scale, found in r["ratios"].items():
            cells = [f"{found[n]['variance']:.3g} ({found[n]['mean']:.2f})" if n in found else "" for n in names]
            row = [r["mode"], f"{r['kl_weight']:g}", str(r["seed"]), f"{r['posterior_std']:.2f}", scale, *cells]
            lines.append("| " + " | ".join(row) + " |")
    if "cost" in results:
        lines += ["", "Time of a training step over the plain one", "", "| mode | ratio |", "| --- | ---: |"]
        lines += [f"| {name} | {ratio:.1f} |" for name, ratio in results["cost"].items()]
    return "\n".join(lines) + "\n"


def _mean(rows: list[dict[str, Any]], key: str) -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3g}{spread}"


def main() -> None:
    parser = argument_parser(__doc__, images=12_000)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--test-images", type=int, default=1000)
    args = parser.parse_args()

    training, test = load_images(args.data, args.images)
    test = test[: args.test_images]
    results = Results(args.out / "truth.json", settings(args, training) | {"latent": args.latent})
    for seed in range(args.seeds):
        for mode in args.modes:
            for weight in KL_WEIGHTS:
                if results.has(mode=mode, kl_weight=weight, seed=seed):
                    continue
                model = made(MODES[mode], latent=args.latent, seed=seed)
                start = time.perf_counter()
                epochs = args.epochs * TIMES_THE_EPOCHS.get(mode, 1)
                train(model, training, squared_error(weight), epochs=epochs, seed=seed)
                run = {"mode": mode, "kl_weight": weight, "seed": seed, "seconds": time.perf_counter() - start}
                run |= evaluate(model, mode, test, training)
                run["ratios"] = ratios(model, test[:32], training)
                results.add(run)
                print({k: v for k, v in run.items() if k != "ratios"}, flush=True)
    if not (args.out / "verify.png").exists():
        plot_depth(args.latent, training, test, args.epochs, args.out / "verify.png")
    results.held["cost"] = step_cost(args.latent, training)
    results.write()
    (args.out / "truth.md").write_text(markdown(results.held))
    print(markdown(results.held))


if __name__ == "__main__":
    main()
