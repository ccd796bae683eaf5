"""A graph as a runnable method: latents become random variables, outputs leave as their mean."""

from __future__ import annotations

import heapq
import linecache
import operator
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from rvconvert.capture.graph_calls import apply_function
from rvconvert.core.random_variable import RandomVariable
from rvconvert.program.gains import insert_gains
from rvconvert.program.recorded_graph import asks, asks_of
from rvconvert.rules.noise import nth_source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rvconvert.capture.recording import Recording
    from rvconvert.program.roles import Roles

__all__ = ["compile_graph", "to_random_variables"]

_COUNT = count()


def compile_graph(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """A function ``run(self, *leaves)`` that runs ``graph`` on a model; modules are looked up on it by path."""
    code = graph.python_code("self")
    name = f"<rvconvert graph {next(_COUNT)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    weakref.finalize(scope["forward"], linecache.cache.pop, name, None)
    return scope["forward"]  # type: ignore[no-any-return]


def to_random_variables(
    recording: Recording, roles: Roles, *, output: str, gains: Mapping[fx.Node, str] | None = None
) -> fx.Graph:
    """The recording's graph with its latents as random variables, and its values leaving as their roles say.

    Args:
        recording, roles: of the method.
        gains: the nodes whose variance is multiplied by a gain, with the keys of these.
        output: ``"mean"``: random outputs leave as their mean; ``"distribution"``: as they are.
    """
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in recording.graph.nodes:
        nodes[node] = graph.node_copy(node, lambda n: nodes[n])
    order = {node: index for index, node in enumerate(recording.graph.nodes)}
    for index, node in enumerate(roles.latents):
        copied = nodes[node]
        with graph.inserting_before(copied):
            settings = graph.get_attr("_rvconvert.settings")
            if index:
                settings = graph.call_function(nth_source, (settings, index))
        if copied.target is apply_function:  # a draw inside a function of autograd, which stands first among its arguments
            copied.args = copied.args[2:]
        copied.op, copied.target = "call_function", node.meta["draw"].random_variable
        copied.kwargs = {**copied.kwargs, "settings": settings}

    twins = _from_a_draw(graph, nodes, recording, roles)
    operations = dict(nodes)
    if gains:
        insert_gains(graph, nodes, gains)
    collapsed: dict[fx.Node, fx.Node] = {}
    for main in roles.reconstructions if output == "mean" else ():
        together = [value for value, of in roles.beside if of is main]
        if together:
            last = max([main, *together], key=order.__getitem__)
            with graph.inserting_after(collapsed.get(last, nodes[last])):
                state = graph.get_attr("_rvconvert")
            with graph.inserting_after(state):
                values = [collapsed.get(value, nodes[value]) for value in together]  # a loss may be made of several
                taken = graph.call_function(take_together, (state, nodes[main], *values))
            for index, node in reversed(list(enumerate((main, *together)))):
                with graph.inserting_after(taken):
                    collapsed[node] = graph.call_function(operator.getitem, (taken, index))

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
        if asks_of(user, value):  # for its shape, whatever is made of the draw
            with graph.inserting_before(operations[user]):
                mean = graph.call_function(take_mean, (graph.get_attr("_rvconvert"), nodes[value]))
            operations[user].replace_input_with(nodes[value], mean)
        else:
            operations[user].replace_input_with(nodes[value], collapse(value))
    for node in recording.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node.args[0] in roles.random:
            operations[node].replace_input_with(nodes[node.args[0]], collapse(node.args[0]))

    given = recording.output.args[0]
    assert isinstance(given, tuple)
    kept_from = len(given) - recording.kept_leaves
    leaving = []
    for index, leaf in enumerate(given):
        if not isinstance(leaf, fx.Node) or leaf not in roles.random or (output == "distribution" and index < kept_from):
            leaving.append(nodes[leaf] if isinstance(leaf, fx.Node) else leaf)
        elif isinstance(dtype := leaf.meta.get("dtype"), torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
            with graph.inserting_after(nodes[leaf]):
                leaving.append(graph.call_function(take_most_likely, (nodes[leaf], dtype)))
        elif index >= kept_from or (leaf not in roles.hidden and (leaf in roles.decoded or leaf in roles.losses)):
            leaving.append(collapse(leaf))
        else:
            with graph.inserting_after(nodes[leaf]):
                state = graph.get_attr("_rvconvert")
            with graph.inserting_after(state):
                leaving.append(graph.call_function(take_latent, (state, nodes[leaf])))
    nodes[recording.output].args = (tuple(leaving),)
    unused = {nodes[n] for n in roles.unused} | twins.keys()
    for node in list(graph.nodes):
        if node.target is take_together:
            _apart_from_sizes(graph, node)
    _sort(graph)
    for node in reversed(graph.nodes):
        if node in unused and not node.users:
            graph.erase_node(node)
    there = set(graph.nodes)
    for node, twin in twins.items():
        if node in there and twin in there and twin.op == "call_module":  # both are called, and one of them steps
            with graph.inserting_before(twin):
                module = graph.get_attr(str(twin.target))
            twin.op, twin.target, twin.args = "call_function", called_beside, (module, *twin.args)
    return graph


def _apart_from_sizes(graph: fx.Graph, taken: fx.Node) -> None:
    """Let no value that L_c joins wait for L_c: a size that one is made of is asked of a copy of what it was asked of."""
    behind, todo = set(), [taken]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in behind]
        behind.update(new)
        todo += new
    if taken not in behind:
        return
    copies: dict[fx.Node, Any] = {user: taken.args[1 + cast("int", user.args[1])] for user in taken.users}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            inputs = {n: copied(n) for n in node.all_input_nodes}
            made = node
            if any(n is not other for n, other in inputs.items()):
                with graph.inserting_after(node):
                    made = graph.node_copy(node, inputs.__getitem__)
            copies[node] = made
        return copies[node]  # type: ignore[no-any-return]

    for node in behind:
        if asks(node):
            for source in node.all_input_nodes:
                node.replace_input_with(source, copied(source))


def _from_a_draw(graph: fx.Graph, nodes: dict[fx.Node, fx.Node], recording: Recording, roles: Roles) -> dict[fx.Node, fx.Node]:
    """Make ``roles.drawn`` of plain tensors, from draws beside the latents; ``nodes`` follows.

    Returns:
        The nodes of random variables that these take the place of, with these.
    """
    needed: set[fx.Node] = set()
    for node in reversed(recording.graph.nodes):
        if node in roles.random and (node in roles.drawn or any(user in needed for user in node.users)):
            needed.add(node)
    plain: dict[fx.Node, fx.Node] = {}
    for node in recording.graph.nodes:
        if node not in needed:
            continue
        with graph.inserting_after(nodes[node]):
            if node.op == "placeholder":
                plain[node] = graph.call_function(draw_from, (nodes[node],))
            else:
                plain[node] = graph.node_copy(node, lambda n: plain.get(n, nodes[n]))
    twins = {nodes[n]: plain[n] for n in needed - set(roles.latents) if n.op != "placeholder"}
    for node in roles.drawn:
        nodes[node].replace_all_uses_with(plain[node])
        nodes[node] = plain[node]
    return twins


def _sort(graph: fx.Graph) -> None:
    """Put nodes behind their inputs, in the order that they have where that allows it."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    missing = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [place[node] for node, count in missing.items() if not count]
    heapq.heapify(ready)
    listed = list(graph.nodes)
    if all(place[n] < place[node] for node in listed for n in node.all_input_nodes):
        return
    last: fx.Node | None = None
    while ready:
        node = listed[heapq.heappop(ready)]
        if last is not None:
            last.append(node)
        last = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])


def take_together(state: Any, value: Any, *beside: Any) -> Any:
    """The mean of the reconstruction and of values that are the same but for a view or a function of each element."""
    return state.take_reconstruction(value, *beside)


def take_reconstruction(state: Any, value: Any) -> Any:
    """The mean of the reconstruction, its penalty attached."""
    return state.take_reconstruction(value)


def draw_from(value: Any) -> Any:
    """A draw from a random variable that was given; a tensor as it is."""
    if not isinstance(value, RandomVariable):
        return value
    deviation = value.var.clamp(min=1e-20).sqrt()  # whose gradient is finite
    return torch.addcmul(value.mean, deviation, torch.randn_like(value.mean))


def called_beside(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a module gives of a draw, where it is called with the random variable too: its buffers are not stepped twice."""
    held = [(each, dict(each._buffers)) for each in module.modules()]
    for each, buffers in held:
        each._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
    try:
        return module(*args, **kwargs)
    finally:
        for each, buffers in held:
            each._buffers.update(buffers)


def take_latent(state: Any, value: Any) -> Any:
    """The mean of a latent that leaves."""
    return state.take_latent(value)


def take_most_likely(value: Any, dtype: torch.dtype) -> Any:
    """A class, an index, a mask that leaves."""
    return value.most_likely(dtype) if isinstance(value, RandomVariable) else value


def take_mean(state: Any, value: Any) -> Any:
    """The mean of a random variable that takes no part in the penalty."""
    return state.take_mean(value)
