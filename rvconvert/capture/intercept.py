"""The one place that touches torch: what is patched while a method is recorded, and put back after.

A capture holds a lock, so that one is under way at a time in the whole process. Every patched function passes through
for other threads, and all is restored whatever is raised.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import checkpoint

from rvconvert.errors import TracingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "COMMAND_LINE",
    "INTERNAL",
    "Handler",
    "intercepting",
    "lock",
    "plainly",
    "refuse_inside_transforms",
    "runs_plainly",
]

_PACKAGE = Path(__file__).parent.parent
INTERNAL = (str(Path(torch.__file__).parent), str(_PACKAGE), contextlib.__file__)
COMMAND_LINE = str(_PACKAGE / "cli")

lock = threading.RLock()
_thread = threading.local()
_owner: int | None = None  # the thread that records


class Handler:
    """What a recorder does with the calls that ``intercepting`` hands to it."""

    def module_call(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """A module is called; ``original(module, *args, **kwargs)`` does it."""
        raise NotImplementedError

    def function_call(self, original: Callable[..., Any], function: type, args: tuple[Any, ...]) -> Any:
        """``function.apply(*args)`` of a ``torch.autograd.Function``; ``original(*args)`` does it."""
        raise NotImplementedError

    def function_forward(self, original: Callable[..., Any], function: type, args: tuple[Any, ...]) -> Any:
        """The same of one whose ``apply`` was taken off its class before, ``reverse = Reverse.apply``: inside its forward."""
        raise NotImplementedError

    def attribute_read(self, module: nn.Module, name: str, value: Any) -> Any:
        """The model, or torch, has looked an attribute of a module up: what it is given."""
        raise NotImplementedError

    def module_read(self, module: nn.Module, name: str, value: nn.Module) -> None:
        """A module reads one of its modules."""
        raise NotImplementedError

    def attribute_missed(self, module: nn.Module, name: str) -> None:
        """The same of an attribute that is not there."""
        raise NotImplementedError

    def asks_grad_mode(self) -> bool:
        """The model asks whether gradients are on: what it is told."""
        raise NotImplementedError


def capturing() -> bool:
    """True in the thread that records a method just now."""
    return _owner == threading.get_ident()


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Within, in this thread: converted methods run the model's own code."""
    outer = runs_plainly()
    _thread.plainly = True
    try:
        yield
    finally:
        _thread.plainly = outer


def runs_plainly() -> bool:
    """True where a converted method is to run the model's own code: while one is recorded or compared."""
    return getattr(_thread, "plainly", False)


def refuse_inside_transforms(name: str) -> None:
    """A recording is made of real tensors.

    Raises:
        TracingError: torch.func or torch.export is at work around the call.
    """
    if torch.compiler.is_compiling():
        where = "under torch.export"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        where = "inside a transform of torch.func"
    else:
        return
    raise TracingError(
        f"{name} is called for the first time {where}, where it cannot be recorded; call it once outside before, or convert "
        "with example_inputs=(x,)"
    )


@contextlib.contextmanager
def intercepting(handler: Handler) -> Iterator[None]:
    """Within, in this thread: modules, autograd functions and questions about gradient mode go through ``handler``.

    Functions of ``torch.jit.script`` and ``torch.compile`` run as the Python they were made of, a ``Variable`` is its tensor,
    and reentrant checkpointing just calls its function.
    """
    global _owner
    with lock, contextlib.ExitStack() as stack:
        outer = _owner
        _owner = threading.get_ident()
        stack.callback(_release, outer)
        grad_enabled = torch.is_grad_enabled()
        stack.callback(torch._C._set_grad_enabled, grad_enabled)
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and its import takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))

        call_module = nn.Module.__call__

        def module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not capturing():
                return call_module(module, *args, **kwargs)
            return handler.module_call(call_module, module, args, kwargs)

        def read_attribute(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if capturing():
                return handler.attribute_read(module, name, value)
            return value

        find_attribute = nn.Module.__getattr__

        def find_in_tables(module: nn.Module, name: str) -> Any:
            try:
                value = find_attribute(module, name)
                if isinstance(value, nn.Module) and capturing():
                    handler.module_read(module, name, value)
                return value
            except AttributeError:
                if capturing():
                    handler.attribute_missed(module, name)
                raise

        call_script = torch.jit.ScriptFunction.__call__

        def script_call(self: Any, *args: Any, **kwargs: Any) -> Any:
            python = getattr(self, "_torchdynamo_inline", None) if capturing() else None
            return call_script(self, *args, **kwargs) if python is None else python(*args, **kwargs)

        apply = torch.autograd.Function.__dict__["apply"]

        def function_apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            original = apply.__get__(None, cls)
            if not capturing() or kwargs:
                return original(*args, **kwargs)
            if issubclass(cls, checkpoint.CheckpointFunction):
                return args[0](*args[2:])
            return handler.function_call(original, cls, args)

        def forward_of(cls: type[torch.autograd.Function], original: Callable[..., Any]) -> Callable[..., Any]:
            takes_context = cls.setup_context is torch.autograd.Function.setup_context

            @functools.wraps(original)
            def forward(*args: Any, **kwargs: Any) -> Any:
                if not capturing() or kwargs:
                    return original(*args, **kwargs)
                context, given = (args[:1], args[1:]) if takes_context else ((), args)
                return handler.function_forward(functools.partial(original, *context), cls, given)

            return forward

        ask = torch.is_grad_enabled

        def is_grad_enabled() -> bool:
            caller = sys._getframe(1).f_code.co_filename
            return ask() if not capturing() or caller.startswith(INTERNAL) else handler.asks_grad_mode()

        def variable(cls: type, data: Any = None, *args: Any, **kwargs: Any) -> Any:
            if capturing():  # a tensor is a Variable since torch 0.4, and one of an older graph a leaf
                return data.detach() if isinstance(data, torch.Tensor) and data.requires_grad else data
            return torch._C._LegacyVariableBase.__new__(cls, data, *args, **kwargs)  # type: ignore[call-arg]

        _patch(stack, nn.Module, "__call__", module_call)
        _patch(stack, nn.Module, "__getattribute__", read_attribute)
        _patch(stack, nn.Module, "__getattr__", find_in_tables)
        _patch(stack, torch.jit.ScriptFunction, "__call__", script_call)
        _patch(stack, torch.autograd.Function, "apply", classmethod(function_apply))
        for cls in _functions(torch.autograd.Function):
            own = vars(cls).get("forward")
            if isinstance(own, staticmethod):
                _patch(stack, cls, "forward", staticmethod(forward_of(cls, own.__func__)))
        _patch(stack, torch, "is_grad_enabled", is_grad_enabled)
        _patch(stack, torch.autograd.Variable, "__new__", variable)
        yield


def _functions(base: type[Any]) -> Iterator[type[Any]]:
    """The functions of autograd that are not torch's own."""
    for cls in base.__subclasses__():
        if not cls.__module__.startswith("torch."):
            yield cls
        yield from _functions(cls)


def _release(outer: int | None) -> None:
    global _owner
    _owner = outer


def _patch(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    if own is None:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, own)
