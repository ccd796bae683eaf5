"""``rule``: a person's own rule for a function, a method or a module class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from rvconvert.core.registry import REGISTRY, Exactness, Registry, Rule, operation_name, spellings
from rvconvert.errors import ConversionError
from rvconvert.rules.kinds import Composite

__all__ = ["rule"]

Body = TypeVar("Body", bound=Callable[..., Any])


def rule(
    *targets: Any,
    exactness: str | Exactness = Exactness.APPROXIMATE,
    assumption: str = "",
    replace: bool = False,
    registry: Registry | None = None,
) -> Callable[[Body], Body]:
    """Register a rule: how an operation acts on random variables.

    For a torch function or method, in every spelling torch has for it, the decorated function takes the
    operation's own arguments::

        @rvconvert.rule(torch.special.i0)
        def i0(x):
            return rvconvert.RandomVariable(mean, var)   # of the result, from x.mean and x.var

    For an ``nn.Module`` class (and its subclasses, by MRO) it takes the module first: ``body(module, x)``.
    The body may also be written in torch operations that have rules.

    Args:
        targets: functions, methods or module classes.
        exactness: ``"exact"``, ``"exact_if_independent"``, ``"moment_matched"`` or ``"approximate"``.
        assumption: what must hold for that, in one line.
        replace: replace a rule that is there already.
        registry: where to register; default the library's table. ``rvconvert.REGISTRY.overlay()`` makes one
            for ``convert(..., rules=overlay)`` alone.

    Raises:
        ConversionError: a target is none of these, or has a rule and ``replace`` is False.
    """
    modules = tuple(t for t in targets if isinstance(t, type) and issubclass(t, torch.nn.Module))
    functions = [t for t in targets if t not in modules]
    if not targets or not all(callable(t) for t in functions):
        raise ConversionError("rule(...) takes torch functions, methods or nn.Module classes: @rvconvert.rule(torch.relu)")

    def register(body: Body) -> Body:
        table = REGISTRY if registry is None else registry
        made = Exactness(exactness)
        for function in functions:
            name = getattr(function, "__name__", "")
            same = list(spellings(name.strip("_")))
            served = same if function in same else [function]
            if not replace:  # another spelling may have its rule already; only the target itself must be free
                served = [f for f in served if f is function or table.find(f) is None]
            table.register(Rule(operation_name(function), Composite(body), made, assumption), served, replace=replace)
        for module in modules:
            own = Rule(module.__qualname__, Composite(body), made, assumption, (module,), body=body)
            table.register(own, [], replace=replace)
        return body

    return register
