"""Section 5.6: the RV network against the plain one that has its weights. The paper: an MSE of 1.85e-6 between them.

    python -m benchmarks.paper.transfer --data DIR

The plain network may decode the posterior's mean or a sample of it, and the true mean of its reconstructions is that
of many samples: all three are held against the RV network's mean.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.paper import cells, results, table1

PAPER = 1.85e-6
DRAWS = 64


def measure(setting: cells.Setting, args) -> results.Record:
    run = cells.train(setting, args)
    with torch.no_grad():
        compared = compare(run, setting.variant)
    return compared | {"trained_on": len(run.data.train), **cells.machine(args.device)}


def compare(run: cells.Run, variant: str, images: int = 256) -> results.Record:
    torch.manual_seed(0)
    x, mu, logvar = cells.posterior(run, images)
    rv, from_mean = run.views.propagate(x), run.views.decode(mu)
    from_sample = run.views.decode(cells.sample_normal(mu, logvar))
    true_mean, true_var = cells.monte_carlo(run, mu, logvar, DRAWS)
    propagated = cells.calibrated if variant == "calibrated" else cells.propagated
    return {
        "rv_and_mean": float(run.mse(rv, from_mean)),
        "rv_and_sample": float(run.mse(rv, from_sample)),
        "rv_and_monte_carlo": float(run.mse(rv, true_mean)),
        "mean_and_monte_carlo": float(run.mse(from_mean, true_mean)),
        "variance_propagated": float(propagated(run, mu, logvar.exp()).var.mean()) / (run.high - run.low) ** 2,
        "variance_monte_carlo": float(true_var.mean()) / (run.high - run.low) ** 2,
        "latent_variance": float(logvar.exp().mean()),
        "images_compared": len(x),
        "draws": DRAWS,
    }


def table(records: list[results.Record]) -> str:
    header = ["cell", "trained as", "RV and the mean's image", "RV and a sample's image", "RV and the true mean",
              "the mean's image and the true mean", "variance propagated", "true variance"]  # fmt: skip
    names = ("rv_and_mean", "rv_and_sample", "rv_and_monte_carlo", "mean_and_monte_carlo",
             "variance_propagated", "variance_monte_carlo")  # fmt: skip
    rows = [["paper", "", f"{PAPER:.2e}", *[""] * 5]]
    for (cell, *_), group in results.grouped(records, ["cell", *results.GROUP]).items():
        for (variant,), own in results.grouped(group, ["variant"]).items():
            figures = [", ".join(f"{record[name]:.2e}" for record in own) for name in names]
            rows.append([f"{cells.title(cell)} ({results.conditions(own[0])})", table1.NAMES[variant], *figures])
    return results.markdown(header, rows)


def main() -> None:
    args = cells.argument_parser(__doc__, variants="rv").parse_args()
    for setting in cells.settings(args):
        if setting.variant == "plain":
            raise SystemExit("a plain network has no RV one to be compared with")
        results.add(args.results, "transfer", results.keys(setting), lambda s=setting: measure(s, args), table)
    print(Path(args.results / "transfer.md").read_text())


if __name__ == "__main__":
    main()
