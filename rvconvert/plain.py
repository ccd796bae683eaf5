"""Back to plain networks: the converted model as its original class, and weights from one model to another."""

from __future__ import annotations

import copy
import difflib
import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rvconvert.converted import Conversion
from rvconvert.core.tree import flatten
from rvconvert.errors import ConversionError, TransferError
from rvconvert.rules.noise import GAUSSIAN_SOURCES

__all__ = ["is_converted", "to_plain", "transfer_weights"]


def is_converted(model: nn.Module) -> bool:
    """True for a model that ``convert`` returned."""
    return isinstance(model.__dict__.get("_rvconvert"), Conversion)


def plain_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a converted model as its original class, sharing nothing (but what ``memo`` holds)."""
    conversion: Conversion = model.__dict__["_rvconvert"]
    made = conversion.plain_class.__new__(conversion.plain_class)
    memo = {} if memo is None else memo
    memo[id(model)] = made
    memo[id(conversion)] = None
    state = {key: value for key, value in model.__dict__.items() if key != "_rvconvert"}
    made.__dict__.update(copy.deepcopy(state, detached(model, memo)))
    return made


def detached(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """``memo`` for a deepcopy of ``model``, with the results of past calls that it keeps taken off their graph."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_modules"):
                for tensor in flatten(value)[0]:
                    if isinstance(tensor, torch.Tensor) and not tensor.is_leaf:
                        memo[id(tensor)] = tensor.detach().clone()
    return memo


def to_plain(rv_model: nn.Module, latent: str = "sample") -> nn.Module:
    """The converted model as a plain one: the original class, the trained weights, its own code.

    Args:
        rv_model: what ``convert`` returned.
        latent: ``"sample"`` leaves the model's own sampling; ``"mean"`` makes its converted methods
            deterministic, every Gaussian draw at its mean, for fast inference (paper 5.6).

    Raises:
        ConversionError: the model was not converted, or ``latent`` is neither of the two.
    """
    if not is_converted(rv_model):
        raise ConversionError(f"to_plain takes a model that rvconvert.convert returned, not a plain {type(rv_model).__name__}")
    if latent not in ("sample", "mean"):
        raise ConversionError(f"latent={latent!r} is not one of 'sample', 'mean'")
    plain = plain_copy(rv_model)
    if latent == "mean":
        conversion: Conversion = rv_model.__dict__["_rvconvert"]
        make_deterministic(plain, conversion.options.methods)
    return plain


class _MeanOfNoise(TorchFunctionMode):
    """Every Gaussian draw at its mean; other functions as they are."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in GAUSSIAN_SOURCES:
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        if func is torch.randn:
            return torch.zeros(*args, **kwargs)
        if func is torch.randn_like:
            return torch.zeros_like(*args, **kwargs)
        if func is torch.Tensor.normal_:
            mean = args[1] if len(args) > 1 else kwargs.get("mean", 0.0)
            return args[0].fill_(mean)
        mean = args[0] if args else kwargs.get("mean", 0.0)
        std = args[1] if len(args) > 1 else kwargs.get("std", 1.0)
        size = args[2] if len(args) > 2 else kwargs.get("size")
        if size is not None:
            return torch.full(size, float(mean))
        return mean + torch.zeros_like(std) if isinstance(std, torch.Tensor) else mean.clone()


def make_deterministic(model: nn.Module, methods: tuple[str, ...]) -> None:
    """Give ``model`` a subclass of its class whose ``methods`` take every Gaussian draw at its mean."""
    cls = type(model)

    def deterministic(name: str) -> Any:
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _MeanOfNoise():
                return original(self, *args, **kwargs)

        return method

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return (_rebuild_deterministic, (cls, methods, dict(self.__dict__)))

    namespace: dict[str, Any] = {name: deterministic(name) for name in methods}
    namespace |= {"__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    model.__class__ = type(cls.__name__, (cls,), namespace)


def _rebuild_deterministic(cls: type[nn.Module], methods: tuple[str, ...], state: dict[str, Any]) -> nn.Module:
    model = cls.__new__(cls)
    model.__dict__.update(state)
    make_deterministic(model, methods)
    return model


def transfer_weights(source: nn.Module | Mapping[str, torch.Tensor], target: nn.Module) -> nn.Module:
    """Copy all weights and buffers of ``source``, a model or a state_dict, into ``target``; strict.

    Raises:
        TransferError: keys or shapes differ; every difference is listed, by module, with the likeliest
            rename. ``target`` is then unchanged.
    """
    have = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    want = target.state_dict()
    missing = [k for k in want if k not in have]
    unexpected = [k for k in have if k not in want]
    shapes = [k for k in want if k in have and want[k].shape != have[k].shape]
    if missing or unexpected or shapes:
        raise TransferError(_differences(have, want, missing, unexpected, shapes, type(target).__name__))
    target.load_state_dict(have, strict=True)
    return target


def _differences(
    have: Mapping[str, torch.Tensor],
    want: Mapping[str, torch.Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
    target: str,
) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    free = set(unexpected)
    for key in missing:
        fits = [k for k in free if have[k].shape == want[key].shape]
        close = difflib.get_close_matches(key, fits, n=1, cutoff=0.5)
        if close:
            free.discard(close[0])
            groups[_module(key)].append(f"{key} is missing; likeliest: rename {close[0]!r} to {key!r}")
        else:
            groups[_module(key)].append(f"{key} {tuple(want[key].shape)} is missing in the source")
    for key in sorted(free):
        groups[_module(key)].append(f"{key} {tuple(have[key].shape)} has no place in {target}")
    for key in shapes:
        groups[_module(key)].append(f"{key} is {tuple(have[key].shape)} in the source and {tuple(want[key].shape)} in {target}")
    lines = [f"weights do not fit {target}: {len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"]
    for module, entries in sorted(groups.items()):
        lines.append(f"  in {module or 'the model itself'}:")
        lines += [f"    {entry}" for entry in entries]
    return "\n".join(lines)


def _module(key: str) -> str:
    return key.rpartition(".")[0]
