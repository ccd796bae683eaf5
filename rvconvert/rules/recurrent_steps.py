"""Steps of recurrent cells on means and variances, and the loop over them with a backward pass of its own.

Autograd takes some hundred small operations a step backward. Here the partial derivatives of all steps' activations are read at
once, and the gradient of the weights is one product over all times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert import moments as gaussian
from rvconvert.moments.compilation import is_traced
from rvconvert.moments.normal import gradients_with_graph
from rvconvert.moments.smooth import sigmoid_partials, tanh_partials
from rvconvert.moments.table import Partials

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Pair(NamedTuple):
    """Mean and variance of equal shape, or the gradients of both."""

    mean: Tensor
    var: Tensor


State = tuple[Pair, ...]
Backward = tuple[Pair, Pair, tuple["Pair | None", ...]]


class Step(NamedTuple):
    """One step of a cell.

    Attributes:
        forward: (gates of the input, gates of the hidden state, state) -> (state, saved). The output is the first of the state;
            saved are what the sigmoids and what the tanh took, what they gave, then what else ``backward`` asks for. What they
            gave, if it is known, may follow the state.
        backward: (saved, partial derivatives of the sigmoids and of the tanh, gradients of the state) -> gradients of the
            input's gates, of the hidden state's, and of the state before, None for one that acts through its gates alone.
        scales: what the rows of weights of each gate are multiplied by.
    """

    forward: Callable[..., tuple[State, State]]
    backward: Callable[[State, Sequence[Partials], State], Backward] | None = None
    scales: tuple[float, ...] | None = None


# ---- algebra -----------------------------------------------------------------------------------------------------


def _sum(a: Pair, b: Pair) -> Pair:
    return Pair(a.mean + b.mean, a.var + b.var)


def _product(a: Pair, b: Pair) -> Pair:
    var = torch.addcmul(a.mean.square() * b.var, a.var, torch.addcmul(b.var, b.mean, b.mean))
    return Pair(a.mean * b.mean, var)


def _factor_backward(a: Pair, b: Pair, grad: Pair) -> Pair:
    """The gradient of ``a`` in their product."""
    by_mean = torch.addcmul(grad.mean * b.mean, grad.var, a.mean * b.var, value=2)
    return Pair(by_mean, grad.var * torch.addcmul(b.var, b.mean, b.mean))


def _between(a: Pair, b: Pair, w: Pair) -> Pair:
    """a + w (b - a)."""
    apart, rest = b.mean - a.mean, 1 - w.mean
    var = torch.addcmul(w.mean.square() * b.var, rest.square(), a.var)
    return Pair(torch.addcmul(a.mean, w.mean, apart), torch.addcmul(var, w.var, torch.addcmul(a.var + b.var, apart, apart)))


def _between_backward(a: Pair, b: Pair, w: Pair, grad: Pair) -> tuple[Pair, Pair, Pair]:
    apart, rest = b.mean - a.mean, 1 - w.mean
    swing = 2 * grad.var * w.var * apart
    by_weight = torch.addcmul(grad.mean * apart, grad.var, torch.addcmul(w.mean * b.var, rest, a.var, value=-1), value=2)
    return (
        Pair(grad.mean * rest - swing, grad.var * torch.addcmul(w.var, rest, rest)),
        Pair(torch.addcmul(swing, grad.mean, w.mean), grad.var * torch.addcmul(w.var, w.mean, w.mean)),
        Pair(by_weight, grad.var * torch.addcmul(a.var + b.var, apart, apart)),
    )


def _chunks(x: Pair, count: int) -> list[Pair]:
    """``count`` equal parts along the last dimension."""
    return [Pair(*each) for each in zip(x.mean.chunk(count, -1), x.var.chunk(count, -1), strict=True)]


def joined(pairs: Sequence[Pair], join: Callable[..., Tensor] = torch.cat, dim: int = 0) -> Pair:
    """Means with means, variances with variances."""
    mean, var = (join(each, dim) for each in zip(*pairs, strict=True))
    return Pair(mean, var)


# ---- cells -------------------------------------------------------------------------------------------------------


def _affine(half: Pair) -> Pair:
    """tanh x = 2 sigmoid(2x) - 1: the weights of this gate are doubled."""
    return Pair(2 * half.mean - 1, 4 * half.var)


def _lstm(gates: Pair, of_h: Pair, state: State, opened: Pair | None = None, shown: Pair | None = None) -> tuple[State, State]:
    c = state[1]
    took = _sum(gates, of_h)
    opened = opened or Pair(*gaussian.sigmoid(*took))
    i, f, half, o = _chunks(opened, 4)
    new = _sum(_product(f, c), _product(i, _affine(half)))
    shown = shown or Pair(*gaussian.tanh(*new))
    return (_product(o, shown), new), (took, new, opened, shown, c)


def _lstm_backward(saved: State, partials: Sequence[Partials], grads: State) -> Backward:
    _, _, opened, shown, c = saved
    i, f, half, o = _chunks(opened, 4)
    g = _affine(half)
    of_sigmoid, of_tanh = partials
    by_new = _sum(grads[1], Pair(*of_tanh.gradients(*_factor_backward(shown, o, grads[0]))))
    by_g = _factor_backward(g, i, by_new)
    by_half, by_o = Pair(2 * by_g.mean, 4 * by_g.var), _factor_backward(o, shown, grads[0])
    by_opened = joined([_factor_backward(i, g, by_new), _factor_backward(f, c, by_new), by_half, by_o], dim=-1)
    by_gates = Pair(*of_sigmoid.gradients(*by_opened))
    return by_gates, by_gates, (None, _factor_backward(c, f, by_new))


def _gru(gates: Pair, of_h: Pair, state: State, opened: Pair | None = None, n: Pair | None = None) -> tuple[State, State]:
    (h,) = state
    width = h.mean.shape[-1]
    both = _sum(*(Pair(x.mean[..., : 2 * width], x.var[..., : 2 * width]) for x in (gates, of_h)))
    opened = opened or Pair(*gaussian.sigmoid(*both))
    r, z = _chunks(opened, 2)
    n_x, n_h = (Pair(x.mean[..., 2 * width :], x.var[..., 2 * width :]) for x in (gates, of_h))
    took = _sum(n_x, _product(r, n_h))
    n = n or Pair(*gaussian.tanh(*took))
    return (_between(n, h, z),), (both, took, opened, n, n_h, h)


def _gru_backward(saved: State, partials: Sequence[Partials], grads: State) -> Backward:
    _, _, opened, n, n_h, h = saved
    r, z = _chunks(opened, 2)
    of_sigmoid, of_tanh = partials
    by_n, by_h, by_z = _between_backward(n, h, z, grads[0])
    by_took = Pair(*of_tanh.gradients(*by_n))
    by_opened = joined([_factor_backward(r, n_h, by_took), by_z], dim=-1)
    by_both = Pair(*of_sigmoid.gradients(*by_opened))
    of_h = joined([by_both, _factor_backward(n_h, r, by_took)], dim=-1)
    return joined([by_both, by_took], dim=-1), of_h, (by_h,)


def _tanh(gates: Pair, of_h: Pair, state: State) -> tuple[State, State]:
    return (Pair(*gaussian.tanh(*_sum(gates, of_h))),), ()


def _relu(gates: Pair, of_h: Pair, state: State) -> tuple[State, State]:
    return (Pair(*gaussian.relu(*_sum(gates, of_h))),), ()


STEPS = {
    "lstm": Step(_lstm, _lstm_backward, (1.0, 1.0, 2.0, 1.0)),
    "gru": Step(_gru, _gru_backward),
    "rnn_tanh": Step(_tanh),
    "rnn_relu": Step(_relu),
}


# ---- the loop ----------------------------------------------------------------------------------------------------


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Pair], Pair]:
    """A linear map, its weights squared once."""
    squared = weight.square()
    return lambda x: Pair(F.linear(x.mean, weight, bias), F.linear(x.var, squared))


def unrolled(step: Step, gates: Pair, weight: Tensor, bias: Tensor | None, state: State) -> tuple[Pair, State]:
    """All steps of a cell, one after the other.

    Args:
        step: of the cell.
        gates: (times, batch, gates) of the inputs.
        weight, bias: from the hidden state to its gates.
        state: before the first step.

    Returns:
        The outputs, (times, batch, width), and the state after the last step.
    """
    if step.backward is None or gates.mean.dtype != torch.float32 or is_traced():
        outputs, states = _run(step, gates, weight, bias, state)
        return outputs, states[-1]
    mean, var, *ends = _Unrolled.apply(step, *gates, weight, bias, *_flat(state))
    return Pair(mean, var), _pairs(ends)


def once(step: Step, gates: Pair, of_h: Pair, state: State) -> State:
    """The state after one step of a cell, of the gates of its input and of its hidden state."""
    if step.backward is None or not torch.is_grad_enabled() or gates.mean.dtype != torch.float32 or is_traced():
        return step.forward(gates, of_h, state)[0]
    return _pairs(_Once.apply(step, *gates, *of_h, *_flat(state)))


def _flat(state: Sequence[Pair]) -> list[Tensor]:
    """The means and variances of a state, one after the other."""
    return [x for pair in state for x in pair]


def _pairs(flat: Sequence[Tensor]) -> State:
    return tuple(Pair(*each) for each in zip(flat[::2], flat[1::2], strict=True))


def _run(step: Step, gates: Pair, weight: Tensor, bias: Tensor | None, state: State) -> tuple[Pair, list[State]]:
    """Outputs, and the states from before the first step to after the last."""
    hidden, states = linear(weight, bias), [state]
    for mean, var in zip(*gates, strict=True):
        states.append(step.forward(Pair(mean, var), hidden(states[-1][0]), states[-1])[0])
    return joined([state[0] for state in states[1:]], torch.stack), states


class _Once(torch.autograd.Function):
    """A step with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, step: Step, *given: Tensor) -> Any:
        gates, of_h, *state = _pairs(given)
        after, saved = step.forward(gates, of_h, tuple(state))
        ctx.step, ctx.given = step, len(given)
        ctx.save_for_backward(*given, *_flat(saved[2:4]))
        return tuple(_flat(after))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        step, saved = ctx.step, ctx.saved_tensors
        given, gave = saved[: ctx.given], _pairs(saved[ctx.given :])
        gates, of_h, *state = _pairs(given)
        if torch.is_grad_enabled():  # for a graph of the backward pass (create_graph=True)

            def composed(*given: Tensor) -> list[Tensor]:
                gates, of_h, *state = _pairs(given)
                return _flat(step.forward(gates, of_h, tuple(state))[0])

            return None, *gradients_with_graph(composed, given, grads)
        _, pairs = step.forward(gates, of_h, tuple(state), *gave)
        partials = [read(*took) for read, took in zip((sigmoid_partials, tanh_partials), pairs, strict=False)]
        of_x, by_h, before = step.backward(pairs, partials, _pairs(grads))
        by_state = (x for pair in before for x in ((None, None) if pair is None else pair))
        return None, *of_x, *by_h, *by_state


