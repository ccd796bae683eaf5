"""``verify``: the propagated moments held against Monte Carlo, operation by operation.

Two questions are asked of each random operation. Truth: do its moments agree with many runs of the whole plain model?
Local: given the moments of its own inputs, independent and Gaussian, is its rule right? A rule can be right and the truth
be lost all the same, by what the rules assume of their inputs together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from rvconvert.calibration import renew
from rvconvert.capture import intercept
from rvconvert.capture.module_state import unchanged
from rvconvert.converted import conversion_of, plain_copy, reconverted
from rvconvert.core.random_variable import RandomVariable, Settings
from rvconvert.core.tree import flatten
from rvconvert.covariance.calibrated import calibrated, level_of
from rvconvert.errors import ConversionError
from rvconvert.examination import Examination, Examined
from rvconvert.program.gains import gain_keys
from rvconvert.program.plan import node_row
from rvconvert.rules.calls import substitute, unique
from rvconvert.rules.kinds import Elementwise
from rvconvert.rules.noise import all_entering, nth_source

if TYPE_CHECKING:
    from pathlib import Path

    from rvconvert.capture.recording import Recording
    from rvconvert.conversion import Conversion
    from rvconvert.options import Options

__all__ = ["OutputVariances", "Verification", "VerifiedNode", "output_variances", "truth_ratio", "verify"]

# How far a local ratio of variances may be from 1, beyond four standard errors.
_TOLERANCE = {"exact": 0.01, "exact_if_independent": 0.01, "moment_matched": 0.02, "approximate": 0.25}
_LOCAL_SAMPLES = 400


@dataclasses.dataclass(frozen=True)
class VerifiedNode:
    """One random operation, propagated against Monte Carlo.

    Attributes:
        name: its name in the graph; ``operation``, ``module``, ``where``: as in a report.
        output: True if the model returns it.
        true_var: Monte Carlo variance, summed over elements, in squared units of the value.
        standard_error: of ``true_var``, relative to it.
        ratio: for each mode, the propagated variance, summed, over ``true_var``.
        shift: for each mode, the root mean square error of the mean over that of the true standard deviation. The
            Monte Carlo mean itself is uncertain by 1/sqrt(samples).
        inputs: names of the random operations that feed it.
        exactness: what its rule declares.
        local_ratio: the rule's variance over that of Monte Carlo with independent Gaussian inputs of the propagated
            moments; None where there is no such question (a source, or several functions of one variable).
        local_error: standard error of ``local_ratio``.
        local_shift: as ``shift``, for the local question.
    """

    name: str
    operation: str
    module: str
    where: str
    output: bool
    true_var: float
    standard_error: float
    ratio: dict[str, float]
    shift: dict[str, float]
    inputs: tuple[str, ...] = ()
    exactness: str = ""
    local_ratio: float | None = None
    local_error: float | None = None
    local_shift: float | None = None

    def interval(self, mode: str) -> tuple[float, float]:
        """95 % confidence bounds of ``ratio[mode]``, from the Monte Carlo error of the true variance."""
        error, ratio = 1.96 * self.standard_error, self.ratio[mode]
        if math.isnan(error):
            return math.nan, math.nan
        return ratio / (1 + error), ratio / (1 - error) if error < 1 else math.inf

    @property
    def holds(self) -> bool | None:
        """Whether the rule keeps what its exactness declares, within the standard error; None where it is not asked."""
        if self.local_ratio is None or self.local_error is None:
            return None
        return abs(self.local_ratio - 1) <= _TOLERANCE.get(self.exactness, 0.25) + 4 * self.local_error


@dataclasses.dataclass(frozen=True)
class Verification:
    """What ``verify`` found: one row a random operation, in order.

    Attributes:
        model, method: what was verified; ``samples``: Monte Carlo runs; ``modes``: covariance modes compared.
        rows: the operations.
    """

    model: str
    method: str
    samples: int
    modes: tuple[str, ...]
    rows: tuple[VerifiedNode, ...]

    @property
    def outputs(self) -> tuple[VerifiedNode, ...]:
        """The rows that the model returns."""
        return tuple(row for row in self.rows if row.output)

    def ratio(self, mode: str) -> float:
        """Propagated over true variance of the last random output, the reconstruction."""
        return (self.outputs or self.rows)[-1].ratio[mode]

    def worst(self, mode: str) -> VerifiedNode | None:
        """The operation whose variance is the furthest from the true one, in either direction, beyond its confidence bounds."""

        def distance(row: VerifiedNode) -> float:
            low, high = row.interval(mode)
            if not (low > 0 and math.isfinite(high)):
                return 0.0
            return max(math.log(low), -math.log(high), 0.0)

        rows = [row for row in self.rows if distance(row) > 0]
        return max(rows, key=distance) if rows else None

    def ranked(self, mode: str) -> list[tuple[float, VerifiedNode]]:
        """Operations by what they do to the ratio of variances: (ratio after / least ratio before, row), worst first."""
        by_name = {row.name: row for row in self.rows}
        found = []
        for row in self.rows:
            before = [by_name[name].ratio[mode] for name in row.inputs if name in by_name]
            if before and min(before) > 0 and math.isfinite(row.ratio[mode]):
                found.append((row.ratio[mode] / min(before), row))
        return sorted(found, key=lambda pair: pair[0])

    def summary(self, mode: str) -> str:
        """One line: how much of the true variance this mode reports, and which operation is most to blame.

        Blamed is the worst loss, or the worst overstatement where more than the true variance arrives at the output.
        """
        total, ranked = self.ratio(mode), self.ranked(mode)
        low, high = (self.outputs or self.rows)[-1].interval(mode)
        line = f"{mode}: the propagated variance of the output is {total:.3g} of the true one (95 %: {low:.3g} to {high:.3g})"
        if mode == "calibrated":
            return line + self._worst_text(mode)
        if not ranked or (0.8 < total < 1.25 and ranked[0][0] > 0.8):
            return line + "."
        change, row = ranked[-1] if total >= 1.25 else ranked[0]
        where = _where(row)
        if total >= 1.25:
            return line + f"; most is overstated at {where}, by a factor of {change:.3g}."
        return line + f"; most is lost at {where}, which keeps {change:.3g} of what reaches it."

    def _worst_text(self, mode: str) -> str:
        row = self.worst(mode)
        if row is None:
            return "; it is within the error of Monte Carlo at every operation."
        low, high = row.interval(mode)
        return f"; calibration is worst at {_where(row)}: {row.ratio[mode]:.3g} ({low:.3g} to {high:.3g})."

    @property
    def broken(self) -> tuple[VerifiedNode, ...]:
        """Rows whose rule does not keep what it declares."""
        return tuple(row for row in self.rows if row.holds is False)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, for ``--json``."""
        data = {**dataclasses.asdict(self), "summary": {mode: self.summary(mode) for mode in self.modes}}
        for row, each in zip(self.rows, data["rows"], strict=True):
            each["interval"] = {mode: row.interval(mode) for mode in self.modes}
        return data

    def __iter__(self) -> Iterator[VerifiedNode]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        from rvconvert.render import table, to_text

        columns = ["module", "operation", "true var", "± %"]
        columns += [f"{mode} {what}" for mode in self.modes for what in ("ratio", "shift")] + ["rule alone"]
        cells = [
            [
                row.module,
                row.operation + (" (output)" if row.output else ""),
                f"{row.true_var:.3g}",
                f"{100 * row.standard_error:.1f}",
                *(f"{value[mode]:.3g}" for mode in self.modes for value in (row.ratio, row.shift)),
                _local_text(row),
            ]
            for row in self.rows
        ]
        made = table(columns, cells, title=f"{self.model}.{self.method}, {self.samples} runs", numeric=columns[2:])
        lines = [to_text(made), *(self.summary(mode) for mode in self.modes)]
        lines.append(
            "ratio: propagated / true variance. shift: error of the mean in true standard deviations, "
            f"± {1 / math.sqrt(self.samples):.2g}. rule alone: its variance / Monte Carlo's from its own inputs' moments."
        )
        lines += [f"{row.operation} in {row.module or 'the model itself'} is not {row.exactness} here" for row in self.broken]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Write a picture of the ratio of variances over depth, a line for each mode (needs matplotlib).

        Raises:
            ConversionError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConversionError("a plot needs matplotlib: pip install 'rvconvert[plot]'") from error
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot()
        depth = range(1, len(self.rows) + 1)
        axes.axhline(1, color="0.6", linewidth=1)
        for mode in self.modes:
            ratios = [row.ratio[mode] if row.ratio[mode] > 0 else math.nan for row in self.rows]
            axes.plot(depth, ratios, marker="o", markersize=3.5, label=mode)
        axes.set_yscale("log")
        axes.set_ylabel("propagated / true variance")
        labels = [f"{row.module} {row.operation}".strip() for row in self.rows]
        axes.set_xticks(list(depth), labels, rotation=60, ha="right", fontsize=7)
        axes.set_title(f"{self.model}: what each mode keeps of the variance, operation by operation", fontsize=10)
        axes.legend()
        figure.savefig(path, dpi=150)


