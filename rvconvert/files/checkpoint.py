"""Files: a converted model's weights with the recipe to rebuild it, and everybody else's checkpoints.

A file is data. Reading one runs no code from it: tensors come from safetensors or from
``torch.load(weights_only=True)``, the recipe is JSON, and its class is imported only when a person asks.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from rvconvert._convert import convert
from rvconvert.converted import conversion_of, is_converted
from rvconvert.copies import copied
from rvconvert.covariance.calibrated import Gains
from rvconvert.errors import CheckpointError, ConversionError, TransferError
from rvconvert.files.recipe import Recipe, construct, import_class, imported_class
from rvconvert.plain import to_plain, transfer_weights

if TYPE_CHECKING:
    import io

    from rvconvert.core.registry import Registry

__all__ = [
    "Checkpoint",
    "build",
    "check_destination",
    "constructor_arguments",
    "fit_keys",
    "load",
    "load_weights",
    "read",
    "save",
    "write",
    "write_atomically",
]

TORCH_SUFFIXES = (".pt", ".pth")
READ_ONLY_SUFFIXES = (".ckpt", ".bin", ".tar")  # what Lightning, the Hugging Face hub and torch's tutorials call the same format
SAFETENSORS = ".safetensors"
RECIPE_KEY = "rvconvert"
GAINS_KEY = "rvconvert.gains"  # of a model in calibrated mode; in safetensors the prefix of their names
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
# Plain data that training scripts put beside the weights; building them runs no code.
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")},
]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: where it was read from.
        state: the state_dict, on the CPU, keys as in the file.
        recipe: of a converted model; None in a plain checkpoint.
        hyper_parameters: what Lightning saved of the constructor's arguments.
        gains: of a converted model in calibrated mode, by name.
        beside: the state_dicts that the file holds beside this one, by key, such as averaged weights.
        parts: of a file that holds several of which none is known to be the model's, their numbers of entries by key. They
            may be those of its parts, ``{"encoder": ..., "decoder": ...}``: ``state`` has them all, each below its key.
    """

    path: Path
    state: dict[str, Any]
    recipe: Recipe | None = None
    hyper_parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    gains: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()
    parts: dict[str, int] = dataclasses.field(default_factory=dict)


def save(
    rv_model: nn.Module,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    model: str | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Path:
    """Write a converted model: its state_dict and the recipe from which ``load`` rebuilds it. Atomic.

    Args:
        rv_model: what ``convert`` returned.
        path: ends in ``.pt``, ``.pth`` or ``.safetensors``, which decides the format.
        force: replace a file that is there.
        model: how to name the class, ``"package.module:Class"`` or ``"path/file.py:Class"``; default: where it
            was defined.
        kwargs: the arguments that the class was constructed with, JSON data. Without them ``load`` needs
            ``model=`` unless the class can be built without arguments.

    Returns:
        The path.

    Raises:
        CheckpointError: the file exists, its folder does not, or the name ends in something else.
        ConversionError: the model is a plain one.
    """
    if not is_converted(rv_model):
        raise ConversionError(
            f"save takes a model that rvconvert.convert returned; for a plain {type(rv_model).__name__} use "
            "torch.save(model.state_dict(), path)"
        )
    recipe = Recipe.of(rv_model, model, kwargs)
    gains = conversion_of(rv_model).gains.to_tensors()
    return write(rv_model.state_dict(), path, recipe=recipe, gains=gains, force=force)


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | type[nn.Module] | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    rules: Registry | None = None,
    trust_recipe: bool = False,
    allow_pickle: bool = False,
) -> nn.Module:
    """Rebuild the converted model that ``save`` wrote, on the CPU.

    The file names its class but cannot make this process import it, for importing runs code. Without
    ``model`` the class must be imported already (which it is in the script that defines or uses it);
    ``trust_recipe=True`` imports what the file names.

    Args:
        path: a file that ``save`` or ``rvconvert convert`` wrote.
        model: the plain model to build on: an instance (it is copied, not changed), its class, or
            ``"package.module:Class"``, which is imported.
        kwargs: arguments of the constructor; default: those in the recipe.
        rules: the registry that it was converted with, if that was not the library's own.
        trust_recipe: import the class that the file names.
        allow_pickle: unpickle a file that is more than tensors and plain data. This runs code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, foreign, or needs one of the arguments above.
        TransferError: the weights do not fit the model.
    """
    return build(
        read(path, allow_pickle=allow_pickle),
        model=model,
        kwargs=kwargs,
        rules=rules,
        trust_recipe=trust_recipe,
    )


