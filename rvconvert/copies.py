"""Copies of modules: what past calls left on them off its graph, and functions that close over a part with the copy of it."""

from __future__ import annotations

import collections
import copy
import functools
import types
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.core.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

__all__ = ["bound_modules", "copied", "copied_state", "redirected"]

_DEPTH = 6  # how far down configurations are looked at
_HOLDERS = object()  # by whose id a memo has the classes of objects that a function holds and that hold what was copied
_NOTHING = object()  # by whose id a memo has what holds nothing that was copied
_WEAK = (weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType)
_CACHED = type(functools.cache(len))
_MANY = 256  # entries of a container that a function holds, beyond which it is data


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deepcopy of ``module``, sharing nothing but what ``memo`` holds."""
    made = copy.deepcopy(module, _detached(module, memo))
    _follow(module, made, memo)
    if names := sorted(memo.get(id(_HOLDERS), ())):
        warnings.warn(
            f"functions on {type(module).__name__} hold an object of {', '.join(names)}, which holds layers of the model: those "
            "of the copy compute with the original's weights. Let them hold the layers, or convert(model, inplace=True)",
            stacklevel=3,
        )
    return made


def copied_state(model: nn.Module, state: dict[str, Any], made: nn.Module, memo: dict[int, Any]) -> None:
    """Give ``made`` a deepcopy of ``state``, a part of the ``__dict__`` of ``model``."""
    made.__dict__.update(copy.deepcopy(state, _detached(model, memo)))
    _follow(model, made, memo)


def _detached(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """``memo`` for a deepcopy of ``model``, with the results of past calls that it keeps taken off their graph."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules", "_rvconvert"):
                for tensor in flatten(value)[0]:
                    if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                        memo[id(tensor)] = tensor.detach().clone()
                _copy_configuration(value, memo)
    return memo


def _copy_configuration(value: Any, memo: dict[int, Any], depth: int = _DEPTH) -> None:
    """Note copies of what deepcopy has none of: a dict whose keys are its attributes; a module of settings is itself."""
    if isinstance(value, types.ModuleType):
        memo[id(value)] = value
    if not isinstance(value, (dict, list, tuple)) or id(value) in memo or not depth:
        return
    contents = list(value.values()) if isinstance(value, dict) else value
    made = type(value).__new__(type(value)) if isinstance(value, dict) and _has_no_copy(value) else None
    if made is not None:
        memo[id(value)] = made
    for each in contents:
        _copy_configuration(each, memo, depth - 1)
    if isinstance(value, dict) and made is not None:
        dict.update(made, {key: copy.deepcopy(each, memo) for key, each in dict.items(value)})
        state = object.__getattribute__(value, "__dict__")
        object.__setattr__(made, "__dict__", made if state is value else copy.deepcopy(state, memo))


def _has_no_copy(value: dict[Any, Any]) -> bool:
    """True of a dict of a class whose attributes are its keys: deepcopy fails, or the copy has none."""
    if type(value) is dict:
        return False
    try:
        getattr(value, "__deepcopy__", None)
    except Exception:  # noqa: BLE001 (a KeyError, or whatever its class raises for a missing key)
        return True
    return getattr(value, "__dict__", None) is value


