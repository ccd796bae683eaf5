"""RandomVariable: the value that flows through a converted model, a mean and a variance per element."""

from __future__ import annotations

import contextlib
import inspect
import math
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from rvconvert.core.mode import MODES
from rvconvert.core.registry import NAMESPACES, PLAIN, REGISTRY, FunctionTable, Registry, operation_name
from rvconvert.errors import ConversionError, UnsupportedOperationError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from rvconvert.core.registry import Rule

__all__ = [
    "Density",
    "Origin",
    "RandomVariable",
    "Settings",
    "is_in_place",
    "making_later",
    "moments_later",
    "propagate",
    "random_variables",
]


@dataclass(frozen=True)
class Settings:
    """What travels with a random variable: the rules it obeys and how its covariance is carried.

    Attributes:
        registry: the rule table.
        covariance: the name of a mode, ``"independent"``, ``"calibrated"``, ``"lowrank"`` or ``"sampled"``.
        rank: pairs of nodes in ``"lowrank"`` mode (None: one per latent, from 16 to 64).
        pairs: antithetic pairs of paths in ``"sampled"`` mode.
        seed: fixes the directions of sampled paths and of nodes; None draws paths afresh.
        strict: refuse an operation with no rule instead of linearising it at the mean.
        variance_dtype: dtype of the variance's matrix work; None keeps the mean's own.
        source: which noise source of its model a variable starts from; random inputs count down from -1.
    """

    registry: Registry = field(default=REGISTRY, repr=False)
    covariance: str = "independent"
    rank: int | None = None
    pairs: int = 1
    seed: int | None = None
    strict: bool = False
    variance_dtype: torch.dtype | None = None
    source: int = 0

    @property
    def needs_rules(self) -> bool:
        """False where plain functions run on paths, so that any operation goes."""
        return MODES[self.covariance].needs_rules

    def rule_for(self, func: Callable[..., Any]) -> Rule | None:
        """The rule for a torch function, a declared approximate one if ``strict`` allows, or None."""
        rule = self.registry.find(func)
        if rule is None and not self.needs_rules:
            return PLAIN
        return rule if rule is not None or self.strict else self.registry.fallback(func)


DEFAULT_SETTINGS = Settings()

Remake = Callable[[], torch.Tensor]


