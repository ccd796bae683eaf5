"""Roles: which draws are latents, where the reconstruction is, and what a loss inside the method takes at its mean.

Assigned once, by ``assign`` over a recorded graph; the rewriting, the plan and the report read them. A draw is a *latent*
where a decoder's value depends on it and the input reaches its scale or location; every other draw is left as it is, as
dropout is. The *reconstruction* is every random value with a decoder behind it, at the point where it leaves the method or
first meets an input or a loss, its last elementwise functions included.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rvconvert.program.latents import find_latents, named_latents
from rvconvert.program.reconstructed_graph import ReconstructedGraph
from rvconvert.program.recorded_graph import asks_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import fx

    from rvconvert.capture.recording import Recording
    from rvconvert.program.recorded_graph import Posterior

__all__ = ["Roles", "assign"]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of the nodes of a recording.

    Attributes:
        latents: the draws that become random variables, in order.
        random: the nodes that depend on a latent or a random input.
        reconstructions: where L_c is attached.
        beside: (value, reconstruction) pairs: values that leave or enter a loss and are the same but for a view or an
            elementwise function, or are a loss made of it, so that L_c joins whichever is trained on.
        at_mean: (value, user) pairs: what a loss inside the method takes at its mean.
        losses: outputs that are a loss or a term of one.
        decoded: the random nodes with a decoder behind them.
        drawn: exponentials in scores of the latents alone, such as the density of a mixture, which a loss takes from a draw.
        unused: random nodes whose value nothing uses, such as a check of a distribution's arguments.
        indices: places that were picked at the means, and what is made of such alone: plain tensors.
        picked: of the indices, those picked by a latent that lead into a decoder: a category, an entry of a codebook.
        scores: values of a loss function, errors, and what is made of them: Python may report them, as logs do.
        posterior: of the latents, if these are drawn from what an encoder made of the input.
        hidden: latents, and values of their size on the way to a reconstruction, that leave.
    """

    latents: tuple[fx.Node, ...]
    random: frozenset[fx.Node]
    reconstructions: tuple[fx.Node, ...]
    beside: tuple[tuple[fx.Node, fx.Node], ...]
    at_mean: frozenset[tuple[fx.Node, fx.Node]]
    losses: frozenset[fx.Node]
    decoded: frozenset[fx.Node]
    drawn: frozenset[fx.Node]
    unused: frozenset[fx.Node]
    indices: frozenset[fx.Node]
    picked: frozenset[fx.Node]
    scores: frozenset[fx.Node]
    posterior: Posterior | None
    hidden: frozenset[fx.Node]

    def of(self, node: fx.Node) -> str:
        """The role of a node in a word; empty if it has none of its own."""
        if node in self.latents:
            return "latent"
        if node in self.reconstructions:
            return "reconstruction"
        if "draw" in node.meta:
            return "nuisance"
        if node in self.drawn:
            return "drawn"
        return "loss" if node in self.losses else ""


def assign(recording: Recording, named: Iterable[str] = (), *, paths: bool = False, posterior: Posterior | None = None) -> Roles:
    """The roles in a recording.

    Args:
        recording: of the method.
        named: the draws that are latents whatever they do, by the end of their ``file:line`` or their node's name.
        paths: random variables are on paths of their own, so that weights of samples are weights.
        posterior: of the method's latents in training, if known: what fewer inputs place, by other layers, is a prior's draw.
    """
    graph = _Assignment(recording)
    latents = named_latents(graph, tuple(named)) if named else find_latents(graph, posterior)
    graph.decode(latents)
    graph.score()
    return graph.roles(paths)


_COUNTS = ("_pack_padded_sequence", "_pad_packed_sequence")  # of whose results one says how many sequences go on
_EFFECTS = ("register_hook", "retain_grad")


class _Assignment(ReconstructedGraph):
    """The roles of a graph's nodes, given its latents and losses."""

    def roles(self, paths: bool) -> Roles:
        """All of them."""
        indices = self.indices
        leaving = [n for n in dict.fromkeys(self.outputs) if n in self.random and n not in indices]
        compared = self.compared()
        edges = self.edges(compared)
        leaves = self.leaves(leaving, compared)
        meeting = {edge.value for edge in edges if edge.at is not None}
        if meeting:  # what is kept on the model beside a loss is no output, nor is a state to go on from
            leaves = [n for n in leaves if n in self.returned and self.is_decoded_beside(n, meeting)]
        # Inside, a reconstruction meets an input, or enters a loss where nothing else is decoded.
        inside = meeting or (set() if leaves else {edge.value for edge in edges})
        candidates = inside | {source for source, _ in compared}
        chosen = self.chosen(candidates, meeting, edges, leaves)
        at_mean = {(edge.value, edge.user) for edge in edges if edge.value in candidates}
        for index, source in enumerate(chosen):
            if "shape" not in source.meta:  # means and variances by chunk: what they are cut from is the reconstruction
                chosen[index] = next(n for n in source.all_input_nodes if n in self.random)
                at_mean.add((chosen[index], source))
        if not paths:
            at_mean |= self.importance_weights(self.scoring & self.loss_like) | self.towards_whole(indices)
        compared_at_mean, drawn_from = self.at_mean()
        at_mean |= compared_at_mean
        chosen = chosen or drawn_from
        related = [*leaving, *(edge.value for edge in edges if "shape" in edge.value.meta)]
        return Roles(
            tuple(self.latents),
            frozenset(self.random),
            tuple(chosen),
            tuple(self.beside(chosen, related, at_mean)),
            frozenset(at_mean),
            self.losses,
            frozenset(self.decoded),
            frozenset() if paths else self.drawn({*chosen, *(source for source, user in at_mean if not asks_of(user, source))}),
            self.unused(),
            indices,
            frozenset() if paths else self.picked(indices),
            self.scores(),
            self.posterior,
            self.hidden(leaving, chosen),
        )

    def unused(self) -> frozenset[fx.Node]:
        """Random nodes, and sizes, that reach neither an output nor an effect."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            effect = node.meta.get("mutates") or "draw" in node.meta or self.rule_name(node) in _EFFECTS
            effect = effect or node.op in ("placeholder", "output")
            of_sizes = node.op.startswith("call_") and "shape" not in node.meta
            if (node in self.random or of_sizes) and not effect and all(user in found for user in node.users):
                found.add(node)
        return frozenset(found)

    def picked(self, indices: frozenset[fx.Node]) -> frozenset[fx.Node]:
        """Indices that a value before the decoder picks, and that a decoder's layers act on, through a one-hot vector or not."""
        found = set()
        for node in indices:
            by = [n for n in self.random_in(node) if n not in indices and self.rule_name(n) not in _COUNTS]
            if by and not any(n in self.decoded for n in by) and any(self.has_weights(n) for n in self.ahead_of(node)):
                found.add(node)
        return frozenset(found)

    def hidden(self, leaving: list[fx.Node], chosen: list[fx.Node]) -> frozenset[fx.Node]:
        """Of what leaves and is no reconstruction: a latent, or what a flow makes of one."""
        shapes = {n.meta.get("shape") for n in self.latents}
        parameters = self.parameters_of(self.latents)
        found = set()
        for node in leaving:
            on_the_way = node.meta.get("shape") in shapes and any(self.decodes_between(node, n) for n in chosen)
            if node not in chosen and node not in parameters and (self.is_latent(node) or on_the_way):
                found.add(node)
        return frozenset(found)
