"""``covariance="lowrank"``: x = mean + factors^T e + d, with e the latent noises and d independent between elements.

A linear map acts on the mean and on each row of factors, and with squared coefficients on the remainder, var(d). An
elementwise function takes its exact marginal moments at the total variance; by Stein's rule Cov(f(x), e) = E[f'(x)]
Cov(x, e), so its rows are those of x times E[f'], and what is over is remainder. Everything else takes the derivative
of its mean along the rows.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from rvconvert.covariance.each import on_each
from rvconvert.random_variable import RandomVariable, Settings, random_variables
from rvconvert.rules import gaussian, shape
from rvconvert.rules.arithmetic import WHERE
from rvconvert.rules.kinds import (
    Bilinear,
    Collapse,
    Elementwise,
    FixedLinear,
    Metadata,
    Shape,
    at_means,
    bind,
    first_order,
    full_precision,
    is_same,
    out_of_place,
    substitute,
    unique,
)
from rvconvert.rules.noise import SOURCES
from rvconvert.rules.normalization import BatchNormalization
from rvconvert.rules.quadrature import quadrature_gain

if TYPE_CHECKING:
    from rvconvert.registry import Rule

__all__ = ["LowRankVariable", "Source"]

Function = Callable[..., Any]
_AFFINE = frozenset("deg2rad rad2deg add sub subtract rsub mul multiply div divide true_divide neg negative lerp addcmul".split())
_PRODUCTS = frozenset(("mul", "multiply"))
_EXTREMA = {"maximum": 1, "fmax": 1, "minimum": -1, "fmin": -1}
_COMPARISONS = frozenset("gt ge lt le greater greater_equal less less_equal".split())
_INDICATORS = frozenset(("logical_and", "logical_or", "logical_xor"))
_MASKS = frozenset("dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout".split())
_CLOSED_FORMS = {"abs": "absolute", "clip": "clamp", "prelu": "leaky_relu"}


class Source:
    """The noises that some factor rows belong to; rows of one source are correlated, of different ones independent."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


