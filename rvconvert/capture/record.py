"""Recording: one real run of a method becomes an fx.Graph that any later run replays."""

from __future__ import annotations

import inspect
import traceback
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from rvconvert.capture.graph_calls import own_copy
from rvconvert.capture.intercept import INTERNAL, intercepting
from rvconvert.capture.module_state import Held, is_output
from rvconvert.capture.numpy_draws import drawn_by_torch
from rvconvert.capture.python_state import Moving, Place, following, random_state
from rvconvert.capture.recorder import Recorder
from rvconvert.capture.recording import Recording
from rvconvert.capture.tensor_nodes import TRANSFORM
from rvconvert.capture.traced_number import tracing
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.tree import flatten
from rvconvert.errors import TracingError
from rvconvert.places import short_place

if TYPE_CHECKING:
    from collections.abc import Callable

    from rvconvert.core.registry import Registry

__all__ = ["own_copies", "record"]


def record(
    root: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    registry: Registry,
    *,
    told: bool | None = None,
    reported: float = 1.0,
    moving: Moving = Moving(),  # noqa: B008 (it has no state)
    keeps_draws: bool = False,
) -> tuple[Recording, Any]:
    """Run ``method(*args, **kwargs)`` once and record it; returns the recording and the method's result.

    A ``RandomVariable`` among the arguments stands in as its mean and marks that input as random. What the method keeps
    on modules stays as the run left it: see ``unchanged``. A model that asks whether gradients are on hears ``told``;
    one that asks for values, as a log does, hears ``reported`` times them. The graph reads the attributes ``moving`` anew.
    With ``keeps_draws`` the recording holds what was drawn.
    """
    recording = Recording(fx.Graph())
    with tracing(recording.graph):
        recorder = Recorder(root, recording, registry, told=told, reported=reported, moving=moving, keeps_draws=keeps_draws)
        try:
            return recording, _run(recorder, root, method, args, kwargs)
        except BaseException:
            recording.restore()
            raise


def _run(recorder: Recorder, root: nn.Module, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recording, before = recorder.recording, Held(root)
    leaves, structure = flatten((args, kwargs))
    values = []
    for index, leaf in enumerate(own_copies(leaves)):
        node = recording.graph.placeholder(f"input_{index}")
        node.meta["where"] = node.meta["source"] = node.meta["module"] = ""
        if isinstance(leaf, RandomVariable):
            recording.random_inputs.append(node)
            recording.depends.add(node)
            leaf = leaf.mean.clone()
        values.append(leaf)
        recorder.track(leaf, node)
    args, kwargs = recorder.moving_arguments(method, *structure.build(iter(values)))
    drawn, read = random_state(), recorder.python
    with intercepting(recorder), recorder, drawn_by_torch(recorder.drawn_array), following(read):
        try:
            result = method(*args, **kwargs)
        except RuntimeError as error:
            steps = traceback.extract_tb(error.__traceback__)
            if not any("_functorch" in step.filename for step in steps):
                raise
            own = [step for step in steps if not step.filename.startswith(INTERNAL)]
            raise TracingError(
                TRANSFORM.format(f"{short_place(f'{own[-1].filename}:{own[-1].lineno}')}: {own[-1].line}")
            ) from error
    recorder.check_arrays()
    if inspect.isgenerator(result):
        raise TracingError(f"{method.__qualname__} gives a generator, which runs only as it is read: give a list, or a tuple")
    recording.places |= dict.fromkeys(read.values)
    recording.outside = read.held
    if random_state() != drawn:
        recording.once.append("Python draws random numbers of its own, by random or numpy.random")
    if read.draws():
        recording.once.append("Python draws random numbers of its own, by a generator among its globals")
    recording.once += [f"the method changes {place.name}" for place in read.changed()]
    containers = [isinstance(given, (dict, list)) and given is result for given in (*args, *kwargs.values())]
    recording.returned = containers.index(True) if any(containers) else None
    recording.builds = any(id(p) not in recorder.tensors for p in root.parameters())
    leaves, recording.outputs = flatten(result, is_output)
    leaves += before.changes(recording, recorder.paths)
    recording.counted = {Place(recorder.numbers[id(module)], name) for module, name in before.counted()}
    for kept, found in recorder.said:
        recording.kept.append(kept)
        leaves += found
    recording.graph.output(tuple(recorder.argument(leaf) for leaf in leaves))
    stepped = recording.steps.items()
    recording.reached = {name for name, (tensor, _) in stepped if isinstance(tensor, nn.Parameter) or read.has(tensor)}
    recording.sized_by_values = recorder.data_sizes.of_values
    # What is asked for and is in no operation, Python has used: items[:n], math.log(n).
    for sizes, deciding, place in recorder.sizes_asked:
        if not any(map(_is_used, sizes)):
            recording.reads.append((deciding, place, True))
    return result


def _is_used(number: fx.Node) -> bool:
    """A tensor is made of a number, or of what is worked out of it."""
    return any("rule" in user.meta or "shape" in user.meta or user.op == "output" or _is_used(user) for user in number.users)


def own_copies(leaves: list[Any]) -> list[Any]:
    """The leaves of a call with tensors that a run on the side may write to; what is one stays one."""
    made: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, RandomVariable):
            made[id(leaf)] = leaf.snapshot()
        elif type(leaf) is torch.Tensor and not leaf.is_meta:
            own = own_copy(leaf)
            made[id(leaf)] = own if leaf.is_leaf else own.clone()  # into which a method may write in place
    return [made.get(id(leaf), leaf) for leaf in leaves]
