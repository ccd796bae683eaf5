"""What rules do with a call: its arguments, the moments in them, and the operations that are another spelling of one."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rvconvert.core.random_variable import RandomVariable, random_variables
from rvconvert.core.registry import NAMESPACES, FunctionTable
from rvconvert.moments.compilation import is_traced

Function = Callable[..., Any]


def substitute(value: Any, replace: Callable[[RandomVariable], Any]) -> Any:
    """``value`` with every random variable in nested lists, tuples and dicts replaced."""
    if isinstance(value, RandomVariable):
        return replace(value)
    if isinstance(value, (list, tuple)):
        items = [substitute(each, replace) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: substitute(each, replace) for key, each in value.items()}
    return value


def join(mean: Any, var: Any, like: RandomVariable) -> Any:
    """Random variables out of two equal structures of tensors."""
    if isinstance(mean, torch.Tensor):
        return like.with_moments(mean, var) if mean.is_floating_point() else mean
    if isinstance(mean, (list, tuple)):
        items = [join(a, b, like) for a, b in zip(mean, var, strict=True)]
        return items if isinstance(mean, list) else tuple(items)
    return mean


def bind(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], tuple[Any, ...], dict[str, Any]]:
    """Split a call into the named leading arguments (None where absent), the other positional ones and keywords."""
    rest = dict(kwargs)
    values = [args[i] if i < len(args) else rest.pop(name, None) for i, name in enumerate(names)]
    return values, args[len(names) :], rest


def recomputed(function: Function, *tensors: torch.Tensor | None) -> Any:
    """``function(*tensors)``, of which gradients keep the tensors alone and run it again."""
    if is_traced() or not torch.is_grad_enabled():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def unique(*values: Any) -> list[RandomVariable]:
    """The random variables in nested arguments, each once, in order."""
    return list({id(x): x for x in random_variables(*values)}.values())


def at_means(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func`` with every random variable at its mean."""
    return func(*substitute(args, lambda x: x.mean), **substitute(kwargs, lambda x: x.mean))


def spread(var: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``var`` broadcast to the shape of ``like``."""
    return var if var.shape == like.shape else var.expand(like.shape)


def moments(value: Any) -> tuple[Any, Any]:
    """Mean and variance of a value; the variance of what is not random is None."""
    return (value.mean, value.var) if isinstance(value, RandomVariable) else (value, None)


class full_precision:
    """Context in which autocast does not lower the precision of moments."""

    def __init__(self, x: RandomVariable | torch.Tensor) -> None:
        device = x.device.type
        lowered = device != "meta" and torch.is_autocast_enabled(device)
        self._context = torch.autocast(device, enabled=False) if lowered else None

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*error)


def shapes_of(*values: Any) -> Iterator[torch.Size]:
    """Shapes of the tensors and random variables in a call's arguments."""
    for value in values:
        if isinstance(value, (torch.Tensor, RandomVariable)):
            yield value.shape
        elif isinstance(value, (list, tuple)):
            yield from shapes_of(*value)
        elif isinstance(value, dict):
            yield from shapes_of(*value.values())


def _twins() -> dict[Any, Function]:
    """In-place function -> the function that leaves its argument alone."""
    table: dict[Any, Function] = {}
    for namespace in NAMESPACES:
        for name in dir(namespace):
            twin = getattr(namespace, name[:-1], None)
            if name.endswith("_") and not name.endswith("__") and callable(twin):
                table[getattr(namespace, name)] = twin
    for name in ("add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor", "floordiv", "mod"):
        if hasattr(torch.Tensor, f"__i{name}__") and hasattr(torch.Tensor, f"__{name}__"):
            table[getattr(torch.Tensor, f"__i{name}__")] = getattr(torch.Tensor, f"__{name}__")
    return table


_TWINS = FunctionTable(_twins())


def out_of_place(func: Function) -> Function:
    """The twin of an in-place function that leaves its argument alone; any other function is its own."""
    return _TWINS.get(func) or func


def own_python(func: Any) -> Function:
    """A torch function that is itself written in Python, to be run as such on random variables.

    Its first lines hand any argument that is not a plain tensor to ``__torch_function__``; here they do not.
    """
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **{check: lambda *args: False for check in checks}}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body
