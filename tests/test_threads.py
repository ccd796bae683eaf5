"""Conversions in several threads at once, and what is left of torch after a capture that failed."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import rvconvert
from tests.models import VanillaVAE

TOUCHED = {
    "nn.Module.__call__": lambda: nn.Module.__call__,
    "nn.Module.__setattr__": lambda: nn.Module.__setattr__,
    "autograd.Function.apply": lambda: torch.autograd.Function.__dict__.get("apply"),
    "torch.autograd.grad": lambda: torch.autograd.grad,
    "torch.randn": lambda: torch.randn,
    "torch.randn_like": lambda: torch.randn_like,
    "torch.Tensor.__bool__": lambda: torch.Tensor.__bool__,
    "torch.Tensor.item": lambda: torch.Tensor.item,
    "F.dropout": lambda: F.dropout,
    "checkpoint": lambda: torch.utils.checkpoint.checkpoint,
    "function modes": _get_current_function_mode_stack,
    "dispatch modes": _get_current_dispatch_mode_stack,
    "grad mode": torch.is_grad_enabled,
}


@pytest.fixture
def torch_is_left_alone():
    before = {name: read() for name, read in TOUCHED.items()}
    yield
    after = {name: read() for name, read in TOUCHED.items()}
    assert [name for name in TOUCHED if after[name] is not before[name] and after[name] != before[name]] == []


def test_four_threads_convert_and_train_at_once(torch_is_left_alone):
    errors, penalties = [], {}
    start = threading.Barrier(4)

    def work(index):
        try:
            torch.manual_seed(index)
            model = VanillaVAE(hidden=(4, 8)).double()
            expected = rvconvert.convert(model, seed=0)  # before the others start: no thread's values meet another's
            x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(index)).double()
            start.wait()
            converted = rvconvert.convert(model, covariance=("independent", "sampled", "lowrank", "calibrated")[index])
            optimizer = torch.optim.SGD(converted.parameters(), 1e-3)
            for _ in range(3):
                optimizer.zero_grad()
                out, _, mu, logvar = converted(x)
                (F.mse_loss(out, x) + 1e-3 * (mu.square() + logvar.exp() - logvar).mean()).backward()
                optimizer.step()
            expected(x)
            penalties[index] = float(converted.last_penalty)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(penalties) == 4 and all(value > 0 for value in penalties.values())


class Raises(nn.Module):
    """Fails in the middle of a capture, in a way of the caller's choice."""

    def __init__(self, where):
        super().__init__()
        self.encoder, self.decoder, self.where = nn.Linear(4, 6), nn.Linear(3, 4), where

    def forward(self, x):
        mu, logvar = self.encoder(x).chunk(2, -1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        if self.where == "python":
            raise KeyError("own error")
        if self.where == "torch":
            return self.decoder(z[:, :2])
        if self.where == "read":
            return self.decoder(z) if z.sum() > 0 else x
        with torch.no_grad():
            torch.linalg.cholesky(-torch.eye(3))
        return self.decoder(z)


@pytest.mark.parametrize("where", ["python", "torch", "read", "in no_grad"])
def test_a_capture_that_raises_leaves_torch_as_it_was(where, torch_is_left_alone):
    model, x = Raises(where), torch.randn(2, 4)
    for call in (lambda: rvconvert.convert(model)(x), lambda: rvconvert.convert(model, example_inputs=x)):
        with pytest.raises(Exception):  # noqa: B017 (each has an error of its own; what matters is what it leaves)
            call()
    out = nn.Linear(4, 2)(x).sum()
    out.backward()
    assert out.requires_grad
