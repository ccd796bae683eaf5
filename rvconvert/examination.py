"""Examining a method: recording it, on a model that is left as it was, and saying what keeps it from being a program."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from rvconvert.capture.graph_calls import restoring_autocast
from rvconvert.capture.module_state import modules_of, unchanged
from rvconvert.capture.python_state import OTHERS, Moving, Place, held_by
from rvconvert.capture.record import own_copies, record
from rvconvert.capture.replay import each_mode, replay_differs
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.tree import flatten
from rvconvert.errors import ConversionError, NoReparameterizationError
from rvconvert.program.plan import report_graph
from rvconvert.program.refusal import read_refusal
from rvconvert.program.rewrite import compile_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from rvconvert.capture.recording import Recording
    from rvconvert.conversion import Conversion
    from rvconvert.program.roles import Roles

__all__ = ["Examination", "Examined"]

_MOST_FLAGS = 16  # attributes that are tried the other way round
_MOST_CHECKED = 64  # graphs that are known to replay


@dataclasses.dataclass(frozen=True)
class Examined:
    """A method's recording with its roles and report; why it is refused, if it is; whether the next call is recorded too."""

    recording: Recording
    roles: Roles
    report: Any
    refusal: ConversionError | None = None
    again: bool = False
    moving: frozenset[Place] = frozenset()  # attributes that the graph reads, whatever they are


