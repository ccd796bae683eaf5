"""Write every table anew from the JSON files, and the marked blocks of README.md with them.

python -m benchmarks.paper.report
"""

from __future__ import annotations

import re
from collections.abc import Callable

from benchmarks.paper import (
    cells,
    cost,
    figure3,
    penalty_sweep,
    pictures,
    quirks,
    results,
    table1,
    table2,
    transfer,
)  # fmt: skip

TABLES: dict[str, Callable[[list[results.Record]], str]] = {
    module.__name__.rpartition(".")[2]: module.table
    for module in (table1, table2, figure3, cost, transfer, penalty_sweep, quirks, pictures)
}
README = cells.HERE / "README.md"


def claims(read: Callable[[str], list[results.Record]]) -> str:
    """The paper's claims, counted over the cells that have been run."""
    rows = [
        *reconstruction(read("table1")),
        *equal_cost(read("table1")),
        *generation(read("table2")),
        *convergence(read("figure3")),
        *price(read("cost")),
        *transferred(read("transfer")),
        *variance(read("penalty_sweep")),
        *calibrated(read("table1"), read("transfer")),
    ]
    return results.markdown(["section", "the paper says", "measured here"], rows)


def effort(read: Callable[[str], list[results.Record]]) -> str:
    """How many runs stand behind the tables, under which conditions, and how long they trained."""
    runs = {run_of(record): record for name in TABLES for record in read(name) if "seconds" in record}
    rows = []
    for (cell, *_), group in table1.in_order(list(runs.values())):
        seconds = sum(record["seconds"] for record in group)
        counts = (results.updates(group[0]), group[0]["tested_on"], len({record["seed"] for record in group}), len(group))
        counted = [f"{count:,}" for count in counts]
        rows.append([cells.title(cell), results.conditions(group[0]), *counted, f"{seconds / 60:.1f}"])
    rows.append(["all", *[""] * 4, f"{len(runs)}", f"{sum(record['seconds'] for record in runs.values()) / 60:.1f}"])
    return results.markdown(["cell", "trained on", "updates", "test images", "seeds", "runs", "minutes"], rows)


def run_of(record: results.Record) -> tuple:
    return tuple(record[name] for name in ("cell", "variant", "seed", "penalty", "quirk", *results.GROUP))


def reconstruction(records: list[results.Record]) -> list[list[str]]:
    pairs = [pairs for _, group in table1.in_order(records) if (pairs := table1.pair_by_seed(group))]
    if not pairs:
        return []
    pairs = [each for each in pairs if table1.verdict(each) != table1.TOO_SHORT]
    verdicts = [table1.verdict(each) for each in pairs]
    counted = "; ".join(
        f"{name} in {verdicts.count(name)}" for name in ("confirmed", "only under the paper's protocol", "not confirmed")
    )
    sampled = sum(all(rv["mse_sample"] < plain["mse_sample"] for plain, rv in each) for each in pairs)
    settings = f"of {len(pairs)} settings of the cells with {table1.LEAST_UPDATES} updates or more: {counted}"
    lowered = f"of {len(pairs)} settings, RV training lowers the error from a *sample* in {sampled}"
    return [
        ["5.4, Table 1", "in all ten cells RV reconstructs better, up to 16 times", settings],
        ["5.6", "the plain network keeps the functionality of the RV one", lowered],
    ]


def equal_cost(records: list[results.Record]) -> list[list[str]]:
    """Plain networks trained for as long as the paper says RV takes: their error over the RV mean's, both ways."""
    ways: dict[str, list[float]] = {"mse_mean": [], "mse_sample": []}
    for group in results.grouped(records, ["cell", "seed", *results.GROUP]).values():
        by = {record["variant"]: record for record in group}
        if {"longer", "rv"} <= set(by):
            for name, values in ways.items():
                values.append(by["longer"][name] / by["rv"]["mse_rv"])
    if not ways["mse_mean"]:
        return []
    measured = f"from the mean {span(ways['mse_mean'])} times the RV mean's error, from a sample {span(ways['mse_sample'])} times"
    return [["5.2, 5.4", "(plain training for 3 times the epochs, which costs the same, is not shown)", measured]]


def generation(records: list[results.Record]) -> list[list[str]]:
    better, total = 0, 0
    for group in results.grouped(records, ["cell", "metric", "seed", *results.GROUP]).values():
        by = {(record["variant"], record["way"]): record["distance"] for record in group}
        if ("plain", "prior") in by and ("rv", "prior, var 1") in by:
            total += 1
            better += by["rv", "prior, var 1"] < by["plain", "prior"]
    if not total:
        return []
    measured = f"lower distance in {better} of {total} runs"
    return [["5.5, Table 2", "RV, with var 1, has the lower FID in all three cells", measured]]


