"""DC-VAE: an autoencoder held to its input by a contrastive loss and to the data by an adversarial one.

Parmar, Li, Lee and Tu, "Dual Contradistinctive Generative Autoencoder", CVPR 2021. The generator's cells are
AutoGAN's (Gong et al., 2019), encoder and discriminator have SNGAN's residual blocks (Miyato et al., 2018), and
the contrastive loss is MoCo's (He et al., 2020). No loss compares pixels: their error is only reported.
`--rv` converts the decoder, and the encoder's distribution goes into it in place of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rvconvert
from common import Run, Views, argument_parser, conversion_options, kl_divergence, load_data, parse_arguments, sample_normal

KL_WEIGHT = 1e-6  # of the KL summed over the batch
TEMPERATURE = 0.07
CONTRASTIVE_DIM = 16
QUEUE_LENGTH = 8192
DECODER_EVERY = 5  # discriminator steps for one step of encoder and decoder


def convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    nn.init.xavier_uniform_(layer.weight)
    return layer


class Cell(nn.Module):
    """AutoGAN's up-sampling cell: two convolutions, with skips from the first one of each earlier cell."""

    def __init__(self, channels: int, up_mode: str, skips_in: int, shortcut: bool) -> None:
        super().__init__()
        self.up_mode = up_mode
        self.c1 = convolution(channels, channels, 3)
        self.c2 = convolution(channels, channels, 3)
        self.shortcut = convolution(channels, channels, 1) if shortcut else None
        self.skip_convolutions = nn.ModuleList(convolution(channels, channels, 1) for _ in range(skips_in))

    def forward(self, x: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        h = nn.ReLU()(x)
        h = F.interpolate(h, scale_factor=2, mode=self.up_mode)
        _, _, height, width = h.size()
        h = self.c1(h)
        h_skip = h
        for skip, skip_convolution in zip(skips, self.skip_convolutions, strict=True):
            h += skip_convolution(F.interpolate(skip, size=(height, width), mode=self.up_mode))
        h = nn.ReLU()(h)
        out = self.c2(h)
        if self.shortcut is not None:
            out += self.shortcut(F.interpolate(x, scale_factor=2, mode=self.up_mode))
        return h_skip, out


class Decoder(nn.Module):
    """z to an image in [-1, 1]: a 4x4 map, then a cell for each doubling (three for the paper's 32x32)."""

    def __init__(self, latent_dim: int, out_channels: int = 3, channels: int = 256, size: int = 32) -> None:
        super().__init__()
        self.channels = channels
        self.l1 = nn.Linear(latent_dim, channels * 4 * 4)
        count = (size // 4).bit_length() - 1
        self.cells = nn.ModuleList()
        for i in range(count):
            self.cells.append(Cell(channels, ("nearest", "bilinear")[i % 2], skips_in=i, shortcut=i < count - 1))
        self.to_rgb = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), convolution(channels, out_channels, 3), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        h = self.l1(z).view(-1, self.channels, 4, 4)
        skips: list[Tensor] = []
        for cell in self.cells:
            h_skip, h = cell(h, skips)
            skips.append(h_skip)
        return self.to_rgb(h)


class DownBlock(nn.Module):
    """SNGAN's residual block: `first` for the one that meets the image, which has no activation before it."""

    def __init__(self, in_channels: int, out_channels: int, down: bool, first: bool = False) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.c1 = spectral_norm(convolution(in_channels, out_channels, 3))
        self.c2 = spectral_norm(convolution(out_channels, out_channels, 3))
        self.shortcut = spectral_norm(convolution(in_channels, out_channels, 1)) if down or first else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(x)
        h = self.c2(F.relu(self.c1(h)))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return F.avg_pool2d(h + x, 2) if self.down else h + x


def down_blocks(in_channels: int, channels: int, size: int) -> nn.Sequential:
    """An image down to an 8x8 map: four blocks for 32x32, one more for each doubling."""
    blocks = [DownBlock(in_channels, channels, down=True, first=True)]
    blocks += [DownBlock(channels, channels, down=True) for _ in range((size // 16).bit_length() - 1)]
    blocks += [DownBlock(channels, channels, down=False) for _ in range(2)]
    return nn.Sequential(*blocks)


class Encoder(nn.Module):
    """An image to the mean and log-variance of its posterior."""

    def __init__(self, latent_dim: int, in_channels: int = 3, channels: int = 128, size: int = 32) -> None:
        super().__init__()
        self.blocks = down_blocks(in_channels, channels, size)
        head = nn.Linear(channels, 2 * latent_dim, bias=False)
        # Ours: at random, a log-variance summed over 64 positions starts with a deviation of about 8, and spectral
        # normalization keeps it there: a posterior deviation of e^4 and more drowns the mean for thousands of steps.
        nn.init.zeros_(head.weight.data[latent_dim:])
        self.l5 = spectral_norm(head)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.blocks(x)).sum((2, 3))
        mu, logvar = self.l5(h).chunk(2, dim=1)
        return mu, logvar


class DualEncoder(nn.Module):
    """Discriminator and contrastive encoder in one: a score, and features of the first and the last block."""

    def __init__(self, in_channels: int = 3, channels: int = 128, size: int = 32) -> None:
        super().__init__()
        self.blocks = down_blocks(in_channels, channels, size)
        self.l5 = spectral_norm(nn.Linear(channels, CONTRASTIVE_DIM, bias=False))
        self.score = spectral_norm(nn.Linear(CONTRASTIVE_DIM, 1))
        self.head_first = nn.Sequential(
            convolution(channels, 1, 1),
            nn.Flatten(),
            nn.Linear((size // 2) ** 2, CONTRASTIVE_DIM, bias=False),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first = self.blocks[0](x)
        last = self.l5(F.relu(self.blocks[1:](first)).sum((2, 3)))
        return self.score(last), {"first": self.head_first(first), "last": last}


class Queue(nn.Module):
    """The negatives of the contrastive loss: normalized features of the last `length` real images."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("features", F.normalize(torch.randn(length, CONTRASTIVE_DIM), dim=1))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def push(self, features: Tensor) -> None:
        length = len(self.features)
        places = (self.next + torch.arange(len(features), device=features.device)) % length
        self.features[places] = features
        self.next.copy_((self.next + len(features)) % length)

    def loss(self, query: Tensor, key: Tensor) -> Tensor:
        """InfoNCE: the query has to find its own key among the queue."""
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.features.T], dim=1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argument_parser(__doc__)
    parser.add_argument("--latent", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parse_arguments(parser, arguments)
    data = load_data(args)

    image_channels, size = data.train.shape[1], data.train.shape[2]
    width = 4 if args.smoke else 128 // args.shrink
    encoder = Encoder(args.latent, image_channels, width, size).to(args.device)
    decoder = Decoder(args.latent, image_channels, 2 * width, size).to(args.device)
    dual = DualEncoder(image_channels, width, size).to(args.device)
    latent = sample_normal
    if args.rv:
        decoder = rvconvert.convert(decoder, random_inputs=("z",), **conversion_options(args))

        def latent(mu: Tensor, logvar: Tensor) -> rvconvert.RandomVariable:
            return rvconvert.RandomVariable(mu, logvar.exp())

    momentum = AveragedModel(dual, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # makes the contrastive keys
    averaged = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(0.999))  # generates, as in the paper
    queues = nn.ModuleDict({name: Queue(QUEUE_LENGTH) for name in ("first", "last")}).to(args.device)
    optimizer_e, optimizer_d, optimizer_dual = (
        torch.optim.Adam(module.parameters(), lr=args.lr, betas=(0.0, 0.9)) for module in (encoder, decoder, dual)
    )

    def update_discriminator(x: Tensor) -> None:
        """Hinge loss; samples of the prior and reconstructions are the two halves of the fakes."""
        with torch.no_grad():
            sample = decoder(torch.randn(len(x), args.latent, device=x.device))
            reconstruction = decoder(latent(*encoder(x)))
        loss = (
            F.relu(1 - dual(x)[0]).mean()
            + 0.5 * F.relu(1 + dual(sample)[0]).mean()
            + 0.5 * F.relu(1 + dual(reconstruction)[0]).mean()
        )
        optimizer_dual.zero_grad()
        loss.backward()
        optimizer_dual.step()
        run.log(discriminator=loss)

    def update_autoencoder(x: Tensor) -> Tensor:
        """The adversarial step of encoder and decoder."""
        mu, logvar = encoder(x)
        sample = decoder(torch.randn(2 * len(x), args.latent, device=x.device))
        reconstruction = decoder(latent(mu, logvar))
        adversarial = -0.5 * (dual(sample)[0].mean() + dual(reconstruction)[0].mean())
        kl = kl_divergence(mu, logvar)
        optimizer_e.zero_grad()
        optimizer_d.zero_grad()
        (adversarial + KL_WEIGHT * kl.sum()).backward()
        optimizer_e.step()
        optimizer_d.step()
        run.log(adversarial=adversarial, kl=kl.mean(), reconstruction=F.mse_loss(reconstruction, x))
        if args.rv:
            run.log(penalty=decoder.last_penalty)
        return adversarial

    def update_contrastive(x: Tensor) -> Tensor:
        """A reconstruction's features have to single out its own input; all three networks learn."""
        momentum.update_parameters(dual)
        with torch.no_grad():
            keys = {name: F.normalize(feature, dim=1) for name, feature in momentum(x)[1].items()}
        mu, logvar = encoder(x)
        queries = dual(decoder(latent(mu, logvar)))[1]
        losses = [queue.loss(F.normalize(queries[name], dim=1), keys[name]) for name, queue in queues.items()]
        contrastive = sum(losses) / len(losses)
        for optimizer in (optimizer_e, optimizer_d, optimizer_dual):
            optimizer.zero_grad()
        (contrastive + KL_WEIGHT * kl_divergence(mu, logvar).sum()).backward()
        for optimizer in (optimizer_e, optimizer_d, optimizer_dual):
            optimizer.step()
        for name, queue in queues.items():
            queue.push(keys[name])
        averaged.update_parameters(decoder)
        return contrastive

    def validation_loss(x: Tensor) -> Tensor:
        """What can be compared between epochs: the error of a reconstruction, and the weighted KL."""
        mu, logvar = encoder(x)
        return F.mse_loss(decoder(latent(mu, logvar)), x) + KL_WEIGHT * kl_divergence(mu, logvar).sum()

    run = Run(
        args,
        data,
        encoder=encoder,
        decoder=decoder,
        dual=dual,
        momentum=momentum,
        averaged=averaged,
        queues=queues,
        optimizer_e=optimizer_e,
        optimizer_d=optimizer_d,
        optimizer_dual=optimizer_dual,
    )
    run.views = Views(encoder, decoder, validation_loss, samples={"prior": decoder, "prior, averaged": averaged})
    if args.rv:
        var_1 = {"prior, var 1": lambda z: decoder(rvconvert.RandomVariable(z, torch.ones_like(z)))}
        run.views = run.views._replace(
            propagate=lambda x: decoder(latent(*encoder(x))),
            penalty=lambda: decoder.last_penalty,
            samples=run.views.samples | var_1,
        )

    for _ in run.epochs():
        for step, x in enumerate(run.batches()):
            update_discriminator(x)
            if step % DECODER_EVERY == 0:
                run.log(loss=update_autoencoder(x) + update_contrastive(x))
        run.end_epoch()
    return run


if __name__ == "__main__":
    main()
