"""``calibrate``: measure the gains of ``covariance="calibrated"`` on data, and how training renews them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.capture.module_state import unchanged
from rvconvert.core.random_variable import random_variables
from rvconvert.core.tree import flatten
from rvconvert.covariance.calibrated import FLOOR, Gain
from rvconvert.errors import ConversionError

if TYPE_CHECKING:
    from rvconvert.conversion import Conversion

__all__ = ["CalibratedOperation", "Calibration", "calibrate", "renew"]

TRAINING_PAIRS, EVALUATION_PAIRS = 2, 8
_SMOOTHING = 0.5  # how far, in logs, training gains go towards a new measurement
_CHUNK = 64  # images measured at once
_TRAINING_IMAGES = 64  # of a batch, at most, that a renewal in training runs


@dataclasses.dataclass(frozen=True)
class CalibratedOperation:
    """One operation's gain.

    Attributes:
        module, operation: path of the module, and the operation in it.
        gain: true variance over what arrives propagated with the gains before it applied.
        before: variance of the independent mode over the true one, summed over samples and elements; ``after``: of the
            calibrated mode.
        standard_error: of ``after``, from the spread between samples.
        floored: share of elements whose propagated variance is below what a gain can lift.
    """

    module: str
    operation: str
    gain: float
    before: float
    after: float
    standard_error: float
    floored: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` measured: one row an operation, in order.

    Attributes:
        model: class of the model; ``samples``: how many were measured; ``pairs``: antithetic pairs for each.
        rows: the operations.
    """

    model: str
    samples: int
    pairs: int
    rows: tuple[CalibratedOperation, ...]

    def __iter__(self) -> Iterator[CalibratedOperation]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from rvconvert.render import table, to_text

        columns = ("module", "operation", "gain", "ratio before", "ratio after", "±")
        cells = [
            (r.module, r.operation, f"{r.gain:.3g}", f"{r.before:.3g}", f"{r.after:.3f}", f"{r.standard_error:.1g}") for r in self
        ]
        title = f"{self.model}: {self.samples} samples, {self.pairs} pairs of paths each"
        lines = [to_text(table(columns, cells, title=title, numeric=columns[2:]))]
        lines.append("ratio: propagated / true variance, independent (before) and calibrated (after) mode")
        for row in self:
            if row.floored > 0:
                share = f"{100 * row.floored:.2g} %"
                lines.append(f"{row.operation} in {row.module}: {share} of the variances are below {FLOOR:g} and are not lifted")
        return "\n".join(lines)


def calibrate(
    rv_model: nn.Module, data: Any, *, method: str | None = None, pairs: int = 32, images: int = 256, seed: int = 0
) -> Calibration:
    """Measure the gains of a model in calibrated mode, in eval mode, against Monte Carlo through its plain functions.

    Args:
        rv_model: what ``convert(..., covariance="calibrated")`` returned, trained. Its gains change, nothing else.
        data: a batch, as a tensor or a tuple of the converted method's arguments, or an iterable of such (a DataLoader);
            what else a DataLoader's batches hold (labels) is left out where the method takes one argument only.
        method: the converted method; default the first one. Each has gains of its own.
        pairs: antithetic pairs of paths for each sample; each costs two runs of the plain model.
        images: stop after so many samples.
        seed: of the draws.

    Returns:
        The gains by operation; prints as a table.

    Raises:
        ConversionError: the model is not in calibrated mode, or there is no data.
    """
    conversion = rv_model.__dict__.get("_rvconvert")
    if conversion is None:
        raise ConversionError(f"calibrate takes a model that rvconvert.convert returned, not a plain {type(rv_model).__name__}")
    if conversion.settings.covariance != "calibrated":
        raise ConversionError(
            f"a model in covariance={conversion.settings.covariance!r} has no gains to calibrate; convert with "
            "covariance='calibrated'"
        )
    if pairs < 1 or images < 1:
        raise ConversionError(f"calibrate needs pairs and images of 1 or more, not {pairs} and {images}")
    from rvconvert.render import progress

    name, gains, seen = conversion.chosen(method), conversion.gains, 0
    modes = {module: module.training for module in rv_model.modules()}
    before = dict(gains.evaluation)
    nn.Module.eval(rv_model)
    gains.start("evaluation")
    try:
        with progress() as bar:
            task = bar.add_task("calibrating", total=images, note="")
            for args in _batches(data, conversion, name):
                size = _size(args)
                args = _part(args, 0, images - seen)
                for chunk in _chunks(args):
                    measure(conversion, name, rv_model, chunk, {}, pairs, seed + seen)
                    seen += _size(chunk)
                    bar.update(task, advance=_size(chunk))
                if seen >= images or size == 0:
                    break
        if not seen:
            raise ConversionError("calibrate: the data is empty, or there is no tensor in its first batch")
        gains.evaluation = {**before, **gains.fresh}
        gains.stale = False
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Calibration(conversion.plain_class.__name__, seen, pairs, tuple(_rows(conversion)))


def _rows(conversion: Conversion) -> Iterator[CalibratedOperation]:
    gains = conversion.gains
    for key, made in gains.measured.items():
        true, arriving, after = (float(torch.cat(x).sum()) for x in (made.true, made.before, made.after))
        _, module, operation, _ = key.split("/")
        scale = true if true > 0 else math.nan
        yield CalibratedOperation(
            module, operation, true / arriving if arriving > 0 else math.nan, gains.independent(key) / scale, after / scale,
            made.standard_error(), made.floored,
        )  # fmt: skip


