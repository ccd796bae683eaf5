"""Rules by mathematical kind: how mean and variance pass through any operation of that kind.

A kind is called with a torch function and its arguments, some of which hold random variables, and returns
random variables. What is particular to one operation is data on the kind: names of arguments, closed-form
moments. Adding an operation of a known kind takes one line; see README.md beside this file.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rvconvert.core.random_variable import Origin, RandomVariable, making_later, random_variables
from rvconvert.core.registry import REGISTRY, Exactness, FunctionTable, Kind, Rule, operation_name, spellings
from rvconvert.errors import ConversionError, UnsupportedOperationError
from rvconvert.moments.composed import composed_moments
from rvconvert.moments.quadrature import Detached
from rvconvert.rules.ancestry import (
    Interval,
    UnderLaw,
    ancestors,
    anywhere,
    as_numbers,
    everywhere,
    followed_by,
    gaussian_ancestor,
    identity,
    interval_of,
    meetings,
    not_everywhere,
    of_floats,
    spelling,
    under_law,
)
from rvconvert.rules.calls import (
    Function,
    at_means,
    bind,
    full_precision,
    join,
    moments,
    out_of_place,
    shapes_of,
    substitute,
    unique,
)
from rvconvert.rules.learned import learned_moments
from rvconvert.rules.relations import is_same, rows_moved, transposes

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence


def add_rule(
    name: str,
    kind: Kind,
    exactness: Exactness,
    assumption: str = "none",
    *,
    modules: Sequence[type[torch.nn.Module]] = (),
    functions: Sequence[Function] | None = None,
    keeps_latent: bool = False,
) -> Rule:
    """Register the library's own rule for the operation ``name``, in every spelling torch has for it."""
    rule = Rule(name, kind, exactness, assumption, tuple(modules), keeps_latent=keeps_latent)
    # An alias of an operation that has its rule already (torch.absolute is torch.abs) keeps it.
    found = [f for f in dict.fromkeys(spellings(name) if functions is None else functions) if REGISTRY.find(f) is None]
    if found or modules:  # an operation that this version of torch does not have needs no rule
        REGISTRY.register(rule, found)
    return rule


@dataclass(frozen=True)
class Metadata:
    """Asks for shape, type or a fresh tensor like it: the answer is that of the mean, and is not random."""

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return at_means(func, args, kwargs)


@dataclass(frozen=True)
class Read(Metadata):
    """Asks for values, in Python or in the shape of its result: a random variable has none to give."""

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise value_error(operation_name(func))


def value_error(what: str) -> ConversionError:
    """The refusal of a question for the value of a random variable."""
    advice = "Choose by torch.where(x > 0, a, b), or leave that part of the model out of the conversion (methods=...)."
    if "torchdiffeq" in what:
        advice = "Take a solver whose steps do not depend on it: odeint(..., method='rk4'), or odeint_adjoint."
    return ConversionError(
        f"{what} asks for the value of a random variable, which has none: the result would depend on a draw. {advice}"
    )


@dataclass(frozen=True)
class Collapse:
    """Takes every random variable at its mean: the result is a plain tensor, as the user's loss expects it."""

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return at_means(func, args, kwargs)


_SELECTS = frozenset("__getitem__ getitem masked_select".split())
_CASTS = frozenset("float double half bfloat16 to type type_as".split())  # which make numbers of truth values
_KEEPS_ORDER = frozenset("expand expand_as broadcast_to view view_as reshape reshape_as flatten squeeze".split())
_TRANSPOSE = frozenset("t transpose swapaxes swapdims permute adjoint movedim moveaxis".split())


