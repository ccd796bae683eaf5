"""What a recording takes from Python: plain attributes of the model's modules, globals and enclosing variables, by name.

A recording holds them as constants, so it serves while they are as they were: an annealed ``self.beta``, a flag, a schedule's
step. ``read_now`` gives them as they are, as part of the key that a recording is found by.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import gc
import logging
import random
import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rvconvert.capture.surroundings import is_installed
from rvconvert.core.tree import fields_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

__all__ = [
    "ARGUMENT",
    "GENERATORS",
    "NUMBERS",
    "OTHERS",
    "Contents",
    "Moving",
    "Place",
    "ReadByName",
    "Scope",
    "following",
    "held_by",
    "is_opaque",
    "is_watched",
    "random_state",
    "read_now",
    "restore_random_state",
    "unused_arguments",
]

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_NEVER = frozenset(vars(nn.Module())) | {
    "training", "T_destination", "dump_patches", "call_super_init", "_compiled_call_impl",
}  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_DESCRIPTORS = (
    *_FUNCTIONS, classmethod, staticmethod, property, functools.cached_property, types.MemberDescriptorType,
    types.GetSetDescriptorType,
)  # fmt: skip
_OPAQUE = (
    torch.Tensor, nn.Module, type, types.ModuleType, *_FUNCTIONS, logging.Logger,
)  # fmt: skip
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_MOST_HELD = 1 << 14  # containers and objects whose contents are put back after a run on the side
_DEPTH, _MOST_IN_ALL = 6, 2048  # how far down containers and objects are looked into, and at how many of their contents
_MOST = 256  # entries of a container, fields of an object that are looked at one by one
_LARGEST = 1 << 18  # entries that are hashed, bytes of an array that are compared: of what is larger it is the object that counts
_SEEDS = frozenset("manual_seed fork_rng set_rng_state set_state seed_everything".split())
NUMBERS = (int, float)
ARGUMENT = -1  # the owner of an argument of the method
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)


class Scope(NamedTuple):
    """Where Python keeps variables: the globals of a module, by name, or a cell, of a variable that functions close over."""

    of: dict[str, Any] | types.CellType

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scope) and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


class Place(NamedTuple):
    """A name in Python: of the n-th of the model's modules, of the method (``ARGUMENT``), of a scope."""

    owner: int | Scope
    name: str


class Moving(NamedTuple):
    """Numbers that change between calls, as an annealed weight or a counter does: attributes and arguments by name.

    Runs that are compared hear others: what C computes of a number, ``math.exp``, says nothing to a recording.
    """

    places: frozenset[Place] = frozenset()
    other: int = 0  # which of the other numbers is heard; 0: none

    def heard(self, value: Any) -> Any:
        """What the model is told a number is."""
        if not self.other:
            return value
        return _OTHER_NUMBERS[isinstance(value, int)][self.other - 1](value)


