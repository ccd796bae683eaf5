"""Which node of a graph each tensor of a run stands for, and what a write in place changes of that."""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from rvconvert.capture.frames import user_frame, where
from rvconvert.capture.graph_calls import assign_mean, autocast_state, own_copy, rewritten, set_autocast
from rvconvert.capture.module_state import plain_tensor_attributes
from rvconvert.capture.numpy_draws import as_array
from rvconvert.capture.traced_number import TracedFloat, TracedInt, is_traced_now, untraced
from rvconvert.errors import TracingError
from rvconvert.places import short_place
from rvconvert.rules.shape import setitem

if TYPE_CHECKING:
    from rvconvert.capture.recording import Recording
    from rvconvert.core.registry import Registry

TRANSFORM = (
    "torch.vmap and the transforms of torch.func cannot be recorded inside the method: {}. Write it for the whole batch, "
    "((y - x) ** 2).mean(1), or let the training loop do it with what the method returns"
)
_CONSTANT = itertools.count()
_IMMEDIATE = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


class TensorNodes:
    """Values in, nodes out."""

    def __init__(self, root: nn.Module, recording: Recording, registry: Registry) -> None:
        super().__init__()
        self.recording = recording
        self.graph = recording.graph
        self.registry = registry
        self.nodes: dict[int, fx.Node] = {}
        self.storages: dict[Any, fx.Node] = {}
        self.sharing: dict[int | None, dict[int, torch.Tensor]] = {}  # what has a node, by its memory
        self.writers: dict[int, fx.Node] = {}  # of tensors that are stale since
        self.views: dict[int, tuple[torch.Tensor, Any]] = {}  # what a view was indexed from, and by what; None: it was reshaped
        self.homes: dict[int, tuple[torch.Tensor, fx.Node]] = {}  # of memory: what no code in the graph makes, and its node
        self.numpy_drawn: list[torch.Tensor] = []  # in the place of NumPy's own draws
        self.tensors = {id(t): path for path, t in [*root.named_parameters(), *root.named_buffers()]}
        self.parameters = {storage_of(p) for p in root.parameters()} - {None}
        self.attributes = plain_tensor_attributes(root)
        self.stack: list[str] = []  # paths of the modules that are at work
        self.autocast = autocast_state()

    def track(self, value: Any, node: fx.Node) -> None:
        """Let ``value``, a tensor or a nest of them, stand for ``node``."""
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
            self.writers.pop(id(value), None)
            with torch._C.DisableTorchFunction():
                node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype
                node.meta["requires_grad"] = value.requires_grad
            key = storage_key(value)
            if key is not None:
                self.storages[key] = node
            self.sharing.setdefault(key and key[0], {})[id(value)] = value
        elif isinstance(value, (list, tuple)):
            for index, each in enumerate(value):
                self.track_item(each, node, index)
        elif isinstance(value, dict):
            for key, each in value.items():
                self.track_item(each, node, key)

    def track_item(self, value: Any, node: fx.Node, key: Any) -> None:
        """Let ``value`` stand for ``node[key]``, if there is a tensor in it."""
        if tensors_in(value):
            item = self.add("call_function", operator.getitem, (node, key), {})
            item.meta["part"] = True
            self.inherit(item)
            self.track(value, item)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that made ``tensor``; a parameter, buffer, attribute or constant gets one on first use."""
        if id(tensor) in self.writers:
            self.recording.stale.append((self.writers[id(tensor)], self.line()))
        known = self.nodes.get(id(tensor))
        if known is not None:
            return known
        path, held = self.tensors.get(id(tensor)), self.attributes.get(id(tensor))
        if path is not None:
            node = self.graph.get_attr(path)
            node.meta["requires_grad"] = tensor.requires_grad
            self.recording.attributes[path] = tensor
        elif held is not None:
            node = self.graph.get_attr(held.path)
            for key in held.keys:
                node = self.graph.call_function(operator.getitem, (node, key))
                node.meta.update(where="", source="", module="", part=True)
            node.meta.update(requires_grad=tensor.requires_grad, shape=tuple(tensor.shape), dtype=tensor.dtype, held=True)
            if held.keys:
                self.recording.entries[node] = tensor
            else:
                self.recording.attributes[held.path] = tensor
        else:
            key = storage_key(self.unwrapped(tensor))
            shared = self.storages.get(key) if key is not None else None
            node = shared if shared is not None else self.from_array(tensor)
        storage = storage_of(tensor)
        if storage is not None and (held is not None or node.op == "get_attr"):
            self.homes.setdefault(storage, (tensor, node))
        self.nodes[id(tensor)] = node
        self.sharing.setdefault(storage, {})[id(tensor)] = tensor
        return node

    def unwrapped(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor, out of what torch.vmap or a transform of torch.func has wrapped it into, if that is not random."""
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return tensor
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if self.nodes.get(id(tensor)) in self.recording.depends:
            raise TracingError(TRANSFORM.format(self.line()))
        if id(tensor) in self.nodes:
            self.recording.once.append(f"a transform of torch.func is at work: {self.line()}")
        return tensor

    def drawn_array(self, made: torch.Tensor) -> np.ndarray:
        """For a model that draws by NumPy: tensors of these numbers stand for the node."""
        if id(made) in self.nodes:  # none is inside a layer that is one node
            self.numpy_drawn.append(made)
        return as_array(made)

    def from_array(self, tensor: torch.Tensor) -> fx.Node:
        """The node of a tensor that no torch function made: what NumPy has drawn, in any dtype, or a constant."""
        drawn = self.numpy_drawn if tensor.is_floating_point() else ()  # whole numbers are alike by chance
        with torch._C.DisableTorchFunction():
            same = (x for x in drawn if x.shape == tensor.shape and torch.equal(x.to(tensor.dtype), tensor.cpu()))
            made = next(same, None)
        if made is None:
            return self.constant(tensor)
        node = self.add("call_method", "to", (self.nodes[id(made)], tensor.dtype), {})
        node.meta["rule"] = self.registry.find(torch.Tensor.to)
        self.inherit(node)
        self.track(tensor, node)
        return node

    def constant(self, value: Any) -> fx.Node:
        """A node for a value that no code in the graph makes."""
        if self.numpy_drawn and isinstance(value, (torch.Tensor, np.ndarray)):
            self.recording.once.append("Python draws random numbers of its own, which it works on by numpy")
        name = f"constant_{next(_CONSTANT)}"
        self.recording.constants[name] = value
        node = self.graph.get_attr(f"_rvconvert.constants.{name}")
        if isinstance(value, nn.Parameter):  # of a module that is kept in a plain list or dict
            node.meta["weight"], node.meta["requires_grad"] = True, value.requires_grad
        return node

    def save(self, target: torch.Tensor) -> None:
        """Before a write: what the memory has held, if no code in the graph makes it: ``torch.Tensor([0])``, a global."""
        storage = storage_of(target)
        if not any(id(target) in known for known in (self.nodes, self.writers, self.tensors, self.attributes)):
            self.node_of(target)
        whole, node = self.homes.get(storage or 0, (target, None))
        owner, _, name = str(node and node.target).rpartition(".")
        if owner == "_rvconvert.constants" and name not in self.recording.steps:
            self.recording.steps[name] = whole, own_copy(whole)

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node."""
        if isinstance(value, (TracedInt, TracedFloat)):
            return value.node if is_traced_now(value) else untraced(value)
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, torch.Size) or type(value) is tuple:
            return tuple(self.argument(each) for each in value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            node = self.add("call_function", type(value), tuple(self.argument(each) for each in value), {})
            node.meta["part"] = True
            self.inherit(node)
            return node
        if isinstance(value, list):
            return [self.argument(each) for each in value]
        if isinstance(value, dict):
            return {key: self.argument(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, (np.integer, np.floating, np.bool_)):
            return value.item()
        if value is None or value is Ellipsis or isinstance(value, _IMMEDIATE):
            return value
        return self.constant(value)

    def line(self) -> str:
        """Where the model is, with the source line."""
        place, source = where(user_frame())
        return f"{short_place(place)}: {source}"

    def add(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A new node, with the model's own file and line; before it, autocast is set as it is by now."""
        now = autocast_state()
        if now != self.autocast:
            self.autocast = now
            self.graph.call_function(set_autocast, (now,)).meta["mutates"] = True
            self.recording.sets_autocast = True
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["where"], node.meta["source"] = where(user_frame())
        node.meta["module"] = self.stack[-1] if self.stack else ""
        return node

    def inherit(self, node: fx.Node) -> None:
        """A node depends on a draw if one of its inputs does."""
        if any(source in self.recording.depends for source in node.all_input_nodes):
            self.recording.depends.add(node)

    def detached(self, node: fx.Node) -> fx.Node:
        """The node without a gradient, as its value is where gradients are off."""
        made = self.add("call_method", "detach", (node,), {})
        made.meta["rule"] = self.registry.find(torch.Tensor.detach)
        self.inherit(made)
        return made

    # --- writes in place

    def note_view(self, of: torch.Tensor, result: torch.Tensor, index: Any) -> None:
        """A result that is ``of[index]`` or, where the index is None, the same elements in another shape, if it is no copy."""
        if result is not of and storage_of(result) == storage_of(of):
            self.views[id(result)] = of, index

    def is_written_back(self, target: Any, index: Any, value: Any) -> bool:
        """``x[i] += y`` writes through a view and writes the view back: the whole has been written with the part."""
        node = self.nodes.get(id(value))
        if node is None or node not in self.recording.depends or id(target) in self.writers:
            return False
        with torch._C.DisableTorchFunction():
            return storage_key(target[index]) == storage_key(value)

    def write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """An in-place write of what may be random: later uses of the tensor see the node."""
        key = storage_of(tensor)
        if key in self.parameters:  # an initialisation by data: done now, as the plain model does it
            self.recording.once.append(f"a parameter is written in place: {self.line()}")
            self.recording.initializes = True
            return
        if key in self.homes:
            home, part = self.homes[key]
            if home is not tensor:  # R[0].add_(x), R.data.add_(x)
                with torch._C.DisableTorchFunction():
                    place = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
                part = self.graph.call_function(torch.as_strided, (part, *place))
                part.meta.update(part=True, where="", source="", module="")
            self.add("call_function", assign_mean, (part, node), {}).meta.update(mutates=True, part=True)
        whole, stale = None if tensor.requires_grad else storage_key(tensor), set(self.writers)
        for other in list(self.sharing.get(key, {}).values()) if key is not None else ():
            if other is not tensor and storage_of(other) == key:
                held = self.nodes.get(id(other))
                if held is None or whole is None or storage_key(other) != whole:
                    self.writers[id(other)] = node
                    continue
                again = self.add("call_function", rewritten, (held, node), {})  # x.detach().clamp_(...)
                again.meta["part"] = True
                self.inherit(again)
                self.track(other, again)
        self.track(tensor, node)
        while id(tensor) in self.views:  # y[:, 0:3][mask] = 0 writes y
            of, index = self.views[id(tensor)]
            if id(of) in stale or id(of) not in self.nodes:
                return
            function: Any = torch.Tensor.__setitem__
            if index is None:  # the same elements in another shape
                function, node = torch.Tensor.reshape_as, self.add("call_method", "reshape_as", (node, self.nodes[id(of)]), {})
            else:
                node = self.add("call_function", setitem, (self.nodes[id(of)], index, node), {})
            node.meta["rule"], node.meta["function"] = self.registry.find(function), function
            self.inherit(node)
            self.track(of, node)
            tensor = of


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """In order, of nests of lists, tuples and dicts."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


def storage_of(tensor: torch.Tensor) -> int | None:
    """Where a tensor's memory begins, the same for all of its views; None where it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def storage_key(tensor: torch.Tensor) -> Any:
    """Which elements of which memory a tensor is; None where it has none."""
    storage = storage_of(tensor)
    if storage is None:
        return None
    with torch._C.DisableTorchFunction():  # a recorded size would fix the batch size by being hashed
        return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
