"""Recurrent cells and layers: a step is written on means and variances, and a layer is a loop over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert import moments as gaussian
from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Composite, Shape, add_rule, full_precision


class Pair(NamedTuple):
    """Mean and variance of equal shape."""

    mean: Tensor
    var: Tensor


State = tuple[Pair, ...]
Hidden = Callable[[Pair], Pair]  # the map from the hidden state to the gates


# ---- one step: (gates of the input, state, map of the hidden state) -> state; its first is the output ---------------


def _sum(a: Pair, b: Pair) -> Pair:
    return Pair(a.mean + b.mean, a.var + b.var)


def _product(a: Pair, b: Pair) -> Pair:
    var = torch.addcmul(a.mean.square() * b.var, a.var, torch.addcmul(b.var, b.mean, b.mean))
    return Pair(a.mean * b.mean, var)


def _between(a: Pair, b: Pair, w: Pair) -> Pair:
    """a + w (b - a)."""
    apart, rest = b.mean - a.mean, 1 - w.mean
    var = torch.addcmul(w.mean.square() * b.var, rest.square(), a.var)
    return Pair(torch.addcmul(a.mean, w.mean, apart), torch.addcmul(var, w.var, torch.addcmul(a.var + b.var, apart, apart)))


def _chunks(x: Pair, count: int) -> list[Pair]:
    return [Pair(*each) for each in zip(x.mean.chunk(count, -1), x.var.chunk(count, -1), strict=True)]


def _lstm_step(gates: Pair, state: State, hidden: Hidden) -> State:
    h, c = state
    i, f, half, o = _chunks(Pair(*gaussian.sigmoid(*_sum(gates, hidden(h)))), 4)
    g = Pair(2 * half.mean - 1, 4 * half.var)  # tanh x = 2 sigmoid(2x) - 1: the weights of this gate are doubled
    c = _sum(_product(f, c), _product(i, g))
    return _product(o, Pair(*gaussian.tanh(*c))), c


def _gru_step(gates: Pair, state: State, hidden: Hidden) -> State:
    (h,) = state
    of_h, width = hidden(h), h.mean.shape[-1]
    both = _sum(*(Pair(x.mean[..., : 2 * width], x.var[..., : 2 * width]) for x in (gates, of_h)))
    r, z = _chunks(Pair(*gaussian.sigmoid(*both)), 2)
    n_x, n_h = (Pair(x.mean[..., 2 * width :], x.var[..., 2 * width :]) for x in (gates, of_h))
    n = Pair(*gaussian.tanh(*_sum(n_x, _product(r, n_h))))
    return (_between(n, h, z),)


def _tanh_step(gates: Pair, state: State, hidden: Hidden) -> State:
    return (Pair(*gaussian.tanh(*_sum(gates, hidden(state[0])))),)


def _relu_step(gates: Pair, state: State, hidden: Hidden) -> State:
    return (Pair(*gaussian.relu(*_sum(gates, hidden(state[0])))),)


class Step(NamedTuple):
    """One step of a cell, and what the rows of weights of each of its gates are multiplied by."""

    run: Callable[[Pair, State, Hidden], State]
    scales: tuple[float, ...] | None = None


_STEPS = {
    "lstm": Step(_lstm_step, (1.0, 1.0, 2.0, 1.0)),
    "gru": Step(_gru_step),
    "rnn_tanh": Step(_tanh_step),
    "rnn_relu": Step(_relu_step),
}


def _map(step: Step, weight: Tensor, bias: Tensor | None) -> Hidden:
    """The linear map to a cell's gates, its weights squared once."""
    if step.scales is not None:
        scale = weight.new_tensor(step.scales).repeat_interleave(len(weight) // len(step.scales))
        weight, bias = weight * scale[:, None], None if bias is None else bias * scale
    squared = weight.square()
    return lambda x: Pair(F.linear(x.mean, weight, bias), F.linear(x.var, squared))


def _pair(x: Any, dtype: torch.dtype) -> Pair:
    if isinstance(x, RandomVariable):
        return Pair(x.mean.to(dtype), x.var.to(dtype))
    return Pair(x.to(dtype), torch.zeros_like(x, dtype=dtype))


def _cell(step: Step) -> Callable[..., Any]:
    def cell(input: Any, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        like = random_variables(input, hx)[0]
        with full_precision(like):
            state = tuple(_pair(h, w_hh.dtype) for h in (hx if isinstance(hx, (list, tuple)) else (hx,)))
            state = step.run(_map(step, w_ih, b_ih)(_pair(input, w_ih.dtype)), state, _map(step, w_hh, b_hh))
        found = [like.with_moments(*each) for each in state]
        return tuple(found) if len(found) > 1 else found[0]

    return cell


# ---- layers ------------------------------------------------------------------------------------------------------


def _rows(x: Pair, start: int | None, end: int | None) -> Pair:
    return Pair(x.mean[start:end], x.var[start:end])


def _stacked(pairs: Sequence[Pair], join: Callable[..., Tensor] = torch.cat, dim: int = 0) -> Pair:
    mean, var = (join(each, dim) for each in zip(*pairs, strict=True))
    return Pair(mean, var)


def _direction(step: Step, x: Pair, sizes: list[int], start: State, weights: list[Tensor], reverse: bool) -> tuple[Pair, State]:
    """One layer in one direction, on the rows of all times, one after the other; ``sizes`` of them never grow.

    A packed sequence, longest first, has ever fewer of them.
    """
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
    project = _map(Step(step.run), rest[-1], None) if len(rest) % 2 else None
    hidden, gates = _map(step, w_hh, b_hh), _map(step, w_ih, b_ih)(x)
    inputs = [Pair(*each) for each in zip(gates.mean.split(sizes), gates.var.split(sizes), strict=True)]
    outputs, ended = [], []
    state = tuple(_rows(s, None, sizes[-1 if reverse else 0]) for s in start)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        have = len(state[0].mean)
        if sizes[t] < have:
            ended.append(tuple(_rows(s, sizes[t], None) for s in state))
            state = tuple(_rows(s, None, sizes[t]) for s in state)
        elif sizes[t] > have:
            state = tuple(_stacked((s, _rows(each, have, sizes[t]))) for s, each in zip(state, start, strict=True))
        state = step.run(inputs[t], state, hidden)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outputs.append(state[0])
    for each in reversed(ended):
        state = tuple(_stacked(pair) for pair in zip(state, each, strict=True))
    return _stacked(outputs[::-1] if reverse else outputs), state


def _layer(step: Step) -> Callable[..., Any]:
    """The signatures of ``torch._VF.lstm`` and its kin: (input, hx, params, ...) or, packed, (data, batch_sizes, hx, ...)."""

    def run(input: Any, *args: Any) -> Any:
        packed = isinstance(args[2], (list, tuple))
        hx, params, *options = args[1:] if packed else args
        hx = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        _, layers, dropout, train, both, *batch_first = options  # the first: has_biases
        like, dtype, directions = random_variables(input, hx)[0], params[0].dtype, 2 if both else 1
        per_layer = len(params) // (layers * directions)
        time = 1 if batch_first and batch_first[0] else 0
        x = input if packed else input.transpose(0, time)
        sizes = args[0].tolist() if packed else [x.shape[1]] * len(x)
        x = x if packed else x.flatten(0, 1)
        ends: list[State] = []
        for layer in range(layers):
            if layer and train and dropout > 0:
                x = F.dropout(x, dropout, True)
            found = []
            with full_precision(like):
                for index in range(layer * directions, (layer + 1) * directions):
                    state = tuple(_pair(h[index], dtype) for h in hx)
                    weights = list(params[index * per_layer : (index + 1) * per_layer])
                    output, end = _direction(step, _pair(x, dtype), sizes, state, weights, index % directions == 1)
                    found.append(output)
                    ends.append(end)
                x = like.with_moments(*_stacked(found, torch.cat, -1))
        last = (like.with_moments(*_stacked(each, torch.stack)) for each in zip(*ends, strict=True))
        return (x if packed else x.unflatten(0, (len(sizes), -1)).transpose(0, time), *last)

    return run


_GATES = "gates, states and inputs are independent of each other within a step and over time"
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {"lstm": (nn.LSTM,), "gru": (nn.GRU,), "rnn_tanh": (nn.RNN,)}
_CELLS: dict[str, tuple[type[nn.Module], ...]] = {"lstm": (nn.LSTMCell,), "gru": (nn.GRUCell,), "rnn_tanh": (nn.RNNCell,)}
for _name, _step in _STEPS.items():
    add_rule(_name, Composite(_layer(_step)), Exactness.APPROXIMATE, _GATES, modules=_MODULES.get(_name, ()))
    add_rule(f"{_name}_cell", Composite(_cell(_step)), Exactness.APPROXIMATE, _GATES, modules=_CELLS.get(_name, ()))

add_rule("_pack_padded_sequence", Shape(), Exactness.EXACT, functions=(torch._VF._pack_padded_sequence,))
add_rule("_pad_packed_sequence", Shape(("data",), ("data",)), Exactness.EXACT, functions=(torch._VF._pad_packed_sequence,))