def build(
    checkpoint: Checkpoint,
    *,
    model: nn.Module | type[nn.Module] | str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    rules: Registry | None = None,
    trust_recipe: bool = False,
) -> nn.Module:
    """The converted model of a file that has been read; see ``load``."""
    path, recipe = checkpoint.path, checkpoint.recipe
    if recipe is None:
        raise CheckpointError(
            f"{path} holds plain weights, no converted model; load them into the plain model and convert that, or: "
            f"rvconvert convert MODEL {path} OUT"
        )
    if recipe.custom_rules and rules is None:
        raise CheckpointError(f"{path} was converted with rules of its own, which a file cannot hold; pass them again: rules=...")
    plain = _plain_model(path, recipe, model, kwargs, trust_recipe)
    _match_dtypes(plain, checkpoint.state)
    made = convert(plain, recipe.conversion_options(rules), inplace=True)
    try:
        transfer_weights(checkpoint.state, made)
    except TransferError as error:
        guessed = not isinstance(model, nn.Module) and kwargs is None and recipe.kwargs is None
        hint = "\nThe file does not say how the model was constructed: give its kwargs" if guessed else ""
        raise TransferError(f"{path}: {error}{hint}") from None
    conversion = conversion_of(made)
    conversion.gains, conversion.posteriors = Gains.from_tensors(checkpoint.gains), recipe.known_posteriors()
    return made


def _plain_model(path: Path, recipe: Recipe, model: Any, kwargs: Mapping[str, Any] | None, trust_recipe: bool) -> nn.Module:
    """A plain instance of the model's class that nobody else holds."""
    if isinstance(model, nn.Module):
        # convert would copy too; made here, so that dtypes can be set before conversion
        return to_plain(model) if is_converted(model) else copied(model, {})
    if isinstance(model, str):
        cls = import_class(model)
    elif model is not None:
        cls = model
    else:
        found = import_class(recipe.model) if trust_recipe else imported_class(recipe.model)
        if found is None:
            raise CheckpointError(
                f"{path} holds a {recipe.model}, which this process has not imported, and a file may not decide what to "
                f"import: import it first, or pass model={recipe.model!r} (command line: --model {recipe.model}), or "
                "trust_recipe=True (--trust-recipe)"
            )
        cls = found
    if kwargs is None:
        kwargs = recipe.kwargs
    try:
        return construct(cls, kwargs)
    except ConversionError as error:
        if kwargs is None:
            raise CheckpointError(f"{path} does not say how its {cls.__name__} was constructed. {error}") from error
        raise