def _where(row: VerifiedNode) -> str:
    return " ".join(part for part in (row.module, row.operation, f"({row.where})" if row.where else "") if part)


def _local_text(row: VerifiedNode) -> str:
    if row.local_ratio is None:
        return ""
    return f"{row.local_ratio:.3g}" + ("" if row.holds else " !")


# --- running a recording ------------------------------------------------------------------------


Visit = Callable[[fx.Node, Any, tuple[Any, ...], dict[str, Any]], None]


def _walk(
    recording: Recording,
    latents: Sequence[fx.Node],
    model: nn.Module,
    leaves: Sequence[Any],
    settings: Settings | None,
    visit: Visit,
    gains: Callable[[fx.Node, Any], Any] | None = None,
) -> None:
    """Run the recording, plainly (``settings`` None) or with random variables; values are dropped after their last use.

    ``visit(node, value, args, kwargs)`` is called at each node that computes something, ``gains(node, value)`` before it.
    """
    remaining = {node: len(node.users) for node in recording.graph.nodes}
    values: dict[fx.Node, Any] = {}
    inputs = iter(leaves)
    noise = {node: index for index, node in enumerate(latents)}
    for node in recording.graph.nodes:
        args = fx.node.map_arg(node.args, values.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
        if node.op == "output":
            return
        if node.op == "placeholder":
            value = next(inputs)
        elif node.op == "get_attr":
            value = _attribute(node.target, recording, model, settings)
        elif node in noise and settings is not None:
            value = node.meta["draw"].random_variable(*args, **kwargs, settings=nth_source(settings, noise[node]))
        elif node.op == "call_module":
            value = model.get_submodule(node.target)(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)
        if node.op not in ("placeholder", "get_attr"):
            if gains is not None:
                value = gains(node, value)
            visit(node, value, args, kwargs)
        if node.users:
            values[node] = value
        for source in node.all_input_nodes:
            remaining[source] -= 1
            if not remaining[source]:
                values.pop(source, None)


def _attribute(path: str, recording: Recording, model: nn.Module, settings: Settings | None) -> Any:
    own, _, rest = path.partition(".")
    if own == "_rvconvert":
        kind, _, name = rest.partition(".")
        return recording.constants[name] if kind == "constants" else settings or Settings()
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name)
    return value


