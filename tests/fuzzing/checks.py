"""What is asked of a random decoder, converted in each mode and lifetime; the first failure is the finding."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import rvconvert
from rvconvert import ConversionError, RandomVariable
from rvconvert.covariance.lowrank import LowRankVariable
from rvconvert.rules.ancestry import gaussian_ancestor
from rvconvert.rules.relations import copied
from tests.fuzzing.programs import Program, call, generate, source, with_forward
from tests.fuzzing.reference import Expected, Reference
from tests.oracle import DEVIATIONS

__all__ = ["MODES", "Mismatch", "Outcome", "examine"]

MODES = ("independent", "lowrank", "sampled")
LIFETIMES = ("kept", "once")  # of a recording; "once" where Python reads a plain value


class Mismatch(AssertionError):
    """A conversion that raised nothing and is wrong."""


@dataclass
class Outcome:
    """What became of one program.

    Attributes:
        refusals: (mode and lifetime, reason) of each refusal.
        compared: lines held to the reference; ``lawful``: of which the laws alone were asked.
        sampled: outputs held to Monte Carlo; ``linearised``: to the Jacobian; ``paths``: to the plain decoder, path by path.
        mismatch: what is wrong, if anything is.
    """

    seed: int
    refusals: list[tuple[str, str]] = field(default_factory=list)
    compared: int = 0
    lawful: int = 0
    sampled: int = 0
    linearised: int = 0
    paths: int = 0
    mismatch: str = ""


def examine(seed: int, modes: tuple[str, ...] = MODES) -> Outcome:
    """Generate the program of a seed and ask everything of it; a mismatch is returned, not raised."""
    outcome = Outcome(seed)
    program = generate(seed)
    if not _runs(program):
        return outcome
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            for mode in modes if seed % 2 == 0 else modes[:1]:  # every other one in all modes: they share the recorder
                {"independent": _independent, "lowrank": _lowrank, "sampled": _sampled}[mode](program, outcome)
    except Mismatch as found:
        outcome.mismatch = f"{found}\n{program}"
    except Exception as error:  # neither a result nor a refusal
        outcome.mismatch = f"{type(error).__name__}: {error}\n{program}"
    return outcome


def _runs(program: Program) -> bool:
    """False for in-place writes that torch refuses where gradients are kept."""
    try:
        copy.deepcopy(program.model)(program.moments()[0] * 1)
    except RuntimeError:
        return False
    return True


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise Mismatch(what)


def _worst(error: Tensor, allowed: Tensor, got: Tensor, wanted: Tensor) -> str:
    where = int((error / allowed).nan_to_num(nan=torch.inf).argmax())
    pick = lambda t: f"{t.expand_as(error).flatten()[where].item():.9g}"  # noqa: E731
    return f"got {pick(got)}, expected {pick(wanted)}, off by {pick(error)} where {pick(allowed)} is allowed"


def _close(got: Tensor, wanted: Tensor, allowed: Tensor, what: str) -> None:
    _expect(got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    got, wanted, allowed = got.double(), wanted.double(), allowed.double()
    error = (got - wanted).abs()
    _expect(bool((error <= allowed).all()), f"{what}: {_worst(error, allowed, got, wanted)}")


def _same(got: Tensor, wanted: Tensor, eps: float, what: str, unit: float = 256.0, least: float = 0.0) -> None:
    """Equal but for the order of float operations on numbers of the tensor's own size, or of ``least``."""
    size = wanted.double().abs() + wanted.double().abs().mean() + least
    _close(got, wanted, unit * eps * size + 1e-20, what)


def _model(program: Program, lifetime: str) -> Any:
    """A copy of the decoder, which reads a plain value if its recording is to serve one call."""
    model = copy.deepcopy(program.model)
    if lifetime == "once":
        with_forward(model, source(program.steps, program.outputs, before="float(torch.ones(()) * len(v0))"), program.seed)
    return model


def _convert(program: Program, outcome: Outcome, lifetime: str = "kept", **options: Any) -> Callable[..., Any] | None:
    """The converted decoder, run on a latent; None, and a note, where it is refused."""
    label = f"{options.get('covariance', 'independent')}, {lifetime}"
    try:
        model = rvconvert.convert(_model(program, lifetime), random_inputs=("v0",), **options)
        mean, var = program.moments()
        with torch.no_grad():
            model(RandomVariable(mean, var))
    except ConversionError as refusal:
        outcome.refusals.append((label, _reason(refusal)))
        return None
    _expect(not program.refused, f"{label}: converted, though the program has a line that {program.refused}")
    return model


