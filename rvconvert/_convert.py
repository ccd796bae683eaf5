"""``convert``: one line turns a VAE into an RV-VAE."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import rvconvert.covariance
import rvconvert.rules  # noqa: F401 - fills the rule table
from rvconvert.converted import Conversion, Options, each_mode
from rvconvert.core.random_variable import RandomVariable, Settings
from rvconvert.core.registry import REGISTRY, Registry
from rvconvert.covariance.calibrated import Gains
from rvconvert.errors import ConversionError, UnsupportedOperationError
from rvconvert.plain import detached, is_converted, plain_copy
from rvconvert.report import Report, merge

__all__ = ["convert", "plan"]


def convert(
    module: nn.Module,
    *,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    methods: Sequence[str] | None = None,
    random_inputs: Sequence[str] | None = None,
    output: str = "mean",
    penalty: float = 50.0,
    penalty_kind: str = "squared",
    attach: bool = True,
    covariance: str = "independent",
    rank: int | None = None,
    pairs: int = 1,
    seed: int | None = None,
    fuse: bool = False,
    engine: str = "auto",
    recalibrate: int = 20,
    strict: bool = False,
    variance_dtype: torch.dtype | None = None,
    rules: Registry | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Convert a VAE, or a bare decoder, into one that propagates random variables instead of samples.

    Args:
        module: any VAE (its noise sources are found in its own code), or a decoder (``random_inputs``).
        example_inputs: a tensor or a tuple of positional arguments for the converted method. With them the
            model is captured, checked and refused now; without, at the first call.
        example_kwargs: keyword arguments to go with them.
        methods: the methods to convert; default ``("forward",)``.
        random_inputs: names of arguments that are given as ``RandomVariable(mean, var)``.
        output: ``"mean"``, outputs keep their type; ``"distribution"``, random outputs are RandomVariables.
        penalty: the weight of L_c (paper eq. 14, lambda). penalty_kind: ``"squared"`` (the paper's) or ``"expected"``.
        attach: let L_c join the loss at backward; else use ``variance_penalty`` on a distribution.
        covariance: ``"independent"`` (the paper), ``"calibrated"``, ``"lowrank"`` or ``"sampled"``.
        rank: pairs of nodes in low-rank mode. pairs: antithetic pairs in sampled mode.
        seed: fixes their draws.
        fuse: adjacent linear maps with no activation between propagate variance as one map (``"independent"`` only;
            the paper's equations take each by itself).
        engine: ``"graph"``, ``"dispatch"``, or ``"auto"``: the first that can.
        recalibrate: in calibrated mode, gains are renewed every so many training steps; 0: never by themselves.
        strict: refuse an operation without a rule of its own, which else is linearised at the mean.
        variance_dtype: dtype of the variance's matrix work, for instance ``torch.bfloat16``.
        rules: a registry (``rvconvert.REGISTRY.overlay()``) with rules for this model alone.
        inplace: share the parameters and buffers of ``module`` instead of copying them.

    Returns:
        A model of the class of ``module`` (a generated subclass) with identical state_dict keys. ``module`` is
        not changed.

    Raises:
        ConversionError: see its subclasses; the message says where, what, why and what to type next.
    """
    _check_module(module)
    options = _options(
        methods=methods, random_inputs=random_inputs, output=output, penalty=penalty, penalty_kind=penalty_kind, attach=attach,
        covariance=covariance, rank=rank, pairs=pairs, seed=seed, fuse=fuse, engine=engine, strict=strict,
        recalibrate=recalibrate, variance_dtype=variance_dtype, rules=rules,
    )  # fmt: skip
    _check_methods(module, options)
    memo: dict[int, Any] = {}
    if inplace:
        memo = {id(t): t for t in (*module.parameters(), *module.buffers())}
    model = convert_copy(copy.deepcopy(module, detached(module, memo)), options)
    if example_inputs is not None or example_kwargs is not None:
        _prepare(model, _as_args(example_inputs), example_kwargs or {})
    elif options.engine != "dispatch":
        for name in options.methods:
            model.__dict__["_rvconvert"].refuse_early(name, model)
    return model


def convert_copy(model: nn.Module, options: Options) -> nn.Module:
    """Give a model of our own the generated class and the conversion that go with ``options``."""
    conversion = Conversion(options, type(model))
    model.__dict__["_rvconvert"] = conversion
    model.__class__ = _generated_class(type(model), options.methods)
    return model


