"""What a recording takes from Python: plain attributes of the model's modules and plain globals, by name.

A recording holds them as constants, so it serves while they are as they were: an annealed ``self.beta``, a flag, a schedule's
step. ``read_now`` gives them as they are, as part of the key that a recording is found by.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

__all__ = ["GENERATORS", "Place", "globals_of", "is_opaque", "is_watched", "random_state", "read_now", "restore_random_state"]

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_NEVER = frozenset(vars(nn.Module())) | {"training", "T_destination", "dump_patches", "call_super_init"}
_MOST = 64  # entries of a container, fields of an object: what is larger is told by its type and length
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
    return isinstance(value, (torch.Tensor, nn.Module, type)) or callable(value)


def globals_of(scope: dict[str, Any], names: Iterable[str]) -> list[Place]:
    """Those of ``names`` that are plain values among the globals of a module."""
    owner = scope.get("__name__")
    module = sys.modules.get(owner) if isinstance(owner, str) else None
    if module is None or vars(module) is not scope:
        return []
    return [Place(str(owner), n) for n in names if not n.startswith("__") and n in scope and isinstance(scope[n], _PLAIN)]


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
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        if not depth or len(value) > _MOST:
            return (kind, len(value))
        if isinstance(value, dict):
            return (kind, tuple((_snapshot(k, 0), _snapshot(v, depth - 1)) for k, v in value.items()))
        return (kind, tuple(_snapshot(v, depth - 1) for v in value)) if isinstance(value, (list, tuple)) else (kind, len(value))
    fields = getattr(value, "__dict__", None)
    if not depth or is_opaque(value) or not isinstance(fields, dict) or len(fields) > _MOST:
        return (kind,)
    return (kind, tuple((k, _snapshot(v, depth - 1)) for k, v in fields.items()))


def random_state() -> tuple[Any, ...]:
    """Of Python's and NumPy's global generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, np.asarray(keys).tobytes(), *rest)


def restore_random_state(state: tuple[Any, ...]) -> None:
    """Put both back."""
    random.setstate(state[0])
    kind, keys, *rest = state[1]
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
