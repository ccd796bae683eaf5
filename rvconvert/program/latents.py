"""Which draws are latents: a decoder's value depends on them, and the input reaches their scale or location."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rvconvert.program.recorded_graph import LOCATIONS, PRODUCTS, WRITES, Posterior, asks_of, rank_of
from rvconvert.rules.draws import INTEGER, ONE_HOT
from rvconvert.rules.kinds import Elementwise, Shape

if TYPE_CHECKING:
    from torch import fx

    from rvconvert.program.recorded_graph import RecordedGraph

__all__ = ["find_latents", "is_named", "named_latents"]


def named_latents(graph: RecordedGraph, names: tuple[str, ...]) -> list[fx.Node]:
    """The draws that a person named."""
    return [n for n in graph.recording.draws if any(is_named(n, name) for name in names)]


def is_named(draw: fx.Node, name: str) -> bool:
    """``name`` is the draw's name in the plan, or its ``file.py:line``."""
    place = str(draw.meta.get("where", ""))
    return name in (draw.name, place) or place.endswith("/" + name.lstrip("/"))


def find_latents(graph: RecordedGraph, posterior: Posterior | None = None) -> list[fx.Node]:
    """Draws that a decoder's value depends on and whose scale or location the input reaches.

    Args:
        graph: of the recording.
        posterior: of the latents in training, where that is known. A draw that fewer inputs place, by other layers, is a prior's,
            and no latent; nor is one that only stands beside a condition.
    """
    found = _latents(graph)
    if not found:
        graph.by_products = True
        found = _latents(graph)
    if posterior is not None:
        found = [n for n in found if _layers(graph, n) & posterior.layers or graph.inputs_placing([n]) >= posterior.inputs]
    if found:
        layers: frozenset[str] = frozenset().union(*(_layers(graph, n) for n in found))
        graph.posterior = Posterior(layers, graph.inputs_placing(found))
    return found if found or posterior is not None else _latents(graph, beside=True)


def _layers(graph: RecordedGraph, draw: fx.Node) -> frozenset[str]:
    """Those placing a latent; "" stands for none, as of a direction that a magnitude multiplies."""
    return graph.layers_placing(draw) or frozenset(("",))


Draws = frozenset["fx.Node"]
_NONE: Draws = frozenset()


def _latents(graph: RecordedGraph, *, beside: bool = False) -> list[fx.Node]:
    """The latents; with ``beside`` a draw that only stands beside the input, ``cat([x, eps])``, or shifts it is one."""
    walk = _Walk(graph, beside)
    for node in graph.nodes:
        walk.visit(node)
    found = walk.found
    if not found:  # an encoder alone, whose sample is what it gives; noise on an input, if there is no other draw
        leaving = [n for n in graph.outputs if rank_of(n) >= 2]
        found = set(_NONE.union(*(walk.posterior.get(n, _NONE) for n in leaving)))
        if beside:
            found = found or (walk.shifted & walk.decoded.union(*(walk.noise.get(n, _NONE) for n in leaving)))
    return [n for n in graph.recording.draws if n in found and n.meta["draw"].law is not INTEGER]


