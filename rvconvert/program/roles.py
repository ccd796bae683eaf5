"""Roles: which draws are latents, where the reconstruction is, and what a loss inside the method takes at its mean.

Assigned once, by ``assign`` over a recorded graph; the rewriting, the plan and the report read them. A draw is a *latent*
where a decoder's value depends on it and the input reaches its scale or location; every other draw is left as it is, as
dropout is. The *reconstruction* is every random value with a decoder behind it, at the point where it leaves the method or
first meets an input or a loss, its last elementwise functions included.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import fx

from rvconvert.program.latents import find_latents, named_latents
from rvconvert.program.recorded_graph import DIFFERENCES, PRODUCTS, Posterior, RecordedGraph, asks_of, batch_of, rank_of, size_of
from rvconvert.rules.kinds import Elementwise, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rvconvert.capture.recording import Recording

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
    return graph.roles(latents, paths)


# Errors, log-likelihoods and their like are no activation of a last layer: a reconstruction ends before them.
_LOGARITHMS = frozenset("log log1p log2 log10 log_softmax logsigmoid".split())
_ERRORS = frozenset("pow square abs neg".split()) | _LOGARITHMS
_EXPONENTIALS = frozenset("exp expm1".split())
_SUMMING = frozenset("softmax log_softmax logsumexp logaddexp".split())
_PICKS = frozenset("argmax argmin argsort".split())
_RESCALINGS = frozenset("mul multiply add sub subtract rsub div true_divide divide clamp clip clamp_min clamp_max".split())
_OF_CORRELATIONS = frozenset("cov corrcoef sort msort".split())
_EVEN = frozenset("pow square abs norm vector_norm huber_loss".split())


class _Assignment(RecordedGraph):
    """The roles of a graph's nodes, given its latents."""

    decoded: set[fx.Node]

    def roles(self, latents: list[fx.Node], paths: bool) -> Roles:
        """Reconstructions and losses, given the latents."""
        self.nuisance = self.forward_of(n for n in self.recording.draws if n not in latents)
        self.samples = {n for n in self.recording.draws if n not in latents}
        random = self.forward_of([*latents, *self.given], stop=self.samples_likelihood)
        decoded = self.closure(random, lambda n: self.decodes(n, random))
        if not decoded:
            self.by_products = True
            decoded = self.closure(random, lambda n: self.decodes(n, random))
        if not decoded and self.given:  # a bare decoder of functions alone
            decoded = {n for n in random if n not in self.given}
        decoded = self.without_flows(decoded, latents, random)
        self.decoded = decoded
        loss_like = self.loss_like(random, decoded)
        leaving = [n for n in dict.fromkeys(self.outputs) if n in random]
        losses = frozenset(n for n in leaving if n in loss_like)
        compared = self.compared(random, decoded)
        features = self.forward_of(user for _, user in compared)
        leaves = [n for n in leaving if n in decoded and n not in losses and n not in features]
        leaves = self.without_latents(leaves, latents, random)
        leaves = self.reconstructions_that_leave(leaves, random)
        inside = self.only_towards(losses, random)
        edges = list(dict.fromkeys([*self.frontier(losses, inside, decoded, random), *compared]))
        found = [(edge, self.meets_input(*edge, inside, random, losses)) for edge in edges]
        edges = [edge if at is None else self.whole(*edge, at, random) for edge, at in found]
        meets = [(source, at) for (source, _), (_, at) in zip(edges, found, strict=True)]
        meeting = {source for source, at in meets if at is not None}
        if meeting:  # what is kept on the model beside a loss is no output
            leaves = [n for n in leaves if n in self.returned]
        chosen = list(leaves)
        heads = self.heads(meets, leaves)
        candidates = meeting or (set() if leaves else {source for source, _ in edges})
        candidates = candidates | {source for source, _ in compared}
        for source in (n for n in self.nodes if n in candidates):
            # What leaves may be a copy for a log, without a gradient, or for display of what the loss is made of.
            shown = source in meeting
            chosen = [source if self.is_copy(source, n, shown=shown) else n for n in chosen]
            known = any(self.are_one(source, n) or self.behind(n, source) for n in chosen)
            known = known and not (source in meeting and self.is_stage(source, chosen, random))
            known = known or source in heads
            if not known and not any(self.decodes_between(source, n, random) for n in leaves):
                chosen.append(source)
        at_mean = {(source, user) for source, user in edges if source in candidates}
        for index, source in enumerate(chosen):
            if "shape" not in source.meta:  # means and variances by chunk: what they are cut from is the reconstruction
                chosen[index] = next(n for n in source.all_input_nodes if n in random)
                at_mean.add((chosen[index], source))
        if not paths:
            at_mean |= self.importance_weights(inside & loss_like)
        drawn_from: list[fx.Node] = []
        for node in self.nodes:  # a loss function takes what it compares at the mean, a draw of the likelihood its parameters
            sources = [n for n in node.all_input_nodes if n in random]
            if node in random and self.is_loss(node):
                at_mean |= {(n, node) for n in sources if n in decoded}
            elif node not in random and sources and node.op != "output" and self.samples_likelihood(node):
                at_mean |= {(n, node) for n in sources}
                drawn_from += [n for n in sources if n in decoded and not ("draw" in node.meta and asks_of(node, n))]
        chosen = chosen or list(dict.fromkeys(drawn_from))
        indices = self.indices(random)
        related = [*leaving, *(source for source, _ in edges if "shape" in source.meta)]
        beside = [
            (value, main)
            for main in chosen
            for value in dict.fromkeys(related)
            if value is not main and value in decoded and value not in losses and not self.stops_gradient(main, value)
            if self.are_one(value, main)
            # What is made of the other one's mean has no variance.
            if not any(value in self.ahead_of(user) for source, user in at_mean if source is main)
            if not any(main in self.ahead_of(user) for source, user in at_mean if source is value)
        ]
        beside = list(dict(reversed(beside)).items())
        for main in chosen:  # a loss that takes a value that leaves too, but not at its mean
            taken = {main, *(value for value, other in beside if other is main)}
            means = [user for source, user in at_mean if source in taken]
            beside += [
                (n, main) for n in losses if n not in taken and self.behind(main, n) and not any(self.behind(x, n) for x in means)
            ]
        return Roles(
            tuple(latents),
            frozenset(random),
            tuple(chosen),
            tuple(beside),
            frozenset(at_mean),
            losses,
            frozenset(decoded),
            frozenset() if paths else self.drawn(inside, random, {*chosen, *(source for source, _ in at_mean)}),
            self.unused(random),
            indices,
            frozenset() if paths else self.picked(indices, random),
            self.scores(random, decoded),
            self.posterior,
            self.hidden(leaving, latents, chosen, random),
        )

    def drawn(self, scores: set[fx.Node], random: set[fx.Node], ends: set[fx.Node]) -> frozenset[fx.Node]:
        """What among ``scores`` leads to no layer and to none of ``ends``, is made of none, and has no moments to rely on.

        Densities of one latent under many components are one variable; as so many independent ones their logsumexp grows with
        the posterior's variance, and a loss falls without bound. So does the density of a draw whose elements are correlated,
        and a loss function that has no rule for a latent has no gradient for its variance. The model's own estimate, from a
        draw, has no such error.
        """
        scores = scores - self.forward_of(ends)
        leads: set[fx.Node] = set()
        for node in reversed(self.nodes):
            layer = self.has_weights(node) and self.decodes(node, random)
            if node in ends or layer or any(user in leads for user in node.users):
                leads.add(node)
        return frozenset(
            n for n in scores - leads if self.is_exponential(n) or self.is_of_correlations(n) or self.is_loss_at_mean(n)
        )

    def importance_weights(self, scores: set[fx.Node]) -> set[tuple[fx.Node, fx.Node]]:
        """(score, exponential of it): weights of samples, which the moments of a Gaussian log-weight would let explode."""
        weighed = [n for n in scores if n in self.decoded]
        return {(n, user) for n in weighed for user in n.users if user in scores and self.is_exponential(user)}

    def is_exponential(self, node: fx.Node) -> bool:
        """Of scores that are summed, a density's or a weight's: not one that leaves as it is, the rate of an example."""
        made = self.ahead_of(node)
        summed = (n for n in made - {node} if n.op != "output" and self.reduces(n, [x for x in n.all_input_nodes if x in made]))
        name = self.rule_name(node)
        return name in _SUMMING or (name in _EXPONENTIALS and any(summed))

    def is_of_correlations(self, node: fx.Node) -> bool:
        """A covariance, an order along the batch, or a linear system: ``L^-1 (z - mu)`` of a Gaussian of covariance ``L L^T``."""
        name = str(getattr(node.meta.get("function"), "__name__", ""))
        return "solve" in name or name in _OF_CORRELATIONS

    def is_loss_at_mean(self, node: fx.Node) -> bool:
        """A loss function without an expected value."""
        return self.is_loss(node) and getattr(node.meta["rule"].kind, "expected", None) is None

    def samples_likelihood(self, node: fx.Node) -> bool:
        """A draw that is no latent, or a comparison with one: what it makes of a random value is a draw at its mean."""
        return node in self.samples or (self.compares(node) and any(n in self.nuisance for n in node.all_input_nodes))

    def unused(self, random: set[fx.Node]) -> frozenset[fx.Node]:
        """Random nodes that reach neither an output nor an effect."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            effect = node.meta.get("mutates") or "draw" in node.meta or node.op == "placeholder"
            if node in random and not effect and all(user in found for user in node.users):
                found.add(node)
        return frozenset(found)

    def indices(self, random: set[fx.Node]) -> frozenset[fx.Node]:
        """What argmax and its kin give, and what is made of that and of nothing else that is random."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            sources = [n for n in node.all_input_nodes if n in random]
            if node not in random or not sources:
                continue
            picked = self.rule_name(node) in _PICKS or "part" in node.meta
            if all(n in found for n in sources) or (picked and str(node.meta.get("dtype")) == "torch.int64"):
                found.add(node)
        return frozenset(found)

    def picked(self, indices: frozenset[fx.Node], random: set[fx.Node]) -> frozenset[fx.Node]:
        """Indices that a value before the decoder picks, and that a decoder's layers act on, through a one-hot vector or not."""
        found = set()
        for node in indices:
            by = [n for n in node.all_input_nodes if n in random and n not in indices]
            if by and not any(n in self.decoded for n in by) and any(self.has_weights(n) for n in self.ahead_of(node)):
                found.add(node)
        return frozenset(found)

    def loss_like(self, random: set[fx.Node], decoded: set[fx.Node]) -> set[fx.Node]:
        """Values that are a loss: of a loss function, an error against an input, or one number for each example."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node not in random:
                continue
            sources = [n for n in node.all_input_nodes if n in random]
            if self.is_loss(node) or self.is_error(node, random, decoded):
                found.add(node)
            elif self.decodes(node, random):
                continue
            summary = self.reduces(node, sources) and (size_of(node) == 1 or rank_of(node) <= 1)
            if summary or (any(n in found for n in sources) and not self.is_rescaled(node, found, decoded)):
                found.add(node)
        return found

    def is_rescaled(self, node: fx.Node, losses: set[fx.Node], decoded: set[fx.Node]) -> bool:
        """What a decoder gives, divided or shifted by one number for each example or joined to it: a sum, a norm, a maximum."""
        given = [n for n in node.all_input_nodes if n in decoded and n not in losses]
        whole = [n for n in given if size_of(n) == size_of(node) or (len(self.parts(node)) > 1 and rank_of(n) > 1)]
        return bool(whole) and all(size_of(n) < size_of(node) for n in node.all_input_nodes if n in losses)

    def scores(self, random: set[fx.Node], decoded: set[fx.Node]) -> frozenset[fx.Node]:
        """A loss function's values and errors, numbers made of them, and what is one number."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            scores = self.is_loss(node) or self.is_error(node, random, decoded) or any(n in found for n in node.all_input_nodes)
            scores = scores or ("shape" in node.meta and size_of(node) == 1)
            if scores and node in random and not self.decodes(node, random) and not self.compares(node):
                found.add(node)
        return frozenset(found)

    def is_error(self, node: fx.Node, random: set[fx.Node], decoded: set[fx.Node]) -> bool:
        """An even function of a difference from an input."""
        if self.rule_name(node) not in _EVEN and not (self.rule_name(node) in PRODUCTS and len(set(node.all_input_nodes)) == 1):
            return False
        for source in node.all_input_nodes:
            operands = source.all_input_nodes
            other_sign = source.kwargs.get("alpha", 1) != 1 or any(map(self._is_negative, operands))
            turned = self.rule_name(source) == "add" and other_sign
            difference = source in decoded and (self.rule_name(source) in DIFFERENCES or turned)
            if difference and any(n in self.raw for n in operands) and any(n in random for n in operands):
                return True
        return False

    def _is_negative(self, node: fx.Node) -> bool:
        """Another sign before a value: ``-x``, ``-1 * x``."""
        number = next((n for n in node.args if isinstance(n, (int, float))), 0)
        return self.rule_name(node) in ("neg", "negative") or (self.rule_name(node) in ("mul", "multiply") and number < 0)

    def reconstructions_that_leave(self, leaves: list[fx.Node], random: set[fx.Node]) -> list[fx.Node]:
        """Of the decoded values that leave, those that are not a part, a summary or a score of another one."""
        fits = {n for n in leaves if self.fits_an_input(n)}
        dropped: set[fx.Node] = set()
        for first in leaves:
            for second in leaves:
                if first is second or not self.behind(first, second):
                    # A function of a prior's parameters, which a latent and its decoder lie behind, as they are themselves.
                    other = first is not second and first not in fits and not self.behind(second, first)
                    if other and self.decodes_between(self.stem(first, random), second, random):
                        dropped.add(first)
                    continue
                if self.is_step(first, second):
                    continue
                if self.same(first, second):
                    dropped.add(first if size_of(first) == size_of(second) and second not in dropped else second)
                elif (second in fits) != (first in fits):
                    dropped.add(first if second in fits else second)
                elif self.is_summary(first, second, random) or size_of(second) <= batch_of(second):
                    dropped.add(second)
                elif first not in fits:
                    dropped.add(first)
        # As large as an input that no layer reads, a label, beside a larger one that is read.
        read = {n for n in fits if any(size_of(each) == size_of(n) and self.is_read(each) for each in self.inputs)}
        largest = max(map(size_of, read), default=0)
        kept = [n for n in leaves if n not in dropped and not (n in fits - read and size_of(n) < largest)]
        least = min((size_of(n) for n in kept if n in fits), default=0)  # fewer numbers beside it are a score: logits of classes
        return [n for n in kept if size_of(n) >= least]

    def is_summary(self, first: fx.Node, second: fx.Node, random: set[fx.Node]) -> bool:
        """``second`` is made of ``first`` through no layer, and of nothing else: not what is mixed by weights that leave too."""
        return not self.decodes_between(first, second, random) and not self.joins_others(first, second, random)

    def without_latents(self, leaves: list[fx.Node], latents: list[fx.Node], random: set[fx.Node]) -> list[fx.Node]:
        """Decoded values that leave, without latents and the parameters of these and of their priors, of a size with an input."""
        parameters = self.parameters_of(latents)
        own = [n for n in leaves if n in parameters or any(self.stem(part, random) in parameters for part in self.parts(n))]
        own += [n for n in leaves if n not in own and self.is_latent(n, latents)]
        rest = [n for n in leaves if n not in own]
        shapes = {n.meta.get("shape") for n in own}
        behind = {n: {draw for draw in latents if self.behind(draw, n)} for n in rest}
        # Made of fewer latents than another value of an input's size: p(z_t | z_t-1) beside p(x_t | z_t).
        whole = [behind[n] for n in rest if self.fits_an_input(n) or n.meta.get("shape") not in shapes]
        alike = [n for n in rest if n.meta.get("shape") in shapes and any(self.is_part(n) == self.is_part(m) for m in own)]
        priors = [n for n in alike if any(behind[n] < each for each in whole)]
        return [n for n in rest if n not in priors] or leaves

    def without_flows(self, decoded: set[fx.Node], latents: list[fx.Node], random: set[fx.Node]) -> set[fx.Node]:
        """Decoded values, without what a flow makes of a latent for its prior alone, where something else is decoded.

        Such a value has the latent's shape, and some way from the draw to it goes through no layer: a coupling's, a residual one.
        """
        flowing: set[fx.Node] = set()
        for draw in latents:
            carried = self.forward_of((draw,), stop=lambda n: self.decodes(n, random))
            for node in carried & decoded:
                ends = node.meta.get("shape") == draw.meta.get("shape") and not self.fits_an_input(node)
                if ends and not any(self.decodes(n, random) for n in self.ahead_of(node)):
                    flowing.update(self.between(draw, node))
        rest = self.closure(random, lambda n: n not in flowing and self.decodes(n, random))
        shapes = {draw.meta.get("shape") for draw in latents}
        return rest if any(n.meta.get("shape") not in shapes and rank_of(n) > 1 for n in rest) else decoded

    def is_latent(self, node: fx.Node, latents: list[fx.Node]) -> bool:
        """A latent, or several of them joined; not what a decoder gives times a smaller one, a library's size."""
        return any(
            self.same(draw, part) and not any(self.joins_larger(draw, n) for n in self.between(draw, part))
            for part in self.parts(node)
            for draw in latents
        )

    def joins_larger(self, draw: fx.Node, node: fx.Node) -> bool:
        """What a decoder gives, and more numbers than a draw has, takes part in ``node``."""
        return any(n in self.decoded and size_of(n) > size_of(draw) and not self.behind(draw, n) for n in node.all_input_nodes)

    def is_part(self, node: fx.Node) -> bool:
        """One of several results of a layer, as a mean and a log-variance are."""
        node = self.parts(node)[0]
        while self.is_kind(node, Elementwise, Shape) and len(self.values_in(node)) == 1:
            if "part" in node.meta:
                return True
            (node,) = self.values_in(node)
        return False

    def parts(self, node: fx.Node) -> list[fx.Node]:
        """What a value is joined of, as steps are stacked; itself where it is not."""
        joined = node.args[0] if node.args and self.rule_name(node) in ("stack", "cat") else None
        return [n for n in joined if isinstance(n, fx.Node)] if isinstance(joined, (list, tuple)) else [node]

    def hidden(
        self, leaving: list[fx.Node], latents: list[fx.Node], chosen: list[fx.Node], random: set[fx.Node]
    ) -> frozenset[fx.Node]:
        """Of what leaves and is no reconstruction: a latent, or what a flow makes of one."""
        shapes = {n.meta.get("shape") for n in latents}
        parameters = self.parameters_of(latents)
        found = set()
        for node in leaving:
            on_the_way = node.meta.get("shape") in shapes and any(self.decodes_between(node, n, random) for n in chosen)
            if node not in chosen and node not in parameters and (self.is_latent(node, latents) or on_the_way):
                found.add(node)
        return frozenset(found)

    def heads(self, meets: list[tuple[fx.Node, fx.Node | None]], leaves: list[fx.Node]) -> set[fx.Node]:
        """Of the values that meet inputs, those of fewer numbers than a reconstruction that meets others: logits, a reward."""
        fitting = [(n, at) for n, at in meets if at is not None and self.fits_an_input(n)]
        least = min((size_of(n) for n in (*(n for n, _ in fitting), *leaves) if self.fits_an_input(n)), default=0)
        places = {at for _, at in fitting}  # a term of it meets the input where it does
        small = {n for n, at in meets if at is not None and size_of(n) < least and not self.fits_an_input(n)}
        # What is held against an input that no layer reads, a label or a reward, beside a larger one that is read.
        read = {n for n, at in fitting if self.meets_what_is_read(at)}
        largest = max(map(size_of, read), default=0)
        targets = {n for n, _ in fitting if n not in read and size_of(n) < largest}
        return (small - {n for n, at in meets if at in places}) | targets

    def meets_what_is_read(self, at: fx.Node) -> bool:
        """A layer, an encoder's, reads an input that a value meets at ``at``."""
        met = [n for n in at.all_input_nodes if n in self.raw]
        return any(self.behind(each, n) and self.is_read(each) for each in self.inputs for n in met)

    def is_read(self, given: fx.Node) -> bool:
        """A layer acts on an input, or nothing does, so that one does not know."""
        return not given.users or any(self.has_weights(n) for n in self.ahead_of(given))

    def are_one(self, first: fx.Node, second: fx.Node) -> bool:
        """One is the other, or both are a value, but for views and functions of each element: logits and probabilities."""
        return self.same(first, second) or self.same(second, first) or self.origin(first) is self.origin(second)

    def origin(self, node: fx.Node) -> fx.Node:
        """What ``node`` is the whole of, but for a function of each element."""
        while self.is_kind(node, Elementwise, Shape) and "part" not in node.meta and len(self.values_in(node)) == 1:
            (value,) = self.values_in(node)
            if size_of(value) != size_of(node):
                break
            node = value
        return node

    def stem(self, node: fx.Node, random: set[fx.Node]) -> fx.Node:
        """What ``node`` is a view or an elementwise function of, as far back as a layer."""
        while not self.decodes(node, random) and self.is_kind(node, Elementwise, Shape):
            sources = [n for n in node.all_input_nodes if n in random]
            if len(sources) != 1:
                break
            (node,) = sources
        return node

    def is_copy(self, first: fx.Node, second: fx.Node, *, shown: bool) -> bool:
        """``second`` is ``first`` without its gradient; of what is ``shown``, in another unit or range too, as 255 y is."""
        if not self.same(first, second):
            return False
        moved = all(self.is_kind(n, Shape) or self.rule_name(n) in _RESCALINGS for n in self.between(first, second))
        return self.stops_gradient(first, second) or (shown and moved and size_of(first) == size_of(second))

    def is_stage(self, source: fx.Node, chosen: list[fx.Node], random: set[fx.Node]) -> bool:
        """A reconstruction made of others by a decoder of its own: of an input's size, or a step as they are."""
        apart = not any(self.are_one(source, n) for n in chosen)
        decoded = all(not self.behind(n, source) or self.decodes_between(n, source, random) for n in chosen)
        return apart and decoded and (self.fits_an_input(source) or any(self.is_step(n, source) for n in chosen))

    def compared(self, random: set[fx.Node], decoded: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """(value, user): a reconstruction, and a network of features or a discriminator that takes it as it takes inputs.

        It takes the mean, as one outside the method would.
        """
        found = []
        for node in self.nodes:
            if node in random and self.rule_name(node) in ("cat", "stack") and self.joins_examples(node):
                shapes = [n.meta.get("shape") for n in self.parts(node) if n in self.raw]
                found += [(n, node) for n in self.parts(node) if n in decoded and n.meta.get("shape") in shapes]
            if node.op == "call_module" and str(node.target) in self.reference and node in random:
                sources = [n for n in node.all_input_nodes if n in random]
                whole = len(sources) == 1 and sources[0] in decoded and self.fits_an_input(sources[0])
                if whole and not any(self.decodes(n, random) for n in self.ahead_of(node)):
                    found.append((sources[0], node))
        return found

    def joins_examples(self, node: fx.Node) -> bool:
        """Along the batch: its parts are as many examples each."""
        joined = node.meta.get("shape", ())
        given = next((n.meta["shape"] for n in self.parts(node) if "shape" in n.meta), ())
        return node.args != () and (joined[1:] == given[1:] or joined[1:] == given)

    # --- losses inside the method ------------------------------------------------------------------

    def only_towards(self, losses: frozenset[fx.Node], random: set[fx.Node]) -> set[fx.Node]:
        """Random nodes that reach outputs which are losses, and no other."""
        reaches: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            if node not in random:
                continue
            ends = [n for n in self.outputs if n is node]
            verdicts = [node in losses] if ends else []
            verdicts += [reaches[n] for n in node.users if n in reaches]
            if verdicts:
                reaches[node] = all(verdicts)
        return {n for n, only in reaches.items() if only}

    def frontier(
        self, losses: frozenset[fx.Node], inside: set[fx.Node], decoded: set[fx.Node], random: set[fx.Node]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """(value, user): where what a decoder gives enters the making of a loss, activations of its last layer included."""
        edges: list[tuple[fx.Node, fx.Node]] = []
        todo, seen = list(losses), set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for source in (n for n in node.all_input_nodes if n in random):
                whole = self.decodes(source, random) or self.is_sum(source, random)
                if source in inside and source not in self.outputs and not whole:
                    todo.append(source)
                elif source in decoded:
                    edges.append((source, node))
        return list(dict.fromkeys(e for source, user in edges for e in self.extended(source, user, inside, random)))

    def is_sum(self, node: fx.Node, random: set[fx.Node]) -> bool:
        """A sum of what layers give, as a residual layer ends in, or a canvas that is written to step by step."""
        sources = [n for n in node.all_input_nodes if n in random]
        if self.rule_name(node) != "add" or node.kwargs.get("alpha", 1) != 1 or any(n in self.raw for n in node.all_input_nodes):
            return False
        several = len(node.all_input_nodes) > 1
        return several and all(size_of(n) == size_of(node) and self._is_given(n, random) for n in sources)

    def _is_given(self, node: fx.Node, random: set[fx.Node]) -> bool:
        """By a layer, its activation included, or by a sum of such."""
        while self.is_activation(node):
            (node,) = self.values_in(node)
        return node in random and (self.decodes(node, random) or self.is_sum(node, random))

    def extended(
        self, source: fx.Node, user: fx.Node, inside: set[fx.Node], random: set[fx.Node]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """The edges behind the activations of the last layer, which belong to the reconstruction."""
        while True:
            whole = self.rescaling(source, inside, random)
            if whole is None:
                if user not in inside or user in self.outputs or not (self.is_activation(user) or self.scales(source, user)):
                    return [(source, user)]
                if len([n for n in source.users if n in random]) != 1:
                    return [(source, user)]
                whole = user
            following = [n for n in whole.users if n in random]
            if len(following) != 1 and self.rescaling(whole, inside, random) is None:
                return [(whole, each) for each in following if not self.decodes(each, random)]
            source, user = whole, following[0]

    def rescaling(self, source: fx.Node, inside: set[fx.Node], random: set[fx.Node]) -> fx.Node | None:
        """The end of a normalisation written out, ``y / y.sum(1, keepdim=True)``: all that is made of ``source`` meets there."""
        users = {n for n in source.users if n in random}
        ends = PRODUCTS | DIFFERENCES
        if len(users) < 2:
            return None
        for node in self.nodes:
            if node not in inside or node in self.outputs or self.rule_name(node) not in ends or size_of(node) != size_of(source):
                continue
            way = set(self.between(source, node))
            made_of = {n for each in way for n in each.all_input_nodes} - way - {source}
            gone_on = {user for each in way - {node} for user in each.users if user in random}
            logarithms = any(self.rule_name(n) in _ERRORS - _EVEN for n in way)
            summary = any("shape" in n.meta and size_of(n) < size_of(source) for n in way)
            if summary and not logarithms and users | gone_on <= way and not made_of & self.conditioned:
                return node
        return None

    def is_activation(self, node: fx.Node) -> bool:
        """A function of one value and constants that ends a decoder."""
        if len(self.values_in(node)) != 1 or self.is_loss(node):
            return False
        name = self.rule_name(node)
        plain = self.is_kind(node, Elementwise, Shape) or name == "softmax"
        return plain and name not in _ERRORS and size_of(node) == size_of(self.values_in(node)[0])

    def scales(self, source: fx.Node, node: fx.Node) -> bool:
        """``source`` times a factor of fewer numbers, such as one for each example: a library's size, a temperature."""
        factors = [n for n in node.all_input_nodes if n is not source]
        name = self.rule_name(node)
        if name not in PRODUCTS - {"addcmul", "lerp"} or len(factors) != 1 or (name[:3] != "mul" and node.args[0] is not source):
            return False
        weights = factors[0] in self.decoded  # of a mixture of what a decoder gives
        return not weights and size_of(factors[0]) < size_of(source) == size_of(node) and not self.behind(source, factors[0])

    def meets_input(
        self, source: fx.Node, user: fx.Node, inside: set[fx.Node], random: set[fx.Node], losses: frozenset[fx.Node]
    ) -> fx.Node | None:
        """Where on its way to the loss, through no other layer, the value meets an input."""
        todo, seen = [user], set()
        while todo:
            node = todo.pop()
            if node in seen or node not in inside:
                continue
            seen.add(node)
            others = [n for n in node.all_input_nodes if n not in random]
            # Not so what an encoder reads beside an input, or as the difference from it: the state before it, a canvas.
            compared = any(n in self.raw for n in others) and not self.is_kind(node, Shape) and self.is_scored(node, losses)
            compared = compared or (self.is_loss(node) and any(n in self.conditioned for n in others))
            if compared and not self.is_width(source, node):
                return node
            # An input that meets a sum weighs it.
            summed = self.reduces(node, [n for n in node.all_input_nodes if n in random]) and not self.fits_an_input(node)
            if (node is user or not self.decodes(node, random)) and not summed:
                todo += list(node.users)
        return None

    def whole(self, source: fx.Node, user: fx.Node, at: fx.Node, random: set[fx.Node]) -> tuple[fx.Node, fx.Node]:
        """The edge, moved to where a value as large as the input meets it: what layers give may be mixed or summed before."""
        met = [n for n in at.all_input_nodes if n in random and self.behind(source, n)]
        sizes = [size_of(n) for n in at.all_input_nodes if n in self.raw and self.is_step_of_input(n)]
        if len(met) != 1 or size_of(met[0]) not in sizes:
            return source, user
        value, end = met[0], at
        if self.rule_name(value) in _LOGARITHMS and self.rule_name(at) in PRODUCTS:  # of a likelihood, x log y
            behind = self.values_in(value)[0]
            mixed = size_of(behind) == size_of(value) and self.joins_others(source, behind, random)
            value, end = (behind, value) if mixed else (value, end)
        way = self.between(source, value)
        apart = any(self.rule_name(n) in _ERRORS or self.is_loss(n) or self.is_one_of_several(n, random) for n in way)
        return (source, user) if value is source or apart else (value, end)

    def joins_others(self, source: fx.Node, value: fx.Node, random: set[fx.Node]) -> bool:
        """Other random values take part in ``value``, which is made of ``source``."""
        operands = [n for node in self.between(source, value) for n in node.all_input_nodes if n in random]
        return any(n is not source and not self.behind(source, n) for n in operands)

    def is_one_of_several(self, node: fx.Node, random: set[fx.Node]) -> bool:
        """Some of the elements of a value of which others are used too, as a mean beside a log-variance."""
        selected = [n for n in self.values_in(node) if "part" in node.meta or size_of(node) < size_of(n)]
        used = [[user for user in n.users if user in random and "int" not in str(user.meta.get("dtype"))] for n in selected]
        return self.is_kind(node, Shape) and any(len(users) > 1 for users in used)

    def is_step_of_input(self, node: fx.Node) -> bool:
        """An input, what is selected of one or scaled or shifted by another, more than a number for each example."""
        while node.op != "placeholder" and (self.is_kind(node, Shape) or self.rule_name(node) in _RESCALINGS):
            sources = [n for n in node.args if isinstance(n, fx.Node) and n in self.raw]
            sources = [n for n in sources if size_of(n) == max(map(size_of, sources))]
            if not sources or (self.rule_name(node) in PRODUCTS and len(sources) > 1):
                return False
            node = sources[0]
        return node.op == "placeholder" and rank_of(node) >= 2

    def is_width(self, source: fx.Node, loss: fx.Node) -> bool:
        """``source`` makes the variance that a Gaussian likelihood takes beside its mean."""
        given = loss.args[2] if len(loss.args) > 2 else loss.kwargs.get("var")
        gaussian = getattr(loss.meta.get("module_type"), "__name__", "") == "GaussianNLLLoss"
        likelihood = gaussian or self.rule_name(loss) == "gaussian_nll_loss"
        return likelihood and isinstance(given, fx.Node) and self.same(source, given)

    def is_scored(self, node: fx.Node, losses: frozenset[fx.Node]) -> bool:
        """A loss is made of ``node`` without any layer."""
        todo, seen = [node], set()
        while todo:
            each = todo.pop()
            if each in losses:
                return True
            if each not in seen:
                seen.add(each)
                todo += [user for user in each.users if user.op != "output" and not self.has_weights(user)]
        return False