def _reason(refusal: ConversionError) -> str:
    """The first line of a refusal, without what is particular to one program."""
    text = re.sub(r"has no rule:\s+1\.", "has no rule:", str(refusal)).splitlines()[0]
    line = f"{type(refusal).__name__}: {text}".split(", which")[0].split(", /")[0]
    return re.sub(r"\bv\d+\b|<fuzz \d+>|line \d+|:\d+|/\S+|,? \S+\.py\S*", "_", line)[:110]


# --- independent ------------------------------------------------------------------------------------


def stepwise(program: Program) -> dict[str, RandomVariable]:
    """Every value of the program as it was when its line had run, overwritten ones too."""
    mean, var = program.moments()
    model = copy.deepcopy(program.model)
    kept = source(program.steps, ("kept",), before="kept = {}", after="; kept['{}'] = {}.clone()")
    rv = rvconvert.convert(with_forward(model, kept, program.seed), random_inputs=("v0",), output="distribution")
    return {"v0": RandomVariable(mean.clone(), var.clone()), **rv(RandomVariable(mean, var))[0]}


def _independent(program: Program, outcome: Outcome) -> None:
    mean, var = program.moments()
    eps = torch.finfo(program.dtype).eps
    results: dict[str, Any] = {}
    models: dict[str, Any] = {}
    for lifetime in LIFETIMES:
        model = _convert(program, outcome, lifetime, output="distribution")
        if model is not None:
            with torch.no_grad():
                results[lifetime] = dict(zip(program.outputs, model(RandomVariable(mean, var)), strict=True))
                models[lifetime] = model
                if lifetime == "kept":
                    _weights_are_kept(program, model, results[lifetime])
    if not results:
        return
    with torch.no_grad():
        values = stepwise(program)
        for lifetime, outputs in results.items():
            for name, got in outputs.items():
                _expect(isinstance(got, RandomVariable), f"{lifetime}: {name} left as {type(got).__name__}")
                # What cancels, as 1 + erf(-3) does, rounds as numbers of its operands' size.
                _same(got.mean, values[name].mean, eps, f"{lifetime} against step by step, mean of {name}", least=0.01)
                _same(got.var, values[name].var, eps, f"{lifetime} against step by step, variance of {name}")
        _node_by_node(program, values, outcome)
        _without_variance(program, models)
        _truth(program, next(iter(results.values())), outcome)
    _gradients(program)


def _node_by_node(program: Program, values: dict[str, RandomVariable], outcome: Outcome) -> None:
    """Each line against the reference, given the library's own moments of what goes in."""
    moments = {name: (x.mean.double(), x.var.double()) for name, x in values.items()}
    reference = Reference(program, moments)
    beyond: set[str] = set()  # made of what the reference does not follow
    for step in program.steps:
        got = values[step.out]
        _expect(bool(got.mean.isfinite().all() and got.var.isfinite().all()), f"{step.line}: not finite")
        _expect(bool((got.var >= 0).all()), f"{step.line}: a negative variance, {float(got.var.min()):.3g}")
        expected: Expected | None = reference.step(step)
        given = [values[name] for name in {name for part in step.parts for name in part.inputs if name in values}]
        # What explodes, is defined on a part of the line alone or has one variable twice is taken back to the Gaussian behind its
        # input; the reference follows an exponential alone.
        bent = any(gaussian_ancestor(x) is not None for x in given)
        explodes = bent and re.search("exp|sinh|cosh", step.line)
        partial = bent and re.search(r"log|sqrt|/ |reciprocal|\*\* 0.5|clamp|clip|vector_norm|\.norm\(", step.line)
        twice = bent and len(re.findall(r"\bv\d+\b", step.line.partition("=")[2])) > 1
        # What was selected of one variable in the same way has two names.
        twice = twice or any(torch.equal(a.mean, b.mean) and torch.equal(a.var, b.var) for a, b in combinations(given, 2))
        if partial or twice or any(name in beyond for part in step.parts for name in part.inputs):
            beyond.add(step.out)
        # What a term is taken from again is the other term.
        of_terms = re.search("sub| - |-=", step.line) and any(c.terms is not None for x in given for c in copied(x))
        if expected is None or explodes or of_terms or step.out in beyond:
            outcome.lawful += 1
            continue
        _close(got.mean, expected.mean, expected.mean_error, f"{step.line}: mean")
        _close(got.var, expected.var, expected.var_error, f"{step.line}: variance")
        outcome.compared += 1