class _Walk:
    """Follows draws through a graph, from its beginning to its end.

    Attributes:
        noise, posterior: of a value, the draws that it is, scaled and shifted by constants; those that the input has placed.
        found: the latents.
        values: what a decoder gives, and what is made of it.
        drawn: what is made of placed draws through no layer: latents.
        scaled: draws that a parameter has scaled.
        settled, located: draws that have a location; of these, the ones that an encoder has given it.
        shifted: draws that an input alone, through no layer, has placed.
        decoded: draws that go into a decoder as they are.
        predicted: draws whose law has parameters that a decoder gives, of a likelihood.
    """

    def __init__(self, graph: RecordedGraph, beside: bool) -> None:
        self.graph, self.beside = graph, beside
        self.noise: dict[fx.Node, Draws] = {}
        self.posterior = {node: frozenset((node,)) for node in graph.given}
        self.found: set[fx.Node] = set()
        self.values: set[fx.Node] = set()
        self.drawn: set[fx.Node] = set()
        self.scaled: set[fx.Node] = set()
        self.settled: set[fx.Node] = set()
        self.located: set[fx.Node] = set()
        self.shifted: set[fx.Node] = set()
        self.decoded: set[fx.Node] = set()
        self.predicted: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """The next node."""
        if "draw" in node.meta:
            self.draws(node)
            return
        placed, plain = (_NONE.union(*(of.get(n, _NONE) for n in node.all_input_nodes)) for of in (self.posterior, self.noise))
        if node not in self.graph.random or not (placed or plain):
            return
        if self.graph.decodes(node):
            self.found |= placed
            self.decoded |= plain
            self.values.add(node)
            self.posterior[node], self.noise[node] = placed, _NONE
            return
        if any(n in self.values for n in node.all_input_nodes):
            self.meets_a_decoder(node)
        placed, plain = self.places(node, placed, plain)
        if (self.graph.compares(node) or str(node.meta.get("dtype")) == "torch.int64") and not placed:
            plain = _NONE  # a mask of a fixed probability, or an order at random, is as dropout's
        self.posterior[node], self.noise[node] = placed, plain

    def draws(self, node: fx.Node) -> None:
        """A draw, which has parameters of its own if the input reaches its arguments."""
        graph, own = self.graph, frozenset((node,))
        placed = _NONE.union(*(self.posterior.get(n, _NONE) for n in node.all_input_nodes if not asks_of(node, n)))
        by_input = any(n in graph.learned or n in self.posterior for n in node.all_input_nodes if not asks_of(node, n))
        if any(n in self.values and not asks_of(node, n) for n in node.all_input_nodes):
            self.predicted.add(node)
            draw = node.meta["draw"]
            by_input = by_input and draw.can_be_latent and draw.law is not ONE_HOT  # not a token that a decoder takes back
        self.noise[node], self.posterior[node] = (_NONE, placed | own) if by_input else (own, placed)
        if by_input:
            for held in (self.drawn, self.settled, self.located):
                held.add(node)

    def meets_a_decoder(self, node: fx.Node) -> None:
        """A factor of what a decoder gives, or its place, is a latent if the input has placed it; a term, if at a location."""
        self.values.add(node)
        met = _NONE.union(*(self.posterior.get(n, _NONE) for n in node.all_input_nodes if n not in self.values))
        met = met - self.predicted
        if self.graph.rule_name(node) in PRODUCTS or not self.graph.is_kind(node, Elementwise, Shape):
            self.found |= met
        elif self.graph.rule_name(node) in LOCATIONS:
            self.found |= met & self.located

    def places(self, node: fx.Node, placed: Draws, plain: Draws) -> tuple[Draws, Draws]:
        """The draws that the input has placed or scaled by now, and the others."""
        graph, sources = self.graph, node.all_input_nodes
        if any(n in graph.weights and n.meta.get("requires_grad") for n in sources):
            self.scaled |= plain
        # What is added to a whole latent, a diffusion's noise, has nothing of the input or the model itself.
        bare = not plain & self.scaled
        others = [n for n in sources if not self.noise.get(n) and not (bare and n in self.drawn and self.is_whole(n))]
        reached = any(n in graph.learned or self.posterior.get(n) for n in others)
        moves = graph.is_kind(node, Shape) or graph.rule_name(node) in WRITES
        fresh = _NONE.union(*(self.posterior.get(n, _NONE) for n in sources if n in self.drawn)) - self.settled
        if plain and reached and (self.beside or not moves):
            added = _NONE if _gates(graph, node, self.noise) or self.disturbs(node, others, plain) else plain
            fresh |= added
            placed, plain = placed | added, _NONE
        learned = [n for n in others if n in graph.learned]
        if learned and graph.rule_name(node) in LOCATIONS:
            self.settled |= fresh
            self.located |= fresh if any(n not in self.values for n in learned) else _NONE
        if placed and (fresh or all(n in self.drawn or n not in graph.learned for n in sources)):
            self.drawn.add(node)
        if any(n in graph.raw for n in others):
            self.shifted |= plain
        return placed, plain

    def disturbs(self, node: fx.Node, others: list[fx.Node], noise: Draws) -> bool:
        """Noise of a constant scale on what a decoder gives, of an input's size: for a network that refines that."""
        fits = all(n in self.values and self.graph.fits_an_input(n) for n in others)
        return self.graph.rule_name(node) in LOCATIONS and fits and not noise & self.scaled

    def is_whole(self, node: fx.Node) -> bool:
        """A latent, or a multiple of one, that serves something else too."""
        random = self.graph.random
        while sum(n in random for n in node.users) < 2:
            sources = [n for n in node.all_input_nodes if n in self.drawn]
            if len(sources) != 1:
                return False
            (node,) = sources
        return True


def _gates(graph: RecordedGraph, node: fx.Node, noise: dict[fx.Node, Draws]) -> bool:
    """A product with a draw of zeros and ones, or a sum: a mask, not a scale or a place."""
    drawn = {d.meta["draw"].law.name for n in node.all_input_nodes for d in noise.get(n, ())}
    return graph.rule_name(node) in PRODUCTS | LOCATIONS and bool(drawn) and drawn <= {"Bernoulli"}
