"""The beta-TCVAE: a VAE whose KL term is split, its total correlation weighted by beta.

Chen, Li, Grosse and Duvenaud, "Isolating Sources of Disentanglement in Variational Autoencoders", NeurIPS
2018, with the network of the PyTorch-VAE collection (Subramanian, 2020).
`--rv` trains the same model with its decoder propagating means and variances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rvconvert
from common import Run, Views, argument_parser, conversion_options, load_data, parse_arguments


class BetaTCVAE(nn.Module):
    """Four stride-2 convolutions of 32 channels and their mirror image; pixels in [-1, 1]."""

    def __init__(
        self,
        in_channels: int = 3,
        latent_dim: int = 10,
        hidden_dims: Sequence[int] = (32, 32, 32, 32),
        size: int = 64,
        hidden_features: int = 256,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        bottom = size // 2 ** len(hidden_dims)
        self.bottom_shape = (hidden_dims[-1], bottom, bottom)
        features = hidden_dims[-1] * bottom**2

        self.encoder = nn.Sequential()
        for before, after in pairwise((in_channels, *hidden_dims)):
            convolution = nn.Conv2d(before, after, 4, stride=2, padding=1)
            self.encoder.append(nn.Sequential(convolution, nn.LeakyReLU()))
        self.fc = nn.Linear(features, hidden_features)
        self.fc_mu = nn.Linear(hidden_features, latent_dim)
        self.fc_var = nn.Linear(hidden_features, latent_dim)

        self.decoder_input = nn.Linear(latent_dim, features)
        self.decoder = nn.Sequential()
        for before, after in pairwise((*reversed(hidden_dims), hidden_dims[0])):
            convolution = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1)
            self.decoder.append(nn.Sequential(convolution, nn.LeakyReLU()))
        self.final_layer = nn.Sequential(nn.Conv2d(hidden_dims[0], in_channels, 3, padding=1), nn.Tanh())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.fc(torch.flatten(self.encoder(x), start_dim=1))
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

    def loss_function(
        self,
        reconstruction: Tensor,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        *,
        dataset_size: int,
        anneal: float = 1.0,
        alpha: float = 1.0,
        beta: float = 6.0,
        gamma: float = 1.0,
    ) -> dict[str, Tensor]:
        """Equation 4: alpha mutual information + beta total correlation + gamma dimension-wise KL.

        The densities are estimated at one draw of z per image. It is drawn here: at the posterior's mean, which
        is all that a model without sampling could return, the estimate falls without bound as var grows.
        """
        z = self.reparameterize(mu, logvar)
        log_q_zx = log_normal(z, mu, logvar).sum(1)
        log_p_z = log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).sum(1)

        pairs = log_normal(z[:, None], mu[None], logvar[None])  # (draw, posterior, dimension)
        weights = log_stratified_weights(len(z), dataset_size).to(pairs)
        log_q_z = torch.logsumexp(weights + pairs.sum(2), dim=1)
        log_prod_q_z = torch.logsumexp(weights[..., None] + pairs, dim=1).sum(1)

        mutual_information = (log_q_zx - log_q_z).mean()
        total_correlation = (log_q_z - log_prod_q_z).mean()
        dimension_kl = (log_prod_q_z - log_p_z).mean()
        error = F.mse_loss(reconstruction, x, reduction="sum") / len(x)
        loss = error + alpha * mutual_information + beta * total_correlation + anneal * gamma * dimension_kl
        return {
            "loss": loss,
            "reconstruction": error,
            "kl": (log_q_zx - log_p_z).mean(),
            "mutual_information": mutual_information,
            "total_correlation": total_correlation,
            "dimension_kl": dimension_kl,
        }

    def sample(self, count: int) -> Tensor:
        z = torch.randn(count, self.latent_dim, device=self.fc_mu.weight.device)
        return self.decode(z)


def log_normal(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu) ** 2 * torch.exp(-logvar))


def log_stratified_weights(batch: int, dataset_size: int) -> Tensor:
    """Minibatch stratified sampling, appendix C.2: log weights of posterior j in q(z_i), shape (batch, batch).

    z_i's own posterior stands for itself, 1/N; M - 1 of the others for 1/M each, and one for what is left.
    """
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others)
    i = torch.arange(batch)
    weights[i, i] = 1 / dataset_size
    weights[i, i - 1] = (dataset_size - others) / (dataset_size * others)
    return weights.log()


def main(arguments: Sequence[str] | None = None) -> Run:
    parser = argument_parser(__doc__)
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--beta", type=float, default=6.0)
    parser.add_argument("--anneal-steps", type=int, default=10_000, help="until the KL counts in full")
    args = parse_arguments(parser, arguments)
    data = load_data(args)

    channels, size = data.train.shape[1], data.train.shape[2]
    hidden_dims = [8 if args.smoke else 32 // args.shrink] * 4
    vae = BetaTCVAE(channels, args.latent, hidden_dims, size).to(args.device)
    if args.rv:
        vae = rvconvert.convert(vae, **conversion_options(args))

    optimizer = torch.optim.Adam(vae.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)
    run = Run(args, data, vae=vae, optimizer=optimizer, scheduler=scheduler)

    def losses(x: Tensor, anneal: float = 1.0) -> dict[str, Tensor]:
        reconstruction, mu, logvar = vae(x)
        return vae.loss_function(reconstruction, x, mu, logvar, dataset_size=len(data.train), anneal=anneal, beta=args.beta)

    run.views = Views(vae.encode, vae.decode, lambda x: losses(x)["loss"], samples={"prior": vae.decode})
    if args.rv:
        var_1 = {"prior, var 1": lambda z: vae.decode(rvconvert.RandomVariable(z, torch.ones_like(z))).mean}
        run.views = run.views._replace(
            propagate=lambda x: vae(x)[0], penalty=lambda: vae.last_penalty, samples=run.views.samples | var_1
        )

    step = run.epoch * (len(data.train) // args.batch)
    for _ in run.epochs():
        for x in run.batches(flip=args.dataset in ("celeba", "faces")):
            step += 1
            terms = losses(x, anneal=min(1.0, step / args.anneal_steps))
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
