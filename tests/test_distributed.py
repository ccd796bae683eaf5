"""Converted models in the loops of others: many processes, accumulation, checkpointing, autocast, gradient scaling."""

import copy
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rvconvert

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
DATA = torch.rand(STEPS, 8, 6, generator=torch.Generator().manual_seed(1))


class VAE(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.encoder = nn.Linear(6, 8)
        self.decoder = nn.Sequential(nn.Linear(4, 16), norm(16), nn.LeakyReLU(), nn.Linear(16, 6), nn.Tanh())

    def decode(self, z):
        return self.decoder(z)

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return self.decode(mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)), mu


def converted(norm=nn.Identity, **options):
    torch.manual_seed(0)
    return rvconvert.convert(VAE(norm), example_inputs=DATA[0], **options)


def loss_of(outputs, x):
    return F.mse_loss(outputs[0], x) + outputs[1].square().mean()


def train(wrapped, model, batches):
    """Losses, penalties and the parameters after SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, penalties = [], []
    for x in batches:
        loss = loss_of(wrapped(x), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        penalties.append(model.last_penalty)
    return torch.stack(losses), torch.stack(penalties), {k: v.detach().clone() for k, v in full_state(model).items()}


def full_state(model):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, port, kind, results):
    torch.set_num_threads(1)
    model = converted(nn.SyncBatchNorm if kind == "sync" else nn.Identity)  # before there is a group: CPU has no plain one
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    if kind.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        if kind == "fsdp nested":
            fully_shard(model.encoder)
        wrapped = fully_shard(model)
    elif kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:  # DistributedDataParallel refuses SyncBatchNorm on a CPU: its mean of gradients, by hand
        wrapped = model
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(2)))
    losses, penalties, state = train(wrapped, model, [x.chunk(2)[rank] for x in DATA])
    dist.all_reduce(losses)
    dist.all_reduce(penalties)
    if rank == 0:
        torch.save((losses / 2, penalties / 2, state), results)
    dist.barrier()  # a process that leaves early takes gloo's connections with it
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an interpreter that is shutting down


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp nested", "sync"])
def test_two_processes_train_as_one_on_the_joined_batch(kind, tmp_path):
    mp.spawn(worker, (free_port(), kind, str(tmp_path / "results")), nprocs=2)
    found = torch.load(tmp_path / "results", weights_only=True)
    model = converted(nn.BatchNorm1d if kind == "sync" else nn.Identity)
    torch.testing.assert_close(found, train(model, model, DATA), rtol=1e-4, atol=1e-6)


def step(model, x, share=1.0):
    loss = loss_of(model(x), x) * share
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_gradients_accumulate_over_parts_of_a_batch():
    whole, parts = converted(), converted()
    expected = step(whole, DATA[0])
    parts.penalty_scale = 0.5  # as the loss
    for part in DATA[0].chunk(2):
        found = step(parts, part, share=0.5)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    """Over the whole method, as trainers do; parts of a converted method are torch.compile's to checkpoint."""
    model = converted(nn.BatchNorm1d)
    other = copy.deepcopy(model)
    expected = step(model, DATA[0])
    found = step(lambda_module(other, reentrant), DATA[0])
    torch.testing.assert_close(found, expected)


def lambda_module(model, reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=reentrant)

    return Checkpointed()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_moments_stay_in_single_precision(dtype):
    model = converted(nn.BatchNorm1d, output="distribution")
    exact = model(DATA[0])[0]
    with torch.autocast("cpu", dtype):
        assert F.linear(DATA[0], torch.ones(2, 6)).dtype == dtype
        y = model(DATA[0])[0]
    assert y.var.dtype == torch.float32
    assert (y.var > 0).all()
    torch.testing.assert_close(y.var, exact.var, rtol=0.05, atol=1e-3)
    torch.testing.assert_close(y.mean.float(), exact.mean, rtol=0.05, atol=0.02)


def test_gradient_scaling_scales_the_penalty_with_the_loss():
    plain, scaled = converted(), converted()
    expected = step(plain, DATA[0])
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    x = DATA[0]
    scaled.penalty_scale = scaler.get_scale()
    scaler.scale(loss_of(scaled(x), x)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close([p.grad for p in scaled.parameters()], expected)
    scaled.penalty_scale = 1.0  # unscaled, it would vanish beside the loss
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(scaled(x), x)).backward()
    scaler.unscale_(optimizer)
    assert not torch.allclose(scaled.decoder[0].weight.grad, expected[2], rtol=1e-3)


# ---- the example ---------------------------------------------------------------------------------------------------


SCRIPT = str(ROOT / "examples" / "train_distributed.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RVCONVERT_COMPILE": "0"}


def launch(path, epochs, *flags):
    """The example's two processes, as torchrun starts them; torchrun's own workers outlive a torchrun that is killed."""
    port = str(free_port())
    started = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, SCRIPT, "--checkpoint", str(path), "--epochs", str(epochs), *flags]
        started.append(
            subprocess.Popen(command, env=ENVIRONMENT | place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return started


def finish(processes):
    for process in processes:
        output, _ = process.communicate(timeout=240)
        aborted = output.rstrip().endswith("terminate called without an active exception")  # gloo's threads, at the very end
        assert process.returncode == 0 or aborted, output


def weights(path):
    """The trained ones; a bias in front of BatchNorm has no gradient but rounding, of which Adam makes steps."""
    saved = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in saved.items() if not k.endswith((".0.0.bias", ".1.0.bias")) and "running" not in k}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--fsdp",)], ids=["ddp", "fsdp"])
def test_the_example_resumes_after_a_kill(flags, tmp_path):
    pytest.importorskip("sklearn")
    path, whole = tmp_path / "killed.pt", tmp_path / "whole.pt"
    killed = launch(path, 100, *flags)
    deadline = time.monotonic() + 240
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in killed:
        process.kill()
        process.wait()
    done = torch.load(path, weights_only=True)["epoch"]
    assert done >= 1
    finish(launch(path, done + 2, *flags))
    finish(launch(whole, done + 2, *flags))
    torch.testing.assert_close(weights(path), weights(whole), rtol=1e-3, atol=1e-4)  # the same epochs in the same order


@pytest.mark.slow
def test_the_examples_own_command_runs(tmp_path):
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={free_port()}"]
    command += [SCRIPT, "--epochs", "1", "--checkpoint", str(tmp_path / "run.pt")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "epoch 1: loss" in done.stdout