class LowRankVariable(RandomVariable):
    """Jointly distributed random variables: mean, rows of factors on common noises, an independent remainder.

    Attributes:
        factors: (r, *shape); row j is the covariance with noise j. The noises are independent between samples.
        remainder: variances of what is independent between elements, shaped like the variable.
        sources: which rows belong to which noise source, in order.
    """

    precedence = 10
    _factors: Tensor
    _remainder: Tensor
    _sources: tuple[Source, ...]
    _total: Tensor | None

    @classmethod
    def of(
        cls, mean: Tensor, factors: Tensor, remainder: Tensor, sources: tuple[Source, ...], settings: Settings
    ) -> LowRankVariable:
        """The variable with this mean, these rows and this remainder."""
        made = cls.__new__(cls)
        dtype = torch.promote_types(torch.promote_types(mean.dtype, remainder.dtype), factors.dtype)
        made._mean, made._factors, made._remainder = (x if x.dtype == dtype else x.to(dtype) for x in (mean, factors, remainder))
        made._sources = sources
        made._settings = settings
        made._latent = False
        made._origin = None
        made._identity = None
        made._total = None
        return made

    @property
    def factors(self) -> Tensor:
        """(r, *shape): the covariance of each element with each noise, in units of the variable."""
        return self._factors

    @property
    def remainder(self) -> Tensor:
        """Variance of the part that is independent between elements."""
        return self._remainder

    @property
    def sources(self) -> tuple[Source, ...]:
        """The noise sources of the rows, in order."""
        return self._sources

    @property
    def var(self) -> Tensor:
        """Total variances: sum of squared factors, plus the remainder."""
        if self._total is not None:
            return self._total
        total = self._remainder if not self._sources else self._factors.square().sum(0) + self._remainder
        if torch.is_grad_enabled() or not (self._factors.requires_grad or self._remainder.requires_grad):
            self._total = total  # what is computed under no_grad must not serve where gradients are asked for
        return total

    _var = property(lambda self: self.var)

    def with_moments(self, mean: Tensor, var: Tensor) -> LowRankVariable:
        """A variable of this mode with these moments and no rows: independent between elements."""
        return LowRankVariable.of(mean, mean.new_zeros((0, *mean.shape)), var, (), self._settings)

    def independent(self, var: Tensor | None = None) -> LowRankVariable:
        """This variable without its rows, of the total variance unless another is given."""
        return self.with_moments(self.mean, self.var if var is None else var)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) draws: Gaussian, with the covariance that the rows carry; the first dimension is the batch."""
        shape, device, dtype = self.shape, self.device, self.dtype
        out = self.mean + self.remainder.sqrt() * torch.randn(n, *shape, device=device, dtype=dtype, generator=generator)
        if self._sources:
            each = (shape[0], *(1,) * (len(shape) - 1)) if shape else ()
            for row in self.factors:
                out = out + row * torch.randn(n, *each, device=device, dtype=dtype, generator=generator)
        return out

    def apply(self, rule: Rule, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rule's kind, on mean, rows and remainder."""
        kind: Any = rule.kind
        if isinstance(kind, (Metadata, Collapse)):
            return kind(func, args, kwargs)
        lifted = {id(x): _lift(x, self.settings) for x in unique(args, kwargs)}
        args, kwargs = (substitute(each, lambda x: lifted[id(x)]) for each in (args, kwargs))
        if rule is shape.SETITEM:
            kind, func = _WRITE, shape.setitem
        if not any(x.sources for x in lifted.values()):
            return kind(func, args, kwargs)
        if isinstance(kind, Shape):
            return _select(kind, func, args, kwargs)
        if isinstance(kind, FixedLinear):
            return _fixed_linear(kind, out_of_place(func), args, kwargs)
        if isinstance(kind, Bilinear):
            return _bilinear(kind, func, args, kwargs)
        if isinstance(kind, BatchNormalization):
            return _batch_norm(kind, args, kwargs)
        if rule.name in _EXTREMA:
            return _extremum(_EXTREMA[rule.name], *args, **kwargs)
        if isinstance(kind, Elementwise) and Elementwise.common_ancestor(unique(args, kwargs)) is None:
            if rule.name in _COMPARISONS:
                args, kwargs = (args[0] - args[1], 0.0), {}
            elif rule.name in _INDICATORS:
                return _conjunction(rule.name, *args)
            elif rule is WHERE and isinstance(args[0], LowRankVariable):
                return _choice(*args)
        if isinstance(kind, Elementwise):
            return _elementwise(rule, kind, func, args, {k: v for k, v in kwargs.items() if k != "inplace"})
        if rule.name in _MASKS:
            return _mask(kind, func, args, kwargs)
        return _carried(rule, func, args, kwargs)


def _lift(x: RandomVariable, settings: Settings) -> LowRankVariable:
    if isinstance(x, LowRankVariable):
        return x
    return LowRankVariable.of(x.mean, x.mean.new_zeros((0, *x.shape)), x.var, (), settings)


# --- rows of several variables -------------------------------------------------------------------


def aligned(variables: Sequence[LowRankVariable]) -> tuple[tuple[Source, ...], list[Tensor]]:
    """The union of the variables' sources, and each one's rows on it: a block of zeros for a source it lacks."""
    sources = tuple(dict.fromkeys(s for x in variables for s in x.sources))
    return sources, [_rows_on(x, sources) for x in variables]


def _rows_on(x: LowRankVariable, sources: tuple[Source, ...]) -> Tensor:
    if x.sources == sources:
        return x.factors
    blocks = dict(zip(x.sources, x.factors.split([s.rows for s in x.sources]) if x.sources else (), strict=True))
    return torch.cat([blocks[s] if s in blocks else x.factors.new_zeros((s.rows, *x.shape)) for s in sources])


