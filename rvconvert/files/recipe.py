"""The recipe of a saved RV model: which class, how it was constructed, how it was converted. Plain JSON data."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.converted import conversion_of
from rvconvert.errors import CheckpointError, ConversionError
from rvconvert.options import Options
from rvconvert.program.recorded_graph import Posterior

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rvconvert.core.registry import Registry

__all__ = ["Recipe", "class_spec", "construct", "import_class", "imported_class", "library_version"]

FORMAT = 1
SPEC_HELP = "a model is 'package.module:Class' or 'path/file.py:Class'"


def library_version() -> str:
    """The installed version of rvconvert."""
    try:
        return importlib.metadata.version("rvconvert")
    except importlib.metadata.PackageNotFoundError:
        return "0+source"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to build a converted model again.

    Attributes:
        model: the class, as ``package.module:Class`` or ``path/file.py:Class``.
        kwargs: the arguments its constructor was given; None if they are not known.
        options: the keyword arguments of ``convert``, with dtypes as strings.
        custom_rules: the model was converted with a rule table of its own, which a file cannot hold.
        posteriors: of each method, the layers that placed its latents in training, and how many inputs reached these.
        version: of rvconvert, when the file was written.
    """

    model: str
    kwargs: dict[str, Any] | None
    options: dict[str, Any]
    custom_rules: bool = False
    posteriors: dict[str, tuple[list[str], int]] = dataclasses.field(default_factory=dict)
    version: str = dataclasses.field(default_factory=library_version)

    @classmethod
    def of(cls, rv_model: nn.Module, model: str | None = None, kwargs: dict[str, Any] | None = None) -> Recipe:
        """The recipe of a converted model; ``model`` and ``kwargs`` say what it cannot know by itself."""
        conversion = conversion_of(rv_model)
        options = conversion.options
        spec = model or class_spec(conversion.plain_class)
        posteriors = {name: (sorted(known.layers), known.inputs) for name, known in conversion.posteriors.items()}
        return cls(spec, kwargs, options.to_dict(), options.rules is not None, posteriors)

    def to_json(self) -> str:
        """The recipe as a line of JSON.

        Raises:
            CheckpointError: the constructor's arguments are not JSON data.
        """
        try:
            return json.dumps({"format": FORMAT, **dataclasses.asdict(self)})
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"kwargs={self.kwargs!r} cannot be written as JSON ({error}); leave them out, and give the model at "
                "loading: rvconvert.load(path, model=...)"
            ) from None

    @classmethod
    def from_json(cls, text: Any) -> Recipe:
        """Read a recipe and check it; it is data, and nothing is imported.

        Raises:
            CheckpointError: it is not a recipe, or one of a newer version.
        """
        try:
            data = json.loads(text)
            version, format_number = str(data.pop("version")), data.pop("format")
            if format_number != FORMAT:
                raise CheckpointError(
                    f"the recipe has format {format_number!r} (written by rvconvert {version}), this version reads "
                    f"{FORMAT}: pip install --upgrade rvconvert"
                )
            recipe = cls(version=version, **data)
            if not (isinstance(recipe.model, str) and isinstance(recipe.custom_rules, bool)):
                raise ValueError
            if not (recipe.kwargs is None or isinstance(recipe.kwargs, dict)):
                raise ValueError
            recipe.known_posteriors()
            _check_options(recipe.options, version)
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError):
            raise CheckpointError("the recipe in it is not one that rvconvert writes; save the model again") from None
        return recipe

    def known_posteriors(self) -> dict[str, Posterior]:
        """Of the latents of methods, in training mode."""
        return {name: Posterior(frozenset(layers), int(inputs)) for name, (layers, inputs) in self.posteriors.items()}

    def conversion_options(self, rules: Registry | None = None) -> Options:
        """The options that the model was converted with."""
        options = Options.from_dict(self.options)
        return options if rules is None else dataclasses.replace(options, rules=rules)


def _check_options(options: Any, version: str) -> None:
    known = {field.name for field in dataclasses.fields(Options) if field.metadata["in_files"]}
    unknown = sorted(set(options) - known)
    if unknown:
        raise CheckpointError(
            f"the recipe, written by rvconvert {version}, has options that this version does not know: "
            f"{', '.join(map(repr, unknown))}; pip install --upgrade rvconvert"
        )
    try:
        Options.from_dict(options)
    except ConversionError as error:
        raise CheckpointError(f"the recipe in it is not valid: {error}") from None


# --- classes by name ----------------------------------------------------------------------------------