def convergence(records: list[results.Record]) -> list[list[str]]:
    later = lower = total = 0
    for group in results.grouped(records, ["cell", "seed", *results.GROUP]).values():
        by = {record["variant"]: record for record in group}
        if {"plain", "rv"} <= set(by):
            plain, rv = figure3.curve(by["plain"], False), figure3.curve(by["rv"], True)
            total += 1
            later += figure3.epoch(rv) > figure3.epoch(plain)
            lower += min(rv) < min(plain)
    if not total:
        return []
    return [
        ["5.3, Figure 3", "RV reaches its least loss in a similar or earlier epoch", f"later in {later} of {total} runs"],
        ["5.3", "RV's least loss is lower by far, L_c included", f"lower in {lower} of {total} runs"],
    ]


def price(records: list[results.Record]) -> list[list[str]]:
    ratios: dict[str, list[float]] = {"seconds": [], "operations": []}
    for group in results.grouped(records, ["cell", "shrink", "batch"]).values():
        by = {record["mode"]: record for record in group}
        if {"plain", "independent"} <= set(by):
            for what, values in ratios.items():
                values.append(by["independent"][f"training_{what}"] / by["plain"][f"training_{what}"])
    if not ratios["seconds"]:
        return []
    measured = f"a training step: {span(ratios['seconds'])} times the time, {span(ratios['operations'])} times the FLOPs"
    return [["5.2", "about 3 times slower, about 30 % more FLOPs", measured]]


def transferred(records: list[results.Record]) -> list[list[str]]:
    own = [record for record in records if record["variant"] == "rv"]
    if not own:
        return []
    ends = [f"{pick(record[name] for record in own):.1e}" for name in ("rv_and_mean", "rv_and_sample") for pick in (min, max)]
    return [["5.6", f"the plain network with RV's weights is {transfer.PAPER:.2e} from RV, in MSE",
             f"decoding the mean {ends[0]} to {ends[1]}; decoding a sample {ends[2]} to {ends[3]}"]]  # fmt: skip


def variance(records: list[results.Record]) -> list[list[str]]:
    rows = []
    for variant, moments in (("rv", "under independence"), ("calibrated", "calibrated")):
        own = [record for record in records if record["variant"] == variant]
        at = {weight: [record for record in own if record["penalty"] == weight] for weight in (0, 50)}
        if all(at.values()):
            free, propagated, true = (
                span([record[name] for record in at[weight]])
                for weight, name in ((0, "variance_monte_carlo"), (50, "variance_propagated"), (50, "variance_monte_carlo"))
            )
            measured = f"{moments}: true variance {free} without L_c, {true} with λ = 50, where {propagated} is propagated"
            rows.append(["4.3", "L_c drives the variance of the output to zero", measured])
    return rows


def calibrated(records: list[results.Record], compared: list[results.Record]) -> list[list[str]]:
    """The same under measured moments: the error against the plain network's, and whether the variance is the true one."""
    rows = []
    ratios = []
    for group in results.grouped(records, ["cell", "seed", *results.GROUP]).values():
        by = {record["variant"]: record for record in group if record["penalty"] == 50}
        if {"plain", "calibrated"} <= set(by) and results.updates(by["plain"]) >= table1.LEAST_UPDATES:
            ratios.append(by["calibrated"]["mse_sample"] / by["plain"]["mse_sample"])
    if ratios:
        below = sum(ratio < 1 for ratio in ratios)
        measured = f"calibrated: {span(ratios)} times the plain network's, lower in {below} of {len(ratios)} runs"
        rows.append(["5.4", "(the error from a sample, where L_c sees the variance there is)", measured])
    for variant, moments in (("rv", "under independence"), ("calibrated", "calibrated")):
        known = [r["variance_propagated"] / r["variance_monte_carlo"] for r in compared if r["variant"] == variant]
        if known:
            measured = f"{moments}: {span(known)} times the true variance, after training"
            rows.append(["3", "the variance propagated is the output's", measured])
    return rows


def span(values: list[float]) -> str:
    low, high = results.number(min(values)), results.number(max(values))
    return low if low == high else f"{low} to {high}"


def embedded(table: str) -> str:
    """A table of the results folder, as it stands in README.md, one folder up."""
    return table.replace("](pictures/", "](results/pictures/")


def main() -> None:
    folder = cells.HERE / "results"

    def read(name: str) -> list[results.Record]:
        return results.read(folder, name)

    blocks = {"claims": claims(read), "effort": effort(read)}
    for name, table in TABLES.items():
        if records := read(name):
            blocks[name] = table(records)
            (folder / f"{name}.md").write_text(blocks[name])
    text = README.read_text()
    for name, block in blocks.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not marked.search(text):
            raise SystemExit(f"{README} has no block <!-- {name} -->")
        text = marked.sub(lambda match, block=block: match[1] + embedded(block) + match[2], text)
    README.write_text(text)


if __name__ == "__main__":
    main()
