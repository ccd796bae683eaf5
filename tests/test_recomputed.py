"""What is made again for the gradients, not kept: scores of attention, steps of LayerNorm, an activation's input."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rvconvert
from rvconvert.core.random_variable import moments_later
from rvconvert.moments import composed
from rvconvert.rules import attention

MASKS = {
    "none": None,
    "of keys": torch.tensor([True, False, True, True, True]),
    "of queries": torch.tensor([[True], [False], [True]]),
    "of all": torch.arange(2 * 3 * 3 * 5).reshape(2, 3, 3, 5) % 7 > 0,
    "added": torch.linspace(-1, 1, 15).reshape(3, 5),
}


def variable(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> rvconvert.RandomVariable:
    generator = torch.Generator().manual_seed(seed)
    mean, var = (make(shape, generator=generator, dtype=dtype) for make in (torch.randn, torch.rand))
    return rvconvert.RandomVariable(mean.requires_grad_(), var.requires_grad_())


def moments_and_gradients(function: Callable[..., Any], *inputs: rvconvert.RandomVariable) -> list[torch.Tensor]:
    out = function(*inputs)
    loss = out.mean.sin().sum() + out.var.square().sum()
    return [out.mean, out.var, *torch.autograd.grad(loss, [x for each in inputs for x in (each.mean, each.var)])]


@pytest.mark.parametrize("scores", [1, 4, 20, 50])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("batches", [((2, 3), (2, 3), (2, 3)), ((2, 1), (1, 3), (2, 3)), ((), (), ())])
def test_attention_in_blocks_is_attention(monkeypatch: Any, batches: Any, mask: str, scores: int) -> None:
    if mask == "of all" and not batches[0]:
        pytest.skip("the mask has batches, the query none")
    shapes = (3, 4), (5, 4), (5, 6)
    inputs = [variable(*batch, *shape, seed=i) for i, (batch, shape) in enumerate(zip(batches, shapes, strict=True))]

    def attend(*inputs: Any) -> Any:
        return F.scaled_dot_product_attention(*inputs, attn_mask=MASKS[mask])  # type: ignore[arg-type]

    whole = moments_and_gradients(attend, *inputs)
    monkeypatch.setattr(attention, "_SCORES", scores)
    for got, expected in zip(moments_and_gradients(attend, *inputs), whole, strict=True):
        torch.testing.assert_close(got, expected)


RECOMPUTED: dict[str, Callable[[Any], Any]] = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "layer_norm of few": lambda x: F.layer_norm(x, (8,)),
    "layer_norm of many": lambda x: F.layer_norm(x, (64, 8)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_gradients_keep_the_inputs_alone(name: str) -> None:
    x = variable(4, 64, 8, seed=0)
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = RECOMPUTED[name](x)
    assert {x.mean.data_ptr(), x.var.data_ptr()} <= set(kept)
    assert sum(kept.values()) < 2.1 * x.mean.numel()
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.mean.sin().sum() + out.var.sum(), (x.mean, x.var)))


@pytest.mark.parametrize("name", RECOMPUTED)
def test_twice_differentiable(name: str) -> None:
    x = variable(2, 3, 8, seed=1)
    function = RECOMPUTED[name] if name != "layer_norm of many" else lambda x: F.layer_norm(x, (3, 8))

    def moments(mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = function(rvconvert.RandomVariable(mean, var))
        return out.mean, out.var

    assert torch.autograd.gradgradcheck(moments, (x.mean, x.var + 0.1), atol=1e-4)


AFTER_BATCH_NORM: dict[str, Callable[[Any], Any]] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


def kept_elements(function: Callable[[Any], Any], x: rvconvert.RandomVariable) -> int:
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes() // saved.element_size()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = function(x)
        (out.mean * out.mean.detach() + out.var * out.var.detach()).sum()  # the next layer keeps the result
    return sum(kept.values())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_keeps_its_result_alone(inplace: bool) -> None:
    x = variable(8, 4, 40, 40, seed=2, dtype=torch.float32)
    assert kept_elements(lambda x: F.relu(x * 1.0, inplace=inplace), x) < 2.1 * x.mean.numel()


def test_steps_on_the_way_to_a_function_of_the_whole_keep_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(composed, "_found", {})  # there are so many tables in a process
    x = variable(8, 4, 40, 40, seed=2, dtype=torch.float32)
    with moments_later():  # as in a kept program
        by_hand = kept_elements(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3))), x)
    assert by_hand == kept_elements(lambda x: F.gelu(x, approximate="tanh"), x)


def test_a_relu_s_gradients_from_its_result_are_those_in_double_precision() -> None:
    m, s = torch.meshgrid(torch.linspace(-6, 6, 241), torch.logspace(-3, 0.5, 100), indexing="ij")
    found = []
    for dtype in (torch.float32, torch.float64):
        x = rvconvert.RandomVariable(m.to(dtype).requires_grad_(), s.to(dtype).square().requires_grad_())
        y = F.relu(x)  # type: ignore[arg-type]
        found.append([torch.autograd.grad(each.sum(), (x.mean, x.var), retain_graph=True) for each in (y.mean, y.var)])
    units = ((torch.ones_like(s), 1 / s), (s, torch.ones_like(s)))
    for of_moment in zip(*found, units, strict=True):
        for got, expected, unit in zip(*of_moment, strict=True):
            assert float(((got - expected) / unit).abs().max()) < 2e-6


@pytest.mark.parametrize("weight", [None, torch.linspace(-1, 2, 4)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", AFTER_BATCH_NORM)
def test_after_batch_norm_the_result_is_kept_alone(
    monkeypatch: Any, name: str, order: torch.memory_format, weight: torch.Tensor | None
) -> None:
    x = variable(8, 4, 40, 40, seed=2, dtype=torch.float32)
    x = rvconvert.RandomVariable(*(each.detach().contiguous(memory_format=order).requires_grad_() for each in (x.mean, x.var)))

    def layers(x: Any) -> Any:
        bias = None if weight is None else weight.flip(0)
        return AFTER_BATCH_NORM[name](F.batch_norm(x, None, None, weight, bias, training=True))

    assert kept_elements(layers, x) < 4.1 * x.mean.numel()
    found = moments_and_gradients(layers, x)
    monkeypatch.setattr(rvconvert.RandomVariable, "kept_as_remade", lambda self: nullcontext())
    assert kept_elements(layers, x) > 5.9 * x.mean.numel()
    for got, expected in zip(found, moments_and_gradients(layers, x), strict=True):
        torch.testing.assert_close(got, expected)


def test_batch_norm_and_relu_twice_differentiable() -> None:
    x = variable(5, 2, 2, seed=3)

    def moments(mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = F.relu(F.batch_norm(rvconvert.RandomVariable(mean, var), None, None, training=True))  # type: ignore[arg-type]
        return out.mean, out.var

    assert torch.autograd.gradgradcheck(moments, (x.mean, x.var + 0.1), atol=1e-4)
    total = moments(x.mean, x.var)[0].square().sum()
    grads = [torch.autograd.grad(total, (x.mean, x.var), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_relu_s_gradients_have_gradients_in_single_precision() -> None:
    m, s = torch.meshgrid(torch.linspace(-6, 6, 41), torch.logspace(-2, 0.5, 20), indexing="ij")
    found = []
    for dtype in (torch.float32, torch.float64):
        x = rvconvert.RandomVariable(m.to(dtype).requires_grad_(), s.to(dtype).square().requires_grad_())
        y = F.relu(x)  # type: ignore[arg-type]
        total = (y.mean.square() + y.var.square()).sum()
        first = torch.autograd.grad(total, (x.mean, x.var), create_graph=True)
        found.append(torch.autograd.grad(first[0].sum() + (x.var.detach().sqrt() * first[1]).sum(), (x.mean, x.var)))
    for got, expected, unit in zip(*found, (1.0, 1 / s), strict=True):
        assert float(((got - expected) / (unit * (1 + expected.abs()))).abs().max()) < 2e-4
