"""``covariance="calibrated"``: independent propagation, each operation's variance times a gain that was measured.

Independence loses what neighbours share. How much it loses at an operation hardly depends on the image, so it is measured
once: truth from antithetic pairs through the plain functions, operation by operation, with the gains of those before applied.

A gain in eval mode is log-linear,

    log gain = offset + slope_var (log var - level) + slope_mean mean,

with an offset for each element of a sample (for each channel where a sample has many elements) and slopes for each channel.
``level`` is the logarithm of the sample's mean variance at the first operation: twice the posterior's deviation raises the
variance and the level alike, so that a gain measured at one width serves others. In training a gain is one number a channel,
renewed while training goes on, for what a gain hides from the optimiser the next measurement finds.

The published relative is CVP (arXiv 2606.16214): one scalar a layer, for classification.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rvconvert.core.mode import MODES
from rvconvert.core.random_variable import RandomVariable
from rvconvert.covariance.sampled import SampledVariable

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FLOOR", "Gain", "Gains", "Measurement", "calibrated", "level_of"]

FLOOR = 1e-24  # variances below it are taken as it: their logarithms and ratios would be of rounding errors
_ELEMENTS = 2**16  # a sample of more elements has an offset a channel
_IMAGES = 32  # so many samples, at least, for an offset an element
_RIDGE = 0.02  # of the slopes, in units of their standardised variables
_BEYOND = 0.7  # how far, in logs, a gain may go beyond those seen where it was measured


def _parts(value: Tensor) -> Tensor:
    """(samples, channels, places) of any shape whose first dimension is the batch."""
    if value.ndim < 2:
        return value.reshape(-1, 1, 1)
    return value.reshape(value.shape[0], value.shape[1], -1)


def _log(var: Tensor) -> Tensor:
    return var.clamp_min(FLOOR).log()


def level_of(value: Any) -> Tensor | None:
    """(samples,) logarithm of a sample's mean variance; None of what is not random."""
    if type(value) is not RandomVariable:
        return None
    return _log(_parts(value.var.float()).mean((1, 2)))


