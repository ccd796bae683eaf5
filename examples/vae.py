"""The variational autoencoder, in the convolutional shape of the PyTorch-VAE collection.

Kingma and Welling, "Auto-Encoding Variational Bayes", ICLR 2014; Subramanian, "PyTorch-VAE", 2020.
`--rv` trains the same model with its decoder propagating means and variances.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rvconvert
from common import Run, Views, argument_parser, conversion_options, kl_divergence, load_data, parse_arguments


class VanillaVAE(nn.Module):
    """Stride-2 convolutions down to a 2x2 map (of 64x64 images), their mirror image up; pixels in [-1, 1]."""

    def __init__(
        self,
        in_channels: int = 3,
        latent_dim: int = 128,
        hidden_dims: Sequence[int] = (32, 64, 128, 256, 512),
        size: int = 64,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        bottom = size // 2 ** len(hidden_dims)
        self.bottom_shape = (hidden_dims[-1], bottom, bottom)
        features = hidden_dims[-1] * bottom**2

        self.encoder = nn.Sequential()
        for before, after in pairwise((in_channels, *hidden_dims)):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1)
            self.encoder.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.LeakyReLU()))
        self.fc_mu = nn.Linear(features, latent_dim)
        self.fc_var = nn.Linear(features, latent_dim)

        self.decoder_input = nn.Linear(latent_dim, features)
        self.decoder = nn.Sequential()
        for before, after in pairwise((*reversed(hidden_dims), hidden_dims[0])):
            convolution = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)
            self.decoder.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.LeakyReLU()))
        self.final_layer = nn.Sequential(nn.Conv2d(hidden_dims[0], in_channels, 3, padding=1), nn.Tanh())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.flatten(self.encoder(x), start_dim=1)
        return self.fc_mu(features), self.fc_var(features)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps * std + mu

    def decode(self, z: Tensor) -> Tensor:
        features = self.decoder_input(z).view(-1, *self.bottom_shape)
        return self.final_layer(self.decoder(features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    def loss_function(self, reconstruction: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, kl_weight: float) -> dict[str, Tensor]:
        error = F.mse_loss(reconstruction, x)
        kl = kl_divergence(mu, logvar).mean()
        return {"loss": error + kl_weight * kl, "reconstruction": error, "kl": kl}

    def sample(self, count: int) -> Tensor:
        z = torch.randn(count, self.latent_dim, device=self.fc_mu.weight.device)
        return self.decode(z)


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argument_parser(__doc__)
    parser.add_argument("--latent", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--kl-weight", type=float, help="batch size / training images, unless given")
    args = parse_arguments(parser, arguments)
    data = load_data(args)

    channels, size = data.train.shape[1], data.train.shape[2]
    hidden_dims = (4, 4, 8, 8, 16) if args.smoke else [d // args.shrink for d in (32, 64, 128, 256, 512)]
    vae = VanillaVAE(channels, args.latent, hidden_dims, size).to(args.device)
    if args.rv:
        vae = rvconvert.convert(vae, **conversion_options(args))

    optimizer = torch.optim.Adam(vae.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    kl_weight = args.batch / len(data.train) if args.kl_weight is None else args.kl_weight
    run = Run(args, data, vae=vae, optimizer=optimizer, scheduler=scheduler)

    def losses(x: Tensor) -> dict[str, Tensor]:
        reconstruction, mu, logvar = vae(x)
        return vae.loss_function(reconstruction, x, mu, logvar, kl_weight)

    run.views = Views(vae.encode, vae.decode, lambda x: losses(x)["loss"], samples={"prior": vae.decode})
    if args.rv:
        var_1 = {"prior, var 1": lambda z: vae.decode(rvconvert.RandomVariable(z, torch.ones_like(z))).mean}
        run.views = run.views._replace(
            propagate=lambda x: vae(x)[0], penalty=lambda: vae.last_penalty, samples=run.views.samples | var_1
        )

    for _ in run.epochs():
        for x in run.batches(flip=args.dataset in ("celeba", "faces")):
            terms = losses(x)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            run.log(**terms)
            if args.rv:
                run.log(penalty=vae.last_penalty)
        scheduler.step()
        run.end_epoch()
    return run


if __name__ == "__main__":
    main()
