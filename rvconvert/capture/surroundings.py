"""What surrounds a model and is no part of it: a trainer that it is held by, and the log that it writes to there."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import types
    from collections.abc import Iterator

__all__ = ["is_log", "is_surrounding", "reads_its_own", "silent_logs"]

_LOGS = ("log", "log_dict")  # of a LightningModule
_DEPTH, _MOST = 4, 4096  # how far down, and among how many objects, the model is looked for


def _package(value: Any) -> str:
    """The top of the package that an object's class is of; of a weak proxy, that of what it stands for."""
    return str(value.__class__.__module__).partition(".")[0]


def is_installed(package: str) -> bool:
    """True for a package that was installed, or came with Python; not for what is written beside the model."""
    path = str(getattr(sys.modules.get(package), "__file__", ""))
    return package in sys.stdlib_module_names or "site-packages" in path or "dist-packages" in path


def is_surrounding(module: nn.Module, value: Any) -> bool:
    """An object of an installed package that holds the module, or a model that this is part of, as a trainer does."""
    if isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__") or not is_installed(_package(value)):
        return False
    todo, seen = [(value, _DEPTH)], {id(value)}
    while todo and len(seen) < _MOST:
        each, depth = todo.pop(0)
        if isinstance(each, nn.Module):
            if any(m is module for m in each.modules()):
                return True
            continue
        held = each if isinstance(each, dict) else getattr(each, "__dict__", {})
        within = each if isinstance(each, (list, tuple)) else held.values()
        for other in within if depth and len(within) <= _MOST else ():  # not a data set's millions
            if id(other) not in seen and (isinstance(other, (nn.Module, list, tuple, dict)) or hasattr(other, "__dict__")):
                seen.add(id(other))
                todo.append((other, depth - 1))
    return False


def reads_its_own(frame: types.FrameType, value: Any) -> bool:
    """The code of an object's own package reads it, as a log reads a trainer: the model's values do not depend on it."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == _package(value)


def is_log(module: nn.Module, name: str) -> bool:
    """A method of the module by which it reports to a trainer."""
    if name not in _LOGS:
        return False
    owner = next((kind for kind in type(module).__mro__ if name in vars(kind)), None)
    return owner is not None and owner.__name__ == "LightningModule" and is_installed(owner.__module__.partition(".")[0])


@contextlib.contextmanager
def silent_logs(modules: list[nn.Module]) -> Iterator[None]:
    """Within: the modules report nothing; a run on the side has nothing to say."""
    silenced = [(module, name) for module in modules for name in _LOGS if is_log(module, name)]
    for module, name in silenced:
        vars(module)[name] = _say_nothing
    try:
        yield
    finally:
        for module, name in silenced:
            vars(module).pop(name, None)


def _say_nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of a log."""
