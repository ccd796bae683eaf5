"""The conversion that a model carries: it records the model's methods, keeps their programs and runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import types
import weakref
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from rvconvert.advice import PATIENCE, Advice
from rvconvert.calibration import renew
from rvconvert.capture import intercept
from rvconvert.capture.graph_calls import autocast_state, restoring_autocast
from rvconvert.capture.module_state import modules_of, put_back, tensors_written
from rvconvert.capture.python_state import (
    ARGUMENT,
    NUMBERS,
    Contents,
    Place,
    Scope,
    is_opaque,
    read_now,
    unused_arguments,
)
from rvconvert.capture.record import record
from rvconvert.core.random_variable import RandomVariable, moments_later, random_variables
from rvconvert.core.tree import Structure, flatten
from rvconvert.covariance.calibrated import Gains
from rvconvert.errors import ConversionError, NoReparameterizationError
from rvconvert.examination import Examination, Examined
from rvconvert.penalty import attach_penalty, variance_penalty
from rvconvert.places import short_place
from rvconvert.program.gains import gain_keys
from rvconvert.program.plan import refuse_unsupported
from rvconvert.program.recorded_graph import Posterior
from rvconvert.program.refusal import refusal
from rvconvert.program.rewrite import compile_graph, to_random_variables
from rvconvert.program.roles import Roles, assign
from rvconvert.rules.noise import all_entering

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rvconvert.capture.recording import Kept, Recording
    from rvconvert.options import Options

__all__ = ["Conversion", "Program"]

_OFTEN = (
    "{} was recorded for {} kinds of call, which took several steps' time each: lengths of its inputs, or plain numbers among "
    "its arguments by which Python decides, differ. Give a number that changes with every call, min(1, step / 1000), worked out, "
    "or as a tensor, torch.tensor(step); pad lengths to some sizes"
)
_MOST_NUMBERS = 16  # kinds of call that differ in what is no tensor, before that is said
MOST_PROGRAMS = 64  # kept for each model; the one used longest ago goes


@dataclasses.dataclass
class Program:
    """One method for one kind of call: run it with the tensor leaves of the inputs."""

    run: Callable[..., tuple[Any, ...]]
    outputs: Structure
    numbers: tuple[str, ...]  # arguments, floats, that follow the leaves
    returned: int | None
    kept: list[Kept]
    fixed_batch: bool
    penalised: bool
    encodes: bool  # what leaves depends on a latent, and nothing is decoded


class Conversion:
    """Runs the converted methods of one model. Holds no module and no parameter, so it copies freely."""

    def __init__(self, options: Options, plain_class: type[nn.Module], own: dict[str, Callable[..., Any]] | None = None) -> None:
        self.options = options
        self.settings = options.settings
        self.plain_class = plain_class
        self.own = own or {}  # methods that sat on the instance
        self.programs: OrderedDict[Any, Program] = OrderedDict()
        self.once: dict[Any, str] = {}  # kinds of call that are recorded each time, with the reason
        self.places: dict[Any, tuple[Place, ...]] = {}  # what Python holds that a kind of call depends on
        self.recordings: Counter[Any] = Counter()  # of a kind of call
        self.scopes: set[Place] = set()  # what recordings have read outside the model
        self.stepped: dict[int, torch.Tensor] = {}  # tensors there that they write to, by ``id``
        self.differentiates = False  # a method takes gradients inside
        self.moving: dict[Any, frozenset[Place]] = {}  # attributes that change between such calls, and are read at each
        self.moving_arguments: dict[str, frozenset[str]] = dict.fromkeys(options.methods, frozenset())  # arguments that do so
        self.last_arguments: dict[str, dict[str, float]] = {}  # the numbers among them at the last recording
        self.still: set[Place] = set()  # those by which Python decides, which are part of what a call depends on
        self.constants = types.SimpleNamespace()
        self.latents: set[str] = set()  # places, "file:line", of the draws that became random variables
        self.checked: dict[tuple[str, str], list[str]] = {}  # graphs that replayed equal to eager
        self.signatures: dict[str, inspect.Signature] = {}
        # Arguments that a method's code never mentions.
        self.ignored = {name: unused_arguments(self.own.get(name) or getattr(plain_class, name)) for name in options.methods}
        self.last_penalty: torch.Tensor | None = None
        self._penalty: torch.Tensor | None = None  # of the call under way
        self.penalty_scale: float = 1.0
        self.gains = Gains()  # of covariance="calibrated"
        self.advice = Advice(options, plain_class.__name__)
        self.posteriors: dict[str, Posterior] = {}  # of the latents of methods, in training mode

    # --- the two ways a random variable leaves --------------------------------------------------

    def take_reconstruction(self, value: Any, *beside: Any) -> Any:
        """The mean of the reconstruction; L_c (paper eq. 14) is noted, and attached if the options say so.

        With values ``beside`` it, the means of all: L_c joins whichever a loss is made of.
        """
        if not isinstance(value, RandomVariable):
            return (value, *beside) if beside else value
        options = self.options
        with torch.no_grad():
            penalty = variance_penalty(value, options.penalty, options.penalty_kind)
            self._penalty = penalty if self._penalty is None else self._penalty + penalty
            self.last_penalty = self._penalty
        means = [self.take_mean(each) for each in beside]
        if not options.attach or options.penalty == 0:
            return (self.take_mean(value), *means) if means else self.take_mean(value)
        return attach_penalty(value.contiguous(), options.penalty, options.penalty_kind, self.penalty_scale, beside=means)

    def take_latent(self, value: Any) -> Any:
        """The mean of a latent that leaves; a warning once a loss is made of it."""
        mean = self.take_mean(value)
        if isinstance(value, RandomVariable) and mean.requires_grad and not torch.compiler.is_compiling():
            mean = mean.clone()  # which has the gradient of what is made of it outside, and no other
            mean.register_hook(self.advice.of_latent)
        return mean

    def take_mean(self, value: Any) -> Any:
        """The mean of a random variable that is not a reconstruction: a latent, a loss."""
        return value.mean.contiguous() if isinstance(value, RandomVariable) else value

    # --- running --------------------------------------------------------------------------------

    def run(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the converted method ``name``."""
        args, kwargs = self.normalized(name, args, kwargs)
        given = (*args, *kwargs.values())
        leaves, structure = flatten((args, kwargs))
        if self.settings.covariance == "calibrated":
            renew(self, name, model, args, kwargs)
        if random_variables(leaves):
            leaves = list(all_entering(leaves, self.settings))
            args, kwargs = structure.build(iter(leaves))
        program = self.find(name, model, leaves, structure)
        if program is None and torch.compiler.is_dynamo_compiling():
            uncompiled = torch.compiler.disable(self.prepare)  # for fullgraph=True: convert(vae, example_inputs=(x,))
            program = uncompiled(name, model, args, kwargs, to_run=True)
        elif program is None:
            program = self.prepare(name, model, args, kwargs, to_run=True)
        self._penalty = None
        if not torch.compiler.is_compiling():
            self.advice.count_call(model)
        numbers = self.numbers(name, args, kwargs) if program.numbers else {}
        with contextlib.nullcontext() if torch.compiler.is_compiling() else _running():
            results = program.run(model, *leaves, *[numbers[each] for each in program.numbers])
        if not torch.compiler.is_compiling() and self.advice.calls == 1 and self._penalty is not None:
            self.advice.of_overflow(self._penalty)
        self.keep(program, model, results)
        if not program.penalised and model.training and torch.is_grad_enabled():
            self.advice.without_penalty(name, self.last_penalty, encodes=program.encodes)
        elif self.options.output == "distribution" and self.options.attach and model.training and torch.is_grad_enabled():
            self.advice.of_distribution(name)
        # Rules may have changed the order in memory; a caller's view() asks for the plain one.
        leaving = (x.contiguous() if isinstance(x, RandomVariable) else x for x in results)
        made = program.outputs.build(leaving)
        return made if program.returned is None else _refill(given[program.returned], made)

    @staticmethod
    def keep(program: Program, model: nn.Module, results: tuple[Any, ...]) -> None:
        """Leave on the modules what the method leaves there."""
        rest = iter(results[len(results) - sum(each.leaves for each in program.kept) :])
        for each in program.kept:
            module = model.get_submodule(each.path)
            value = each.structure.build(rest)
            if each.called:
                args, kwargs = value
                getattr(module, each.name)(*args, **kwargs)
            elif not each.grown:
                setattr(module, each.name, value)
            else:
                _refill(getattr(module, each.name), value, meters=True)

    def forget_calls(self) -> None:
        """A model that was tried out has not been called yet."""
        self.last_penalty = self._penalty = None

    def chosen(self, name: str | None) -> str:
        """The converted method of this name, the first one by default; ConversionError for one that is not converted."""
        methods = self.options.methods
        if name is not None and name not in methods:
            raise ConversionError(f"{name!r} is not converted; {', '.join(methods)} is")
        return name or methods[0]

    def method(self, name: str, model: nn.Module) -> Callable[..., Any]:
        """The model's plain method, bound."""
        return types.MethodType(self.own.get(name) or getattr(self.plain_class, name), model)

    def signature(self, name: str) -> inspect.Signature:
        """Of the plain class's own method, ``self`` first."""
        if name not in self.signatures:
            self.signatures[name] = inspect.signature(self.own.get(name) or getattr(self.plain_class, name))
        return self.signatures[name]

    def ready(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Record the method for this kind of call unless it is recorded already; True where it is recorded at each call."""
        leaves, structure = flatten(self.normalized(name, args, kwargs))
        if self.find(name, model, leaves, structure) is not None:
            return False
        if self.key(name, model, leaves, structure, batch=False) not in self.once:
            self.prepare(name, model, args, kwargs, to_run=False)
        return self.key(name, model, leaves, structure, batch=False) in self.once

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within, what has been recorded runs on the side; after, what it changes outside the model is as it was."""
        held, numbers = Contents(), {x: x.detach().clone() for x in self.stepped.values()}
        for place in self.scopes:
            held.keep_place(place)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() or self.differentiates):  # which may ask for no gradient itself
                yield
        finally:
            held.put_back()
            put_back(numbers)

    def note(self, recording: Recording) -> None:
        """Know what a recording changes outside the model, and whether it takes gradients."""
        self.differentiates |= any(node.target is torch.autograd.grad for node in recording.graph.nodes)
        self.scopes |= {place for place in recording.places if isinstance(place.owner, Scope)}
        self.stepped |= {id(tensor): tensor for tensor, _ in recording.steps.values()}

    def normalized(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call spelled one way, positional first, so that equal calls share a program."""
        try:
            bound = self.signature(name).bind(None, *args, **kwargs)
        except (TypeError, ValueError):
            return args, kwargs  # the model itself says what is wrong with the call
        for argument in self.ignored[name]:  # the number of a batch, which each call has another of
            if isinstance(bound.arguments.get(argument), (int, float, str)):
                bound.arguments[argument] = None
        return bound.args[1:], bound.kwargs

    def key(self, name: str, model: nn.Module, leaves: list[Any], structure: Structure, *, batch: bool) -> Any:
        """What a recording depends on: modes, hooks, structure, shapes (the batch size only if it is fixed), dtypes."""
        return (*self.situation(name, model, structure), *_kinds(leaves, batch=batch))

    def situation(self, name: str, model: nn.Module, structure: Structure) -> tuple[Any, ...]:
        """The part of ``key`` that has nothing to do with the tensors of the call."""
        modules = modules_of(model)
        training = tuple([m.training for m in modules])
        hooked = tuple([i for i, m in enumerate(modules) if _is_hooked(m)])
        first = next((p for m in modules for p in m._parameters.values() if p is not None), None)
        weights = None if first is None else (first.dtype, first.device)
        return (
            name,
            self.signature_of(name, structure),
            training,
            hooked,
            weights,
            autocast_state(),
            self.posterior_of(name, model),
        )

    def signature_of(self, name: str, structure: Structure) -> Any:
        """Of a call's structure, whatever the numbers are that move."""
        moving = self.moving_arguments[name]
        if not moving:
            return structure.signature()
        args, kwargs = structure.parts
        names = [*self.signature(name).parameters][1:]
        given = (*itertools.zip_longest(names[: len(args.parts)], args.parts), *zip(kwargs.keys, kwargs.parts, strict=True))
        moves = [argument in moving and part.kind == "constant" and type(part.template) in NUMBERS for argument, part in given]
        return tuple(
            (argument, "moves" if moved else part.signature()) for (argument, part), moved in zip(given, moves, strict=True)
        )

    def numbers(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, float]:
        """The arguments of a normalized call that are numbers, by name."""
        given = (*zip([*self.signature(name).parameters][1:], args, strict=False), *kwargs.items())
        return {argument: value for argument, value in given if type(value) in NUMBERS}

    def posterior_of(self, name: str, model: nn.Module) -> Posterior | None:
        """In eval mode, what training has shown of the method's latents, by which a prior's draw is told."""
        return None if model.training else self.posteriors.get(name)

    def state(self, situation: Any, model: nn.Module) -> tuple[Any, ...]:
        """What Python holds now of all that recordings in this situation have read."""
        places = self.places.get(situation, ())
        return read_now(places, modules_of(model)) if places else ()

    def watch(self, situation: Any, model: nn.Module, recording: Recording) -> None:
        """Compare from now on what this recording has read; say once if it changes with every call."""
        known = self.places.get(situation, ())
        before = self.state(situation, model)
        self.places[situation] = tuple(dict.fromkeys((*known, *recording.places)))
        self.recordings[situation] += 1
        if self.recordings[situation] == PATIENCE and len(known) == len(self.places[situation]):
            last = next(reversed(self.programs))[-1]
            changed = [place for place, a, b in zip(known, before, last, strict=False) if a != b]
            if changed:
                named = ", ".join(f"{self.owner(place, model)}{place.name}" for place in changed)
                self.advice.once(
                    "attributes",
                    f"{named} changed between calls {PATIENCE} times, and each time the model is recorded anew, which takes "
                    "several steps' time. To be fast, make it a buffer (self.register_buffer) and write to it in place, or an "
                    "argument that is a tensor",
                )

    def moving_now(self, situation: Any, model: nn.Module) -> frozenset[Place]:
        """Attributes that are other numbers than they were at the last recording, or that have been so before."""
        last = next((key[-1] for key in reversed(self.programs) if key[:-3] == situation), ())
        changed = {
            place
            for place, was, now in zip(self.places.get(situation, ()), last, self.state(situation, model), strict=False)
            if was != now and was[0] in NUMBERS and now[0] in NUMBERS and isinstance(place.owner, int)
        }
        return (self.moving.get(situation, frozenset()) | changed) - self.still

    def moving_of_call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[Place]:
        """Arguments that are other numbers than at the last recording, or that have been so before."""
        before, now = self.last_arguments.get(name, {}), self.numbers(name, args, kwargs)
        self.last_arguments[name] = now
        changed = {argument for argument in now if before.get(argument, now[argument]) != now[argument]}
        return {Place(ARGUMENT, argument) for argument in (changed | self.moving_arguments[name]) & now.keys()} - self.still

    def let_move(self, situation: Any, moving: frozenset[Place]) -> None:
        """Compare these no more: programs of before hold them as constants."""
        if moving != self.moving.get(situation, frozenset()):
            self.moving[situation] = moving
            self.places[situation] = tuple(place for place in self.places[situation] if place not in moving)
            for key in [key for key in self.programs if key[:-3] == situation]:
                del self.programs[key]

    def owner(self, place: Place, model: nn.Module) -> str:
        """What stands before the name of a place in a message."""
        if isinstance(place.owner, Scope):
            return f"{place.owner.of.get('__name__')}." if isinstance(place.owner.of, dict) else ""
        module = modules_of(model)[place.owner]
        return next((f"model.{path}." if path else "model." for path, each in model.named_modules() if each is module), "")

    def find(self, name: str, model: nn.Module, leaves: list[Any], structure: Structure) -> Program | None:
        """The program that serves this call, if there is one already."""
        if not self.programs:
            return None
        situation = self.situation(name, model, structure)
        state = self.state(situation, model)
        for batch in (False, True):
            key = (*situation, *_kinds(leaves, batch=batch), state)
            program = self.programs.get(key)
            if program is not None:
                if len(self.programs) >= MOST_PROGRAMS:
                    self.programs.move_to_end(key)
                return program
        return None

    # --- preparing ------------------------------------------------------------------------------

    def prepare(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, to_run: bool) -> Program:
        """Record the method for this kind of call; refuse what cannot be converted.

        Args:
            name, model, args, kwargs: the call.
            to_run: the program is run right after, so that a recording which serves one call leaves on the model what that
                call leaves; else the model is left as it was.

        Raises:
            UnsupportedOperationError: one or more operations have no rule (all are listed).
            NoReparameterizationError, NonGaussianError, TracingError: see each.
        """
        intercept.refuse_inside_transforms(f"{self.plain_class.__name__}.{name}")
        # Of what a recording computes nothing is kept for a backward pass, least of all by a checkpoint around the call.
        aside = torch.autograd.graph.saved_tensors_hooks(_itself, _itself)
        with intercept.lock, intercept.plainly(), aside:
            args, kwargs = self.normalized(name, args, kwargs)
            leaves, structure = flatten((args, kwargs))
            key = self.key(name, model, leaves, structure, batch=False)
            if key in self.once and to_run:
                self.recordings[key] += 1
                if self.recordings[key] == PATIENCE:
                    self.advice.once(
                        "each call",
                        f"{self.plain_class.__name__}.{name} is recorded anew at each call, which takes several steps' time: "
                        f"{self.once[key]}",
                    )
                return self.recorded_once(name, model, args, kwargs)
            situation = self.situation(name, model, structure)
            moving = self.moving_now(situation, model) | self.moving_of_call(name, args, kwargs)
            examination = Examination(self, name, model, args, kwargs)
            examined = examination.examine(moving)
            if examined.refusal is not None and not examination.samples_in_other_mode(examined):
                raise examined.refusal
            refuse_unsupported(examined.report)
            if examined.recording.once:
                if examined.again:
                    self.once[key] = examined.report.reason
                return self.recorded_once(name, model, args, kwargs) if to_run else self.program(name, examined)
            program = self.program(name, examined)
            self.moving_arguments[name] |= {place.name for place in examined.moving if place.owner == ARGUMENT}
            situation = self.situation(name, model, structure)
            self.watch(situation, model, examined.recording)
            self.let_move(situation, frozenset(place for place in examined.moving if place.owner != ARGUMENT))
            kinds = _kinds(leaves, batch=program.fixed_batch)
            self.programs[(*situation, *kinds, self.state(situation, model))] = program
            by_numbers = len({key[1] for key in self.programs if key[0] == name}) > _MOST_NUMBERS
            if (by_numbers or len(self.programs) > MOST_PROGRAMS) and "attributes" not in self.advice.given:
                self.advice.once("programs", _OFTEN.format(f"{self.plain_class.__name__}.{name}", len(self.programs) - 1))
            if len(self.programs) > MOST_PROGRAMS:
                self.programs.popitem(last=False)
            return program

    def program(self, name: str, examined: Examined) -> Program:
        """The runnable form of a recording."""
        recording, roles = examined.recording, examined.roles
        self.latents |= {node.meta["where"] for node in roles.latents}
        for node in sorted(roles.picked, key=lambda n: n.name)[:1]:
            self.advice.once(
                "index",
                f"{short_place(node.meta.get('where', ''))}: an index that a latent picks, a category or an entry of a codebook, "
                "is picked at the mean here, and what is made of it has no variance. F.gumbel_softmax(logits, tau, hard=True) "
                "draws the same category as a one-hot vector that has one; covariance='sampled' and 'lowrank' pick on every path",
            )
        called = {str(n.target): n in roles.random for n in recording.graph.nodes if n.op == "call_module"}
        if unheard := [path for path in recording.backward_hooks if called.get(path, True)]:
            self.advice.once(
                "backward hooks",
                f"the backward hooks of {', '.join(dict.fromkeys(unheard))} are not called: a converted model "
                "calls these modules' functions. Hook the tensor in forward, y.register_hook(hook), called for either, or "
                "the parameters, weight.register_hook(hook)",
            )
        calibrated = self.options.covariance == "calibrated"
        gains = gain_keys(recording, roles, name, self.options.settings) if calibrated else None
        graph = to_random_variables(recording, roles, output=self.options.output, gains=gains)
        run = _interpreter(graph) if recording.once else compile_graph(graph)
        if recording.sets_autocast:
            run = restoring_autocast(run)
        made = Program(
            run,
            recording.outputs,
            tuple(recording.numbers),
            recording.returned,
            recording.kept,
            bool(recording.fixed),
            penalised=bool(roles.reconstructions),
            encodes=bool(roles.hidden) and not roles.decoded,
        )
        weakref.finalize(made, _forget, self.constants, tuple(recording.constants))
        return made

    def recorded_once(self, name: str, model: nn.Module, args: Any, kwargs: Any) -> Program:
        """Record a call that is then run and forgotten: what Python does beside the graph stays done."""
        written = tensors_written(model)
        recording, _ = record(model, self.method(name, model), args, kwargs, self.settings.registry, keeps_draws=True)
        put_back(written)  # the run writes it again
        recording.renew(self.stepped)
        recording.settle()
        recording.once = ["as asked"]
        roles = self.roles(recording, name, model)
        for node in recording.drawn.keys() - set(roles.latents):
            recording.freeze(node)  # Python may have seen it
        recording.hold_attributes(model)
        vars(self.constants).update(recording.constants)
        refusal = self.refusal(recording, roles, name, model)
        if refusal is not None and not isinstance(refusal, NoReparameterizationError):
            raise refusal
        return self.program(name, Examined(recording, roles, None))

    def roles(self, recording: Recording, name: str, model: nn.Module) -> Roles:
        """The roles in a recording of the method, which may have shown a posterior in training mode."""
        posterior = self.posterior_of(name, model)
        roles = assign(recording, self.options.latent, paths=not self.settings.needs_rules, posterior=posterior)
        if roles.posterior is not None and model.training:
            known = self.posteriors.get(name, Posterior(frozenset(), 0))
            layers, inputs = known.layers | roles.posterior.layers, max(known.inputs, roles.posterior.inputs)
            self.posteriors[name] = Posterior(layers, inputs)
        return roles

    def refusal(self, recording: Recording, roles: Roles, name: str, model: nn.Module) -> ConversionError | None:
        """Why the method cannot be converted, whatever rules there are."""
        return refusal(recording, roles, self.options, self.plain_class, name, self.method(name, model))


def _refill(held: Any, contents: Any, *, meters: bool = False) -> Any:
    """A list or dict with these contents, in place, as are those within it; what is no such is replaced.

    With ``meters`` an object's own numbers are put into it too.
    """
    if type(held) is not type(contents):
        return contents
    if isinstance(held, list):
        held[:] = [_refill(a, b, meters=meters) for a, b in itertools.zip_longest(held[: len(contents)], contents)]
    elif isinstance(held, dict):
        for key, value in contents.items():
            held[key] = _refill(held.get(key), value, meters=meters)
    elif meters and not is_opaque(held) and isinstance(getattr(held, "__dict__", None), dict):
        _refill(vars(held), vars(contents), meters=True)
    else:
        return contents
    return held


def _itself(x: Any) -> Any:
    return x


def _is_hooked(module: nn.Module) -> bool:
    backward = module._backward_hooks or module._backward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or backward)


