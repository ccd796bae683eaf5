"""Recurrent cells and layers: loops over steps on means and variances."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import Exactness
from rvconvert.moments.compilation import is_traced
from rvconvert.rules.calls import full_precision
from rvconvert.rules.kinds import Composite, Shape, add_rule
from rvconvert.rules.recurrent_steps import STEPS, Pair, State, Step, joined, linear, once, unrolled

Linear = Callable[[Pair], Pair]


# ---- cells -------------------------------------------------------------------------------------------------------


def _scaled(step: Step, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weights and bias of a linear map to a cell's gates."""
    if step.scales is None:
        return weight, bias
    scale = weight.new_tensor(step.scales).repeat_interleave(len(weight) // len(step.scales))
    return weight * scale[:, None], None if bias is None else bias * scale


def _pair(x: Any, dtype: torch.dtype) -> Pair:
    if isinstance(x, RandomVariable):
        return Pair(x.mean.to(dtype), x.var.to(dtype))
    return Pair(x.to(dtype), torch.zeros_like(x, dtype=dtype))


class _Maps:
    """A cell's maps of its input and of its hidden state: the state that a step returns carries them to the next step.

    So in a loop weights are squared, and an input that stays the same is mapped, once.
    """

    def __init__(self, step: Step, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> None:
        self.weights, self.dtype = (w_ih, w_hh, b_ih, b_hh), w_ih.dtype
        self.when = _now(self.weights)
        self.of_input, self.of_hidden = linear(*_scaled(step, w_ih, b_ih)), linear(*_scaled(step, w_hh, b_hh))
        self.last: tuple[Any, Pair] | None = None  # an input's key and its gates

    def serve(self, weights: tuple[Tensor | None, ...]) -> bool:
        """True for the same weights, if nothing was written into them."""
        return not is_traced() and all(map(operator.is_, self.weights, weights)) and self.when == _now(weights)

    def gates(self, input: Any) -> Pair:
        """Of the cell's input."""
        key = input.key if isinstance(input, RandomVariable) else None
        if self.last is None or key is None or key != self.last[0]:
            self.last = key, self.of_input(_pair(input, self.dtype))
        return self.last[1]


def _now(weights: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Another value once something is written into a weight, and where gradients are kept or no longer kept."""
    return torch.is_grad_enabled(), *(0 if w is None or w.is_inference() else w._version for w in weights)


def _cell(step: Step) -> Callable[..., Any]:
    def cell(input: Any, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
        like, before = random_variables(input, hx)[0], hx if isinstance(hx, (list, tuple)) else (hx,)
        weights = w_ih, w_hh, b_ih, b_hh
        with full_precision(like):
            maps = before[0].carried if isinstance(before[0], RandomVariable) else None
            if not (isinstance(maps, _Maps) and maps.serve(weights)):
                maps = _Maps(step, *weights)
            state = tuple(_pair(h, w_hh.dtype) for h in before)
            state = once(step, maps.gates(input), maps.of_hidden(state[0]), state)
        hidden, *rest = (like.with_moments(*each) for each in state)
        return (hidden.carrying(maps), *rest) if rest else hidden.carrying(maps)

    return cell


# ---- layers ------------------------------------------------------------------------------------------------------


def _rows(x: Pair, start: int | None, end: int | None) -> Pair:
    return Pair(x.mean[start:end], x.var[start:end])


def _direction(step: Step, x: Pair, sizes: list[int], start: State, weights: list[Tensor], reverse: bool) -> tuple[Pair, State]:
    """One layer in one direction, on the rows of all times, one after the other; ``sizes`` of them never grow.

    A packed sequence, longest first, has ever fewer of them.
    """
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if len(rest) > 1 else (None, None)
    gates = linear(*_scaled(step, w_ih, b_ih))(x)
    if len(rest) % 2 or sizes[0] != sizes[-1]:
        project = linear(rest[-1], None) if len(rest) % 2 else None
        return _ragged(step, gates, sizes, start, linear(*_scaled(step, w_hh, b_hh)), project, reverse)
    gates = Pair(*(each.unflatten(0, (len(sizes), -1)) for each in gates))
    if reverse:
        gates = Pair(*(each.flip(0) for each in gates))
    outputs, end = unrolled(step, gates, *_scaled(step, w_hh, b_hh), start)
    return Pair(*((each.flip(0) if reverse else each).flatten(0, 1) for each in outputs)), end


def _ragged(
    step: Step, gates: Pair, sizes: list[int], start: State, hidden: Linear, project: Linear | None, reverse: bool
) -> tuple[Pair, State]:
    """Where sequences end one after the other, or the hidden state is projected."""
    inputs = [Pair(*each) for each in zip(gates.mean.split(sizes), gates.var.split(sizes), strict=True)]
    outputs, ended = [], []
    state = tuple(_rows(s, None, sizes[-1 if reverse else 0]) for s in start)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        have = len(state[0].mean)
        if sizes[t] < have:
            ended.append(tuple(_rows(s, sizes[t], None) for s in state))
            state = tuple(_rows(s, None, sizes[t]) for s in state)
        elif sizes[t] > have:
            state = tuple(joined((s, _rows(each, have, sizes[t]))) for s, each in zip(state, start, strict=True))
        state = once(step, inputs[t], hidden(state[0]), state)
        if project is not None:
            state = (project(state[0]), *state[1:])
        outputs.append(state[0])
    for each in reversed(ended):
        state = tuple(joined(pair) for pair in zip(state, each, strict=True))
    return joined(outputs[::-1] if reverse else outputs), state


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
                x = like.with_moments(*joined(found, torch.cat, -1))
        last = (like.with_moments(*joined(each, torch.stack)) for each in zip(*ends, strict=True))
        return (x if packed else x.unflatten(0, (len(sizes), -1)).transpose(0, time), *last)

    return run


_GATES = "gates, states and inputs are independent of each other within a step and over time"
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {"lstm": (nn.LSTM,), "gru": (nn.GRU,), "rnn_tanh": (nn.RNN,)}
_CELLS: dict[str, tuple[type[nn.Module], ...]] = {"lstm": (nn.LSTMCell,), "gru": (nn.GRUCell,), "rnn_tanh": (nn.RNNCell,)}
for _name, _step in STEPS.items():
    add_rule(_name, Composite(_layer(_step)), Exactness.APPROXIMATE, _GATES, modules=_MODULES.get(_name, ()))
    add_rule(f"{_name}_cell", Composite(_cell(_step)), Exactness.APPROXIMATE, _GATES, modules=_CELLS.get(_name, ()))

add_rule("_pack_padded_sequence", Shape(), Exactness.EXACT, functions=(torch._VF._pack_padded_sequence,))
add_rule("_pad_packed_sequence", Shape(("data",), ("data",)), Exactness.EXACT, functions=(torch._VF._pad_packed_sequence,))