def _batches(data: Any, conversion: Conversion, name: str) -> Iterable[tuple[Any, ...]]:
    """The data as calls of the converted method."""
    if isinstance(data, (tuple, torch.Tensor)):
        return (data if isinstance(data, tuple) else (data,),)
    if not isinstance(data, Iterable):
        raise ConversionError(f"calibrate takes a tensor, a tuple of arguments or a DataLoader, not {type(data).__name__}")
    return (_call(batch, conversion, name) for batch in data)


def _call(batch: Any, conversion: Conversion, name: str) -> tuple[Any, ...]:
    if isinstance(batch, Mapping):
        keys = ", ".join(map(repr, batch))
        raise ConversionError(
            f"calibrate: a batch is a {type(batch).__name__} of {keys}; give what {name} takes: "
            f"rvconvert.calibrate(model, (batch[{next(iter(batch), 'image')!r}] for batch in loader))"
        )
    args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    taken = list(conversion.signature(name).parameters.values())[1:]
    if any(p.kind is p.VAR_POSITIONAL for p in taken):
        return args
    needed = [p for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return args[: max(len(needed), 1)]


def _size(args: tuple[Any, ...]) -> int:
    """How many samples a call has: as long as its first tensor, in a dict or a list too."""
    return next((len(x) for x in flatten(args)[0] if len(x.shape)), 0)


def _is_graph(args: tuple[Any, ...]) -> bool:
    """A number for each pair of samples, edges of a graph, is among the arguments: there is no part of them."""
    size = _size(args)
    of_samples = [x for x in flatten(args)[0] if len(x.shape) and len(x) == size]
    return len(of_samples) > 1 and any(x.layout != torch.strided or x.shape[1:2] == (size,) for x in of_samples)


def _part(args: tuple[Any, ...], start: int, end: int) -> tuple[Any, ...]:
    """The call with some of its samples."""
    size = _size(args)
    leaves, structure = flatten(args)
    if _is_graph(args):
        return args
    made: tuple[Any, ...] = structure.build(iter([x[start:end] if len(x.shape) and len(x) == size else x for x in leaves]))
    return made


def _chunks(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    size = _size(args)
    count = 1 if _is_graph(args) else max(1, math.ceil(size / _CHUNK))
    step = math.ceil(size / count) if size else 1
    for start in range(0, size, step):
        yield _part(args, start, start + step)


# --- measuring --------------------------------------------------------------------------------------


def measure(
    conversion: Conversion, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: int, seed: int
) -> None:
    """Add one batch to the measurement under way; the model, its penalty and the random state stay as they were."""
    gains, own = conversion.gains, conversion.settings
    last_penalty = conversion.last_penalty
    recorded = conversion.ready(name, model, args, kwargs)
    # The model's own code may ask for gradients, or draw only where there are any.
    with (
        torch.set_grad_enabled(recorded and torch.is_grad_enabled()),
        unchanged(model, model.parameters()),
        conversion.aside(),
        _in_phases(conversion),
    ):
        # Paths have a generator of their own: what is drawn and is no latent, a mask, is the same in each phase.
        sampled = dataclasses.replace(own, covariance="sampled", pairs=pairs, seed=seed)
        for phase in ("truth", "independent", "fit") if gains.mode == "evaluation" else ("truth", "fit"):
            torch.manual_seed(seed)
            conversion.settings = sampled if phase == "truth" else own
            gains.phase(phase)
            conversion.run(name, model, args, kwargs)
    conversion.last_penalty = last_penalty


@contextlib.contextmanager
def _in_phases(conversion: Conversion) -> Iterator[None]:
    """Within: phases may be entered; after, gains are applied again, whatever happened."""
    own = conversion.settings
    try:
        yield
    finally:
        conversion.settings = own
        conversion.gains.phase("apply")


def renew(conversion: Conversion, name: str, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a call: count a training step, and measure where gains are due, on the batch at hand."""
    gains, every = conversion.gains, conversion.options.recalibrate
    if gains.busy or torch.compiler.is_compiling():
        return
    if conversion.options.random_inputs and not random_variables(args, kwargs):  # a decoder of the prior's samples
        return
    mode = "training" if model.training else "evaluation"
    calibrated_only = not every and not gains.has(mode, name)  # and left in train mode
    gains.use("evaluation" if calibrated_only else mode)
    if not every:
        return
    evaluates = mode == "evaluation"
    if evaluates or not torch.is_grad_enabled():
        if (evaluates and gains.stale) or not gains.has(mode, name):
            gains.start(mode)
            measure(conversion, name, model, args, kwargs, EVALUATION_PAIRS, 0)
            setattr(gains, mode, {**gains.of(mode), **gains.fresh})
            gains.stale = gains.stale and not evaluates
    else:
        due = gains.is_due(name, every)
        if due:
            gains.renewed[name] = gains.steps
        gains.steps += 1
        gains.stale = True
        if due:
            gains.start(mode)
            args, kwargs = _part((args, kwargs), 0, _TRAINING_IMAGES)
            measure(conversion, name, model, args, kwargs, TRAINING_PAIRS, gains.steps)
            fresh = _shared(gains.fresh)
            old = gains.training
            gains.training = {**old, **{k: old[k].towards(g, _SMOOTHING) if k in old else g for k, g in fresh.items()}}


def _shared(fresh: dict[str, Gain]) -> dict[str, Gain]:
    """The gains as the mean over all processes that train together, in logs."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1 and fresh):
        return fresh
    flat = torch.cat([gain.offset.flatten() for gain in fresh.values()])
    distributed.all_reduce(flat)
    flat = flat / distributed.get_world_size()
    parts = flat.split([gain.offset.numel() for gain in fresh.values()])
    return {key: Gain(part.view_as(gain.offset)) for (key, gain), part in zip(fresh.items(), parts, strict=True)}