def _kinds(leaves: list[Any], *, batch: bool) -> tuple[Any, ...]:
    """Shapes and dtypes of a call's tensors, the first dimension only if the recording holds for one batch size."""
    start = 0 if batch else 1
    return (batch, tuple([(isinstance(x, RandomVariable), tuple(x.shape)[start:], x.ndim, x.dtype, x.device) for x in leaves]))


def _interpreter(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """A function that runs a graph node by node, for a graph that is run once."""

    def run(model: nn.Module, *leaves: Any) -> tuple[Any, ...]:
        interpreter = fx.Interpreter(model, graph=graph)
        interpreter.extra_traceback = False  # an error is the operation's own, which says what to do
        return interpreter.run(*leaves, enable_io_processing=False)  # type: ignore[no-any-return]

    return run


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """A program runs."""
    try:
        with moments_later():
            yield
    except RuntimeError as error:
        if "setup_context" not in str(error):  # torch's answer where an operation has a backward pass of its own
            raise
        raise ConversionError(
            "torch.func.grad and vmap do not pass through an independent or calibrated model's operations, nor is there a "
            'backward pass for L_c to join: convert with covariance="sampled", attach=False, output="distribution", and add '
            "rvconvert.variance_penalty(y) to the loss that torch.func takes"
        ) from error


def _forget(constants: Any, names: tuple[str, ...]) -> None:
    """Drop the constants of a program that is gone."""
    for name in names:
        vars(constants).pop(name, None)
