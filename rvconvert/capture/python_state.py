"""What a recording takes from Python: plain attributes of the model's modules and plain globals, by name.

A recording holds them as constants, so it serves while they are as they were: an annealed ``self.beta``, a flag, a schedule's
step. ``read_now`` gives them as they are, as part of the key that a recording is found by.
"""

from __future__ import annotations

import collections
import dis
import functools
import random
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rvconvert.core.tree import fields_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = [
    "GENERATORS",
    "Place",
    "globals_of",
    "globals_of_classes",
    "is_opaque",
    "is_watched",
    "random_state",
    "read_now",
    "restore_random_state",
    "unused_arguments",
]

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_NEVER = frozenset(vars(nn.Module())) | {"training", "T_destination", "dump_patches", "call_super_init"}
_OPAQUE = (
    torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
)  # fmt: skip
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_MOST = 256  # entries of a container, fields of an object that are looked at one by one
_LARGEST = 1 << 14  # entries that are hashed, bytes of an array that are compared: of what is larger it is the object that counts
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)


class Place(NamedTuple):
    """A name in Python: of the n-th of the model's modules, or of a module of Python's."""

    owner: int | str
    name: str


def is_watched(module: nn.Module, name: str, value: Any) -> bool:
    """True if an attribute that a method read is to be compared at later calls."""
    if name in _NEVER or name.startswith("__") or type(module).__module__.startswith("torch."):
        return False
    return not is_opaque(value)


def is_opaque(value: Any) -> bool:
    """True for what a recording sees by itself, or what holds no values: tensors, modules, classes, functions."""
    return isinstance(value, _OPAQUE) or (callable(value) and type(value).__module__.partition(".")[0] in ("torch", "functools"))


@functools.lru_cache(maxsize=1024)
def globals_read(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals that a function's own code reads."""
    read = (each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    return tuple(dict.fromkeys(name for name in read if not name.startswith("__")))


def unused_arguments(function: Any) -> frozenset[str]:
    """The names of arguments that a function's own code never mentions; none of what is wrapped."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return frozenset()
    code = function.__code__
    if "locals" in code.co_names:
        return frozenset()
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    named = [each.argval if isinstance(each.argval, tuple) else (each.argval,) for each in dis.get_instructions(code)]
    return frozenset(arguments) - {name for names in named for name in names if isinstance(name, str)} - {*code.co_cellvars}


def globals_of(scope: dict[str, Any], code: types.CodeType) -> list[Place]:
    """Values that a function reads among the globals of its module; of classes those that hold a configuration."""
    owner = scope.get("__name__")
    module = sys.modules.get(owner) if isinstance(owner, str) else None
    if module is None or vars(module) is not scope:
        return []
    return [Place(str(owner), name) for name in globals_read(code) if name in scope and _holds_values(scope[name])]


def globals_of_classes(root: nn.Module) -> tuple[Place, ...]:
    """Values that the code of a model's own classes reads among globals."""
    found: dict[Place, None] = {}
    for kind in {each for module in root.modules() for each in type(module).__mro__}:
        if not kind.__module__.startswith(("torch.", "builtins")):
            for function in vars(kind).values():
                if isinstance(function, types.FunctionType):
                    found |= dict.fromkeys(globals_of(function.__globals__, function.__code__))
    return tuple(found)


def _holds_values(value: Any) -> bool:
    if isinstance(value, type):
        return not issubclass(value, nn.Module) and not value.__module__.startswith("torch") and bool(_fields(value))
    return isinstance(value, _CONTAINERS) or not is_opaque(value)


def read_now(places: Iterable[Place], modules: Sequence[nn.Module]) -> tuple[Hashable, ...]:
    """The values of ``places``; of what is not plain, its type, its length, and what is plain in it."""
    found: list[Hashable] = []
    for owner, name in places:
        holder = modules[owner] if isinstance(owner, int) else sys.modules.get(owner)
        found.append(_snapshot(getattr(holder, name, None), 3))
    return tuple(found)


def _snapshot(value: Any, depth: int) -> Hashable:
    kind = type(value)
    if isinstance(value, _PLAIN):
        return (kind, value if value == value else "nan")  # a NaN is equal to nothing, and is the same NaN
    if isinstance(value, np.generic):
        return (kind, _snapshot(value.item(), 0)) if isinstance(value.item(), _PLAIN) else (kind, str(value))
    if isinstance(value, np.ndarray):
        known = value.nbytes <= _LARGEST and not value.dtype.hasobject
        return (kind, value.shape, value.dtype.str, value.tobytes() if known else id(value))
    if isinstance(value, _CONTAINERS):
        if isinstance(value, (set, frozenset)) or len(value) > _MOST:
            return (kind, len(value), _fingerprint(value))
        if not depth:
            return (kind, len(value))
        if isinstance(value, dict):
            return (kind, tuple((_snapshot(k, 0), _snapshot(v, depth - 1)) for k, v in value.items()))
        return (kind, tuple(_snapshot(v, depth - 1) for v in value))
    if not depth or (is_opaque(value) and not isinstance(value, type)):
        return (kind,)
    fields = _fields(value)
    return (kind, tuple((k, _snapshot(v, depth - 1)) for k, v in fields.items())) if len(fields) <= _MOST else (kind, id(value))


def _fingerprint(value: Any) -> Hashable:
    """Equal for the same contents, as far as these can be hashed and are not too many; else for the same object."""
    if len(value) > _LARGEST:
        return id(value)
    try:
        if isinstance(value, dict):
            return hash((tuple(value), tuple(value.values())))
        return hash(frozenset(value) if isinstance(value, set) else tuple(value))
    except TypeError:
        return id(value)


def _fields(value: Any) -> dict[str, Any]:
    """Of an object, in ``__dict__`` or in slots; of a class, its plain attributes."""
    if isinstance(value, type):
        return {k: v for k, v in vars(value).items() if isinstance(v, _PLAIN) and not k.startswith("__")}
    return fields_of(value)


def random_state() -> tuple[Any, ...]:
    """Of Python's and NumPy's global generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, np.asarray(keys).tobytes(), *rest)


def restore_random_state(state: tuple[Any, ...]) -> None:
    """Put both back."""
    random.setstate(state[0])
    kind, keys, *rest = state[1]
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
