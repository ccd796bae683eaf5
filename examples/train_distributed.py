"""A converted VAE on many processes, with nothing but torch's own tools; resumes after a kill -9 at the last epoch.

    torchrun --nproc-per-node 2 examples/train_distributed.py --epochs 5 --checkpoint run.pt [--fsdp]

One process for each GPU over NCCL, or for each processor core over gloo where there is none. The checkpoint holds the
plain model's keys, so it also loads without rvconvert.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import rvconvert
from vae import VanillaVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64, help="of each process")
    parser.add_argument("--checkpoint", type=Path, default=Path("distributed.pt"))
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters (FSDP2) instead of copying them (DDP)")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)

    images = F.pad(torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1, (4, 4, 4, 4), value=-1.0)
    sampler = DistributedSampler(data := TensorDataset(images))
    loader = DataLoader(data, batch_size=args.batch, sampler=sampler, drop_last=True)

    vae = rvconvert.convert(VanillaVAE(1, 16, (16, 32, 64), size=16).to(device), example_inputs=images[:2].to(device))
    if args.fsdp:
        model = fully_shard(vae)
    else:
        model = DistributedDataParallel(vae, device_ids=[device.index] if cuda else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    first = 0
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, weights_only=True)
        first = saved["epoch"]
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=whole)

    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        for (batch,) in loader:
            x = batch.to(device)
            reconstruction, mu, logvar = model(x)
            loss = vae.loss_function(reconstruction, x, mu, logvar, kl_weight=1e-3)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        weights, moments = get_state_dict(model, optimizer, options=whole)
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, penalty {vae.last_penalty.item():.2g}", flush=True)
            beside = args.checkpoint.with_suffix(".new")
            torch.save({"epoch": epoch + 1, "model": weights, "optimizer": moments}, beside)
            beside.replace(args.checkpoint)  # all or nothing, whenever the process is killed
    dist.barrier()  # none leaves while another still needs it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