def _broadcastable(factors: Tensor, ndim: int) -> Tensor:
    """(r, *shape) with ones put between, so that shape broadcasts with one of ``ndim`` dimensions."""
    missing = ndim - (factors.ndim - 1)
    return factors.reshape(factors.shape[0], *(1,) * missing, *factors.shape[1:]) if missing > 0 else factors


def _along(function: Function, variables: Sequence[Any]) -> tuple[tuple[Source, ...], Any]:
    """``function`` of a dict from each variable's id to one of its rows, over all rows."""
    sources, stacks = aligned(variables)
    keys = [id(x) for x in variables]
    return sources, on_each(lambda *rows: function(dict(zip(keys, rows, strict=True))), stacks)


# --- the kinds -----------------------------------------------------------------------------------


def _select(kind: Shape, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Selecting, moving and joining elements: mean, rows and remainder go the same way."""
    func = shape_moves_any_layout(func)
    values, rest, options = bind(kind.names, args, kwargs)
    present = {name: value for name, value in zip(kind.names, values, strict=True) if value is not None}
    variables = unique(args, kwargs)

    def call(replace: Callable[[LowRankVariable], Tensor]) -> Any:
        replaced = {
            n: _linear_part(v, replace) if n in kind.data else substitute(v, lambda x: x.mean) for n, v in present.items()
        }
        return kind.call(func, replaced, rest, options)

    mean = kind.call(func, {n: substitute(v, lambda x: x.mean) for n, v in present.items()}, rest, options)
    if mean is variables[0].mean:
        return variables[0]
    sources, rows = _along(lambda row: call(lambda x: row[id(x)]), variables)
    remainder = call(lambda x: x.remainder)
    settings = variables[0].settings
    return _pytree.tree_map(
        lambda m, r, d: LowRankVariable.of(m, r, d, sources, settings) if isinstance(m, Tensor) and m.is_floating_point() else m,
        mean, rows, remainder,
    )  # fmt: skip


def _linear_part(value: Any, replace: Callable[[LowRankVariable], Tensor]) -> Any:
    """``value`` with its variables replaced; a constant has no rows and no variance."""
    if isinstance(value, LowRankVariable):
        return replace(value)
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_linear_part(each, replace) for each in value)
    return type(value)(0) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


_WRITE = Shape(("input", "index", "value"), ("input", "value"))

def shape_moves_any_layout(func: Function) -> Function:
    """The twin of a shape function that leaves its argument alone and takes rows that lie in memory in any order."""
    layouts: dict[Any, Function] = {Tensor.view: Tensor.reshape, Tensor.view_as: Tensor.reshape_as}
    return layouts.get(func, out_of_place(func))


def _fixed_linear(kind: FixedLinear, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LowRankVariable:
    (x,) = unique(args, kwargs)
    mean = at_means(func, args, kwargs)
    with full_precision(x):
        rows = on_each(lambda row: func(*substitute(args, lambda _: row), **substitute(kwargs, lambda _: row)), [x.factors])
        remainder = kind.square(func, substitute(args, lambda x: x.remainder), substitute(kwargs, lambda x: x.remainder))
    return LowRankVariable.of(mean, rows, remainder, x.sources, x.settings)


def _bilinear(kind: Bilinear, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LowRankVariable:
    """B(x, y) + b. With both random, rows are B(A_x, m_y) + B(m_x, A_y), and the mean gains sum_j B(A_xj, A_yj)."""
    (a, b, *bias), rest, options = bind(kind.names, args, kwargs)
    offset = bias[0] if bias else None

    def product(x: Tensor, y: Tensor, shift: Tensor | None = None) -> Tensor:
        return func(x, y, *((shift,) if bias else ()), *rest, **options)

    def mean_of(value: Any) -> Any:
        return value.mean if isinstance(value, LowRankVariable) else value

    def width(value: Any, like: Tensor) -> Any:
        return value if value is None or value.dtype == like.dtype else value.to(like.dtype)

    like, *_ = variables = unique(a, b, offset)
    mean = product(mean_of(a), mean_of(b), mean_of(offset))
    with full_precision(like):
        m_a, m_b = (width(mean_of(x), like.mean) for x in (a, b))

        def derivative(row: dict[int, Tensor]) -> Tensor:
            shift = row.get(id(offset))
            if id(a) in row and id(b) in row:
                return product(row[id(a)], m_b, shift) + product(m_a, row[id(b)])
            if id(a) in row:
                return product(row[id(a)], m_b, shift)
            if id(b) in row:
                return product(m_a, row[id(b)], shift)
            return product(torch.zeros_like(m_a), m_b, shift)

        sources, rows = _along(derivative, variables)
        remainders: list[Any] = [x.remainder if isinstance(x, LowRankVariable) else None for x in (a, b, offset)]
        d_a, d_b, d_bias = remainders
        if d_b is None and d_a is not None:
            remainder = kind.squared(lambda x, y: product(x, y, d_bias), d_a, m_b, like)
        elif d_b is not None and d_a is None:
            remainder = product(m_a.square(), d_b, d_bias)
        elif d_a is not None:
            mean = mean + on_each(product, aligned([a, b])[1]).sum(0)
            remainder = product(d_a, m_b.square(), d_bias) + product(m_a.square(), d_b) + product(a.var, b.var)
        else:
            remainder = product(torch.zeros_like(m_a), m_b, d_bias)
    return LowRankVariable.of(mean, rows, remainder, sources, like.settings)


def _batch_norm(kind: BatchNormalization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LowRankVariable:
    """Statistics from the mean and the total variance; then an affine map."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    (x, mean, var, weight, bias, training, momentum, eps), _, _ = bind(names, args, kwargs)
    with full_precision(x):
        centre, scale = kind.statistics(
            x, mean, var, weight, bool(training), 0.1 if momentum is None else momentum, 1e-5 if eps is None else eps
        )
        out = (x.mean - centre) * scale
        if bias is not None:
            out = out + bias.reshape(1, -1, *(1,) * (x.ndim - 2))
        return LowRankVariable.of(out, x.factors * scale, x.remainder * scale.square(), x.sources, x.settings)


def _elementwise(rule: Rule, kind: Elementwise, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LowRankVariable:
    """Exact marginal moments; rows times E[f'] (Stein); remainder what is over, E[f']^2 of the old one included."""
    variables: list[LowRankVariable] = unique(args, kwargs)  # type: ignore[assignment]
    if Elementwise.common_ancestor(variables) is None:
        return _of_several(rule, kind, out_of_place(func), args, kwargs, variables)
    out = kind(func, args, kwargs)
    origin = out.origin
    assert origin is not None and isinstance(out, LowRankVariable)
    x: LowRankVariable = origin.parent  # type: ignore[assignment]
    if not x.sources:
        return out
    with full_precision(x):
        gain = _gain(rule, func, args, kwargs, origin, out.shape, direct=len(random_variables(args, kwargs)) == 1)
        square = gain.square()
        # Var f(x) >= E[f']^2 Var x for Gaussian x (Chernoff 1981): a negative difference is rounding.
        excess = torch.clamp(out.var - square * x.var, min=0)
        made = LowRankVariable.of(
            out.mean, _broadcastable(x.factors, out.ndim) * gain, excess + square * x.remainder, x.sources, x.settings
        )
    return made.derived(origin=origin)  # type: ignore[return-value]


def _gain(
    rule: Rule, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], origin: Any, out_shape: torch.Size, *, direct: bool
) -> Tensor:
    """E[f'(x)]: a constant slope, the closed form of the function's rule, else quadrature."""
    x = origin.parent
    mean, var = _spread(x.mean, out_shape), _spread(x.var, out_shape)
    if not origin.whole_line:  # quadrature would leave its domain; where nothing varies, an infinite slope says nothing
        return torch.where(var > 0, torch.func.jvp(origin.function, (mean,), (torch.ones_like(mean),))[1], 0)
    if direct and rule.name in _AFFINE and not (rule.name in ("div", "divide", "true_divide") and not is_same(args[0], x)):
        return torch.func.jvp(origin.function, (mean,), (torch.ones_like(mean),))[1]
    function = getattr(gaussian, _CLOSED_FORMS.get(rule.name, rule.name), None)
    if direct and function in gaussian.GAINS and is_same(args[0] if args else kwargs.get("input"), x):
        names = list(inspect.signature(function).parameters)[2:]
        values, _, _ = bind(("input", *names), args, kwargs)
        options: dict[str, Any] = {n: v for n, v in zip(names, values[1:], strict=True) if v is not None}
        if rule.name == "prelu" and options["negative_slope"].numel() > 1:
            options["negative_slope"] = options["negative_slope"].reshape(1, -1, *(1,) * (x.ndim - 2))  # type: ignore[union-attr]
        return gaussian.gain(function, mean, var, **options)
    return quadrature_gain(lambda value: origin.function(value).to(value.dtype), mean, var, origin.kinks)


def _of_several(
    rule: Rule, kind: Elementwise, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], variables: list[LowRankVariable]
) -> LowRankVariable:
    """An elementwise function of several variables: rows by its slopes at the means.

    A product is exact. For others the remainder is that of the rule for independent operands, with what the
    total variances add beyond first order.
    """
    like = variables[0]
    with full_precision(like):
        sources, stacks = aligned(variables)
        if rule.name in _PRODUCTS:
            return _product(args, kwargs, sources, like.settings)
        out_shape = torch.broadcast_shapes(*_shapes_in(args, kwargs))
        points = [_spread(x.mean, out_shape) for x in variables]

        def function(*values: Tensor) -> Tensor:
            value = {id(x): each for x, each in zip(variables, values, strict=True)}
            return func(*substitute(args, lambda x: value[id(x)]), **substitute(kwargs, lambda x: value[id(x)]))

        rows: Any = 0
        for i, stack in enumerate(stacks):
            tangents = tuple(torch.ones_like(p) if i == j else torch.zeros_like(p) for j, p in enumerate(points))
            slope = torch.func.jvp(function, tuple(points), tangents)[1]
            rows = rows + _broadcastable(stack, len(out_shape)) * slope
        independent = kind.independent or first_order
        totals = {id(x): x.independent() for x in variables}
        remainders = {id(x): x.independent(x.remainder) for x in variables}

        def moments(rule: Function, replace: dict[int, LowRankVariable]) -> Any:
            return rule(func, substitute(args, lambda x: replace[id(x)]), substitute(kwargs, lambda x: replace[id(x)]))

        mean, total = moments(independent, totals)
        remainder = moments(independent, remainders)[1]
        if rule.name not in _AFFINE:
            remainder = remainder + torch.clamp(total - moments(first_order, totals)[1], min=0)
    return LowRankVariable.of(mean, rows, remainder, sources, like.settings)


