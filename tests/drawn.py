"""A model's own code with its draws replaced by random variables, one torch function after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rvconvert import RandomVariable
from rvconvert.core.random_variable import Settings, is_in_place, propagate
from rvconvert.rules.draws import DRAWS
from rvconvert.rules.noise import nth_source


class Dressed(torch.Tensor):
    """A random variable in the clothes of a tensor, for code that asks ``isinstance(x, torch.Tensor)``."""

    variable: RandomVariable

    @staticmethod
    def __new__(cls, variable: RandomVariable) -> Dressed:
        made = torch.Tensor._make_wrapper_subclass(cls, variable.shape, dtype=variable.dtype, device=variable.device)
        made.variable = variable
        return made

    def __init__(self, variable: RandomVariable) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = propagate(func, bare(args), bare(kwargs))
        return args[0] if is_in_place(func, kwargs) else dressed(result)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # as autograd takes the result of a function that draws inside it
            return Dressed(args[0].variable.detach())
        raise TypeError(f"{func} reached a random variable as a plain function")


def bare(value: Any) -> Any:
    if type(value) is Dressed:
        return value.variable
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(bare(each) for each in value)
    return {key: bare(each) for key, each in value.items()} if type(value) is dict else value


def dressed(value: Any) -> Any:
    if isinstance(value, RandomVariable):
        return Dressed(value)
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(dressed(each) for each in value) if type(value) in (list, tuple) else tuple(map(dressed, value))
    return value


class _Replaced(TorchFunctionMode):
    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.drawn = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draw = DRAWS.get(func)
        if draw is None:
            return func(*args, **kwargs)
        settings = nth_source(self.settings, self.drawn)
        self.drawn += 1
        with torch.enable_grad():  # torch.distributions draws a Dirichlet variable inside an autograd function
            return dressed(draw.random_variable(*bare(args), **bare(kwargs), settings=settings))


def with_draws(function: Callable[..., Any], *args: Any, settings: Settings | None = None) -> RandomVariable:
    """``function(*args)`` with every draw in it a random variable."""
    with _Replaced(settings or Settings()):
        return bare(function(*args))