@dataclass(frozen=True)
class Shape:
    """Selects, moves or joins elements without changing them: mean and variance go the same way.

    ``data`` names the leading arguments whose values end up in the result; a plain tensor or number among
    them is a constant, of variance 0. With ``same`` every element stays where it is, so that the result is a function
    of its input: ``x * x.clone()`` is a square.
    """

    names: tuple[str, ...] = ("input",)
    data: tuple[str, ...] = ("input",)
    same: bool = False

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        func = MOVES_ANY_LAYOUT.get(func) or out_of_place(func)
        like = random_variables(args, kwargs)[0]
        values, rest, options = bind(self.names, args, kwargs)
        present = {name: value for name, value in zip(self.names, values, strict=True) if value is not None}
        if getattr(func, "__name__", "") in _SELECTS:
            rest = picking(rest, "read")
        # What is asked of another argument (``view_as(other)``) is its shape or type, which its mean has.
        rest, options = substitute(rest, lambda x: x.mean), substitute(options, lambda x: x.mean)
        if not random_variables(*(present.get(name) for name in self.data)):
            return self.call(func, substitute(present, lambda x: x.mean), rest, options)
        mean = self.call(func, {n: substitute(v, lambda x: x.mean) for n, v in present.items()}, rest, options)
        if mean is like.mean:  # x.float() of what is float already, x.contiguous(): the variable itself
            return as_numbers(like) if getattr(func, "__name__", "") in _CASTS else like
        name = getattr(func, "__name__", "")
        if name in _KEEPS_ORDER and mean.shape == like.shape and isinstance(present.get("input"), RandomVariable):
            return like  # so is what is viewed as what it is
        var = self.call(
            func,
            {n: variance_or_zero(v) if n in self.data else substitute(v, lambda x: x.mean) for n, v in present.items()},
            rest,
            options,
        )
        made = join(mean, var, like)
        key = None if self.same else spelling(func, args, kwargs, {id(x): x.key for x in random_variables(args, kwargs)})
        if key is not None:
            for index, each in enumerate(random_variables(made)):
                each.selected((key, index))
        alone = [*map(type, present.values())] == [type(like)]  # and in no list
        if like.density is not None and alone and isinstance(made, RandomVariable):
            made.distributed(like.density.moved(lambda x: self.call(func, dict.fromkeys(present, x), rest, options)))
        if self.same and isinstance(made, RandomVariable):
            same = Detached.apply if getattr(func, "__name__", "") == "detach" else lambda x: func(x, *rest, **options)
            made.derived(origin=Origin(like.snapshot(), same, line=(1.0, 0.0), affine=True, interval=interval_of(like)))
        if alone and isinstance(made, RandomVariable):
            made = rows_moved(made, like, func, args)
        if isinstance(made, RandomVariable) and getattr(func, "__name__", "") in _TRANSPOSE and made.ndim > 1:
            found = under_law(func, args, kwargs) if like.origin is not None else None
            if found is not None and found.can_join:  # a softmax along another dimension, of Gumbel noise
                made.derived(origin=Origin(found.root.snapshot(), found.function, joint=True))
            exchanged = like.mean.mT
            if (mean.shape, mean.stride()) == (exchanged.shape, exchanged.stride()):
                made.transposes(like.snapshot())
        return made

    def call(self, func: Function, values: dict[str, Any], rest: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """``func`` with the bound arguments: positional while there is no gap, else by keyword."""
        positional = []
        names = list(self.names)
        while names and names[0] in values:
            positional.append(values[names.pop(0)])
        if rest and names:
            raise TypeError(f"{func} got positional arguments behind a missing one")
        return func(*positional, *rest, **{n: values[n] for n in names if n in values}, **options)


def picking(index: Any, what: str) -> Any:
    """An index without the random variables in it: an indicator, x > 0, of what does not vary is the mask that it is.

    Raises:
        UnsupportedOperationError: one varies, ``y[y < 0] *= -1``, and the number of elements would be random.
    """

    def certain(x: RandomVariable) -> torch.Tensor:
        mask = x.dtype.is_floating_point or x.dtype == torch.bool
        if mask and bool(x.var.any()):
            raise UnsupportedOperationError(
                f"a random variable picks which elements are {what}, and how many differs with each draw; give all of them a "
                "value: y = torch.where(mask, value, y) in the place of y[mask] = value"
            )
        return x.mean.bool() if mask else x.mean

    return substitute(index, certain)


# The variance may lie in memory in another order than the mean (an expanded one, say), where a view is refused.
MOVES_ANY_LAYOUT = FunctionTable(
    {
        torch.Tensor.view: torch.Tensor.reshape,
        torch.Tensor.view_as: torch.Tensor.reshape_as,
        # Written in Python on top of the function, in a way that torch.compile cannot follow.
        torch.Tensor.unflatten: torch.unflatten,
    }
)


def variance_or_zero(value: Any) -> Any:
    """The variance of every random variable in ``value``; zero for every plain tensor and number."""
    if isinstance(value, RandomVariable):
        return value.var
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, (list, tuple)):
        return type(value)(variance_or_zero(each) for each in value)
    return type(value)(0) if isinstance(value, (int, float)) else value