class _Spread:
    """Mean and variance of each element over runs (Welford), and the variance of their total squared deviation."""

    def __init__(self, centre: Tensor) -> None:
        self.n = 0
        self.centre = centre.detach().double()
        self.mean = torch.zeros_like(self.centre)
        self.squares = torch.zeros_like(self.centre)
        self.totals: list[float] = []

    def add(self, value: Tensor) -> None:
        value = value.detach().double()
        self.n += 1
        deviation = value - self.mean
        self.mean += deviation / self.n
        self.squares += deviation * (value - self.mean)
        self.totals.append(float((value - self.centre).square().sum()))

    @property
    def var(self) -> float:
        return float(self.squares.sum()) / max(self.n - 1, 1)

    @property
    def relative_error(self) -> float:
        """Standard error of ``var``, relative to it."""
        spread = torch.tensor(self.totals, dtype=torch.float64).std() / math.sqrt(self.n)
        return float(spread) / self.var if self.var > 0 else math.nan

    def shift(self, mean: Tensor) -> float:
        return float((mean.double() - self.mean).norm()) / math.sqrt(self.var) if self.var > 0 else math.nan


@dataclasses.dataclass
class _Moments:
    """Moments of one node in one mode; in the first also the local question."""

    mean: Tensor
    var: float
    local: _Spread | None = None


