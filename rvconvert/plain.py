"""Back to plain networks: the converted model as its original class, and weights from one model to another."""

from __future__ import annotations

import difflib
import functools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rvconvert.capture.frames import user_frame, where
from rvconvert.converted import conversion_of, is_converted, plain_copy
from rvconvert.copies import redirected
from rvconvert.errors import ConversionError, TransferError
from rvconvert.rules.draws import DRAWS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["to_plain", "transfer_weights"]


def to_plain(rv_model: nn.Module, latent: str = "sample") -> nn.Module:
    """The converted model as a plain one: the original class, the trained weights, its own code.

    Args:
        rv_model: what ``convert`` returned.
        latent: ``"sample"`` leaves the model's own sampling; ``"mean"`` makes its converted methods
            deterministic, every Gaussian draw at its mean and, of a model that was called or converted with
            ``example_inputs``, every latent of another law, for fast inference (paper 5.6).

    Raises:
        ConversionError: the model was not converted, or ``latent`` is neither of the two.
    """
    if not is_converted(rv_model):
        raise ConversionError(f"to_plain takes a model that rvconvert.convert returned, not a plain {type(rv_model).__name__}")
    if latent not in ("sample", "mean"):
        raise ConversionError(f"latent={latent!r} is not one of 'sample', 'mean'")
    plain = plain_copy(rv_model)
    conversion = conversion_of(rv_model)
    methods = conversion.options.methods
    conversion.advice.of_no_call(rv_model, conversion.last_penalty)
    if latent == "mean":
        make_deterministic(plain, methods, frozenset(conversion.latents))
    return plain


class _MeanOfNoise(TorchFunctionMode):
    """Every Gaussian draw and every latent at its mean; other functions as they are."""

    def __init__(self, latents: frozenset[str]) -> None:
        super().__init__()
        self.latents = latents

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        draw = DRAWS.get(func)
        if draw is None or not (draw.is_gaussian or (self.latents and where(user_frame())[0] in self.latents)):
            return func(*args, **kwargs)
        return draw.at_mean(func, args, kwargs)


def make_deterministic(model: nn.Module, methods: tuple[str, ...], latents: frozenset[str] = frozenset()) -> None:
    """Give ``model`` a subclass of its class whose ``methods`` take every Gaussian draw at its mean.

    ``latents``: the places, ``file:line``, of draws from other laws that are latents too.
    """
    cls = type(model)

    def deterministic(name: str) -> Any:
        original = getattr(cls, name)

        @torch.compiler.disable  # which would trace past the mode, and draw
        @functools.wraps(original)
        def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _MeanOfNoise(latents):
                return original(self, *args, **kwargs)

        return method

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return (_rebuild_deterministic, (cls, methods, dict(self.__dict__), latents))

    namespace: dict[str, Any] = {name: deterministic(name) for name in methods}
    namespace |= {"__reduce_ex__": reduce, "__module__": cls.__module__, "__doc__": cls.__doc__}
    model.__class__ = type(cls.__name__, (cls,), namespace)
    redirected(model, {id(getattr(cls, name)): namespace[name] for name in methods})  # wrappers on the instance


def _rebuild_deterministic(
    cls: type[nn.Module], methods: tuple[str, ...], state: dict[str, Any], latents: frozenset[str] = frozenset()
) -> nn.Module:
    model = cls.__new__(cls)
    model.__dict__.update(state)
    make_deterministic(model, methods, latents)
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
    shapes = [k for k in want if k in have and _shape(want[k]) != _shape(have[k])]
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
        fits = [k for k in free if _shape(have[k]) == _shape(want[key])]
        close = difflib.get_close_matches(key, fits, n=1, cutoff=0.5)
        if close:
            free.discard(close[0])
            groups[_module(key)].append(f"{key} is missing; likeliest: rename {close[0]!r} to {key!r}")
        else:
            groups[_module(key)].append(f"{key} {_shape(want[key])} is missing in the source")
    for key in sorted(free):
        groups[_module(key)].append(f"{key} {_shape(have[key])} has no place in {target}")
    for key in shapes:
        groups[_module(key)].append(f"{key} is {_shape(have[key])} in the source and {_shape(want[key])} in {target}")
    lines = [f"weights do not fit {target}: {len(missing)} missing, {len(unexpected)} unexpected, {len(shapes)} of another shape"]
    for module, entries in sorted(groups.items()):
        lines.append(f"  in {module or 'the model itself'}:")
        lines += [f"    {entry}" for entry in entries]
    return "\n".join(lines)


def _shape(entry: Any) -> Any:
    """Of a tensor; of an entry that is none, an extra state, its type's name."""
    return tuple(entry.shape) if isinstance(entry, torch.Tensor) else type(entry).__name__


def _module(key: str) -> str:
    return key.rpartition(".")[0]