@dataclass(frozen=True)
class FixedLinear:
    """A linear map with fixed coefficients: ``square(func, args, kwargs)`` applies the map of their squares.

    Paper eqs 2 and 3. ``args`` and ``kwargs`` given to ``square`` hold the variance in the variable's place.
    """

    square: Callable[[Function, tuple[Any, ...], dict[str, Any]], torch.Tensor]

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        func = out_of_place(func)
        like = random_variables(args, kwargs)[0]
        mean = at_means(func, args, kwargs)
        with full_precision(like):
            var = self.square(func, substitute(args, lambda x: x.var), substitute(kwargs, lambda x: x.var))
        found = under_law(func, args, kwargs)
        origin = None if found is None or not found.can_join else Origin(found.root.snapshot(), found.function, joint=True)
        return like.with_moments(mean, var).derived(origin=origin)


def same_map(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """``square`` of a map whose coefficients are all 0 or 1: a sum."""
    result: torch.Tensor = func(*args, **kwargs)
    return result


@dataclass(frozen=True)
class Bilinear:
    """A sum of products of elements of two operands, plus a bias: Linear, convolutions, matmul.

    ``names`` are the two operands and, if there is one, the bias. Paper eqs 2 and 3 where one operand is
    constant; with both random, var = B(v1, m2^2 + v2) + B(m1^2, v2).
    """

    names: tuple[str, ...] = ("input", "weight", "bias")

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        like = random_variables(args, kwargs)[0]
        operands, rest, options = bind(self.names, args, kwargs)

        def product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            return func(a, b, *((bias,) if len(self.names) > 2 else ()), *rest, **options)

        (a, a_var), (b, b_var) = moments(operands[0]), moments(operands[1])
        bias, bias_var = moments(operands[2]) if len(operands) > 2 else (None, None)
        mean = product(a, b, bias)
        with full_precision(like):
            if a_var is None and b_var is None:
                var = torch.zeros_like(mean)
            elif b_var is None:
                var = self.squared(product, a_var, b, like)
            elif a_var is None:
                var = widened(product, a.square(), b_var)
            else:
                var = widened(product, a_var, b.square() + b_var) + widened(product, a.square(), b_var)
            if bias_var is not None:  # where the operation puts a bias: of a convolution, along the channels
                var = var + product(torch.zeros_like(a), torch.zeros_like(b), bias_var)
        return like.with_moments(mean, var)

    @staticmethod
    def squared(product: Function, var: torch.Tensor, weight: torch.Tensor, like: RandomVariable) -> torch.Tensor:
        """The product of a variance and a squared constant, at the width the settings ask for."""
        dtype = like.settings.variance_dtype
        if dtype is None:
            return widened(product, var, weight.square())
        return product(var.to(dtype), weight.square().to(dtype)).to(var.dtype)


@dataclass(frozen=True)
class MatrixProduct(Bilinear):
    """Rows times columns. Of a matrix and its own transpose the diagonal is of squares: more v, and twice the variance."""

    names: tuple[str, ...] = ("input", "other")

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        made = super().__call__(func, args, kwargs)
        (a, b), *_ = bind(self.names, args, kwargs)
        if not (isinstance(a, RandomVariable) and isinstance(b, RandomVariable)):
            return made
        if a.ndim == 1 and is_same(a, b):
            return made.with_moments(made.mean + a.var.sum(), 2 * made.var)
        if transposes(a, b) or transposes(b, a):
            return of_itself(made, a.var.sum(-1))
        return made


def of_itself(made: RandomVariable, var: torch.Tensor) -> RandomVariable:
    """A matrix of products of rows, each row with itself on the diagonal: Σ z² of N(m, v) has the mean Σ m² + v and 4m²v + 2v².

    Args:
        made: (..., n, n) as of rows that are independent of each other.
        var: (..., n) sums of the variances of a row.
    """
    diagonal = made.var.diagonal(dim1=-2, dim2=-1)
    return made.with_moments(made.mean + torch.diag_embed(var), made.var + torch.diag_embed(diagonal))


def widened(product: Function, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product at the wider of two dtypes: under autocast one factor may be of half width and the other not."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    result: torch.Tensor = product(a.to(dtype), b.to(dtype))
    return result


# Comparisons: whether they hold where the first operand is the greater one.
_ABOVE = dict.fromkeys(("gt", "ge", "greater", "greater_equal"), True) | dict.fromkeys(("lt", "le", "less", "less_equal"), False)


def _as_wide(given: Any, value: torch.Tensor) -> Any:
    """A floating tensor, a slope say, as wide as the value it meets: not every operation takes two dtypes."""
    narrow = isinstance(given, torch.Tensor) and given.is_floating_point() and given.itemsize < value.itemsize
    return given.to(value.dtype) if narrow else given


@dataclass(frozen=True)
class Elementwise:
    """A function of each element by itself (and of constants that broadcast with it).

    Of one random variable: closed-form ``moments(func, args, kwargs)`` if given, else quadrature. Several
    random variables that are elementwise functions of a common one are one function of that one. Several
    that are not: ``independent(func, args, kwargs)`` if given, else linearised at the means. So is a function of
    a common one that is not defined on the ``whole_line``, since quadrature would leave its domain. ``kinks`` says where
    the function of one variable is not smooth, ``line`` gives its slope and shift where it is a line of plain numbers.
    A function that is ``meeting`` has a kink where two operands are equal, as maxima and comparisons have.
    One that ``joins``, as the exponential does, or a logarithm of what is known to be positive, is one function with what
    bent its input, back to a Gaussian: the closed form would give the tail of a Gaussian to what is bounded.
    ``interval`` says where the values of the function lie.
    A draw that is not Gaussian is integrated over its own law, but where the function is ``affine`` in it.
    Of one with ``result_alone`` torch keeps no more than that for gradients; so here, where its input can be made again.
    """

    moments: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    independent: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    kinks: Callable[[tuple[Any, ...], dict[str, Any]], tuple[float, ...]] | None = None
    whole_line: Callable[[tuple[Any, ...], dict[str, Any]], bool] = everywhere
    line: Callable[[tuple[Any, ...], dict[str, Any]], tuple[float, float] | None] | None = None
    meeting: bool = False
    affine: Callable[[tuple[Any, ...], dict[str, Any]], bool] = not_everywhere
    joins: Callable[[tuple[Any, ...], dict[str, Any]], bool] = not_everywhere
    interval: Callable[[tuple[Any, ...], dict[str, Any]], Interval] = anywhere
    result_alone: bool = False

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RandomVariable:
        kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        func = out_of_place(func)
        inputs = unique(args, kwargs)
        like = inputs[0]
        if not (len(random_variables(args, kwargs)) == 1 and self.affine(args, kwargs)):
            found = under_law(func, args, kwargs)
            if found is not None:
                with full_precision(like):
                    return self.of_a_draw(found, like, func, args, kwargs)
        ancestor = self.common_ancestor(inputs, self.meeting)
        with full_precision(like):
            if ancestor is None:
                return like.with_moments(*(self.independent or first_order)(func, args, kwargs))
            lies = self.interval(args, kwargs)
            parent, functions, kinks, whole_line, keys = ancestor
            whole_line = whole_line and self.whole_line(args, kwargs)
            direct = len(random_variables(args, kwargs)) == 1
            affine = direct and self.affine(args, kwargs)
            # A closed form, and quadrature over several operands, would take what is bent already as Gaussian.
            joined = self.joins(args, kwargs) if direct else not (kinks or self.meeting)
            chain = gaussian_ancestor(parent) if whole_line and joined else None
            if chain is not None:
                direct, parent, kinks = False, chain.variable, chain.kinks
                functions = [followed_by(chain.function, each) for each in functions]
                keys = [None if key is None or chain.key is None else (chain.key, key) for key in keys]

            def function(value: torch.Tensor) -> torch.Tensor:
                values = {id(x): f(value) for x, f in zip(inputs, functions, strict=True)}
                given, named = (substitute(each, lambda x: values[id(x)]) for each in (args, kwargs))
                return func(*(_as_wide(x, value) for x in given), **{name: _as_wide(x, value) for name, x in named.items()})

            if direct and self.kinks is not None:
                kinks = self.kinks(args, kwargs)
            key = spelling(func, args, kwargs, {id(x): key for x, key in zip(inputs, keys, strict=True)})
            closed_form = self.moments if direct else None

            def moments() -> tuple[torch.Tensor, torch.Tensor]:
                if closed_form is not None:
                    with like.kept_as_remade() if self.result_alone else nullcontext():
                        return closed_form(func, args, kwargs)
                if not whole_line:
                    return first_order(function, (parent,), {})
                shape = torch.broadcast_shapes(parent.shape, *shapes_of(args, kwargs))
                of = (parent.mean.expand(shape), parent.var.expand(shape))
                wide = chain is not None
                mean, var = composed_moments(key, of_floats(function), *of, kinks, read=learned_moments, wide=wide)
                low, high = lies
                # Which rounding may leave by some millionths.
                return mean.clamp(low, high) if math.isfinite(low) or math.isfinite(high) else mean, var

            # Of numbers alone: a tensor may be written in place by the time.
            if key is not None and making_later() and (whole_line or any(x.is_open for x in inputs)):
                made = like.with_later_moments(torch.broadcast_shapes(*(x.shape for x in inputs)), moments)
            else:
                made = like.with_moments(*moments())
        line = self.line(args, kwargs) if direct and self.line is not None else None
        origin = Origin(parent.snapshot(), function, kinks, whole_line, line, affine=affine, key=key, interval=lies)
        return made.derived(origin=origin)

    @staticmethod
    def of_a_draw(
        found: UnderLaw, like: RandomVariable, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RandomVariable:
        """A function of a draw that is not Gaussian; a comparison of the draw itself by its distribution function."""
        above = _ABOVE.get(getattr(func, "__name__", "").strip("_"))
        if above is not None and len(args) == 2 and like.origin is None:
            other = args[1] if args[0] is like else args[0]
            if not isinstance(other, RandomVariable):
                below = like.density.below(torch.as_tensor(other, dtype=like.dtype, device=like.device))  # type: ignore[union-attr]
                if below is not None:
                    shape = torch.broadcast_shapes(like.shape, below.shape)
                    p = (1 - below if above == (args[0] is like) else below).expand(shape)
                    origin = Origin(found.root.snapshot(), found.function)
                    return like.with_moments(p, p * (1 - p)).derived(origin=origin)
        return found.result(like)

    @staticmethod
    def common_ancestor(
        inputs: Sequence[RandomVariable], meeting: bool = False
    ) -> tuple[RandomVariable, list[Function], tuple[float, ...], bool, list[Hashable | None]] | None:
        """The nearest variable that all of ``inputs`` are functions of: functions, kinks, defined everywhere, keys."""
        if len(inputs) == 1:
            return inputs[0], [identity], (), True, [()]
        chains = [{found.variable.key: found for found in ancestors(each)} for each in inputs]
        for shared, first in chains[0].items():
            if all(shared in chain for chain in chains):
                found = [chain[shared] for chain in chains]
                kinks = {k for each in found for k in each.kinks}
                if meeting:
                    kinks |= meetings([each.line for each in found if each.line])
                whole_line = all(each.whole_line for each in found)
                functions, keys = [each.function for each in found], [each.key for each in found]
                return first.variable, functions, tuple(sorted(kinks)), whole_line, keys
        return None


def first_order(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """An elementwise function of independent variables, linearised at the means: var = sum of (df/dx_i)^2 v_i."""
    inputs = unique(args, kwargs)
    shape = torch.broadcast_shapes(*shapes_of(args, kwargs))
    # Memory of its own for every element, as forward derivatives want.
    means = [x.mean.expand(shape).contiguous() for x in inputs]

    def function(*values: torch.Tensor) -> torch.Tensor:
        value = {id(x): each for x, each in zip(inputs, values, strict=True)}
        return func(*substitute(args, lambda x: value[id(x)]), **substitute(kwargs, lambda x: value[id(x)]))

    mean = function(*means)
    var = torch.zeros_like(mean)
    for i, x in enumerate(inputs):
        tangents = tuple(torch.ones_like(m) if i == j else torch.zeros_like(m) for j, m in enumerate(means))
        slope = torch.func.jvp(function, tuple(means), tangents)[1]
        # Where nothing varies, an infinite slope (of a root at 0) says nothing.
        v = x.var.expand(shape)
        var = var + torch.where(v > 0, slope, 0).square() * v
    return mean, var


@dataclass(frozen=True)
class Composite:
    """An operation written out in operations that have rules: ``body`` is called with the operation's arguments.

    With ``joins`` it gives one tensor in which elements meet, and a draw that is not Gaussian goes through it as it is.
    """

    body: Function
    joins: bool = False

    def __call__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.joins:
            found = under_law(out_of_place(func), args, kwargs)
            if found is not None and found.can_join:
                return found.result(random_variables(args, kwargs)[0], joint=True)
        return self.body(*args, **kwargs)
