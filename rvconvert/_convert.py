"""``convert``: one line turns a VAE into an RV-VAE."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

import rvconvert.covariance
import rvconvert.rules  # noqa: F401 - fills the rule table
from rvconvert.capture import intercept
from rvconvert.capture.module_state import unchanged
from rvconvert.capture.replay import each_mode
from rvconvert.converted import conversion_of, convert_copy, is_converted
from rvconvert.copies import bound_modules, copied
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.tree import flatten
from rvconvert.errors import ConversionError, UnsupportedOperationError
from rvconvert.examination import Examination
from rvconvert.options import Options
from rvconvert.report import Report, merge
from rvconvert.rules.noise import all_entering

if TYPE_CHECKING:
    from rvconvert.conversion import Conversion

__all__ = ["convert", "plan"]

M = TypeVar("M", bound=nn.Module)


def convert(
    module: M,
    options: Options | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    inplace: bool = False,
    **changes: Any,
) -> M:
    """Convert a VAE, or a bare decoder, into one that propagates random variables instead of samples.

    Args:
        module: any VAE (its noise sources are found in its own code), or a decoder (``random_inputs``).
        options: how; default ``Options()``.
        example_inputs: a tensor or a tuple of positional arguments for the converted method. With them the
            model is recorded, checked, run once and refused now; without, at the first call.
        example_kwargs: keyword arguments to go with them.
        inplace: share the parameters and buffers of ``module`` instead of copying them.
        **changes: fields of ``Options``, in the place of those in ``options``: ``methods``, ``random_inputs``, ``latent``,
            ``output``, ``penalty``, ``penalty_kind``, ``attach``, ``covariance``, ``rank``, ``pairs``, ``seed``, ``strict``,
            ``variance_dtype``, ``rules``; see ``Options``.

    Returns:
        A model of the class of ``module`` (a generated subclass) with identical state_dict keys. ``module`` is
        not changed.

    Raises:
        ConversionError: see its subclasses; the message says where, what, why and what to type next.
    """
    _check_module(module)
    options = Options.of(options, changes)
    _check_methods(module, options)
    memo: dict[int, Any] = {}
    if inplace:
        memo = _shared(module)
    else:
        _warn_of_adapters(module)
    model = convert_copy(copied(module, memo), options)
    if example_inputs is not None or example_kwargs is not None:
        _prepare(model, _as_args(example_inputs), example_kwargs or {})
    return model  # type: ignore[return-value]


def plan(
    module: nn.Module,
    options: Options | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    **changes: Any,
) -> Report:
    """What ``convert`` would do, node by node, without doing it and without refusing anything.

    Args:
        module, options, example_inputs, example_kwargs, changes: as for ``convert``.

    Returns:
        A report that iterates over its rows and prints as a table: the operations with their rules and roles, and where
        L_c is attached.
    """
    _check_module(module)
    options = Options.of(options, changes)
    _check_methods(module, options)
    model = convert_copy(copied(module, _shared(module)), options)
    conversion = conversion_of(model)
    reports = []
    for name in options.methods:
        if example_inputs is None and example_kwargs is None:
            note = "a plan is made from a run: pass example_inputs=(x,)"
            reports.append(Report(type(module).__name__, name, "not recorded", "recorded at the first call", (), (note,)))
        else:
            args, kwargs = _with_random_inputs(conversion, name, model, _as_args(example_inputs), example_kwargs or {})
            with intercept.lock, intercept.plainly():
                examination = Examination(conversion, name, model, args, kwargs)
                examined = examination.examine()
                report = examined.report
                if examined.refusal is not None and examination.samples_in_other_mode(examined):
                    note = "it draws in the other mode only, and is converted there: model.train() or model.eval()"
                    report = dataclasses.replace(report, refusal="", notes=(*report.notes, note))
                reports.append(report)
    return merge(reports)


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ConversionError(f"convert takes a torch.nn.Module, not {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise ConversionError("a scripted model has no Python to convert; pass the nn.Module that torch.jit.script was given")
    if type(module).__name__ == "OptimizedModule":
        raise ConversionError("a compiled model has no code of its own; convert first: torch.compile(rvconvert.convert(model))")
    if is_converted(module):
        raise ConversionError("this model is converted already; rvconvert.to_plain(model) gives the plain one back")


def _shared(module: nn.Module) -> dict[int, Any]:
    """For a copy that has the model's own parameters and buffers, and those of adapters beside it."""
    own: list[nn.Module] = [module, *bound_modules(module)]
    return {id(t): t for each in own for t in (*each.parameters(), *each.buffers())}


