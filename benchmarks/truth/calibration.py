"""How true the calibrated mode is of images, posteriors and networks that it was not measured on.

    python -m benchmarks.truth.calibration --data mnist.npz --out results/

Trains the convolutional VAE plainly, with independent moments and in calibrated mode, with few and many latents; calibrates each
on 256 training images at the posterior's own width, and holds the variance of every pixel of test images against Monte Carlo, at
half, at once and at twice that width. Writes `calibration.json` after every net, continues from it, and prints the table as
Markdown (also `calibration.md`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.truth.__main__ import Decoder, as_plain, calibrated, monte_carlo
from benchmarks.truth.model import Results, argument_parser, load_images, made, settings, squared_error, train

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "independent": {"covariance": "independent"},
    "calibrated": {"covariance": "calibrated"},
}
LATENTS = (2, 8, 32)
WIDTHS = (0.5, 1.0, 2.0)
KL_WEIGHT = 2e-4


@torch.no_grad()
def compared(model: nn.Module, images: Tensor, training: Tensor, runs: int = 1000) -> dict[str, float]:
    """The total's ratio at each width; at once the width, the correlation and the share of pixels within [0.7, 1.4]."""
    plain = as_plain(model)
    mu, logvar = plain.encode(images)
    rv = calibrated(plain, training[:256])
    found: dict[str, float] = {}
    for width in WIDTHS:
        torch.manual_seed(2)
        _, true = monte_carlo(Decoder(plain), mu, logvar.exp() * width**2, runs)
        rv.share.fill_(width)
        own = rv(images).var.double()
        found[f"total at {width:g}"] = float(own.sum() / true.sum())
        if width == 1:
            ratio = (own / true.clamp_min(1e-12))[true > 1e-3 * true.max()]
            found["correlation"] = float(torch.corrcoef(torch.stack((own.flatten(), true.flatten())))[0, 1])
            found["within"] = float(((ratio > 0.7) & (ratio < 1.4)).double().mean())
    return found


def markdown(runs: list[dict[str, Any]]) -> str:
    keys = [*(f"total at {width:g}" for width in WIDTHS), "correlation", "within"]
    lines = [f"| trained | latents | {' | '.join(keys)} |", "| --- |" + " ---: |" * (1 + len(keys))]
    lines += [f"| {run['mode']} | {run['latent']} | {' | '.join(f'{run[key]:.2f}' for key in keys)} |" for run in runs]
    ranges = (f"{min(run[key] for run in runs):.2f} to {max(run[key] for run in runs):.2f}" for key in keys)
    lines.append(f"| all | | {' | '.join(ranges)} |")
    note = (
        "Calibrated over true variance in total, at multiples of the posterior's width; at its own width the correlation of the\n"
        "two, pixel by pixel, and the share of pixels within [0.7, 1.4] (of those with a thousandth of the largest variance).\n\n"
    )
    return note + "\n".join(lines) + "\n"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--test-images", type=int, default=64)
    args = parser.parse_args()
    training, test = load_images(args.data, args.images)
    results = Results(args.out / "calibration.json", settings(args, training))
    for mode, options in MODES.items():
        for latent in LATENTS:
            if results.has(mode=mode, latent=latent):
                continue
            model = made(options, latent=latent, seed=0)
            train(model, training, squared_error(KL_WEIGHT), epochs=args.epochs, seed=0)
            results.add({"mode": mode, "latent": latent, **compared(model, test[: args.test_images], training)})
            print(results.runs[-1], flush=True)
    (args.out / "calibration.md").write_text(markdown(results.runs))
    print(markdown(results.runs))


if __name__ == "__main__":
    main()
