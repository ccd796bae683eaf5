"""A plain training script, and the one line that trains an RV-VAE instead: see --rv.

python examples/train_vae.py --data DIR          # DIR holds MNIST; without it, scikit-learn's digits
python examples/train_vae.py --data DIR --rv
python examples/train_vae.py --data DIR --rv --truth   # and warn where training has not seen most of the variance
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

import image_sets
import rvconvert
from rvconvert.verify import truth_ratio
from vae import VanillaVAE

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, help="folder of MNIST: torchvision's, or one with mnist.npz")
parser.add_argument("--epochs", type=int, default=5)
parser.add_argument("--batch", type=int, default=64)
parser.add_argument("--images", type=int, help="train on the first N images only")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--rv", action="store_true", help="train the random-variable form of the model")
parser.add_argument("--truth", action="store_true", help="with --rv: hold the propagated variance against the true one")
args = parser.parse_args()

torch.manual_seed(args.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"
train, test = image_sets.load("mnist" if args.data else "digits", args.data)
train = train[: args.images].to(device) / 127.5 - 1
test = test[:1000].to(device) / 127.5 - 1

vae = VanillaVAE(in_channels=1, latent_dim=32, hidden_dims=(16, 32, 64, 128), size=32).to(device)
if args.rv:
    vae = rvconvert.convert(vae)  # the one line

optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
for epoch in range(args.epochs):
    vae.train()
    losses = []
    for rows in torch.randperm(len(train)).split(args.batch):
        x = train[rows.to(device)]
        reconstruction, mu, logvar = vae(x)
        loss = vae.loss_function(reconstruction, x, mu, logvar, kl_weight=1e-3)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    vae.eval()
    with torch.no_grad():
        reconstruction, mu, logvar = vae(test)
        error, error_mean = F.mse_loss(reconstruction, test).item(), F.mse_loss(vae.decode(mu), test).item()
    print(
        f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}, test MSE {error:.4f}, "
        f"from the posterior's mean {error_mean:.4f}",
        flush=True,
    )

if args.rv:
    plain = rvconvert.to_plain(vae, latent="mean")  # the same class, the same keys, the trained weights
    with torch.no_grad():
        difference = F.mse_loss(plain(test)[0], vae(test)[0]).item()
    print(f"MSE between the RV model's reconstruction and the plain one's with its weights: {difference:.3g}")
    if args.truth:
        print(f"true variance of the reconstruction over the propagated one: {truth_ratio(vae, test[:100]):.3g}")
