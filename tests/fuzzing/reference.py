"""A slow propagation of moments in float64, written to be obviously right: it knows no rule of the library.

Linear maps are dense matrices, found by pushing basis vectors and squared element by element. Elementwise functions,
of one variable or of several that are functions of one, are integrated over thousands of nodes. What remains is
written out as the formulas say (RV-VAE, eqs 2 to 13; Clark 1961; the delta method where a rule declares it).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.fuzzing.programs import Law, Part, Program, Step, call
from tests.oracle import monte_carlo_of

__all__ = ["Expected", "Reference"]

CELLS, EDGE, ROOTS = 120, 9.0, 5  # of the integral over a standard normal variable; roots of each break are looked for
OUTSIDE = math.erfc(EDGE / math.sqrt(2))  # the probability of what is not integrated
NODES, WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(5))

Moments = tuple[Tensor, Tensor]
Function = Callable[[Tensor], Tensor]


@dataclass
class Family:
    """How a value hangs on another one: it is ``function(parent)``, element by element."""

    parent: str
    function: Function
    breaks: tuple[Function, ...]
    partial: bool


@dataclass
class Expected:
    """Moments of a value, and how far float arithmetic and the declared accuracy of a rule may be from them."""

    mean: Tensor
    var: Tensor
    mean_error: Tensor
    var_error: Tensor


def _vectorised(expression: str) -> str:
    """The same function in words that torch.vmap knows."""
    expression = expression.replace("memory_format=torch.channels_last", "")
    return expression.replace("F.rrelu(", "F.leaky_relu(negative_slope=11 / 48, input=")


class Reference:
    """Propagates one program. ``moments`` holds what each step is given: the moments of values, by name, in float64."""

    def __init__(self, program: Program, moments: dict[str, Moments]) -> None:
        self.moments = dict(moments)
        self.families: dict[str, Family] = {}
        self.model = copy.deepcopy(program.model).double()
        self.eps = torch.finfo(program.dtype).eps
        # Of the mean and the variance, in deviations that the steepest slope would give: what nodes on a finite window allow.
        self.relative = (5e-6, 2e-5) if program.dtype == torch.float64 else (1e-5, 1e-4)

    def step(self, step: Step) -> Expected | None:
        """What the step must give; None where the laws alone are asked. Parts within a step go by the reference's own."""
        found: Expected | None = None
        lost = False
        for part in step.parts:
            if part.law.kind == "laws":
                return None
            found = self.part(part)
            if part.out != step.out:
                self.moments[part.out] = (found.mean, found.var)
                lost |= bool(found.var_error.isinf().any())  # it grows too fast to be integrated
        if found is not None and len(step.parts) > 1:  # what a part is off by goes through the next ones
            relative = [16 * r for r in self.relative]
            found.mean_error = found.mean_error + relative[0] * (found.var.sqrt() + found.mean.abs()) + 1e-5 * relative[0]
            found.var_error = found.var_error + relative[1] * found.var + 1e-5 * relative[1]
        return None if lost else found

    def part(self, part: Part) -> Expected:
        law = part.law
        if law.kind == "elementwise":
            return self.elementwise(part)
        if law.kind == "same":
            mean, var = self.moments[part.inputs[0]]
            self.families[part.out] = Family(part.inputs[0], lambda x: x, (), False)
            return Expected(mean, var, torch.zeros_like(mean), torch.zeros_like(mean))
        return getattr(self, law.kind)(part, law, *(self.moments[name] for name in part.inputs))

    def plain(self, part: Part) -> Callable[..., Tensor]:
        """The part's expression as a plain function in float64 that leaves its arguments alone."""
        made = call(_vectorised(part.expression), part.inputs, self.model)  # (the inputs of these parts are different values)
        return lambda *values: made(*(v.clone() for v in values))

    def rounded(self, mean: Tensor, var: Tensor, terms: float = 16.0, size: Tensor | None = None) -> Expected:
        """With the error of a formula of this many roundings; ``size`` is that of the terms that the mean is made of."""
        scale = (mean.abs() + var.sqrt()) if size is None else size
        unit = terms * self.eps
        return Expected(mean, var, unit * scale + 1e-30, unit * (var + unit * scale * scale) + 1e-24)

    # --- linear maps ----------------------------------------------------------------------------

    def linear(self, part: Part, law: Law, *inputs: Moments) -> Expected:
        """y = M x + b: mean M m + b, variance (M * M) v, with M found column by column."""
        function = self.plain(part)
        sizes = [m.numel() for m, _ in inputs]

        def flat(x: Tensor) -> Tensor:
            pieces = [p.reshape(m.shape) for p, (m, _) in zip(x.split(sizes), inputs, strict=True)]
            return function(*pieces).flatten()

        mean, var = (torch.cat([x[i].flatten() for x in inputs]) for i in (0, 1))
        shift = flat(torch.zeros_like(mean))
        matrix = (torch.func.vmap(flat)(torch.eye(len(mean), dtype=mean.dtype)) - shift).T
        shape = function(*(m for m, _ in inputs)).shape
        unit = (8 + len(mean) ** 0.5) * self.eps
        out_mean, out_var = matrix @ mean + shift, matrix.square() @ var
        largest = matrix.abs().amax(1, keepdim=True)  # weights of interpolation are differences of what is as large
        size = torch.where(matrix == 0, 0.0, largest) @ mean.abs() + shift.abs()
        var_error = unit * ((matrix.abs() * largest) @ var) + 1e-24
        return Expected(*(x.reshape(shape) for x in (out_mean, out_var, unit * size + 1e-30, var_error)))

    def cast(self, part: Part, law: Law, x: Moments) -> Expected:
        """To another width and back: the moments, rounded to it."""
        eps = max(self.eps, torch.finfo(law.options["dtype"]).eps)
        return Expected(*x, eps * x[0].abs() + 1e-7, eps * x[1] + 1e-7)

    def bilinear(self, part: Part, law: Law, a: Moments, b: Moments) -> Expected:
        """y_o = sum T_oij a_i b_j of independent a, b: var = sum T^2 (m_a^2 v_b + v_a m_b^2 + v_a v_b)."""
        function = self.plain(part)
        (ma, va), (mb, vb) = a, b
        eye_a, eye_b = torch.eye(ma.numel(), dtype=ma.dtype), torch.eye(mb.numel(), dtype=ma.dtype)

        def flat(x: Tensor, y: Tensor) -> Tensor:
            return function(x.reshape(ma.shape), y.reshape(mb.shape)).flatten()

        tensor = torch.func.vmap(lambda x: torch.func.vmap(lambda y: flat(x, y))(eye_b))(eye_a)  # (i, j, o)
        (ma, va, mb, vb) = (x.flatten() for x in (ma, va, mb, vb))
        mean = torch.einsum("ijo,i,j->o", tensor, ma, mb)
        second = torch.outer(ma.square(), vb) + torch.outer(va, mb.square()) + torch.outer(va, vb)
        var = torch.einsum("ijo,ij->o", tensor.square(), second)
        size = torch.einsum("ijo,i,j->o", tensor.abs(), ma.abs(), mb.abs())
        shape = function(a[0], b[0]).shape
        return self.rounded(mean.reshape(shape), var.reshape(shape), 32, (size + var.sqrt()).reshape(shape))

    def quadratic(self, part: Part, law: Law, x: Moments) -> Expected:
        """y_o = x' S_o x of Gaussians, S symmetric: mean m' S m + tr SV, var = 2 tr SVSV + 4 m' SVS m."""
        function = self.plain(part)
        mean, var = (each.flatten() for each in x)
        form = torch.func.vmap(torch.func.hessian(lambda y: function(y.reshape(x[0].shape)).flatten()))(mean[None])[0] / 2
        spread = form * var
        out = torch.einsum("oij,i,j->o", form, mean, mean) + torch.einsum("oii->o", spread)
        out_var = 2 * torch.einsum("oij,oji->o", spread, spread)
        out_var = out_var + 4 * torch.einsum("i,oij,ojk,k->o", mean, spread, form, mean)
        size = torch.einsum("oij,i,j->o", form.abs(), mean.abs(), mean.abs()) + torch.einsum("oii->o", spread.abs())
        shape = function(x[0]).shape
        return self.rounded(out.reshape(shape), out_var.reshape(shape), 32, (size + out_var.sqrt()).reshape(shape))

    # --- elementwise functions ------------------------------------------------------------------

    def ancestors(self, name: str) -> list[tuple[str, Function, tuple[Function, ...], bool]]:
        """The value and those that it is an elementwise function of, nearest first, with that function."""
        chain: list[tuple[str, Function, tuple[Function, ...], bool]] = [(name, lambda x: x, (), False)]
        while name in self.families:
            family = self.families[name]
            _, after, breaks, partial = chain[-1]
            chain.append(
                (
                    family.parent,
                    lambda x, f=family.function, g=after: g(f(x)),  # type: ignore[misc]
                    (*family.breaks, *(lambda x, f=family.function, b=b: b(f(x)) for b in breaks)),
                    partial or family.partial,
                )
            )
            name = family.parent
        return chain

    def elementwise(self, part: Part) -> Expected:
        """One function of the nearest value that all inputs are functions of; else a law of independent inputs."""
        names = tuple(dict.fromkeys(part.inputs))
        chains = [self.ancestors(name) for name in names]
        common = next((each for each in chains[0] if all(each[0] in [c[0] for c in chain] for chain in chains)), None)
        if common is None:
            return self.several(part)
        parent = common[0]
        links = [next(c for c in chain if c[0] == parent) for chain in chains]
        function, model = call(_vectorised(part.expression), names, self.model), self.model

        def whole(x: Tensor) -> Tensor:
            return function(*(link[1](x).clone() for link in links))

        own = [call(each, names, model) for each in part.law.breaks]
        breaks = tuple(
            [b for link in links for b in link[2]] + [lambda x, h=h: h(*(link[1](x) for link in links)) for h in own]  # type: ignore[misc]
        )
        partial = part.law.partial or any(link[3] for link in links)
        self.families[part.out] = Family(parent, whole, breaks, partial)
        mean, var = self.moments[parent]
        if "lognormal" in part.law.options and len(names) == 1:
            return self.lognormal(part, mean, var) if parent == names[0] else self.first_order(part)
        shape = whole(mean).shape
        mean, var = mean.expand(shape), var.expand(shape)
        if partial:
            value, slope = torch.func.jvp(whole, (mean.contiguous(),), (torch.ones_like(mean),))
            return self.rounded(value, torch.where(var > 0, slope, 0).square() * var, 64)
        return self.integrated(part, whole, breaks, mean, var)

    def integrated(self, part: Part, function: Function, breaks: tuple[Function, ...], mean: Tensor, var: Tensor) -> Expected:
        """Moments of f(m + s z) over cells of z that end at every break; five Gauss-Legendre nodes a cell."""
        s = var.sqrt()
        at = lambda z: mean + s * z  # noqa: E731
        grid = torch.linspace(-EDGE, EDGE, CELLS + 1, dtype=mean.dtype).reshape(-1, *(1,) * mean.ndim).expand(-1, *mean.shape)
        edges = torch.cat([grid, *(self.roots(b, at, grid) for b in breaks)]).sort(0).values
        half, centre = (edges[1:] - edges[:-1]) / 2, (edges[1:] + edges[:-1]) / 2
        z = (centre + half * NODES.reshape(-1, 1, *(1,) * mean.ndim)).flatten(0, 1)
        weight = (half * WEIGHTS.reshape(-1, 1, *(1,) * mean.ndim)).flatten(0, 1) * torch.exp(-z * z / 2)
        weight = weight / weight.sum(0)
        values = torch.func.vmap(lambda x: function(x).to(x.dtype))(at(z))
        start = function(mean).to(mean.dtype)
        out = start + (weight * (values - start)).sum(0)
        out_var = (weight * (values - out).square()).sum(0)
        out, out_var = torch.where(var > 0, out, start), torch.where(var > 0, out_var, 0)
        errors = self.integration_errors(part, function, mean, s, z, weight, values, out, out_var)
        return Expected(out, out_var, *errors)

    def integration_errors(
        self, part: Part, function: Function, mean: Tensor, s: Tensor, z: Tensor, weight: Tensor, values: Tensor,
        out: Tensor, out_var: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """How far float arithmetic and the library's finite number of nodes may be from mean and variance."""
        start = function(mean).to(mean.dtype)
        order = z.argsort(0)
        rise, run = (t.gather(0, order).diff(dim=0) for t in (values, z))
        inner = (z.gather(0, order)[1:].abs() < 6) & (run > 1e-4)
        scale = (rise / run).where(inner, 0).abs().amax(0) * (s > 0)  # the deviation of a line as steep as the function gets
        # Rounded is what is as large as the values; rounding of the input moves them by the slope.
        unit = 16 * self.eps
        size = start.abs() + (weight * values.abs()).sum(0) + 1.0 + mean.abs() * scale / s.clamp(min=1e-300)
        jumps = unit * size.square() if part.law.options.get("indicator") else 0.0
        # The library integrates over five deviations at least; what lies beyond counts where the function grows fast.
        share = weight * (values - out).square() / out_var.clamp(min=1e-300)
        beyond = share.where(z.abs() > 5, 0).sum(0)
        lost = share.where(z.abs() > 8, 0).sum(0) > 1e-7  # by this reference too
        # A smooth function of less than this deviation is taken as a parabola of one slope; its bend is what is left out.
        floor = 1e-4 if self.eps < 1e-10 else 1e-2
        ends = function(mean + floor) + function(mean - floor) - 2 * start
        bend = torch.where(ends.abs() < 0.1 * floor, ends / floor, 0) * s
        # At a kink less than this deviation is not resolved.
        least = torch.where(s < (1e-9 if self.eps < 1e-10 else 1e-6), s, 0)
        # Nodes are spread for a function as smooth as 1; one of several functions may bend often, and at places not told.
        coarse = part.law.options.get("coarse", 1.0) if len(part.inputs) == 1 else 1000.0
        of_mean, of_var = (coarse * r for r in self.relative)
        mean_error = of_mean * (scale + 10 * out_var.sqrt()) + unit * size + (6e-7 * beyond * out_var).sqrt() + 1e-8 * s + least
        var_error = of_var * (scale.square() + 10 * out_var) + unit * size * (scale + unit * size) + jumps
        var_error = var_error + 1e-12 * scale.square() + 2 * bend.square() + 2 * beyond * out_var + least.square()
        var_error = var_error + OUTSIDE * (1 + start.abs()).square()  # a jump may lie there
        return torch.where(lost & (out_var > 0), torch.inf, torch.stack((mean_error, var_error))).unbind()

    def roots(self, function: Function, at: Callable[[Tensor], Tensor], grid: Tensor) -> Tensor:
        """(ROOTS, ...): places of z where the function changes sign, found by bisection; others lie at the left end."""
        signs = torch.func.vmap(lambda z: function(at(z)) > 0)(grid)
        crossing = (signs[1:] != signs[:-1]).to(torch.int8)
        found, place = torch.topk(crossing, ROOTS, 0)
        low, high = grid.gather(0, place), grid.gather(0, place + 1)
        start = signs.gather(0, place)
        for _ in range(45):
            middle = (low + high) / 2
            same = torch.func.vmap(lambda z: function(at(z)) > 0)(middle) == start
            low, high = torch.where(same, middle, low), torch.where(same, high, middle)
        return torch.where(found > 0, (low + high) / 2, -EDGE)

    def lognormal(self, part: Part, mean: Tensor, var: Tensor) -> Expected:
        """Of a positive X taken as e^N(mu, sigma^2): log x = N, and x^p = e^(p N)."""
        text = part.law.options["lognormal"]
        mean = (mean + 1 if "log1p" in text else mean).clamp(min=1e-150)
        sigma2 = torch.log1p(var / mean.square())
        mu = mean.log() - sigma2 / 2
        if "log" in text:
            base = math.log(2) if "log2" in text else math.log(10) if "log10" in text else 1.0
            return self.rounded(mu / base, sigma2 / base**2, 32, mu.abs() + 1)
        power = 0.5 if ("sqrt" in text and "rsqrt" not in text) or "0.5" in text else -0.5 if "rsqrt" in text else -1.0
        out = torch.exp(power * mu + power**2 * sigma2 / 2)
        return self.rounded(out, out.square() * torch.expm1(power**2 * sigma2), 64)

    def first_order(self, part: Part) -> Expected:
        """mean = f(means), var = sum of squared slopes times variances, of independent inputs."""
        names = tuple(dict.fromkeys(part.inputs))
        function = call(part.expression, names, self.model)
        shape = function(*(self.moments[n][0] for n in names)).shape
        means = tuple(self.moments[n][0].expand(shape).contiguous() for n in names)
        var = torch.zeros(shape, dtype=torch.float64)
        for i, name in enumerate(names):
            tangents = tuple(torch.ones_like(m) if i == j else torch.zeros_like(m) for j, m in enumerate(means))
            var = var + torch.func.jvp(function, means, tangents)[1].square() * self.moments[name][1]
        return self.rounded(function(*means), var, 64)

    def several(self, part: Part) -> Expected:
        """Elementwise, of independent variables."""
        values = [self.moments[name] for name in part.inputs]
        kind = part.law.several
        if kind == "sum":
            return self.linear(part, part.law, *values)
        if kind == "first_order":
            return self.first_order(part)
        if kind == "where":
            (p, _), (a, va), (b, vb) = values
            mean = p * a + (1 - p) * b
            var = p * (va + a * a) + (1 - p) * (vb + b * b) - mean * mean
            return self.rounded(mean, var.clamp(min=0), 32, a.abs() + b.abs() + var.clamp(min=0).sqrt())
        (a, va), (b, vb) = values
        if kind == "product":
            return self.rounded(a * b, a * a * vb + b * b * va + va * vb)
        sign = 1 if kind == "maximum" else -1  # Clark 1961
        a, b = sign * a, sign * b
        theta = (va + vb).sqrt()
        alpha = (a - b) / theta.clamp(min=1e-150)
        up, down = torch.special.ndtr(alpha), torch.special.ndtr(-alpha)
        density = theta * torch.exp(-alpha * alpha / 2) / math.sqrt(2 * math.pi)
        # Moments of the excess over the greater mean: nothing large is subtracted from anything large.
        top = torch.maximum(a, b)
        first = (a - top) * up + (b - top) * down + density
        second = ((a - top) ** 2 + va) * up + ((b - top) ** 2 + vb) * down + (a + b - 2 * top) * density
        size = a.abs() + b.abs() + theta
        expected = self.rounded(sign * (top + first), (second - first * first).clamp(min=0), 64, size)
        spread = self.eps * size * (va + vb).sqrt() * 64 + 1e-5 * expected.var
        return Expected(expected.mean, expected.var, expected.mean_error + 1e-5 * theta, expected.var_error + spread)

    # --- normalization --------------------------------------------------------------------------

    def per_channel(self, x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(1, -1, *(1,) * (like.ndim - 2))

    def batch_norm(self, part: Part, law: Law, x: Moments) -> Expected:
        """Paper eqs 10 and 11 in training: the batch is a mixture. The running statistics in eval."""
        mean, var = x
        module: Any = self.model.get_submodule(law.options["module"])
        if module.training or module.running_mean is None:
            axes = [0, *range(2, mean.ndim)]
            centre = mean.mean(axes, keepdim=True)
            spread = (mean - centre).square().mean(axes, keepdim=True) + var.mean(axes, keepdim=True)
        else:
            centre, spread = (self.per_channel(s, mean) for s in (module.running_mean, module.running_var))
        scale = 1 / (spread + module.eps).sqrt()
        if module.weight is not None:
            scale = scale * self.per_channel(module.weight, mean)
        shift = torch.zeros(()).double() if module.bias is None else self.per_channel(module.bias, mean)
        size = (mean.abs() + centre.abs() + spread.sqrt()) * scale.abs() + shift.abs()
        out, out_var = (mean - centre) * scale + shift, var * scale.square()
        # The spread is known to a rounding of what it is made of, which counts where it is next to nothing.
        noise = 32 * self.eps * (mean.abs().amax().square() * self.eps + spread) / (spread + module.eps)
        return Expected(out, out_var, noise * size + 32 * self.eps * size, (2 * noise + 32 * self.eps) * out_var + 1e-24)

    def standardized(self, part: Part, law: Law, x: Moments) -> Expected:
        """c / sqrt(S + eps) with S = mean(c^2) + (1 - share) mean(v); for n <= 256 the delta method's second order."""
        mean, var = (t.reshape(-1, law.options["n"]) for t in x)
        n, centred = mean.shape[1], law.options.get("centred", True)
        module: Any = self.model.get_submodule(law.options["module"]) if "module" in law.options else None
        eps = law.options.get("eps", 1e-5)
        if eps is None:
            eps = self.eps if module.eps is None else module.eps
        share = 1 / n if centred else 0.0
        c = mean - mean.mean(1, keepdim=True) if centred else mean
        total = c.square().mean(1, keepdim=True) + (1 - share) * var.mean(1, keepdim=True) + eps
        cov = 2 * c * var / n
        var_total = (4 * c.square() * var + 2 * var.square()).mean(1, keepdim=True) / n
        out = c / total.sqrt() - cov / (2 * total**1.5) + 3 * c * var_total / (8 * total**2.5)
        jacobian = torch.eye(n, dtype=mean.dtype) - share - c.unsqueeze(2) * c.unsqueeze(1) / (n * total.unsqueeze(2))
        out_var = (jacobian.square() * var.unsqueeze(1)).sum(2) / total
        if law.options.get("unit"):
            out, out_var = out / math.sqrt(n), out_var / n
        size = (mean.abs() + mean.abs().mean(1, keepdim=True)) / total.sqrt() + 1
        kept = (var.amax(1, keepdim=True) / total).reshape(-1, 1).expand_as(out)
        out, out_var, size, kept = (t.reshape(x[0].shape) for t in (out, out_var, size, kept))
        if module is not None and getattr(module, "weight", None) is not None:
            trailing = module.weight.shape if hasattr(module, "normalized_shape") else (-1, *(1,) * (out.ndim - 2))
            weight = module.weight.reshape(trailing)
            bias = getattr(module, "bias", None)
            shift = torch.zeros(()).double() if bias is None else bias.reshape(trailing)
            out, out_var, size = out * weight + shift, out_var * weight.square(), size * weight.abs() + shift.abs()
            kept = kept * weight.square()
        noise = 64 * self.eps * (1 + self.eps * (mean.square().amax() / total.amin()))
        return Expected(out, out_var, noise * size, noise * (out_var + kept * (1 + size)) + 1e-24)

    # --- others ---------------------------------------------------------------------------------

    def softmax(self, part: Part, law: Law, x: Moments) -> Expected:
        """Second order in the mean, kept a distribution: softmax(m + v (1 - 2p)/2); variance (J * J) v, J = diag p - p p'."""
        mean, var = (t.movedim(law.options["dim"], -1) for t in x)
        p = torch.softmax(mean, -1)
        p = torch.softmax(mean + var * (1 - 2 * p) / 2, -1)
        jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        out = (jacobian.square() * var.unsqueeze(-2)).sum(-1)
        largest = (p.square() * var).sum(-1, keepdim=True) + p.square() * var
        unit = 16 * self.eps * (4 + mean.abs().amax() + var.amax())
        made = (p, out, unit * (p + 1e-30), unit * (out + largest) + 1e-24)
        return Expected(*(t.movedim(-1, law.options["dim"]) for t in made))

    def log_softmax(self, part: Part, law: Law, x: Moments) -> Expected:
        """mean - half the curvature sum p (1 - p) v; J_ij = d_ij - p_j."""
        mean, var = (t.movedim(law.options["dim"], -1) for t in x)
        p = torch.softmax(mean, -1)
        out = torch.log_softmax(mean, -1) - (p * (1 - p) * var).sum(-1, keepdim=True) / 2
        jacobian = torch.eye(mean.shape[-1], dtype=mean.dtype) - p.unsqueeze(-2)
        out_var = (jacobian.square() * var.unsqueeze(-2)).sum(-1)
        unit = 16 * self.eps * (4 + mean.abs().amax() + var.amax())
        largest = var + (p.square() * var).sum(-1, keepdim=True)
        made = (out, out_var, unit * (out.abs() + 1), unit * (out_var + largest) + 1e-24)
        return Expected(*(t.movedim(-1, law.options["dim"]) for t in made))

    def attention(self, part: Part, law: Law, *inputs: Moments) -> Expected:
        """First order in the scores, do/ds_j = p_j (v_j - o); the scores are those of independent queries and keys."""
        q, k, v = (self.moments[law.options[each]] for each in "qkv")
        scale = law.options["scale"]
        s = scale * q[0] @ k[0].mT
        s_var = scale**2 * (q[0].square() @ k[1].mT + q[1] @ k[0].square().mT + q[1] @ k[1].mT)
        p = torch.softmax(s, -1)
        p = torch.softmax(s + s_var * (1 - 2 * p) / 2, -1)
        jacobian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
        p_var = (jacobian.square() * s_var.unsqueeze(-2)).sum(-1)
        out = p @ v[0]
        gap = v[0].unsqueeze(-3) - out.unsqueeze(-2)  # (..., query, key, channel)
        out_var = ((p.square() * s_var).unsqueeze(-1) * gap.square()).sum(-2) + (p.square() + p_var) @ v[1]
        size = v[0].abs().amax() + 1
        unit = 32 * self.eps * (4 + s.abs().amax() + s_var.amax())
        largest = (p.square() * s_var).sum(-1, keepdim=True) * size**2
        return Expected(out, out_var, unit * size * torch.ones_like(out), unit * (out_var + largest) + 1e-24)

    def dropout(self, part: Part, law: Law, x: Moments) -> Expected:
        """A mask of its own for each element, scaled: var = (v + m^2)/(1-p) - m^2."""
        (mean, var), p = x, law.options["p"]
        return self.rounded(mean, (var + p * mean.square()) / (1 - p))

    def alpha_dropout(self, part: Part, law: Law, x: Moments) -> Expected:
        """a (x b + alpha (1 - b)) + c, b Bernoulli of q = 1-p, a and c such that N(0, 1) keeps its moments."""
        (mean, var), q = x, 1 - law.options["p"]
        alpha = -1.6732632423543772 * 1.0507009873554805
        a = (q + alpha**2 * q * (1 - q)) ** -0.5
        shift = -a * alpha * (1 - q)
        first = q * mean + (1 - q) * alpha
        out_var = a * a * q * (var + (1 - q) * (mean - alpha).square())  # Var(x b + alpha (1 - b)), b and x independent
        return self.rounded(a * first + shift, out_var, 32, mean.abs() + var.sqrt() + 2)

    def variance(self, part: Part, law: Law, x: Moments) -> Expected:
        """x' M x of Gaussians with M the centring matrix over n - correction: var = 2 tr(MVMV) + 4 m' MVM m."""
        mean, var = x
        n = mean.shape[-1]
        m = (torch.eye(n, dtype=mean.dtype) - 1 / n) / (n - law.options["correction"])
        mv = m * var.unsqueeze(-2)
        out = torch.einsum("...i,ij,...j->...", mean, m, mean) + mv.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace = torch.einsum("...ij,...ji->...", mv, mv)
        out_var = 2 * trace + 4 * torch.einsum("...i,...ij,jk,...k->...", mean, mv, m, mean)
        size = (mean.square() + var).mean(-1)
        return self.rounded(out, out_var, 64, size + out_var.sqrt())

    def prod(self, part: Part, law: Law, x: Moments) -> Expected:
        """E prod = prod m, E prod^2 = prod (m^2 + v)."""
        mean, var = x
        out, second = mean.prod(-1), (mean.square() + var).prod(-1)
        expected = self.rounded(out, (second - out.square()).clamp(min=0), 32, second.sqrt())
        expected.var_error = expected.var_error + 1e-14 * second  # of the difference here, in float64
        return expected

    def sampled(self, part: Part, law: Law, x: Moments) -> Expected:
        """Monte Carlo of the part by itself: six standard errors, and what an approximate rule declares."""
        found = monte_carlo_of(self.plain(part), [x], seed=hash(part.expression) % 1000)
        scale = found.var.clamp(min=found.var.mean().item())
        mean_error = found.mean_error + law.options["mean_error"] * scale.sqrt() + 64 * self.eps * (1 + found.mean.abs())
        var_error = found.var_error + law.options["var_error"] * scale + 64 * self.eps * (1 + scale)
        return Expected(found.mean, found.var, mean_error, var_error)
