"""What a recorded graph calls beside torch's own functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.core.random_variable import RandomVariable, Settings, in_settings, propagate, random_variables
from rvconvert.rules.ancestry import under_law

if TYPE_CHECKING:
    from collections.abc import Callable


def call_by_rule(settings: Settings, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module that is not opened: by its class's rule where an argument is random, on each path in sampled modes."""
    found = random_variables(args, kwargs)
    if not found:
        return module(*args, **kwargs)
    rule = settings.registry.find_module(type(module))
    if settings.needs_rules and rule is not None and rule.body is not None:
        return in_settings(rule.body(module, *args, **kwargs), settings)
    return propagate(module.forward, args, kwargs)


def apply_function(settings: Settings, function: Any, *args: Any) -> Any:
    """Apply a ``torch.autograd.Function``: by a rule where an argument is random, on each path in sampled modes."""
    return propagate(function.apply, args, {}) if random_variables(args) else function.apply(*args)


def call_pre_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A module's forward pre-hooks, as ``nn.Module.__call__`` runs them."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            if changed is not None:
                args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def call_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """A module's forward hooks, as ``nn.Module.__call__`` runs them."""
    for key, hook in list(module._forward_hooks.items()):
        given = (args, kwargs) if key in module._forward_hooks_with_kwargs else (args,)
        changed = hook(module, *given, result)
        result = result if changed is None else changed
    return result


def own_copy(constant: torch.Tensor) -> torch.Tensor:
    """A tensor in the place of one that may be written to: an argument, or what a method makes of Python's numbers."""
    return constant.detach().clone().requires_grad_(constant.requires_grad)


AutocastState = tuple[tuple[str, bool, torch.dtype], ...]


def autocast_state() -> AutocastState:
    """Whether autocast is on for each kind of device, and to which dtype."""
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)


def set_autocast(state: AutocastState) -> None:
    """Turn autocast on or off, as ``torch.autocast`` does; what it has cast so far is forgotten."""
    for kind, enabled, dtype in state:
        torch.set_autocast_enabled(kind, enabled)
        torch.set_autocast_dtype(kind, dtype)
    torch.clear_autocast_cache()


def rewritten(base: Any, written: Any) -> Any:
    """What ``base`` is once a detached alias of it was written: what was written, with its own gradient."""
    random = isinstance(base, RandomVariable) and isinstance(written, RandomVariable)
    of_a_draw = random and under_law(torch.sub, (written, base), {}) is not None  # that is not Gaussian: one draw, in both
    if random and not base.precedence and not of_a_draw:
        mean, var = base.mean, base.var
        return base.with_moments(mean + (written.mean - mean).detach(), var + (written.var - var).detach())
    return base + (written - base).detach()


def assign_mean(target: torch.Tensor, value: Any) -> None:
    """Write the mean of a random variable, or a plain value, into a buffer."""
    with torch.no_grad():
        target.copy_(value.mean if isinstance(value, RandomVariable) else value)


def restoring_autocast(run: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """``run``, after which autocast is as it was before."""

    def restoring(model: nn.Module, *leaves: Any) -> tuple[Any, ...]:
        before = autocast_state()
        try:
            return run(model, *leaves)
        finally:
            set_autocast(before)

    return restoring
