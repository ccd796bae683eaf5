"""Roles: which draws are latents, where the reconstruction is, and what a loss inside the method takes at its mean.

Assigned once, by ``assign`` over a recorded graph; the rewriting, the plan and the report read them. A draw is a *latent*
where a decoder's value depends on it and the input reaches its scale or location; every other draw is left as it is, as
dropout is. The *reconstruction* is every random value with a decoder behind it, at the point where it leaves the method or
first meets an input or a loss, its last elementwise functions included.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from torch import fx, nn

from rvconvert.rules.draws import INTEGER
from rvconvert.rules.kinds import Bilinear, Collapse, Elementwise, Metadata, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rvconvert.capture.recording import Recording
    from rvconvert.core.registry import Rule

__all__ = ["Roles", "asks_of", "assign"]


@dataclasses.dataclass(frozen=True)
class Roles:
    """The roles of the nodes of a recording.

    Attributes:
        latents: the draws that become random variables, in order.
        random: the nodes that depend on a latent or a random input.
        reconstructions: where L_c is attached.
        beside: (value, reconstruction) pairs: values that leave or enter a loss and are the same but for a view or an
            elementwise function, so that L_c joins whichever is trained on.
        at_mean: (value, user) pairs: what a loss inside the method takes at its mean.
        losses: outputs that are a loss or a term of one.
        decoded: the random nodes with a decoder behind them.
        drawn: exponentials in scores of the latents alone, such as the density of a mixture, which a loss takes from a draw.
        unused: random nodes whose value nothing uses, such as a check of a distribution's arguments.
        indices: places that were picked at the means, and what is made of such alone: plain tensors.
        scores: values of a loss function, errors, and what is made of them: Python may report them, as logs do.
        posterior: the latents are drawn from what a layer made of the input.
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
    scores: frozenset[fx.Node]
    posterior: bool

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


def assign(recording: Recording, named: Iterable[str] = (), *, paths: bool = False, posterior: bool = False) -> Roles:
    """The roles in a recording.

    Args:
        recording: of the method.
        named: the draws that are latents whatever they do, by the end of their ``file:line`` or their node's name.
        paths: random variables are on paths of their own, so that weights of samples are weights.
        posterior: the method has a posterior in training: what it draws beside a condition in eval mode is the prior's.
    """
    graph = _Graph(recording)
    latents = graph.named(tuple(named)) if named else graph.latents(posterior=posterior)
    return graph.roles(latents, paths)


# Errors, log-likelihoods and their like are no activation of a last layer: a reconstruction ends before them.
_ERRORS = frozenset("pow square abs log log1p log2 log10 log_softmax logsigmoid neg".split())
_PRODUCTS = frozenset("mul multiply addcmul lerp div true_divide divide".split())
_DIFFERENCES = frozenset("sub subtract rsub".split())
_DISTANCES = frozenset("cdist pairwise_distance cosine_similarity dist".split())
_EXPONENTIALS = frozenset("exp expm1 softmax log_softmax logsumexp logaddexp".split())
_WRITES = frozenset("setitem index_put index_copy scatter masked_scatter".split())
_PICKS = frozenset("argmax argmin argsort".split())
_RESCALINGS = frozenset("mul multiply add sub subtract rsub div true_divide divide clamp clip clamp_min clamp_max".split())
_EVEN = frozenset("pow square abs norm vector_norm huber_loss".split())


