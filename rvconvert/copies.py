"""Copies of modules: what past calls left on them off its graph, and functions that close over a part with the copy of it."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.core.tree import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["bound_modules", "copied", "copied_state", "redirected"]

_DEPTH = 6  # how far down configurations are looked at


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deepcopy of ``module``, sharing nothing but what ``memo`` holds."""
    made = copy.deepcopy(module, _detached(module, memo))
    _follow(module, made, memo)
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
    for path, module in made.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # whose parameters torch copies with a graph
            for name, parameter in original.get_submodule(path).named_parameters(recurse=False):
                shared = memo.get(id(parameter)) is parameter
                setattr(module, name, parameter if shared else nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            continue
        redirected(module, memo)


def redirected(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions on a module itself close over what ``memo`` has in the place of what they close over."""
    state = vars(module)
    for name, value in state.items():
        if name not in ("_parameters", "_buffers", "_modules"):
            state[name] = _following(value, memo)


def bound_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that are no part of ``model`` and whose methods its modules have in the place of their own, as adapters do."""
    seen, todo = {id(module) for module in model.modules()}, list(model.modules())
    while todo:
        for value in vars(todo.pop()).values():
            owner = value.__self__ if isinstance(value, types.MethodType) else None
            if isinstance(owner, nn.Module) and id(owner) not in seen:
                yield owner
                seen.update(id(module) for module in owner.modules())
                todo += owner.modules()


def _following(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return _copy_of(value, memo)
    if type(value) is list:
        value[:] = [_following(each, memo) for each in value]
    elif isinstance(value, dict):  # hooks too
        for key, each in value.items():
            value[key] = _following(each, memo)
    elif type(value) is tuple:
        return tuple(_following(each, memo) for each in value)
    elif isinstance(value, (weakref.ref, weakref.ProxyType)):
        target = value() if isinstance(value, weakref.ref) else value.__repr__.__self__  # type: ignore[attr-defined]
        made = memo.get(id(target))
        return value if made is None else (weakref.ref if isinstance(value, weakref.ref) else weakref.proxy)(made)
    return value


def _closed_over_copies(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """``function`` with copies in the place of what was copied; itself if it closes over nothing that was."""
    if id(function) in memo:
        return memo[id(function)]  # type: ignore[no-any-return]
    memo[id(function)] = function  # one that closes over itself
    cells = function.__closure__ or ()
    held = [_held(cell) for cell in cells]
    found = [_copy_of(each, memo) for each in held]
    own = function.__defaults__, function.__kwdefaults__, function.__dict__
    defaults, keywords, attributes = (_copy_of(each, memo) for each in own)
    if all(a is b for a, b in zip((*found, defaults, keywords, attributes), (*held, *own), strict=True)):
        return function
    closure = tuple(cell if a is b else types.CellType(a) for cell, a, b in zip(cells, found, held, strict=True))
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, defaults, closure or None)
    made.__kwdefaults__, made.__qualname__ = keywords, function.__qualname__
    made.__dict__.update(attributes)
    memo[id(function)] = made
    return made


def _with_copies(value: Any, memo: dict[int, Any]) -> Any:
    """The same of an object that can be called, by its attributes."""
    if isinstance(value, (type, nn.Module)):
        return value
    memo[id(value)] = value
    found = _copy_of(vars(value), memo)
    if found is not vars(value):
        memo[id(value)] = object.__new__(type(value))
        vars(memo[id(value)]).update(found)
    return memo[id(value)]


def _held(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty yet
        return None


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """``value`` with copies in the place of what was copied; itself if it holds nothing that was."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        return _closed_over_copies(value, memo)
    if isinstance(value, types.MethodType):
        function, owner = _copy_of(value.__func__, memo), _copy_of(value.__self__, memo)
        return value if function is value.__func__ and owner is value.__self__ else types.MethodType(function, owner)
    if isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
        made = [_copy_of(each, memo) for each in parts]
        if all(a is b for a, b in zip(made, parts, strict=True)):
            return value
        return type(value)(made[0], *made[1], **made[2])
    if type(value) not in (list, tuple, dict):
        return _with_copies(value, memo) if callable(value) and hasattr(value, "__dict__") else value
    memo[id(value)] = value  # one that holds itself
    held = list(value.values()) if isinstance(value, dict) else value
    found = [_copy_of(each, memo) for each in held]
    if any(a is not b for a, b in zip(found, held, strict=True)):
        memo[id(value)] = dict(zip(value, found, strict=True)) if isinstance(value, dict) else type(value)(found)
    return memo[id(value)]