_OTHER_NUMBERS: tuple[tuple[Callable[[Any], Any], ...], ...] = (
    (lambda x: 1.37 * x + 0.11, lambda x: 0.3 * x + 0.0123, lambda x: -x - 0.73, lambda x: x + 51.7),
    (lambda n: n + 7, lambda n: n // 3 + 1, lambda n: -n - 3, lambda n: n + 1000),
)
OTHERS = range(len(_OTHER_NUMBERS[0]) + 1)


def is_watched(module: nn.Module, name: str, value: Any, reader: types.FrameType) -> bool:
    """True if an attribute that a method read is to be compared at later calls; torch reads its own layers at each."""
    if name in _NEVER or name.startswith("__"):
        return False
    if type(module).__module__.startswith("torch.") and str(reader.f_globals.get("__name__")).startswith("torch."):
        return False
    own = isinstance(value, (*_FUNCTIONS, types.MethodType, functools.partial)) and name in vars(module)
    method = isinstance(value, types.MethodType) and _is_own(value.__func__)
    return own or method or (not isinstance(value, torch.Tensor) and _holds_values(value))


def is_opaque(value: Any) -> bool:
    """True for what a recording sees by itself, or what holds no values: tensors, modules, classes, functions."""
    if isinstance(value, (types.MethodType, functools.partial)):
        return all(is_opaque(each) for each in _carried(value))
    return isinstance(value, _OPAQUE) or (callable(value) and type(value).__module__.partition(".")[0] in ("torch", "functools"))


def _carried(value: types.MethodType | functools.partial[Any]) -> tuple[Any, ...]:
    """What a function that is bound to an object, or to some of its arguments, brings with it."""
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    return (value.func, *value.args, *value.keywords.values())


def unused_arguments(function: Any) -> frozenset[str]:
    """The names of arguments that a function's own code never mentions; none of what is wrapped."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return frozenset()
    code = function.__code__
    if "locals" in code.co_names:
        return frozenset()
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    named = [each.argval if isinstance(each.argval, tuple) else (each.argval,) for each in dis.get_instructions(code)]
    return frozenset(arguments) - {name for names in named for name in names if isinstance(name, str)} - {*code.co_cellvars}


class ReadByName:
    """What the model's own code reads by name while it runs, of every function as it is called, with the values of then."""

    def __init__(self, is_own: Callable[[types.FrameType], bool], is_recorded: Callable[[], bool]) -> None:
        self.is_own, self.is_recorded = is_own, is_recorded  # hooks and the insides of layers run at every call
        self.values: dict[Place, Hashable] = {}
        self.codes: set[types.CodeType] = set()
        self.enclosed: dict[types.CodeType, dict[str, tuple[Any, Hashable]]] = {}  # of functions with variables of another's
        self.seeds = False  # some of it names what sets the state of torch's generators
        self.within: set[Any] = set()  # code of functions that are made in the run, of its own variables
        self.held = Contents()  # of what is outside the model, before the run
        self.looked_at = 0  # how many of the codes had been seen when the defaults of arguments were looked at

    def __call__(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or (code in self.codes and self.enclosed.get(code, True)) or not self.is_recorded():
            return
        if code in self.codes:  # others of its functions held nothing so far that may change
            self.enclose(frame)
            return
        self.codes.add(code)
        self.within.update(each for each in code.co_consts if isinstance(each, types.CodeType))
        if self.is_own(frame):
            self.seeds = self.seeds or not _SEEDS.isdisjoint(code.co_names)
            self.note(_globals_of(frame.f_globals, code))
            if code not in self.within and set(code.co_freevars) - {"__class__"}:
                self.enclose(frame)

    def enclose(self, frame: types.FrameType) -> None:
        """Hold what a function that is called closes over."""
        held = self.enclosed[frame.f_code] = _held(frame)
        for value, _ in held.values():
            self.held.keep(value)

    def find_enclosed(self) -> None:
        """Note the variables that functions of the codes seen close over, of all in one walk through what Python has."""
        codes = [code for code, held in self.enclosed.items() if held]
        functions = [each for each in (gc.get_referrers(*codes) if codes else ()) if isinstance(each, types.FunctionType)]
        for code in codes:
            names = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_DEREF"}
            for function in functions:
                if function.__code__ is code:
                    self._note_cells(function, names)

    def _note_cells(self, function: types.FunctionType, written: set[str]) -> None:
        held = self.enclosed[function.__code__]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            place, now = Place(Scope(cell), name), _content(cell)
            found, was = held.get(name, (None, None))
            if place in self.values or not (name in held or _holds_values(now)) or name == "__class__":
                continue
            self.values[place] = was if name in held and (now is found or name in written) else read_now((place,), ())[0]

    def note(self, places: Iterable[Place]) -> None:
        """Places and what is there, if not noted before."""
        for place in places:
            if place not in self.values:
                self.values[place] = read_now((place,), ())[0]
                self.held.keep_place(place)

    def has(self, tensor: torch.Tensor) -> bool:
        """A tensor is in what was read, or a default of an argument."""
        if id(tensor) not in self.held.tensors and self.looked_at != len(self.codes):
            self.looked_at = len(self.codes)
            functions = [each for each in gc.get_referrers(*self.codes) if isinstance(each, types.FunctionType)]
            for each in functions:
                self.held.keep([*(each.__defaults__ or ()), *(each.__kwdefaults__ or {}).values()], depth=2)
        return id(tensor) in self.held.tensors

    def draws(self) -> bool:
        """A generator of random numbers is among what was read."""
        return any(isinstance(_value(place, ()), GENERATORS) for place in self.values)

    def changed(self) -> list[Place]:
        """What is no longer as it was when it was read first."""
        return [place for place, was in self.values.items() if read_now((place,), ())[0] != was]


class Contents:
    """What containers and objects of Python hold, and names outside the model, to be put back after a run on the side."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[Any, Any]] = {}
        self.names: dict[Place, Any] = {}
        self.tensors: dict[int, torch.Tensor] = {}  # of which a recording itself knows what is written: ``Recording.steps``

    def keep_place(self, place: Place) -> None:
        """Of a scope: the name's value, and what that holds."""
        value = _value(place, ())
        self.names[place] = value
        self.keep(value)

    def keep(self, value: Any, depth: int = _DEPTH) -> None:
        """What a value holds now, and what its contents hold, as far down as is looked."""
        if isinstance(value, torch.Tensor):
            self.tensors[id(value)] = value
        known = depth == 0 or id(value) in self.found or len(self.found) >= _MOST_HELD
        content = None if known else _contents(value)
        if content is None or len(content) > _LARGEST:
            return
        self.found[id(value)] = value, content
        within = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
        for each in within if len(content) <= _MOST else ():
            self.keep(each, depth - 1)

    def put_back(self) -> None:
        """Let all be as it was."""
        for place, value in self.names.items():
            if isinstance(place.owner, Scope) and _value(place, ()) is not value:
                _rebind(place.owner.of, place.name, value)
        for value, content in self.found.values():
            _put_back(value, content)


def _contents(value: Any) -> Any:
    """Of a container a list or a dictionary, of an object or a class of the person's the fields, of an array a copy."""
    if isinstance(value, np.ndarray):
        return value.copy() if value.ndim and value.nbytes <= _LARGEST else None
    if isinstance(value, (dict, list, set, collections.deque)):
        return dict(value) if isinstance(value, dict) else list(value)
    if is_opaque(value) and not (isinstance(value, type) and _is_own(value)):
        return None
    return dict(_fields(value) if isinstance(value, type) else fields_of(value)) or None


def _put_back(value: Any, content: Any) -> None:
    if isinstance(value, np.ndarray):
        if value.tobytes() != content.tobytes():
            value[...] = content
    elif isinstance(value, (dict, list, set, collections.deque)):
        if not _is_as_it_was(value, content):
            value.clear()
            (value.update if isinstance(value, (dict, set)) else value.extend)(content)
    else:
        now, set_field = (_fields(value), setattr) if isinstance(value, type) else (fields_of(value), object.__setattr__)
        for name, each in content.items():
            if name not in now or now[name] is not each:
                set_field(value, name, each)
        for name in now.keys() - content.keys():
            delattr(value, name)


def held_by(functions: Iterable[Any]) -> Contents:
    """What functions, such as hooks, hold and read outside the model."""
    found = Contents()
    todo = list(functions)
    while todo:
        function = todo.pop()
        if isinstance(function, functools.partial):
            todo.append(function.func)
            for each in (*function.args, *function.keywords.values()):
                found.keep(each)
            continue
        if isinstance(function, types.MethodType):
            found.keep(function.__self__)
            function = function.__func__
        if isinstance(function, types.FunctionType):
            for place in _globals_of(function.__globals__, function.__code__):
                found.keep_place(place)
            for cell in function.__closure__ or ():
                found.keep(_content(cell))
        else:
            found.keep(function)
    return found


def _is_as_it_was(holder: Any, content: Any) -> bool:
    now, was = (list(each.items()) if isinstance(each, dict) else [(x, x) for x in each] for each in (holder, content))
    return len(now) == len(was) and all(a is c and b is d for (a, b), (c, d) in zip(now, was, strict=True))


def _rebind(of: dict[str, Any] | types.CellType, name: str, value: Any) -> None:
    if isinstance(of, dict):
        of[name] = value
    else:
        of.cell_contents = value


@contextlib.contextmanager
def following(read: ReadByName) -> Iterator[None]:
    """Within, in this thread: ``read`` is told of every function that is called, and so is a profiler that was at work."""
    outer: Any = sys.getprofile()
    pauses = hasattr(outer, "disable")  # cProfile, which is no function, before Python 3.12

    def call(frame: types.FrameType, event: str, argument: Any) -> None:
        read(frame, event, argument)
        outer(frame, event, argument)

    if pauses:
        outer.disable()
    sys.setprofile(read if pauses or outer is None else call)
    try:
        yield
    finally:
        sys.setprofile(None if pauses else outer)
        if pauses:
            outer.enable()
        read.find_enclosed()


def _globals_of(scope: dict[str, Any], code: types.CodeType) -> list[Place]:
    """Values that a function reads among the globals of its module, and on modules of the person's that it has imported."""
    found = []
    for name, *rest in _globals_read(code):
        within = scope
        for attribute in rest:  # package.module.name, function.name
            value = within.get(name)
            known = isinstance(value, (types.ModuleType, types.FunctionType)) and _is_own(value)
            if not known or attribute not in vars(value):
                break
            within, name = vars(value), attribute
        if name in within:
            found.append(Place(Scope(within), name))
    values = [_value(place, ()) for place in found]
    return [place for place, value in zip(found, values, strict=True) if _holds_values(value) or _may_be_rebound(place, value)]


def _may_be_rebound(place: Place, value: Any) -> bool:
    """A module, a function by another name, ``activation = torch.relu``, or one of the person's, defined again in a notebook."""
    function = isinstance(value, _FUNCTIONS) and (value.__name__ != place.name or _is_own(value))
    return function or isinstance(value, (nn.Module, types.MethodType, functools.partial))


@functools.lru_cache(maxsize=1024)
def _globals_read(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The names of globals that a function's own code reads, each with the attributes that it takes of it."""
    found: list[tuple[str, ...]] = []
    names: tuple[str, ...] = ()
    for each in dis.get_instructions(code):  # a function ends by what is no name
        if names and each.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names += (each.argval,)
            continue
        found += [names] if names else []
        is_global = each.opname in ("LOAD_GLOBAL", "LOAD_NAME") and not each.argval.startswith("__")
        names = (each.argval,) if is_global else ()
    return tuple(dict.fromkeys(found))


def _held(frame: types.FrameType) -> dict[str, tuple[Any, Hashable]]:
    """What a function that is called finds in the variables that it closes over, of what may change: the object, and as it is."""
    values = {name: frame.f_locals[name] for name in frame.f_code.co_freevars if name in frame.f_locals and name != "__class__"}
    return {name: (value, _Snapshot(in_scope=True).of(value)) for name, value in values.items() if _holds_values(value)}


def _is_settings(value: Any) -> bool:
    """A class or a module of the person's, which may be a configuration."""
    return isinstance(value, (type, types.ModuleType)) and _is_own(value)


def _is_own(value: Any) -> bool:
    """A module, a class or a function that is written beside the model, in no package that was installed."""
    home = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", None)
    return not is_installed(str(home).partition(".")[0])


def _holds_values(value: Any) -> bool:
    if isinstance(value, (type, types.ModuleType)):
        return _is_settings(value) and bool(_fields(value))
    return isinstance(value, (*_CONTAINERS, torch.Tensor)) or not is_opaque(value)


def read_now(places: Iterable[Place], modules: Sequence[nn.Module]) -> tuple[Hashable, ...]:
    """The values of ``places``; of what is not plain, its type, its length, and what is plain in it."""
    return tuple([_Snapshot(isinstance(place.owner, Scope), modules).of(_value(place, modules)) for place in places])


def _value(place: Place, modules: Sequence[nn.Module]) -> Any:
    owner, name = place
    if isinstance(owner, Scope):
        return owner.of.get(name) if isinstance(owner.of, dict) else _content(owner.of)
    return getattr(modules[owner], name, None)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it has none yet
        return None


class _Snapshot:
    """What is plain in a value, to be compared; of tensors in a scope, which ones they are: a graph reads those of modules.

    Of modules it is the same: the number of one of the model's own, which a copy of the model has too.
    """

    def __init__(self, in_scope: bool, modules: Sequence[nn.Module] = ()) -> None:
        self.in_scope, self.modules, self.left = in_scope, modules, _MOST_IN_ALL

    def of(self, value: Any, depth: int = _DEPTH) -> Hashable:
        """Hashable; equal for equal contents, as far down as is looked."""
        kind = type(value)
        if isinstance(value, _PLAIN):
            return (kind, value if value == value else "nan")  # a NaN is equal to nothing, and is the same NaN
        self.left -= 1
        if isinstance(value, _FUNCTIONS):
            return (kind, value)
        if isinstance(value, torch.Tensor):
            return (kind, id(value) if self.in_scope else 0)
        if isinstance(value, nn.Module):
            return (nn.Module, next((i for i, module in enumerate(self.modules) if module is value), id(value)))
        if isinstance(value, np.generic):
            return (kind, self.of(value.item())) if isinstance(value.item(), _PLAIN) else (kind, str(value))
        if isinstance(value, np.ndarray):
            known = value.nbytes <= _LARGEST and not value.dtype.hasobject
            return (kind, value.shape, value.dtype.str, value.tobytes() if known else id(value))
        within = depth > 0 and self.left > 0
        if isinstance(value, _CONTAINERS):
            if isinstance(value, (set, frozenset)) or len(value) > _MOST:
                return (kind, len(value), _fingerprint(value))
            if not within:
                return (kind, len(value))
            if isinstance(value, dict):
                return (kind, tuple([(self.of(k, 0), self.of(v, depth - 1)) for k, v in value.items()]))
            return (kind, tuple([self.of(v, depth - 1) for v in value]))
        if within and isinstance(value, (types.MethodType, functools.partial)):
            own = value.__func__ if isinstance(value, types.MethodType) else None
            return (kind, own, tuple([self.of(each, depth) for each in _carried(value)]))
        if not within or (is_opaque(value) and not _is_settings(value)):
            return (kind,)
        fields = _fields(value)
        if len(fields) > _MOST:
            return (kind, id(value))
        return (kind, tuple([(k, self.of(v, depth - 1)) for k, v in fields.items()]))


def _fingerprint(value: Any) -> Hashable:
    """Equal for the same contents, as far as these can be hashed and are not too many; else for the same object."""
    if len(value) > _LARGEST:
        return id(value)
    try:
        if isinstance(value, dict):
            return hash((tuple(value), tuple(value.values())))
        return hash(frozenset(value) if isinstance(value, set) else tuple(value))
    except TypeError:
        return id(value)


def _fields(value: Any) -> dict[str, Any]:
    """Of an object, in ``__dict__`` or in slots, and what its class has for all; of a class, all but its methods."""
    if isinstance(value, (type, types.ModuleType)):
        return {k: v for k, v in vars(value).items() if not isinstance(v, _DESCRIPTORS) and not k.startswith("__")}
    shared = _fields(type(value)) if _is_own(type(value)) else {}
    return shared | fields_of(value)


def random_state() -> tuple[Any, ...]:
    """Of Python's and NumPy's global generators."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), (kind, np.asarray(keys).tobytes(), *rest)


def restore_random_state(state: tuple[Any, ...]) -> None:
    """Put both back."""
    random.setstate(state[0])
    kind, keys, *rest = state[1]
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