class _Graph:
    """A recorded graph with what is asked of its nodes again and again."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.nodes = list(recording.graph.nodes)
        self.given = set(recording.random_inputs)
        self.outputs = list(recording.output.all_input_nodes)
        given: tuple[object, ...] = recording.output.args[0]  # type: ignore[assignment]
        self.returned = set(given[: len(given) - recording.kept_leaves])
        self.raw: set[fx.Node] = set()  # made of inputs, through no learned layer
        self.conditioned: set[fx.Node] = set()  # depends on an input
        self.learned: set[fx.Node] = set()  # depends on an input through a learned layer
        self.weights: set[fx.Node] = set()  # made of parameters and buffers alone
        self.posterior = False  # the latents have one
        self.by_products = False  # a sum of products of two latents decodes: where nothing else does
        for node in self.nodes:
            self._describe(node)
        self.reference = self._modules_applied_to_inputs()

    # --- what a node is ----------------------------------------------------------------------------

    def _describe(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        if node.op == "placeholder":
            if node not in self.given:
                self.raw.add(node)
            self.conditioned.add(node)
        elif node.op == "get_attr":
            if not str(node.target).startswith("_rvconvert."):
                self.weights.add(node)
        elif _asks(node):
            return
        else:
            if any(n in self.conditioned for n in sources):
                self.conditioned.add(node)
                if any(n in self.learned for n in sources) or self._has_weights(node):
                    self.learned.add(node)
                elif any(n in self.raw for n in sources):
                    self.raw.add(node)
            elif sources and all(n in self.weights for n in sources):
                self.weights.add(node)
            if node.meta.get("mutates") and node.args:
                self._is_written(node.args[0], node)

    def _is_written(self, target: object, writer: fx.Node) -> None:
        """What is written in place into a tensor, or into a view of it, is part of it from there on."""
        while isinstance(target, fx.Node):
            for kind in (self.conditioned, self.learned, self.raw):
                if writer in kind:
                    kind.add(target)
            target = target.args[0] if self._kind(target, Shape) and target.args else None

    def _has_weights(self, node: fx.Node) -> bool:
        """An operation with weights that mixes elements: a layer, not a scale for each element."""
        if self._kind(node, Elementwise, Shape):
            return False
        if node.op == "call_module":
            return bool(node.meta.get("learned", True))
        return any(n in self.weights for n in node.all_input_nodes)

    @staticmethod
    def _kind(node: fx.Node, *kinds: type) -> bool:
        rule: Rule | None = node.meta.get("rule")
        if rule is None:  # one of several results, or what a tensor is once an alias was written: elements in their places
            return "part" in node.meta and Shape in kinds
        return isinstance(rule.kind, kinds)

    @staticmethod
    def _name(node: fx.Node) -> str:
        rule: Rule | None = node.meta.get("rule")
        return "" if rule is None else rule.name

    def _modules_applied_to_inputs(self) -> set[str]:
        """Layers that act on plain values and on what a decoder gives: an encoder of both, features of a perceptual loss.

        A decoder that is applied to a posterior's mean too is none, for its first layer acts on a latent; nor is the layer that a
        decoder ends in, whatever it shares with an encoder.
        """
        calls = [n for n in self.nodes if n.op == "call_module"]
        plain = [n for n in calls if n not in self.recording.depends]
        random = {str(n.target) for n in calls if n in self.recording.depends}
        first: set[str] = set()
        given: set[fx.Node] = set()  # by a decoder
        for node in self.nodes:
            sources = [n for n in node.all_input_nodes if n in self.recording.depends]
            if sources and node in self.recording.depends and "draw" not in node.meta:
                if any(n in given for n in sources):
                    given.add(node)
                elif self._has_weights(node):
                    given.add(node)
                    first.add(str(node.target))
        of_mean = self.forward_of(n for n in plain if str(n.target) in first)
        last = {str(n.target) for n in calls if n in self.recording.depends and self._ends_in_a_reconstruction(n)}
        return {str(n.target) for n in plain if str(n.target) in random - first - last and n not in of_mean}

    def _ends_in_a_reconstruction(self, node: fx.Node) -> bool:
        """What leaves, or is held against an input, is of an input's size and ``node``, or an elementwise function of it."""
        todo = [node]
        while todo:
            each = todo.pop()
            if not self.fits_an_input(each):
                continue
            if each in self.outputs or any(other in self.raw for user in each.users for other in user.all_input_nodes):
                return True
            todo += [user for user in each.users if self._kind(user, Elementwise, Shape)]
        return False

    def decodes(self, node: fx.Node, random: set[fx.Node] | frozenset[fx.Node]) -> bool:
        """A decoder's operation on a random value: a learned layer, or a product or distance of random values."""
        sources = [n for n in node.all_input_nodes if n in random]
        if not sources or "draw" in node.meta or _asks(node):
            return False
        if self._has_weights(node):
            return str(node.target) not in self.reference or node.op != "call_module"
        both = self._kind(node, Bilinear) or self._name(node) in _DISTANCES
        given = [n for n in node.args if isinstance(n, fx.Node) and n in random]
        return (both and len(given) > 1) or (self.by_products and self._sums_products(node, sources))

    def _sums_products(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """``(z[i] * z[j]).sum(1)``, the inner products of a graph's edges."""
        if not self.reduces(node, sources) or self._name(sources[0]) not in ("mul", "multiply"):
            return False
        factors = set(sources[0].all_input_nodes)
        return len(factors) == 2 and all(n in self.recording.depends and self._kind(n, Shape) for n in factors)

    # --- draws -------------------------------------------------------------------------------------

    def named(self, names: tuple[str, ...]) -> list[fx.Node]:
        """The draws that a person named."""

        def fits(node: fx.Node, name: str) -> bool:
            place = str(node.meta.get("where", ""))
            return name in (node.name, place) or place.endswith("/" + name.lstrip("/"))

        return [n for n in self.recording.draws if any(fits(n, name) for name in names)]

    def latents(self, *, posterior: bool = False) -> list[fx.Node]:
        """Draws that a decoder's value depends on and whose scale or location the input reaches; no others if ``posterior``."""
        found = self._latents()
        if not found:
            self.by_products = True
            found = self._latents()
        self.posterior = bool(found)
        return found if found or posterior else self._latents(beside=True)

    def _latents(self, *, beside: bool = False) -> list[fx.Node]:
        """The latents; with ``beside`` a draw that only stands beside the input, ``cat([x, eps])``, or shifts it is one."""
        noise: dict[fx.Node, frozenset[fx.Node]] = {}  # draws that a value is, scaled and shifted by constants
        posterior: dict[fx.Node, frozenset[fx.Node]] = {}  # draws that the input has placed or scaled
        found: set[fx.Node] = set()
        values: set[fx.Node] = set()  # a decoder's, and what is made of them
        shifted: set[fx.Node] = set()  # draws that an input alone, through no layer, has placed
        decoded: set[fx.Node] = set()
        none: frozenset[fx.Node] = frozenset()
        depends = self.recording.depends
        for node in self.given:
            posterior[node] = frozenset((node,))
        for node in self.nodes:
            sources = node.all_input_nodes
            placed = none.union(*(posterior.get(n, none) for n in sources))
            plain = none.union(*(noise.get(n, none) for n in sources))
            if "draw" in node.meta:
                own = frozenset((node,))
                by_input = any(n in self.learned or n in posterior for n in sources if not asks_of(node, n))
                if not node.meta["draw"].can_be_latent and any(n in values for n in sources):
                    by_input = False  # a token drawn from what a decoder gives, which it takes back
                noise[node], posterior[node] = (none, placed | own) if by_input else (own, placed)
                continue
            if node not in depends or not (placed or plain):
                continue
            if self.decodes(node, depends):
                found |= placed
                decoded |= plain
                posterior[node], noise[node] = placed, none
                values.add(node)
                continue
            behind = [n for n in sources if n in values]
            if behind:
                values.add(node)
                if self._name(node) in _PRODUCTS:  # a factor of what a decoder gives, with a posterior of its own
                    found |= none.union(*(posterior.get(n, none) for n in sources if n not in values))
            others = [n for n in sources if not noise.get(n)]
            reached = any(n in self.learned or posterior.get(n) for n in others)
            moves = self._kind(node, Shape) or self._name(node) in _WRITES
            if plain and reached and not self._gates(node, noise) and (beside or not moves):
                placed, plain = placed | plain, none
            if any(n in self.raw for n in others):
                shifted |= plain
            if self._compares(node) and not placed:
                plain = none  # a mask of a fixed probability is as dropout's
            posterior[node], noise[node] = placed, plain
        if not found:  # an encoder alone, whose sample is what it gives; noise on an input, if there is no other draw
            leaving = [n for n in self.outputs if _rank(n) >= 2]
            found = set(none.union(*(posterior.get(n, none) for n in leaving)))
            if beside:
                found = found or (shifted & decoded.union(*(noise.get(n, none) for n in leaving)))
        return [n for n in self.recording.draws if n in found and n.meta["draw"].law is not INTEGER]

    def _compares(self, node: fx.Node) -> bool:
        return str(node.meta.get("dtype")) == "torch.bool"

    def _gates(self, node: fx.Node, noise: dict[fx.Node, frozenset[fx.Node]]) -> bool:
        """A product with a draw of zeros and ones: a mask, not a scale."""
        drawn = {d.meta["draw"].law.name for n in node.all_input_nodes for d in noise.get(n, ())}
        return self._name(node) in _PRODUCTS and bool(drawn) and drawn <= {"Bernoulli"}

    # --- roles -------------------------------------------------------------------------------------

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
        loss_like = self.loss_like(random, decoded)
        leaving = [n for n in dict.fromkeys(self.outputs) if n in random]
        losses = frozenset(n for n in leaving if n in loss_like)
        compared = self.compared(random, decoded)
        features = self.forward_of(user for _, user in compared)
        leaves = [n for n in leaving if n in decoded and n not in losses and n not in features]
        leaves = self.reconstructions_that_leave(leaves, random)
        inside = self.only_towards(losses, random)
        edges = list(dict.fromkeys([*self.frontier(losses, inside, decoded, random), *compared]))
        meeting = {source for source, user in edges if self.meets_input(source, user, inside, random, losses)}
        if meeting:  # what is kept on the model beside a loss is no output
            leaves = [n for n in leaves if n in self.returned]
        chosen = list(leaves)
        candidates = meeting or (set() if leaves else {source for source, _ in edges})
        candidates = candidates | {source for source, _ in compared}
        for source in (n for n in self.nodes if n in candidates):
            # What leaves may be a copy for a log, without a gradient, or for display of what the loss is made of.
            shown = source in meeting
            chosen = [source if self.is_copy(source, n, shown=shown) else n for n in chosen]
            known = any(self.same(source, n) or self.same(n, source) or self.behind(n, source) for n in chosen)
            known = known and not (source in meeting and self.is_stage(source, chosen, random))
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
        related = [*leaving, *(source for source, _ in edges if "shape" in source.meta)]
        beside = [
            (value, main)
            for main in chosen
            for value in dict.fromkeys(related)
            if value is not main and value in decoded and value not in losses and not self.stops_gradient(main, value)
            if self.same(value, main) or self.same(main, value)
        ]
        return Roles(
            tuple(latents),
            frozenset(random),
            tuple(chosen),
            tuple(dict(reversed(beside)).items()),
            frozenset(at_mean),
            losses,
            frozenset(decoded),
            frozenset() if paths else self.drawn(inside, random, {*chosen, *(source for source, _ in at_mean)}),
            self.unused(random),
            self.indices(random),
            self.scores(random, decoded),
            self.posterior,
        )

    def drawn(self, scores: set[fx.Node], random: set[fx.Node], ends: set[fx.Node]) -> frozenset[fx.Node]:
        """Exponentials among ``scores`` that lead to no decoder and to none of ``ends``, and are made of none.

        Densities of one latent under many components are one variable; as so many independent ones their logsumexp grows with
        the posterior's variance, and a loss falls without bound. The model's own estimate, from a draw, has neither error.
        """
        scores = scores - self.forward_of(ends)
        leads: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if node in ends or self.decodes(node, random) or any(user in leads for user in node.users):
                leads.add(node)
        return frozenset(n for n in scores - leads if self._name(n) in _EXPONENTIALS)

    def importance_weights(self, scores: set[fx.Node]) -> set[tuple[fx.Node, fx.Node]]:
        """(score, exponential of it): weights of samples, which the moments of a Gaussian log-weight would let explode."""
        return {(n, user) for n in scores for user in n.users if user in scores and self._name(user) in _EXPONENTIALS}

    def samples_likelihood(self, node: fx.Node) -> bool:
        """A draw that is no latent, or a comparison with one: what it makes of a random value is a draw at its mean."""
        return node in self.samples or (self._compares(node) and any(n in self.nuisance for n in node.all_input_nodes))

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
            picked = self._name(node) in _PICKS or "part" in node.meta
            if all(n in found for n in sources) or (picked and str(node.meta.get("dtype")) == "torch.int64"):
                found.add(node)
        return frozenset(found)

    def forward_of(self, starts: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
        """The nodes that depend on ``starts``, not through one where ``stop`` holds."""
        found = set(starts)
        for node in self.nodes:
            if node.op == "output" or node in found or _asks(node):
                continue
            if any(n in found for n in node.all_input_nodes) and not stop(node):
                found.add(node)
        return found

    def closure(self, random: set[fx.Node], begins: Callable[[fx.Node], bool]) -> set[fx.Node]:
        """The random nodes at or behind one where ``begins`` holds."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node in random and (begins(node) or any(n in found for n in node.all_input_nodes)):
                found.add(node)
        return found

    @staticmethod
    def is_loss(node: fx.Node) -> bool:
        """A loss function or module."""
        rule: Rule | None = node.meta.get("rule")
        by_rule = rule is not None and isinstance(rule.kind, Collapse)
        return by_rule or issubclass(node.meta.get("module_type", object), nn.modules.loss._Loss)

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
            summary = self.reduces(node, sources) and (_size(node) == 1 or _rank(node) <= 1)
            if summary or (any(n in found for n in sources) and not self.is_rescaled(node, found, decoded)):
                found.add(node)
        return found

    def is_rescaled(self, node: fx.Node, losses: set[fx.Node], decoded: set[fx.Node]) -> bool:
        """What a decoder gives, divided or shifted by one number for each example: a sum, a norm, a maximum of itself."""
        whole = [n for n in node.all_input_nodes if n in decoded and n not in losses and _size(n) == _size(node)]
        return bool(whole) and all(_size(n) < _size(node) for n in node.all_input_nodes if n in losses)

    def scores(self, random: set[fx.Node], decoded: set[fx.Node]) -> frozenset[fx.Node]:
        """A loss function's values and errors, numbers made of them, and what is one number."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            scores = self.is_loss(node) or self.is_error(node, random, decoded) or any(n in found for n in node.all_input_nodes)
            scores = scores or ("shape" in node.meta and _size(node) == 1)
            if scores and node in random and not self.decodes(node, random) and not self._compares(node):
                found.add(node)
        return frozenset(found)

    def is_error(self, node: fx.Node, random: set[fx.Node], decoded: set[fx.Node]) -> bool:
        """An even function of a difference from an input."""
        if self._name(node) not in _EVEN and not (self._name(node) in _PRODUCTS and len(set(node.all_input_nodes)) == 1):
            return False
        for source in node.all_input_nodes:
            operands = source.all_input_nodes
            turned = self._name(source) == "add" and (source.kwargs.get("alpha", 1) != 1 or any(map(self._is_negative, operands)))
            difference = source in decoded and (self._name(source) in _DIFFERENCES or turned)
            if difference and any(n in self.raw for n in operands) and any(n in random for n in operands):
                return True
        return False

    def _is_negative(self, node: fx.Node) -> bool:
        """Another sign before a value: ``-x``, ``-1 * x``."""
        number = next((n for n in node.args if isinstance(n, (int, float))), 0)
        return self._name(node) in ("neg", "negative") or (self._name(node) in ("mul", "multiply") and number < 0)

    def reduces(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Fewer numbers come out than went in, and not because some were selected or gate the others."""
        if self._kind(node, Shape) or "draw" in node.meta or "shape" not in node.meta:  # of several results, each has its own
            return False
        if self._name(node) == "glu":
            return False
        return bool(sources) and _size(node) < max(map(_size, sources))

    def reconstructions_that_leave(self, leaves: list[fx.Node], random: set[fx.Node]) -> list[fx.Node]:
        """Of the decoded values that leave, those that are not a part, a summary or a score of another one."""
        fits = {n for n in leaves if self.fits_an_input(n)}
        dropped: set[fx.Node] = set()
        for first in leaves:
            for second in leaves:
                if first is second or not self.behind(first, second):
                    # A function of a prior's parameters, which a latent and its decoder lie behind, as they are themselves.
                    stem = self.stem(first, random)
                    places = first not in fits and self.behind(stem, second) and self.decodes_between(stem, second, random)
                    if first is not second and not self.behind(second, first) and places:
                        dropped.add(first)
                    continue
                if self.is_step(first, second):
                    continue
                if self.same(first, second):
                    dropped.add(first if _size(first) == _size(second) and second not in dropped else second)
                elif (second in fits) != (first in fits):
                    dropped.add(first if second in fits else second)
                elif not self.decodes_between(first, second, random) or _size(second) <= _batch(second):
                    dropped.add(second)
                elif first not in fits:
                    dropped.add(first)
        kept = [n for n in leaves if n not in dropped]
        least = min((_size(n) for n in kept if n in fits), default=0)  # fewer numbers beside it are a score: logits of classes
        return [n for n in kept if _size(n) >= least]

    def stem(self, node: fx.Node, random: set[fx.Node]) -> fx.Node:
        """What ``node`` is a view or an elementwise function of, as far back as a layer."""
        while not self.decodes(node, random) and self._kind(node, Elementwise, Shape):
            sources = [n for n in node.all_input_nodes if n in random]
            if len(sources) != 1:
                break
            (node,) = sources
        return node

    @staticmethod
    def is_step(first: fx.Node, second: fx.Node) -> bool:
        """Both are of one line of a loop: steps of a decoder that takes back what it gave."""
        places = {(n.op, n.target, n.meta.get("where"), n.meta.get("module"), n.meta.get("shape")) for n in (first, second)}
        return len(places) == 1 and bool(first.meta.get("where"))

    def fits_an_input(self, node: fx.Node) -> bool:
        """As many numbers as in an input that is a batch of vectors or more."""
        inputs = [n for n in self.nodes if n.op == "placeholder" and n not in self.given]
        return _rank(node) >= 2 and any(_rank(n) >= 2 and _size(n) == _size(node) for n in inputs)

    def behind(self, first: fx.Node, second: fx.Node) -> bool:
        """True where ``second`` is made of ``first``."""
        return second in self.forward_of((first,))

    def between(self, first: fx.Node, second: fx.Node) -> list[fx.Node]:
        """The nodes on the ways from ``first`` to ``second``, ``second`` among them."""
        ahead = self.forward_of((first,)) - {first}
        found, todo = [], [second]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in ahead and node not in seen:
                seen.add(node)
                found.append(node)
                todo += node.all_input_nodes
        return found

    def same(self, first: fx.Node, second: fx.Node) -> bool:
        """``second`` is ``first``, or a view or an elementwise function of it."""
        if first is second:
            return True
        if second in self.nuisance and first not in self.nuisance:  # a sample of a likelihood
            return False
        way = self.between(first, second)
        return bool(way) and all(self._kind(n, Elementwise, Shape) or self._keeps_size(n) for n in way)

    def is_copy(self, first: fx.Node, second: fx.Node, *, shown: bool) -> bool:
        """``second`` is ``first`` without its gradient; of what is ``shown``, in another unit or range too, as 255 y is."""
        if not self.same(first, second):
            return False
        moved = all(self._kind(n, Shape) or self._name(n) in _RESCALINGS for n in self.between(first, second))
        return self.stops_gradient(first, second) or (shown and moved and _size(first) == _size(second))

    @staticmethod
    def stops_gradient(first: fx.Node, second: fx.Node) -> bool:
        """``first`` has a gradient and ``second``, made of it, has none."""
        return bool(first.meta.get("requires_grad")) and second.meta.get("requires_grad") is False

    def _keeps_size(self, node: fx.Node) -> bool:
        """A softmax, dropout or the like: no layer, and as many numbers as before."""
        sources = [n for n in node.all_input_nodes if n in self.recording.depends]
        return not self._has_weights(node) and len(sources) == 1 and _size(sources[0]) == _size(node)

    def is_stage(self, source: fx.Node, chosen: list[fx.Node], random: set[fx.Node]) -> bool:
        """A reconstruction made of others by a decoder of its own: of an input's size, or a step as they are."""
        apart = [n for n in chosen if not self.same(source, n) and not self.same(n, source)]
        stages = [n for n in apart if not self.behind(n, source) or self.decodes_between(n, source, random)]
        return len(stages) == len(chosen) and (self.fits_an_input(source) or any(self.is_step(n, source) for n in chosen))

    def compared(self, random: set[fx.Node], decoded: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """(value, user): a reconstruction, and a network of features or a discriminator that takes it as it takes inputs.

        It takes the mean, as one outside the method would.
        """
        found = []
        for node in self.nodes:
            if node.op == "call_module" and str(node.target) in self.reference and node in random:
                sources = [n for n in node.all_input_nodes if n in random]
                whole = len(sources) == 1 and sources[0] in decoded and self.fits_an_input(sources[0])
                if whole and not any(self.decodes(n, random) for n in self.forward_of((node,))):
                    found.append((sources[0], node))
        return found

    def decodes_between(self, first: fx.Node, second: fx.Node, random: set[fx.Node]) -> bool:
        """A decoder's operation lies between the two."""
        return any(self.decodes(n, random) for n in self.between(first, second))

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
        if self._name(node) != "add" or node.kwargs.get("alpha", 1) != 1 or any(n in self.raw for n in node.all_input_nodes):
            return False
        several = len(node.all_input_nodes) > 1
        return several and all(_size(n) == _size(node) and self._is_given(n, random) for n in sources)

    def _is_given(self, node: fx.Node, random: set[fx.Node]) -> bool:
        """By a layer, its activation included, or by a sum of such."""
        while self.is_activation(node):
            (node,) = node.all_input_nodes
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
        ends = _PRODUCTS | _DIFFERENCES
        if len(users) < 2:
            return None
        for node in self.nodes:
            if node not in inside or node in self.outputs or self._name(node) not in ends or _size(node) != _size(source):
                continue
            way = set(self.between(source, node))
            made_of = {n for each in way for n in each.all_input_nodes} - way - {source}
            gone_on = {user for each in way - {node} for user in each.users if user in random}
            logarithms = any(self._name(n) in _ERRORS - _EVEN for n in way)
            summary = any("shape" in n.meta and _size(n) < _size(source) for n in way)
            if summary and not logarithms and users | gone_on <= way and not made_of & self.conditioned:
                return node
        return None

    def is_activation(self, node: fx.Node) -> bool:
        """A function of one value and constants that ends a decoder."""
        if len(node.all_input_nodes) != 1 or self.is_loss(node):
            return False
        name = self._name(node)
        plain = self._kind(node, Elementwise, Shape) or name == "softmax"
        return plain and name not in _ERRORS and _size(node) == _size(node.all_input_nodes[0])

    def scales(self, source: fx.Node, node: fx.Node) -> bool:
        """``source`` times a factor of fewer numbers, such as one for each example: a library's size, a temperature."""
        factors = [n for n in node.all_input_nodes if n is not source]
        name = self._name(node)
        if name not in _PRODUCTS - {"addcmul", "lerp"} or len(factors) != 1 or (name[:3] != "mul" and node.args[0] is not source):
            return False
        return _size(factors[0]) < _size(source) == _size(node) and not self.behind(source, factors[0])

    def meets_input(
        self, source: fx.Node, user: fx.Node, inside: set[fx.Node], random: set[fx.Node], losses: frozenset[fx.Node]
    ) -> bool:
        """On its way to the loss, through no other layer, the value meets an input."""
        todo, seen = [user], set()
        while todo:
            node = todo.pop()
            if node in seen or node not in inside:
                continue
            seen.add(node)
            others = [n for n in node.all_input_nodes if n not in random]
            # Not so what an encoder reads beside an input, or as the difference from it: the state before it, a canvas.
            compared = any(n in self.raw for n in others) and not self._kind(node, Shape) and self.is_scored(node, losses)
            if compared or (self.is_loss(node) and any(n in self.conditioned for n in others)):
                return True
            if node is user or not self.decodes(node, random):
                todo += list(node.users)
        return False

    def is_scored(self, node: fx.Node, losses: frozenset[fx.Node]) -> bool:
        """A loss is made of ``node`` without any layer."""
        todo, seen = [node], set()
        while todo:
            each = todo.pop()
            if each in losses:
                return True
            if each not in seen:
                seen.add(each)
                todo += [user for user in each.users if user.op != "output" and not self._has_weights(user)]
        return False


def _asks(node: fx.Node) -> bool:
    """A question about shape or type, whose answer is not random."""
    rule: Rule | None = node.meta.get("rule")
    return (rule is not None and type(rule.kind) is Metadata) or (node.op == "call_method" and node.target == "size")


def asks_of(draw: fx.Node, source: fx.Node) -> bool:
    """A draw asks ``source`` for its shape alone, as ``randn_like(source)`` and ``source.normal_()`` do."""
    name = str(getattr(draw.meta["draw"].func, "__name__", ""))
    return name.endswith(("_like", "_")) and bool(draw.args) and draw.args[0] is source


def _size(node: fx.Node) -> int:
    return math.prod(node.meta.get("shape", ()))


def _rank(node: fx.Node) -> int:
    """How many dimensions have more than one entry, the first counted as it is."""
    shape = node.meta.get("shape", ())
    return len(shape[:1]) + sum(n > 1 for n in shape[1:])


def _batch(node: fx.Node) -> int:
    shape = node.meta.get("shape", ())
    return int(shape[0]) if shape else 1
