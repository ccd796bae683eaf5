"""Are there decoders that convert without an error and come out wrong?

    python -m benchmarks.fuzz --graphs 2000 [--seed 0] [--mode independent|lowrank|sampled|all]

Random decoders (branches, skips, norms, reuse of modules and values, in-place writes, views, dtypes, train and eval) are
converted with a recording of each lifetime and compared line by line with a slow reference in float64, with the plain
decoder, with Monte Carlo and, at small variance, with the Jacobian. A mismatch is printed with its seed and its program, and
the exit code is 1. A refusal is no mismatch; refusals are counted by reason.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.fuzzing.checks import MODES, Outcome, examine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program; each next one has the next seed")
    parser.add_argument("--mode", choices=(*MODES, "all"), default="all")
    arguments = parser.parse_args()
    modes = MODES if arguments.mode == "all" else (arguments.mode,)
    console = Console(stderr=True)
    start, outcomes = time.perf_counter(), []
    for seed in track(range(arguments.seed, arguments.seed + arguments.graphs), "decoders", console=console):
        outcome = examine(seed, modes)
        outcomes.append(outcome)
        if outcome.mismatch:
            print(f"\npython -m benchmarks.fuzz --graphs 1 --seed {seed} --mode {arguments.mode}\n{outcome.mismatch}", flush=True)
    report(outcomes, time.perf_counter() - start)
    return int(any(outcome.mismatch for outcome in outcomes))


def report(outcomes: list[Outcome], seconds: float) -> None:
    """The totals, and the refusals by reason."""
    refusals = Counter((mode, re.sub(r"Decoder\.forward:? ?", "", reason)) for o in outcomes for mode, reason in o.refusals)
    console = Console(width=150)
    if refusals:
        table = Table("refused", "mode, lifetime", "why", title="refusals")
        for (mode, reason), count in refusals.most_common():
            table.add_row(str(count), mode, reason)
        console.print(table)
    console.print(
        f"{len(outcomes)} decoders in {seconds:.0f} s: {sum(bool(o.mismatch) for o in outcomes)} mismatches, "
        f"{sum(bool(o.refusals) for o in outcomes)} refused; lines against the reference {sum(o.compared for o in outcomes)}, "
        f"outputs against Monte Carlo {sum(o.sampled for o in outcomes)}, "
        f"against the Jacobian {sum(o.linearised for o in outcomes)}, "
        f"paths against the plain decoder {sum(o.paths for o in outcomes)}; by the laws alone {sum(o.lawful for o in outcomes)}"
    )


if __name__ == "__main__":
    sys.exit(main())
