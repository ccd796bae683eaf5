"""Figures 4 to 11 as labelled rows: reconstructions, samples of the prior, and interpolations between two of them.

    python -m benchmarks.paper.pictures --data DIR

Pictures of MNIST or digits go with the results, those of other sets beside the checkpoints: they are not ours to keep.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.paper import cells, results

COUNT = 10


def train_and_draw(plain: cells.Setting, args) -> tuple[cells.Run, list[Path]]:
    a, b = cells.train(plain, args), cells.train(cells.like(plain, variant="rv"), args)
    return a, draw(plain, a, b, args)


@torch.no_grad()
def draw(plain: cells.Setting, a: cells.Run, b: cells.Run, args) -> list[Path]:
    """Three pictures of a plain run and an RV one."""
    torch.manual_seed(0)
    x, mu, logvar = cells.posterior(a, COUNT)
    _, rv_mu, rv_logvar = cells.posterior(b, COUNT)
    e = torch.randn_like(mu)

    def sampled(mean: Tensor, logs: Tensor) -> Tensor:
        return mean + torch.exp(0.5 * logs) * e

    reconstructions = {
        "input": x,
        "plain, from the mean": a.views.decode(mu),
        "plain, from a sample": a.views.decode(sampled(mu, logvar)),
        "RV-trained, plain decoder, mean": b.views.decode(rv_mu),
        "RV-trained, plain decoder, sample": b.views.decode(sampled(rv_mu, rv_logvar)),
        "RV": b.views.propagate(x),
    }
    var_1 = b.views.samples["prior, var 1"]
    samples = {"plain": a.views.decode(e), "RV, var 0": b.views.decode(e), "RV, var 1 (5.5)": var_1(e)}
    steps = torch.linspace(0, 1, COUNT, device=e.device)[:, None]
    line = torch.lerp(e[:1], e[1:2], steps)
    interpolations = {"plain": a.views.decode(line), "RV, var 0": b.views.decode(line), "RV, var 1": var_1(line)}

    ours = plain.cell.split("-")[1] in ("mnist", "digits")
    folder = args.results / "pictures" if ours else args.runs / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows in (("reconstructions", reconstructions), ("samples", samples), ("interpolation", interpolations)):
        written.append(folder / f"{plain.cell}-{name}.png")
        grid = cells.labelled_grid({label: (row - a.low) / (a.high - a.low) for label, row in rows.items()})
        grid.save(written[-1], optimize=True)
    return written


def table(records: list[results.Record]) -> str:
    """Each kept picture under a caption that says what its networks were."""
    text = ""
    for record in records:
        caption = f"{cells.title(record['cell'])}: {results.conditions(record)}, seed {record['seed']}"
        for name in record["kept"]:
            kind = re.sub(r".*-(\w+)\.png", r"\1", name)
            text += f"{caption}; {kind}\n\n![{caption}; {kind}](pictures/{name})\n\n"
    return text


def main() -> None:
    args = cells.argument_parser(__doc__, variants="plain").parse_args()
    args.variants = "plain"
    for plain in cells.settings(args):

        def measure(s: cells.Setting = plain) -> results.Record:
            run, written = train_and_draw(s, args)
            print(*written, sep="\n")
            kept = [file.name for file in written if file.parent.parent == args.results]
            return {"kept": kept, "trained_on": len(run.data.train), **cells.machine(args.device)}

        results.add(args.results, "pictures", results.keys(plain), measure, table)


if __name__ == "__main__":
    main()
