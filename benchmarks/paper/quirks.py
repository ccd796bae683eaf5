"""The published code's departures from the paper's text, each as one more row beside the text's own result.

    python -m benchmarks.paper.quirks --data DIR

We follow the text. Where a departure could explain a published figure it is made here, by patching the example for
the length of one run; `text` names what the row is to be held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rvconvert
from benchmarks.paper import cells, results
from rvconvert import RandomVariable
from rvconvert.penalty import _Attach

convert = rvconvert.convert


@contextmanager
def tanh_of_both_moments() -> Iterator[None]:
    """Mean and variance both go through tanh, as an nn.Tanh on a stacked pair makes them."""
    rules = rvconvert.REGISTRY.overlay()

    @rvconvert.rule(torch.tanh, registry=rules, replace=True)
    def tanh(x: RandomVariable) -> RandomVariable:
        return RandomVariable(x.mean.tanh(), x.var.tanh())

    with patch.object(rvconvert, "convert", lambda model, **options: convert(model, rules=rules, **options)):
        yield


@contextmanager
def relu_for_leaky_relu() -> Iterator[None]:
    """The decoder's activations are ReLU."""
    import vae

    build = vae.VanillaVAE.__init__

    def built(self: nn.Module, *args: object, **kwargs: object) -> None:
        build(self, *args, **kwargs)
        for block in self.decoder:
            block[2] = nn.ReLU()

    with patch.object(vae.VanillaVAE, "__init__", built):
        yield


@contextmanager
def no_tanh() -> Iterator[None]:
    """The VAE's last layer has no tanh."""
    import vae

    build = vae.VanillaVAE.__init__

    def built(self: nn.Module, *args: object, **kwargs: object) -> None:
        build(self, *args, **kwargs)
        self.final_layer[1] = nn.Identity()

    with patch.object(vae.VanillaVAE, "__init__", built):
        yield


@contextmanager
def cropped_to_148() -> Iterator[None]:
    """CelebA's CenterCrop(148) and Resize(64) on 32x32 images: what is too small for the crop is padded with black."""
    import image_sets

    load = image_sets.load

    def padded(images: Tensor) -> Tensor:
        around = (148 - images.shape[-1]) // 2
        chunks = (F.pad(chunk.float(), (around,) * 4) for chunk in images.split(1024))
        resized = [F.interpolate(chunk, size=64, mode="bilinear", antialias=True) for chunk in chunks]
        return torch.cat(resized).round().to(torch.uint8)

    def loaded(name: str, folder: Path | None, size: int) -> tuple[Tensor, Tensor]:
        train, test = load(name, folder, 32)
        return padded(train), padded(test)

    with patch.object(image_sets, "load", loaded):
        yield


