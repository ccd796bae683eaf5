"""Which draws are latents: a decoder's value depends on them, and the input reaches their scale or location."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rvconvert.program.recorded_graph import LOCATIONS, PRODUCTS, asks_of, rank_of
from rvconvert.rules.draws import INTEGER
from rvconvert.rules.kinds import Elementwise, Shape

if TYPE_CHECKING:
    from torch import fx

    from rvconvert.program.recorded_graph import RecordedGraph

__all__ = ["find_latents", "is_named", "named_latents"]

_WRITES = frozenset("setitem index_put index_copy scatter masked_scatter".split())


def named_latents(graph: RecordedGraph, names: tuple[str, ...]) -> list[fx.Node]:
    """The draws that a person named."""
    return [n for n in graph.recording.draws if any(is_named(n, name) for name in names)]


def is_named(draw: fx.Node, name: str) -> bool:
    """``name`` is the draw's name in the plan, or its ``file.py:line``."""
    place = str(draw.meta.get("where", ""))
    return name in (draw.name, place) or place.endswith("/" + name.lstrip("/"))


def find_latents(graph: RecordedGraph, posterior: frozenset[str] | None = None) -> list[fx.Node]:
    """Draws that a decoder's value depends on and whose scale or location the input reaches.

    Args:
        graph: of the recording.
        posterior: the layers that place the latents in training, where that is known: what others place, a prior's, is no latent,
            nor is a draw that only stands beside a condition.
    """
    found = _latents(graph)
    if not found:
        graph.by_products = True
        found = _latents(graph)
    if posterior:
        found = [draw for draw in found if not (placed := graph.layers_placing(draw)) or placed & posterior]
    graph.posterior = frozenset().union(*map(graph.layers_placing, found)) if found else None
    return found if found or posterior is not None else _latents(graph, beside=True)


def _latents(graph: RecordedGraph, *, beside: bool = False) -> list[fx.Node]:
    """The latents; with ``beside`` a draw that only stands beside the input, ``cat([x, eps])``, or shifts it is one."""
    noise: dict[fx.Node, frozenset[fx.Node]] = {}  # draws that a value is, scaled and shifted by constants
    posterior: dict[fx.Node, frozenset[fx.Node]] = {}  # draws that the input has placed or scaled
    found: set[fx.Node] = set()
    values: set[fx.Node] = set()  # a decoder's, and what is made of them
    shifted: set[fx.Node] = set()  # draws that an input alone, through no layer, has placed
    decoded: set[fx.Node] = set()
    settled: set[fx.Node] = set()  # draws that have a location
    located: set[fx.Node] = set()  # of these, the ones that an encoder has given it
    drawn: set[fx.Node] = set()  # what is made of latents through no layer
    none: frozenset[fx.Node] = frozenset()
    depends = graph.recording.depends
    for node in graph.given:
        posterior[node] = frozenset((node,))
    for node in graph.nodes:
        sources = node.all_input_nodes
        placed = none.union(*(posterior.get(n, none) for n in sources))
        plain = none.union(*(noise.get(n, none) for n in sources))
        if "draw" in node.meta:
            own = frozenset((node,))
            by_input = any(n in graph.learned or n in posterior for n in sources if not asks_of(node, n))
            if not node.meta["draw"].can_be_latent and any(n in values for n in sources):
                by_input = False  # a token drawn from what a decoder gives, which it takes back
            noise[node], posterior[node] = (none, placed | own) if by_input else (own, placed)
            if by_input:
                settled.add(node)
                located.add(node)
                drawn.add(node)
            continue
        if node not in depends or not (placed or plain):
            continue
        if graph.decodes(node, depends):
            found |= placed
            decoded |= plain
            posterior[node], noise[node] = placed, none
            values.add(node)
            continue
        behind = [n for n in sources if n in values]
        if behind:
            values.add(node)
            # A factor or a place of what a decoder gives, with a posterior of its own; a term of it, which has a location too.
            beside_it = none.union(*(posterior.get(n, none) for n in sources if n not in values))
            if graph.rule_name(node) in PRODUCTS or not graph.is_kind(node, Elementwise, Shape):
                found |= beside_it
            elif graph.rule_name(node) in LOCATIONS:
                found |= beside_it & located
        # What is added to a latent as it is, a diffusion's noise, has nothing of the input itself.
        others = [n for n in sources if not noise.get(n) and n not in drawn]
        reached = any(n in graph.learned or posterior.get(n) for n in others)
        moves = graph.is_kind(node, Shape) or graph.rule_name(node) in _WRITES
        fresh = none.union(*(posterior.get(n, none) for n in sources if n in drawn)) - settled
        if plain and reached and not _gates(graph, node, noise) and (beside or not moves):
            fresh |= plain
            placed, plain = placed | plain, none
        by = [n for n in others if n in graph.learned] if graph.rule_name(node) in LOCATIONS else []
        if by:
            settled |= fresh
            located |= fresh if any(n not in values for n in by) else none
        if placed and (fresh or all(not posterior.get(n) or n in drawn for n in sources)):
            drawn.add(node)
        if any(n in graph.raw for n in others):
            shifted |= plain
        if graph.compares(node) and not placed:
            plain = none  # a mask of a fixed probability is as dropout's
        posterior[node], noise[node] = placed, plain
    if not found:  # an encoder alone, whose sample is what it gives; noise on an input, if there is no other draw
        leaving = [n for n in graph.outputs if rank_of(n) >= 2]
        found = set(none.union(*(posterior.get(n, none) for n in leaving)))
        if beside:
            found = found or (shifted & decoded.union(*(noise.get(n, none) for n in leaving)))
    return [n for n in graph.recording.draws if n in found and n.meta["draw"].law is not INTEGER]


def _gates(graph: RecordedGraph, node: fx.Node, noise: dict[fx.Node, frozenset[fx.Node]]) -> bool:
    """A product with a draw of zeros and ones: a mask, not a scale."""
    drawn = {d.meta["draw"].law.name for n in node.all_input_nodes for d in noise.get(n, ())}
    return graph.rule_name(node) in PRODUCTS and bool(drawn) and drawn <= {"Bernoulli"}
