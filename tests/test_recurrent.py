"""A recurrent cell's steps, and the loop over them: their own backward passes against autograd's, and float32 against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rvconvert
from rvconvert.rules.recurrent_steps import STEPS, Pair, _run, joined, linear, once, unrolled

TIMES, BATCH, WIDTH = 6, 5, 7
GATES, STATES = {"lstm": 4, "gru": 3}, {"lstm": 2, "gru": 1}
named = pytest.mark.parametrize


def inputs(name: str, bias: bool):
    generator = torch.Generator().manual_seed(0)

    def pair(*shape):
        return Pair(torch.randn(shape, generator=generator), torch.rand(shape, generator=generator))

    gates = pair(TIMES, BATCH, GATES[name] * WIDTH)
    state = tuple(pair(BATCH, WIDTH) for _ in range(STATES[name]))
    weight, offset = pair(GATES[name] * WIDTH, WIDTH).mean, pair(GATES[name] * WIDTH).mean
    leaves = [*gates, weight, *([offset] if bias else []), *(x for each in state for x in each)]
    for x in leaves:
        x.requires_grad_()
    return (STEPS[name], gates, weight, offset if bias else None, state), leaves


def composed(*arguments):
    """The steps in torch's operations alone."""
    outputs, states = _run(*arguments)
    return outputs, states[-1]


def one_by_one(step, gates, weight, bias, state):
    """As a loop over a cell."""
    hidden, outputs = linear(weight, bias), []
    for mean, var in zip(*gates, strict=True):
        state = once(step, Pair(mean, var), hidden(state[0]), state)
        outputs.append(state[0])
    return joined(outputs, torch.stack), state


OWN = {"_Unrolled": unrolled, "_Once": one_by_one}


def flat(outputs: Pair, state) -> list[torch.Tensor]:
    return [*outputs, *(x for each in state for x in each)]


@named("own", OWN)
@named("bias", [True, False])
@named("name", GATES)
def test_its_own_backward_pass_is_autograds(name, bias, own):
    arguments, leaves = inputs(name, bias)
    found, expected = flat(*OWN[own](*arguments)), flat(*composed(*arguments))
    torch.testing.assert_close(found, expected)
    assert own in found[-1].grad_fn.name()
    weights = [torch.randn_like(x) for x in expected]
    found, expected = (torch.autograd.grad(x, leaves, weights) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-6)


@named("own", OWN)
@named("name", GATES)
def test_the_gradients_have_gradients(name, own):
    arguments, leaves = inputs(name, True)
    results = []
    for run in (OWN[own], composed):
        out = flat(*run(*arguments))
        first = torch.autograd.grad(sum(x.square().sum() for x in out), leaves, create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@named("own", OWN)
def test_a_part_of_the_results_and_of_the_inputs_has_its_gradient(own):
    (step, gates, weight, bias, state), _ = inputs("lstm", True)
    frozen = weight.detach()
    results = []
    for run in (OWN[own], composed):
        out, *_ = run(step, gates, frozen, bias, tuple(Pair(*(x.detach() for x in each)) for each in state))
        results.append(torch.autograd.grad(out.mean[-1].sum(), [gates.mean, bias]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=3e-6)


@named("kind", [nn.LSTM, nn.GRU, nn.RNN])
@named("both", [False, True])
def test_a_layer_in_single_precision_is_one_in_double(kind, both):
    torch.manual_seed(0)
    layer = kind(4, 6, num_layers=2, batch_first=True, bidirectional=both)
    mean, var = torch.randn(3, 5, 4), torch.rand(3, 5, 4)
    results = []
    for dtype in (torch.float32, torch.float64):
        made = layer.to(dtype)
        m, v = (x.to(dtype).requires_grad_() for x in (mean, var))
        y, ends = made(rvconvert.RandomVariable(m, v))
        end = ends[0] if kind is nn.LSTM else ends
        loss = y.mean.square().sum() + y.var.sum() + end.mean.sum() + end.var.square().sum()
        grads = torch.autograd.grad(loss, [m, v, *made.parameters()])
        results.append([x.double() for x in (y.mean, y.var, end.mean, end.var, *grads)])
    torch.testing.assert_close(*results, rtol=2e-3, atol=1e-3)
    torch.testing.assert_close(results[0][:4], results[1][:4], rtol=2e-4, atol=1e-5)


# ---- what a cell's state carries to the next step ---------------------------------------------------------------------


def moments_of_steps(cell, x, h, *, carry):
    for _ in range(5):
        state = cell(x, (h, h) if isinstance(cell, nn.LSTMCell) else h)
        h = state[0] if isinstance(state, tuple) else state
        if not carry:
            h = h.with_moments(h.mean, h.var)
    return h


@named("kind", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_a_loop_of_cells_is_what_its_steps_are(kind):
    """Squared weights and the gates of an input that stays the same, made once: the same moments and gradients."""
    torch.manual_seed(0)
    cell = kind(3, 4)
    x, h = (rvconvert.RandomVariable(torch.randn(2, n), torch.rand(2, n)) for n in (3, 4))
    found = []
    for carry in (True, False):
        cell.zero_grad()
        out = moments_of_steps(cell, x, h, carry=carry)
        (out.mean.sum() + out.var.square().sum()).backward()
        found.append([out.mean, out.var, *(p.grad.clone() for p in cell.parameters())])
    for ours, each in zip(*found, strict=True):
        torch.testing.assert_close(ours, each)


def test_a_cell_follows_its_weights_and_its_input():
    """A weight written between two steps, another input, a first step without gradients."""
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4)
    x, other, h = (rvconvert.RandomVariable(torch.randn(2, n), torch.rand(2, n)) for n in (3, 3, 4))
    with torch.no_grad():
        h = cell(x, h)
    out = cell(x, h)
    out.mean.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cell.parameters())
    assert cell(other, out).carried is out.carried is not h.carried
    fresh = h.with_moments(h.mean, h.var)
    torch.testing.assert_close(cell(other, out).var, cell(other, out.with_moments(out.mean, out.var)).var)
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    torch.testing.assert_close(cell(x, h).var, cell(x, fresh).var)
    assert not torch.equal(cell(x, h).var, out.var)


@named("kind", [nn.GRUCell, nn.LSTMCell])
def test_a_cell_s_steps_may_be_made_again_for_the_gradients(kind):
    torch.manual_seed(0)
    cell, x, h = kind(3, 4), rvconvert.RandomVariable(*torch.rand(2, 5, 3)), torch.rand(2, 5, 4)
    h = rvconvert.RandomVariable(*h)

    def steps():
        state = cell(x, (h, h) if kind is nn.LSTMCell else h)
        state = cell(x, state)
        state = state[0] if kind is nn.LSTMCell else state
        return state.mean.square().sum() + state.var.sum()

    expected, found = (
        torch.autograd.grad(loss, tuple(cell.parameters()))
        for loss in (steps(), torch.utils.checkpoint.checkpoint(steps, use_reentrant=False))
    )
    torch.testing.assert_close(found, expected)
