"""``fuse=True``: adjacent linear maps with no activation between them propagate variance as one map.

With y = A x and z = B y, paper eqs 2 and 3 give var(z) = (B*B)(A*A) var(x), as if the elements of y were independent; the
truth is (BA*BA) var(x). Here a variable remembers the rows that lead to it from the last variable whose elements are
taken as independent, its root (a latent, the result of an activation), one row for each of the root's elements per
sample. The map is the same for every sample, so rows have no batch dimension: a stretch costs one pass of the weights for
each element of the root, and rows are made only where a second map needs them. A root has at most ``MOST_ELEMENTS``.

What is fused, all of it in stretches that begin at a root of that size: Linear, convolutions, transposed convolutions,
matmul with a matrix; interpolation of any mode, average pooling, sums and means; batch normalization (its statistics as
constants); reshaping, selecting, joining; scaling by and adding constants; sums of two branches of one root. Besides,
at any size: nearest upsampling by a whole factor, then a convolution of stride 1 (by phases, at low resolution).

What is not, and is taken as independent, as without ``fuse``: at larger sizes a second convolution, a residual add and
bilinear upsampling; products of variables, attention and normalization by statistics of a sample; branches of different
roots; reflected or replicated padding between upsampling and convolution.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree

from rvconvert.core.random_variable import RandomVariable, Settings, random_variables
from rvconvert.rules import shape
from rvconvert.rules.kinds import (
    Bilinear,
    Elementwise,
    FixedLinear,
    Shape,
    at_means,
    bind,
    full_precision,
    out_of_place,
    substitute,
    unique,
    widened,
)
from rvconvert.rules.noise import CARRIERS
from rvconvert.rules.normalization import BatchNormalization

if TYPE_CHECKING:
    from rvconvert.core.registry import Rule

__all__ = ["MOST_ELEMENTS", "FusedVariable", "History"]

Function = Callable[..., Any]
MOST_ELEMENTS = 1024  # of a root, in each sample: the passes that a stretch may cost
_MOST_NUMBERS = 1 << 26  # in the rows of one variable: 256 MiB of float32


class Once:
    """A function without arguments, called when it is first asked for; what no_grad made does not serve autograd."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: dict[bool, Any] = {}

    def __call__(self) -> Any:
        grad = torch.is_grad_enabled()
        if grad not in self._made:
            self._made[grad] = self._make()
        return self._made[grad]


class History:
    """How a variable hangs linearly on its root: x = rows^T e + constant, with independent e of variances ``root``.

    Attributes:
        root: (B, k) variances; histories of one root hold the same object.
        rows: gives (k, *sample shape), the coefficients of each of the root's k elements.
    """

    def __init__(self, root: Tensor, rows: Callable[[], Tensor]) -> None:
        self.root = root
        self.rows = Once(rows)

    @classmethod
    def begin(cls, var: Tensor) -> History | None:
        """The history of a root itself; None where it has no batch dimension or too many elements."""
        elements = math.prod(var.shape[1:])
        if var.ndim < 2 or not 0 < elements <= MOST_ELEMENTS:
            return None
        eye = lambda: torch.eye(elements, dtype=var.dtype, device=var.device).reshape(elements, *var.shape[1:])  # noqa: E731
        return cls(var.reshape(var.shape[0], elements), eye)

    def var(self) -> Tensor:
        """(B, *sample shape): the variance of the whole map."""
        rows = self.rows()
        root = self.root.to(rows)
        return (root @ rows.square().flatten(1)).reshape(root.shape[0], *rows.shape[1:])

    def leading_to(self, out: RandomVariable | Tensor, rows: Callable[[], Tensor]) -> History | None:
        """The history of ``out``, of the same root; None where samples do not match or the rows would be too large."""
        k = self.root.shape[1]
        if out.ndim < 2 or out.shape[0] != self.root.shape[0] or k * math.prod(out.shape[1:]) > _MOST_NUMBERS:
            return None
        return History(self.root, rows)