def _match_dtypes(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give the model the dtypes of the file, so that no bit is lost on the way."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = state.get(name)
        if isinstance(value, torch.Tensor) and value.dtype != tensor.dtype and value.is_floating_point():
            tensor.data = tensor.data.to(value.dtype)


def fit_keys(checkpoint: Checkpoint, model: nn.Module, prefix: str | None = None) -> tuple[dict[str, Any], str]:
    """The state_dict with its keys as ``model`` has them, and the prefix that was taken off.

    ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.`` (Lightning) or any other prefix is
    taken off where the model's own keys, and all of them, lie below it. What lies elsewhere is left out.

    Raises:
        CheckpointError: more than one part of the file fits; ``prefix`` chooses. Or the file holds several state_dicts that
            are not those of the model's parts.
    """
    state, wanted = checkpoint.state, list(model.state_dict())
    if checkpoint.parts and prefix is None:
        whole = [part for part in map(_part, checkpoint.parts) if all(f"{part}.{k}" in state for k in wanted)]
        inside = [p for p in ("", *(f"{wrapper}." for wrapper in WRAPPERS)) if wanted and all(p + k in state for k in wanted)]
        if len(inside) + len(whole) == 1 and inside:
            return {k: state[inside[0] + k] for k in wanted}, ""
        one = next((key for key in checkpoint.parts if _part(key) in whole), next(iter(checkpoint.parts)))
        raise CheckpointError(
            f"{checkpoint.path} holds several state_dicts: {_listed(checkpoint.parts)}; choose one: --key {one} (Python: key=...)"
        )
    if prefix is not None:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, prefix
    if not wanted or set(state) == set(wanted):
        return state, ""
    fitting = sorted(k.removesuffix(wanted[0]) for k in state if k.endswith(wanted[0]) and k != wanted[0])
    fitting = [p for p in fitting if p.endswith(".") and all(p + k in state for k in wanted)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{checkpoint.path} holds more than one set of weights that fit: {', '.join(map(repr, fitting))}; "
            f"choose one: --prefix {fitting[0]}"
        )
    if fitting:
        below = {k.removeprefix(fitting[0]): v for k, v in state.items() if k.startswith(fitting[0])}
        return below, fitting[0]
    for common in (
        "module.",
        "_orig_mod.",
        "model.",
    ):  # nothing fits: let the differences be shown without it
        if state and all(k.startswith(common) for k in state):
            return {k.removeprefix(common): v for k, v in state.items()}, common
    return state, ""


def load_weights(
    model: nn.Module, source: Checkpoint | str | os.PathLike[str], prefix: str | None = None, **reading: Any
) -> list[str]:
    """Load a plain checkpoint into a plain model, whatever it was wrapped in; strict.

    Args:
        model: the plain model. source: a file, or one that has been read.
        prefix: which part of the file to take; default: the one that fits, see ``fit_keys``.
        reading: ``key`` and ``allow_pickle``, as of ``read``.

    Returns:
        What a person should know: the prefix that was taken off, weights that are NaN or infinite, others in the file.

    Raises:
        CheckpointError, TransferError: see ``read``, ``fit_keys`` and ``transfer_weights``.
    """
    if not isinstance(source, Checkpoint):
        source = read(source, **reading)
    state, taken = fit_keys(source, model, prefix)
    try:
        transfer_weights(state, model)
    except TransferError as error:
        raise TransferError(f"{source.path}: {error}") from None
    notes = []
    if source.beside:
        notes.append(f"the file holds other weights of the same names, --key {' or '.join(source.beside)}")
    if taken:
        left = len(source.state) - len(state)
        notes.append(f"took the prefix {taken!r} off the keys" + (f", left out {left} entries without it" if left else ""))
    elif source.parts:
        left = len(source.state) - len(state)
        notes.append(f"put together of {_listed(source.parts)}" + (f", left out {left} entries" if left else ""))
    broken = [k for k, v in state.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and not v.isfinite().all()]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        notes.append(f"NaN or infinite: {', '.join(broken[:3])}{more}; what is computed from them will be too")
    return notes


def constructor_arguments(source: Checkpoint, cls: type[nn.Module]) -> dict[str, Any]:
    """Lightning's hyper-parameters, those of them that the constructor of ``cls`` takes."""
    parameters = inspect.signature(cls).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {k: v for k, v in source.hyper_parameters.items() if anything or k in parameters}


# --- reading ------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], *, allow_pickle: bool = False, key: str | None = None) -> Checkpoint:
    """Read a converted model's file or a plain checkpoint, running no code from it.

    Plain checkpoints are a state_dict, or one under ``state_dict``, ``model_state_dict``, ``model`` and the
    like, as training scripts and Lightning write them.

    Args:
        path: the file.
        allow_pickle: unpickle what is more than tensors and plain data. This runs code from the file.
        key: where in the file the state_dict lies, ``"ema.shadow"``, if there are several.

    Raises:
        CheckpointError: missing, truncated, foreign, or (without ``allow_pickle``) more than plain data; or there is
            no state_dict at ``key``.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; give a checkpoint file in it")
        with path.open("rb") as file:
            start = file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    suffix = path.suffix.lower()
    if suffix not in (*TORCH_SUFFIXES, *READ_ONLY_SUFFIXES, SAFETENSORS):
        known = ".pt, .pth, .ckpt, .bin, .tar or .safetensors"
        raise CheckpointError(f"{path}: a checkpoint ends in {known}, not {suffix or 'nothing'!r}")
    if not start:
        raise CheckpointError(f"{path} is empty; it was cut off when it was written")
    is_safetensors = len(start) > 8 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32
    if suffix == SAFETENSORS:
        if not is_safetensors:
            raise CheckpointError(f"{path} is not a safetensors file{_looks_like(start)}")
        if key is not None:
            raise CheckpointError(f"{path}: a safetensors file holds one set of tensors, so key={key!r} has no place in it")
        return _read_safetensors(path)
    if is_safetensors:
        raise CheckpointError(f"{path} is a safetensors file; rename it to {path.with_suffix(SAFETENSORS).name}")
    return _interpret(path, _read_torch(path, start, allow_pickle), key)


def _looks_like(start: bytes) -> str:
    if start.startswith(b"PK"):
        return "; it looks like a torch or zip file: rename it to .pt"
    if start.lstrip()[:1] in (b"{", b"["):
        return "; it looks like JSON"
    if start.startswith(b"version https://"):
        return "; it is a Git LFS pointer: fetch the file itself with git lfs pull"
    if start.lstrip()[:1] == b"<":
        return "; it looks like a web page: download the file itself"
    return "" if start.startswith(b"\x80") else "; it was cut off or is of another kind"


def _read_safetensors(path: Path) -> Checkpoint:
    safetensors = _safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a handle, not a dict
            prefix = f"{GAINS_KEY}."
            gains = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    except Exception as error:  # noqa: BLE001 (a damaged file may fail in any way)
        raise CheckpointError(f"{path} is damaged or cut off ({_first_line(error)}); copy or download it again") from None
    return Checkpoint(path, state, _recipe(path, metadata.get(RECIPE_KEY)), gains=gains)


def _read_torch(path: Path, start: bytes, allow_pickle: bool) -> Any:
    if start.startswith(b"PK"):
        _check_zip(path)
    elif not start.startswith(b"\x80") and not allow_pickle:
        raise CheckpointError(f"{path} was not written by torch.save{_looks_like(start)}")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # noqa: BLE001 - a foreign file may break the unpickler in any way
        raise CheckpointError(_why_unreadable(path, error, allow_pickle)) from None


def _check_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(f"{path} is damaged or cut off; copy or download it again") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path} is a TorchScript archive; save the weights alone: torch.save(model.state_dict(), path)")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip file that torch.save did not write ({', '.join(names[:3]) or 'empty'})")


def _why_unreadable(path: Path, error: Exception, allow_pickle: bool) -> str:
    text = str(error)
    for marker in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if marker in text:
            name = text.split(marker)[1].split()[0].rstrip(".,")
            return (
                f"{path} holds a {name}, more than tensors and plain data, and reading it would run code from the file; "
                "save the weights alone, torch.save(model.state_dict(), path), or, if you trust its author: "
                "--allow-pickle (Python: allow_pickle=True)"
            )
    if "weights_only" in text.lower() and not allow_pickle and not isinstance(error, (EOFError, OSError)):
        return f"{path} holds more than tensors and plain data, or is no torch file; it was not read ({_cause(text)})"
    if isinstance(error, (AttributeError, ImportError)):  # a whole model, pickled as ``__main__.VAE`` by python train.py
        return (
            f"{path} holds objects of code that cannot be imported here ({_first_line(error)}); where that runs, save the "
            "weights alone: torch.save(model.state_dict(), path)"
        )
    return f"{path} is damaged or cut off ({_first_line(error)}); copy or download it again"


def _cause(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = [line for line in lines if line.startswith(("Unsupported", "Trying", "Can only", "Unexpected", "Only"))]
    return (found or ["it is not in the format that torch.save writes"])[0][:150]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def _interpret(path: Path, content: Any, key: str | None = None) -> Checkpoint:
    if isinstance(content, nn.Module):  # only with allow_pickle
        return Checkpoint(path, dict(content.state_dict()))
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state_dict, a mapping of names to tensors")
    if isinstance(content.get(RECIPE_KEY), str) and _is_state_dict(content.get("state_dict")):
        held: Any = content.get(GAINS_KEY)
        gains = dict(held) if _is_state_dict(held) else {}
        return Checkpoint(path, dict(content["state_dict"]), _recipe(path, content[RECIPE_KEY]), gains=gains)
    given = content.get("hyper_parameters")
    hyper_parameters = dict(given) if isinstance(given, Mapping) else {}
    if key is not None:
        return Checkpoint(path, _state_at(path, content, key), None, hyper_parameters)
    if _is_state_dict(content):
        return Checkpoint(path, dict(content))
    for wrapper in WRAPPERS:
        inner: Any = content.get(wrapper)
        if isinstance(inner, nn.Module):
            inner = inner.state_dict()
        if _is_state_dict(inner):
            beside = tuple(
                name for name, each in _state_dicts(content).items() if each is not inner and each.keys() == inner.keys()
            )
            return Checkpoint(path, dict(inner), None, hyper_parameters, beside=beside)
    found = _state_dicts(content)
    if len(found) == 1:
        return Checkpoint(path, dict(next(iter(found.values()))), None, hyper_parameters)
    if found:
        return Checkpoint(path, _joined(path, found), None, hyper_parameters, parts=_entries(found))
    names = ", ".join(map(repr, list(content)[:6])) or "nothing"
    raise CheckpointError(f"{path} holds no state_dict, neither itself nor under {', '.join(WRAPPERS)}; it holds {names}")


def _part(key: str) -> str:
    return key.removesuffix("_state_dict")


def _joined(path: Path, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of several state_dicts, each below the name of its part: ``encoder`` of ``model.encoder_state_dict``."""
    joined: dict[str, Any] = {}
    for key, state in found.items():
        below = {f"{_part(key)}.{k.removeprefix('module.')}": v for k, v in state.items()}
        if both := joined.keys() & below.keys():
            raise CheckpointError(f"{path} holds {min(both)} more than once, {_listed(_entries(found))}: choose one: --key {key}")
        joined |= below
    return joined


def _state_at(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The state_dict at ``key``, whose dots lead from mapping to mapping."""
    found = _state_dicts(content)
    if key in found:
        return dict(found[key])
    there = _listed(_entries(found)) if found else "nothing at all: it holds " + ", ".join(map(repr, list(content)[:6]))
    raise CheckpointError(f"{path} has no state_dict at {key!r}; there is {there}")


def _state_dicts(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Mapping[str, Any]]:
    """Every state_dict in a file, by the way to it; an optimizer's numbers are none, for their keys are no names."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, value in content.items():
        inner = value.state_dict() if isinstance(value, nn.Module) else value
        if _is_state_dict(inner) and isinstance(name, str):
            found[f"{prefix}{name}"] = inner
        elif isinstance(inner, Mapping):
            found |= _state_dicts(inner, f"{prefix}{name}.")
    return found


def _entries(found: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {key: len(state) for key, state in found.items()}


def _listed(entries: Mapping[str, int]) -> str:
    return ", ".join(f"{key} ({count} entries)" for key, count in list(entries.items())[:8])


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value or not all(isinstance(k, str) for k in value):
        return False
    others = [k for k, v in value.items() if not isinstance(v, torch.Tensor) and not k.endswith("_extra_state")]
    return not others and any(isinstance(v, torch.Tensor) for v in value.values())


def _recipe(path: Path, text: Any) -> Recipe | None:
    if text is None:
        return None
    try:
        return Recipe.from_json(text)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _safetensors(path: Path) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise CheckpointError(f"{path}: safetensors is not installed; pip install safetensors, or use a .pt file") from None
    return safetensors


# --- writing ------------------------------------------------------------------------------------------


def write(
    state: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    gains: Mapping[str, torch.Tensor] | None = None,
    force: bool = False,
) -> Path:
    """Write a state_dict, as it is if there is no recipe: then ``load_state_dict`` of the plain class takes it.

    Raises:
        CheckpointError: see ``check_destination``; or the state_dict holds what the format cannot.
    """
    path = check_destination(path, force=force)
    tensors = {key: value.detach().cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    if path.suffix.lower() == SAFETENSORS:
        others = [key for key, value in tensors.items() if not isinstance(value, torch.Tensor)]
        if others:
            raise CheckpointError(f"{path}: safetensors holds tensors only, and {others[0]!r} is none; write a .pt file")
        # clones: the format refuses tensors that share memory, as tied weights do
        tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        tensors |= {f"{GAINS_KEY}.{key}": value for key, value in (gains or {}).items()}
        metadata = {"format": "pt"} | ({RECIPE_KEY: recipe.to_json()} if recipe else {})
        content = _safetensors(path).torch.save(tensors, metadata)
        return write_atomically(path, lambda file: file.write(content), force=force)
    saved = tensors if recipe is None else {RECIPE_KEY: recipe.to_json(), "state_dict": tensors}
    if gains:
        saved[GAINS_KEY] = dict(gains)
    return write_atomically(path, lambda file: torch.save(saved, file), force=force)


def check_destination(path: str | os.PathLike[str], *, force: bool = False, suffixes: tuple[str, ...] | None = None) -> Path:
    """The path, if a file can be written there; asked before long work as well as at the end of it.

    Raises:
        CheckpointError: it exists (and not ``force``), is a folder, its folder does not exist, or the name ends
            in none of ``suffixes``.
    """
    path = Path(path)
    suffixes = suffixes or (*TORCH_SUFFIXES, SAFETENSORS)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; give the name of a file in it")
    if path.suffix.lower() not in suffixes:
        raise CheckpointError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path}: there is no folder {path.parent}; make it first")
    if os.path.lexists(path) and not force:
        raise CheckpointError(f"{path} exists and is not overwritten; use --force (Python: force=True) or another name")
    return path


def write_atomically(path: Path, write_to: Callable[[io.BufferedWriter], Any], *, force: bool = False) -> Path:
    """Write a file whole or not at all: to a temporary file beside it, then renamed into place.

    Raises:
        CheckpointError: it exists (and not ``force``), or the disk refuses.
    """
    with _disk_errors(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write_to(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's files are for the owner alone
            if os.path.lexists(path) and not force:
                raise CheckpointError(f"{path} was written by someone else meanwhile and is not overwritten")
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    return path


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
