"""Large results lie in memory that was used before, and never in memory that a tensor still has."""

import copy
import gc
import pickle
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import rvconvert
from rvconvert.moments import buffers

SHAPE = (8, 16, 64, 64)  # 2 MB


@pytest.fixture(autouse=True)
def _no_idle_memory() -> Iterator[None]:
    buffers._idle.clear()
    yield
    buffers._idle.clear()


def variable(seed: int, order: torch.memory_format = torch.contiguous_format) -> rvconvert.RandomVariable:
    generator = torch.Generator().manual_seed(seed)
    mean, var = torch.randn(SHAPE, generator=generator), torch.rand(SHAPE, generator=generator)
    return rvconvert.RandomVariable(*(x.contiguous(memory_format=order).requires_grad_() for x in (mean, var)))


def layers(x: rvconvert.RandomVariable) -> rvconvert.RandomVariable:
    return F.silu(F.relu(F.batch_norm(x, None, None, training=True)))  # type: ignore[arg-type, return-value]


def test_memory_is_used_again() -> None:
    x = variable(0)
    first = F.silu(x)  # type: ignore[arg-type]
    places = {first.mean.data_ptr(), first.var.data_ptr()}
    del first
    second = F.silu(x)  # type: ignore[arg-type]
    assert {second.mean.data_ptr(), second.var.data_ptr()} == places


def test_memory_that_a_view_has_is_not_used_again() -> None:
    x = variable(0)
    out = F.silu(x).mean  # type: ignore[arg-type]
    held, array, data = out[0], out.detach()[1].numpy(), out[2].detach().untyped_storage()
    expected = held.clone(), array.copy()
    place = out.data_ptr()
    del out
    gc.collect()
    others = [F.silu(variable(i)) for i in range(1, 4)]  # type: ignore[arg-type]
    assert place == data.data_ptr()
    assert place not in {y.data_ptr() for each in others for y in (each.mean, each.var)}
    assert torch.equal(held, expected[0])
    assert (array == expected[1]).all()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_steps_one_after_the_other_give_what_each_gives_alone(order: torch.memory_format) -> None:
    def step(seed: int) -> list[torch.Tensor]:
        x = variable(seed, order)
        out = layers(x)
        grads = torch.autograd.grad(out.mean.sin().sum() + out.var.sum(), (x.mean, x.var))
        return [y.detach().clone() for y in (out.mean, out.var, *grads)]

    together = [step(seed) for seed in range(3)]
    for seed, found in enumerate(together):
        buffers._idle.clear()
        assert all(torch.equal(a, b) for a, b in zip(step(seed), found, strict=True))


def test_threads_share_no_memory() -> None:
    alone = [layers(variable(seed)).mean.detach().clone() for seed in range(4)]
    found: dict[int, bool] = {}

    def run(seed: int) -> None:
        found[seed] = all(torch.equal(layers(variable(seed)).mean, alone[seed]) for _ in range(5))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == dict.fromkeys(range(4), True)


def test_a_result_is_a_tensor_like_any_other() -> None:
    out = F.silu(variable(0)).mean.detach()  # type: ignore[arg-type]
    assert torch.equal(pickle.loads(pickle.dumps(out)), out)
    assert torch.equal(copy.deepcopy(out), out)
    shared = out.clone()
    assert torch.equal(out.share_memory_(), shared)
    out.add_(1)
    assert torch.equal(out, shared + 1)


def test_memory_of_a_size_that_no_one_asks_for_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "FORGOTTEN", 8)
    like = torch.empty(0)
    n = buffers.LARGE // 4
    buffers.empty(n, like)
    assert 4 * n in buffers._idle
    for _ in range(20):
        buffers.empty(2 * n, like)
    assert 4 * n not in buffers._idle
    assert len(buffers._idle[8 * n]) == 1


def test_small_results_and_those_of_a_subclass_are_torch_s_own() -> None:
    buffers.empty(8, torch.empty(0))
    with FakeTensorMode():
        assert type(buffers.empty_like(torch.empty(SHAPE))) is not torch.Tensor
    assert not buffers._idle
