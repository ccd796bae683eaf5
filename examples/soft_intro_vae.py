"""Soft-IntroVAE: encoder and decoder train each other adversarially, through their evidence lower bounds.

Daniel and Tamar, "Soft-IntroVAE: Analyzing and Improving the Introspective Variational Autoencoder", CVPR
2021 (the form without a bootstrap decoder). `--rv` converts the decoder, and each distribution that the encoder
gives goes into it in place of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import rvconvert
from common import Run, Views, argument_parser, conversion_options, kl_divergence, load_data, parse_arguments, sample_normal

FAKE_RECONSTRUCTION = 1e-8  # gamma_r: the decoder's weight for reconstructing fakes


class Settings(NamedTuple):
    """The authors' choices for a data set (ours for CelebA at 64, where they give none)."""

    channels: tuple[int, ...]
    latent_dim: int
    batch: int
    beta_rec: float
    beta_kl: float
    beta_neg: float


SETTINGS = {
    "digits": Settings((64, 128), 32, 128, 1.0, 1.0, 256.0),
    "mnist": Settings((64, 128), 32, 128, 1.0, 1.0, 256.0),
    "cifar10": Settings((64, 128, 256), 128, 32, 1.0, 1.0, 256.0),
    "celeba": Settings((64, 128, 256, 512), 128, 32, 1.0, 1.0, 256.0),
    "faces": Settings((64, 128, 256, 512, 512), 256, 8, 0.5, 1.0, 1024.0),
}


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.expand = None
        if in_channels != out_channels:
            self.expand = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.LeakyReLU(0.2, inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.expand is None else self.expand(x)
        h = self.relu1(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return self.relu2(torch.add(h, identity))


class Encoder(nn.Module):
    """An image to the mean and log-variance of its posterior, halving the map once for each of `channels`."""

    def __init__(self, image_channels: int, latent_dim: int, channels: tuple[int, ...], size: int) -> None:
        super().__init__()
        before = channels[0]
        self.main = nn.Sequential(
            nn.Conv2d(image_channels, before, 5, padding=2, bias=False),
            nn.BatchNorm2d(before),
            nn.LeakyReLU(0.2),
            nn.AvgPool2d(2),
        )
        for after in channels[1:]:
            self.main.extend([ResidualBlock(before, after), nn.AvgPool2d(2)])
            before = after
        self.main.append(ResidualBlock(before, before))
        self.fc = nn.Linear(before * (size // 2 ** len(channels)) ** 2, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.main(x).view(x.size(0), -1)
        mu, logvar = self.fc(h).chunk(2, dim=1)
        return mu, logvar


class Decoder(nn.Module):
    """z to an image whose pixels are those of [0, 1], with no activation at the end."""

    def __init__(self, image_channels: int, latent_dim: int, channels: tuple[int, ...], size: int) -> None:
        super().__init__()
        before = channels[-1]
        bottom = size // 2 ** len(channels)
        self.bottom_shape = (before, bottom, bottom)
        self.fc = nn.Sequential(nn.Linear(latent_dim, before * bottom**2), nn.ReLU(True))
        self.main = nn.Sequential()
        for after in reversed(channels):
            self.main.extend([ResidualBlock(before, after), nn.Upsample(scale_factor=2, mode="nearest")])
            before = after
        self.main.extend([ResidualBlock(before, before), nn.Conv2d(before, image_channels, 5, padding=2)])

    def forward(self, z: Tensor) -> Tensor:
        z = z.view(z.size(0), -1)
        h = self.fc(z).view(z.size(0), *self.bottom_shape)
        return self.main(h)


def squared_error(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Summed over the pixels, one value an image: (N, C, H, W) twice to (N,)."""
    return (reconstruction - x).pow(2).flatten(1).sum(1)


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argument_parser(__doc__, batch=None)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parse_arguments(parser, arguments)
    data = load_data(args)

    settings = SETTINGS[args.dataset]
    args.batch = args.batch or settings.batch
    channels = (4, 4) if args.smoke else tuple(c // args.shrink for c in settings.channels)
    image_channels, size, latent_dim = data.train.shape[1], data.train.shape[2], settings.latent_dim
    beta_rec, beta_kl, beta_neg = settings.beta_rec, settings.beta_kl, settings.beta_neg
    scale = 1 / (image_channels * size**2)

    encoder = Encoder(image_channels, latent_dim, channels, size).to(args.device)
    decoder = Decoder(image_channels, latent_dim, channels, size).to(args.device)
    reparameterize = sample_normal
    if args.rv:
        decoder = rvconvert.convert(decoder, random_inputs=("z",), **conversion_options(args))

        def reparameterize(mu: Tensor, logvar: Tensor) -> rvconvert.RandomVariable:
            return rvconvert.RandomVariable(mu, logvar.exp())

    optimizer_e = torch.optim.Adam(encoder.parameters(), lr=args.lr)
    optimizer_d = torch.optim.Adam(decoder.parameters(), lr=args.lr)
    schedulers = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=(350,), gamma=0.1) for optimizer in (optimizer_e, optimizer_d)
    ]

    def expelbo(x: Tensor) -> tuple[Tensor, Tensor]:
        """exp(2 ELBO / size) of images that the encoder should find unlikely, and their KL: batch means."""
        mu, logvar = encoder(x)
        kl = kl_divergence(mu, logvar)
        error = squared_error(decoder(reparameterize(mu, logvar)), x)
        return torch.exp(-2 * scale * (beta_rec * error + beta_neg * kl)).mean(), kl.mean()

    def update_encoder(x: Tensor, noise: Tensor) -> Tensor:
        """Raise the ELBO of real images, lower exp(ELBO) of the others. Returns z of the real ones."""
        encoder.requires_grad_(True)
        decoder.requires_grad_(False)
        fake = decoder(noise)
        mu, logvar = encoder(x)
        z = reparameterize(mu, logvar)
        reconstruction = decoder(z)
        error, kl = squared_error(reconstruction, x).mean(), kl_divergence(mu, logvar).mean()
        if args.rv:
            run.log(penalty=decoder.last_penalty)
        expelbo_rec, _ = expelbo(reconstruction.detach())
        expelbo_fake, kl_fake = expelbo(fake.detach())
        loss = scale * (beta_rec * error + beta_kl * kl) + 0.25 * (expelbo_rec + expelbo_fake)
        optimizer_e.zero_grad()
        loss.backward()
        optimizer_e.step()
        run.log(loss=loss, kl=kl, kl_fake=kl_fake, expelbo_rec=expelbo_rec, expelbo_fake=expelbo_fake)
        return z.detach()

    def update_decoder(x: Tensor, z: Tensor, noise: Tensor) -> None:
        """Reconstruct real images, and make reconstructions and samples that the encoder finds likely."""
        encoder.requires_grad_(False)
        decoder.requires_grad_(True)
        fake = decoder(noise)
        reconstruction = decoder(z)
        error = squared_error(reconstruction, x).mean()

        kl, fake_error = 0.0, 0.0
        for made in (reconstruction, fake):
            mu, logvar = encoder(made)
            again = decoder(reparameterize(mu, logvar).detach())
            kl = kl + 0.5 * kl_divergence(mu, logvar).mean()
            fake_error = fake_error + 0.5 * squared_error(again, made.detach()).mean()
        loss = scale * (beta_rec * error + beta_kl * kl + FAKE_RECONSTRUCTION * beta_rec * fake_error)
        optimizer_d.zero_grad()
        loss.backward()
        optimizer_d.step()
        run.log(loss_decoder=loss, reconstruction=scale * error)

    def validation_loss(x: Tensor) -> Tensor:
        """The negative ELBO of real images, weighted as in training."""
        mu, logvar = encoder(x)
        error = squared_error(decoder(reparameterize(mu, logvar)), x)
        return scale * (beta_rec * error + beta_kl * kl_divergence(mu, logvar)).mean()

    run = Run(
        args,
        data,
        value_range=(0.0, 1.0),
        encoder=encoder,
        decoder=decoder,
        optimizer_e=optimizer_e,
        optimizer_d=optimizer_d,
        scheduler_e=schedulers[0],
        scheduler_d=schedulers[1],
    )
    run.views = Views(encoder, decoder, validation_loss, samples={"prior": decoder})
    if args.rv:
        var_1 = {"prior, var 1": lambda z: decoder(rvconvert.RandomVariable(z, torch.ones_like(z)))}
        run.views = run.views._replace(
            propagate=lambda x: decoder(reparameterize(*encoder(x))),
            penalty=lambda: decoder.last_penalty,
            samples=run.views.samples | var_1,
        )

    for _ in run.epochs():
        for x in run.batches(flip=args.dataset in ("celeba", "faces")):
            noise = torch.randn(len(x), latent_dim, device=x.device)
            z = update_encoder(x, noise)
            update_decoder(x, z, noise)
        for scheduler in schedulers:
            scheduler.step()
        run.end_epoch()
    return run


if __name__ == "__main__":
    main()
