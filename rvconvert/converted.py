"""What a converted model is: a subclass of its own class that carries a conversion; its copies, pickles and way back."""

from __future__ import annotations

import inspect
import sys
import types
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from rvconvert.capture import intercept
from rvconvert.conversion import Conversion
from rvconvert.copies import copied_state
from rvconvert.covariance.calibrated import Gains
from rvconvert.errors import ConversionError
from rvconvert.options import Options, described

_COMPILES = torch.__version__ >= "2.12"  # torch.compile of earlier ones fails on tensor subclasses; there the method runs eagerly

__all__ = ["ConvertedModel", "conversion_of", "convert_copy", "is_converted", "plain_copy", "reconverted"]


class ConvertedModel:
    """What every converted model has beside its own class: the penalty, its scale, copies and pickles."""

    __dict__: dict[str, Any]

    @property
    def last_penalty(self) -> torch.Tensor | None:
        """L_c of the last call that had one, a scalar; None before the first one."""
        return conversion_of(self).last_penalty

    @property
    def penalty_scale(self) -> float:
        """What the gradient of L_c is multiplied by: a GradScaler's scale, 1 / n where gradients are accumulated."""
        return conversion_of(self).penalty_scale

    @penalty_scale.setter
    def penalty_scale(self, value: float) -> None:
        conversion_of(self).penalty_scale = value

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own ``train``; said once: gradients came, and no call of what was converted."""
        conversion = conversion_of(self)
        conversion.advice.of_no_call(self, conversion.last_penalty)  # type: ignore[arg-type]
        return conversion.plain_class.train(self, *args, **kwargs)  # type: ignore[type-var]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own ``state_dict``; said once, as by ``train``: gradients came, and no call of what was converted."""
        conversion = conversion_of(self)
        conversion.advice.of_no_call(self, conversion.last_penalty)  # type: ignore[arg-type]
        return conversion.plain_class.state_dict(self, *args, **kwargs)  # type: ignore[call-overload]

    @property
    def conversion_options(self) -> Options:
        """How the model was converted."""
        return conversion_of(self).options

    def __repr__(self) -> str:
        conversion = conversion_of(self)
        head, line, rest = conversion.plain_class.__repr__(self).partition("\n")  # type: ignore[arg-type]
        return f"{head}  # {described(conversion.options)}{line}{rest}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        conversion = conversion_of(self)
        rest = (conversion.options, conversion.gains.to_tensors(), conversion.penalty_scale, conversion.posteriors)
        if conversion.own:
            return _rebuilt, (plain_copy(self), *rest)  # type: ignore[arg-type]
        # Its own parameters, so that an optimizer in the same file, or another process, goes on with these.
        getstate = getattr(conversion.plain_class, "__getstate__", None)
        state = dict(self.__dict__) if getstate is None else getstate(self)
        if isinstance(state, dict):
            state = {key: value for key, value in state.items() if key != "_rvconvert"}
        return _blank, (conversion.plain_class, *rest), state

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        conversion = conversion_of(self)
        made = convert_copy(plain_copy(self, memo), conversion.options)  # type: ignore[arg-type]
        copied = conversion_of(made)
        if not any(isinstance(each, nn.Parameter) for each in vars(conversion.constants).values()):  # else they are the other's
            copied.programs, copied.constants = OrderedDict(conversion.programs), conversion.constants
        copied.places, copied.moving, copied.still = dict(conversion.places), dict(conversion.moving), set(conversion.still)
        copied.moving_arguments = dict(conversion.moving_arguments)
        copied.gains = Gains.from_tensors(conversion.gains.to_tensors())
        copied.scopes, copied.stepped = set(conversion.scopes), dict(conversion.stepped)
        copied.differentiates = conversion.differentiates
        copied.once, copied.penalty_scale = dict(conversion.once), conversion.penalty_scale
        copied.latents, copied.posteriors = set(conversion.latents), dict(conversion.posteriors)
        memo[id(self)] = made
        return made


def _blank(plain_class: type[nn.Module], *rest: Any) -> nn.Module:
    return _rebuilt(plain_class.__new__(plain_class), *rest)


def _rebuilt(
    plain: nn.Module,
    options: Options,
    gains: dict[str, torch.Tensor],
    penalty_scale: float = 1.0,
    posteriors: dict[str, Any] | None = None,
) -> nn.Module:
    model = convert_copy(plain, options)
    conversion = conversion_of(model)
    conversion.gains, conversion.penalty_scale = Gains.from_tensors(gains), penalty_scale
    conversion.posteriors = dict(posteriors or {})
    return model


