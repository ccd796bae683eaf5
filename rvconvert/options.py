"""Every option of a conversion, declared once: its default, its check, its help, its form in a file.

``convert``, the command line and files read the fields of ``Options``; an option is added here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from typing import Any

import torch

from rvconvert.core.mode import MODES
from rvconvert.core.random_variable import Settings
from rvconvert.core.registry import REGISTRY, Registry
from rvconvert.errors import ConversionError

__all__ = ["Options", "described"]

Check = Callable[[Any], "str | None"]  # says what the value should be; None where it is


def _option(default: Any, check: Check, help: str, *, mode: str | None = None, in_files: bool = True) -> Any:
    """A field of ``Options``. ``mode``: the covariance mode that the option belongs to, if to one alone."""
    return dataclasses.field(default=default, metadata={"check": check, "help": help, "mode": mode, "in_files": in_files})


def _one_of(choices: Collection[str]) -> Check:
    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and value in choices else f"one of {', '.join(map(repr, choices))}"

    check.choices = choices  # type: ignore[attr-defined]
    return check


def _flag(value: Any) -> str | None:
    return None if type(value) is bool else "True or False"


def _names(value: Any) -> str | None:
    fits = isinstance(value, tuple) and all(isinstance(each, str) and each for each in value)
    return None if fits else "a name or a sequence of names"


def _some_names(value: Any) -> str | None:
    return None if _names(value) is None and value else "a name or a sequence of at least one"


def _weight(value: Any) -> str | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return None if fits else "a finite number, 0 or more"


def _count(value: Any) -> str | None:
    return None if type(value) is int and value >= 1 else "a whole number, 1 or more"


def _steps(value: Any) -> str | None:
    return None if type(value) is int and value >= 0 else "a whole number of steps, 0 or more"


def _count_or_none(value: Any) -> str | None:
    return None if value is None else _count(value) and "None or a whole number, 1 or more"


def _seed(value: Any) -> str | None:
    return None if value is None or (type(value) is int and value >= 0) else "None or a whole number, 0 or more"


def _floating(value: Any) -> str | None:
    fits = value is None or (isinstance(value, torch.dtype) and value.is_floating_point)
    return None if fits else "None or a floating-point torch.dtype"


def _registry(value: Any) -> str | None:
    return None if value is None or isinstance(value, Registry) else "a registry: rvconvert.REGISTRY.overlay()"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is converted. The options and the original model are all that a copy or a file needs.

    Every field is an argument of ``convert``; its help says what it does. A value that does not fit, or that belongs to
    another covariance mode, is refused by name.

    Raises:
        ConversionError: an option has a wrong value.
    """

    methods: tuple[str, ...] = _option(("forward",), _some_names, "methods to convert")
    random_inputs: tuple[str, ...] = _option((), _names, "arguments given as random variables: a bare decoder's latent")
    latent: tuple[str, ...] = _option(
        (), _names, "the draws that are latents, by 'file.py:line' or name in the plan; default: chosen by what they do"
    )
    output: str = _option("mean", _one_of(("mean", "distribution")), "what the model returns for a random output")
    penalty: float = _option(50.0, _weight, "weight of L_c (paper eq. 14, lambda)")
    penalty_kind: str = _option("squared", _one_of(("squared", "expected")), "L_c of squared variances, or of variances")
    attach: bool = _option(True, _flag, "let L_c join the loss at backward")
    covariance: str = _option("independent", _one_of(MODES), "how covariance is carried")
    rank: int | None = _option(None, _count_or_none, "pairs of nodes in low-rank mode", mode="lowrank")
    pairs: int = _option(1, _count, "antithetic pairs in sampled mode", mode="sampled")
    recalibrate: int = _option(20, _steps, "training steps between renewed gains; 0: never by themselves", mode="calibrated")
    seed: int | None = _option(None, _seed, "fixes the draws of the sampled and low-rank modes")
    strict: bool = _option(False, _flag, "refuse operations without a rule of their own")
    variance_dtype: torch.dtype | None = _option(None, _floating, "dtype of the variance's matrix work")
    rules: Registry | None = _option(None, _registry, "a rule table for this model alone", in_files=False)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("methods", "random_inputs", "latent"):
                value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else value
                object.__setattr__(self, field.name, value)
            wanted = field.metadata["check"](value)
            if wanted is not None:
                raise ConversionError(f"{field.name}={value!r} should be {wanted}")
            mode = field.metadata["mode"]
            if mode is not None and value != field.default and mode != self.covariance:
                raise ConversionError(
                    f"{field.name}={value!r} belongs to covariance={mode!r}, and this is covariance={self.covariance!r}; "
                    f"leave {field.name} out, or pass covariance={mode!r}"
                )

    @classmethod
    def of(cls, options: Options | None, changes: Mapping[str, Any]) -> Options:
        """``options`` (default: all defaults) with ``changes``; an unknown name is refused with the likeliest one."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in changes:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
                raise ConversionError(f"there is no option {name!r}; {hint}")
        if options is not None and not isinstance(options, cls):
            raise ConversionError(f"options should be rvconvert.Options(...), not {type(options).__name__}")
        return dataclasses.replace(options or cls(), **{n: v for n, v in changes.items() if v is not None or n not in _NAMES})

    def in_mode(self, covariance: str, **changes: Any) -> Options:
        """The same for another covariance mode, without what belongs to this one alone."""
        alone = {f.name: f.default for f in dataclasses.fields(self) if f.metadata["mode"] not in (None, covariance)}
        return dataclasses.replace(self, covariance=covariance, **{**alone, **changes})

    @cached_property
    def settings(self) -> Settings:
        """What of the options travels with a random variable."""
        return Settings(
            registry=self.rules or REGISTRY,
            covariance=self.covariance,
            rank=self.rank,
            pairs=self.pairs,
            seed=self.seed,
            strict=self.strict,
            variance_dtype=self.variance_dtype,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data for JSON: dtypes as strings, tuples as lists, the rule table left out."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["in_files"]}
        return {name: _plain(value) for name, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Options:
        """Options from plain data.

        Raises:
            ConversionError: a name is unknown or a value does not fit.
        """
        made = dict(data)
        for name in _NAMES:
            if not isinstance(made.get(name, []), (list, tuple)):
                raise ConversionError(f"{name}={made[name]!r} should be a list of names")
        dtype = made.get("variance_dtype")
        if dtype is not None:
            made["variance_dtype"] = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        return cls.of(None, made)


_NAMES = ("methods", "random_inputs", "latent")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple) else value


def described(options: Options) -> str:
    """The options in a line, those that are not the default: ``RV, independent, L_c 50``."""
    parts = ["RV", options.covariance, f"L_c {options.penalty:g}"]
    shown = ("covariance", "penalty", "rules")
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in shown and value != field.default:
            parts.append(f"{field.name}={_plain(value)!r}")
    return ", ".join(parts)
