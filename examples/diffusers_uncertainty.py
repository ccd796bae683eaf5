"""diffusers' AutoencoderKL: an uncertainty map of a decode, and a fine-tuning step that sees the variance.

pip install 'diffusers>=0.30'
python examples/diffusers_uncertainty.py                                      # small, random weights, seconds
python examples/diffusers_uncertainty.py --pretrained FOLDER --images photos/ # your own weights and pictures
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

import rvconvert
from rvconvert.cli.images import heat, labelled_rows, read_images

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--pretrained", type=Path, help="a folder or name that from_pretrained takes; else random weights")
parser.add_argument("--images", type=Path, help="a folder of pictures; else scikit-learn's two photographs, cut small")
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--pairs", type=int, default=8, help="antithetic pairs of paths for the map")
parser.add_argument("--out", type=Path, default=Path("uncertainty.png"))
args = parser.parse_args()
torch.manual_seed(0)

if args.pretrained:
    vae = AutoencoderKL.from_pretrained(args.pretrained)
else:
    widths = (16, 32)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=widths, norm_num_groups=4, latent_channels=4, **blocks)
if args.images:
    images = read_images(args.images, count=4, size=args.size)
else:
    from sklearn.datasets import load_sample_images

    photographs = torch.stack([torch.from_numpy(x) for x in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    images = F.interpolate(photographs, size=(args.size, args.size), mode="area")
x = images * 2 - 1  # the range that diffusers' autoencoders have

# The distribution of the decode: mean and deviation of every pixel, from the encoder's own posterior.
sampler = {"sample_posterior": True}
uncertain = rvconvert.convert(vae, covariance="sampled", pairs=args.pairs, output="distribution", attach=False)
with torch.no_grad():
    decoded = uncertain(x, **sampler).sample
deviation = decoded.std.mean(1, keepdim=True)
print(f"deviation of a pixel: {deviation.mean():.4g} on average, {deviation.max():.4g} at most")
labelled_rows(
    [
        ("input", images),
        ("mean of the decode", (decoded.mean / 2 + 0.5).clamp(0, 1)),
        (f"deviation\n(yellow {deviation.max():.2g})", heat(deviation / deviation.max())),
    ],
    title="AutoencoderKL, its uncertainty",
).save(args.out)
print(f"picture: {args.out}")

# A fine-tuning step: the loss is the one of any script; the expected error's other half joins at backward.
rv_vae = rvconvert.convert(vae, covariance="sampled", penalty=1.0, penalty_kind="expected")
optimizer = torch.optim.AdamW(rv_vae.parameters(), lr=1e-4)
for step in range(2):
    posterior = rv_vae.encode(x).latent_dist
    loss = F.mse_loss(rv_vae(x, **sampler).sample, x) + 1e-6 * posterior.kl().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step + 1}: loss {loss.item():.4f}, of which the variance is not a part: {rv_vae.last_penalty.item():.4g}")

plain = rvconvert.to_plain(rv_vae)  # an AutoencoderKL again: save_pretrained, pipelines, everything
print(f"back to {type(plain).__module__}.{type(plain).__name__}, {len(plain.state_dict())} entries")