def conversion_of(model: Any) -> Conversion:
    """The conversion that a converted model carries.

    Raises:
        ConversionError: the model is not converted.
    """
    found = model.__dict__.get("_rvconvert") if isinstance(model, nn.Module) else None
    if not isinstance(found, Conversion):
        raise ConversionError(f"a model that rvconvert.convert returned is needed, not a plain {type(model).__name__}")
    return found


def is_converted(model: nn.Module) -> bool:
    """True for a model that ``convert`` returned."""
    return isinstance(model.__dict__.get("_rvconvert"), Conversion)


def convert_copy(model: nn.Module, options: Options) -> nn.Module:
    """Give a model of our own the generated class and the conversion that go with ``options``."""
    own = {}
    for name in options.methods:  # what sits on the instance would hide the converted method
        value = model.__dict__.get(name)
        if value is None:
            continue
        if not isinstance(value, types.MethodType) or value.__self__ is not model:
            raise ConversionError(
                f"{type(model).__name__}.{name} was replaced on this instance by {value!r}, which a copy cannot follow; convert "
                f"before it is wrapped, or take it away first: del model.{name}"
            )
        own[name] = value.__func__
        del model.__dict__[name]
    model.__dict__["_rvconvert"] = Conversion(options, type(model), own)
    model.__class__ = _generated_class(type(model), options.methods)
    return model


def plain_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a converted model as its original class, sharing nothing (but what ``memo`` holds)."""
    conversion = conversion_of(model)
    made = conversion.plain_class.__new__(conversion.plain_class)
    memo = {} if memo is None else memo
    memo[id(model)] = made
    memo[id(conversion)] = None
    for name in conversion.options.methods:  # which wrappers on the instance close over
        memo[id(getattr(type(model), name))] = getattr(conversion.plain_class, name)
    state = {key: value for key, value in model.__dict__.items() if key != "_rvconvert"}
    copied_state(model, state, made, memo)
    for name, function in conversion.own.items():
        made.__dict__[name] = types.MethodType(function, made)
    return made


def reconverted(model: nn.Module, options: Options) -> nn.Module:
    """A copy of a converted model under other options, with the gains that it has."""
    made = convert_copy(plain_copy(model), options)
    conversion_of(made).gains = Gains.from_tensors(conversion_of(model).gains.to_tensors())
    return made


_NOT_INHERITED = ("__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__")


_CLASSES: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Any, type]] = weakref.WeakKeyDictionary()


def _generated_class(cls: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` whose ``methods`` run converted; the same one for all models that have these, as an ensemble's."""
    made = _CLASSES.setdefault(cls, weakref.WeakValueDictionary())
    key = tuple((name, id(getattr(cls, name))) for name in methods)  # a class may be given another function
    found = made.get(key)
    if found is None:
        found = made[key] = _new_class(cls, methods)
    return found


def _new_class(cls: type[nn.Module], methods: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` whose ``methods`` run converted, and plainly where the model's own code calls them."""

    def converted(name: str) -> Any:
        original = getattr(cls, name)

        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            conversion = self.__dict__.get("_rvconvert")
            if conversion is None:  # of a plain copy whose wrapper calls it
                return (original if isinstance(self, made) else getattr(type(self), name))(self, *args, **kwargs)
            if intercept.runs_plainly():
                return conversion.method(name, self)(*args, **kwargs)
            run = conversion.run if _COMPILES or "torch._dynamo" not in sys.modules else torch.compiler.disable(conversion.run)
            return run(name, self, args, kwargs)

        method.__name__, method.__qualname__ = name, f"{cls.__qualname__}.{name}"
        method.__doc__ = original.__doc__
        method.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return method

    def call(of: type, *args: Any, **kwargs: Any) -> Any:
        """An instance of the plain class, which ``type(model)(...)`` makes."""
        if of is not made:
            return type(cls).__call__(of, *args, **kwargs)
        warnings.warn(
            f"type(model)(...) of a converted model makes a plain {cls.__name__}: convert it, or use copy.deepcopy", stacklevel=2
        )
        return cls(*args, **kwargs)

    # The plain class stands first, or an instance could not change from a class such as C(ABC, nn.Module) to this one.
    namespace = {name: value for name, value in vars(ConvertedModel).items() if name not in _NOT_INHERITED}
    namespace |= {name: converted(name) for name in methods}
    namespace |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made: type[nn.Module] = type("Converted", (type(cls),), {"__call__": call})(cls.__name__, (cls, ConvertedModel), namespace)
    return made