def _options(
    *,
    methods: Sequence[str] | None = None,
    random_inputs: Sequence[str] | None = None,
    covariance: str = "independent",
    rank: int | None = None,
    pairs: int = 1,
    seed: int | None = None,
    fuse: bool = False,
    strict: bool = False,
    variance_dtype: torch.dtype | None = None,
    rules: Registry | None = None,
    **others: Any,
) -> Options:
    """The keyword arguments of ``convert`` as options."""
    methods = (methods,) if isinstance(methods, str) else tuple(methods or ("forward",))
    random_inputs = (random_inputs,) if isinstance(random_inputs, str) else tuple(random_inputs or ())
    settings = Settings(rules or REGISTRY, covariance, rank, pairs, seed, strict, variance_dtype, fuse)
    return Options(methods, random_inputs, settings=settings, **others)


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ConversionError(f"convert takes a torch.nn.Module, not {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise ConversionError("a scripted model has no Python to convert; pass the nn.Module that torch.jit.script was given")
    if is_converted(module):
        raise ConversionError("this model is converted already; rvconvert.to_plain(model) gives the plain one back")


def _check_methods(module: nn.Module, options: Options) -> None:
    for name in options.methods:
        if not callable(getattr(type(module), name, None)):
            raise ConversionError(f"methods: {type(module).__name__} has no method {name!r}")
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


def _prepare(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Report]:
    """Capture every method in the model's present mode, then in the other one if that runs."""
    conversion: Conversion = model.__dict__["_rvconvert"]
    reports = []
    for name in conversion.options.methods:
        call = _with_random_inputs(conversion, name, args, kwargs)
        for other in each_mode(model):
            try:
                reports.append(conversion.prepare(name, model, *call).report)
            except UnsupportedOperationError:
                raise
            except Exception:
                if not other:  # the model itself may refuse the example in the other mode (a batch of one)
                    raise
    return reports


def _with_random_inputs(conversion: Conversion, name: str, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example call with plain tensors for random inputs dressed as standard normal variables."""
    bound = inspect.signature(conversion.method(name)).bind(None, *args, **kwargs)
    for wanted in conversion.options.random_inputs:
        value = bound.arguments.get(wanted)
        if isinstance(value, torch.Tensor):
            variable = RandomVariable._make(value, torch.ones_like(value), conversion.settings)
            bound.arguments[wanted] = variable.derived(latent=True)
    return bound.args[1:], bound.kwargs


def plan(
    module: nn.Module, *, example_inputs: Any = None, example_kwargs: dict[str, Any] | None = None, **options: Any
) -> Report:
    """What ``convert`` would do, node by node, without doing it and without refusing anything.

    Args:
        module, example_inputs, example_kwargs, options: as for ``convert``.

    Returns:
        A report that iterates over its rows and prints as a table.
    """
    _check_module(module)
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    made = _options(**options)
    _check_methods(module, made)
    model = convert_copy(copy.deepcopy(module, detached(module, shared)), made)
    conversion: Conversion = model.__dict__["_rvconvert"]
    reports = []
    for name in made.methods:
        if example_inputs is None and example_kwargs is None:
            reports.append(conversion.examine_symbolically(name, model))
        else:
            call = _with_random_inputs(conversion, name, _as_args(example_inputs), example_kwargs or {})
            reports.append(conversion.examine(name, model, *call).report)
    return merge(reports)


def _generated_class(cls: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` whose ``methods`` run converted; it pickles as (plain model, options)."""

    def converted(name: str) -> Any:
        original = getattr(cls, name)

        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__["_rvconvert"].run(name, self, args, kwargs)

        method.__name__, method.__qualname__ = name, f"{cls.__qualname__}.{name}"
        method.__doc__ = original.__doc__
        method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return method

    namespace: dict[str, Any] = {name: converted(name) for name in methods}
    namespace |= {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": lambda self, protocol: (_rebuild, _to_rebuild(self)),
        "__deepcopy__": _deepcopy,
        "last_penalty": property(lambda self: self.__dict__["_rvconvert"].last_penalty),
        "penalty_scale": property(
            lambda self: self.__dict__["_rvconvert"].penalty_scale,
            lambda self, value: setattr(self.__dict__["_rvconvert"], "penalty_scale", value),
        ),
    }
    return type(cls.__name__, (cls,), namespace)


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    conversion: Conversion = self.__dict__["_rvconvert"]
    made = convert_copy(plain_copy(self, memo), conversion.options)
    copied: Conversion = made.__dict__["_rvconvert"]
    copied.programs, copied.constants = dict(conversion.programs), conversion.constants
    copied.penalty_scale = conversion.penalty_scale
    copied.gains = Gains.from_tensors(conversion.gains.to_tensors())
    memo[id(self)] = made
    return made


def _to_rebuild(model: nn.Module) -> tuple[nn.Module, Options, dict[str, torch.Tensor]]:
    conversion: Conversion = model.__dict__["_rvconvert"]
    return plain_copy(model), conversion.options, conversion.gains.to_tensors()


def _rebuild(plain: nn.Module, options: Options, gains: dict[str, torch.Tensor] | None = None) -> nn.Module:
    model = convert_copy(plain, options)
    model.__dict__["_rvconvert"].gains = Gains.from_tensors(gains or {})
    return model