def _spread(value: Tensor, shape: torch.Size) -> Tensor:
    """``value`` broadcast, with memory of its own for every element, as forward derivatives want."""
    return value.expand(shape).contiguous()


def _shapes_in(*values: Any) -> list[torch.Size]:
    return [x.shape for x in _pytree.tree_leaves(values, is_leaf=lambda x: isinstance(x, RandomVariable)) if hasattr(x, "shape")]


def _product(args: tuple[Any, ...], kwargs: dict[str, Any], sources: tuple[Source, ...], settings: Settings) -> LowRankVariable:
    """x y: mean m1 m2 + c, rows A1 m2 + A2 m1, variance m1^2 v2 + m2^2 v1 + 2 m1 m2 c + v1 v2 + c^2 (c the covariance)."""
    (x, y), _, _ = bind(("input", "other"), args, kwargs)
    ndim = max(x.ndim, y.ndim)
    a, b = (_broadcastable(_rows_on(each, sources), ndim) for each in (x, y))
    c = (a * b).sum(0)
    remainder = x.mean.square() * y.remainder + y.mean.square() * x.remainder + x.var * y.var + c.square()
    return LowRankVariable.of(x.mean * y.mean + c, a * y.mean + b * x.mean, remainder, sources, settings)


def _extremum(sign: int, input: Any, other: Any) -> LowRankVariable:
    """max(x, y) = y + relu(x - y); min by symmetry. Rows weigh x and y by P(x > y), remainders by its square."""
    if not isinstance(input, LowRankVariable):
        input, other = other, input
    x: Any = input if sign > 0 else -input
    y: Any = other if sign > 0 else -other
    difference: Any = x - y
    if not isinstance(difference, LowRankVariable):  # the two are one variable
        return input
    positive: Any = torch.relu(difference)  # type: ignore[arg-type]
    made: Any = positive + y
    if not isinstance(y, LowRankVariable) or not difference.sources:
        return made if sign > 0 else -made
    above = gaussian.gain(gaussian.relu, difference.mean, difference.var)
    excess = torch.clamp(positive.var - above.square() * difference.var, min=0)
    remainder = above.square() * x.remainder + (1 - above).square() * y.remainder + excess
    made = LowRankVariable.of(made.mean, made.factors, remainder, made.sources, made.settings)
    return made if sign > 0 else -made


