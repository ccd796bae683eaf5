"""Symbolic tracing: the graph of a method without example inputs, for a plan and for early refusals."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from rvconvert.capture.recorder import Recording, non_gaussian_ancestors, unchanged, unscripted, user_frame, where
from rvconvert.core.registry import Registry
from rvconvert.core.tree import Structure
from rvconvert.rules.draws import GAUSSIAN_SOURCES, NON_GAUSSIAN

__all__ = ["trace_symbolically"]


class _Tracer(fx.Tracer):
    """fx's tracer, with the user's own file and line on each node."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry = registry
        self.stack: list[str] = []

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["where"], node.meta["source"] = where(user_frame())
        node.meta["module"] = self.stack[-1] if self.stack else ""
        return node

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        rule = self.registry.find_module(type(m))
        return (rule is not None and rule.body is not None) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.stack.append(self.path_of_module(m))
        try:
            result = super().call_module(m, forward, args, kwargs)
        finally:
            self.stack.pop()
        if isinstance(result, fx.Proxy) and result.node.op == "call_module":
            learned = any(True for _ in m.parameters())
            result.node.meta.update(module_type=type(m), module=result.node.target, functions=[], learned=learned)
        return result


class _Draws(TorchFunctionMode):
    """Makes a node of every draw, so that ``torch.randn(4, 8)`` is not frozen as a constant."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in GAUSSIAN_SOURCES or func in NON_GAUSSIAN:
            if func is torch.Tensor.normal_:
                return self.tracer.create_proxy("call_method", "normal_", args, kwargs or {})
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def trace_symbolically(root: nn.Module, method: str, registry: Registry, random_inputs: tuple[str, ...]) -> Recording | None:
    """The method's graph traced with proxies, its defaults fixed; None if its Python needs real values."""
    tracer = _Tracer(registry)
    parameters = list(inspect.signature(getattr(type(root), method)).parameters.values())[1:]
    fixed = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in random_inputs}
    tracer.traced_func_name = method
    try:
        with unchanged(root), unscripted(), _Draws(tracer):
            graph = tracer.trace(root, concrete_args=fixed)
    except Exception:
        return None
    recording = Recording(graph, Structure("constant"))
    taint: dict[fx.Node, tuple[str, str]] = {}
    for node in graph.nodes:
        node.meta.setdefault("where", "")
        source = _source(node)
        if source is not None:
            node.meta["noise"] = source
            recording.noise.append(node)
        elif node.target in NON_GAUSSIAN and node.op == "call_function":
            taint[node] = (NON_GAUSSIAN[node.target], f"{node.meta['where']}: {node.meta.get('source', '')}")
        for each in node.all_input_nodes:
            if each in taint:
                taint.setdefault(node, taint[each])
        given = node.op == "placeholder" and node.target in random_inputs
        made = any(n in recording.random for n in node.all_input_nodes) and not _is_metadata(node)
        if source is not None or given or made:
            recording.random.add(node)
    output = next(n for n in graph.nodes if n.op == "output")
    recording.non_gaussian = non_gaussian_ancestors([output], taint)
    return recording


def _source(node: fx.Node) -> Any:
    if node.op == "call_function" and node.target in GAUSSIAN_SOURCES:
        return node.target
    return torch.Tensor.normal_ if node.op == "call_method" and node.target == "normal_" else None


def _is_metadata(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim")
    if node.op == "call_function" and getattr(node.target, "__name__", "").endswith("_like"):
        return True
    return node.op == "call_method" and node.target in ("size", "dim", "numel", "type", "new", "new_zeros", "new_ones")