def _of_one_dtype(mean: torch.Tensor, var: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, joined: autocast may have left the mean at half width."""
    if mean.dtype == var.dtype:
        return mean, var
    dtype = torch.promote_types(mean.dtype, var.dtype)
    return mean.to(dtype), var.to(dtype)


def _unpacked(kept: torch.Tensor | Remake) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept()


@dataclass(frozen=True)
class Origin:
    """``x = function(parent)``, element by element: how a random variable hangs on another one.

    Two random variables with a common ancestor of this kind form one function of it, so ``x * sigmoid(x)``
    is propagated as SiLU and ``x - x`` as 0. ``kinks`` are points of the parent's axis where the function
    is not smooth; ``whole_line`` is False where the function is not defined on all of it (a logarithm, a root).
    ``line`` is (slope, shift) where the function is a line of plain numbers, through which kinks are found back.
    ``joint`` marks a function that joins elements (a softmax), which is known of the root of a law alone.
    ``affine``: a sum or product with constants, which leaves a Gaussian Gaussian.
    ``key`` is equal for equal functions of numbers alone; None where a tensor takes part.
    ``interval``: where the variable's values lie, ends included, whatever the parent's are.
    """

    parent: RandomVariable
    function: Callable[[torch.Tensor], torch.Tensor]
    kinks: tuple[float, ...] = ()
    whole_line: bool = True
    line: tuple[float, float] | None = None
    joint: bool = False
    affine: bool = False
    key: Hashable | None = None
    interval: tuple[float, float] = (-math.inf, math.inf)


class Density(Protocol):
    """The law of a variable that is not Gaussian, as nodes and weights to integrate its functions over."""

    name: str

    def nodes(self, root: RandomVariable) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, *shape) values and (n,) or (n, *shape) weights: each element by itself."""

    def joint_nodes(self, root: RandomVariable) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(n, *shape) values on which the elements vary independently, and (n,) weights; None where there are none."""

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Density:
        """The density of the elements that ``move`` selects or moves."""

    def below(self, value: torch.Tensor) -> torch.Tensor | None:
        """P(X < value), or None where there is no closed form."""


class Identity:
    """Stands for a variable in keys, without its tensors."""


_making = threading.local()


@contextlib.contextmanager
def moments_later() -> Iterator[None]:
    """Within, in this thread, moments of steps on the way are made if something asks for them: nothing but a graph has these."""
    before, _making.later = making_later(), True
    try:
        yield
    finally:
        _making.later = before


def making_later() -> bool:
    """True within ``moments_later``, where values are tensors of now."""
    return not torch.compiler.is_compiling() and getattr(_making, "later", False)


class Later:
    """Moments that are made once one is asked for: those of a step on the way to a function of the whole are not.

    Attributes:
        shape, device: what the moments will have.
    """

    def __init__(self, shape: torch.Size, device: torch.device, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.shape, self.device, self._make = shape, device, make
        self._with_gradients = torch.is_grad_enabled()
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance, as they would have been made when the variable was, in full precision."""
        if self._made is None:
            kind = self.device.type
            lowered = kind != "meta" and torch.is_autocast_enabled(kind)
            precision = torch.autocast(kind, enabled=False) if lowered else nullcontext()
            with torch.set_grad_enabled(self._with_gradients), precision:
                self._made = self._make()
        return self._made


class RandomVariable:
    """Independent random variables with the given means and variances, shaped like a tensor.

    Torch functions, methods and operators accept it and use the rule table: ``F.relu(x)``, ``x.view(2, -1)``,
    ``x + y``, ``x @ w``. It is frozen: an operation returns a new one (an in-place operation rebinds the
    object that it is called on, as it would change a tensor).

    Args:
        mean: expected values, any shape, floating point.
        var: variances, same shape, dtype and device as ``mean``, none negative. Units: the mean's, squared.

    Raises:
        ConversionError: shapes, dtypes or devices differ, or a variance is negative or NaN.
    """

    _density: Density | None = None
    _remake: tuple[Remake, Remake] | None = None
    _transposed: RandomVariable | None = None
    _terms: tuple[RandomVariable, RandomVariable] | None = None
    _selection: Hashable | None = None
    _carried: Any = None
    _later: Later | None = None

    def __init__(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        if not (isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor)):
            raise ConversionError("RandomVariable(mean, var) takes two tensors; wrap numbers in torch.tensor")
        for what in ("shape", "dtype", "device"):
            if getattr(mean, what) != getattr(var, what):
                raise ConversionError(
                    f"RandomVariable: mean and var differ in {what}: {getattr(mean, what)} and "
                    f"{getattr(var, what)}; try var.expand_as(mean).to(mean)"
                )
        if not mean.is_floating_point():
            raise ConversionError(f"RandomVariable: floating point is needed, not {mean.dtype}; try mean.float()")
        if not torch.compiler.is_compiling() and not var.is_meta and not bool((var >= 0).all()):
            raise ConversionError("RandomVariable: var has a negative or NaN element; pass variances, not log-variances")
        self._fill(mean, var, DEFAULT_SETTINGS)

    def _fill(self, mean: Any, var: Any, settings: Settings, later: Later | None = None) -> None:
        self._known_mean = mean
        self._known_var = var
        self._later = later
        self._settings = settings
        self._latent = False
        self._origin: Origin | None = None
        self._identity = Identity()

    @classmethod
    def _make(cls, mean: Any, var: Any, settings: Settings, later: Later | None = None) -> RandomVariable:
        """An unchecked instance, of both moments or of what makes them."""
        made = cls.__new__(cls)
        if later is None:
            mean, var = _of_one_dtype(mean, var)
        made._fill(mean, var, settings, later)
        return made

    @property
    def _mean(self) -> torch.Tensor:
        self._settle()
        return self._known_mean

    @property
    def _var(self) -> torch.Tensor:
        self._settle()
        return self._known_var

    def _settle(self) -> None:
        if self._later is not None:
            self._known_mean, self._known_var = _of_one_dtype(*self._later.moments())
            self._later = None

    @property
    def mean(self) -> torch.Tensor:
        """Expected values, shaped like the variable; the mean over a dimension is ``torch.mean(x, dim)``."""
        return self._mean

    @property
    def var(self) -> torch.Tensor:
        """Variances, shaped like the variable."""
        return self._var

    def most_likely(self, dtype: torch.dtype) -> torch.Tensor:
        """The likeliest truth value or whole number, of ``dtype``, shaped like the variable."""
        return self.mean > 0.5 if dtype == torch.bool else self.mean.round().to(dtype)

    @property
    def std(self) -> torch.Tensor:
        """Standard deviations, shaped like the variable."""
        return self.var.sqrt()

    @property
    def settings(self) -> Settings:
        """The rules and the covariance mode that the variable obeys."""
        return self._settings

    @property
    def origin(self) -> Origin | None:
        """The elementwise function of another random variable that this one is, if it is one."""
        return self._origin

    @property
    def density(self) -> Density | None:
        """The law that the variable is known to have, if it is a draw that is not Gaussian."""
        return self._density

    def distributed(self, density: Density | None) -> RandomVariable:
        """This variable, newly made, marked with its law."""
        self._density = density
        return self

    @property
    def transposed(self) -> RandomVariable | None:
        """The variable that this one is with its last two dimensions exchanged, if it is known to be one."""
        return self._transposed

    def transposes(self, of: RandomVariable) -> RandomVariable:
        """This variable, newly made, marked as ``of`` with its last two dimensions exchanged."""
        self._transposed = of
        return self

    @property
    def terms(self) -> tuple[RandomVariable, RandomVariable] | None:
        """The two variables that this one is the sum of, if that is known: a location and its noise."""
        return self._terms

    def sum_of(self, first: RandomVariable, second: RandomVariable) -> RandomVariable:
        """This variable, newly made, marked as the sum of two."""
        self._terms = first, second
        return self

    @property
    def carried(self) -> Any:
        """What the rule that made this variable leaves for the next one of its kind; None for nothing."""
        return self._carried

    def carrying(self, value: Any) -> RandomVariable:
        """This variable, newly made, with what the next rule of its kind may use."""
        self._carried = value
        return self

    def remade(self, mean: Remake, var: Remake) -> RandomVariable:
        """This variable, newly made, marked with what makes its moments again from tensors that gradients keep anyway."""
        self._remake = mean, var
        return self

    def kept_as_remade(self) -> AbstractContextManager[Any]:
        """Context in which gradients keep what makes the moments again in the moments' place."""
        if self._remake is None or torch.compiler.is_compiling():
            return nullcontext()
        return torch.autograd.graph.saved_tensors_hooks(self._packed, _unpacked)

    def _packed(self, saved: torch.Tensor) -> torch.Tensor | Remake:
        for moment, remake in zip((self._mean, self._var), self._remake or (), strict=True):
            if saved is moment:
                return remake
        return saved

    @property
    def latent(self) -> bool:
        """True while no learned layer lies between the noise source and this variable."""
        return self._latent

    def with_moments(self, mean: torch.Tensor, var: torch.Tensor) -> RandomVariable:
        """A variable of the same mode and settings with other moments."""
        return RandomVariable._make(mean, var, self._settings)

    def with_later_moments(self, shape: torch.Size, make: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> RandomVariable:
        """The same, of moments of a shape that are made once they are asked for."""
        return RandomVariable._make(None, None, self._settings, Later(shape, self.device, make))

    @property
    def is_open(self) -> bool:
        """True until the moments are made."""
        return self._later is not None

    def derived(self, *, origin: Origin | None = None, latent: bool = False) -> RandomVariable:
        """This variable, newly made by a rule, marked with where it comes from."""
        self._origin = origin
        self._latent = latent
        return self

    @property
    def key(self) -> Hashable:
        """Equal for equal variables: the snapshots of one, and what was selected of one in one way."""
        return self._identity if self._selection is None else self._selection

    def selected(self, key: Hashable) -> RandomVariable:
        """This variable, newly made, marked with how its elements were selected of others, by their keys."""
        self._selection = key
        return self

    def snapshot(self) -> RandomVariable:
        """Another object with the same contents: the same variable, whatever is written into this one later."""
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def _rebind(self, result: RandomVariable) -> RandomVariable:
        """Take another variable's contents, as an in-place operation does to a tensor."""
        contents = dict(result.__dict__)
        self.__dict__.clear()  # what this one was known to be, it is no more
        self.__dict__.update(contents)
        return self

    # What is asked of the value rather than of its distribution comes from the mean.
    shape = property(lambda self: (self._later or self._mean).shape)
    dtype = property(lambda self: self._mean.dtype)
    device = property(lambda self: (self._later or self._mean).device)
    ndim = property(lambda self: len(self.shape))
    layout = property(lambda self: self._mean.layout)
    requires_grad = property(lambda self: self._mean.requires_grad)
    is_cuda = property(lambda self: self._mean.is_cuda)
    is_leaf = property(lambda self: self._mean.is_leaf)
    is_nested = property(lambda self: False)
    is_sparse = property(lambda self: False)
    is_mps = property(lambda self: self._mean.is_mps)
    is_quantized = property(lambda self: False)
    data = property(lambda self: self.detach())
    real = property(lambda self: self)
    T = property(lambda self: self.permute(tuple(range(self.ndim))[::-1]))
    H = mT = mH = property(lambda self: self.transpose(-2, -1))

    def __len__(self) -> int:
        return len(self._mean)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.unbind())

    def __bool__(self) -> bool:
        return propagate(torch.Tensor.__bool__, (self,), {})  # type: ignore[no-any-return]

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(mean={self.mean!r}, var={self.var!r})"

    precedence = 0  # of several carriers in one operation, the highest decides how it is applied

    def apply(self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply a rule as this mode of carrying covariance does."""
        return rule(func, args, kwargs)

    if TYPE_CHECKING:  # the methods and operators of a tensor, added below

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return propagate(func, args, kwargs or {})


def _method(name: str) -> Callable[..., Any]:
    func = getattr(torch.Tensor, name)

    def method(self: RandomVariable, *args: Any, **kwargs: Any) -> Any:
        return propagate(func, (self, *args), kwargs)

    method.__name__ = name
    method.__qualname__ = f"RandomVariable.{name}"
    method.__doc__ = f"``torch.Tensor.{name}`` of a random variable, by its rule."
    return method


def _add_tensor_methods() -> None:
    for name in dir(torch.Tensor):
        if name in RandomVariable.__dict__ or not callable(getattr(torch.Tensor, name)):
            continue
        if name.startswith("__") and name not in _ARITHMETIC:
            continue
        setattr(RandomVariable, name, _method(name))


_ARITHMETIC = frozenset(
    f"__{prefix}{name}__"
    for name in ("add", "sub", "mul", "truediv", "div", "pow", "matmul", "floordiv", "mod", "and", "or", "xor")
    for prefix in ("", "r", "i")
) | {f"__{name}__" for name in ("neg", "abs", "invert", "getitem", "setitem", "gt", "lt", "ge", "le", "eq", "ne")}


def random_variables(*values: Any) -> list[RandomVariable]:
    """The random variables in nested lists, tuples and mappings, in order."""
    found: list[RandomVariable] = []
    for value in values:
        if isinstance(value, RandomVariable):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += random_variables(*value)
        elif isinstance(value, Mapping):
            found += random_variables(*value.values())
    return found


_ASSIGNING = {f"__{name}__" for name in "setitem iadd isub imul idiv itruediv ifloordiv imod ipow iand ior ixor".split()}
_IN_PLACE = FunctionTable(
    {
        getattr(namespace, name): True
        for namespace in NAMESPACES
        for name in dir(namespace)
        if name in _ASSIGNING or (name.endswith("_") and not name.endswith("__") and callable(getattr(namespace, name)))
    }
)


_PLACES_OF_INPLACE = FunctionTable(
    {
        func: list(inspect.signature(func).parameters).index("inplace")
        for func in vars(F).values()
        if isinstance(func, types.FunctionType) and "inplace" in inspect.signature(func).parameters
    }
)


def _by_keyword(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inplace``, always the last argument, by keyword: eager torch hands it on so, torch.compile as it was given."""
    at = _PLACES_OF_INPLACE.get(func)
    return (args, kwargs) if at is None or len(args) <= at else (args[:at], {**kwargs, "inplace": args[at]})


def is_in_place(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """True for a call that changes its first argument."""
    return _IN_PLACE.get(func) is not None or kwargs.get("inplace") is True


def in_settings(result: Any, settings: Settings) -> Any:
    """``result`` with the variables that a person's rule made, ``RandomVariable(mean, var)``, under these settings."""
    if settings is not DEFAULT_SETTINGS:
        for each in random_variables(result):
            if each._settings is DEFAULT_SETTINGS:
                each._settings = settings
    return result


_NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}  # torch's compiled functions take either


def _in_torch_names(func: Callable[..., Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords by torch's own names; a function written in Python, a person's own among them, keeps its names."""
    if not kwargs or isinstance(func, types.FunctionType):
        return kwargs
    return {_NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}


def propagate(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a torch function to arguments that hold random variables, by the rule for it.

    Raises:
        UnsupportedOperationError: no rule serves ``func``.
    """
    args, kwargs = _by_keyword(func, args, _in_torch_names(func, kwargs))
    in_place = is_in_place(func, kwargs)
    target = args[0] if in_place and args else None
    if isinstance(target, RandomVariable):  # the rule sees what the variable was; the variable becomes the result
        args = (target.snapshot(), *args[1:])
    inputs = random_variables(args, kwargs)
    carrier = inputs[0]
    for each in inputs:
        if each.precedence > carrier.precedence:
            carrier = each
    settings = carrier.settings
    rule = settings.rule_for(func)
    if rule is None:
        name = getattr(func, "__name__", "")
        if (getattr(func, "__module__", None) or "").startswith("torch.autograd"):
            raise UnsupportedOperationError(
                f"{operation_name(func)} takes a gradient inside the model, which means and variances do not have; "
                'covariance="sampled" takes it along each path'
            )
        raise UnsupportedOperationError(
            f"{operation_name(func)} has no rule for a random variable; register one:\n\n"
            f"    @rvconvert.rule({operation_name(func)})\n    def {name if name.isidentifier() else 'my_rule'}(x, ...): "
            "return rvconvert.RandomVariable(mean, var)"
        )
    result = in_settings(carrier.apply(rule, func, args, kwargs), settings)
    if rule.keeps_latent and all(x.latent for x in inputs):
        for each in random_variables(result):
            each._latent = True
    if in_place and isinstance(result, RandomVariable):
        if isinstance(target, RandomVariable):
            return target._rebind(result)
        raise ConversionError(
            f"{operation_name(func)} writes a random variable into a plain tensor in place; convert with "
            "example_inputs=(x,), which records such writes, or build the result with torch.cat or torch.stack"
        )
    return result


_add_tensor_methods()
