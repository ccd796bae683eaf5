"""The plan: for each node whether it is random, which rule serves it, or why none does."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from rvconvert.capture.recorder import IGNORED_INSIDE, Recording
from rvconvert.core.random_variable import Settings
from rvconvert.core.registry import PLAIN, Exactness, Rule, operation_name
from rvconvert.errors import UnsupportedOperationError
from rvconvert.places import short_place
from rvconvert.report import Report, Row

__all__ = ["dispatch_report", "node_row", "refuse_unsupported", "report_graph", "row_for"]


def row_for(operation: str, rule: Rule | None, place: dict[str, Any]) -> Row:
    """The row of a random operation: with its rule, or with why there is none and a stub to paste."""
    if rule is not None:
        return Row(operation, "random", **place, rule=rule.name, exactness=rule.exactness.value, assumption=rule.assumption)
    short = operation.rsplit(".", 1)[-1].strip("_") or "operation"
    return Row(
        operation,
        "unsupported",
        **place,
        reason="no rule for a random variable",
        hint=(
            f"@rvconvert.rule({operation if '.' in operation else 'torch.' + operation})\n"
            f"def {short}(x, *args, **kwargs):\n"
            "    return rvconvert.RandomVariable(..., ...)  # mean and var of the result, from x.mean and x.var"
        ),
    )


def report_graph(recording: Recording, model: str, method: str, settings: Settings) -> Report:
    """One row a node that computes something."""
    sizes = _sizes(recording.graph)
    rows = [row for node in recording.graph.nodes if node not in sizes for row in _rows(node, recording, settings)]
    notes = []
    if recording.fixed:
        notes.append("the batch size is part of the graph, which is recorded anew for another: " + recording.fixed[0])
    return Report(model, method, "graph", "recorded from one run, equal to eager on another", tuple(rows), tuple(notes))


def node_row(node: fx.Node, recording: Recording, settings: Settings) -> Row:
    """One row for a node that computes something, the first where a module holds several operations."""
    for row in _rows(node, recording, settings):
        return row
    return Row(_operation(node), "random", module=node.meta.get("module", ""), where=short_place(node.meta.get("where", "")))


def _rows(node: fx.Node, recording: Recording, settings: Settings) -> Iterable[Row]:
    if node.op in ("placeholder", "get_attr", "output"):
        return
    place = {name: node.meta.get(name, "") for name in ("module", "where", "source")}
    place["where"] = short_place(place["where"])
    operation = _operation(node)
    if node.meta.get("noise") is not None:
        yield Row(operation, "noise", **place, rule="standard_normal", exactness="exact")
    elif node not in recording.random:
        if operation not in ("getitem", "Tensor.size", "getattr"):
            yield Row(operation, "deterministic", **place)
    elif operation == "Tensor.item":
        yield Row(operation, "random", **place, rule="mean", exactness="exact", assumption="a report: the mean is read")
    elif not settings.needs_rules:
        yield row_for(operation, PLAIN, place)
    elif node.op == "call_module":
        yield from _module_rows(node, operation, place, settings)
    elif _takes_one_of_several_results(node):
        return
    else:
        yield row_for(operation, _find(node, settings), place)


def _sizes(graph: fx.Graph) -> set[fx.Node]:
    """Sizes of tensors and the arithmetic on them, which say nothing of moments."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        arithmetic = getattr(node.target, "__module__", "") == "_operator" or node.target in (int, float, torch.Size)
        if node.target == "size" or (arithmetic and inputs and all(each in found for each in inputs)):
            found.add(node)
    return found


def _takes_one_of_several_results(node: fx.Node) -> bool:
    source = node.args[0] if node.args else None
    if node.target is not operator.getitem or not isinstance(source, fx.Node) or source.op == "placeholder":
        return False
    return not isinstance(node.args[1], (tuple, slice, fx.Node))


def _module_rows(node: fx.Node, operation: str, place: dict[str, Any], settings: Settings) -> Iterable[Row]:
    registry = settings.registry
    rule = registry.find_module(node.meta["module_type"])
    if rule is not None:
        yield row_for(operation, rule, place)
        return
    inner = [f for f in dict.fromkeys(node.meta["functions"]) if getattr(f, "__name__", "") not in IGNORED_INSIDE]
    missing = [f for f in inner if registry.find(f) is None and (settings.strict or registry.fallback(f) is None)]
    if missing:
        for function in missing:
            yield row_for(operation_name(function), None, place)
    elif inner:
        rules = [registry.find(f) or registry.fallback(f) for f in inner]
        weakest = max((r for r in rules if r is not None), key=lambda r: tuple(Exactness).index(r.exactness))
        yield row_for(operation, weakest, place)


def _operation(node: fx.Node) -> str:
    if "module_type" in node.meta:
        return str(node.meta["module_type"].__name__)
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    name = getattr(node.target, "__name__", str(node.target))
    module = getattr(node.target, "__module__", "") or ""
    return name if module.startswith(("_operator", "builtins", "rvconvert")) else operation_name(node.target)  # type: ignore[arg-type]


def _find(node: fx.Node, settings: Settings) -> Rule | None:
    registry = settings.registry
    function = node.target
    if node.op == "call_method":
        function = getattr(torch.Tensor, str(node.target))
    elif getattr(function, "__module__", "") == "_operator":
        function = getattr(torch.Tensor, f"__{function.__name__.strip('_')}__", function)  # type: ignore[union-attr]
    elif getattr(function, "__name__", "") == "getattr":
        attribute = getattr(torch.Tensor, str(node.args[1]), None)
        named_field = attribute is None or callable(attribute)  # torch.sort(x).values: one of several results
        function = torch.Tensor.__getitem__ if named_field else attribute.__get__  # type: ignore[union-attr]
    elif "module_type" in node.meta:
        return registry.find_module(node.meta["module_type"])
    elif getattr(function, "__module__", "").startswith("rvconvert"):
        return registry.find(torch.Tensor.__setitem__)
    rule = registry.find(function)  # type: ignore[arg-type]
    if rule is None and not settings.strict:
        rule = registry.fallback(function)  # type: ignore[arg-type]
    return rule


def dispatch_report(rows: Iterable[Row], model: str, method: str, reason: str) -> Report:
    """The report of a method that the dispatch engine runs."""
    return Report(model, method, "dispatch", reason, tuple(rows))


def refuse_unsupported(report: Report) -> None:
    """One error for all the operations that stand in the way.

    Raises:
        UnsupportedOperationError: there are any.
    """
    rows = report.unsupported
    if not rows:
        return
    parts = [f"{report.model}.{report.method}: {len(rows)} operation{'s have' if len(rows) > 1 else ' has'} no rule:"]
    for index, row in enumerate(rows, 1):
        parts.append(f"\n{index}. {row.operation} in {row.module or 'the model itself'}, {row.where}")
        if row.source:
            parts.append(f"     {row.source}")
        parts.append(f"   why: {row.reason}")
        parts.append("   write:\n" + "\n".join(f"     {line}" for line in row.hint.splitlines()))
    raise UnsupportedOperationError("\n".join(parts), rows)