def _warn_of_adapters(module: nn.Module) -> None:
    """Modules beside the model that its layers call are copied with it, and whoever trains them has the others."""
    names = {type(each).__name__ for each in bound_modules(module) if any(p.requires_grad for p in each.parameters())}
    if names:
        warnings.warn(
            f"layers of {type(module).__name__} call methods of {', '.join(sorted(names))}, which is no part of it: convert made "
            "copies, whose parameters are in no optimizer; apply it to what convert returns, or convert(model, inplace=True)",
            stacklevel=3,
        )


def _check_methods(module: nn.Module, options: Options) -> None:
    for name in options.methods:
        if getattr(type(module), name, None) is getattr(nn.Module, name, name):  # torch's, which says that there is none
            own = [n for n, f in vars(type(module)).items() if n[0] != "_" and inspect.isfunction(f)]
            raise ConversionError(
                f"{type(module).__name__} has no method {name!r}; name those that encode, sample and decode, of "
                f"{', '.join(own)}: methods=(...)"
            )
        if not callable(getattr(type(module), name, None)):
            raise ConversionError(f"methods: {type(module).__name__} has no method {name!r}")
        if isinstance(inspect.getattr_static(type(module), name), staticmethod):
            raise ConversionError(
                f"methods: {type(module).__name__}.{name} is a staticmethod, which has no layers; leave it out, and what "
                "calls it is converted with it"
            )
    if not options.random_inputs:
        return
    for name in options.methods:
        names = list(inspect.signature(getattr(type(module), name)).parameters)
        for wanted in options.random_inputs:
            if wanted not in names:
                raise ConversionError(
                    f"random_inputs: {type(module).__name__}.{name} has no argument {wanted!r}; it has {', '.join(names[1:])}"
                )


def _as_args(example: Any) -> tuple[Any, ...]:
    if example is None:
        return ()
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def _prepare(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record every method in the model's present mode, then in the other one if that runs; run the moments once."""
    conversion = conversion_of(model)
    for name in conversion.options.methods:
        given, options = _with_random_inputs(conversion, name, model, args, kwargs)
        for other in each_mode(model):
            try:
                program = conversion.prepare(name, model, given, options, to_run=False)
            except UnsupportedOperationError:
                raise
            except Exception:
                if not other:  # the model itself may refuse the example in the other mode (a batch of one)
                    raise
                continue
            if not other:
                leaves = flatten(conversion.normalized(name, given, options))[0]
                with unchanged(model, model.parameters()), conversion.aside(), torch.enable_grad():
                    program.run(model, *all_entering(leaves, conversion.settings))
    conversion.forget_calls()


def _with_random_inputs(
    conversion: Conversion, name: str, model: nn.Module, args: Any, kwargs: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call with plain tensors for random inputs dressed as standard normal variables."""
    if not conversion.options.random_inputs:
        return args, kwargs
    bound = inspect.signature(conversion.method(name, model)).bind(*args, **kwargs)
    for wanted in conversion.options.random_inputs:
        value = bound.arguments.get(wanted)
        if isinstance(value, torch.Tensor):
            variable = RandomVariable._make(value, torch.ones_like(value), conversion.settings)
            bound.arguments[wanted] = variable.derived(latent=True)
    return bound.args, bound.kwargs