def verify(
    rv_model: nn.Module,
    *inputs: Any,
    samples: int = 1000,
    modes: Sequence[str] | None = None,
    seed: int = 0,
    method: str | None = None,
    **kwargs: Any,
) -> Verification:
    """Hold a converted model's moments against Monte Carlo, operation by operation, in eval mode.

    Args:
        rv_model: what ``convert`` returned; it is left as it was.
        inputs, kwargs: of the converted method, a batch of real ones, or a tuple of them as ``calibrate`` takes it; a random
            input as ``RandomVariable(mean, var)``.
        samples: Monte Carlo runs of the plain model.
        modes: covariance modes to compare; default independent, calibrated if that is the model's own, and lowrank.
        seed: of the Monte Carlo draws.
        method: the converted method; default the first one.

    Returns:
        Rows, one for each random operation (for a model without a graph, one for each output); prints as a table.

    Raises:
        ConversionError: the model was not converted, or ``modes`` has ``"calibrated"`` and the model is in another mode.
    """
    conversion = conversion_of(rv_model)
    name = method or conversion.options.methods[0]
    own = conversion.settings.covariance == "calibrated"
    if modes is None:
        modes = ("independent", "calibrated", "lowrank") if own else ("independent", "lowrank")
    if "calibrated" in modes and not own:
        raise ConversionError("a model has gains to verify only if it was converted with covariance='calibrated'")
    training = {module: module.training for module in rv_model.modules()}
    rv_model.eval()
    try:
        with torch.no_grad(), unchanged(rv_model, rv_model.parameters()):
            args, kwargs = conversion.normalized(name, _given(inputs), kwargs)
            torch.manual_seed(seed)
            with intercept.lock, intercept.plainly():
                examined = Examination(conversion, name, rv_model, args, kwargs).examine()
            leaves = flatten((args, kwargs))[0]
            if examined.refusal is not None:
                raise examined.refusal
            with conversion.aside():
                if examined.recording.once:
                    rows = _outputs_only(conversion, rv_model, name, args, kwargs, samples, modes)
                else:
                    if "calibrated" in modes:
                        renew(conversion, name, rv_model, args, kwargs)
                    rows = _node_by_node(conversion, name, examined, rv_model, leaves, samples, modes)
    finally:
        for module, mode in training.items():
            module.training = mode
    return Verification(conversion.plain_class.__name__, name, samples, tuple(modes), tuple(rows))


def _gains_of(conversion: Conversion, name: str, examined: Examined) -> Callable[[fx.Node, Any], Any]:
    """What multiplies each operation's variance in calibrated mode, as the rewritten graph does."""
    keys = gain_keys(examined.recording, examined.roles, name, conversion.settings)
    levels: list[Any] = []

    def gains(node: fx.Node, value: Any) -> Any:
        if node not in keys:
            return value
        if not levels:
            levels.append(level_of(value))
        return calibrated(conversion, keys[node], value, levels[0])

    return gains


def _node_by_node(
    conversion: Conversion,
    name: str,
    examined: Examined,
    model: nn.Module,
    leaves: list[Any],
    samples: int,
    modes: Sequence[str],
) -> list[VerifiedNode]:
    recording = examined.recording
    latents = examined.roles.latents
    found: dict[str, dict[fx.Node, _Moments]] = {}
    for mode in modes:
        settings = conversion.options.in_mode(mode).settings
        found[mode] = {}

        def propagated(node: fx.Node, value: Any, args: Any, kwargs: Any, mode: str = mode) -> None:
            if isinstance(value, RandomVariable):
                local = _local(node, value, args, kwargs, model) if mode == modes[0] else None
                found[mode][node] = _Moments(value.mean, float(value.var.double().sum()), local)

        gains = _gains_of(conversion, name, examined) if mode == "calibrated" else None
        _walk(recording, latents, model, list(all_entering(leaves, settings)), settings, propagated, gains)

    nodes = [node for node in found[modes[0]] if all(node in found[mode] for mode in modes)]
    truth = {node: _Spread(found[modes[0]][node].mean) for node in nodes}

    def drawn(node: fx.Node, value: Any, args: Any, kwargs: Any) -> None:
        if node in truth:
            truth[node].add(value)

    for _ in range(samples):
        _walk(recording, latents, model, list(_drawn(leaves)), None, drawn)

    returned = next(n for n in recording.graph.nodes if n.op == "output").all_input_nodes
    rows = []
    for node in nodes:
        spread, local = truth[node], found[modes[0]][node].local
        own = found[modes[0]][node]
        row = node_row(node, examined.roles, conversion.settings)
        rows.append(
            VerifiedNode(
                name=node.name,
                operation=row.operation,
                module=row.module,
                where=row.where,
                output=node in returned,
                true_var=spread.var,
                standard_error=spread.relative_error,
                ratio={mode: found[mode][node].var / spread.var if spread.var > 0 else math.nan for mode in modes},
                shift={mode: spread.shift(found[mode][node].mean) for mode in modes},
                inputs=tuple(n.name for n in _random_inputs(node, set(nodes))),
                exactness=row.exactness,
                local_ratio=own.var / local.var if local is not None and local.var > 0 else None,
                local_error=local.relative_error if local is not None and local.var > 0 else None,
                local_shift=local.shift(own.mean) if local is not None and local.var > 0 else None,
            )
        )
    return rows