def _without_variance(program: Program, models: dict[str, Any]) -> None:
    """A latent that does not vary gives the plain decoder, but for the masks of dropout."""
    mean, var = program.moments()
    eps = torch.finfo(program.dtype).eps
    masked = _downstream(program, lambda law: law.kind in ("dropout", "alpha_dropout"))
    plain = dict(zip(program.outputs, copy.deepcopy(program.model)(mean.clone()), strict=True))
    certain = RandomVariable(mean, torch.zeros_like(var))
    for lifetime, model in models.items():
        for name, got in zip(program.outputs, model(certain), strict=True):
            if name not in masked:
                _same(got.mean, plain[name], eps, f"{lifetime}: {name} without variance, against the plain decoder", 1024.0, 1.0)
                _expect(float(got.var.max()) <= (64 * eps) ** 2, f"{lifetime}: {name} varies though the latent does not")


def _downstream(program: Program, chosen: Callable[[Any], bool]) -> set[str]:
    """Values that a part of a chosen law, or what is made of one, leads to."""
    found: set[str] = set()
    for step in program.steps:
        for part in step.parts:
            if chosen(part.law) or found & set(part.inputs):
                found.add(part.out)
    return found


def _exact(program: Program) -> set[str]:
    """Values whose moments are true of the whole decoder: where independence and normality hold without assumption."""
    state: dict[str, tuple[bool, bool]] = {"v0": (True, True)}  # elements independent; Gaussian
    for step in program.steps:
        for part in step.parts:
            if len(set(part.inputs)) != 1 or part.inputs[0] not in state:
                continue
            independent, gaussian = state[part.inputs[0]]
            if part.law.kind == "linear" and independent:
                state[part.out] = (False, gaussian)
            elif part.law.kind == "elementwise" and gaussian and not part.law.partial and "lognormal" not in part.law.options:
                state[part.out] = (independent, False)
            elif part.law.kind == "dropout":
                state[part.out] = (False, False)
            elif part.law.kind == "same":
                state[part.out] = (independent, gaussian)
    return set(state) - {"v0"}


def _truth(program: Program, outputs: dict[str, RandomVariable], outcome: Outcome, draws: int = 2000) -> None:
    """Where the assumptions hold of the whole decoder, its moments are those of many runs of the plain one."""
    if program.dtype == torch.bfloat16:
        return
    names = [name for name in _exact(program) if name in outputs]
    statistics = _downstream(program, lambda law: law.kind == "batch_norm")
    names = [name for name in names if name not in statistics]
    if not names:
        return
    mean, var = program.moments()
    noise = torch.randn(draws, *program.shape, dtype=torch.float64).to(program.dtype)
    plain = copy.deepcopy(program.model)(torch.flatten(mean + var.sqrt() * noise, 0, 1))
    for name, value in zip(program.outputs, plain, strict=True):
        if name in names:
            runs = value.double().unflatten(0, (draws, -1))
            true, spread = runs.mean(0), runs.var(0)
            deviation = (runs - true).abs()
            fourth = (runs - true).pow(4).mean(0)
            rare = 8 * deviation.amax() / draws  # events that no draw has seen
            limit = DEVIATIONS * (spread / draws).sqrt() + rare + 1e-5
            _close(outputs[name].mean, true, limit, f"{name} against Monte Carlo of the decoder, mean")
            limit = DEVIATIONS * ((fourth - spread.square()).clamp(min=0) / draws).sqrt() + rare * deviation.amax() + 1e-5
            _close(outputs[name].var, spread, limit, f"{name} against Monte Carlo of the decoder, variance")
            outcome.sampled += 1


def _weights_are_kept(program: Program, model: Any, outputs: dict[str, RandomVariable]) -> None:
    """Keys, copies and the way back."""
    _expect(list(model.state_dict()) == list(program.model.state_dict()), "state_dict keys differ")
    _expect(isinstance(model, type(program.model)), "not an instance of the decoder's class")
    copied = copy.deepcopy(model)(RandomVariable(*program.moments()))
    eps = torch.finfo(program.dtype).eps
    for (name, wanted), got in zip(outputs.items(), copied, strict=True):
        _same(got.mean, wanted.mean, eps, f"{name} of a copy")
        _same(got.var, wanted.var, eps, f"{name} of a copy, variance")
    back = rvconvert.to_plain(model)
    mean, _ = program.moments()
    torch.manual_seed(0)
    plain = copy.deepcopy(program.model)(mean.clone())
    torch.manual_seed(0)
    for name, got, wanted in zip(program.outputs, back(mean.clone()), plain, strict=True):
        _expect(torch.equal(got, wanted), f"{name} of to_plain differs from the decoder's")


