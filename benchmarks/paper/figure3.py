"""Figure 3: the epoch at which each system's validation loss is least; the paper's are on CIFAR-10.

    python -m benchmarks.paper.figure3 --data DIR

The paper prints bars without figures, and claims: RV reaches its least loss no later than the original, and that loss
is lower although it includes L_c. The validation images are the last tenth of the training images.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper import cells, results, table1


def table(records: list[results.Record]) -> str:
    header = ["cell", "epochs of least loss: plain", "RV", "least loss: plain", "RV", "RV with L_c", "no later", "lower"]
    rows = []
    for (cell, *_), group in results.grouped(records, ["cell", *results.GROUP]).items():
        pairs = table1.pair_by_seed(group)
        if not pairs:
            continue
        plain, rv, with_penalty = ([curve(pair[i], added) for pair in pairs] for i, added in ((0, False), (1, False), (1, True)))
        later = any(epoch(r) > epoch(p) for p, r in zip(plain, with_penalty, strict=True))
        higher = any(min(r) >= min(p) for p, r in zip(plain, with_penalty, strict=True))
        rows.append([
            f"{cells.title(cell)} ({results.conditions(group[0])})",
            ", ".join(str(epoch(losses)) for losses in plain),
            ", ".join(str(epoch(losses)) for losses in with_penalty),
            *(", ".join(results.number(min(losses)) for losses in each) for each in (plain, rv, with_penalty)),
            "no" if later else "yes",
            "no" if higher else "yes",
        ])  # fmt: skip
    return results.markdown(header, rows)


def curve(record: results.Record, with_penalty: bool) -> list[float]:
    losses = record["validation_loss"]
    penalties = record.get("validation_penalty", [0.0] * len(losses)) if with_penalty else [0.0] * len(losses)
    return [loss + penalty for loss, penalty in zip(losses, penalties, strict=True)]


def epoch(losses: list[float]) -> int:
    return losses.index(min(losses)) + 1


def main() -> None:
    cifar = [cell for cell in cells.CELLS if cell.endswith("cifar10")]
    args = cells.argument_parser(__doc__, cells=cifar, variants="plain,rv").parse_args()
    for setting in cells.settings(args):
        results.add(args.results, "figure3", results.keys(setting), lambda s=setting: cells.measured(cells.train(s, args)), table)
    print(Path(args.results / "figure3.md").read_text())


if __name__ == "__main__":
    main()