def class_spec(cls: type) -> str:
    """How a later process can name ``cls``: ``package.module:Class``, or ``path/file.py:Class`` for a script's."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is not None:
        try:
            found = importlib.util.find_spec(cls.__module__)
        except (ImportError, ValueError):  # __main__ has no spec
            found = None
        if found is None or found.origin is None or not _same_file(found.origin, file):
            relative = os.path.relpath(file)
            return f"{file if relative.startswith('..') else relative}:{cls.__qualname__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def imported_class(spec: str) -> type[nn.Module] | None:
    """The class that ``spec`` names if this process has imported it already; runs nothing.

    rvconvert's own modules count as imported: they are this library.
    """
    where, name = _split(spec)
    if where.endswith(".py"):
        modules = [m for m in list(sys.modules.values()) if _same_file(getattr(m, "__file__", None), where)]
    else:
        if where.split(".")[0] == "rvconvert" and importlib.util.find_spec(where) is not None:
            importlib.import_module(where)
        modules = [sys.modules[where]] if where in sys.modules else []
    for module in modules:
        found: Any = module
        for part in name.split("."):
            found = vars(found).get(part) if isinstance(found, (ModuleType, type)) else None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    return None


def import_class(spec: str) -> type[nn.Module]:
    """Import the class that ``spec`` names. This runs the module's code: only for a name that a person gave.

    Raises:
        ConversionError: no such file, module or class, or it is not an ``nn.Module``; or importing it fails.
    """
    where, name = _split(spec)
    module = _import_file(where, spec) if where.endswith(".py") else _import_module(where, spec)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    classes = [n for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, nn.Module)]
    if found is None:
        own = [n for n in classes if vars(module)[n].__module__ == module.__name__] or classes
        raise ConversionError(f"{where} has no class {name!r}{_alternatives(name, own)}")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConversionError(f"{spec} is not a torch.nn.Module class{_alternatives(name, classes)}")
    return found


def construct(cls: type[nn.Module], kwargs: Mapping[str, Any] | None) -> nn.Module:
    """``cls(**kwargs)``.

    Raises:
        ConversionError: the constructor refuses; the message shows its arguments.
    """
    kwargs = dict(kwargs or {})
    call = f"{cls.__name__}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())})"
    try:
        return cls(**kwargs)
    except Exception as error:
        try:
            takes = f"{cls.__name__}{inspect.signature(cls)}"
        except (TypeError, ValueError):
            takes = "not known"
        raise ConversionError(
            f"{call} failed: {_one_line(error)}{_place(error)}. Its arguments: {takes}; give them as "
            """--kwargs '{"name": value}' (Python: kwargs={...})"""
        ) from error


def _split(spec: str) -> tuple[str, str]:
    where, _, name = spec.rpartition(":")
    if not where or not name or not all(part.isidentifier() for part in name.split(".")):
        if spec.endswith(".py"):
            raise ConversionError(f"{spec!r} names no class; add it: '{spec}:ClassName'")
        raise ConversionError(f"{spec!r} is not a model; {SPEC_HELP}")
    return where, name


def _import_module(name: str, spec: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise ConversionError(
                f"no module {error.name!r} to import {spec!r} from (looked in {os.getcwd()} and the installed packages); "
                "name the file instead: 'path/file.py:Class'"
            ) from None
        raise _import_failed(name, error) from error
    except Exception as error:
        raise _import_failed(name, error) from error


def _import_file(path: str, spec: str) -> ModuleType:
    file = Path(path)
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ConversionError(f"{path}: no such file{_alternatives(file.name, siblings, 'files beside it')}")
    for module in list(sys.modules.values()):
        if _same_file(getattr(module, "__file__", None), path):
            return module
    name = file.stem if file.stem not in sys.modules else f"{file.stem}_{abs(hash(file.resolve()))}"
    found = importlib.util.spec_from_file_location(name, file.resolve())
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    if str(file.resolve().parent) not in sys.path:
        sys.path.insert(0, str(file.resolve().parent))  # its siblings, as `python path/file.py` finds them
    try:
        found.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, (Exception, SystemExit)):
            raise _import_failed(path, error) from error
        raise
    return module


def _import_failed(what: str, error: BaseException) -> ConversionError:
    hint = "; what reads the command line belongs below if __name__ == '__main__':" if isinstance(error, SystemExit) else ""
    return ConversionError(f"importing {what} failed: {_one_line(error)}{_place(error)}{hint}")


def _one_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException) -> str:
    """The last line of the user's own code that an error passed through."""
    own = str(Path(__file__).resolve().parent.parent)
    libraries = (own, str(Path(torch.__file__).parent), "<frozen", importlib.__file__ or "", argparse.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(libraries):
            return f" ({os.path.basename(frame.filename)}:{frame.lineno})"
    return ""


def _alternatives(name: str, names: list[str], what: str = "it has") -> str:
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; {what}: {', '.join(names[:8])}" if names else ""


def _same_file(a: str | None, b: str | None) -> bool:
    try:
        return a is not None and b is not None and os.path.samefile(a, b)
    except (OSError, TypeError, ValueError):
        return False
