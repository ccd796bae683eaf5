"""The losses that read a distribution, against squared error with a tuned KL weight, at equal cost.

    python -m benchmarks.truth.losses --data mnist.npz --out results/

Every training has the same time: a converted model's step is one pair of paths, about twice a plain one, so the plain model
gets twice the epochs. What is compared is a figure in which no KL weight is left to choose, the negative evidence bound of
test images in nats at the best shared deviation (Rybkin et al. 2021): D/2 log(mean squared error of samples) + KL. Writes
`losses.json` after every run, continues from it, and prints the table as Markdown (also `losses.md`).
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rvconvert
from benchmarks.truth.model import (
    Loss,
    Results,
    argument_parser,
    kl_divergence,
    load_images,
    made,
    settings,
    squared_error,
    train,
)

KL_WEIGHTS = (5e-5, 2e-4, 5e-4, 1e-3, 5e-3)


def trainings() -> dict[str, tuple[dict[str, Any], Loss, int]]:
    """Name -> (options of convert, loss(output, images, KL), times the epochs)."""
    reading = {"covariance": "sampled", "output": "distribution", "attach": False}
    made: dict[str, tuple[dict[str, Any], Loss, int]] = {}
    for weight in KL_WEIGHTS:
        made[f"plain, squared error + {weight:g} KL"] = ({}, squared_error(weight), 2)
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
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--test-images", type=int, default=1000)
    args = parser.parse_args()
    training, test = load_images(args.data, args.images)
    results = Results(args.out / "losses.json", settings(args, training))
    for seed in range(args.seeds):
        for name, (options, loss_of, times) in trainings().items():
            if results.has(name=name, seed=seed):
                continue
            model = made(options, seed=seed)
            train(model, training, loss_of, epochs=times * args.epochs, seed=seed)
            results.add({"name": name, "seed": seed, **evaluate(model, test[: args.test_images])})
            print(results.runs[-1], flush=True)
    (args.out / "losses.md").write_text(markdown(results.runs))
    print(markdown(results.runs))


if __name__ == "__main__":
    main()
