"""The losses that read a distribution, against squared error with a tuned KL weight, at equal cost.

    python -m benchmarks.truth.losses --data mnist.npz --out results/

Every training has the same time: a converted model's step is one pair of paths, about twice a plain one, so the plain model
gets twice the epochs. What is compared is a figure in which no KL weight is left to choose, the negative evidence bound of
test images in nats at the best shared deviation (Rybkin et al. 2021): D/2 log(mean squared error of samples) + KL. Writes
`losses.json` after every run, continues from it, and prints the table as Markdown (also `losses.md`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from benchmarks.truth.model import ConvVAE, kl_divergence, load_images

KL_WEIGHTS = (5e-5, 2e-4, 5e-4, 1e-3, 5e-3)
Loss = Callable[[Any, Tensor, Tensor], Tensor]


def trainings() -> dict[str, tuple[dict[str, Any], Loss, int]]:
    """Name -> (options of convert, loss(output, images, KL), times the epochs)."""
    reading = {"covariance": "sampled", "output": "distribution", "attach": False}
    made: dict[str, tuple[dict[str, Any], Loss, int]] = {}
    for weight in KL_WEIGHTS:
        made[f"plain, squared error + {weight:g} KL"] = ({}, lambda y, x, kl, w=weight: F.mse_loss(y, x) + w * kl, 2)
    for weight in KL_WEIGHTS:
        made[f"expected squared error + {weight:g} KL"] = (
            reading,
            lambda y, x, kl, w=weight: rvconvert.expected_squared_error(y, x) + w * kl,
            1,
        )
    elements = 32 * 32
    made["plain, optimal sigma + KL"] = ({}, lambda y, x, kl: elements / 2 * F.mse_loss(y, x).log() + kl, 2)
    made["optimal sigma of the distribution + KL"] = (reading, lambda y, x, kl: rvconvert.optimal_sigma_nll(y, x) + kl, 1)
    return made


def train(model: nn.Module, loss_of: Loss, images: Tensor, epochs: int, seed: int, batch: int = 64) -> None:
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            y, mu, logvar = model(images[index])
            loss = loss_of(y, images[index], kl_divergence(mu, logvar))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> dict[str, float]:
    torch.manual_seed(1)
    plain = rvconvert.to_plain(model) if hasattr(model, "last_penalty") else model
    plain.eval()
    mu, logvar = plain.encode(images)
    error = statistics.fmean(float(F.mse_loss(plain(images)[0], images)) for _ in range(8))
    kl = float(kl_divergence(mu, logvar))
    bound = images[0].numel() / 2 * math.log(error) + kl
    return {"bound": bound, "mse_sampled": error, "mse_mean": float(F.mse_loss(plain.decode(mu), images)), "kl": kl}


def markdown(runs: list[dict[str, Any]]) -> str:
    lines = ["| trained with | seeds | bound, nats | MSE, sample | MSE, mean | KL |", "| --- |" + " ---: |" * 5]
    for name in trainings():
        rows = [run for run in runs if run["name"] == name]
        if rows:
            cells = []
            for key, form in (("bound", ".1f"), ("mse_sampled", ".4f"), ("mse_mean", ".4f"), ("kl", ".2f")):
                values = [row[key] for row in rows]
                spread = f" ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):{form}}{spread}")
            lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="npz with uint8 x_train and x_test; default scikit-learn's digits")
    parser.add_argument("--out", type=Path, default=Path("truth-results"))
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=1000)
    args = parser.parse_args()
    training, test = load_images(args.data, args.images)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "losses.json"
    settings = {"data": args.data.name if args.data else "digits", "images": len(training), "epochs": args.epochs}
    held = json.loads(file.read_text()) if file.exists() else {"settings": settings, "runs": []}
    if held["settings"] != settings:
        raise SystemExit(f"{file} holds results of other settings: {held['settings']}; choose another --out")
    done = {(run["name"], run["seed"]) for run in held["runs"]}
    for seed in range(args.seeds):
        for name, (options, loss_of, times) in trainings().items():
            if (name, seed) in done:
                continue
            torch.manual_seed(seed)
            model: nn.Module = ConvVAE()
            if options:
                model = rvconvert.convert(model, **options)
            train(model, loss_of, training, times * args.epochs, seed)
            held["runs"].append({"name": name, "seed": seed, **evaluate(model, test[: args.test_images])})
            file.write_text(json.dumps(held, indent=1) + "\n")
            print(held["runs"][-1], flush=True)
    (args.out / "losses.md").write_text(markdown(held["runs"]))
    print(markdown(held["runs"]))


if __name__ == "__main__":
    main()
