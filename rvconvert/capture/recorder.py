"""Writing every torch function that a run calls into a recording's graph."""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from rvconvert.capture.data_sizes import COUNTS, DataSizes, splits
from rvconvert.capture.frames import is_of_the_model, runs, user_frame, where
from rvconvert.capture.graph_calls import (
    apply_function,
    call_by_rule,
    call_hooks,
    call_pre_hooks,
)
from rvconvert.capture.intercept import Handler
from rvconvert.capture.module_state import is_output, own_state
from rvconvert.capture.numpy_draws import FROM_ARRAYS
from rvconvert.capture.python_state import (
    ARGUMENT,
    GENERATORS,
    NUMBERS,
    Moving,
    Place,
    ReadByName,
    is_watched,
)
from rvconvert.capture.recording import Kept, Recording
from rvconvert.capture.surroundings import is_log, is_surrounding, reads_its_own
from rvconvert.capture.tensor_nodes import TRANSFORM, TensorNodes, storage_of, tensors_in
from rvconvert.capture.traced_number import TracedFloat, TracedInt, ignored, traced_size, untraced
from rvconvert.core.random_variable import is_in_place
from rvconvert.core.tree import flatten
from rvconvert.errors import TracingError
from rvconvert.rules.calls import out_of_place
from rvconvert.rules.draws import CATEGORICAL, DRAWS, one_hot_categorical_like
from rvconvert.rules.kinds import Metadata, Read
from rvconvert.rules.shape import setitem

if TYPE_CHECKING:
    from collections.abc import Callable

    from rvconvert.core.registry import Registry, Rule

_TENSOR_METHODS = {
    getattr(torch.Tensor, name): name for name in reversed(dir(torch.Tensor)) if callable(getattr(torch.Tensor, name))
}
_TENSOR_PROPERTIES = {
    attribute.__get__: name
    for name in dir(torch.Tensor)
    if hasattr(attribute := getattr(torch.Tensor, name), "__get__") and not callable(attribute)
}
_LIKE_ANOTHER = frozenset("expand_as view_as reshape_as type_as to".split())  # of which the second argument is asked for no value


