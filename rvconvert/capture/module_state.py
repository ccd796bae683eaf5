"""What modules hold: kept as it is while a method runs on the side, and compared with what a method leaves."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert.capture.python_state import is_opaque, random_state, restore_random_state
from rvconvert.capture.recording import Kept, equal
from rvconvert.capture.traced_number import TracedFloat, TracedInt, untraced
from rvconvert.core.tree import Structure, flatten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rvconvert.capture.recording import Recording

__all__ = ["Held", "is_output", "unchanged"]

_TABLES = ("_buffers", "_parameters", "_modules")


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Within: runs may update parameters, buffers, attributes and the random state; after, all is as it was.

    Buffers are copies within: a graph of an earlier call, whose backward pass is still to come, may have saved the others.
    """
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]
    attributes = {module: dict(vars(module)) for module in modules}
    containers = {m: {k: copy.copy(v) for k, v in held.items() if _is_record(k, v)} for m, held in attributes.items()}
    objects = _objects(attributes)
    tables = {m: (dict(m._buffers), dict(m._parameters)) for m in modules}
    values = {b: b.detach().clone() for b in root.buffers() if not b.is_meta}
    data = {p: (p.data, p.data._version) for p in root.parameters()}
    devices = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"})
    drawn = random_state()
    copies = {id(b): value.clone() for b, value in values.items()}
    for module, (buffers, _) in tables.items():
        module._buffers.update({name: copies[id(b)] for name, b in buffers.items() if id(b) in copies})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        restore_random_state(drawn)
        with torch.no_grad():
            for buffer, value in values.items():
                if buffer._version and not torch.equal(buffer, value):
                    buffer.copy_(value)
        for parameter, (before, _) in data.items():
            if parameter.data.data_ptr() != before.data_ptr():
                parameter.data = before
        for _, _, value, fields in objects:
            vars(value).clear()
            vars(value).update(fields)
        for module, held in attributes.items():
            vars(module).clear()
            vars(module).update(held)
            for key, value in containers[module].items():
                container: Any = vars(module)[key]
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(value)
            own: tuple[dict[str, Any], ...] = (module._buffers, module._parameters)
            saved: tuple[dict[str, Any], ...] = tables[module]
            for table, entries in zip(own, saved, strict=True):
                table.clear()
                table.update(entries)


def _objects(attributes: dict[nn.Module, dict[str, Any]]) -> list[tuple[nn.Module, str, Any, dict[str, Any]]]:
    """Of modules' attributes the meters, counters, configurations: (module, name, object, its fields as they are now)."""
    return [
        (module, name, value, dict(vars(value)))
        for module, held in attributes.items()
        for name, value in held.items()
        if isinstance(getattr(value, "__dict__", None), dict) and not name.startswith("_") and not is_opaque(value)
    ]


def _is_record(name: str, value: Any) -> bool:
    """A list or dict that a model may keep notes in (not a table of torch's own)."""
    return isinstance(value, (list, dict)) and not name.startswith("_")


def is_output(value: Any) -> bool:
    """True for what a graph gives: a tensor, or a number that was recorded."""
    return isinstance(value, (torch.Tensor, TracedInt, TracedFloat))


class Held:
    """What modules held before a run, to tell what the run keeps on them."""

    def __init__(self, root: nn.Module) -> None:
        self.held = {m: dict(vars(m)) for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)}
        self.buffers = {m: dict(m._buffers) for m in self.held}
        self.contents = {(m, k): _contents(v) for m, held in self.held.items() for k, v in held.items() if _is_record(k, v)}
        self.objects = _objects(self.held)

    def changes(self, recording: Recording, paths: dict[int, str]) -> list[Any]:
        """Note in the recording what was set on each module, whose ``paths`` go by id; returns the tensors in it.

        A tensor, or a new container or object of tensors, is made anew by a graph. Anything else that changes (a counter, a
        list that grows) is what Python alone can do, so that the recording serves one call.
        """
        leaves: list[Any] = []
        for module, name, value, before in self.objects:
            fields = vars(value)
            fields.update({k: untraced(v) for k, v in fields.items() if isinstance(v, (TracedInt, TracedFloat))})
            if fields.keys() != before.keys() or any(v is not before[k] and not equal(v, before[k]) for k, v in fields.items()):
                recording.once.append(f"the method changes {type(module).__name__}.{name}")
        for module, held in self.held.items():
            path = paths[id(module)]
            for name, value in list(vars(module).items()):
                if name in _TABLES:
                    continue
                same = name in held and value is held[name]
                grown = same and (module, name) in self.contents and self.contents[module, name] != _contents(value)
                if not grown and (same or (not is_output(value) and equal(value, held.get(name, self)))):
                    continue
                found, structure = flatten(value, is_output)
                recording.kept.append(Kept(path, name, structure, len(found), grown))
                leaves += found
                new = name not in held and _is_record(name, value)  # the next call may find it, and add to it
                if grown or not found or new:
                    recording.once.append(f"the method changes {type(module).__name__}.{name}")
            for name, value in module._buffers.items():
                if value is not self.buffers[module].get(name) and value is not None:
                    recording.kept.append(Kept(path, name, Structure("leaf"), 1))
                    leaves.append(value)
        return leaves


def _contents(record: Any) -> list[int]:
    return [id(each) for each in (record.values() if isinstance(record, dict) else record)]
