"""The rule table: which rule serves an operation, in every spelling torch has for it."""

from __future__ import annotations

import enum
import types
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from rvconvert.errors import ConversionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

__all__ = [
    "NAMESPACES",
    "PLAIN",
    "REGISTRY",
    "Exactness",
    "FunctionTable",
    "Kind",
    "Registry",
    "Rule",
    "as_constant",
    "operation_name",
    "spellings",
]


class Exactness(str, enum.Enum):
    """How far a rule's moments can be trusted, given the moments of its inputs."""

    EXACT = "exact"
    EXACT_IF_INDEPENDENT = "exact_if_independent"
    MOMENT_MATCHED = "moment_matched"
    APPROXIMATE = "approximate"


class Kind(Protocol):
    """The mathematical kind of a rule: how moments pass through any operation of that kind."""

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply ``func`` to arguments that hold random variables; return random variables."""
        ...


@dataclass(frozen=True)
class Rule:
    """How one operation acts on random variables.

    Attributes:
        name: the operation's canonical name (``"conv2d"``).
        kind: the mathematical kind, holding what is particular to the operation.
        exactness: how far the moments can be trusted.
        assumption: what must hold for that, in one line.
        modules: ``nn.Module`` classes whose forward is this operation.
        keeps_latent: the result of a latent is still a latent (no learned layer is involved).
        body: for a rule of a whole module, ``body(module, *args) -> RandomVariable``; such a module is not opened.
    """

    name: str
    kind: Kind
    exactness: Exactness
    assumption: str
    modules: tuple[type[torch.nn.Module], ...] = ()
    keeps_latent: bool = False
    body: Callable[..., Any] | None = None

    def __call__(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.kind(func, args, kwargs)


PLAIN = Rule(
    "plain",
    lambda func, args, kwargs: func(*args, **kwargs),
    Exactness.EXACT,
    "none: the operation itself on every sampled path",
)

NAMESPACES = (
    torch,
    torch.Tensor,
    F,
    torch.special,
    torch.linalg,
    torch.fft,
    torch._C._nn,
    torch._VF,
)
_OPERATORS = {
    "add": ("__add__", "__radd__", "__iadd__"),
    "sub": ("__sub__", "__isub__"),
    "rsub": ("__rsub__",),
    "mul": ("__mul__", "__rmul__", "__imul__"),
    "div": ("__div__", "__truediv__", "__itruediv__", "__idiv__"),
    "rdiv": ("__rtruediv__", "__rdiv__"),
    "pow": ("__pow__", "__ipow__"),
    "rpow": ("__rpow__",),
    "matmul": ("__matmul__", "__imatmul__"),
    "rmatmul": ("__rmatmul__",),
    "neg": ("__neg__",),
    "abs": ("__abs__",),
    "getitem": ("__getitem__",),
    "setitem": ("__setitem__",),
    "gt": ("__gt__",),
    "lt": ("__lt__",),
    "ge": ("__ge__",),
    "le": ("__le__",),
    "eq": ("__eq__",),
    "ne": ("__ne__",),
    "logical_not": ("__invert__",),
    "logical_and": ("__and__", "__rand__", "__iand__", "bitwise_and"),
    "logical_or": ("__or__", "__ror__", "__ior__", "bitwise_or"),
    "logical_xor": ("__xor__", "__rxor__", "__ixor__", "bitwise_xor"),
    "floor_divide": ("__floordiv__",),
    "remainder": ("__mod__",),
    # Other names of torch.special.
    "sigmoid": ("expit",),
    "lgamma": ("gammaln",),
    "digamma": ("psi",),
}


def spellings(name: str) -> Iterator[Callable[..., Any]]:
    """Every torch function, method and operator that is the operation ``name``, in place or not."""
    names = (name, f"{name}_", *_OPERATORS.get(name, ()))
    for namespace in NAMESPACES:
        for each in names:
            found = getattr(namespace, each, None)
            if callable(found):
                yield found
    descriptor = getattr(torch.Tensor, name, None)
    getter = getattr(descriptor, "__get__", None)
    if getter is not None and not callable(descriptor):
        yield getter


@cache
def operation_name(func: Callable[..., Any]) -> str:
    """A printable name for a torch function: ``torch.nn.functional.relu``, ``Tensor.view``."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):  # what a library adds to torch
        return f"torch.ops.{func}"
    resolved: str | None = torch.overrides.resolve_name(func)
    if resolved:
        return resolved.replace("torch.Tensor.", "Tensor.")
    module = getattr(func, "__module__", None)
    name = getattr(func, "__qualname__", None) or getattr(func, "__name__", None) or repr(func)
    return f"{module}.{name}".replace("_VariableFunctionsClass.", "") if module else str(name)


