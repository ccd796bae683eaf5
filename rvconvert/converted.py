"""What a converted model carries: its options, its programs, and the last penalty."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rvconvert import dispatch
from rvconvert.calibration import renew
from rvconvert.capture.recorder import Recording, as_class, record, unchanged
from rvconvert.capture.symbolic import trace_symbolically
from rvconvert.core.random_variable import RandomVariable, Settings, random_variables
from rvconvert.core.tree import Structure, flatten
from rvconvert.covariance.calibrated import Gains
from rvconvert.errors import (
    ConversionError,
    NonGaussianError,
    NoReparameterizationError,
    TracingError,
)
from rvconvert.penalty import KINDS, attach_penalty, variance_penalty
from rvconvert.program.gains import gain_keys
from rvconvert.program.plan import dispatch_report, refuse_unsupported, report_graph
from rvconvert.program.rewrite import compile_graph, to_random_variables
from rvconvert.report import Report
from rvconvert.rules.noise import SOURCES, all_entering

__all__ = ["Conversion", "Options"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``convert``, as given; they and the original model are all that a file or a copy needs."""

    methods: tuple[str, ...] = ("forward",)
    random_inputs: tuple[str, ...] = ()
    output: str = "mean"
    penalty: float = 50.0
    penalty_kind: str = "squared"
    attach: bool = True
    engine: str = "auto"
    recalibrate: int = 20
    settings: Settings = dataclasses.field(default_factory=Settings)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("output", self.output, ("mean", "distribution")),
            ("engine", self.engine, ("auto", "graph", "dispatch")),
            ("penalty_kind", self.penalty_kind, KINDS),
            ("covariance", self.settings.covariance, tuple(SOURCES)),
        ):
            if value not in allowed:
                raise ConversionError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")
        if self.recalibrate < 0:
            raise ConversionError(f"recalibrate={self.recalibrate!r} is no number of steps; 0: only rvconvert.calibrate renews")
        if self.settings.fuse and self.settings.covariance != "independent":
            raise ConversionError(
                f"fuse=True belongs to covariance='independent'; {self.settings.covariance!r} carries what linear maps "
                "correlate already: leave fuse out"
            )


@dataclasses.dataclass
class Program:
    """One method, captured for one kind of call: run it with the tensor leaves of the inputs."""

    run: Callable[..., tuple[Any, ...]] | None  # None: the dispatch engine runs the model's own code
    outputs: Structure
    attributes: tuple[tuple[str, str], ...]
    report: Report
    fixed_batch: bool