def _aligned(level: Tensor | None, logs: Tensor) -> Tensor | float:
    """The level to subtract from (samples, channels, places); the batch's mean where samples were regrouped."""
    if level is None:
        return 0.0
    return (level if len(level) == len(logs) else level.mean()).to(logs).reshape(-1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What an operation's variance is multiplied by.

    Attributes:
        offset: (channels, places) or (channels, 1), natural logarithm.
        slopes: (2, channels): of the logarithm of the relative variance, and of the mean (in 1 / its units); None: 0.
        limits: least and greatest logarithm.
    """

    offset: Tensor
    slopes: Tensor | None = None
    limits: tuple[float, float] | None = None

    def to(self, device: torch.device) -> Gain:
        """The same on another device."""
        if self.offset.device == device:
            return self
        slopes = None if self.slopes is None else self.slopes.to(device)
        return Gain(self.offset.to(device), slopes, self.limits)

    def log(self, mean: Tensor, var: Tensor, level: Tensor | None) -> Tensor:
        """(samples, channels, places) natural logarithm of the gain of these moments, or what broadcasts to it."""
        offset, slopes = self.offset.to(var), self.slopes
        channels, places = _parts(var).shape[1:]
        if offset.shape[0] != channels:  # of another size than where it was measured
            offset, slopes = offset.mean((0, 1), keepdim=True), None if slopes is None else slopes.mean(1, keepdim=True)
        elif offset.shape[1] not in (1, places):
            offset = offset.mean(1, keepdim=True)
        found = offset[None]
        if slopes is not None:
            of_var, of_mean = slopes.to(var)[:, None, :, None]
            logs = _log(_parts(var))
            found = torch.addcmul(torch.addcmul(found, logs, of_var), _parts(mean), of_mean) - of_var * _aligned(level, logs)
        return found if self.limits is None else found.clamp(*self.limits)

    def __call__(self, x: RandomVariable, level: Tensor | None) -> RandomVariable:
        """``x`` with its variance multiplied."""
        wide = x.var.float() if x.var.dtype in (torch.float16, torch.bfloat16) else x.var
        var = (_parts(wide) * self.log(x.mean.to(wide), wide, level).exp()).reshape(x.shape).to(x.var)
        # An elementwise function of another variable stays one: x * sigmoid(x) is one function of x, its gain its own.
        made = x.with_moments(x.mean, var).derived(origin=x.origin, latent=x.latent)
        return made if x.carried is None else made.carrying(x.carried)

    def towards(self, other: Gain, share: float) -> Gain:
        """The way from this gain to ``other``, in logs."""
        if self.offset.shape != other.offset.shape:
            return other
        return Gain(torch.lerp(self.offset.to(other.offset), other.offset, share))


class Measurement:
    """Sums over samples, batch after batch, out of which one operation's gain is made.

    Logarithms of true over propagated variance are regressed on the two variables of a gain, weighted by the root of the
    variance; then every offset is set so that the sum of variances is right.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.floored = 0.0
        self.sums: dict[str, Tensor] = {}
        self.true: list[Tensor] = []  # a sample each, summed over elements
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.limits: tuple[float, float] = (math.inf, -math.inf)

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @torch.inference_mode(False)  # a gain measured in inference mode serves training too
    @torch.no_grad()
    def gain_with(self, x: RandomVariable, true: Tensor, level: Tensor | None, *, slopes: bool) -> Gain:
        """The gain after this batch too."""
        mean, var, true = (_parts(each.double().nan_to_num(0, 0, 0)) for each in (x.mean, x.var, true))  # memory not yet written
        samples, channels, places = var.shape
        by_element = slopes and places * channels <= _ELEMENTS and samples >= _IMAGES
        if self.sums and (self.sums["weight"].shape[0] != channels or by_element != (self.sums["weight"].shape[1] == places)):
            by_element = False
            self.sums = {k: s if s.ndim < 2 or "product" in k else s.sum(1, keepdim=True) for k, s in self.sums.items()}
        over = (0,) if by_element else (0, 2)

        def total(value: Tensor) -> Tensor:
            return value.sum(over).reshape(channels, -1)

        self.samples += samples
        self.floored = max(self.floored, float(((var < FLOOR) & (true > FLOOR)).double().mean()))
        logs = _log(var)
        relative = logs - _aligned(level, logs)
        ratio = _log(true) - logs
        used = ((var > FLOOR) & (true > FLOOR)).double()
        weight = used * (true / true.mean((0, 2), keepdim=True).clamp_min(FLOOR)).clamp(0.01, 100).sqrt()
        variables = torch.stack((relative, mean))
        self._add("weight", total(weight))
        self._add("ratio", total(weight * ratio))
        for i, each in enumerate(variables):
            self._add(f"variable {i}", total(weight * each))
        self._add("product", torch.einsum("incp,jncp,ncp->cij", variables, variables, weight))
        self._add("product with ratio", torch.einsum("incp,ncp,ncp->ci", variables, ratio, weight))
        self._add("true", total(true))
        gain = self._regressed(slopes)
        propagated = var * gain.log(mean, var, level).exp()
        self._add("propagated", total(propagated))
        exact = (self.sums["true"] / self.sums["propagated"].clamp_min(FLOOR)).clamp_min(FLOOR).log()
        known = (self.sums["true"] > FLOOR) & (self.sums["propagated"] > FLOOR)
        gain = dataclasses.replace(gain, offset=(gain.offset + torch.where(known, exact, 0)).float())
        found = gain.log(mean, var, level)
        seen = torch.where(used > 0, found, found.mean())
        self.limits = (min(self.limits[0], float(seen.min())), max(self.limits[1], float(seen.max())))
        self.true.append(true.sum((1, 2)))
        self.before.append(var.sum((1, 2)))
        self.after.append((var * found.exp()).sum((1, 2)))
        if not slopes:
            return gain
        return dataclasses.replace(gain, limits=(self.limits[0] - _BEYOND, self.limits[1] + _BEYOND))

    def _regressed(self, slopes: bool) -> Gain:
        sums = self.sums
        weight = sums["weight"].clamp_min(FLOOR)
        known = sums["weight"] > 0
        ratio = sums["ratio"] / weight
        channel = (sums["ratio"].sum(1) / weight.sum(1))[:, None]
        if not slopes:
            return Gain(torch.where(known, ratio, channel))
        centres = [sums[f"variable {i}"] / weight for i in range(2)]
        between = [sums[f"variable {i}"] for i in range(2)]
        total = weight.sum(1)
        product = sums["product"] - torch.stack([torch.stack([(a * b).sum(1) for b in centres], 1) for a in between], 1)
        with_ratio = sums["product with ratio"] - torch.stack([(a * ratio).sum(1) for a in between], 1)
        product, with_ratio = product / total[:, None, None], with_ratio / total[:, None]
        scale = torch.diagonal(product, dim1=1, dim2=2).clamp_min(1e-12).sqrt()
        matrix = product / (scale[:, :, None] * scale[:, None, :]) + _RIDGE * torch.eye(2).to(product)
        found = torch.linalg.solve(matrix, (with_ratio / scale)[..., None])[..., 0] / scale
        found = torch.where((scale > 1e-5) & torch.isfinite(found), found, 0)
        found[:, 0].clamp_(-1, 0.5)  # the variance's whole exponent from 0 to 1.5
        offset = ratio - sum(found[:, i, None] * centres[i] for i in range(2))
        lone = channel - sum(found[:, i, None] * (between[i].sum(1) / total)[:, None] for i in range(2))
        return Gain(torch.where(known, offset, lone), found.T.float().contiguous())

    def standard_error(self) -> float:
        """Of the ratio after, from the spread between samples."""
        true, after = torch.cat(self.true), torch.cat(self.after)
        if len(true) < 2 or float(true.sum()) <= 0:
            return math.nan
        ratio = after.sum() / true.sum()
        return float((after - ratio * true).std() / (math.sqrt(len(true)) * true.mean()))


class Gains:
    """The gains of a converted model: of eval mode and of training mode, by operation.

    Attributes:
        evaluation, training: operation's key -> gain.
        steps: training calls so far. stale: training went on since eval gains were measured (or they never were).
        renewed: method -> the step before which its training gains were measured last.
    """

    def __init__(self) -> None:
        self.evaluation: dict[str, Gain] = {}
        self.training: dict[str, Gain] = {}
        self.steps = 0
        self.stale = True
        self.renewed: dict[str, int] = {}
        self._mode = "evaluation"
        self._phase = "apply"
        self._truth: dict[str, Tensor] = {}
        self._independent: dict[str, float] = {}
        self._measured: dict[str, Measurement] = {}

    # --- in the graph ---------------------------------------------------------------------------

    def pass_through(self, key: str, value: Any, level: Tensor | None) -> Any:
        """One operation's value on its way: multiplied by its gain, or measured."""
        if self._phase == "truth":
            if isinstance(value, SampledVariable) and value.is_floating_point():
                self._truth[key] = value.unbiased_var().detach()
            return value
        if type(value) is not RandomVariable or value.numel() == 0:
            return value
        if self._phase == "independent":
            self._independent[key] = self._independent.get(key, 0.0) + float(value.var.detach().double().sum())
            return value
        if self._phase == "fit" and key in self._truth and self._truth[key].shape == value.shape:
            slopes = self._mode == "evaluation"
            made = self._measured.setdefault(key, Measurement())
            gain = made.gain_with(value, self._truth[key], level, slopes=slopes)
            self.fresh[key] = gain
        else:
            held = self.of(self._mode)
            if key not in held:
                return value
            gain = held[key].to(value.device)
            held[key] = gain
        return gain(value, level)

    # --- measuring ------------------------------------------------------------------------------

    def of(self, mode: str) -> dict[str, Gain]:
        """The gains of ``"evaluation"`` or ``"training"``, by operation."""
        return self.evaluation if mode == "evaluation" else self.training

    def has(self, mode: str, name: str) -> bool:
        """Whether a method has gains of this mode."""
        return any(key.startswith(f"{name}/") for key in self.of(mode))

    def is_due(self, name: str, every: int) -> bool:
        """Whether a method's training gains are to be measured, having none, or none of the last ``every`` steps."""
        if not self.has("training", name):
            return True
        last = self.renewed.get(name, (self.steps - 1) // every * every)  # of a file: at a multiple
        return self.steps >= last + every

    def start(self, mode: str) -> None:
        """Forget earlier measurements; the next ones are of ``mode``, ``"evaluation"`` or ``"training"``."""
        self._mode = mode
        self._measured, self._independent = {}, {}
        self.fresh: dict[str, Gain] = {}

    def phase(self, name: str) -> None:
        """What values passing through are used for: ``"truth"``, ``"independent"``, ``"fit"`` or ``"apply"``."""
        self._phase = name
        if name in ("truth", "apply"):
            self._truth = {}

    @property
    def mode(self) -> str:
        """``"evaluation"`` or ``"training"``: whose gains are applied or measured."""
        return self._mode

    @property
    def busy(self) -> bool:
        """True while a measurement is under way."""
        return self._phase != "apply"

    def use(self, mode: str) -> None:
        """Apply the gains of this mode from now on."""
        self._mode = mode

    @property
    def measured(self) -> dict[str, Measurement]:
        """The latest measurements by operation."""
        return self._measured

    def independent(self, key: str) -> float:
        """Variance that the independent mode propagates at an operation, summed over what was measured."""
        return self._independent.get(key, math.nan)

    # --- as data --------------------------------------------------------------------------------

    def to_tensors(self) -> dict[str, Tensor]:
        """All gains as named tensors, for a file or a pickle."""
        found: dict[str, Tensor] = {"state": torch.tensor([self.steps, int(self.stale)])}
        for mode in ("evaluation", "training"):
            for key, gain in getattr(self, mode).items():
                found[f"{mode}|{key}|offset"] = gain.offset.detach().cpu().clone()
                if gain.slopes is not None:
                    found[f"{mode}|{key}|slopes"] = gain.slopes.detach().cpu().clone()
                if gain.limits is not None:
                    found[f"{mode}|{key}|limits"] = torch.tensor(gain.limits, dtype=torch.float64)
        return found if len(found) > 1 or self.steps else {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Gains:
        """What ``to_tensors`` gave; what is not of its form is left out."""
        made = cls()
        fields: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name == "state":
                made.steps, made.stale = int(value[0]), bool(value[1])
                continue
            mode, _, rest = name.partition("|")
            key, _, field = rest.rpartition("|")
            if mode in ("evaluation", "training") and field in ("offset", "slopes", "limits"):
                fields.setdefault((mode, key), {})[field] = value
        for (mode, key), values in fields.items():
            if "offset" in values:
                limits = tuple(values["limits"].tolist()) if "limits" in values else None
                getattr(made, mode)[key] = Gain(values["offset"], values.get("slopes"), limits)
        return made


def calibrated(state: Any, key: str, value: Any, level: Tensor | None) -> Any:
    """An operation's result with its variance multiplied by the conversion's gain for it; for use in a graph."""
    return state.gains.pass_through(key, value, level)


MODES["calibrated"] = MODES["independent"]