def _drawn(leaves: Sequence[Any]) -> Iterator[Any]:
    """Inputs with a draw from each random one in its place."""
    return (x.mean + x.std * torch.randn_like(x.mean) if isinstance(x, RandomVariable) else x for x in leaves)


def _random_inputs(node: fx.Node, known: set[fx.Node]) -> list[fx.Node]:
    """The nearest verified nodes that feed ``node``, through tuples and other values that are not verified."""
    found, todo = [], list(node.all_input_nodes)
    while todo:
        source = todo.pop(0)
        if source in known:
            found.append(source)
        elif source.op != "placeholder":
            todo += source.all_input_nodes
    return list(dict.fromkeys(found))


def _local(node: fx.Node, value: RandomVariable, args: Any, kwargs: Any, model: nn.Module) -> _Spread | None:
    """Monte Carlo of one operation from independent Gaussian inputs with the moments that it was given."""
    variables = unique(args, kwargs)
    if not variables or (len(variables) > 1 and Elementwise.common_ancestor(variables) is not None):
        return None
    if any(type(x) is not RandomVariable for x in variables):
        return None
    function: Any = node.target
    if node.op == "call_module":
        function = model.get_submodule(str(node.target))
    elif node.op == "call_method":
        name = str(node.target)
        function = lambda x, *rest, **options: getattr(x, name)(*rest, **options)  # noqa: E731

    def call(draw: dict[int, Tensor]) -> Any:
        return function(*substitute(args, lambda x: draw[id(x)]), **substitute(kwargs, lambda x: draw[id(x)]))

    spread = _Spread(value.mean)
    for _ in range(_LOCAL_SAMPLES):
        result = call(dict(zip(map(id, variables), _drawn(variables), strict=True)))
        if not isinstance(result, Tensor):
            return None
        spread.add(result)
    return spread


def _in_mode(conversion: Conversion, model: nn.Module, covariance: str) -> nn.Module:
    """A copy of the converted model in another covariance mode, its outputs as distributions."""
    options = conversion.options.in_mode(covariance, output="distribution")
    return reconverted(model, options).eval()


def _outputs_only(
    conversion: Conversion, model: nn.Module, name: str, args: Any, kwargs: Any, samples: int, modes: Sequence[str]
) -> list[VerifiedNode]:
    """For a model without a graph: its random outputs alone."""
    found = {}
    for mode in modes:
        leaves = flatten(getattr(_in_mode(conversion, model, mode), name)(*args, **kwargs))[0]
        found[mode] = {i: x for i, x in enumerate(leaves) if isinstance(x, RandomVariable)}
    spreads = {i: _Spread(x.mean) for i, x in found[modes[0]].items()}
    plain = plain_copy(model).eval()
    inputs, structure = flatten((args, kwargs))
    for _ in range(samples):
        plain_args, plain_kwargs = structure.build(_drawn(inputs))
        leaves = flatten(getattr(plain, name)(*plain_args, **plain_kwargs))[0]
        for i, spread in spreads.items():
            spread.add(leaves[i])
    return [
        VerifiedNode(
            name=f"output_{i}",
            operation=f"output {i}",
            module="",
            where="",
            output=True,
            true_var=spread.var,
            standard_error=spread.relative_error,
            ratio={m: float(found[m][i].var.double().sum()) / spread.var if spread.var > 0 else math.nan for m in modes},
            shift={m: spread.shift(found[m][i].mean) for m in modes},
        )
        for i, spread in spreads.items()
    ]


