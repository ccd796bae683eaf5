"""The plan: for each node whether it is random, which rule serves it, or why none does."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from rvconvert.capture.graph_calls import apply_function, call_by_rule
from rvconvert.core.registry import PLAIN, Exactness, Rule, operation_name
from rvconvert.errors import UnsupportedOperationError
from rvconvert.places import short_place
from rvconvert.report import Report, Row
from rvconvert.rules.kinds import Metadata

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rvconvert.capture.recording import Recording
    from rvconvert.core.random_variable import Settings
    from rvconvert.program.roles import Roles

__all__ = ["node_row", "refuse_unsupported", "report_graph"]


def row_for(operation: str, rule: Rule | None, place: dict[str, Any], *, function: bool = False) -> Row:
    """The row of a random operation: with its rule, or with why there is none and a stub to paste."""
    if rule is not None:
        return Row(operation, "random", **place, rule=rule.name, exactness=rule.exactness.value, assumption=rule.assumption)
    if operation.startswith("torch.autograd"):
        return Row(
            operation,
            "unsupported",
            **place,
            reason="a gradient inside the model: mean and variance have none along a draw",
            hint='rvconvert.convert(model, covariance="sampled")  # takes it along each path',
        )
    if function:
        return Row(
            operation,
            "unsupported",
            **place,
            reason="a function of autograd, with nothing to look into",
            hint="rvconvert.convert(model)  # without strict=True, it is taken on a few nodes of its input",
        )
    if operation.endswith("ScriptModule"):
        return Row(
            operation,
            "unsupported",
            **place,
            reason="a scripted module has no Python to look into",
            hint='use the nn.Module that it was made of, or rvconvert.convert(model, covariance="sampled")',
        )
    short = operation.rsplit(".", 1)[-1].strip("_") or "operation"
    if operation == "getattr":  # x.real of what has no rule
        hint = 'rvconvert.convert(model, covariance="sampled")'
        return Row(operation, "unsupported", **place, reason="an attribute that has no moments", hint=hint)
    target = operation if "." in operation and not operation.startswith("Tensor.") else f"torch.{operation}"
    return Row(
        operation,
        "unsupported",
        **place,
        reason="no rule for a random variable",
        hint=(
            f"@rvconvert.rule({target})\n"
            f"def {short}(x, *args, **kwargs):\n"
            "    mean, var = x.mean, x.var  # make those of the result of them\n"
            "    return rvconvert.RandomVariable(mean, var)\n"
            '# or, with no rule: rvconvert.convert(model, covariance="sampled")'
        ),
    )


def report_graph(recording: Recording, roles: Roles, model: str, method: str, settings: Settings, *, attaches: bool) -> Report:
    """One row a node that computes something, with its role; L_c is attached to reconstructions, or left to the person."""
    sizes = _sizes(recording.graph) | _checks(recording.graph)
    rows = [row for node in recording.graph.nodes if node not in sizes for row in _rows(node, roles, settings)]
    attached = Counter(f"{_operation(n)} at {short_place(n.meta.get('where', ''))}" for n in roles.reconstructions)
    has = "L_c is attached to" if attaches else "the reconstruction, to which no L_c is attached, is"
    notes = [f"{has} {name}" + (f", {count} times" if count > 1 else "") for name, count in attached.items()]
    if not roles.reconstructions:
        notes.append("no L_c: nothing that leaves or meets an input has a decoder behind it")
    nuisance = [short_place(n.meta["where"]) for n in recording.draws if n not in roles.latents]
    if nuisance:
        notes.append(f"drawn as in the plain model, being no latent: {', '.join(dict.fromkeys(nuisance))}")
    if recording.fixed:
        notes.append("the batch size is part of the graph, which is recorded anew for another: " + recording.fixed[0])
    lifetime = "once" if recording.once else "kept"
    reason = "; ".join(dict.fromkeys(recording.once)) or "equal to the plain model on other inputs"
    return Report(model, method, lifetime, reason, tuple(rows), tuple(notes))


def node_row(node: fx.Node, roles: Roles, settings: Settings) -> Row:
    """One row for a node that computes something, the first where a module holds several operations."""
    for row in _rows(node, roles, settings):
        return row
    return Row(_operation(node), "random", module=node.meta.get("module", ""), where=short_place(node.meta.get("where", "")))


def _rows(node: fx.Node, roles: Roles, settings: Settings) -> Iterable[Row]:
    if node.op in ("placeholder", "get_attr", "output"):
        return
    place = {name: node.meta.get(name, "") for name in ("module", "where", "source")}
    place["where"] = short_place(place["where"])
    place["role"] = roles.of(node)
    operation = _operation(node)
    if node in roles.latents:
        yield Row(operation, "noise", **place, rule="standard_normal", exactness="exact")
    elif node not in roles.random:
        if operation not in ("getitem", "Tensor.size", "getattr"):
            yield Row(operation, "deterministic", **place)
    elif operation == "Tensor.item":
        yield Row(operation, "random", **place, rule="mean", exactness="exact", assumption="a report: the mean is read")
    elif "part" in node.meta or node in roles.unused:
        return
    elif not settings.needs_rules:
        yield row_for(operation, PLAIN, place)
    elif all(n in roles.indices for n in node.all_input_nodes if n in roles.random):
        yield Row(operation, "deterministic", **place)
    elif node.op == "call_module" or node.target in (call_by_rule, apply_function):
        yield from _module_rows(node, operation, place, settings)
    else:
        rule = _find(node, settings)
        if rule is None or type(rule.kind) is not Metadata:
            yield row_for(operation, rule, place)


def _sizes(graph: fx.Graph) -> set[fx.Node]:
    """Sizes of tensors and the arithmetic on them and on reported numbers, which say nothing of moments."""
    found: set[fx.Node] = set()
    reported = {node for node in graph.nodes if node.target == "item" or "number" in node.meta}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        arithmetic = getattr(node.target, "__module__", "") == "_operator" or node.target in (int, float, round, torch.Size)
        if node.target == "size" or (arithmetic and inputs and all(each in found or each in reported for each in inputs)):
            found.add(node)
    return found


def _checks(graph: fx.Graph) -> set[fx.Node]:
    """What ``torch.distributions`` asks of its arguments, which decides nothing but an error."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        asks = node.target is getattr(torch, "_is_all_true", None)
        idle = node.target == "size" or node.users
        if asks or (node.op in ("call_function", "call_method") and idle and all(user in found for user in node.users)):
            found.add(node)
    return found


