"""Where gains go in a graph: behind every operation that computes something of what a learned layer made random."""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import fx

from rvconvert.covariance.calibrated import calibrated, level_of
from rvconvert.program.plan import node_row
from rvconvert.program.recorded_graph import LOCATIONS
from rvconvert.rules.kinds import Collapse, Elementwise, Metadata, Shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rvconvert.capture.recording import Recording
    from rvconvert.core.random_variable import Settings
    from rvconvert.core.registry import Rule
    from rvconvert.program.roles import Roles

__all__ = ["gain_keys", "insert_gains"]

_MOVES = (Shape, Metadata, Collapse)
# One factor a channel, exact whatever is correlated: the gain before it is right behind it.
_SCALES = frozenset(("batch_norm", "setitem"))  # a write is a move as well


def gain_keys(recording: Recording, roles: Roles, method: str, settings: Settings) -> dict[fx.Node, str]:
    """The operations that have gains, in order, each with a key that other recordings of the method share.

    A key is method, module, operation and how many of the same came before. What only scales and shifts the noise is exact
    and has no gain, unless the method has nothing else.
    """
    computing = [n for n in recording.graph.nodes if n in roles.random and n not in roles.unused and _computes(n, settings)]
    decoded = [n for n in computing if n in roles.decoded]
    placing = _placing_noise(recording, roles) if decoded else set()
    count: Counter[str] = Counter()
    keys = {}
    for node in decoded or computing:
        place = f"{method}/{node.meta.get('module', '')}/{node_row(node, roles, settings).operation}"
        if node not in placing:
            keys[node] = f"{place}/{count[place]}"
        count[place] += 1
    return keys


def _placing_noise(recording: Recording, roles: Roles) -> set[fx.Node]:
    """Where a draw, which nothing else depends on yet, is scaled and added to its location, as of a latent behind a layer."""
    noise, found = set(roles.latents), set()
    for node in recording.graph.nodes:
        own = [n for n in node.all_input_nodes if n in noise]
        kind = getattr(node.meta.get("rule"), "kind", None)
        if len(own) == 1 and node not in noise and (isinstance(kind, (Elementwise, Shape)) or "part" in node.meta):
            found.add(node)
            if getattr(node.meta.get("rule"), "name", "") not in LOCATIONS:
                noise.add(node)
    return found


def _computes(node: fx.Node, settings: Settings) -> bool:
    """True for an operation on random values that does more than move elements; of several results, for each of them."""
    if node.op not in ("call_function", "call_method", "call_module") or "draw" in node.meta:
        return False
    if "shape" not in node.meta:  # no tensor: a number, or several results, which follow one by one
        return False
    if "part" not in node.meta:
        return _functions_compute(node, settings)
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.op != "placeholder" and _functions_compute(source, settings)


def _functions_compute(node: fx.Node, settings: Settings) -> bool:
    if node.op == "call_module" and settings.registry.find_module(node.meta["module_type"]) is None:
        rules = [settings.registry.find(f) for f in node.meta["functions"] if f.__name__ not in ("__get__", "__set__")]
        return any(_computes_by(rule) for rule in rules)
    return _computes_by(node.meta.get("rule"))


def _computes_by(rule: Rule | None) -> bool:
    return rule is None or not (isinstance(rule.kind, _MOVES) or rule.name in _SCALES)


def insert_gains(graph: fx.Graph, nodes: dict[fx.Node, fx.Node], keys: Mapping[fx.Node, str]) -> None:
    """Put a gain behind each node of ``keys`` in ``graph``; ``nodes``, recording's node -> graph's, follows."""
    level: fx.Node | None = None
    for node, key in keys.items():
        after = nodes[node]
        with graph.inserting_after(after):
            state = graph.get_attr("_rvconvert")
        last = state
        if level is None:
            with graph.inserting_after(last):
                level = last = graph.call_function(level_of, (after,))
        with graph.inserting_after(last):
            made = graph.call_function(calibrated, (state, key, after, level))
        users: list[Any] = [user for user in after.users if user not in (made, level)]
        for user in users:
            user.replace_input_with(after, made)
        nodes[node] = made