class Examination:
    """Of one method for one kind of call."""

    def __init__(
        self, conversion: Conversion, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.conversion, self.name, self.model, self.args, self.kwargs = conversion, name, model, args, kwargs
        self.method = conversion.method(name, model)
        self.grad = torch.is_grad_enabled()

    def examine(self, moving: frozenset[Place] = frozenset()) -> Examined:
        """Record and check the method; refuses nothing, but says what must be refused.

        The attributes ``moving`` are read by the graph, if it can: Python does not decide by them, nor compute with them.
        """
        conversion, model = self.conversion, self.model
        again: list[str] = []
        by_hooks = held_by(hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
        if any(map(is_lazy, model.parameters())):
            self.build()
        moving = self.that_can_move(moving)
        with unchanged(model), torch.enable_grad():
            recording = self.record(moving)
        outside = recording.outside
        counted = recording.counted - moving - conversion.still
        if counted or recording.builds:
            recording.restore()
        if counted:  # self.steps += 1
            moving = self.that_can_move(moving | counted)
        if recording.builds:
            self.build(recording.written)
        with unchanged(model), torch.enable_grad():
            if recording.builds or counted:
                recording = self.record(moving)
            if recording.once:  # as the next call would find the model
                second = self.record(moving)
                again = second.once
                settled = not second.constants and str(second.graph) == str(recording.graph)
                recording.once = again or ([] if settled else recording.once)
                second.restore()
        recording.restore()
        if recording.drawn:
            with unchanged(model, recording.written), torch.enable_grad():
                torch.manual_seed(1)  # another state of what the method does not seed
                recording.keep_repeated(self.record(moving))
        if recording.asks_grad_mode:
            with unchanged(model, recording.written), torch.enable_grad():
                other = self.record(moving, told=not self.grad)
            if recording.constants or str(other.graph) != str(recording.graph):
                again.append("Python decides by torch.is_grad_enabled()")
        roles = conversion.roles(recording, self.name, model)
        repeated = recording.drawn.keys() - set(roles.latents)
        for node in repeated:
            recording.freeze(node)
            recording.forget(node)
        roles = conversion.roles(recording, self.name, model) if repeated else roles
        vars(conversion.constants).update(recording.constants)
        refusal = conversion.refusal(recording, roles, self.name, model)
        reported = {node: place for node, place, _ in recording.reads if node in roles.random}
        if refusal is None and reported:
            losses = reported.keys() <= roles.scores  # which are positive, as a rule
            again_by = [
                self.is_the_same(recording, moving, factor) for factor in (1.0, 0.01, 100.0, *(() if losses else (-1.0,)))
            ]
            if not all(again_by) and (again_by[0] or not losses):  # what was reported came back into the graph
                refusal = read_refusal(f"{conversion.plain_class.__name__}.{self.name}", next(iter(reported.values())))
        if refusal is None or isinstance(refusal, NoReparameterizationError):  # which may be served as it is: see ``prepare``
            again += [f"Python decides by the value of a tensor: {place}" for _, place, _ in recording.reads]
            if not recording.once and not again:
                again += self.check(recording)
        recording.once += again
        attaches = conversion.advice.attaches
        report = report_graph(
            recording, roles, conversion.plain_class.__name__, self.name, conversion.settings, attaches=attaches
        )
        if refusal is not None:
            report = dataclasses.replace(report, refusal=str(refusal))
        if recording.once or refusal is not None:  # the call itself is still to come
            outside.put_back()
        by_hooks.put_back()
        conversion.note(recording)
        return Examined(recording, roles, report, refusal, bool(again), moving)

    def record(self, moving: frozenset[Place], *, told: bool | None = None, reported: float = 1.0, other: int = 0) -> Recording:
        """A recording in which the attributes ``moving`` are read by the graph, and heard as the ``other`` of their numbers.

        Python hears whether gradients are on, or what it is ``told``, and ``reported`` times the values that it asks for.
        """

        def run() -> Recording:
            return record(
                self.model,
                self.method,
                self.args,
                self.kwargs,
                self.conversion.settings.registry,
                told=self.grad if told is None else told,
                reported=reported,
                moving=Moving(moving, other),
            )[0]

        made, stepped = run(), self.conversion.stepped
        if made.unexplained.keys() - stepped.keys():  # another run makes others, and steps the same that are outside
            again = run()
            again.restore()
            stepped |= {key: tensor for key, tensor in made.unexplained.items() if key in again.unexplained}
        made.renew(stepped)
        return made

    def that_can_move(self, moving: frozenset[Place]) -> frozenset[Place]:
        """Those of ``moving`` that Python only hands on to the graph: with other numbers the graph is the same."""
        while moving:
            made: list[Recording] = []
            for other in OTHERS:
                with unchanged(self.model), torch.enable_grad(), contextlib.suppress(Exception):  # of the model's own code
                    recording = self.record(moving, other=other)
                    recording.restore()
                    made.append(recording)
            decided = moving & made[0].decided if made else frozenset()
            if not decided and len(made) == len(OTHERS) and all(map(made[0].equals, made[1:])):
                break
            self.conversion.still |= decided or moving
            moving -= decided or moving
        return moving

    def is_the_same(self, recording: Recording, moving: frozenset[Place], reported: float) -> bool:
        """The recording is the same where Python hears ``reported`` times the values that it asks for."""
        with unchanged(self.model, recording.written), torch.enable_grad():
            try:
                other = self.record(moving, reported=reported)
            except Exception:  # noqa: BLE001 (the model's own code may fail in any way)
                return False
        return other.equals(recording)

    def build(self, written: Iterable[torch.Tensor] = ()) -> None:
        """Call the plain method, which makes layers at its first call; what the model had, and what is ``written``, stays."""
        leaves, structure = flatten((self.args, self.kwargs))
        given = (x.mean if isinstance(x, RandomVariable) else x for x in own_copies(leaves))
        args, kwargs = structure.build(given)
        buffers = {b: b.detach().clone() for b in (*self.model.buffers(), *written) if not is_lazy(b)}
        with torch.no_grad():
            self.method(*args, **kwargs)
            for buffer, value in buffers.items():
                buffer.copy_(value)

    def check(self, recording: Recording) -> list[str]:
        """What keeps the recording from standing for other calls."""
        checked, written = self.conversion.checked, str(recording.graph)
        if not recording.constants and checked.get((self.name, written)) is not None:
            recording.fixed += checked[self.name, written]  # as in the other mode, where it was compared
            return []
        run = compile_graph(recording.graph)
        run = restoring_autocast(run) if recording.sets_autocast else run
        difference = replay_differs(run, recording, self.model, self.method, self.args, self.kwargs)
        if difference is not None:
            return [difference]
        if len(checked) >= _MOST_CHECKED:
            checked.pop(next(iter(checked)), None)
        checked[self.name, written] = recording.fixed
        return []

    def samples_in_other_mode(self, examined: Examined) -> bool:
        """True where the method draws nothing now but does otherwise.

        In the other mode (``if self.training: ...``), with gradients, without what may be left out (``encode_only=True``), or
        later, as a flag or a count of epochs on the model may say.
        """
        conversion, name, model = self.conversion, self.name, self.model
        if not isinstance(examined.refusal, NoReparameterizationError):
            return False
        if name in conversion.posteriors or any(key[0] == name for key in (*conversion.programs, *conversion.once)):
            return True
        parameters = [*conversion.signature(name).parameters.values()][1:]
        needed = self.args[: sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in parameters)]
        calls: list[Any] = [(self.args, self.kwargs), (needed, {})]
        for other in each_mode(model):
            for args, kwargs in calls if other or not self.grad else calls[1:]:  # as it is, it was refused
                with torch.enable_grad(), contextlib.suppress(Exception):  # of the model's own code
                    if Examination(conversion, name, model, args, kwargs).examine().refusal is None:
                        return True
        modules = modules_of(model)
        own = [
            (modules[each.owner], each.name) for each in examined.recording.places if type(each.owner) is int and each.owner >= 0
        ]
        known = [(module, attribute) for module, attribute in own if type(vars(module).get(attribute)) in (bool, int, float)]
        for module, attribute in known[:_MOST_FLAGS]:
            with torch.enable_grad(), contextlib.suppress(Exception), _contrary(module, attribute):
                if Examination(conversion, name, model, self.args, self.kwargs).examine().refusal is None:
                    return True
        return False


def _on_the_other_side(value: float) -> Any:
    """A number that is told to be on the other side of what it is compared with."""
    base = type(value)

    def contrary(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        return lambda own, other: not compare(base(own), other)

    methods = {f"__{name}__": contrary(getattr(operator, name)) for name in ("lt", "le", "gt", "ge")}
    return type("Contrary", (base,), methods)(value)


@contextlib.contextmanager
def _contrary(module: nn.Module, attribute: str) -> Iterator[None]:
    """Within, a flag of a module is the other way round, and a number on the other side of what it is compared with."""
    held = vars(module)[attribute]
    vars(module)[attribute] = not held if type(held) is bool else _on_the_other_side(held)
    try:
        yield
    finally:
        vars(module)[attribute] = held
