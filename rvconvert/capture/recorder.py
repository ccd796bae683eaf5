"""Recording: one real run of a method becomes an fx.Graph that any later run replays."""

from __future__ import annotations

import contextlib
import copy
import itertools
import linecache
import operator
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from rvconvert.capture.traced_number import TracedFloat, TracedInt, ignored, traced_size, untraced
from rvconvert.core.random_variable import RandomVariable, Settings, in_settings, random_variables
from rvconvert.core.registry import Registry
from rvconvert.core.tree import Structure, flatten
from rvconvert.rules.draws import GAUSSIAN_SOURCES, NON_GAUSSIAN
from rvconvert.rules.kinds import Metadata
from rvconvert.rules.shape import setitem

__all__ = ["Recording", "as_class", "intercepted_modules", "record", "unchanged", "unscripted", "user_frame", "where"]

_TENSOR_METHODS = {
    getattr(torch.Tensor, name): name for name in reversed(dir(torch.Tensor)) if callable(getattr(torch.Tensor, name))
}
_TENSOR_PROPERTIES = {
    attribute.__get__: name
    for name in dir(torch.Tensor)
    if hasattr(attribute := getattr(torch.Tensor, name), "__get__") and not callable(attribute)
}
_CONSTANT = itertools.count()
_UNRECORDED_PROPERTIES = frozenset(
    "dtype device ndim layout requires_grad is_cuda is_leaf grad_fn is_sparse is_quantized is_mps is_meta is_nested "
    "is_cpu is_mkldnn is_xpu names _base _version output_nr is_sparse_csr is_ipu is_xla itemsize nbytes".split()
)
_UNRECORDED = frozenset(
    "dim ndimension is_contiguous is_floating_point is_complex element_size get_device stride storage_offset type "
    "is_tensor is_same_size data_ptr untyped_storage storage __len__ __format__ __repr__ __hash__ __deepcopy__ "
    "requires_grad_ retain_grad is_signed __reduce_ex__ is_pinned _is_view __dir__ is_inference "
    "set_ _typed_storage promote_types result_type can_cast get_default_dtype broadcast_shapes".split()
)
_VALUE_READS = frozenset(
    "__bool__ __int__ __index__ __float__ __complex__ tolist numpy __array__ is_nonzero equal allclose __contains__ "
    "unique nonzero".split()
)


@dataclass
class Recording:
    """A method captured as a graph.

    Attributes:
        graph: placeholders are the tensor leaves of the inputs, in order; the output is a flat tuple.
        inputs: structure of the inputs; ``outputs``: structure of the outputs.
        attributes: (module path, attribute) pairs whose values the method sets; they follow the outputs.
        constants: values that no code in the graph makes, by the name it looks them up with on the conversion.
        origins: node -> where it comes from.
        non_gaussian: (distribution, where) for each draw from another distribution that meets a random value.
        obstacles: why the graph cannot stand for the method (empty if it can).
        asks_grad_mode: the method asks whether gradients are on.
        changed: attributes other than tensors that the method sets, which a graph does not.
        fixed: why the batch size is part of the graph (empty if it is not).
    """

    graph: fx.Graph
    inputs: Structure
    outputs: Structure = field(default_factory=lambda: Structure("constant"))
    attributes: list[tuple[str, str]] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    random: set[fx.Node] = field(default_factory=set)
    non_gaussian: list[tuple[str, str]] = field(default_factory=list)
    noise: list[fx.Node] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    asks_grad_mode: bool = False
    changed: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)


def user_frame() -> types.FrameType | None:
    """The innermost frame that is the model's own code: not torch's, not ours."""
    frame = sys._getframe(1)
    candidate: types.FrameType | None = None
    current: types.FrameType | None = frame
    while current is not None:
        filename = current.f_code.co_filename
        if not filename.startswith(_INTERNAL) and not filename.startswith("<"):
            candidate = current
            break
        current = current.f_back
    return candidate


_INTERNAL = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent), contextlib.__file__)


def where(frame: types.FrameType | None) -> tuple[str, str]:
    """``file:line`` and the source line of a frame."""
    if frame is None:
        return "", ""
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{path}:{line}", linecache.getline(path, line).strip()


