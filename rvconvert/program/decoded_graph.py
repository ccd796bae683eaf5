"""A recorded graph whose latents are known: what is random, what a decoder gives, and what a value is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from rvconvert.program.recorded_graph import DIFFERENCES, WRITES, RecordedGraph, rank_of, size_of
from rvconvert.rules.kinds import Elementwise, Shape

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DecodedGraph"]


class DecodedGraph(RecordedGraph):
    """A recorded graph with its random values, the decoded ones among them.

    Attributes:
        latents: the draws that become random variables, in order.
        random: what depends on them or on a random input.
        decoded: the random nodes with a decoder behind them.
    """

    latents: list[fx.Node]
    decoded: set[fx.Node]

    def decode(self, latents: list[fx.Node]) -> None:
        """Find what is random and what is decoded, given the latents."""
        self.latents = latents
        self.samples = {n for n in self.recording.draws if n not in latents}
        self.nuisance = self.forward_of(self.samples)
        self.random = self.forward_of([*latents, *self.given], stop=self.samples_likelihood)
        self.bare = self.forward_of([*latents, *self.given], stop=self.has_weights) & self.random
        decoded = self.closure(self.decodes)
        if not decoded:
            self.by_products = True
            decoded = self.closure(self.decodes)
        if not decoded and self.given:  # a bare decoder of functions alone
            decoded = {n for n in self.random if n not in self.given}
        self.decoded = self.without_flows(decoded)

    def without_flows(self, decoded: set[fx.Node]) -> set[fx.Node]:
        """Decoded values, without what a flow makes of a latent for its prior alone, where something else is decoded.

        Such a value has the latent's shape, and some way from the draw to it goes through no layer: a coupling's, a residual one.
        """
        flowing: set[fx.Node] = set()
        for draw in self.latents:
            carried = self.forward_of((draw,), stop=self.decodes)
            for node in carried & decoded:
                ends = node.meta.get("shape") == draw.meta.get("shape")
                ends = ends and (not self.fits_an_input(node) or self.meets_a_prior(node))
                if ends and not any(self.decodes(n) for n in self.ahead_of(node)):
                    flowing.update(self.between(draw, node))
        rest = self.closure(lambda n: n not in flowing and self.decodes(n))
        shapes = {draw.meta.get("shape") for draw in self.latents}
        return rest if any(n.meta.get("shape") not in shapes and rank_of(n) > 1 for n in rest) else decoded

    def meets_a_prior(self, node: fx.Node) -> bool:
        """A location that layers make of what is given is subtracted from it, and no input is."""
        others = {n for user in node.users if self.rule_name(user) in DIFFERENCES for n in user.all_input_nodes if n is not node}
        return bool(others & (self.learned | self.weights) - self.random) and not others & self.raw

    def closure(self, begins: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """The random nodes at or behind one where ``begins`` holds."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.random and (begins(node) or any(n in found for n in node.all_input_nodes)):
                found.add(node)
        return found

    def samples_likelihood(self, node: fx.Node) -> bool:
        """A draw that is no latent, or a comparison with one: what it makes of a random value is a draw at its mean."""
        return node in self.samples or (self.compares(node) and any(n in self.nuisance for n in node.all_input_nodes))

    def decodes_between(self, first: fx.Node, second: fx.Node) -> bool:
        """A decoder's operation lies between the two."""
        return any(self.decodes(n) for n in self.between(first, second))

    def joins_others(self, source: fx.Node, value: fx.Node) -> bool:
        """Other random values take part in ``value``, which is made of ``source``."""
        operands = [n for node in self.between(source, value) for n in node.all_input_nodes if n in self.random]
        return any(n is not source and not self.behind(source, n) for n in operands)

    def joins_decoded(self, source: fx.Node, value: fx.Node) -> bool:
        """Something else that a decoder gives takes part in ``value``, made of ``source``: a product or a sum of several."""
        operands = [n for node in self.between(source, value) for n in node.all_input_nodes if n in self.decoded]
        return any(n is not source and not self.behind(source, n) for n in operands)

    def are_one(self, first: fx.Node, second: fx.Node) -> bool:
        """One is the other, or both are a value, but for views and functions of each element: logits and probabilities."""
        origins = self.origin(first), self.origin(second)
        one = origins[0] is origins[1] or self.same(first, second) or self.same(second, first)
        return one or self.same(origins[0], second) or self.same(origins[1], first)  # a step, and what steps are joined to

    def origin(self, node: fx.Node) -> fx.Node:
        """What ``node`` is the whole of, but for a function of each element."""
        while self.is_kind(node, Elementwise, Shape) and "part" not in node.meta and len(self.values_in(node)) == 1:
            (value,) = self.values_in(node)
            if size_of(value) != size_of(node):
                break
            node = value
        return node

    def stem(self, node: fx.Node) -> fx.Node:
        """What ``node`` is a view or an elementwise function of, as far back as a layer."""
        while not self.decodes(node) and self.is_kind(node, Elementwise, Shape):
            sources = self.random_in(node)
            if len(sources) != 1:
                break
            (node,) = sources
        return node

    def parts(self, node: fx.Node) -> list[fx.Node]:
        """What a value is joined of, as steps are stacked; itself where it is not."""
        joined = node.args[0] if node.args and self.rule_name(node) in ("stack", "cat") else None
        return [n for n in joined if isinstance(n, fx.Node)] if isinstance(joined, (list, tuple)) else [node]

    def all_parts(self, node: fx.Node) -> list[fx.Node]:
        """The same through joins of joins and writes into a larger tensor, as steps fill one."""
        todo, found = [node], []
        while todo:
            each = todo.pop(0)
            written = (
                [n for n in (each.args[0], each.args[-1]) if isinstance(n, fx.Node)] if self.rule_name(each) in WRITES else []
            )
            parts = [n for n in written or self.parts(each) if n is not each]
            todo += parts
            found += [] if parts else [each]
        return found

    def is_part(self, node: fx.Node) -> bool:
        """One of several results of a layer, as a mean and a log-variance are."""
        node = self.parts(node)[0]
        while self.is_kind(node, Elementwise, Shape) and len(self.values_in(node)) == 1:
            if "part" in node.meta:
                return True
            (node,) = self.values_in(node)
        return False
