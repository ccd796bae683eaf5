"""What modules hold: kept as it is while a method runs on the side, and compared with what a method leaves."""

from __future__ import annotations

import collections
import contextlib
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rvconvert.capture.python_state import NUMBERS, is_opaque, random_state, restore_random_state
from rvconvert.capture.recording import Kept, equal
from rvconvert.capture.surroundings import is_surrounding, silent_logs
from rvconvert.capture.traced_number import TracedFloat, TracedInt, is_traced_now, untraced
from rvconvert.core.tree import Structure, flatten

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rvconvert.capture.recording import Recording

__all__ = ["Held", "HeldTensor", "is_output", "modules_of", "own_state", "plain_tensor_attributes", "unchanged"]

_TABLES = ("_buffers", "_parameters", "_modules")
_OWN = frozenset(vars(nn.Module()))
_DEEP, _MANY = 4, 256  # how far into containers, and into how many entries of each, tensors are looked for
_DEPTH, _MOST = 3, 64  # how far down, and of how large containers, what they hold is looked at
_LARGEST = 1 << 24  # bytes of an array that is copied


@contextlib.contextmanager
def unchanged(root: nn.Module, written: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Within: runs may update buffers, attributes, the random state and parameters' data; after, all is as it was.

    So are parameters that are ``written`` in place. The others are not copied: a model may be large.
    Buffers are copies within: a graph of an earlier call, whose backward pass is still to come, may have saved the others.
    """
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = {module: dict(vars(module)) for module in modules}
    mutables = _mutables(attributes)
    tables = {m: (dict(m._buffers), dict(m._parameters)) for m in modules}
    values = tensors_written(root) | {x: x.detach().clone() for x in written if not x.is_meta}
    data = {p: p.data for p in root.parameters()}
    devices = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"})
    drawn = random_state()
    copies = {id(b): values[b].clone() for b in root.buffers() if b in values}
    for module, (buffers, _) in tables.items():
        module._buffers.update({name: copies[id(b)] for name, b in buffers.items() if id(b) in copies})
    try:
        with torch.random.fork_rng(devices=devices), silent_logs(modules):
            yield
    finally:
        restore_random_state(drawn)
        put_back(values)
        for parameter, before in data.items():
            if parameter.data.data_ptr() != before.data_ptr():
                parameter.data = before
        for _, _, value, contents, _ in mutables:
            if _replaced(value, contents) != []:
                _put_back(value, contents)
        for module, held in attributes.items():
            vars(module).clear()
            vars(module).update(held)
            own: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
            saved: tuple[dict[str, Any], ...] = tables[module]
            for table, entries in zip(own, saved, strict=True):
                table.clear()
                table.update(entries)


def tensors_written(root: nn.Module) -> dict[torch.Tensor, torch.Tensor]:
    """What a run may write into in place, with copies of it: buffers, and tensors that modules keep as plain attributes.

    Of these the large ones, a whole set of data, are left out.
    """
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
    held = [value for m in modules for _, value in own_attributes(m, vars(m))]
    plain = [x for x in flatten(held)[0] if type(x) is torch.Tensor and x.layout == torch.strided]
    own = [x for x in plain if x.nbytes <= _LARGEST]
    written = (x for x in (*root.buffers(), *own) if x.layout == torch.strided)
    return {x: x.detach().clone() for x in written if not x.is_meta}


def put_back(values: dict[torch.Tensor, torch.Tensor]) -> None:
    """Undo what was written into them in place."""
    with torch.no_grad():
        for tensor, value in values.items():
            # A write by `.data` counts as no new version, and a copy for no reason as one that a backward pass refuses.
            changed = not torch.equal(tensor, value) and not torch.allclose(tensor, value, 0.0, 0.0, equal_nan=True)
            if changed and not tensor.is_inference():
                tensor.copy_(value)


class _Mutable(NamedTuple):
    """A container, an array or an object that a module holds, however deep, and what was in it."""

    module: nn.Module
    name: str  # of the module's attribute that it is, or is in
    value: Any
    contents: Any
    is_record: bool  # a list or dict, in nothing but such, which a graph fills


def _mutables(attributes: dict[nn.Module, dict[str, Any]]) -> list[_Mutable]:
    """What a method may write to without an assignment: lists, dicts, meters, counters."""
    found: list[_Mutable] = []
    seen: set[int] = set()

    def visit(module: nn.Module, name: str, value: Any, depth: int, in_record: bool = True) -> None:
        if id(value) in seen or is_opaque(value):
            return
        seen.add(id(value))
        contents = value if isinstance(value, tuple) else _contents(value)
        if contents is None:
            return
        if contents is not value:
            in_record = in_record and isinstance(value, (list, dict))
            found.append(_Mutable(module, name, value, contents, in_record))
        if depth and not isinstance(contents, np.ndarray) and len(contents) <= _MOST:
            for each in contents.values() if isinstance(contents, dict) else contents:
                visit(module, name, each, depth - 1, in_record)

    for module, held in attributes.items():
        for name, value in own_attributes(module, held):
            visit(module, name, value, _DEPTH)
    return found


def own_attributes(module: nn.Module, held: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of what a module has ``held``, the model's own: no table of torch's, no trainer that it is held by."""
    for name, value in held.items():
        if not _is_torchs(module, name) and not is_surrounding(module, value):
            yield name, value


def _is_torchs(module: nn.Module, name: str) -> bool:
    """A table of torch's own, or the conversion of a converted model."""
    return name in _OWN or name == "_rvconvert" or (name[0] == "_" and type(module).__module__.startswith("torch."))


def _contents(value: Any) -> Any:
    """A copy of what is in a container, an array or an object; None of anything else."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, set, collections.deque)):
        return list(value)
    if isinstance(value, np.ndarray):
        return value.copy() if value.nbytes <= _LARGEST else None
    return dict(vars(value)) if isinstance(getattr(value, "__dict__", None), dict) else None


def _put_back(value: Any, contents: Any) -> None:
    if isinstance(value, np.ndarray):
        value[...] = contents
        return
    container: Any = value if isinstance(value, (dict, list, set, collections.deque)) else vars(value)
    container.clear()
    if isinstance(container, dict):  # one by one: the update of a class of its own may be another
        for key, each in contents.items():
            container[key] = each
    else:
        (container.update if isinstance(container, set) else container.extend)(contents)


def _replaced(value: Any, contents: Any) -> list[tuple[Any, Any]] | None:
    """What is in a container now and was in it before, where these are not the same object; None if it is another size."""
    now = _contents(value)
    if isinstance(value, np.ndarray):
        return [] if now.shape == contents.shape and now.tobytes() == contents.tobytes() else None
    if len(now) != len(contents) or (isinstance(now, dict) and now.keys() != contents.keys()):
        return None
    pairs = [(now[k], contents[k]) for k in now] if isinstance(now, dict) else zip(now, contents, strict=True)
    return [(a, b) for a, b in pairs if a is not b]


def _is_changed(value: Any, contents: Any) -> bool:
    pairs = _replaced(value, contents)
    return pairs is None or any(is_output(a) or not equal(a, b) for a, b in pairs)


def _untrace(value: Any) -> None:
    """Numbers that were recorded become plain ones."""
    contents = _contents(value)
    if isinstance(contents, dict):
        held = value if isinstance(value, dict) else vars(value)
        for key, number in contents.items():  # one by one: a Counter adds what it is updated by
            if isinstance(number, (TracedInt, TracedFloat)):
                held[key] = untraced(number)
    elif isinstance(contents, list) and any(isinstance(v, (TracedInt, TracedFloat)) for v in contents):
        _put_back(value, [untraced(v) for v in contents])


def _is_record(module: nn.Module, name: str, value: Any) -> bool:
    """A list or dict that a model may keep notes in."""
    return isinstance(value, (list, dict)) and not _is_torchs(module, name)


def _is_meter(value: Any) -> bool:
    """An object with numbers of this run in it."""
    return any(map(is_output, getattr(value, "__dict__", {}).values()))


def is_output(value: Any) -> bool:
    """True for what a graph gives: a tensor, or a number that was recorded."""
    return isinstance(value, torch.Tensor) or is_traced_now(value)


class Held:
    """What modules held before a run, to tell what the run keeps on them."""

    def __init__(self, root: nn.Module) -> None:
        self.held = {m: dict(vars(m)) for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)}
        self.buffers = {m: dict(m._buffers) for m in self.held}
        self.mutables = _mutables(self.held)

    def counted(self) -> Iterator[tuple[nn.Module, str]]:
        """Attributes of modules that are another plain number than before."""
        for module, held in self.held.items():
            for name, now in vars(module).items():
                before = held.get(name, getattr(type(module), name, None))
                if type(before) in NUMBERS and type(now) in NUMBERS and now != before:
                    yield module, name

    def changes(self, recording: Recording, paths: dict[int, str]) -> list[Any]:
        """Note in the recording what was set on each module, whose ``paths`` go by id; returns the tensors in it.

        A tensor, or a new container or object of tensors, is made anew by a graph. Anything else that changes (a counter, a
        list that grows) is what Python alone can do, so that the recording serves one call.
        """
        leaves: list[Any] = []
        changed = {(module, name): None for module, name, value, before, _ in self.mutables if _is_changed(value, before)}
        recording.once += [f"the method changes {type(module).__name__}.{name}" for module, name in changed]
        for module, held in self.held.items():
            path = paths[id(module)]
            for name, value in list(vars(module).items()):
                if name in _TABLES:
                    continue
                same = name in held and value is held[name]
                if same and (module, name) not in changed:
                    continue
                grown = same and (_is_record(module, name, value) or _is_meter(value))
                if same and not grown:
                    continue
                found, structure = flatten(value, is_output)
                if not found and not grown and equal(value, held.get(name, self)):
                    continue
                recording.kept.append(Kept(path, name, structure, len(found), grown))
                leaves += found
                new = name not in held and _is_record(module, name, value)  # the next call may find it, and add to it
                if not found or new:
                    recording.once.append(f"the method changes {type(module).__name__}.{name}")
            for name, value in module._buffers.items():
                if value is not self.buffers[module].get(name) and value is not None:
                    recording.kept.append(Kept(path, name, Structure("leaf"), 1))
                    leaves.append(value)
        for _, _, value, _, is_record in self.mutables:
            if not is_record:
                _untrace(value)
        return leaves


class HeldTensor(NamedTuple):
    """Where a model keeps a tensor: an attribute's path, and the keys by which a container there holds the tensor."""

    path: str
    keys: tuple[Any, ...] = ()


def plain_tensor_attributes(root: nn.Module) -> dict[int, HeldTensor]:
    """Tensors kept as plain attributes of modules, or of objects that modules keep, or in lists and dicts there, by id."""
    found: dict[int, HeldTensor] = {}

    def within(value: Any, path: str, keys: tuple[Any, ...]) -> None:
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), HeldTensor(path, keys))
        elif len(keys) < _DEEP and isinstance(value, (list, tuple, dict)) and len(value) <= _MANY:
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, (int, str)):
                    within(each, path, (*keys, key))

    def visit(value: Any, path: str, depth: int) -> None:
        if isinstance(value, (torch.Tensor, list, tuple, dict)):
            within(value, path, ())
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
            for name, each in vars(value).items():
                if name.isidentifier():
                    visit(each, f"{path}.{name}", depth - 1)

    for prefix, module in root.named_modules():
        for name, value in own_attributes(module, vars(module)):
            visit(value, f"{prefix}.{name}" if prefix else name, 3)
    return found


def own_state(module: nn.Module) -> dict[str, Any]:
    """What decides on what a layer computes: which tensors it has, its mode, its numbers."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    tensors = {**module._parameters, **module._buffers}
    numbers = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))}
    return {**numbers, **{name: id(tensor) for name, tensor in tensors.items()}}


_WALKED: weakref.WeakKeyDictionary[nn.Module, tuple[list[nn.Module], list[list[Any]] | None]] = weakref.WeakKeyDictionary()


def modules_of(model: nn.Module) -> list[nn.Module]:
    """``list(model.modules())``, walked again only where a module was added, replaced or removed."""
    if torch.compiler.is_compiling():
        return list(model.modules())
    below, children = _WALKED.get(model, ([], None))
    modules = [model, *below]
    if [[*m._modules.values()] for m in modules] != children:
        modules = list(model.modules())
        _WALKED[model] = (modules[1:], [[*m._modules.values()] for m in modules])
    return modules