class _Recorder(TorchFunctionMode):
    """Writes every torch function that runs into the recording, with tensors and sizes as its edges."""

    def __init__(self, root: nn.Module, recording: Recording, registry: Registry) -> None:
        super().__init__()
        self.root = root
        self.recording = recording
        self.graph = recording.graph
        self.registry = registry
        self.nodes: dict[int, fx.Node] = {}
        self.storages: dict[Any, fx.Node] = {}
        self.alive: list[Any] = []
        self.stale: set[int] = set()
        self.paths = {id(module): path for path, module in root.named_modules(remove_duplicate=True)}
        self.tensors = {id(t): path for path, t in [*root.named_parameters(), *root.named_buffers()]}
        self.attributes = _plain_tensor_attributes(root)
        self.stack: list[str] = []
        self.leaf: list[str] | None = None
        self.tainted: set[fx.Node] = set()  # downstream of a draw from another distribution
        self.taint_of: dict[fx.Node, tuple[str, str]] = {}

    # --- values in, nodes out -------------------------------------------------------------------

    def track(self, value: Any, node: fx.Node) -> None:
        """Let ``value``, a tensor or a nest of them, stand for ``node``."""
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
            self.alive.append(value)
            self.stale.discard(id(value))
            node.meta["ndim"] = value.ndim
            key = _storage_key(value)
            if key is not None:
                self.storages[key] = node
        elif isinstance(value, (list, tuple)) or hasattr(value, "_fields"):
            for index, each in enumerate(value):
                if _holds_tensor(each):
                    item = self.add("call_function", operator.getitem, (node, index), {})
                    self.inherit(item, [node])
                    self.track(each, item)
        elif isinstance(value, dict):
            for key, each in value.items():
                if _holds_tensor(each):
                    item = self.add("call_function", operator.getitem, (node, key), {})
                    self.inherit(item, [node])
                    self.track(each, item)

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that made ``tensor``; a parameter, buffer, attribute or constant gets one on first use."""
        if id(tensor) in self.stale:
            self.recording.obstacles.append(f"in-place write through a view, then its base is used: {self.line()}")
        known = self.nodes.get(id(tensor))
        if known is not None:
            return known
        path = self.tensors.get(id(tensor)) or self.attributes.get(id(tensor))
        if path is not None:
            node = self.graph.get_attr(path)
        else:
            key = _storage_key(tensor)
            shared = self.storages.get(key) if key is not None else None
            node = shared if shared is not None else self.constant(tensor)
        self.nodes[id(tensor)] = node
        self.alive.append(tensor)
        return node

    def constant(self, value: Any) -> fx.Node:
        name = f"constant_{next(_CONSTANT)}"
        self.recording.constants[name] = value
        return self.graph.get_attr(f"_rvconvert.constants.{name}")

    def argument(self, value: Any) -> Any:
        """``value`` as an argument of a node."""
        if isinstance(value, (TracedInt, TracedFloat)):
            return value.node
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, torch.Size) or type(value) is tuple or hasattr(value, "_fields"):
            return tuple(self.argument(each) for each in value)
        if isinstance(value, list):
            return [self.argument(each) for each in value]
        if isinstance(value, dict):
            return {key: self.argument(each) for key, each in value.items()}
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, (np.integer, np.floating, np.bool_)):
            return value.item()
        if (
            value is None
            or value is Ellipsis
            or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout))
        ):
            return value
        return self.constant(value)

    def line(self) -> str:
        place, source = where(user_frame())
        return f"{place}: {source}"

    def add(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["where"], node.meta["source"] = where(user_frame())
        node.meta["module"] = self.stack[-1] if self.stack else ""
        return node

    def fixed(self, name: str) -> None:
        if not where(user_frame())[1].startswith("assert"):
            self.recording.fixed.append(self.line())

    def inherit(self, node: fx.Node, sources: Any) -> None:
        """A node is random, or downstream of another distribution's draw, if one of its inputs is."""
        for source in sources:
            if source in self.recording.random:
                self.recording.random.add(node)
            if source in self.taint_of and node not in self.taint_of:
                self.taint_of[node] = self.taint_of[source]

    # --- interception ---------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.leaf is not None:
            self.leaf.append(func)
            return func(*args, **kwargs)
        if func in _TENSOR_PROPERTIES or name == "size":
            return self.property(func, name, args, kwargs)
        plain_args, plain_kwargs = _plain(args), _plain(kwargs)
        if name in _UNRECORDED and not (name == "type" and len(args) + len(kwargs) > 1):
            return func(*plain_args, **plain_kwargs)
        if name == "register_hook":
            self.recording.obstacles.append(f"a hook on a tensor: {self.line()}")
            return func(*plain_args, **plain_kwargs)
        if name in _VALUE_READS:
            return self.read(func, name, plain_args, plain_kwargs)
        if name == "item":
            value = func(*plain_args)
            node = self.add("call_method", "item", (self.argument(args[0]),), {})
            self.inherit(node, node.all_input_nodes)
            return TracedFloat(float(value), node, self.read_float)
        return self.call(func, name, args, kwargs, plain_args, plain_kwargs)

    def read_float(self, name: str) -> None:
        self.recording.obstacles.append(f"Python decides by the value of a tensor: {self.line()}")

    def property(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prop = _TENSOR_PROPERTIES.get(func, "size")
        args, plain = args, _plain(args)
        value = func(*plain, **_plain(kwargs))
        if prop in _UNRECORDED_PROPERTIES:
            return value
        tensor = args[0]
        if prop in ("shape", "size"):

            def make(dim: int, size: int) -> TracedInt:
                node = self.add("call_method", "size", (self.node_of(tensor), dim), {})
                # A recording serves one size of every other dimension, so only the batch's can be fixed by mistake.
                return TracedInt(size, node, self.fixed if dim in (0, -tensor.ndim) else ignored)

            if isinstance(value, torch.Size):
                return traced_size(value, make)
            dim = untraced(args[1] if len(args) > 1 else kwargs["dim"])
            return make(dim, value)
        if prop == "grad":
            return value
        node = self.add("call_function", getattr, (self.node_of(tensor), prop), {})
        self.inherit(node, node.all_input_nodes)
        self.track(value, node)
        return value

    def read(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a tensor goes to Python: harmless in an assertion, else the graph cannot stand for it."""
        value = func(*args, **kwargs)
        frame = user_frame()
        _, source = where(frame)
        inputs = [self.nodes.get(id(a)) for a in args]
        if name == "unique" or name == "nonzero":
            return self.call(func, name, args, kwargs, args, kwargs)
        if not source.startswith("assert") and any(node is not None for node in inputs):
            self.recording.obstacles.append(f"Python decides by the value of a tensor: {self.line()}")
        elif any(id(a) in self.tensors for a in args):
            self.recording.obstacles.append(f"Python decides by the value of a parameter or buffer: {self.line()}")
        return value

    def call(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: Any, plain_args: tuple[Any, ...], plain_kwargs: Any
    ) -> Any:
        mutable = _tensors(plain_args, plain_kwargs)
        versions = [_version(x) for x in mutable]
        node_args = tuple(self.argument(a) for a in args)
        node_kwargs = {k: self.argument(v) for k, v in kwargs.items()}
        if func is torch.Tensor.new and len(args) == 2 and isinstance(args[1], torch.Size):
            # new(Size) makes that size, new(tuple) a tensor of those values
            node_args = (node_args[0], self.add("call_function", torch.Size, (list(node_args[1]),), {}))
        result = func(*plain_args, **plain_kwargs)
        if result is NotImplemented:
            return result
        mutated = [x for x, v in zip(mutable, versions, strict=True) if _version(x) != v]
        node = self.node_for(func, name, node_args, node_kwargs, bool(mutated))
        if func in GAUSSIAN_SOURCES:
            self.recording.random.add(node)
            self.recording.noise.append(node)
            node.meta["noise"] = func
        elif func in NON_GAUSSIAN:
            self.taint_of[node] = (NON_GAUSSIAN[func], self.line())
        self.finish(node, result, mutated)
        return result

    def node_for(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], mutates: bool) -> fx.Node:
        """The node of a call; an in-place call on a random value becomes its functional twin."""
        random = self.any_random(func, args, kwargs)
        if random and func is torch.Tensor.__setitem__:
            return self.add("call_function", setitem, args, kwargs)
        if random and mutates and func not in GAUSSIAN_SOURCES:
            twin = _functional(func, name)
            if twin is not None:
                func = twin
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        if func in (torch.Tensor.mean, torch.Tensor.var, torch.Tensor.std):
            return self.add("call_function", getattr(torch, func.__name__), args, kwargs)
        if func in _TENSOR_METHODS:
            return self.add("call_method", _TENSOR_METHODS[func], args, kwargs)
        return self.add("call_function", func, args, kwargs)

    def any_random(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        found: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), found.append)
        return func in GAUSSIAN_SOURCES or any(n in self.recording.random for n in found)

    def finish(self, node: fx.Node, result: Any, mutated: list[torch.Tensor]) -> None:
        """Let the results, and what the call changed in place, stand for the node."""
        if not self.asks_plainly(node):
            self.inherit(node, node.all_input_nodes)
        random = node in self.recording.random
        if node in self.taint_of and isinstance(result, torch.Tensor) and result.dtype == torch.bool:
            del self.taint_of[node]  # a mask drawn beside the model is augmentation, as dropout is
        if not torch.is_grad_enabled() and not mutated and isinstance(result, torch.Tensor) and result.is_floating_point():
            detached = self.add("call_method", "detach", (node,), {})
            self.inherit(detached, [node])
            node = detached
        for tensor in mutated:
            if random:
                self.write(tensor, node)
            elif node in self.taint_of:
                self.taint_of.setdefault(self.node_of(tensor), self.taint_of[node])
        if not (random and any(result is tensor for tensor in mutated)):
            self.track(result, node)

    def asks_plainly(self, node: fx.Node) -> bool:
        """True for a question about shape, type or finiteness: its answer is not random."""
        function = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
        rule = self.registry.find(function) if callable(function) else None
        return rule is not None and isinstance(rule.kind, Metadata)

    def write(self, tensor: torch.Tensor, node: fx.Node) -> None:
        """An in-place write of a random value: later uses of the tensor see the node."""
        path = self.tensors.get(id(tensor))
        if path is not None:
            self.add("call_function", assign_mean, (self.graph.get_attr(path), node), {})
        key = _storage(tensor)
        for other in self.alive:
            if isinstance(other, torch.Tensor) and other is not tensor and _storage(other) == key and key is not None:
                self.stale.add(id(other))
        self.track(tensor, node)

    # --- modules --------------------------------------------------------------------------------

    def module_call(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if path is None or self.leaf is not None:
            return original(module, *args, **kwargs)
        if not (path and self.is_leaf(module)):
            if path and (module._forward_hooks or module._forward_pre_hooks):
                self.recording.obstacles.append(f"a hook on {path}, which a graph does not call")
            self.stack.append(path)
            try:
                return original(module, *args, **kwargs)
            finally:
                self.stack.pop()
        plain_args, plain_kwargs = _plain(args), _plain(kwargs)
        mutable = _tensors(plain_args, plain_kwargs)
        versions = [_version(x) for x in mutable]
        node_args = tuple(self.argument(a) for a in args)
        node_kwargs = {k: self.argument(v) for k, v in kwargs.items()}
        self.leaf = []
        try:
            result = original(module, *plain_args, **plain_kwargs)
        finally:
            functions, self.leaf = self.leaf, None
        mutated = [x for x, v in zip(mutable, versions, strict=True) if _version(x) != v]
        self.stack.append(path)
        rule = self.registry.find_module(type(module))
        if rule is not None and rule.body is not None:
            where_it_is = (self.graph.get_attr("_rvconvert.settings"), self.graph.get_attr(path))
            node = self.add("call_function", call_by_rule, (*where_it_is, *node_args), node_kwargs)
        else:
            node = self.add("call_module", path, node_args, node_kwargs)
        node.meta["functions"] = functions
        node.meta["module_type"] = type(module)
        node.meta["learned"] = any(True for _ in module.parameters())
        self.finish(node, result, mutated)
        for tensor in mutated:  # a plain in-place module: the same object stands for its result
            self.track(tensor, node)
        self.stack.pop()
        return result

    def is_leaf(self, module: nn.Module) -> bool:
        if "forward" in module.__dict__ or isinstance(module, _CONTAINERS):
            return False
        rule = self.registry.find_module(type(module))
        if rule is not None and rule.body is not None:
            return True
        own = type(module).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))
        children = [name for name, _ in module.named_children() if name != "parametrizations"]
        parametrized = type(module).__name__.startswith("Parametrized") and hasattr(module, "parametrizations")
        own = own or (parametrized and type(module).__mro__[1].__module__.startswith("torch.nn.modules"))
        return own and (not children or isinstance(module, nn.MultiheadAttention))


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.DataParallel)


def call_by_rule(settings: Settings, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module whose class has a rule of its own: by the rule where an argument is random."""
    if not settings.needs_rules or not random_variables(args, kwargs):
        return module(*args, **kwargs)
    rule = settings.registry.find_module(type(module))
    assert rule is not None and rule.body is not None
    return in_settings(rule.body(module, *args, **kwargs), settings)


def assign_mean(target: torch.Tensor, value: Any) -> None:
    """Write the mean of a random variable, or a plain value, into a buffer."""
    with torch.no_grad():
        target.copy_(getattr(value, "mean", value) if not isinstance(value, torch.Tensor) else value)


def _functional(func: Any, name: str) -> Any:
    """The function that an in-place one is the twin of: ``Tensor.add_`` -> ``Tensor.add``."""
    if name.startswith("__i") and name.endswith("__") and hasattr(operator, name.strip("_")[1:]):
        return getattr(torch.Tensor, f"__{name[3:]}", None)
    if name.endswith("_") and not name.endswith("__"):
        for namespace in (torch.Tensor, torch, torch.nn.functional):
            if getattr(namespace, name, None) is func:
                return getattr(namespace, name[:-1], None)
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, (TracedInt, TracedFloat)):
        return untraced(value)
    if isinstance(value, torch.Size):
        return torch.Size([untraced(v) for v in value])
    if type(value) in (tuple, list):
        return type(value)(_plain(v) for v in value)
    if type(value) is dict:
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice(untraced(value.start), untraced(value.stop), untraced(value.step))
    return value


def _tensors(*values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(*value)
        elif isinstance(value, dict):
            found += _tensors(*value.values())
    return found


def _holds_tensor(value: Any) -> bool:
    return bool(_tensors(value))


def _version(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return 0


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _storage_key(tensor: torch.Tensor) -> Any:
    storage = _storage(tensor)
    if storage is None:
        return None
    with torch._C.DisableTorchFunction():  # a recorded size would fix the batch size by being hashed
        return (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _plain_tensor_attributes(root: nn.Module) -> dict[int, str]:
    """Tensors kept as plain attributes of modules, or of objects that modules keep, by id."""
    found: dict[int, str] = {}

    def visit(value: Any, path: str, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), path)
        elif depth and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
            for name, each in vars(value).items():
                if name.isidentifier():
                    visit(each, f"{path}.{name}", depth - 1)

    for prefix, module in root.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                visit(value, f"{prefix}.{name}" if prefix else name, 3)
    return found


@contextlib.contextmanager
def intercepted_modules(handler: Callable[..., Any]) -> Iterator[None]:
    """Within: every module call goes through ``handler(original, module, args, kwargs)``."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handler(original, module, args, kwargs)

    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]


@contextlib.contextmanager
def unscripted() -> Iterator[None]:
    """Within: ``torch.jit.script`` functions run as the Python they were made of, and wrappers of C are left out."""
    script_function = torch.jit.ScriptFunction
    original = script_function.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        python = getattr(self, "_torchdynamo_inline", None)
        return python(*args, **kwargs) if python is not None else original(self, *args, **kwargs)

    script_function.__call__ = call  # type: ignore[method-assign]
    # A tensor is a Variable since torch 0.4; the class would make another object of it.
    torch.autograd.Variable.__new__ = lambda cls, data=None, *args, **kwargs: data  # type: ignore[method-assign,assignment]
    validate = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        script_function.__call__ = original  # type: ignore[method-assign]
        del torch.autograd.Variable.__new__
        torch.distributions.Distribution.set_default_validate_args(validate)


@contextlib.contextmanager
def as_class(model: nn.Module, plain_class: type[nn.Module]) -> Iterator[None]:
    """Within: a converted model is of its plain class, so that its own code sees no converted method."""
    converted = type(model)
    model.__class__ = plain_class
    try:
        yield
    finally:
        model.__class__ = converted


@contextlib.contextmanager
def told_grad_mode(recording: Recording, enabled: bool) -> Iterator[None]:
    """Within: a model that asks whether gradients are on is told ``enabled``, and that it asked is noted."""
    original = torch.is_grad_enabled

    def asked() -> bool:
        if sys._getframe(1).f_code.co_filename.startswith(_INTERNAL):
            return original()
        recording.asks_grad_mode = True
        return enabled

    torch.is_grad_enabled = asked
    try:
        yield
    finally:
        torch.is_grad_enabled = original


@contextlib.contextmanager
def unchanged(root: nn.Module) -> Iterator[None]:
    """Within: runs may update buffers, attributes and the random state; after, all is as it was."""
    attributes = {module: dict(vars(module)) for module in root.modules()}
    containers = {m: {k: copy.copy(v) for k, v in held.items() if _is_record(k, v)} for m, held in attributes.items()}
    buffers = {module: dict(module._buffers) for module in attributes}
    values = {b: b.detach().clone() for b in root.buffers() if not b.is_meta}
    devices = sorted({p.device.index or 0 for p in root.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in values.items():
                if buffer._version and not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
            for key, value in containers[module].items():
                held = vars(module)[key]
                if isinstance(held, list):
                    held[:] = value
                else:
                    held.clear()
                    held.update(value)
            module._buffers.clear()
            module._buffers.update(buffers[module])


def record(
    root: nn.Module,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    registry: Registry,
    *,
    grad_mode: bool = True,
) -> tuple[Recording, Any]:
    """Run ``method(*args, **kwargs)`` once and record it; returns the recording and the method's result.

    A ``RandomVariable`` among the arguments stands in as its mean and marks that input as random. The model
    is left as it was: buffers, attributes and the random state are put back.
    """
    leaves, structure = flatten((args, kwargs))
    recording = Recording(fx.Graph(), structure)
    with unchanged(root), torch.enable_grad():
        before = {module: dict(vars(module)) for module in root.modules()}
        sizes = {(m, k): len(v) for m, held in before.items() for k, v in held.items() if _is_record(k, v)}
        buffers = {module: dict(module._buffers) for module in before}
        recorder = _Recorder(root, recording, registry)
        values = []
        for index, leaf in enumerate(own_copies(leaves)):
            node = recording.graph.placeholder(f"input_{index}")
            node.meta["where"] = node.meta["source"] = node.meta["module"] = ""
            if isinstance(leaf, RandomVariable):
                recording.random.add(node)
                leaf = leaf.mean.clone()
            values.append(leaf)
            recorder.track(leaf, node)
        args, kwargs = structure.build(iter(values))
        with intercepted_modules(recorder.module_call), unscripted(), told_grad_mode(recording, grad_mode), recorder:
            result = method(*args, **kwargs)
        _finish(recorder, result, before, buffers, sizes)
    return recording, result


def own_copies(leaves: list[Any]) -> list[Any]:
    """The leaves of a call with tensors that a run on the side may write to; what is one stays one."""
    made: dict[int, Any] = {}
    for leaf in leaves:
        if isinstance(leaf, RandomVariable):
            made[id(leaf)] = leaf.snapshot()
        elif type(leaf) is torch.Tensor and not leaf.is_meta:
            made[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
    return [made.get(id(leaf), leaf) for leaf in leaves]


def _is_record(name: str, value: Any) -> bool:
    """A list or dict that a model may keep notes in (not a table of torch's own)."""
    return isinstance(value, (list, dict)) and not name.startswith("_")


def _finish(recorder: _Recorder, result: Any, before: Any, buffers: Any, sizes: Any) -> None:
    """Write the outputs: the method's results, then the attributes that it set."""
    recording = recorder.recording
    is_leaf = lambda x: isinstance(x, (torch.Tensor, TracedInt, TracedFloat))  # noqa: E731
    leaves, recording.outputs = flatten(result, is_leaf)
    for module, held in before.items():
        path = recorder.paths[id(module)]
        for name, value in vars(module).items():
            if name in ("_buffers", "_parameters", "_modules"):
                continue
            old = held.get(name, recorder)
            if value is not old and isinstance(value, (torch.Tensor, TracedInt, TracedFloat)):
                recording.attributes.append((path, name))
                leaves.append(value)
            elif (value is not old and not _equal(value, old)) or (
                _is_record(name, value) and sizes.get((module, name)) != len(value)
            ):
                recording.changed.append(f"{type(module).__name__}.{name}")
        for name, value in module._buffers.items():
            if value is not buffers[module].get(name) and value is not None:
                recording.attributes.append((path, name))
                leaves.append(value)
    outputs = tuple(recorder.argument(leaf) for leaf in leaves)
    recording.graph.output(outputs)
    recording.non_gaussian = non_gaussian_ancestors([n for n in outputs if isinstance(n, fx.Node)], recorder.taint_of)


def non_gaussian_ancestors(outputs: list[fx.Node], taint: dict[fx.Node, tuple[str, str]]) -> list[tuple[str, str]]:
    """The draws from other distributions that the outputs depend on, each once."""
    return list({taint[n]: None for n in _ancestors(outputs) if n in taint})


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return seen


IGNORED_INSIDE = _UNRECORDED | _UNRECORDED_PROPERTIES | {"__get__", "size", "__set__"}
