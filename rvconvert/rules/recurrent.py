"""Recurrent cells and layers, written out in operations that have rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rvconvert.core.registry import Exactness
from rvconvert.rules.kinds import Composite, Shape, add_rule

State = tuple[Any, ...]
Step = Callable[[Any, State, Any, Any, Any, Any], State]


# ---- one step: (x, state, w_ih, w_hh, b_ih, b_hh) -> state; the first of the state is the output ------------------


def _lstm_step(x: Any, state: State, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> State:
    h, c = state
    i, f, g, o = torch.chunk(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh), 4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_step(x: Any, state: State, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> State:
    (h,) = state
    (r_x, z_x, n_x), (r_h, z_h, n_h) = (
        torch.chunk(each, 3, -1) for each in (F.linear(x, w_ih, b_ih), F.linear(h, w_hh, b_hh))
    )
    n = torch.tanh(n_x + torch.sigmoid(r_x + r_h) * n_h)
    return (torch.lerp(n, h, torch.sigmoid(z_x + z_h)),)


def _plain_step(activation: Callable[..., Any]) -> Step:
    def step(x: Any, state: State, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> State:
        return (activation(F.linear(x, w_ih, b_ih) + F.linear(state[0], w_hh, b_hh)),)

    return step


_STEPS: dict[str, Step] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": _plain_step(torch.tanh),
    "rnn_relu": _plain_step(torch.relu),
}


def _cell(step: Step) -> Callable[..., Any]:
    def cell(input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None) -> Any:
        state = step(input, tuple(hx) if isinstance(hx, (list, tuple)) else (hx,), w_ih, w_hh, b_ih, b_hh)
        return state if len(state) > 1 else state[0]

    return cell


# ---- layers ------------------------------------------------------------------------------------------------------


def _direction(step: Step, inputs: list[Any], state: State, weights: list[Any], reverse: bool) -> tuple[list[Any], State]:
    """One layer in one direction. Inputs may have ever fewer rows (a packed sequence, longest first)."""
    w_ih, w_hh, *rest = weights
    biases = rest[:2] if len(rest) > 1 else [None, None]
    projection = rest[-1] if len(rest) % 2 else None
    rows = [x.shape[0] for x in inputs]
    start, outputs, ended = state, [], []
    state = tuple(s[: rows[-1 if reverse else 0]] for s in start)
    for t in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        have = state[0].shape[0]
        if rows[t] < have:
            ended.append(tuple(s[rows[t] :] for s in state))
            state = tuple(s[: rows[t]] for s in state)
        elif rows[t] > have:
            state = tuple(torch.cat((s, each[have : rows[t]])) for s, each in zip(state, start, strict=True))
        state = step(inputs[t], state, w_ih, w_hh, *biases)
        if projection is not None:
            state = (F.linear(state[0], projection), *state[1:])
        outputs.append(state[0])
    for each in reversed(ended):
        state = tuple(torch.cat(pair) for pair in zip(state, each, strict=True))
    return (outputs[::-1] if reverse else outputs), state


def _layers(
    step: Step, inputs: list[Any], hx: State, params: Any, layers: int, dropout: float, train: bool, both: bool
) -> tuple[list[Any], State]:
    directions = 2 if both else 1
    per_layer = len(params) // (layers * directions)
    ends: list[State] = []
    for layer in range(layers):
        if layer and train and dropout > 0:
            inputs = [F.dropout(x, dropout, True) for x in inputs]
        results = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = list(params[index * per_layer : (index + 1) * per_layer])
            outputs, end = _direction(step, inputs, tuple(h[index] for h in hx), weights, bool(direction))
            results.append(outputs)
            ends.append(end)
        inputs = results[0] if directions == 1 else [torch.cat(pair, -1) for pair in zip(*results, strict=True)]
    return inputs, tuple(torch.stack(each) for each in zip(*ends, strict=True))


def _layer(step: Step) -> Callable[..., Any]:
    """The signatures of ``torch._VF.lstm`` and its kin: (input, hx, params, ...) or, packed, (data, batch_sizes, hx, ...)."""

    def run(input: Any, *args: Any) -> Any:
        packed = isinstance(args[2], (list, tuple))
        hx, params, *options = args[1:] if packed else args
        state = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
        _, layers, dropout, train, both, *batch_first = options  # the first: has_biases
        time = 1 if batch_first and batch_first[0] else 0
        inputs = list(torch.split(input, args[0].tolist()) if packed else torch.unbind(input, time))
        outputs, end = _layers(step, inputs, state, params, layers, dropout, train, both)
        return (torch.cat(outputs) if packed else torch.stack(outputs, time), *end)

    return run


_GATES = "gates, states and inputs are independent of each other within a step and over time"
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {"lstm": (nn.LSTM,), "gru": (nn.GRU,), "rnn_tanh": (nn.RNN,)}
_CELLS: dict[str, tuple[type[nn.Module], ...]] = {"lstm": (nn.LSTMCell,), "gru": (nn.GRUCell,), "rnn_tanh": (nn.RNNCell,)}
for _name, _step in _STEPS.items():
    add_rule(_name, Composite(_layer(_step)), Exactness.APPROXIMATE, _GATES, modules=_MODULES.get(_name, ()))
    add_rule(f"{_name}_cell", Composite(_cell(_step)), Exactness.APPROXIMATE, _GATES, modules=_CELLS.get(_name, ()))

add_rule("_pack_padded_sequence", Shape(), Exactness.EXACT, functions=(torch._VF._pack_padded_sequence,))
add_rule("_pad_packed_sequence", Shape(("data",), ("data",)), Exactness.EXACT, functions=(torch._VF._pad_packed_sequence,))
