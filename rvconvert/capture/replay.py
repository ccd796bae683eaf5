"""Does a recorded graph stand for its method? It is run beside the model, on the same inputs and on others."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.capture.module_state import unchanged
from rvconvert.capture.numpy_draws import drawn_by_torch
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.tree import Structure, flatten

if TYPE_CHECKING:
    from rvconvert.capture.recording import Recording

__all__ = ["each_mode", "replay_differs"]

Run = Callable[..., tuple[Any, ...]]


def each_mode(model: nn.Module) -> Iterator[bool]:
    """The model's present mode (False), then train for eval or eval for train (True); in the end it is as it was."""
    modes = {module: module.training for module in model.modules()}
    yield False
    try:
        nn.Module.train(model, not model.training)  # not the model's own train(), which may be something else
        yield True
    finally:
        for module, training in modes.items():
            module.training = training


def plain_leaves(args: Any, kwargs: Any) -> tuple[list[torch.Tensor], Structure]:
    """The tensors of a call, the mean in the place of a random variable."""
    leaves, structure = flatten((args, kwargs))
    return [x.mean if isinstance(x, RandomVariable) else x for x in leaves], structure


def other_values(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Other inputs like these, still between 0 and 1 if these are."""
    return [x * 0.9 + 0.05 if x.is_floating_point() and x.layout == torch.strided else x for x in leaves]


def _differing(recorded: Structure, returned: Structure) -> Iterator[tuple[Any, Any]]:
    """Numbers and texts among the outputs that the graph does not make, and that another run has made otherwise."""
    if recorded.kind == returned.kind == "constant":
        kinds = {type(recorded.template), type(returned.template)}
        if kinds <= {bool, int, float, str} and repr(recorded.template) != repr(returned.template):
            yield recorded.template, returned.template
    for own, other in zip(recorded.parts, returned.parts, strict=False):
        yield from _differing(own, other)


def replay_differs(run: Run, recording: Recording, model: nn.Module, method: Any, args: Any, kwargs: Any) -> str | None:
    """Run the plain graph beside the model on other inputs, another seed and another batch size.

    Returns what is different, or None. Where only the other batch size is at fault, it is marked as fixed.
    """
    leaves, structure = plain_leaves(args, kwargs)
    other = other_values(leaves)

    returned: list[Structure] = []

    def results(call: Callable[..., Any], inputs: list[torch.Tensor]) -> list[Any]:
        with unchanged(model, recording.written), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that only this run has
            torch.manual_seed(1)
            return [x for x in call(*(x.clone() for x in inputs)) if isinstance(x, torch.Tensor)]

    def eager(*inputs: torch.Tensor) -> list[Any]:
        a, k = structure.build(iter(inputs))
        with drawn_by_torch():
            found, outputs = flatten(method(*a, **k), lambda x: isinstance(x, torch.Tensor))
        returned[:] = [outputs]
        return found

    def replayed(*inputs: torch.Tensor) -> tuple[Any, ...]:
        outputs = run(model, *inputs, *recording.numbers.values())
        return outputs[: len(outputs) - recording.kept_leaves]

    def compare(inputs: list[torch.Tensor]) -> str | None:
        expected = results(eager, inputs)
        try:
            found = results(replayed, inputs)
        except Exception as error:  # noqa: BLE001 (a model's own code may fail in any way)
            return f"{type(error).__name__}: {error}"
        for a, b in zip(expected, found, strict=False):
            if a.dtype != b.dtype:
                return f"an output of {b.dtype} instead of {a.dtype}"
            if a.shape != b.shape:
                return f"an output of shape {tuple(b.shape)} instead of {tuple(a.shape)}"
            if not a.is_meta and not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
                return f"an output differs by {(a - b).abs().max().item():.2g}"
        fixed = next(_differing(recording.outputs, returned[0]), None)
        return None if fixed is None else f"it returns {fixed[1]!r} where the recording holds {fixed[0]!r}"

    if recording.sized_by_values:
        difference = compare([x[torch.arange(len(x), device=x.device) // 2] if x.ndim else x for x in leaves])
        if difference is not None:
            return f"a size that values decide is part of the recorded graph ({difference})"
    smaller = None
    batch = {x.shape[0] for x in leaves if x.ndim}
    if 1 in batch:
        recording.fixed.append("the example is a batch of one")
    elif not recording.fixed and batch:
        try:  # other values, and another first dimension of each input, at once
            smaller = compare([x[: (x.shape[0] + 1) // 2] if x.ndim else x for x in other])
        except Exception as error:  # noqa: BLE001 (a model's own code may fail in any way)
            smaller = f"{type(error).__name__}: {error}"
        if smaller is None:
            return None
    try:
        difference = compare(other)
    except Exception:  # noqa: BLE001 (a model's own code may fail in any way)
        difference = compare(leaves)
    if difference is not None:
        return f"the recorded graph does not replay equal to the model ({difference})"
    if smaller is not None:
        recording.fixed.append(f"another batch size gives {smaller}")
    return None