# --- one figure ---------------------------------------------------------------------------------


def _given(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call, which may have come as one tuple."""
    return inputs[0] if len(inputs) == 1 and type(inputs[0]) is tuple else inputs


def truth_ratio(rv_model: nn.Module, *inputs: Any, pairs: int = 32, method: str | None = None, **kwargs: Any) -> float:
    """The true variance of the reconstruction over the one that the model's own mode propagates, in eval mode.

    The true one is estimated from ``pairs`` antithetic pairs of paths for each sample. Warns, once a model, where it is
    ten times the propagated one or more: the variance penalty then looks past most of the variance.

    Args:
        rv_model: what ``convert`` returned, trained; it is left as it was.
        inputs, kwargs: of the converted method, a batch of real ones.
        pairs: pairs of paths, each as much work as two plain runs.
        method: the converted method; default the first one.

    Raises:
        ConversionError: the model was not converted, or has no reconstruction.
    """
    found = output_variances(rv_model, *inputs, pairs=pairs, method=method, **kwargs)
    ratio = found.true / found.propagated if found.propagated else math.inf if found.true else 1.0
    if ratio >= 10:
        conversion = conversion_of(rv_model)
        mode = conversion.options.covariance
        conversion.advice.once(
            "truth",
            f"the true output variance is {ratio:.3g} times what covariance={mode!r} propagates, so the variance "
            "penalty has not seen most of it, and a reconstruction from a sample is worse than one from the mean; "
            "rvconvert.verify(model, x) says where it is lost, covariance='sampled' trains against the true one",
        )
    return ratio


@dataclasses.dataclass(frozen=True)
class OutputVariances:
    """Variances of the reconstruction, each the mean over its elements.

    Attributes:
        propagated: what the model's own mode reports; ``true``: estimated from antithetic pairs of paths.
        between: of the reconstruction's mean, between the inputs of the batch; near zero where the posterior collapsed.
    """

    propagated: float
    true: float
    between: float


def output_variances(
    rv_model: nn.Module, *inputs: Any, pairs: int = 32, method: str | None = None, **kwargs: Any
) -> OutputVariances:
    """The variance of the reconstruction as it is propagated and as it is, in eval mode; arguments as of ``truth_ratio``."""
    conversion = conversion_of(rv_model)
    options = conversion.options
    name = method or options.methods[0]
    with torch.no_grad(), unchanged(rv_model, rv_model.parameters()), conversion.aside():
        inputs = _given(inputs)
        own = _reconstructions(conversion, rv_model, options, name, inputs, kwargs)
        true = _reconstructions(conversion, rv_model, options.in_mode("sampled", pairs=pairs), name, inputs, kwargs)
    elements = sum(y.mean.numel() for y in own)
    between = sum(float(y.mean.double().var(0, correction=0).sum()) * len(y.mean) for y in own)
    return OutputVariances(_total(own) / elements, _total(true) / elements, between / elements)


def _total(variables: Sequence[RandomVariable]) -> float:
    return sum(float(y.var.double().sum()) for y in variables)


def _reconstructions(
    conversion: Conversion, model: nn.Module, options: Options, name: str, args: Any, kwargs: Any
) -> list[RandomVariable]:
    copy = reconverted(model, dataclasses.replace(options, output="mean")).eval()
    own = conversion_of(copy)
    seen: list[RandomVariable] = []

    def take(value: Any, *beside: Any) -> Any:
        if isinstance(value, RandomVariable):
            seen.append(value)
        means = tuple(own.take_mean(each) for each in (value, *beside))
        return means if beside else means[0]

    own.take_reconstruction = take  # type: ignore[method-assign]
    getattr(copy, name)(*args, **kwargs)
    if not seen:
        raise ConversionError(f"{conversion.plain_class.__name__}.{name} returns no reconstruction that depends on the noise")
    return seen
