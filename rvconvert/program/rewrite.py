"""A graph as a runnable method: latents become random variables, outputs leave as their mean."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from itertools import count
from typing import Any

from torch import fx

from rvconvert.capture.recorder import Recording
from rvconvert.program.roles import Roles
from rvconvert.rules.noise import GAUSSIAN_SOURCES, nth_source

__all__ = ["compile_graph", "to_random_variables"]

_COUNT = count()


def compile_graph(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """A function ``run(self, *leaves)`` that runs ``graph`` on a model; modules are looked up on it by path."""
    code = graph.python_code("self")
    name = f"<rvconvert graph {next(_COUNT)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]


def to_random_variables(recording: Recording, roles: Roles, *, output: str) -> fx.Graph:
    """The recording's graph with its latents as random variables, and its values leaving as their roles say.

    Args:
        recording, roles: of the method.
        output: ``"mean"``: random outputs leave as their mean; ``"distribution"``: as they are.
    """
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in recording.graph.nodes:
        nodes[node] = graph.node_copy(node, lambda n: nodes[n])
    for index, node in enumerate(roles.latents):
        copied = nodes[node]
        with graph.inserting_before(copied):
            settings = graph.get_attr("_rvconvert.settings")
            if index:
                settings = graph.call_function(nth_source, (settings, index))
        copied.op, copied.target = "call_function", GAUSSIAN_SOURCES[node.meta["draw"]]
        copied.kwargs = {**copied.kwargs, "settings": settings}

    collapsed: dict[fx.Node, fx.Node] = {}

    def collapse(node: fx.Node) -> fx.Node:
        """The mean of a random node, the penalty attached if it is a reconstruction."""
        if node not in collapsed:
            with graph.inserting_after(nodes[node]):
                state = graph.get_attr("_rvconvert")
            with graph.inserting_after(state):
                target = take_reconstruction if node in roles.reconstructions else take_mean
                collapsed[node] = graph.call_function(target, (state, nodes[node]))
        return collapsed[node]

    for value, user in roles.at_mean:
        nodes[user].replace_input_with(nodes[value], collapse(value))
    for node in roles.reconstructions:
        collapse(node)
    for node in recording.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node.args[0] in roles.random:
            nodes[node].replace_input_with(nodes[node.args[0]], collapse(node.args[0]))

    given = recording.output.args[0]
    assert isinstance(given, tuple)
    kept_from = len(given) - recording.kept_leaves
    values = []
    for index, leaf in enumerate(given):
        if not isinstance(leaf, fx.Node) or leaf not in roles.random or (output == "distribution" and index < kept_from):
            values.append(nodes[leaf] if isinstance(leaf, fx.Node) else leaf)
        else:
            values.append(collapse(leaf))
    nodes[recording.output].args = (tuple(values),)
    unused = {nodes[n] for n in roles.unused}
    for node in reversed(graph.nodes):
        if node in unused and not node.users:
            graph.erase_node(node)
    return graph


def take_reconstruction(state: Any, value: Any) -> Any:
    """The mean of the reconstruction, its penalty attached."""
    return state.take_reconstruction(value)


def take_mean(state: Any, value: Any) -> Any:
    """The mean of a random variable that takes no part in the penalty."""
    return state.take_mean(value)