class Conversion:
    """Runs the converted methods of one model. Holds no module and no parameter, so it copies freely."""

    def __init__(self, options: Options, plain_class: type[nn.Module]) -> None:
        self.options = options
        self.settings = options.settings
        self.plain_class = plain_class
        self.programs: dict[Any, Program] = {}
        self.constants = types.SimpleNamespace()
        self.checked: dict[tuple[str, str], list[str]] = {}  # graphs that replayed equal to eager
        self.last_penalty: torch.Tensor | None = None
        self._penalty: torch.Tensor | None = None  # of the call under way
        self.penalty_scale: float = 1.0
        self.warned_of_truth = False
        self.gains = Gains()  # of covariance="calibrated"

    # --- the two ways a random variable leaves --------------------------------------------------

    def take_reconstruction(self, value: Any) -> Any:
        """The mean of the reconstruction; L_c (paper eq. 14) is noted, and attached if the options say so."""
        if not isinstance(value, RandomVariable):
            return value
        options = self.options
        with torch.no_grad():
            penalty = variance_penalty(value, options.penalty, options.penalty_kind)
            self._penalty = penalty if self._penalty is None else self._penalty + penalty
            self.last_penalty = self._penalty
        if not options.attach or options.penalty == 0:
            return value.mean.contiguous()
        return attach_penalty(value.contiguous(), options.penalty, options.penalty_kind, self.penalty_scale)

    def take_mean(self, value: Any) -> Any:
        """The mean of a random variable that is not a reconstruction: a latent, a scalar loss."""
        return value.mean.contiguous() if isinstance(value, RandomVariable) else value

    # --- running --------------------------------------------------------------------------------

    def run(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the converted method ``name``."""
        args, kwargs = self.normalized(name, args, kwargs)
        if self.settings.covariance == "calibrated":
            renew(self, name, model, args, kwargs)
        leaves, structure = flatten((args, kwargs))
        if random_variables(leaves):
            leaves = list(all_entering(leaves, self.settings))
            args, kwargs = structure.build(iter(leaves))
        program = self.find(name, model, leaves, structure)
        if program is None:
            program = self.prepare(name, model, args, kwargs)
        self._penalty = None
        if program.run is None:
            return dispatch.run(self, self.method(name), model, args, kwargs)
        results = program.run(model, *leaves)
        count = len(results) - len(program.attributes)
        for (path, attribute), value in zip(program.attributes, results[count:], strict=True):
            setattr(model.get_submodule(path), attribute, value)
        # Rules may have changed the order in memory; a caller's view() asks for the plain one.
        leaving = (x.contiguous() if isinstance(x, RandomVariable) else x for x in results[:count])
        return program.outputs.build(leaving)

    def ready(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Capture the method for this kind of call unless it is captured already."""
        leaves, structure = flatten(self.normalized(name, args, kwargs))
        if self.find(name, model, leaves, structure) is None:
            self.prepare(name, model, args, kwargs)

    def method(self, name: str) -> Callable[..., Any]:
        """The plain class's own method, unbound."""
        return getattr(self.plain_class, name)  # type: ignore[no-any-return]

    def normalized(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call spelled one way, positional first, so that equal calls share a program."""
        try:
            bound = inspect.signature(self.method(name)).bind(None, *args, **kwargs)
        except (TypeError, ValueError):
            return args, kwargs  # the model itself says what is wrong with the call
        return bound.args[1:], bound.kwargs

    def key(self, name: str, model: nn.Module, leaves: list[Any], structure: Structure, *, batch: bool) -> Any:
        """What a recording depends on: modes, structure, shapes (the batch size only if it is fixed), dtypes."""
        first = next(model.parameters(), None)
        first_dim = 0 if batch else 1
        kinds = tuple((isinstance(x, RandomVariable), tuple(x.shape)[first_dim:], x.ndim, x.dtype, x.device) for x in leaves)
        training = tuple((m.training, bool(m._forward_hooks), bool(m._forward_pre_hooks)) for m in model.modules())
        weights = None if first is None else (first.dtype, first.device)
        return (name, batch, structure.signature(), kinds, training, weights)

    def find(self, name: str, model: nn.Module, leaves: list[Any], structure: Structure) -> Program | None:
        """The program that serves this call, if there is one already."""
        for batch in (False, True):
            program = self.programs.get(self.key(name, model, leaves, structure, batch=batch))
            if program is not None:
                return program
        return None

    # --- preparing ------------------------------------------------------------------------------

    def prepare(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program:
        """Capture the method for this kind of call, by the engine that can; refuse what neither can.

        Raises:
            UnsupportedOperationError: one or more operations have no rule (all are listed).
            NoReparameterizationError, NonGaussianError, TracingError: see each.
        """
        args, kwargs = self.normalized(name, args, kwargs)
        leaves, structure = flatten((args, kwargs))
        examined = self.examine(name, model, args, kwargs)
        if examined.refusal is not None and not self.samples_in_other_mode(examined.refusal, name, model, args, kwargs):
            raise examined.refusal
        refuse_unsupported(examined.report)
        recording = examined.recording
        if recording is None and self.settings.covariance == "calibrated":
            raise TracingError(f"covariance='calibrated' needs a graph, and there is none ({examined.report.reason})")
        if recording is None:
            program = Program(None, Structure("constant"), (), examined.report, False)
        else:
            calibrated = self.options.settings.covariance == "calibrated"
            gains = gain_keys(recording, name, self.options.settings) if calibrated else None
            graph, notes = to_random_variables(recording, output=self.options.output, penalised=True, gains=gains)
            report = dataclasses.replace(examined.report, notes=(*examined.report.notes, *notes))
            program = Program(compile_graph(graph), recording.outputs, tuple(recording.attributes), report, bool(recording.fixed))
        self.programs[self.key(name, model, leaves, structure, batch=program.fixed_batch)] = program
        return program

    def samples_in_other_mode(self, refusal: ConversionError, name: str, model: nn.Module, args: Any, kwargs: Any) -> bool:
        """True where the method draws nothing in this mode but does in the other (``if self.training: ...``)."""
        if not isinstance(refusal, NoReparameterizationError):
            return False
        if any(key[0] == name for key in self.programs):
            return True
        for other in each_mode(model):
            if other:
                try:
                    return self.examine(name, model, args, kwargs).refusal is None
                except Exception:
                    return False
        return False

    def examine(self, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Examined:
        """Choose the engine and plan the method; refuses nothing, but says what must be refused."""
        model_name, engine = self.plain_class.__name__, self.options.engine
        reason = "asked for"
        if engine != "dispatch":
            recording, obstacles = self.recorded(name, model, args, kwargs)
            if recording is not None:
                report = report_graph(recording, model_name, name, self.settings)
                random_call = any(isinstance(x, RandomVariable) for x in flatten((args, kwargs))[0])
                return Examined(recording, report).refused(self.noise_refusal(recording, name, random_call))
            reason = "; ".join(dict.fromkeys(obstacles))
            if engine == "graph":
                refusal = TracingError(
                    f"{model_name}.{name} cannot stand as a graph: {reason}. "
                    "Use engine='auto' or engine='dispatch', which runs the model's own Python."
                )
                return Examined(None, dispatch_report((), model_name, name, reason)).refused(refusal)
            reason = f"no graph: {reason}"
        try:
            rows = dispatch.survey(self, self.method(name), model, args, kwargs)
        except ConversionError as refusal:
            return Examined(None, dispatch_report((), model_name, name, reason)).refused(refusal)
        return Examined(None, dispatch_report(rows, model_name, name, reason))

    def examine_symbolically(self, name: str, model: nn.Module) -> Report:
        """The plan of a method without example inputs, as far as proxies carry."""
        with as_class(model, self.plain_class):
            recording = trace_symbolically(model, name, self.settings.registry, self.options.random_inputs)
        if recording is None:
            note = "its Python needs real values: pass example_inputs=(x,) for a plan"
            return Report(self.plain_class.__name__, name, "not chosen yet", "chosen at the first call", (), (note,))
        report = report_graph(recording, self.plain_class.__name__, name, self.settings)
        report = dataclasses.replace(report, reason="traced symbolically; recorded at the first call")
        return Examined(recording, report).refused(self.noise_refusal(recording, name, False)).report

    def refuse_early(self, name: str, model: nn.Module) -> None:
        """Refuse now what a symbolic trace shows to be impossible; the rest is decided at the first call."""
        refusals = []
        for _ in each_mode(model):
            with as_class(model, self.plain_class):
                recording = trace_symbolically(model, name, self.settings.registry, self.options.random_inputs)
            if recording is None:
                return
            refusals.append(self.noise_refusal(recording, name, False))
            refuse_unsupported(report_graph(recording, self.plain_class.__name__, name, self.settings))
        for refusal in refusals:  # one mode that samples is enough
            if refusal is not None and (all(refusals) or not isinstance(refusal, NoReparameterizationError)):
                raise refusal

    def recorded(self, name: str, model: nn.Module, args: Any, kwargs: Any) -> tuple[Recording | None, list[str]]:
        """A recording that replays equal to eager, or the obstacles to one."""
        method = self.method(name)
        with as_class(model, self.plain_class):
            recording, _ = record(model, lambda *a, **k: method(model, *a, **k), args, kwargs, self.settings.registry)
            if recording.obstacles:
                return None, recording.obstacles
            if recording.asks_grad_mode and not self.same_without_gradients(recording, model, method, args, kwargs):
                return None, ["Python decides by torch.is_grad_enabled()"]
            if recording.changed and state_matters(model, method, args, kwargs):
                return None, [f"the method changes {', '.join(dict.fromkeys(recording.changed))}, which the next call reads"]
            vars(self.constants).update(recording.constants)
            written = str(recording.graph)
            if not recording.constants and self.checked.get((name, written)) is not None:
                recording.fixed += self.checked[name, written]  # as in the other mode, where it was compared
                return recording, []
            obstacle = replay_differs(recording, model, method, args, kwargs)
            if obstacle is None:
                self.checked[name, written] = recording.fixed
        return (None, [obstacle]) if obstacle else (recording, [])

    def same_without_gradients(self, recording: Recording, model: nn.Module, method: Any, args: Any, kwargs: Any) -> bool:
        """True if the method does the same where it is told that gradients are off."""
        registry = self.settings.registry
        told, _ = record(model, lambda *a, **k: method(model, *a, **k), args, kwargs, registry, grad_mode=False)
        return not recording.constants and not told.obstacles and str(told.graph) == str(recording.graph)

    def noise_refusal(self, recording: Recording, name: str, random_call: bool) -> ConversionError | None:
        """Why a model is refused whose output depends on no Gaussian noise, or on noise of another distribution."""
        label = f"{self.plain_class.__name__}.{name}"
        if recording.non_gaussian:
            found = "\n".join(f"  {distribution}: {where}" for distribution, where in recording.non_gaussian)
            return NonGaussianError(
                f"{label} draws from a distribution other than a Gaussian, which mean and variance cannot stand for:\n"
                f"{found}\nConvert only a part of the model that does not: "
                "rvconvert.convert(model.decoder, random_inputs=('z',))"
            )
        output = next(n for n in recording.graph.nodes if n.op == "output")
        if random_call or self.options.random_inputs or any(n in recording.random for n in output.all_input_nodes):
            return None
        reason = "no draw from a Gaussian was found in it"
        if recording.noise:
            places = ", ".join(str(n.meta["where"]) for n in recording.noise)
            reason = f"the draw at {places} does not reach its result"
        elif discrete := [str(n.meta["where"]) for n in recording.graph.nodes if n.target in _CHOICES]:
            reason += f"; it picks by argmin or argmax, as vector quantization does, at {discrete[0]}"
        functions = [m for m in vars(self.plain_class) if inspect.isfunction(getattr(self.plain_class, m))]
        others = [m for m in functions if m[0] != "_" and m != name]
        return NoReparameterizationError(
            f"{label}: nothing to convert, {reason}. Name the method that encodes, samples and decodes, methods=(...), "
            f"of {', '.join(others) or 'none but this one'}; or, for a bare decoder, its latent argument: random_inputs=('z',)"
        )


_CHOICES = ("argmin", "argmax", torch.argmin, torch.argmax)


@dataclasses.dataclass(frozen=True)
class Examined:
    """A method's recording (None: the dispatch engine serves it), its report, and why it is refused, if it is."""

    recording: Recording | None
    report: Report
    refusal: ConversionError | None = None

    def refused(self, refusal: ConversionError | None) -> Examined:
        """The same with a refusal, in the report too."""
        if refusal is None:
            return self
        return Examined(self.recording, dataclasses.replace(self.report, refusal=str(refusal)), refusal)


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


def state_matters(model: nn.Module, method: Any, args: Any, kwargs: Any) -> bool:
    """True if a call before this one changes what this one gives: what the method keeps is read again."""
    leaves, structure = plain_leaves(args, kwargs)

    def call(inputs: list[torch.Tensor]) -> list[Any]:
        torch.manual_seed(3)
        a, k = structure.build(iter(x.clone() for x in inputs))
        return flatten(method(model, *a, **k), lambda x: isinstance(x, torch.Tensor))[0]

    results = []
    for before in (False, True):
        with unchanged(model):
            if before:
                call(leaves)
            try:
                results.append(call(other_values(leaves)))
            except Exception:
                return True
    return not all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def replay_differs(recording: Recording, model: nn.Module, method: Any, args: Any, kwargs: Any) -> str | None:
    """Run the plain graph beside the model on other inputs, another seed and another batch size.

    Returns what is different, or None. Where only the other batch size is at fault, it is marked as fixed.
    """
    run = compile_graph(recording.graph)
    leaves, structure = plain_leaves(args, kwargs)
    other = other_values(leaves)

    def results(call: Callable[..., Any], inputs: list[torch.Tensor]) -> list[Any]:
        with unchanged(model), torch.enable_grad():
            torch.manual_seed(1)
            return [x for x in call(*(x.clone() for x in inputs)) if isinstance(x, torch.Tensor)]

    def eager(*inputs: torch.Tensor) -> list[Any]:
        a, k = structure.build(iter(inputs))
        return flatten(method(model, *a, **k), lambda x: isinstance(x, torch.Tensor))[0]

    def replayed(*inputs: torch.Tensor) -> tuple[Any, ...]:
        outputs = run(model, *inputs)
        return outputs[: len(outputs) - len(recording.attributes)]

    def compare(inputs: list[torch.Tensor]) -> str | None:
        expected = results(eager, inputs)
        try:
            found = results(replayed, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        for a, b in zip(expected, found, strict=False):
            if a.shape != b.shape:
                return f"an output of shape {tuple(b.shape)} instead of {tuple(a.shape)}"
            if not a.is_meta and not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
                return f"an output differs by {(a - b).abs().max().item():.2g}"
        return None

    smaller = None
    batch = {x.shape[0] for x in leaves if x.ndim}
    if batch == {1}:
        recording.fixed.append("the example is a batch of one")
    elif not recording.fixed and len(batch) == 1:
        try:  # other values and another batch size at once
            smaller = compare([x[: (x.shape[0] + 1) // 2] if x.ndim else x for x in other])
        except Exception as error:  # the model itself takes no such batch
            smaller = f"{type(error).__name__}: {error}"
        if smaller is None:
            return None
    try:
        difference = compare(other)
    except Exception:
        difference = compare(leaves)
    if difference is not None:
        return f"the recorded graph does not replay equal to the model ({difference})"
    if smaller is not None:
        recording.fixed.append(f"another batch size gives {smaller}")
    return None
