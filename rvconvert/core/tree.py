"""Tensors in any container: taken out of the outputs and inputs of a model, and put back."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributions import Distribution

from rvconvert.core.random_variable import RandomVariable

__all__ = ["Structure", "fields_of", "flatten"]

_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.nn.Module)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A container with its leaves taken out; ``build(leaves)`` puts others in their places."""

    kind: str
    template: Any = None
    keys: tuple[Any, ...] = ()
    parts: tuple[Structure, ...] = ()

    def build(self, leaves: Any) -> Any:
        """The container again, its leaves taken one by one from the iterator ``leaves``."""
        if self.kind == "leaf":
            return next(leaves)
        if self.kind == "constant":
            return self.template
        values = [part.build(leaves) for part in self.parts]
        if self.kind == "sequence":
            cls = self.template
            return cls(*values) if hasattr(cls, "_fields") else cls(values)
        made = copy.copy(self.template)
        if self.kind == "mapping":
            for key, value in zip(self.keys, values, strict=True):
                made[key] = value
            return made
        for key, value in zip(self.keys, values, strict=True):
            _set_field(made, key, value)
        return made

    def signature(self) -> Any:
        """A hashable description: equal for containers that hold leaves in the same places."""
        if self.kind == "leaf":
            return "leaf"
        if self.kind == "constant":
            return ("constant", _hashable(self.template))
        name = self.template if isinstance(self.template, type) else type(self.template)
        return (self.kind, name, self.keys, tuple(part.signature() for part in self.parts))


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return (type(value), value)


def flatten(
    value: Any, is_leaf: Callable[[Any], bool] = lambda x: isinstance(x, (torch.Tensor, RandomVariable))
) -> tuple[list[Any], Structure]:
    """The leaves of any container (lists, dicts, dataclasses, outputs, distributions) and its structure."""
    leaves: list[Any] = []
    return leaves, _flatten(value, is_leaf, leaves, set())


def _flatten(value: Any, is_leaf: Callable[[Any], bool], leaves: list[Any], parents: set[int]) -> Structure:
    if is_leaf(value):
        leaves.append(value)
        return Structure("leaf")
    if isinstance(value, _PLAIN) or id(value) in parents:
        return Structure("constant", value)
    before = len(leaves)
    parents = parents | {id(value)}
    if isinstance(value, (list, tuple, collections.deque)):
        parts = tuple(_flatten(each, is_leaf, leaves, parents) for each in value)
        return Structure("sequence", type(value), (), parts)
    if isinstance(value, Mapping) and hasattr(value, "__setitem__"):
        try:
            entries = dict(value.items())
        except Exception:  # noqa: BLE001 - a configuration whose entries cannot all be read holds no tensor
            return Structure("constant", value)
        parts = tuple(_flatten(each, is_leaf, leaves, parents) for each in entries.values())
        keys = tuple(entries)
        template = value if len(leaves) == before else _emptied(value, keys)
        return Structure("mapping", template, keys, parts)
    fields = fields_of(value)
    if not fields or isinstance(value, type) or callable(value):
        return Structure("constant", value)
    parts = tuple(_flatten(each, is_leaf, leaves, parents) for each in fields.values())
    if len(leaves) == before:
        return Structure("constant", value)
    template = copy.copy(value)
    for name in _cached(value):
        del template.__dict__[name]
    for key, part in zip(fields, parts, strict=True):
        if part.kind == "leaf":
            _set_field(template, key, None)
    return Structure("object", template, tuple(fields), parts)


def fields_of(value: Any) -> dict[str, Any]:
    """What an object holds, in its ``__dict__`` and in slots."""
    in_slots = {name: getattr(value, name, None) for name in _slots(type(value))}  # type: ignore[arg-type]
    found = {**getattr(value, "__dict__", {}), **in_slots}
    for name in _cached(value):
        del found[name]
    return found


def _cached(value: Any) -> list[str]:
    """Probabilities that a distribution has worked out of its logits, or the reverse: it does so again if it is asked."""
    given = getattr(value, "__dict__", {}).get("_param") if isinstance(value, Distribution) else None
    return [] if given is None else [name for name in ("probs", "logits") if vars(value).get(name, given) is not given]


@functools.lru_cache(maxsize=1024)
def _slots(kind: Any) -> tuple[str, ...]:
    found = [each.__dict__.get("__slots__", ()) for each in kind.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if not name.startswith("__"))


def _set_field(value: Any, name: str, field: Any) -> None:
    """Past a frozen dataclass and any property."""
    if name in getattr(value, "__dict__", {}):
        value.__dict__[name] = field
    else:
        object.__setattr__(value, name, field)


def _emptied(value: Any, keys: tuple[Any, ...]) -> Any:
    template = copy.copy(value)
    for key in keys:
        if isinstance(value[key], (torch.Tensor, RandomVariable)):
            template[key] = None
    return template