def _module_rows(node: fx.Node, operation: str, place: dict[str, Any], settings: Settings) -> Iterable[Row]:
    registry = settings.registry
    rule = registry.find_module(node.meta.get("module_type", object))
    if rule is not None:
        yield row_for(operation, rule, place)
        return
    if node.target is apply_function:
        rule = None if settings.strict else registry.fallback(node.meta["function"].apply)
        yield row_for(operation, rule, place, function=True)
        return
    if node.op == "call_function":  # a scripted module: nothing to look into
        yield row_for(operation, None, place)
        return
    known = {f: registry.find(f) for f in dict.fromkeys(node.meta["functions"])}
    inner = {f: rule for f, rule in known.items() if _computes(f, rule)}
    missing = [f for f, rule in inner.items() if rule is None and (settings.strict or registry.fallback(f) is None)]
    if missing:
        for function in missing:
            yield row_for(operation_name(function), None, place)
    elif inner:
        rules = [rule or registry.fallback(f) for f, rule in inner.items()]
        weakest = max((r for r in rules if r is not None), key=lambda r: tuple(Exactness).index(r.exactness))
        yield row_for(operation, weakest, place)


def _computes(function: Any, rule: Rule | None) -> bool:
    """True for what makes a tensor of values: no question about shape or type, no attribute."""
    if rule is not None:
        return not isinstance(rule.kind, Metadata)
    return getattr(function, "__name__", "") not in ("__get__", "__set__")


def _operation(node: fx.Node) -> str:
    if node.target is apply_function:
        return str(getattr(node.meta.get("function"), "__qualname__", "torch.autograd.Function"))
    if "module_type" in node.meta:
        return str(node.meta["module_type"].__name__)
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    name = getattr(node.target, "__name__", str(node.target))
    module = getattr(node.target, "__module__", "") or ""
    return name if module.startswith(("_operator", "builtins", "rvconvert")) else operation_name(node.target)  # type: ignore[arg-type]


def _find(node: fx.Node, settings: Settings) -> Rule | None:
    rule: Rule | None = node.meta.get("rule")
    if rule is None and not settings.strict:
        rule = settings.registry.fallback(node.meta.get("function"))  # type: ignore[arg-type]
    return rule


def refuse_unsupported(report: Report) -> None:
    """One error for all the operations that stand in the way.

    Raises:
        UnsupportedOperationError: there are any.
    """
    rows = report.unsupported
    if not rows:
        return
    kinds: dict[tuple[str, str, str], list[Row]] = {}  # the same hint once
    for row in rows:
        kinds.setdefault((row.operation, row.reason, row.hint), []).append(row)
    parts = [f"{report.model}.{report.method}: {len(kinds)} operation{'s have' if len(kinds) > 1 else ' has'} no rule:"]
    for index, ((operation, reason, hint), same) in enumerate(kinds.items(), 1):
        parts.append(f"\n{index}. {operation}")
        for row in same:
            parts.append(f"   in {row.module or 'the model itself'}, {row.where}")
            if row.source:
                parts.append(f"     {row.source}")
        parts.append(f"   why: {reason}")
        parts.append("   write:\n" + "\n".join(f"     {line}" for line in hint.splitlines()))
    raise UnsupportedOperationError("\n".join(parts), rows)
