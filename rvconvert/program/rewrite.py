"""A graph as a runnable method: noise sources become random variables, outputs leave as their mean."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from rvconvert.capture.recorder import Recording
from rvconvert.program.gains import insert_gains
from rvconvert.rules.noise import GAUSSIAN_SOURCES, nth_source

__all__ = ["DIFFERENCES", "LOSSES", "compile_graph", "reconstructions", "to_random_variables"]

_COUNT = count()

LOSSES = frozenset(
    getattr(namespace, name)
    for namespace in (F, torch, torch._C._nn)
    for name in (
        "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits cross_entropy "
        "nll_loss kl_div gaussian_nll_loss poisson_nll_loss cosine_embedding_loss soft_margin_loss"
    ).split()
    if hasattr(namespace, name)
)
_LOSS_MODULES = torch.nn.modules.loss._Loss
DIFFERENCES = frozenset(("sub", "__sub__", "__rsub__", "rsub", "subtract"))


def compile_graph(graph: fx.Graph) -> Callable[..., tuple[Any, ...]]:
    """A function ``run(self, *leaves)`` that runs ``graph`` on a model; modules are looked up on it by path."""
    code = graph.python_code("self")
    name = f"<rvconvert graph {next(_COUNT)}>"
    linecache.cache[name] = (len(code.src), None, code.src.splitlines(True), name)
    scope = dict(code.globals)
    exec(compile(code.src, name, "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]


def copy_graph(recording: Recording) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the recording's graph, and where each node went."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in recording.graph.nodes:
        nodes[node] = graph.node_copy(node, lambda n: nodes[n])
    return graph, nodes


def reconstructions(recording: Recording) -> dict[fx.Node, list[fx.Node]]:
    """Random nodes at which the model meets its input again, in a loss inside the method, and those users.

    A loss function always collapses its random operands; a difference does where its other operand comes
    from an input without passing a learned layer.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in recording.graph.nodes:
        if node not in recording.random:
            continue
        loss = node.target in LOSSES or issubclass(node.meta.get("module_type", object), _LOSS_MODULES)
        difference = getattr(node.target, "__name__", node.target) in DIFFERENCES and any(
            n not in recording.random and _is_raw_input(n) for n in node.all_input_nodes
        )
        if loss or difference:
            for operand in node.all_input_nodes:
                if operand in recording.random and is_learned(operand, recording):
                    found.setdefault(operand, []).append(node)
    for operand, user in _before_scalars(recording):
        if user not in found.get(operand, ()):
            found.setdefault(operand, []).append(user)
    return found


def _before_scalars(recording: Recording) -> list[tuple[fx.Node, fx.Node]]:
    """(reconstruction, user) pairs at which a loss written by hand begins.

    A scalar result is a loss; what it is made of, back to the last learned layers, is evaluated at the mean of what
    those layers give, activations of theirs included.
    """
    output = next(n for n in recording.graph.nodes if n.op == "output")
    scalars = [n for n in output.all_input_nodes if n in recording.random and n.meta.get("ndim") == 0]
    loss: set[fx.Node] = set()
    edges: list[tuple[fx.Node, fx.Node]] = []
    todo = list(scalars)
    while todo:
        node = todo.pop()
        if node in loss:
            continue
        loss.add(node)
        for source in node.all_input_nodes:
            if source not in recording.random:
                continue
            if _is_learned_layer(source, recording):
                edges.append((source, node))
            else:
                todo.append(source)
    found = []
    for source, user in edges:
        # an activation of the last layer belongs to the reconstruction, not to the loss
        while len([n for n in source.users if n in loss]) == 1 and _keeps_one_value(user, recording) and user not in scalars:
            following = [n for n in user.users if n in loss]
            if len(following) != 1:
                break
            source, user = user, following[0]
        found.append((source, user))
    return found


def _keeps_one_value(node: fx.Node, recording: Recording) -> bool:
    """True for a function of one random value and constants that neither reduces it nor meets an input."""
    if len(node.all_input_nodes) != 1 or node.meta.get("ndim") == 0:
        return False
    source = node.all_input_nodes[0]
    return source in recording.random and node.meta.get("ndim") == source.meta.get("ndim")


