"""What L_c does: the paper's lambda, 50, against 0, 5 and 500 (sections 4.3 and 5.1).

python -m benchmarks.paper.penalty_sweep --data DIR
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.paper import cells, results, table1

DRAWS = 64


def measure(setting: cells.Setting, args, images: int = 256) -> results.Record:
    run = cells.train(setting, args)
    torch.manual_seed(0)
    _, mu, logvar = cells.posterior(run, images)
    scale = (run.high - run.low) ** 2
    figures = cells.measured(run)
    if setting.variant != "plain":
        propagated = cells.calibrated if setting.variant == "calibrated" else cells.propagated
        figures["variance_propagated"] = float(propagated(run, mu, logvar.exp()).var.mean()) / scale
    return figures | {
        "variance_monte_carlo": float(cells.monte_carlo(run, mu, logvar, DRAWS)[1].mean()) / scale,
        "latent_variance": float(logvar.exp().mean()),
    }


def table(records: list[results.Record]) -> str:
    header = ["trained as", "λ", "MSE of the RV's mean", "from the mean", "from a sample", "KL, nats", "posterior's variance",
              "image variance: propagated", "true (Monte Carlo)"]  # fmt: skip
    names = ("mse_rv", "mse_mean", "mse_sample", "kl", "latent_variance", "variance_propagated", "variance_monte_carlo")
    rows = []
    for (cell, *_), group in results.grouped(records, ["cell", *results.GROUP]).items():
        rows.append([f"**{cells.title(cell)}**: {results.conditions(group[0])}", *[""] * 8])
        for (variant, penalty), own in sorted(results.grouped(group, ["variant", "penalty"]).items(), reverse=True):
            weight = "" if variant == "plain" else f"{penalty:g}"
            rows.append([table1.NAMES[variant], weight, *(results.over_seeds(own, name) for name in names)])
    return results.markdown(header, rows)


def main() -> None:
    parser = cells.argument_parser(__doc__, cells=["vae-mnist"], variants="plain,rv,calibrated")
    parser.add_argument("--penalties", default="0,5,50,500", help="values of lambda, by commas")
    args = parser.parse_args()
    for setting in cells.settings(args):
        for penalty in (setting.penalty,) if setting.variant == "plain" else map(float, args.penalties.split(",")):
            each = cells.like(setting, penalty=penalty)
            results.add(args.results, "penalty_sweep", results.keys(each), lambda s=each: measure(s, args), table)
    print(Path(args.results / "penalty_sweep.md").read_text())


if __name__ == "__main__":
    main()