def _conjunction(name: str, input: Any, other: Any) -> LowRankVariable:
    """Of two indicators: mean and rows as those of the product that it is, the rest of p (1 - p) remainder."""
    both: Any = input * other
    made: Any = both if "and" in name else input + other - (2 if "xor" in name else 1) * both
    excess = torch.clamp(made.mean * (1 - made.mean) - made.factors.square().sum(0), min=0)
    return LowRankVariable.of(made.mean, made.factors, excess, made.sources, made.settings)


def _choice(condition: LowRankVariable, input: Any, other: Any) -> LowRankVariable:
    """where(c, x, y) = y + p (x - y) with p the indicator of c; remainders of x and y weigh p^2 and (1-p)^2."""
    chosen: Any = condition * (input - other)
    made: Any = chosen + other
    if not isinstance(chosen, LowRankVariable) or not isinstance(other, LowRankVariable):
        return made  # type: ignore[no-any-return]
    remainder = chosen.remainder + (1 - 2 * condition.mean) * other.remainder
    return LowRankVariable.of(made.mean, made.factors, remainder, made.sources, made.settings)


def _mask(kind: Any, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dropout: the mean's slope on the rows; the masks are noise of their own, so the rest is remainder."""
    (x,) = unique(args, kwargs)
    out = kind(func, args, kwargs)
    if out is x or out.sources:
        return out
    replaced = lambda mean: substitute((args, kwargs), lambda x: x.with_moments(mean, torch.zeros_like(mean)))  # noqa: E731

    def mean_of(mean: Tensor) -> Tensor:
        new_args, new_kwargs = replaced(mean)
        return kind(func, new_args, new_kwargs).mean

    slope = torch.func.jvp(mean_of, (x.mean,), (torch.ones_like(x.mean),))[1]
    remainder = torch.clamp(out.var - slope.square() * (x.var - x.remainder), min=0)
    return LowRankVariable.of(out.mean, x.factors * slope, remainder, x.sources, x.settings)


def _carried(rule: Rule, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other rule. One written in operations that have rules carries the rows itself; else it is linearised."""
    result = rule(func, args, kwargs)
    made = random_variables(result)
    if not made or all(isinstance(x, LowRankVariable) and x.sources for x in made):
        return result
    return _linearized(rule, func, args, kwargs)


def _linearized(rule: Rule, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Mean by the rule at the total variance; rows by the derivative of that mean, or of the plain function at the mean
    where it has none; the rule's own variance for the remainder."""
    variables: list[LowRankVariable] = unique(args, kwargs)  # type: ignore[assignment]
    settings = variables[0].settings
    if rule.name == "instance_norm":  # its running statistics are up to date: the rule has been called once
        kwargs = _without_running_statistics(args, kwargs)
        args = ()

    def by_rule(values: dict[int, LowRankVariable]) -> list[RandomVariable]:
        found = rule(func, substitute(args, lambda x: values[id(x)]), substitute(kwargs, lambda x: values[id(x)]))
        return random_variables(found)

    result = rule(func, *substitute((args, kwargs), lambda x: x.independent()))
    total = random_variables(result)
    remainder = by_rule({id(x): x.independent(x.remainder) for x in variables})
    means = tuple(x.mean.contiguous() for x in variables)  # forward derivatives take no expanded memory

    def mean_by_rule(*values: Tensor) -> list[Tensor]:
        found = by_rule({id(x): x.with_moments(value, x.var) for x, value in zip(variables, values, strict=True)})
        return [x.mean for x in found]

    def plain(*values: Tensor) -> list[Tensor]:
        value = {id(x): each for x, each in zip(variables, values, strict=True)}
        found = func(*substitute(args, lambda x: value[id(x)]), **substitute(kwargs, lambda x: value[id(x)]))
        return [x for x in _pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]

    sources, stacks = aligned(variables)
    try:
        rows = torch.vmap(lambda *row: torch.func.jvp(mean_by_rule, means, row)[1])(*stacks)
    except (RuntimeError, NotImplementedError):  # a closed form without forward derivatives
        rows = on_each(lambda *row: torch.func.jvp(plain, means, row)[1], stacks)
    made = iter(
        LowRankVariable.of(t.mean, r, d.var, sources, settings) for t, r, d in zip(total, rows, remainder, strict=True)
    )
    return substitute(result, lambda _: next(made))


def _without_running_statistics(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    values, _, _ = bind(names, args, kwargs)
    given = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    if given.get("use_input_stats", True):
        given.pop("running_mean", None)
        given.pop("running_var", None)
    return given


# --- the start -----------------------------------------------------------------------------------

_PROBES: dict[int, Source] = {}


def standard_normal(zeros: Tensor, settings: Settings) -> LowRankVariable:
    """Standard normal variables shaped like ``zeros`` (first dimension: the batch), one row for each element of a sample.

    With ``rank=r`` below that, r random probes stand for the rows: rows of a Hadamard matrix with random signs, drawn for
    each sample, so that every element's variance is exact and covariances are right on average. All sources share them.
    """
    each = zeros.shape[1:] if zeros.ndim > 1 else zeros.shape
    elements = math.prod(each)
    rank = settings.rank
    if rank is not None and rank < elements:
        source = _PROBES.setdefault(rank, Source(rank))
        factors = signed_probes(rank, zeros, settings.seed)
    else:
        source = Source(elements)
        eye = torch.eye(elements, dtype=zeros.dtype, device=zeros.device).reshape(elements, *each)
        factors = (eye.unsqueeze(1) if zeros.ndim > 1 else eye).expand(elements, *zeros.shape)
    return LowRankVariable.of(zeros, factors, torch.zeros_like(zeros), (source,), settings)


def signed_probes(count: int, zeros: Tensor, seed: int | None) -> Tensor:
    """(count, *shape): +-1/sqrt(count), orthogonal where a sample has a power of two of elements."""
    generator = None if seed is None else torch.Generator(zeros.device).manual_seed(seed)
    batch, elements = (zeros.shape[0], math.prod(zeros.shape[1:])) if zeros.ndim > 1 else (1, zeros.numel())
    size = 1 << max(elements - 1, count - 1, 1).bit_length()
    chosen = torch.randperm(size, generator=generator, device=zeros.device)[:count]
    shared_bits = chosen.unsqueeze(1) & torch.arange(elements, device=zeros.device)
    parity = torch.zeros_like(shared_bits)
    for bit in range(size.bit_length()):
        parity = parity ^ (shared_bits >> bit & 1)
    signs = torch.randint(0, 2, (batch, elements), generator=generator, device=zeros.device)
    probes = 1 - 2 * (parity.unsqueeze(1) ^ signs).to(zeros.dtype)
    return (probes / math.sqrt(count)).reshape(count, *zeros.shape)


SOURCES["lowrank"] = standard_normal
