"""Section 5.2: what RV costs. The paper: about 3 times slower, with about 30 % more floating-point operations.

    python -m benchmarks.paper.cost

Training steps and inference of each system on random images of its size, plain and converted taking turns, medians of
`--rounds`; the operations are those that torch's own counter knows: convolutions and matrix products.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rvconvert
from benchmarks.paper import cells, results

MODES = ("plain", "independent", "sampled", "lowrank")
PAPER = {"slowdown": "about 3", "operations": "about 1.3"}


def build(cell: str, mode: str, shrink: int) -> tuple[Callable[[Tensor], Tensor], nn.Module, tuple[int, int]]:
    """A function from images to the reconstruction's squared error, its modules, and the images' channels and size."""
    system, dataset = cell.split("-")
    example = importlib.import_module(system)
    channels, size = (1 if dataset in ("mnist", "digits") else 3), cells.image_sets.SIZES[dataset]
    torch.manual_seed(0)

    def converted(model: nn.Module, **options: object) -> nn.Module:
        if mode == "plain":
            return model
        return rvconvert.convert(model, covariance=mode, rank=4 if mode == "lowrank" else None, **options)

    if system in ("vae", "beta_tcvae"):
        if system == "vae":
            vae = example.VanillaVAE(channels, 128, [width // shrink for width in (32, 64, 128, 256, 512)], size)
        else:
            vae = example.BetaTCVAE(channels, 10, [32 // shrink] * 4, size)
        vae = converted(vae)
        return (lambda x: (vae(x)[0] - x).square().mean()), nn.ModuleList([vae]), (channels, size)
    if system == "dc_vae":
        encoder = example.Encoder(128, channels, 128 // shrink, size)
        decoder = example.Decoder(128, channels, 256 // shrink, size)
    else:
        chosen = example.SETTINGS[dataset]
        widths = tuple(width // shrink for width in chosen.channels)
        encoder = example.Encoder(channels, chosen.latent_dim, widths, size)
        decoder = example.Decoder(channels, chosen.latent_dim, widths, size)
    decoder = converted(decoder, random_inputs=("z",))

    def error(x: Tensor) -> Tensor:
        mu, logvar = encoder(x)
        logvar = logvar.clamp(max=1)  # of random weights: the time does not depend on it, infinite values might
        z = cells.sample_normal(mu, logvar) if mode == "plain" else rvconvert.RandomVariable(mu, logvar.exp())
        return (decoder(z) - x).square().mean()

    return error, nn.ModuleList([encoder, decoder]), (channels, size)


def measure(cell: str, modes: list[str], args) -> dict[str, results.Record]:
    """For each mode: median seconds of a training step and of an inference, and their operations."""
    made = {mode: build(cell, mode, args.shrink) for mode in modes}
    channels, size = next(iter(made.values()))[2]
    x = torch.rand(args.batch or 64, channels, size, size, device=args.device) * 2 - 1

    def train(mode: str) -> None:
        error, modules, _ = made[mode]
        modules.train().zero_grad()
        error(x).backward()

    @torch.no_grad()
    def infer(mode: str) -> None:
        error, modules, _ = made[mode]
        modules.eval()
        error(x)

    figures: dict[str, results.Record] = {mode: {} for mode in modes}
    for name, step in (("training", train), ("inference", infer)):
        for mode in modes:
            made[mode][1].to(args.device)
            step(mode)  # recorded on the first call
            with FlopCounterMode(display=False) as counter:
                step(mode)
            figures[mode][f"{name}_operations"] = counter.get_total_flops()
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(args.rounds):
            for mode in modes:
                times[mode].append(timed(lambda m=mode, s=step: s(m), args.device))
        for mode in modes:
            figures[mode][f"{name}_seconds"] = median(times[mode])
    return figures


def timed(call: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def table(records: list[results.Record]) -> str:
    header = ["cell", "mode", "training, ms", "/ plain", "operations / plain", "inference, ms", "/ plain", "operations / plain"]
    rows = [["paper", "RV", "", PAPER["slowdown"], PAPER["operations"], "", "", ""]]
    for (cell, shrink, batch), group in results.grouped(records, ["cell", "shrink", "batch"]).items():
        plain = next(record for record in group if record["mode"] == "plain")
        shrunk = f", channels / {shrink}" if shrink != 1 else ""
        rows.append([f"**{cells.title(cell)}**: batch {batch}{shrunk}, {plain['device']}", *[""] * 7])
        for record in group:
            row = ["", record["mode"]]
            for name in ("training", "inference"):
                row.append(f"{1000 * record[f'{name}_seconds']:.1f}")
                row += [f"{record[f'{name}_{what}'] / plain[f'{name}_{what}']:.2f}" for what in ("seconds", "operations")]
            rows.append(row)
    return results.markdown(header, rows)


def main() -> None:
    parser = cells.argument_parser(__doc__)
    parser.add_argument("--modes", default=",".join(MODES), help="by commas; plain must be among them")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    modes = args.modes.split(",")
    for cell in args.cells.split(","):
        shared = {"cell": cell, "shrink": args.shrink, "batch": args.batch or 64}
        known = [record["mode"] for record in results.read(args.results, "cost") if shared.items() <= record.items()]
        if set(modes) <= set(known):
            continue
        for mode, figures in measure(cell, modes, args).items():
            record = figures | {"rounds": args.rounds} | cells.machine(args.device)
            results.add(args.results, "cost", shared | {"mode": mode}, lambda r=record: r, table)
    print(Path(args.results / "cost.md").read_text())


if __name__ == "__main__":
    main()