def _follow(original: nn.Module, made: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions on a copy, ``lambda h: h * self.gain``, close over the copy, where deepcopy leaves the original."""
    own = {id(each) for each in memo.values()}
    memo[id(_NOTHING)] = {}  # another model may have been copied since
    for path, module in made.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose parameters torch copies with a graph
            for name, parameter in original.get_submodule(path).named_parameters(recurse=False):
                shared = memo.get(id(parameter)) is parameter
                setattr(module, name, parameter if shared else nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            continue
        redirected(module, memo, own)


def redirected(module: nn.Module, memo: dict[int, Any], own: Collection[int] | None = None) -> None:
    """Let the functions on a module itself close over what ``memo`` has in the place of what they close over.

    So do those of containers and objects that it keeps: changed in place if their id is in ``own``, where that is given.
    """
    state = vars(module)
    for name, value in state.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            state[name] = _following(value, memo, own)


def bound_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that are no part of ``model`` and whose methods its modules have in the place of their own, as adapters do."""
    seen, todo = {id(module) for module in model.modules()}, list(model.modules())
    while todo:
        for value in vars(todo.pop()).values():
            owner = value.__self__ if isinstance(value, types.MethodType) else None
            if isinstance(owner, nn.Module) and id(owner) not in seen:
                held = list(owner.modules())
                seen.update(map(id, held))
                if model not in held:  # else one that the model is a part of
                    yield owner
                    todo += held


def _following(value: Any, memo: dict[int, Any], own: Collection[int] | None) -> Any:
    opened = isinstance(value, (list, dict)) or (own is not None and _is_record(value))  # hooks too
    if opened and (own is None or id(value) in own):
        held = value if isinstance(value, (list, dict)) else vars(value)
        if id(held) in memo:
            return value
        memo[id(held)] = held
        for key, each in enumerate(held) if isinstance(held, list) else list(held.items()):
            made = _following(each, memo, own)
            if made is not each:  # a container may count what is put into it
                held[key] = made
        return value
    return tuple(_following(each, memo, own) for each in value) if type(value) is tuple else _copy_of(value, memo)


def _is_record(value: Any) -> bool:
    """An object with attributes: no class, module, tensor or function."""
    others = (type, nn.Module, types.ModuleType, torch.Tensor, types.FunctionType, types.MethodType, functools.partial)
    return hasattr(value, "__dict__") and not isinstance(value, others)


# ---- what a function holds --------------------------------------------------------------------------------------------


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """``value`` with copies in the place of what was copied; itself if it holds nothing that was."""
    if id(value) in memo:
        return memo[id(value)]
    seen: dict[int, Any] = {}
    if not _reaches(value, memo, seen):
        memo.setdefault(id(_NOTHING), {}).update(seen)  # each is looked through once
        return value
    if type(value) in _WEAK:
        return (weakref.ref if isinstance(value, weakref.ref) else weakref.proxy)(_copy_of(_target(value), memo))
    if isinstance(value, types.FunctionType):
        return _copied_function(value, memo)
    if isinstance(value, types.MethodType):
        return types.MethodType(_copy_of(value.__func__, memo), _copy_of(value.__self__, memo))
    if isinstance(value, functools.partial):
        return type(value)(_copy_of(value.func, memo), *_copy_of(value.args, memo), **_copy_of(value.keywords, memo))
    if isinstance(value, _CACHED):
        return functools.lru_cache(**value.cache_parameters())(_copy_of(value.__wrapped__, memo))
    if type(value) in (tuple, set, frozenset):
        return type(value)(_copy_of(each, memo) for each in value)
    if _is_named(value):
        return value._make(_copy_of(each, memo) for each in value)
    if isinstance(value, (list, dict, collections.deque)):
        made = memo[id(value)] = copy.copy(value)
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            made[key] = _copy_of(each, memo)
        return made
    return _copied_object(value, memo)


def _reaches(value: Any, memo: dict[int, Any], seen: dict[int, Any]) -> bool:
    """``value`` is, or holds, something that was copied."""
    if id(value) in memo:
        return memo[id(value)] is not value
    if id(value) in seen or id(value) in memo.get(id(_NOTHING), ()):
        return False
    seen[id(value)] = value
    if _is_record(value) and not callable(value) and any(_is_copied(each, memo) for each in vars(value).values()):
        memo.setdefault(id(_HOLDERS), set()).add(type(value).__name__)
    return any(_reaches(each, memo, seen) for each in _held_by(value))


def _is_copied(value: Any, memo: dict[int, Any]) -> bool:
    """A parameter, or a module of parameters, of which the copy has others."""
    if not isinstance(value, (nn.Parameter, nn.Module)):
        return False
    parameters = value.parameters() if isinstance(value, nn.Module) else (value,)
    return any(memo.get(id(p), p) is not p for p in parameters)


def _held_by(value: Any) -> list[Any]:
    """What a function holds, a container, or an object that can be called."""
    if type(value) in _WEAK:  # which say that they are what they refer to
        return [_target(value)]
    if isinstance(value, types.FunctionType):
        return [*map(_contents, value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, value.__dict__]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, (list, set, frozenset, dict, collections.deque)) or type(value) is tuple or _is_named(value):
        held = list(value.values() if isinstance(value, dict) else value)
        return held if len(held) <= _MANY or isinstance(held[0], (torch.Tensor, nn.Module)) else []
    return [vars(value)] if callable(value) and _is_record(value) else []


def _copied_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    cells = function.__closure__ or ()
    fresh = [cell for cell in cells if id(cell) not in memo and _reaches(_contents(cell), memo, {})]
    memo.update({id(cell): types.CellType() for cell in fresh})  # of two functions that share one, the copies do
    closure = tuple(memo.get(id(cell), cell) for cell in cells)
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure or None)
    memo[id(function)] = made  # one may close over itself
    for cell in fresh:
        memo[id(cell)].cell_contents = _copy_of(_contents(cell), memo)
    made.__defaults__, made.__kwdefaults__ = _copy_of(function.__defaults__, memo), _copy_of(function.__kwdefaults__, memo)
    made.__qualname__ = function.__qualname__
    made.__dict__.update(_copy_of(function.__dict__, memo))
    return made


def _copied_object(value: Any, memo: dict[int, Any]) -> Any:
    """One that can be called, its attributes with copies in the place of what was copied."""
    try:
        made = object.__new__(type(value))
    except TypeError:  # of a class that is written in C
        return value
    memo[id(value)] = made
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name[:2] == "__" and name[-2:] != "__":
                name = f"_{cls.__name__.lstrip('_')}{name}"  # as Python has it
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                object.__setattr__(made, name, getattr(value, name))
    vars(made).update({name: _copy_of(each, memo) for name, each in vars(value).items()})
    return made


def _is_named(value: Any) -> bool:
    """A named tuple."""
    return isinstance(value, tuple) and hasattr(type(value), "_make")


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _target(reference: Any) -> Any:
    """What a weak reference refers to."""
    return reference() if isinstance(reference, weakref.ref) else reference.__repr__.__self__