class FusedVariable(RandomVariable):
    """A random variable that knows the linear map that made it; its variances are those of the whole map.

    Attributes:
        independent: True where each element hangs on elements of the root that no other hangs on.
    """

    precedence = 1
    _own_history: History | None
    independent: bool
    _low: tuple[Tensor, tuple[int, ...]] | None

    def _fill(self, mean: Tensor, var: Tensor, settings: Settings) -> None:
        super()._fill(mean, var, settings)
        self._own_history = None
        self.independent = True
        self._low = None  # before nearest upsampling: variances and factors

    @property
    def history(self) -> History | None:
        """Root and rows. A variable that no linear map has made is its own root."""
        if self._own_history is None and self.independent:
            self._own_history = History.begin(self.var)
        return self._own_history

    def with_moments(self, mean: Tensor, var: Tensor) -> RandomVariable:
        """A root with these moments: its elements are taken as independent."""
        return FusedVariable._make(mean, var, self._settings)

    def apply(self, rule: Rule, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The rule, with the whole map's variance where it is linear."""
        args, kwargs = substitute(args, self._lift), substitute(kwargs, self._lift)
        kind: Any = rule.kind
        if rule is shape.SETITEM:
            return _WRITE(shape.setitem, args, kwargs)
        if isinstance(kind, Shape):
            return _move(rule.name, kind, func, args, kwargs)
        if isinstance(kind, (Bilinear, FixedLinear)):
            return _linear(rule.name, kind, func, args, kwargs)
        if isinstance(kind, BatchNormalization):
            return _batch_norm(kind, args, kwargs)
        if isinstance(kind, Elementwise) and rule.name in _SUMS:
            return _sum(rule.name, kind, func, args, kwargs)
        if isinstance(kind, Elementwise) and rule.name in _SCALINGS:
            return _scale(rule.name, kind, func, args, kwargs)
        return substitute(rule(func, args, kwargs), self._lift)

    def _lift(self, x: RandomVariable) -> RandomVariable:
        if isinstance(x, FusedVariable):
            return x
        return FusedVariable._make(x.mean, x.var, self.settings).derived(origin=x.origin, latent=x.latent)


CARRIERS[True] = FusedVariable
_WRITE = Shape(("input", "index", "value"), ("input", "value"))


def _common_history(variables: Sequence[Any]) -> History | None:
    """A history of the root that all variables share; None where there is none."""
    histories = [x.history for x in variables]
    first = histories[0]
    return first if first is not None and all(h is not None and h.root is first.root for h in histories) else None


def _continue(out: Any, history: History | None, rows: Callable[[], Tensor], *, independent: bool = False) -> Any:
    """``out`` marked with the history that leads to it, if there is one; else it is a root."""
    found = None if history is None else history.leading_to(out, rows)
    if found is not None:
        out._own_history, out.independent = found, independent
    return out


# --- moving elements ---------------------------------------------------------------------------------

# Elements keep their order: what still has the batch first has its samples apart.
_ORDERED = frozenset(
    (
        "view reshape view_as reshape_as flatten ravel unflatten squeeze unsqueeze contiguous clone "
        "float double half bfloat16 cuda cpu to type type_as resolve_conj resolve_neg positive"
    ).split()
)
_WITHIN_SAMPLES = frozenset(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"))
# Where in the positional arguments the dims stand; they must not be the batch's.
_DIMS = {
    **dict.fromkeys("narrow select unbind index_select sum mean".split(), slice(1, 2)),
    **dict.fromkeys("cat concat concatenate stack".split(), slice(1, 2)),
    **dict.fromkeys("chunk split split_with_sizes unsafe_chunk unsafe_split tensor_split".split(), slice(2, 3)),
    **dict.fromkeys("roll repeat_interleave".split(), slice(2, 3)),
    **dict.fromkeys("transpose swapaxes swapdims".split(), slice(1, 3)),
    "flip": slice(1, None),
    "permute": slice(1, None),
}
_DIM_NAMES = ("dim", "dims", "axis", "dim0", "dim1", "axis0", "axis1")
_REPEATING = frozenset("cat concat concatenate stack repeat_interleave index_select".split())


def _keeps_samples(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int) -> bool:
    """True where the operation treats every sample, an entry of the first dimension, by itself and alike."""
    if name in _ORDERED or name in _WITHIN_SAMPLES:
        return True
    if name in ("pad", "constant_pad_nd"):
        return len(args[1] if len(args) > 1 else kwargs["pad"]) < 2 * ndim
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index):
            return False
        taken = sum(type(i) in (int, slice) for i in index)
        return index[:1] == (slice(None),) or (index[:1] == (Ellipsis,) and taken < ndim)
    if name not in _DIMS:
        return False
    dims, _ = _pytree.tree_flatten([kwargs[n] for n in _DIM_NAMES if n in kwargs] or list(args[_DIMS[name]]))
    if not dims or not all(type(d) is int for d in dims):
        return False
    if name == "permute":
        return dims[0] % ndim == 0
    return all(d % (ndim + (name == "stack")) != 0 for d in dims)


def _move(name: str, kind: Shape, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = kind(func, args, kwargs)
    values, rest, options = bind(kind.names, args, kwargs)
    present = {n: v for n, v in zip(kind.names, values, strict=True) if v is not None}
    data = {n: v for n, v in present.items() if n in kind.data}
    variables: list[Any] = unique(*data.values())
    history = _common_history(variables) if variables else None
    if history is None or not _keeps_samples(name, args, kwargs, variables[0].ndim):
        return result
    if name in _ORDERED:
        x = variables[0]
        return _continue(
            result, history, lambda: x.history.rows().reshape(-1, *result.shape[1:]).to(result.mean), independent=x.independent
        )
    k = history.root.shape[1]
    func = out_of_place(func)
    mode = present.get("mode") or "constant"

    def move() -> list[Any]:
        moved = kind.call(func, {n: _rows_of(v, k) if n in data else v for n, v in present.items()}, rest, options)
        return _pytree.tree_leaves(moved)

    moved = Once(move)
    independent = name not in _REPEATING and mode == "constant" and variables[0].independent
    for i, out in enumerate(random_variables(result)):
        _continue(out, history, lambda i=i: moved()[i], independent=independent)  # type: ignore[misc]
    return result


def _rows_of(value: Any, k: int) -> Any:
    """``value`` with rows in its variables' place; a constant has none."""
    if isinstance(value, FusedVariable):
        return value.history.rows()  # type: ignore[union-attr]
    if isinstance(value, Tensor):
        return value.new_zeros((k, *value.shape[1:]))
    if isinstance(value, (list, tuple)):
        return type(value)(_rows_of(each, k) for each in value)
    return 0 if isinstance(value, (int, float)) else value


# --- linear maps -------------------------------------------------------------------------------------


def _maps_samples(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], x: RandomVariable, weight: Any) -> bool:
    """True for a linear map that acts on every sample by itself, and alike."""
    if name in ("linear", "interpolate"):
        return x.ndim >= 2
    if name in ("matmul", "mm"):
        return x.ndim >= 2 and weight.ndim == 2
    if name in ("sum", "mean"):
        return _keeps_samples(name, args, kwargs, x.ndim)
    if name == "fold":
        return x.ndim == 3
    spatial = name.startswith(("conv", "avg_pool", "adaptive_avg_pool"))
    return spatial and x.ndim == int(name[-2]) + 2


def _linear(name: str, kind: Any, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A map with constant coefficients, of a variable with a history: one map with what came before."""
    bilinear = isinstance(kind, Bilinear)
    func = out_of_place(func)
    (x, *others), rest, options = bind(kind.names if bilinear else ("input",), args, kwargs)
    found: list[Any] = random_variables(args, kwargs)
    if len(found) != 1 or found[0] is not x or not _maps_samples(name, args, kwargs, x, others[0] if bilinear else None):
        return kind(func, args, kwargs)

    def on_rows() -> Tensor:
        rows = x.history.rows()
        with full_precision(x):
            if not bilinear:
                return func(rows, *rest, **options)  # type: ignore[no-any-return]
            bias = (None,) * (len(others) - 1)
            return widened(lambda a, b: func(a, b, *bias, *rest, **options), rows, others[0])

    factors = _nearest(func, args, kwargs) if name == "interpolate" else None
    if factors is not None:  # copies elements: their variances stay right one by one
        out = _continue(kind(func, args, kwargs), x.history, on_rows)
        low, before = (x.var, (1,) * len(factors)) if x.independent else x._low or (None, ())
        if low is not None:
            out._low, out.independent = (low, tuple(s * t for s, t in zip(before, factors, strict=True))), False
        return out
    if x.independent:
        return _continue(kind(func, args, kwargs), x.history, on_rows)
    mean = at_means(func, args, kwargs)
    if x._low is not None and name in ("conv1d", "conv2d", "conv3d"):
        var = _upsampled_convolution(kind, func, args, kwargs, x)
        if var is not None:
            return _continue(x.with_moments(mean, var), x.history, on_rows)
    out = _through(x.history, mean, on_rows, x)
    return kind(func, args, kwargs) if out is None else out


def _through(history: History | None, mean: Tensor, rows: Callable[[], Tensor], like: FusedVariable) -> Any:
    """The variable with this mean and the variance of the whole map; None where rows are not to be had."""
    found = None if history is None else history.leading_to(mean, rows)
    if found is None:
        return None
    with full_precision(like):
        out: Any = like.with_moments(mean, found.var())
    out._own_history, out.independent = found, False
    return out


def _batch_norm(kind: BatchNormalization, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Statistics from the mean and the variance of the whole map; then a scale for each channel."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    (x, mean, var, weight, bias, training, momentum, eps), _, _ = bind(names, args, kwargs)
    with full_precision(x):
        centre, scale = kind.statistics(
            x, mean, var, weight, bool(training), 0.1 if momentum is None else momentum, 1e-5 if eps is None else eps
        )
        value = (x.mean - centre) * scale
        if bias is not None:
            value = value + bias.reshape(1, -1, *(1,) * (x.ndim - 2))
        square = scale.square()
        out: Any = x.with_moments(value, x.var * square)
    _continue(out, x.history, lambda: x.history.rows() * scale, independent=x.independent)
    if x._low is not None:
        out._low, out.independent = (x._low[0] * square, x._low[1]), False
    return out


# --- sums and scalings -------------------------------------------------------------------------------

_SUMS = frozenset("add sub subtract rsub".split())
_SCALINGS = frozenset("mul multiply div divide true_divide neg negative".split())


def _sum(name: str, kind: Elementwise, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """a + alpha b: of two branches of one root, rows add up; a constant shifts the mean."""
    (a, b, alpha), _, _ = bind(("input", "other", "alpha"), args, kwargs)
    alpha = 1 if alpha is None else alpha
    variables: list[Any] = unique(a, b)
    history = _common_history(variables)
    target = torch.broadcast_shapes(*(x.shape for x in (a, b) if isinstance(x, (Tensor, RandomVariable))))
    if history is None or not isinstance(alpha, (int, float)) or any(x.ndim != len(target) for x in variables):
        return kind(func, args, kwargs)
    if getattr(func, "__name__", "") in ("rsub", "__rsub__"):
        a, b = b, a
    terms = [(x, factor) for x, factor in ((a, 1), (b, alpha if name == "add" else -alpha)) if isinstance(x, FusedVariable)]

    def rows() -> Tensor:
        total: Any = sum(x.history.rows() * factor for x, factor in terms)  # type: ignore[union-attr]
        return total.expand(-1, *target[1:])  # type: ignore[no-any-return]

    if Elementwise.common_ancestor(variables) is not None:
        x = variables[0]
        alone = len(variables) == 1 and x.independent and x.shape == target
        return _continue(kind(func, args, kwargs), history, rows, independent=alone)
    out = _through(history, at_means(out_of_place(func), args, kwargs), rows, variables[0])
    return kind(func, args, kwargs) if out is None else out


def _scale(name: str, kind: Elementwise, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A constant times the variable; its rows stay where the constant is the same for every sample."""
    out = kind(func, args, kwargs)
    operands, rest, options = bind(("input", "other"), args, kwargs)
    found: list[Any] = random_variables(operands)
    if len(found) != 1 or rest or any(v is not None for v in options.values()):
        return out
    x = found[0]
    if x.ndim != out.ndim or (name.endswith(("div", "divide")) and operands[0] is not x):
        return out
    constants = [_of_any_sample(v, out.ndim) for v in operands if v is not None and v is not x]
    if any(v is None for v in constants):
        return out
    function = out_of_place(func)

    def rows() -> Tensor:
        rest = iter(constants)
        with full_precision(x):
            made = function(*(x.history.rows() if v is x else next(rest) for v in operands if v is not None))
        return made.expand(-1, *out.shape[1:])  # type: ignore[no-any-return]

    return _continue(out, x.history, rows, independent=x.independent and x.shape == out.shape)


def _of_any_sample(constant: Any, ndim: int) -> Any:
    """The constant as it is for each sample, first dimension 1 if it has one; None where it differs between samples."""
    if not isinstance(constant, Tensor) or constant.ndim < ndim:
        return constant
    same = constant.ndim == ndim and (constant.shape[0] == 1 or constant.stride(0) == 0)
    return constant[:1] if same else None


# --- nearest upsampling, then a convolution ----------------------------------------------------------


def _nearest(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The whole factors of nearest interpolation, one for each axis; None for any other."""
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor")
    (x, size, scale, mode, _, recomputed), _, _ = bind(("input", *names), args, kwargs)
    if (mode or "nearest") not in ("nearest", "nearest-exact"):
        return None
    axes = x.ndim - 2
    if scale is not None:
        factors = tuple(scale) if isinstance(scale, (tuple, list)) else (scale,) * axes
    else:
        sizes = tuple(size) if isinstance(size, (tuple, list)) else (size,) * axes
        factors = tuple(n / old for n, old in zip(sizes, x.shape[2:], strict=True))
    # (Beyond 16, rounding in torch's index could move an element.)
    whole = all(f == int(f) and 1 <= f <= 16 for f in factors) and not recomputed
    return tuple(int(f) for f in factors) if whole else None


def _upsampled_convolution(
    kind: Bilinear, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], x: FusedVariable
) -> Tensor | None:
    """Variance of a convolution of what nearest upsampling by s made of independent elements of variance v.

    Output i = a + s q (phase a) sums W[k] u[floor((i + k - P) / s)] over k: a convolution of the small image, with the
    kernel E_a[j] = sum of W[k] over the k with floor((a + k - P) / s) = j, which is squared on v. None for a stride, a
    dilation or a kernel that is not served.
    """
    assert x._low is not None
    low, factors = x._low
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    (_, weight, _, stride, padding, dilation, groups), _, _ = bind(names, args, kwargs)
    axes = x.ndim - 2
    if any(n != 1 for value in (stride, dilation) if value is not None for n in _each_axis(value, axes)):
        return None
    kernel = weight.shape[2:]
    if padding == "same":
        before, after = [(k - 1) // 2 for k in kernel], [k // 2 for k in kernel]
    else:
        before = after = list(_each_axis(0 if padding in (None, "valid") else padding, axes))
    size = [n + p + q - k + 1 for n, p, q, k in zip(x.shape[2:], before, after, kernel, strict=True)]

    def convolution(var: Tensor, squares: Tensor) -> Tensor:
        return func(var, squares, None, 1, 0, 1, groups or 1)  # type: ignore[no-any-return]

    out: Any = None
    with full_precision(x):
        for phase in itertools.product(*(range(min(s, n)) for s, n in zip(factors, size, strict=True))):
            small = weight
            pads: list[int] = []
            for axis, (a, s, p, k, n) in enumerate(zip(phase, factors, before, kernel, size, strict=True)):
                where = [(a + i - p) // s for i in range(k)]
                taps = [(where.index(j), where.count(j)) for j in range(where[0], where[-1] + 1)]
                small = torch.stack([small.narrow(2 + axis, i, count).sum(2 + axis) for i, count in taps], 2 + axis)
                outputs = -(-(n - a) // s)
                pads = [-where[0], outputs - 1 + where[-1] - (low.shape[2 + axis] - 1), *pads]
            var = Bilinear.squared(convolution, torch.nn.functional.pad(low, pads), small, x)
            if out is None:
                out = var.new_empty((*var.shape[:2], *size))
            out[(..., *(slice(a, None, s) for a, s in zip(phase, factors, strict=True)))] = var
    return out  # type: ignore[no-any-return]


def _each_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * axes if len(values) == 1 else values