def _gradients(program: Program) -> None:
    """Finite, of the attached penalty too, also where the latent does not vary."""
    if any("half" in step.line for step in program.steps):  # whose range a gradient by a small variance leaves
        return
    for lifetime in LIFETIMES[program.seed // 2 % 2 :][:1]:
        mean, var = program.moments()
        try:
            model = rvconvert.convert(_model(program, lifetime), random_inputs=("v0",))
            latent = (mean.requires_grad_(), var.requires_grad_())
            outputs = model(RandomVariable(latent[0] * 1, latent[1] * 1))
        except ConversionError:
            continue
        loss = sum(x.float().square().mean() for x in outputs if x.requires_grad)
        if not isinstance(loss, Tensor):
            return
        if not _plain_gradient_is_finite(program, mean.detach()):  # a root of what is 0 in the decoder itself
            return
        loss.backward()
        named = [("the latent's mean", latent[0]), ("the latent's variance", latent[1]), *model.named_parameters()]
        for name, parameter in named:
            finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
            _expect(finite, f"{lifetime}: the gradient by {name} is not finite")


def _plain_gradient_is_finite(program: Program, mean: Tensor) -> bool:
    latent = mean.clone().requires_grad_()
    try:
        loss = sum(x.float().square().mean() for x in copy.deepcopy(program.model)(latent * 1))
        return bool(torch.autograd.grad(loss, latent)[0].isfinite().all())
    except RuntimeError:  # its in-place writes leave it none, which the converted one does not share
        return True


# --- low rank ---------------------------------------------------------------------------------------


def _lowrank(program: Program, outcome: Outcome) -> None:
    mean, var = program.moments()
    model = _convert(program, outcome, covariance="lowrank", output="distribution")
    if model is None:
        return
    with torch.no_grad():
        outputs = dict(zip(program.outputs, model(RandomVariable(mean, var)), strict=True))
        for name, x in outputs.items():
            _expect(isinstance(x, LowRankVariable), f"lowrank: {name} left as {type(x).__name__}")
            for what, part in (("mean", x.mean), ("factors", x.factors), ("unexplained", x.unexplained)):
                _expect(bool(part.isfinite().all()), f"lowrank: {what} of {name} is not finite")
            _expect(
                bool((x.unexplained >= 0).all()), f"lowrank: {name} has a negative remainder, {float(x.unexplained.min()):.3g}"
            )
            total = x.factors.double().square().sum(0) + x.unexplained.double()
            _same(x.var, total, torch.finfo(program.dtype).eps, f"lowrank: variance of {name} against its rows and remainder")
    if program.dtype == torch.float64 or not any("float" in step.line for step in program.steps):  # else its casts stay narrow
        _delta_method(program, outcome)


def _delta_method(program: Program, outcome: Outcome) -> None:
    """At a tiny deviation of the latent, mean and variance are those of the decoder's Jacobian, statistics held constant."""
    s = 1e-3
    model = copy.deepcopy(program.model).double()
    mean, var = (x.double() for x in program.moments())
    var = (s * s) * var
    small = rvconvert.convert(copy.deepcopy(model), random_inputs=("v0",), covariance="lowrank", output="distribution")
    with torch.no_grad():
        got = dict(zip(program.outputs, small(RandomVariable(mean, var)), strict=True))
    held, rough = _held(program, model, mean, s)
    plain = dict(zip(program.outputs, held(mean), strict=True))
    step, slopes = 1e-6, []
    for j in range(mean[0].numel()):
        direction = torch.zeros_like(mean).flatten(1)
        direction[:, j] = step
        ends = (held(mean + sign * direction.reshape(mean.shape)) for sign in (1, -1))
        slopes.append([(up - down) / (2 * step) for up, down in zip(*ends, strict=True)])
    for index, name in enumerate(program.outputs):
        if name in rough:
            continue
        rows = torch.stack([each[index] for each in slopes])
        deviation = var.sqrt().flatten(1).T.reshape(-1, len(mean), *(1,) * (rows.ndim - 2))
        linear = (rows * deviation).square().sum(0)
        scale = linear.mean()
        with torch.no_grad():
            allowed = 0.02 * linear + 0.002 * scale + 1e-4 * s * s * s
            _close(got[name].var, linear, allowed, f"lowrank: {name} at a deviation of {s}, variance against the Jacobian")
            allowed = 0.05 * scale.sqrt() + 100 * s * s * (1 + plain[name].abs())
            _close(got[name].mean, plain[name], allowed.expand_as(plain[name]), f"lowrank: {name} at a deviation of {s}, mean")
        outcome.linearised += 1


def _held(program: Program, model: Any, mean: Tensor, s: float) -> tuple[Callable[[Tensor], Any], set[str]]:
    """The decoder with batch statistics as constants, and the values for which the linearisation need not hold.

    These come from masks or choices, or bend or jump within some deviations of the mean.
    """
    rough = _downstream(program, lambda law: not law.smooth)
    frozen = copy.deepcopy(model)
    values: dict[str, Tensor] = {"v0": mean}
    statistics: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.no_grad():
        for step in program.steps:
            for part in step.parts:
                names = tuple(dict.fromkeys(part.inputs))
                inputs = [values[n] for n in names]
                for expression in part.law.breaks:
                    gap = call(expression, names, frozen)(*inputs)
                    if bool((gap.abs() < 30 * s * (1 + gap.abs().mean())).any()):
                        rough.add(part.out)
                if rough & set(part.inputs):
                    rough.add(part.out)
                if part.law.kind == "standardized":
                    groups = inputs[0].reshape(-1, part.law.options["n"])
                    if float((groups.var(1) if part.law.options.get("centred", True) else groups.square().mean(1)).min()) < 0.01:
                        rough.add(part.out)  # the latent's own variance counts beside so little
                if part.law.kind == "batch_norm":
                    axes = [0, *range(2, inputs[0].ndim)]
                    spread, centre = torch.var_mean(inputs[0], axes, correction=0)
                    if float(spread.min()) < 0.01:
                        rough.add(part.out)
                    statistics.setdefault(part.law.options["module"], []).append((centre, spread))
                values[part.out] = call(part.expression, names, frozen)(*(v.clone() for v in inputs))
    for name, found in statistics.items():
        module = frozen.get_submodule(name)
        if module.training or module.running_mean is None:
            setattr(frozen, name, _Constant(module, found))
    with_forward(frozen, source(program.steps, program.outputs), program.seed)
    return lambda z: _run_again(frozen, z), rough


class _Constant(torch.nn.Module):
    """BatchNorm with given statistics, one pair for each call of a forward."""

    def __init__(self, module: Any, statistics: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.module, self.statistics, self.calls = module, statistics, 0

    def forward(self, x: Tensor) -> Tensor:
        centre, spread = self.statistics[self.calls % len(self.statistics)]
        self.calls += 1
        shape = (1, -1, *(1,) * (x.ndim - 2))
        y = (x - centre.view(shape)) / (spread.view(shape) + self.module.eps).sqrt()
        if self.module.weight is None:
            return y
        return y * self.module.weight.view(shape) + self.module.bias.view(shape)


def _run_again(model: Any, z: Tensor) -> Any:
    for module in model.modules():
        if isinstance(module, _Constant):
            module.calls = 0
    with torch.no_grad():
        return model(z.clone())


# --- sampled ----------------------------------------------------------------------------------------


def _sampled(program: Program, outcome: Outcome) -> None:
    """Every path is a run of the plain decoder on the latent of that path; batch statistics are those of all paths."""
    mean, var = program.moments()
    options = {"covariance": "sampled", "pairs": 2, "seed": program.seed, "output": "distribution"}
    masked = _downstream(program, lambda law: law.kind in ("dropout", "alpha_dropout"))
    latents = []

    for lifetime in LIFETIMES:
        model = _convert(program, outcome, lifetime, **options)
        if model is None:
            continue
        with torch.no_grad():
            if not latents:
                probe = rvconvert.convert(_Latent(), random_inputs=("v0",), **options)
                latents.append(probe(RandomVariable(mean, var)).paths)
            paths = latents[0]
            outputs = model(RandomVariable(mean, var))
            plain = copy.deepcopy(program.model)(paths.flatten(0, 1).clone())
        eps = torch.finfo(program.dtype).eps
        for name, got, wanted in zip(program.outputs, outputs, plain, strict=True):
            if name in masked:
                continue
            wanted = wanted.unflatten(0, (len(paths), -1))
            _same(got.paths, wanted, eps, f"sampled, {lifetime}: paths of {name} against the plain decoder", 2048.0, 1.0)
            _same(got.mean, got.paths.double().mean(0), eps, f"sampled, {lifetime}: mean of {name}", 2048.0)
            outcome.paths += 1


class _Latent(torch.nn.Module):
    def forward(self, v0: Tensor) -> Tensor:
        return v0 * 1