@contextmanager
def penalty_on_green() -> Iterator[None]:
    """L_c squares the green channel of the reconstruction's mean; no variance is penalised."""

    def converted(model: nn.Module, *, penalty: float, **options: object) -> nn.Module:
        rv = convert(model, attach=False, **options)

        def attach(_: nn.Module, __: object, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            mean = output[0]
            return (*_Attach.apply(mean[:, 1], penalty, "squared", None, mean), *output[1:])

        rv.register_forward_hook(attach)
        return rv

    with patch.object(rvconvert, "convert", converted):
        yield


@contextmanager
def unit_posterior() -> Iterator[None]:
    """The RV encoder's log-variance is discarded for zeros, and the loss has z at its mean."""
    import beta_tcvae

    encode, reparameterize = beta_tcvae.BetaTCVAE.encode, beta_tcvae.BetaTCVAE.reparameterize

    def constant(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = encode(self, x)
        return mu, torch.zeros_like(logvar)

    with patch.object(beta_tcvae.BetaTCVAE, "encode", constant), _loss_at_the_mean(beta_tcvae.BetaTCVAE, reparameterize):
        yield


@contextmanager
def _loss_at_the_mean(cls: type[nn.Module], reparameterize: Callable) -> Iterator[None]:
    loss = cls.loss_function

    def at_the_mean(self: nn.Module, *args: object, **kwargs: object) -> dict[str, Tensor]:
        with patch.object(cls, "reparameterize", lambda self, mu, logvar: mu):
            return loss(self, *args, **kwargs)

    with patch.object(cls, "loss_function", at_the_mean):
        yield


@contextmanager
def dimension_kl_divided() -> Iterator[None]:
    """The RV loss has its dimension-wise KL multiplied by 1e-3, the plain one has not."""
    import beta_tcvae

    loss = beta_tcvae.BetaTCVAE.loss_function

    def divided(self: nn.Module, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return loss(self, *args, gamma=1e-3, **kwargs)

    with patch.object(beta_tcvae.BetaTCVAE, "loss_function", divided):
        yield


@contextmanager
def published_beta_tcvae() -> Iterator[None]:
    """The three of them, as published together."""
    with penalty_on_green(), unit_posterior(), dimension_kl_divided():
        yield


@contextmanager
def deviation_for_variance() -> Iterator[None]:
    """The decoder is given the posterior's standard deviation where a variance belongs."""

    def converted(decoder: nn.Module, **options: object) -> nn.Module:
        rv = convert(decoder, **options)

        def take_root(_: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...]:
            return tuple(RandomVariable(z.mean, z.var.sqrt()) if isinstance(z, RandomVariable) else z for z in inputs)

        rv.register_forward_pre_hook(take_root)
        return rv

    with patch.object(rvconvert, "convert", converted):
        yield


@contextmanager
def penalty_reaches_no_decoder() -> Iterator[None]:
    """L_c joins the discriminator's loss only, whose step moves neither encoder nor decoder: the same as lambda = 0."""
    with patch.object(rvconvert, "convert", lambda model, *, penalty, **options: convert(model, penalty=0.0, **options)):
        yield


@contextmanager
def penalty_scaled_as_the_error() -> Iterator[None]:
    """L_c, a mean, is added to a summed squared error and divided by the pixels' count with it."""

    def converted(decoder: nn.Module, *, penalty: float, **options: object) -> nn.Module:
        rv = convert(decoder, penalty=penalty, **options)

        def set_scale(module: nn.Module, inputs: tuple[object, ...], output: Tensor) -> None:
            module.penalty_scale = 1 / output[0].numel()  # for the calls after the first

        rv.register_forward_hook(set_scale)
        return rv

    with patch.object(rvconvert, "convert", converted):
        yield


@contextmanager
def penalty_on_real_images() -> Iterator[None]:
    """L_c for reconstructions of real images only, not for those of fakes, which the decoder makes in each step too."""

    def converted(decoder: nn.Module, **options: object) -> nn.Module:
        rv, calls = convert(decoder, **options), count()

        def choose(module: nn.Module, inputs: tuple[object, ...]) -> None:
            if module.training and isinstance(inputs[0], RandomVariable):
                module.penalty_scale = float(next(calls) % 3 == 0)  # a step reconstructs one real batch, then two fakes

        rv.register_forward_pre_hook(choose)
        return rv

    with patch.object(rvconvert, "convert", converted):
        yield


@dataclass(frozen=True)
class Quirk:
    cell: str
    applied: Callable
    text: str
    variants: tuple[str, ...] = ("rv",)


QUIRKS = {
    "tanh of mean and variance": Quirk("vae-mnist", tanh_of_both_moments, "moments of tanh"),
    "ReLU for LeakyReLU": Quirk("vae-mnist", relu_for_leaky_relu, "LeakyReLU in both", ("plain", "rv")),
    "no tanh": Quirk("vae-mnist", no_tanh, "tanh in both", ("plain", "rv")),
    "CenterCrop(148), Resize(64)": Quirk("vae-cifar10", cropped_to_148, "32×32 pixels", ("plain", "rv")),
    "L_c on the mean's green channel": Quirk("beta_tcvae-cifar10", penalty_on_green, "L_c on all variances"),
    "log-variance discarded": Quirk("beta_tcvae-cifar10", unit_posterior, "the encoder's variance"),
    "RV's dimension-wise KL × 1e-3": Quirk("beta_tcvae-cifar10", dimension_kl_divided, "× 1 in both"),
    "all three of β-TCVAE": Quirk("beta_tcvae-cifar10", published_beta_tcvae, "none of them"),
    "standard deviation as variance": Quirk("dc_vae-cifar10", deviation_for_variance, "exp(logvar)"),
    "L_c in the discriminator's loss": Quirk("dc_vae-cifar10", penalty_reaches_no_decoder, "L_c in the decoder's"),
    "mean L_c in a summed error": Quirk("soft_intro_vae-mnist", penalty_scaled_as_the_error, "L_c on the loss's own scale"),
    "L_c on real images only": Quirk("soft_intro_vae-mnist", penalty_on_real_images, "L_c on all that is reconstructed"),
}


def table(records: list[results.Record]) -> str:
    header = ["cell", "in place of the text's", "trained as", "MSE of the RV's mean", "from the mean", "from a sample", "KL"]
    columns = ("mse_rv", "mse_mean", "mse_sample", "kl")
    rows = []
    for (cell, *_), group in results.grouped(records, ["cell", *results.GROUP]).items():
        rows.append([f"**{cells.title(cell)}**: {results.conditions(group[0])}", *[""] * 6])
        for (quirk, variant), own in results.grouped(group, ["quirk", "variant"]).items():
            instead = f"{QUIRKS[quirk].text}: **{quirk}**" if quirk else "*the text*"
            rows.append(["", instead, variant, *(results.over_seeds(own, name) for name in columns)])
    return results.markdown(header, rows)


def main() -> None:
    parser = cells.argument_parser(__doc__, cells=sorted({quirk.cell for quirk in QUIRKS.values()}), variants="plain,rv")
    parser.add_argument("--quirks", default=None, help="by commas; all of the cells named, unless given")
    args = parser.parse_args()
    wanted = args.quirks.split(",") if args.quirks else QUIRKS
    for setting in cells.settings(args):
        if setting.variant not in ("plain", "rv"):
            raise SystemExit("the published code knows the variants plain and rv")
        runs = [setting]
        for name in wanted:
            if QUIRKS[name].cell == setting.cell and setting.variant in QUIRKS[name].variants:
                runs.append(cells.like(setting, quirk=name))
        for each in runs:
            results.add(args.results, "quirks", results.keys(each), lambda s=each: cells.measured(cells.train(s, args)), table)
    print(Path(args.results / "quirks.md").read_text())


if __name__ == "__main__":
    main()