class Recorder(TensorNodes, TorchFunctionMode, Handler):
    """Writes every torch function that runs into the recording, with tensors and sizes as its edges."""

    def __init__(
        self,
        root: nn.Module,
        recording: Recording,
        registry: Registry,
        *,
        told: bool | None,
        reported: float,
        moving: Moving,
        keeps_draws: bool,
    ) -> None:
        super().__init__(root, recording, registry)
        self.told = told  # what a model that asks for the gradient mode hears; None: what is so
        self.reported = reported
        self.moving = moving
        self.data_sizes = DataSizes()
        self.sizes_asked: list[tuple[list[fx.Node], fx.Node, str]] = []  # of these: nodes, what decides one, the place
        self.paths = {id(module): path for path, module in root.named_modules(remove_duplicate=True)}
        self.numbers = {id(module): number for number, module in enumerate(root.modules())}
        self.arrays: list[tuple[np.ndarray, bytes, str]] = []  # of a random variable's memory, what was in it, the place
        self.began = {id(module): own_state(module) for module in root.modules()}
        self.leaf: list[Any] | None = None
        self.keeps_draws = keeps_draws
        self.python = ReadByName(is_of_the_model, lambda: self.leaf is None)
        self.said: list[tuple[Kept, list[Any]]] = []

    def check_arrays(self) -> None:
        """NumPy has written to no random variable: no graph would know of it."""
        for array, before, place in self.arrays:
            if array.tobytes() != before:
                raise TracingError(f"{place}: NumPy writes to the memory of a tensor; write by torch, or to a copy of the array")

    def fixed(self, name: str) -> None:
        """Told where Python fixes a batch size; an assertion or torch's own check decides nothing but an error."""
        if not where(user_frame())[1].startswith("assert") and not runs("torch/distributions", "_validate_sample"):
            self.recording.fixed.append(self.line())

    # --- interception ---------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.leaf is not None:
            self.leaf.append(func)
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _UNEQUAL and len(args) == 2 and args[0] is args[1]:  # x != x, of old
            func, name, args = torch.isnan, "isnan", args[:1]
        if func in _TENSOR_PROPERTIES or name == "size":
            return self.property(func, args, kwargs)
        if name == "numel" and args and args[0].ndim and not args[0].is_floating_point():  # as torch counts a permutation
            return functools.reduce(operator.mul, self.size(args[0], args[0].shape, None))
        rule = self.registry.find(func)
        if rule is not None and isinstance(rule.kind, Read) and name != "item":
            return self.read(func, rule, args, kwargs)
        if func is torch.broadcast_tensors and args and not isinstance(args[0], (list, tuple)):
            return self.broadcast(args)
        if self.numpy_drawn and func in FROM_ARRAYS and args and isinstance(args[0], np.ndarray):
            result = func(*_plain(args), **_plain(kwargs))
            self.node_of(result)
            return result
        if name == "item":
            value = func(*_plain(args))
            node = self.add("call_method", "item", (self.argument(args[0]),), {})
            node.meta["rule"] = rule
            self.inherit(node)
            if isinstance(value, bool) or (isinstance(value, int) and node not in self.recording.depends):
                self.note_read(node, name)  # it may become a length or an index, which Python takes without a word
                return value
            if not isinstance(value, (int, float)):
                return value
            traced = TracedInt if isinstance(value, int) else TracedFloat
            return traced(value, node, lambda name: self.note_read(node, name))
        return self.call(func, name, rule, args, kwargs)

    def property(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An attribute of a tensor: a traced size, a tensor made of it, or what Python may know."""
        prop = _TENSOR_PROPERTIES.get(func, "size")
        value = func(*_plain(args), **_plain(kwargs))
        tensor = args[0]
        if prop in ("shape", "size"):
            return self.size(tensor, value, untraced(args[1] if len(args) > 1 else kwargs.get("dim")))
        if not isinstance(value, torch.Tensor) or prop in ("grad", "_base"):
            return value
        node = self.add("call_function", getattr, (self.node_of(tensor), prop), {})
        node.meta["rule"], node.meta["function"] = self.registry.find(func), func
        self.inherit(node)
        self.track(value, node)
        return value

    def size(self, tensor: torch.Tensor, value: Any, dim: int | None) -> Any:
        """One size of a tensor, or all of them, as numbers that a graph knows."""
        of, asked, deciding = self.node_of(tensor), [], []

        def make(dim: int, size: int) -> TracedInt:
            node = self.add("call_method", "size", (of, dim), {})
            asked.append(node)
            place = dim % tensor.ndim
            by = self.data_sizes.deciding(of, place)
            if by is not None:
                deciding.append(by)
                return TracedInt(size, node, lambda name: self.note_read(by, name))
            # A recording serves one size of every other dimension, so only the batch's can be fixed by mistake.
            return TracedInt(size, node, self.fixed if place == 0 else ignored)

        made = traced_size(value, make) if dim is None else make(dim, value)
        if deciding:
            frame = user_frame()
            if frame is not None and "range" in frame.f_code.co_names:  # which takes an int without a word
                self.note_read(deciding[0], "range")
            self.sizes_asked.append((asked, deciding[0], self.line()))
        return made

    def broadcast(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Each by itself, or a plain scale would be as random as the location beside it."""
        with torch._C.DisableTorchFunction():
            shapes = [tuple(t.shape) for t in tensors]
            whole = torch.broadcast_shapes(*shapes)
        with self:
            size = [
                next(t.shape[-d] for t, shape in zip(tensors, shapes, strict=True) if len(shape) >= d and shape[-d] == whole[-d])
                for d in range(len(whole), 0, -1)
            ]
            return tuple(t.expand(size) for t in tensors)

    def note_read(self, node: fx.Node | None, name: str) -> None:
        """Python knows the value of a tensor from here on; an assertion or torch's own check decides nothing but an error."""
        if not where(user_frame())[1].startswith("assert") and not runs("torch/distributions"):
            self.recording.reads.append((node, self.line(), name not in _REPORTS))

    def note_size(self, node: fx.Node | None, name: str) -> None:
        """Python knows how many rows a value has: it knows the values that decide that, if any do."""
        deciding = None if node is None else self.data_sizes.deciding(node)
        if deciding is not None:
            self.note_read(deciding, name)

    def read(self, func: Any, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a tensor goes to Python, or into the shape of a result."""
        value = func(*_plain(args), **_plain(kwargs))
        if self.reported != 1 and getattr(func, "__name__", "") in _REPORTS:
            return _times(value, self.reported)
        tensors = tensors_in(args, kwargs)
        if tensors_in(value):
            node = self.node_for(func, self.argument(args), self.argument(kwargs), False)
            node.meta["rule"] = rule
            self.data_sizes.note(node, rule.name, _plain(args), kwargs)
            self.inherit(node)
            self.track(value, node)
            return value
        known = [self.nodes[id(t)] for t in tensors if id(t) in self.nodes]
        random = [node for node in known if node in self.recording.depends]
        if random and isinstance(value, np.ndarray):
            self.arrays.append((value, value.tobytes(), self.line()))
        if known or any(id(t) in self.tensors or id(t) in self.attributes for t in tensors):
            self.note_read(random[0] if random else known[0] if known else None, getattr(func, "__name__", ""))
        return value

    def call(self, func: Any, name: str, rule: Rule | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function and write it down, if its result or its effect is a tensor's."""
        plain_args, plain_kwargs = _plain(args), _plain(kwargs)
        if name == "__set__":  # x.data = y: torch gives no name to it that a graph could call
            target, value = plain_args
            self.node_of(target)
            own = self.homes.get(storage_of(target) or 0, (None,))[0] is target and not isinstance(target, nn.Parameter)
            if own and (target.shape, target.dtype) == (value.shape, value.dtype):
                with self, torch.no_grad():
                    target.copy_(value)
                return None
            self.recording.once.append(f"the data of a tensor is set: {self.line()}")
            result = func(*plain_args, **plain_kwargs)
            if isinstance(plain_args[0], nn.Parameter) and id(plain_args[0]) in self.tensors:
                self.recording.initializes = True
                self.parameters.add(storage_of(plain_args[0]))
            return result
        mutable = tensors_in(plain_args, plain_kwargs)
        versions = [_version(x) for x in mutable]
        target = plain_args[0] if plain_args and is_in_place(func, plain_kwargs) else None
        writes = False
        if isinstance(target, torch.Tensor) and storage_of(target) in self.parameters:
            writes = True
            if runs("torch/optim"):
                raise TracingError(
                    f"an optimizer steps inside the method: {self.line()}; step it in the training loop, and convert the method "
                    "that encodes, samples and decodes: methods=(...)"
                )
            self.recording.overwritten.append((target.detach(), target.detach().clone()))
        else:
            for each in _targets(name, target, plain_args, plain_kwargs):
                self.save(each)
        result = func(*plain_args, **plain_kwargs)
        if result is NotImplemented:
            return result
        mutated = [x for x, v in zip(mutable, versions, strict=True) if _version(x) != v]
        if name == "register_hook":
            self.recording.once.append(f"a hook on a tensor: {self.line()}")
        elif not mutated and (not tensors_in(result) or name == "__deepcopy__"):
            if name in COUNTS:
                self.note_size(self.nodes.get(id(args[0])), name)
            return result  # a question whose answer is no tensor
        if func is torch.Tensor.__setitem__ and self.is_written_back(*plain_args):
            return result
        node_args = tuple(self.argument(a) for a in args)
        node_kwargs = {k: self.argument(v) for k, v in kwargs.items()}
        if name in _LIKE_ANOTHER:
            node_args = (*node_args[:1], *map(self.like, node_args[1:]))
            node_kwargs = {k: self.like(v) for k, v in node_kwargs.items()}
        if mutated and not torch._C.is_grad_enabled() and not any(x.requires_grad for x in mutated):
            rest = fx.node.map_arg((node_args[1:], node_kwargs), self.without_gradient)
            node_args, node_kwargs = (*node_args[:1], *rest[0]), rest[1]
        held = mutated and not torch._C.is_grad_enabled() and isinstance(target, nn.Parameter) and target.requires_grad
        if held:  # the parameter stays the leaf that it is, with other numbers
            node_args = (self.detached(node_args[0]), *node_args[1:])
        if func is torch.Tensor.new and len(args) == 2 and isinstance(args[1], torch.Size):
            # new(Size) makes that size, new(tuple) a tensor of those values
            node_args = (node_args[0], self.add("call_function", torch.Size, (list(node_args[1]),), {}))
        if (
            func in (torch.Tensor.copy_, torch.Tensor.fill_)
            and mutated
            and isinstance(node_args[1], fx.Node)
            and node_args[1] in self.recording.depends
        ):
            func, node_args, node_kwargs = torch.Tensor.expand_as, (node_args[1], node_args[0]), {}
            rule = self.registry.find(func)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            fx.node.map_arg((node_args, node_kwargs), self.refuse_random)
        probs = self.categories(node_args[0]) if name == "one_hot" and node_args else None
        if probs is not None and probs.meta["shape"][-1] == result.shape[-1]:
            func, rule, node_args, node_kwargs = one_hot_categorical_like, None, (node_args[0], probs), {}
        draw = DRAWS.get(func)
        node = self.node_for(func, node_args, node_kwargs, bool(mutated and draw is None))
        node.meta["rule"], node.meta["function"] = rule, func
        node.meta["mutates"] = bool(mutated)
        self.data_sizes.note(node, name, plain_args, plain_kwargs)
        if splits(name, plain_args, plain_kwargs):
            self.note_size(node, name)
        if writes:
            self.inherit(node)
            if node not in self.recording.depends:
                self.recording.writes.append(node)
        if draw is not None:
            node.meta["draw"] = draw
            self.recording.draws.append(node)
            self.recording.depends.add(node)
            seeded = self.python.seeds or plain_kwargs.get("generator") is not None
            if isinstance(result, torch.Tensor) and (seeded or self.keeps_draws):
                self.recording.drawn[node] = result.detach().clone()
        if not held or node in self.recording.depends:
            self.finish(node, result, mutated)
        if not mutated and (name in _RESHAPES or func is torch.Tensor.__getitem__):
            self.note_view(plain_args[0], result, None if name in _RESHAPES else node_args[1])
        return result

    def categories(self, index: fx.Node) -> fx.Node | None:
        """The probabilities that an index was drawn from, one of each row."""
        while "draw" not in index.meta:
            name = getattr(index.meta.get("rule"), "name", "")
            column = name == "getitem" and index.args[1] == (slice(None), 0)
            if not (column or name in _KEEPS_ROWS) or not isinstance(index.args[0], fx.Node):
                return None
            index = index.args[0]
        count = index.args[1] if len(index.args) > 1 else index.kwargs.get("num_samples")
        probs = index.args[0] if index.args else None
        return probs if index.meta["draw"].law is CATEGORICAL and count == 1 and isinstance(probs, fx.Node) else None

    def refuse_random(self, node: fx.Node) -> fx.Node:
        """A transform of torch.func gives each value more dimensions than its node has."""
        if node in self.recording.depends:
            raise TracingError(TRANSFORM.format(self.line()))
        return node

    def like(self, value: Any) -> Any:
        """What is asked of a random value as for its shape and type, in its place: the answer is not random."""
        if not (isinstance(value, fx.Node) and value in self.recording.depends):
            return value
        asked = self.add("call_function", torch.empty_like, (value,), {})
        asked.meta["rule"] = self.registry.find(torch.empty_like)
        return asked

    def node_for(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mutates: bool) -> fx.Node:
        """The node of a call; an in-place call on what may be random becomes its functional twin."""
        found: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), found.append)
        if mutates and any(n in self.recording.depends for n in found):
            if func is torch.Tensor.__setitem__:
                return self.add("call_function", setitem, args, kwargs)
            func = out_of_place(func)
            kwargs = {k: v for k, v in kwargs.items() if k != "inplace"}
        if func in (torch.Tensor.mean, torch.Tensor.var, torch.Tensor.std):  # a random variable's mean is its moment
            return self.add("call_function", getattr(torch, func.__name__), args, kwargs)
        if func in _TENSOR_METHODS:
            return self.add("call_method", _TENSOR_METHODS[func], args, kwargs)
        return self.add("call_function", func, args, kwargs)

    def finish(self, node: fx.Node, result: Any, mutated: list[torch.Tensor]) -> None:
        """Let the results, and what the call changed in place, stand for the node."""
        rule = node.meta.get("rule")
        if rule is None or not isinstance(rule.kind, Metadata):  # the answer to a question about shape is not random
            self.inherit(node)
        depends = node in self.recording.depends
        if not torch._C.is_grad_enabled():
            if not mutated and isinstance(result, torch.Tensor):
                self.track(result, node)
                node = self.detached(node) if result.is_floating_point() else node
            elif not mutated and tensors_in(result):
                self.track(result, node)
                for each in tensors_in(result):
                    if each.is_floating_point():
                        self.track(each, self.detached(self.nodes[id(each)]))
                return
        if depends:
            for tensor in {storage_of(x) or id(x): x for x in reversed(mutated)}.values():  # of views, the one that was written
                self.write(tensor, node)
        if not (depends and any(result is tensor for tensor in mutated)):
            self.track(result, node)

    def without_gradient(self, node: fx.Node) -> fx.Node:
        """A value that is written where gradients are off."""
        return self.detached(node) if node.meta.get("requires_grad") else node

    # --- modules --------------------------------------------------------------------------------

    def module_call(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """A module of torch's own, or one with a rule, is one node; any other is opened."""
        path = self.paths.get(id(module))
        if path is None or self.leaf is not None:
            return original(module, *args, **kwargs)
        if path and (module._backward_hooks or module._backward_pre_hooks):
            self.recording.backward_hooks.append(path)
        if path and self.is_leaf(module):
            return self.leaf_call(original, module, path, args, kwargs)
        hooks = bool(path and (module._forward_hooks or module._forward_pre_hooks))
        self.stack.append(path)
        try:
            if not hooks:
                return original(module, *args, **kwargs)
            at = self.graph.get_attr(path)
            args, kwargs = self.effect(call_pre_hooks, (module, args, kwargs), (at, self.argument(args), self.argument(kwargs)))
            result = module.forward(*args, **kwargs)
            given = (at, self.argument(args), self.argument(kwargs), self.argument(result))
            return self.effect(call_hooks, (module, args, kwargs, result), given)
        finally:
            self.stack.pop()

    def effect(self, function: Any, args: tuple[Any, ...], node_args: tuple[Any, ...]) -> Any:
        """Run a function whose insides are not recorded; what it returns stands for its node."""
        self.leaf = []
        try:
            result = function(*_plain(args))
        finally:
            self.leaf = None
        node = self.add("call_function", function, node_args, {})
        node.meta["mutates"] = node.meta["part"] = True
        self.inherit(node)
        self.track(result, node)
        return result

    def leaf_call(self, original: Callable[..., Any], module: nn.Module, path: str, args: tuple[Any, ...], kwargs: Any) -> Any:
        """A module that stands as one node."""
        plain_args, plain_kwargs = _plain(args), _plain(kwargs)
        mutable = tensors_in(plain_args, plain_kwargs)
        versions = [_version(x) for x in mutable]
        node_args = tuple(self.argument(a) for a in args)
        node_kwargs = {k: self.argument(v) for k, v in kwargs.items()}
        self.leaf = []
        try:
            result = original(module, *plain_args, **plain_kwargs)
        finally:
            functions, self.leaf = self.leaf, None
        mutated = [x for x, v in zip(mutable, versions, strict=True) if _version(x) != v]
        if _is_sharded(module) and any(DRAWS.get(function) for function in functions):
            raise TracingError(f"{path} is sharded by itself and draws: draw outside of it, or shard the whole model alone")
        self.stack.append(path)
        rule = self.registry.find_module(type(module))
        opaque = isinstance(module, torch.jit.ScriptModule) or (rule is not None and rule.body is not None)
        if opaque:
            at = (self.graph.get_attr("_rvconvert.settings"), self.graph.get_attr(path))
            node = self.add("call_function", call_by_rule, (*at, *node_args), node_kwargs)
        else:
            node = self.add("call_module", path, node_args, node_kwargs)
        inner = [r for f in dict.fromkeys(functions) if (r := self.registry.find(f)) and not isinstance(r.kind, (Metadata, Read))]
        node.meta["rule"] = rule or (inner[0] if len(inner) == 1 else None)
        node.meta["functions"] = functions
        node.meta["module_type"] = type(module)
        node.meta["learned"] = any(True for _ in module.parameters())
        node.meta["rows"] = getattr(module, "num_embeddings", 0)
        self.finish(node, result, mutated)
        for tensor in mutated:  # a plain in-place module: the same object stands for its result
            self.track(tensor, node)
        self.stack.pop()
        return result

    def is_leaf(self, module: nn.Module) -> bool:
        """True for torch's own layers, scripted modules, sharded ones, and modules whose class has a rule."""
        if isinstance(module, torch.jit.ScriptModule):
            return True
        if _is_sharded(module):
            return True
        if "forward" in module.__dict__ or isinstance(module, _CONTAINERS):
            return False
        if own_state(module) != self.began[id(module)]:  # by functional_call, by eval(), perhaps for this call alone
            return False
        rule = self.registry.find_module(type(module))
        if rule is not None and rule.body is not None:
            return True
        own = type(module).__module__.startswith(("torch.nn.modules", "torch.ao.nn"))
        children = [name for name, _ in module.named_children() if name != "parametrizations"]
        parametrized = type(module).__name__.startswith("Parametrized") and hasattr(module, "parametrizations")
        own = own or (parametrized and type(module).__mro__[1].__module__.startswith("torch.nn.modules"))
        return own and (not children or isinstance(module, nn.MultiheadAttention))

    def function_call(self, original: Callable[..., Any], function: type, args: tuple[Any, ...]) -> Any:
        """A ``torch.autograd.Function`` is one node, so that its own backward is kept."""
        if self.leaf is not None or not tensors_in(args):
            return original(*args)
        draw = DRAWS.get(torch._sample_dirichlet) if function.__name__ == "_Dirichlet" else None  # torch draws inside it
        plain_args = _plain(args)
        mutable = tensors_in(plain_args)
        versions = [_version(x) for x in mutable]
        node_args = (self.graph.get_attr("_rvconvert.settings"), self.constant(function), *map(self.argument, args))
        self.leaf = []
        try:
            result = original(*plain_args)
        finally:
            self.leaf = None
        node = self.add("call_function", apply_function, node_args, {})
        node.meta["function"] = function
        if draw is not None:
            node.meta["draw"] = draw
            self.recording.draws.append(node)
            self.recording.depends.add(node)
        self.finish(node, result, [x for x, v in zip(mutable, versions, strict=True) if _version(x) != v])
        return result

    def function_forward(self, original: Callable[..., Any], function: type, args: tuple[Any, ...]) -> Any:
        """The same seen from inside its forward, which runs without gradients though its node has them."""

        def without_gradients(*given: Any) -> Any:
            with torch.no_grad():
                return original(*given)

        with torch.enable_grad():
            return self.function_call(without_gradients, function, args)

    def attribute_read(self, module: nn.Module, name: str, value: Any) -> Any:
        """A plain attribute of one of the model's own modules is part of what the recording stands for."""
        number = self.numbers.get(id(module))
        if number is None or self.leaf is not None or isinstance(value, (TracedInt, TracedFloat)):
            return value
        if is_log(module, name):
            return functools.partial(self.says, self.paths[id(module)], name)
        reader = sys._getframe(2)
        if is_watched(module, name, value, reader) and not (reads_its_own(reader, value) and is_surrounding(module, value)):
            place = Place(number, name)
            if place in self.moving.places and type(value) in NUMBERS:
                path = self.paths[id(module)]
                return self.moving_number(place, self.graph.get_attr(f"{path}.{name}" if path else name), value)
            self.recording.places[place] = None
            if isinstance(value, GENERATORS):
                self.recording.once.append(f"Python draws random numbers of its own: {self.line()}")
        return value

    def module_read(self, module: nn.Module, name: str, value: nn.Module) -> None:
        """A second name of a module, ``self.current = self.decoders[1]``, may be another one's at a later call."""
        path, number = self.paths.get(id(module)), self.numbers.get(id(module))
        if number is not None and self.leaf is None and self.paths.get(id(value)) != (f"{path}.{name}" if path else name):
            self.recording.places[Place(number, name)] = None

    def attribute_missed(self, module: nn.Module, name: str) -> None:
        """What is asked for and not there, ``hasattr(self, "average")``, may be there at a later call."""
        number = self.numbers.get(id(module))
        if number is not None and self.leaf is None and is_watched(module, name, None, sys._getframe(2)):
            self.recording.places[Place(number, name)] = None

    def moving_number(self, place: Place, node: fx.Node, value: Any) -> TracedInt | TracedFloat:
        """A number that other calls have another of, read by ``node``; that Python decides by it is noted."""
        node.meta["number"] = True

        def decided(_: str) -> None:
            self.recording.decided.add(place)

        heard = self.moving.heard(value)
        return TracedInt(heard, node, decided) if type(value) is int else TracedFloat(heard, node, decided)

    def moving_arguments(
        self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with inputs of the graph for the numbers among them that move."""
        names = {place.name for place in self.moving.places if place.owner == ARGUMENT}

        def given(name: str, value: Any) -> Any:
            if name not in names or type(value) not in NUMBERS:
                return value
            node = self.graph.placeholder(f"number_{name}")
            node.meta["where"] = node.meta["source"] = node.meta["module"] = ""
            self.recording.numbers[name] = value
            return self.moving_number(Place(ARGUMENT, name), node, value)

        in_order = [*inspect.signature(method).parameters] if names else []
        args = tuple(given(name, value) for name, value in itertools.zip_longest(in_order[: len(args)], args, fillvalue=""))
        return args, {name: given(name, value) for name, value in kwargs.items()}

    def says(self, path: str, name: str, *args: Any, **kwargs: Any) -> None:
        """A trainer's log is told once the graph has run, of what that gave."""
        found, structure = flatten((args, kwargs), is_output)
        self.said.append((Kept(path, name, structure, len(found), called=True), found))

    def asks_grad_mode(self) -> bool:
        """What the model is told; that it asked is noted."""
        self.recording.asks_grad_mode = True
        return torch._C.is_grad_enabled() if self.told is None else self.told


_REPORTS = frozenset("__float__ __array__ numpy tolist __format__ __str__ __repr__".split())  # as a log takes a loss


def _times(value: Any, factor: float) -> Any:
    """The numbers in a value, each multiplied."""
    if isinstance(value, list):
        return [_times(each, factor) for each in value]
    return value * factor if isinstance(value, (float, np.ndarray)) else value


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.DataParallel)
_UNEQUAL = frozenset("ne __ne__ not_equal".split())
_KEEPS_ROWS = frozenset("T t view reshape flatten squeeze unsqueeze".split())
_RESHAPES = frozenset("view view_as reshape reshape_as flatten unflatten squeeze unsqueeze".split())


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


def _is_sharded(module: nn.Module) -> bool:
    """A unit of FSDP2, whose hooks give it other parameters within its call."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _targets(name: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """What a call is to write to: its first argument, those of ``torch._foreach_add_``, ``out``, or running statistics."""
    many = args[0] if args and name.startswith("_foreach_") and name.endswith("_") else ()
    running = (
        (args[1:3], kwargs.get("running_mean"), kwargs.get("running_var")) if name in ("batch_norm", "instance_norm") else ()
    )
    return tensors_in(target, many, kwargs.get("out"), running)


def _version(tensor: torch.Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return 0