def _is_learned_layer(node: fx.Node, recording: Recording) -> bool:
    """True for an operation with weights on a random value."""
    sources = node.all_input_nodes
    if node.meta.get("noise") is not None or not any(n in recording.random for n in sources):
        return False
    if node.op == "call_module":
        return bool(node.meta.get("learned", True))
    return any(_is_parameter(n) for n in sources if n not in recording.random)


def _is_raw_input(node: fx.Node) -> bool:
    """True for an input, or a value made of inputs and constants alone, no parameter and no module."""
    seen_input = False
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_module" or current.op == "get_attr":
            return False
        seen_input |= current.op == "placeholder"
        todo += current.all_input_nodes
    return seen_input


def is_learned(node: fx.Node, recording: Recording) -> bool:
    """True if a learned layer acts on a random value between the noise source (or random input) and ``node``."""
    todo, seen = [node], set()
    while todo:
        current = todo.pop()
        if current in seen or current not in recording.random:
            continue
        seen.add(current)
        if _is_learned_layer(current, recording):
            return True
        todo += current.all_input_nodes
    return False


def _is_parameter(node: fx.Node) -> bool:
    """True for a parameter or buffer, or a value made of these alone (a standardised weight)."""
    sources, todo, seen = [], [node], set()
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += current.all_input_nodes
            if not current.all_input_nodes:
                sources.append(current)
    made = [n for n in sources if n.op in ("placeholder", "get_attr") and not str(n.target).startswith("_rvconvert.")]
    return bool(made) and all(n.op == "get_attr" for n in made)


def to_random_variables(
    recording: Recording, *, output: str, penalised: bool, gains: Mapping[fx.Node, str] | None = None
) -> tuple[fx.Graph, list[str]]:
    """The recording's graph with its noise sources as random variables and its outputs collapsed.

    ``gains``: the nodes whose variance is multiplied by a gain, with the keys of these.

    Returns the graph and notes on what was attached where.
    """
    graph, nodes = copy_graph(recording)
    notes: list[str] = []
    for index, node in enumerate(recording.noise):
        copied = nodes[node]
        with graph.inserting_before(copied):
            settings = graph.get_attr("_rvconvert.settings")
            if index:
                settings = graph.call_function(nth_source, (settings, index))
        copied.op, copied.target = "call_function", GAUSSIAN_SOURCES[node.meta["noise"]]
        copied.kwargs = {**copied.kwargs, "settings": settings}

    if gains:
        insert_gains(graph, nodes, gains)

    collapsed: dict[fx.Node, fx.Node] = {}

    def collapse(node: fx.Node, reconstruction: bool) -> fx.Node:
        if node not in collapsed:
            after = nodes[node]
            with graph.inserting_after(after):
                state = graph.get_attr("_rvconvert")
            with graph.inserting_after(state):
                target = take_reconstruction if reconstruction else take_mean
                collapsed[node] = graph.call_function(target, (state, after))
        return collapsed[node]

    for node in recording.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node in recording.random:
            nodes[node].replace_input_with(nodes[node.args[0]], collapse(node.args[0], False))

    for operand, users in reconstructions(recording).items():
        notes.append(f"reconstruction meets the input in a loss: {users[0].meta.get('where', '')}")
        for user in users:
            nodes[user].replace_input_with(nodes[operand], collapse(operand, penalised))

    result = next(n for n in recording.graph.nodes if n.op == "output")
    leaves = result.args[0]
    random = [n for n in leaves if isinstance(n, fx.Node) and n in recording.random]
    if output == "mean":
        feeding = _strict_ancestors(random)
        values = []
        for leaf in leaves:
            if isinstance(leaf, fx.Node) and leaf in recording.random:
                reconstruction = penalised and leaf not in feeding and is_learned(leaf, recording)
                values.append(collapse(leaf, reconstruction))
            else:
                values.append(nodes[leaf] if isinstance(leaf, fx.Node) else leaf)
        nodes[result].args = (tuple(values),)
    return graph, notes


def _strict_ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that another of ``nodes`` is made of."""
    found: set[fx.Node] = set()
    todo = [source for node in nodes for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def take_reconstruction(state: Any, value: Any) -> Any:
    """The mean of the reconstruction, its penalty attached."""
    return state.take_reconstruction(value)


def take_mean(state: Any, value: Any) -> Any:
    """The mean of a random variable that takes no part in the penalty."""
    return state.take_mean(value)
