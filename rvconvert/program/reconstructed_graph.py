"""A scored graph with its reconstructions: where decoded values leave, meet an input or enter a loss, and which count."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from rvconvert.program.recorded_graph import asks_of, batch_of, rank_of, size_of
from rvconvert.program.scored_graph import RESCALINGS, SUBTRACTING, ScoredGraph
from rvconvert.rules.kinds import Elementwise, Shape

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import fx

__all__ = ["ReconstructedGraph"]


_PICKS = frozenset("argmax argmin argsort".split())
_CASTS = frozenset("to type type_as byte char short int long".split())
_WHOLE = frozenset(f"torch.{name}" for name in "uint8 int8 int16 int32 int64".split())
_STEPS = frozenset("round floor ceil trunc fix sign sgn heaviside".split())


class Edge(NamedTuple):
    """Where a decoded value enters the making of a loss, and where on its way it meets an input, if it does."""

    value: fx.Node
    user: fx.Node
    at: fx.Node | None


class ReconstructedGraph(ScoredGraph):
    """A scored graph with its reconstructions."""

    def edges(self, compared: list[tuple[fx.Node, fx.Node]]) -> list[Edge]:
        """Where decoded values enter a loss, or a network that is ``compared``."""
        found = []
        for source, user in dict.fromkeys([*self.frontier(), *compared]):
            if self.compares(source):  # an accuracy is no loss
                continue
            at = self.meets_input(source, user)
            value, end = (source, user) if at is None else self.whole(source, user, at)
            if value in self.indices:  # a mask of a decoded length
                continue
            found.append(Edge(value, end, at))
            if value is not source:  # which other terms of the loss take too, and further layers do not
                others = [n for n in value.users if n in self.scoring and n is not end and not self.leads_on(value, n)]
                found += [Edge(value, n, self.meets_input(value, n)) for n in others]
        return list(dict.fromkeys(found))

    def leads_on(self, value: fx.Node, user: fx.Node) -> bool:
        """By way of ``user`` a layer takes ``value``, or what one has made of it is added."""
        taken = any(self.decodes(n) for n in self.ahead_of(user))
        return taken or any(self.decodes_between(value, n) for n in user.all_input_nodes if n is not value)

    def is_decoded_beside(self, node: fx.Node, meeting: set[fx.Node]) -> bool:
        """Of an input's size, or of a part's, or made of what meets an input, or what that is made of."""
        related = any(self.behind(n, node) or self.behind(node, n) or self.are_one(n, node) for n in meeting)
        return self.fits_an_input(node) or bool(self.inputs_like(node)) or related

    def leaves(self, leaving: list[fx.Node], compared: list[tuple[fx.Node, fx.Node]]) -> list[fx.Node]:
        """Reconstructions among what leaves."""
        features = self.forward_of(user for _, user in compared)
        leaves = [n for n in leaving if n in self.decoded and n not in self.losses and n not in features]
        trained = [n for n in leaves if n.meta.get("requires_grad")]  # what has no gradient beside it is for display
        leaves = trained or leaves
        return self.reconstructions_that_leave(self.without_latents(leaves))

    def chosen(self, candidates: set[fx.Node], meeting: set[fx.Node], edges: list[Edge], leaves: list[fx.Node]) -> list[fx.Node]:
        """The reconstructions, in what leaves and in the ``candidates``, of which some are ``meeting`` an input."""
        leaves = [n for n in leaves if self.fits_an_input(n) or not self.is_criticised(n, meeting)]
        heads = self.heads(edges, leaves)
        chosen = [n for n in leaves if n not in heads]
        subtracted = {edge.value for edge in edges if edge.at is not None and self.rule_name(edge.at) in SUBTRACTING}
        for source in (n for n in self.nodes if n in candidates):
            # What leaves may be a copy for a log, without a gradient, or for display of what the loss is made of.
            shown = source in meeting
            instead = [
                self.is_copy(source, n, shown=shown)
                or (shown and self.is_excerpt(source, n))
                or (source in subtracted and self.same(source, n) and self.is_function(source, n))  # of a log spectrogram
                for n in chosen
            ]
            chosen = list(dict.fromkeys(source if each else n for n, each in zip(chosen, instead, strict=True)))
            known = any(self.are_one(source, n) or self.behind(n, source) for n in chosen)
            known = known and not (shown and self.is_stage(source, chosen))
            known = known or source in heads
            if not known and not any(self.decodes_between(source, n) for n in leaves):
                chosen.append(source)
        return chosen

    def is_criticised(self, node: fx.Node, meeting: set[fx.Node]) -> bool:
        """What a critic's layers make of a reconstruction that meets an input: a score, features."""
        return any(self.fits_an_input(n) and self.decodes_between(n, node) for n in meeting)

    def at_mean(self) -> tuple[set[tuple[fx.Node, fx.Node]], list[fx.Node]]:
        """(value, user): a loss function takes what it compares at the mean, a draw of the likelihood its parameters.

        The decoded ones of these parameters are returned too.
        """
        found: set[tuple[fx.Node, fx.Node]] = set()
        drawn_from: list[fx.Node] = []
        for node in self.nodes:
            sources = self.random_in(node)
            if node in self.random and self.is_loss(node):
                found |= {(n, node) for n in sources if n in self.decoded}
            elif node not in self.random and sources and node.op != "output" and self.samples_likelihood(node):
                found |= {(n, node) for n in sources}
                drawn_from += [n for n in sources if n in self.decoded and not asks_of(node, n)]
        return found, list(dict.fromkeys(drawn_from))

    def beside(
        self, chosen: list[fx.Node], related: list[fx.Node], at_mean: set[tuple[fx.Node, fx.Node]]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """(value, reconstruction): of ``related`` values, those that are one with it; losses that do not take it at its mean."""
        pairs = [
            (value, main)
            for main in chosen
            for value in dict.fromkeys(related)
            if value is not main and value in self.decoded and value not in self.losses and not self.stops_gradient(main, value)
            if self.are_one(value, main)
            if not any(main in self.ahead_of(user) for source, user in at_mean if source is value)
        ]
        # What is made of the mean of another one has no variance.
        made_of_mean = {
            (value, main)
            for value, main in pairs
            for source, user in at_mean
            if source is not value and (source is main or (source, main) in pairs) and value in self.ahead_of(user)
        }
        pairs = [pair for pair in pairs if pair not in made_of_mean]
        found = list(dict(reversed(pairs)).items())
        for main in chosen:
            taken = {main, *(value for value, other in found if other is main)}
            means = [user for source, user in at_mean if source in taken]
            carried = self.forward_of((main,), stop=lambda n: n.meta.get("requires_grad") is False)  # not through a detach
            losses = [n for n in self.outputs if n in self.losses and n not in taken and n in carried]
            found += [(n, main) for n in dict.fromkeys(losses) if not any(self.behind(user, n) for user in means)]
        return found

    def reconstructions_that_leave(self, leaves: list[fx.Node]) -> list[fx.Node]:
        """Of the decoded values that leave, those that are not a part, a summary or a score of another one."""
        fits = {n for n in leaves if self.fits_an_input(n)}
        dropped = self.siblings(leaves)
        for first in leaves:
            for second in leaves:
                if {first, second} & dropped and self.same(first, second):
                    continue
                if first is second or not self.behind(first, second):
                    # A function of a prior's parameters, which a latent and its decoder lie behind, as they are themselves.
                    other = first is not second and first not in fits and not self.behind(second, first)
                    if other and self.decodes_between(self.stem(first), second):
                        dropped.add(first)
                    continue
                if self.is_step(first, second):
                    continue
                if self.same(first, second) and self.joins_decoded(first, second):
                    dropped.add(first)  # a part of it: a mask, a scale, a trend
                elif self.is_display(first, second):
                    dropped.add(second)
                elif self.same(first, second):
                    dropped.add(first if size_of(first) == size_of(second) and second not in dropped else second)
                elif (second in fits) != (first in fits):
                    dropped.add(first if second in fits else second)
                elif self.is_summary(first, second) or size_of(second) <= batch_of(second):
                    dropped.add(second)
                elif first not in fits:
                    dropped.add(first)
        # As an input that no layer reads, or most of its steps, a label or a reward, beside a larger one that is read.
        read = self.read(leaves)
        largest = max(map(size_of, read), default=0)
        labels = {n for n in leaves if n not in read and self.inputs_like(n) and size_of(n) < largest}
        kept = [n for n in leaves if n not in dropped and n not in labels]
        least = min((size_of(n) for n in kept if n in fits), default=0)  # fewer numbers beside it are a score: logits of classes
        return [n for n in kept if size_of(n) >= least]

    def siblings(self, leaves: list[fx.Node]) -> set[fx.Node]:
        """Functions of each element of one reconstruction that leaves too, a residual and a probability: it is the one."""
        found: set[fx.Node] = set()
        for first in leaves:
            made = [n for n in leaves if n is not first and self.behind(first, n) and self.same(first, n)]
            made = [n for n in made if size_of(n) == size_of(first) and not self.joins_decoded(first, n)]
            if any(not self.behind(a, b) and not self.behind(b, a) for a in made for b in made if a is not b):
                found.update(made)
        return found

    def is_summary(self, first: fx.Node, second: fx.Node) -> bool:
        """``second`` is made of ``first`` through no layer, and of nothing else: not what is mixed by weights that leave too."""
        return not self.decodes_between(first, second) and not self.joins_others(first, second)

    def without_latents(self, leaves: list[fx.Node]) -> list[fx.Node]:
        """Decoded values that leave, without latents, the parameters of these and of their priors, and divergences of these."""
        parameters = self.parameters_of(self.latents)
        own = [n for n in leaves if n in parameters or any(self.stem(part) in parameters for part in self.all_parts(n))]
        own += [n for n in leaves if n not in own and (self.is_latent(n) or self.is_divergence(n))]
        rest = [n for n in leaves if n not in own]
        shapes = {n.meta.get("shape") for n in own}
        behind = {n: {draw for draw in self.latents if self.behind(draw, n)} for n in rest}
        # Made of fewer latents than another value of an input's size: p(z_t | z_t-1) beside p(x_t | z_t).
        whole = [behind[n] for n in rest if self.fits_an_input(n) or n.meta.get("shape") not in shapes]
        drawn = {draw.meta.get("shape") for draw in self.latents}
        alike = [
            n
            for n in rest
            if (n.meta.get("shape") in shapes and any(self.is_part(n) == self.is_part(m) for m in own))
            or (n.meta.get("shape") in drawn and self.is_part(n))
        ]
        others = [n for n in rest if n not in alike and self.fits_an_input(n)]
        priors = [
            n
            for n in alike
            if any(behind[n] < each for each in whole)
            or any(behind[other] < behind[n] or not self.fits_an_input(n) for other in others)  # p(z1 | z2) beside p(x | z1)
        ]
        return [n for n in rest if n not in priors] or leaves

    def is_latent(self, node: fx.Node) -> bool:
        """A latent, or several of them joined; not what a decoder gives times a smaller one, a library's size."""
        return any(
            self.same(draw, part) and not any(self.joins_larger(draw, n) for n in self.between(draw, part))
            for part in self.parts(node)
            for draw in self.latents
        )

    def is_divergence(self, node: fx.Node) -> bool:
        """Made, through no layer, of the parameters of a draw that is not behind it, among others: a map of KL divergences."""
        parameters = self.parameters_of(draw for draw in self.latents if not self.behind(draw, node))
        carried = self.forward_of(self.latents, stop=self.decodes)
        todo, seen = [node], {node}
        while todo:
            each = todo.pop()
            if each in parameters and each not in carried:
                return True
            following = [] if each in carried or self.decodes(each) else [n for n in each.all_input_nodes if n not in seen]
            seen.update(following)
            todo += following
        return False

    def joins_larger(self, draw: fx.Node, node: fx.Node) -> bool:
        """What a decoder gives, and more numbers than a draw has, takes part in ``node``."""
        return any(n in self.decoded and size_of(n) > size_of(draw) and not self.behind(draw, n) for n in node.all_input_nodes)

    def heads(self, edges: list[Edge], leaves: list[fx.Node]) -> set[fx.Node]:
        """Of the values that meet inputs, those of fewer numbers than a reconstruction that meets others: logits, a reward."""
        pieces = [(n, self.piece(n, at), at) for n, _, at in edges if at is not None]
        met = [(piece, at) for _, piece, at in pieces]
        fitting = [(n, at) for n, at in met if self.fits_an_input(n)]
        parts = [(n, at) for n, at in met if self.fits_a_part(n, at)]
        # What is held against an input that no layer reads, a label or a reward, or a part of one, beside a larger one that is.
        held = fitting + parts
        read = {n for n, at in held if self.meets_what_is_read(at)} | self.read(leaves)
        largest = max(map(size_of, read), default=0)
        targets = {n for n, _ in held if n not in read and size_of(n) < largest}
        whole = {n for n in (*(n for n, _ in fitting), *leaves) if self.fits_an_input(n)} - targets
        if whole:
            least = min(map(size_of, whole))
            small = {n for n, _ in met if size_of(n) < least and not self.fits_an_input(n)}
        else:  # beside a target that is joined of several inputs
            small = {n for n, at in met if size_of(n) < largest and not self.meets_what_is_read(at)} - {n for n, _ in parts}
        places = {at for _, at in (fitting if whole else held)}  # a term of it meets the input where it does
        found = (small - {n for n, at in met if at in places}) | targets
        others = {n for n, piece, _ in pieces if piece not in found}  # some of whose pieces are a reconstruction's
        return {n for n, *_ in pieces if n not in others} | self.heads_of_steps(edges)

    def piece(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """What is cut from a value and meets an input ``at`` a place: of means and variances by one layer, the means."""
        cut = [n for n in at.all_input_nodes if n in self.random and size_of(n) < size_of(node) and self.same(node, n)]
        return cut[0] if len(cut) == 1 and not self.fits_an_input(node) else node

    def heads_of_steps(self, edges: list[Edge]) -> set[fx.Node]:
        """The same where inputs are met step by step, ``x[:, t]``: the head's target is an input of its own, as a reward is."""
        of_steps = [(n, at) for n, _, at in edges if at is not None and self.fits_a_step(n, at)]
        least = min((size_of(n) for n, _ in of_steps), default=0)
        reconstructed = {given for _, at in of_steps for given in self.inputs_met(at)}
        small = [(n, at) for n, _, at in edges if at is not None and size_of(n) < least]
        small = [(n, at) for n, at in small if not (self.fits_an_input(n) and self.meets_what_is_read(at))]
        return {n for n, at in small if not reconstructed & self.inputs_met(at)}

    def fits_a_step(self, node: fx.Node, at: fx.Node) -> bool:
        """As many numbers as in the step of an input that it meets ``at``, which is a batch of vectors or more."""
        met = [n for n in at.all_input_nodes if n in self.raw and self.is_step_of_input(n)]
        return rank_of(node) >= 2 and any(size_of(n) == size_of(node) for n in met)

    def fits_a_part(self, node: fx.Node, at: fx.Node) -> bool:
        """As many numbers as it meets ``at`` a place, made of an input without a layer: the next frames, half the resolution."""
        return any(n in self.raw and rank_of(n) >= 2 and size_of(n) == size_of(node) for n in at.all_input_nodes)

    def inputs_met(self, at: fx.Node) -> set[fx.Node]:
        """The inputs that a value meets ``at`` a place."""
        met = [n for n in at.all_input_nodes if n in self.raw]
        return {given for given in self.inputs if any(self.behind(given, n) for n in met)}

    def meets_what_is_read(self, at: fx.Node) -> bool:
        """A layer, an encoder's, reads an input that a value meets at ``at``."""
        return any(map(self.is_read, self.inputs_met(at)))

    def read(self, values: list[fx.Node]) -> set[fx.Node]:
        """Of ``values``, those that are like an input that a layer reads."""
        return {n for n in values if any(map(self.is_read, self.inputs_like(n)))}

    def is_read(self, given: fx.Node) -> bool:
        """A layer acts on an input on its way to a latent, or nothing does, so that one does not know."""
        layers = [n for n in self.ahead_of(given) if self.has_weights(n)]
        if not self.latents:
            return not given.users or bool(layers)
        placing = {n for draw in self.latents for n in self.placing(draw)}
        return not given.users or any(n in placing for n in layers)

    def is_copy(self, first: fx.Node, second: fx.Node, *, shown: bool) -> bool:
        """``second`` is ``first`` without its gradient; of what is ``shown``, in another unit or range too, as 255 y is."""
        if not self.same(first, second) or self.joins_decoded(first, second):
            return False
        moved = all(self.is_kind(n, Shape) or self.rule_name(n) in RESCALINGS for n in self.between(first, second))
        return self.stops_gradient(first, second) or (shown and moved and size_of(first) == size_of(second))

    def is_display(self, source: fx.Node, node: fx.Node) -> bool:
        """``source`` as a picture has it: in steps, which have no gradient, or in another unit or range."""
        if not self.same(source, node) or self.joins_others(source, node):
            return False
        through = self.forward_of((source,), stop=lambda n: self.compares(n) or self.rule_name(n) in _STEPS)
        if node not in through:  # all that is made of it goes by steps, which have no gradient
            return True
        way = [n for n in self.between(source, node) if not self.is_kind(n, Shape)]
        others = {n for each in way for n in each.all_input_nodes if n not in self.random}
        fixed = not others & self.raw and not any(n.meta.get("requires_grad") for n in others)
        rescaled = fixed and bool(way) and all(self.rule_name(n) in RESCALINGS for n in way)
        return rescaled and not self.scales_of(way) & self.scales_of(self.raw)  # else in the unit that inputs came in

    def scales_of(self, nodes: Iterable[fx.Node]) -> set[Any]:
        """Numbers and buffers by which values are rescaled."""
        found: set[Any] = set()
        for node in nodes:
            if self.rule_name(node) in RESCALINGS:
                found.update(abs(x) for x in node.args if isinstance(x, (int, float)) and not isinstance(x, bool))
                found.update(n.target for n in node.all_input_nodes if n.op == "get_attr")
        return found

    def is_excerpt(self, source: fx.Node, node: fx.Node) -> bool:
        """Some elements of ``source`` as they are, an example for a plot."""
        apart = size_of(node) < size_of(source) and self.same(source, node)
        return apart and all(self.is_kind(n, Shape) for n in self.between(source, node))

    def is_stage(self, source: fx.Node, chosen: list[fx.Node]) -> bool:
        """A reconstruction made of others by a decoder of its own: of an input's size, or a step as they are."""
        apart = not any(self.are_one(source, n) for n in chosen)
        decoded = all(not self.behind(n, source) or self.decodes_between(n, source) for n in chosen)
        return apart and decoded and (self.fits_an_input(source) or any(self.is_step(n, source) for n in chosen))

    def compared(self) -> list[tuple[fx.Node, fx.Node]]:
        """(value, user): a reconstruction, and a network of features or a discriminator that takes it as it takes inputs.

        It takes the mean, as one outside the method would.
        """
        found = []
        for node in self.nodes:
            if node in self.random and self.rule_name(node) in ("cat", "stack") and self.joins_examples(node):
                shapes = [n.meta.get("shape") for n in self.parts(node) if n in self.raw]
                found += [(n, node) for n in self.parts(node) if n in self.decoded and n.meta.get("shape") in shapes]
            if node.op == "call_module" and str(node.target) in self.reference and node in self.random:
                sources = self.random_in(node)
                whole = len(sources) == 1 and sources[0] in self.decoded and self.fits_an_input(sources[0])
                if whole and not any(self.decodes(n) for n in self.ahead_of(node)):
                    found.append((sources[0], node))
        return found

    def joins_examples(self, node: fx.Node) -> bool:
        """Along the batch: its parts are as many examples each."""
        joined = node.meta.get("shape", ())
        given = next((n.meta["shape"] for n in self.parts(node) if "shape" in n.meta), ())
        return node.args != () and (joined[1:] == given[1:] or joined[1:] == given)

    @functools.cached_property
    def indices(self) -> frozenset[fx.Node]:
        """What argmax and its kin give, whole numbers, and what is made of these and of nothing else that is random."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            sources = self.random_in(node)
            if node not in self.random or not sources:
                continue
            picked = self.rule_name(node) in _PICKS or "part" in node.meta
            dtype = str(node.meta.get("dtype"))
            whole = (picked and dtype == "torch.int64") or (self.rule_name(node) in _CASTS and dtype in _WHOLE)
            if whole or all(n in found for n in sources):
                found.add(node)
        return frozenset(found)

    def towards_whole(self, indices: frozenset[fx.Node]) -> set[tuple[fx.Node, fx.Node]]:
        """(value, user): where the functions of each element begin that lead to whole numbers alone, a rounded picture."""
        casts = {n for n in indices if self.rule_name(n) in _CASTS and not all(each in indices for each in self.random_in(n))}
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            users = [n for n in node.users if n in self.random]
            inside = node in self.random and node not in self.outputs and node not in self.latents and not self.decodes(node)
            if inside and users and all(n in found or n in casts for n in users) and self.is_kind(node, Elementwise, Shape):
                found.add(node)
        begin = found | casts
        return {(n, user) for user in begin for n in self.random_in(user) if n not in found and n not in indices}