class FunctionTable:
    """A dictionary keyed by torch functions that ``torch.compile`` can read while it traces.

    Dynamo does not hash builtins and the methods of a tensor: their place in ``_values`` is computed when a model is
    compiled and stands as a constant. A function written in Python is known to it by its name.
    """

    def __init__(self, entries: Mapping[Any, Any] | None = None) -> None:
        self._values: list[Any] = []
        self._places: dict[Any, int] = {}
        self._names: dict[str, int] = {}
        self._native = as_constant(lambda func: self._places.get(func))
        for func, value in (entries or {}).items():
            self[func] = value

    def __setitem__(self, func: Any, value: Any) -> None:
        if func in self._places:
            self._values[self._places[func]] = value
            return
        self._places[func] = len(self._values)
        if isinstance(func, types.FunctionType):
            self._names[f"{func.__module__}.{func.__name__}"] = len(self._values)
        self._values.append(value)

    def items(self) -> list[tuple[Any, Any]]:
        """Every function with its value."""
        return [(func, self._values[place]) for func, place in self._places.items()]

    def get(self, func: Any) -> Any:
        """What is known of ``func``, or None."""
        if not torch.compiler.is_compiling():
            place = self._places.get(func)
        elif isinstance(func, types.FunctionType):
            place = self._names.get(f"{func.__module__}.{func.__name__}")
        else:
            place = self._native(func)
        return None if place is None else self._values[place]


def as_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, which would import Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Registry:
    """Rules by operation and by module class.

    ``overlay()`` makes a child that sees every rule of its parent and can add or replace rules for
    itself alone, so that one call of ``convert`` can use rules of its own.
    """

    def __init__(self, parent: Registry | None = None) -> None:
        self._parent = parent
        self._functions = FunctionTable()
        self._modules: dict[type[torch.nn.Module], Rule] = {}
        self._rules: dict[str, Rule] = {}
        self._fallback: Callable[[Callable[..., Any]], Rule | None] | None = None

    def overlay(self) -> Registry:
        """A child registry: rules added to it do not reach this one."""
        return Registry(self)

    def register(
        self,
        rule: Rule,
        functions: Iterable[Callable[..., Any]],
        *,
        replace: bool = False,
    ) -> None:
        """Add ``rule`` for ``functions`` and for its module classes.

        Raises:
            ConversionError: one of them has a rule here already and ``replace`` is False.
        """
        functions = list(functions)
        taken = [operation_name(f) for f in functions if self._functions.get(f) is not None]
        taken += [m.__qualname__ for m in rule.modules if m in self._modules]
        if taken and not replace:
            raise ConversionError(
                f"a rule for {', '.join(taken)} is registered already; pass replace=True to replace it, or "
                "register yours in an overlay: rules = rvconvert.REGISTRY.overlay()"
            )
        for function in functions:
            self._functions[function] = rule
        for module in rule.modules:
            self._modules[module] = rule
        self._rules[rule.name] = rule

    def find(self, func: Callable[..., Any]) -> Rule | None:
        """The rule for a torch function or method, or None."""
        rule: Rule | None = self._functions.get(func)
        if rule is None and self._parent is not None:
            return self._parent.find(func)
        return rule

    def served(self) -> list[tuple[Callable[..., Any], Rule]]:
        """Every function that has a rule here or in the parent, with its rule."""
        inherited = {} if self._parent is None else dict(self._parent.served())
        return list({**inherited, **dict(self._functions.items())}.items())

    def set_fallback(self, chooser: Callable[[Callable[..., Any]], Rule | None]) -> None:
        """Set what ``fallback`` asks: a function that gives a declared approximate rule, or None."""
        self._fallback = chooser

    def fallback(self, func: Callable[..., Any]) -> Rule | None:
        """A declared approximate rule for a function that has none of its own, or None."""
        if self._fallback is not None:
            return self._fallback(func)
        return self._parent.fallback(func) if self._parent is not None else None

    def find_module(self, module_class: type[torch.nn.Module]) -> Rule | None:
        """The rule for a module class: its own, else that of its nearest base class."""
        for base in module_class.__mro__:
            registry: Registry | None = self
            while registry is not None:
                if base in registry._modules:
                    return registry._modules[base]
                registry = registry._parent
        return None

    def __reduce__(self) -> str:
        if self is not REGISTRY:
            raise ConversionError("an overlay registry holds functions, which a file cannot; convert again after loading")
        return "REGISTRY"

    def __deepcopy__(self, memo: dict[int, Any]) -> Registry:
        return self

    def __iter__(self) -> Iterator[Rule]:
        own = dict(self._parent._rules) if self._parent is not None else {}
        own.update(self._rules)
        return iter(own.values())


REGISTRY = Registry()