class _Unrolled(torch.autograd.Function):
    """``_run`` with a backward pass of its own; saves the gates of the inputs and the states: what is between is made again."""

    @staticmethod
    def forward(ctx: Any, step: Step, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, *state: Tensor) -> Any:
        outputs, states = _run(step, Pair(mean, var), weight, bias, _pairs(state))
        others = [x for each in zip(*(state[1:] for state in states[:-1]), strict=True) for x in joined(each, torch.stack)]
        ctx.step, ctx.states = step, len(state)
        ctx.save_for_backward(mean, var, weight, bias, *state, *outputs, *others)
        return *outputs, *(x.clone() for x in _flat(states[-1]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        step, (mean, var, weight, bias, *rest) = ctx.step, ctx.saved_tensors
        start, (outputs, *others) = _pairs(rest[: ctx.states]), _pairs(rest[ctx.states :])
        if torch.is_grad_enabled():  # for a graph of the backward pass (create_graph=True)

            def composed(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor | None, *start: Tensor) -> list[Tensor]:
                again, states = _run(step, Pair(mean, var), weight, bias, _pairs(start))
                return [*again, *_flat(states[-1])]

            return None, *gradients_with_graph(composed, (mean, var, weight, bias, *rest[: ctx.states]), grads)
        before = Pair(*(torch.cat((h[None], x[:-1])) for h, x in zip(start[0], outputs, strict=True)))
        _, saved = step.forward(Pair(mean, var), linear(weight, bias)(before), (before, *others))  # of all steps at once
        of_sigmoid, of_tanh = (
            list(map(Partials, *(x.unbind() for x in read(*took))))
            for read, took in zip((sigmoid_partials, tanh_partials), saved, strict=False)
        )
        kept = list(zip(*(map(Pair, x.mean.unbind(), x.var.unbind()) for x in saved), strict=True))
        squared, by_x, by_h = weight.square(), [], []
        state, by_outputs = _pairs(grads[2:]), list(map(Pair, grads[0].unbind(), grads[1].unbind()))
        for t in reversed(range(len(mean))):
            state = (_sum(state[0], by_outputs[t]), *state[1:])
            of_x, of_h, earlier = step.backward(kept[t], (of_sigmoid[t], of_tanh[t]), state)
            through = Pair(of_h.mean @ weight, of_h.var @ squared)
            state = (through if earlier[0] is None else _sum(earlier[0], through), *earlier[1:])
            by_x.append(of_x)
            by_h.append(of_h)
        by_gates, by_hidden = joined(by_x[::-1], torch.stack), joined(by_h[::-1])
        hidden = Pair(*(x.flatten(0, 1) for x in before))
        by_weight = torch.addcmul(by_hidden.mean.t() @ hidden.mean, weight, by_hidden.var.t() @ hidden.var, value=2)
        by_bias = None if bias is None else by_hidden.mean.sum(0)
        return None, *by_gates, by_weight, by_bias, *_flat(state)
