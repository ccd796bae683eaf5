"""A recorded graph with what is asked of its nodes again and again: what they are, and what lies behind and between them."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

from torch import fx, nn

from rvconvert.rules.kinds import Bilinear, Collapse, Elementwise, Metadata, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rvconvert.capture.recording import Recording
    from rvconvert.core.registry import Rule

__all__ = [
    "DIFFERENCES",
    "DISTANCES",
    "LOCATIONS",
    "PRODUCTS",
    "WRITES",
    "Posterior",
    "RecordedGraph",
    "asks",
    "asks_of",
    "batch_of",
    "rank_of",
    "size_of",
]

PRODUCTS = frozenset("mul multiply addcmul lerp div true_divide divide".split())
DIFFERENCES = frozenset("sub subtract rsub".split())
LOCATIONS = frozenset("add sub subtract rsub addcmul".split())
WRITES = frozenset("setitem index_put index_copy scatter masked_scatter".split())
DISTANCES = frozenset("cdist pairwise_distance cosine_similarity dist".split())


class Posterior(NamedTuple):
    """The names of the layers that place latents, and how many inputs reach these."""

    layers: frozenset[str]
    inputs: int


class RecordedGraph:
    """The nodes of a recording, and sets of them that their descriptions lead to."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._ahead: dict[fx.Node, set[fx.Node]] = {}
        self.nodes = list(recording.graph.nodes)
        self.given = set(recording.random_inputs)
        self.random: set[fx.Node] | frozenset[fx.Node] = recording.depends  # less of them once latents are known
        self.placeholders = [n for n in self.nodes if n.op == "placeholder" and "number" not in n.meta]
        self.inputs = [n for n in self.placeholders if n not in self.given]
        self.outputs = list(recording.output.all_input_nodes)
        given: tuple[object, ...] = recording.output.args[0]  # type: ignore[assignment]
        self.returned = set(given[: len(given) - recording.kept_leaves])
        self.raw: set[fx.Node] = set()  # made of inputs, through no learned layer
        self.conditioned: set[fx.Node] = set()  # depends on an input
        self.learned: set[fx.Node] = set()  # depends on an input through a learned layer
        self.weights: set[fx.Node] = set()  # made of parameters and buffers alone, perhaps picked by an input
        self.posterior: Posterior | None = None  # of the latents, where they have one
        self.nuisance: set[fx.Node] = set()  # made of draws that are no latent
        self.bare: set[fx.Node] = set()  # latents, and what is made of them through no layer, once latents are known
        self.by_products = False  # products with what is given, or of two latents, and warps decode: where nothing else does
        for node in self.nodes:
            self._describe(node)
        if not any("shape" in n.meta for n in self.placeholders) and (batch := self._put_on_the_model()):
            self.placeholders = self.inputs = batch
            for described in (self.raw, self.conditioned, self.learned, self.weights):
                described.clear()
            for node in self.nodes:
                self._describe(node)
        self.inputs = [n for n in self.inputs if not self._is_mask(n)]
        self.reference = self._modules_applied_to_inputs()
        self.filters = self._filters()

    # --- what a node is ----------------------------------------------------------------------------

    def _put_on_the_model(self) -> list[fx.Node]:
        """Tensors that a model keeps as attributes and an encoder's layers read: a batch, as ``set_input(x)`` puts it there."""
        held = [n for n in self.nodes if n.meta.get("held") and rank_of(n) >= 2]
        plain = {n: self.forward_of((n,), stop=lambda each: each in self.recording.depends) for n in held}
        return [n for n in held if any(self.has_weights(each) for each in plain[n])]

    def _is_mask(self, given: fx.Node) -> bool:
        """An input that does nothing but multiply random variables, and what they begin with: nothing is to be like it."""
        others: set[fx.Node] = set()
        todo = [given]
        while todo:
            for user in (node := todo.pop()).users:
                if self.is_kind(user, Shape):
                    todo.append(user)
                elif self.rule_name(user) in PRODUCTS and len(user.all_input_nodes) == 2:
                    others.update(set(user.all_input_nodes) - {node})
                elif not asks(user):
                    return False
        return bool(others & self.recording.depends) and not others & (self.raw | self.weights)

    def _describe(self, node: fx.Node) -> None:
        sources = node.all_input_nodes
        if "number" in node.meta:
            return
        if node in self.placeholders:
            if node not in self.given:
                self.raw.add(node)
            self.conditioned.add(node)
        elif node.op == "get_attr":
            if not str(node.target).startswith("_rvconvert.") or "weight" in node.meta:
                self.weights.add(node)
        elif asks(node):
            return
        else:
            values = self.values_in(node) if self.is_kind(node, Shape) else []
            if values and all(n in self.weights and n.meta.get("requires_grad") for n in values):
                self.weights.add(node)  # those that an input picks too: topics of a document's year
            if any(n in self.conditioned for n in sources):
                self.conditioned.add(node)
                if any(n in self.learned for n in sources) or self.has_weights(node):
                    self.learned.add(node)
                elif any(n in self.raw for n in sources):
                    self.raw.add(node)
            elif any(n in self.weights for n in sources) and all(n in self.weights or not n.all_input_nodes for n in sources):
                self.weights.add(node)  # what is written into zeros too
            if node.meta.get("mutates") and node.args:
                self._is_written(node.args[0], node)

    def _is_written(self, target: object, writer: fx.Node) -> None:
        """What is written in place into a tensor, or into a view of it, is part of it from there on."""
        while isinstance(target, fx.Node):
            for kind in (self.conditioned, self.learned, self.raw, self.weights):
                if writer in kind:
                    kind.add(target)
            target = target.args[0] if self.is_kind(target, Shape) and target.args else None

    def has_weights(self, node: fx.Node) -> bool:
        """An operation with weights that mixes elements: a layer, not a scale for each element."""
        if self.is_kind(node, Elementwise, Shape) or self.rule_name(node) in WRITES:
            return False
        if node.op == "call_module":
            return bool(node.meta.get("learned", True))
        return any(n in self.weights for n in node.all_input_nodes)

    @staticmethod
    def is_kind(node: fx.Node, *kinds: type) -> bool:
        rule: Rule | None = node.meta.get("rule")
        if rule is None:  # one of several results, or what a tensor is once an alias was written: elements in their places
            return "part" in node.meta and Shape in kinds
        return isinstance(rule.kind, kinds)

    @staticmethod
    def rule_name(node: fx.Node) -> str:
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
                elif self.has_weights(node):
                    given.add(node)
                    first.add(str(node.target))
        of_mean = self.forward_of(n for n in plain if str(n.target) in first)
        last = {str(n.target) for n in calls if n in self.recording.depends and self._ends_in_a_reconstruction(n)}
        return {str(n.target) for n in plain if str(n.target) in random - first - last and n not in of_mean}

    def _filters(self) -> set[fx.Node]:
        """Operations with fixed weights that inputs and what a decoder gives both go through: a window, an edge filter."""
        by_weight: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "call_function" and self.has_weights(node):
                for weight in self._attributes_in([n for n in node.all_input_nodes if n in self.weights]):
                    by_weight.setdefault(weight, []).append(node)
        found: set[fx.Node] = set()
        for users in by_weight.values():
            plain = self._without_layers([n for n in users if n not in self.recording.depends], users, self.recording.depends)
            random = self._without_layers([n for n in users if n in self.recording.depends], users, set())
            if any(n in plain for each in random for n in each.all_input_nodes):  # held against each other
                found.update(users)
        return found

    def _without_layers(self, starts: list[fx.Node], allowed: list[fx.Node], ends: set[fx.Node]) -> set[fx.Node]:
        """What is made of ``starts`` through no layer but those ``allowed``, up to what is among ``ends``."""
        found, todo = set(starts), list(starts)
        while todo:
            for user in todo.pop().users:
                stops = user in found or user in ends or user.op == "output" or asks(user)
                if not stops and (user in allowed or not self.has_weights(user)):
                    found.add(user)
                    todo.append(user)
        return found

    def _attributes_in(self, todo: list[fx.Node]) -> set[str]:
        """The names of the buffers that values are made of; none where a parameter is among them."""
        found: set[str] = set()
        while todo:
            node = todo.pop()
            todo += node.all_input_nodes
            if node.meta.get("requires_grad"):
                return set()
            if node.op == "get_attr":
                found.add(str(node.target))
        return found

    def _ends_in_a_reconstruction(self, node: fx.Node) -> bool:
        """What leaves, or is held against an input, is of an input's size and ``node``, or an elementwise function of it."""
        todo, seen = [node], set()
        while todo:
            each = todo.pop()
            if each in seen or not self.fits_an_input(each):
                continue
            seen.add(each)
            if each in self.outputs or any(other in self.raw for user in each.users for other in user.all_input_nodes):
                return True
            todo += [user for user in each.users if self.is_kind(user, Elementwise, Shape)]
        return False

    def decodes(self, node: fx.Node) -> bool:
        """A decoder's operation on a random value: a learned layer, or a product or distance of random values."""
        sources = self.random_in(node)
        if not sources or "draw" in node.meta or asks(node):
            return False
        if self.has_weights(node):
            return str(node.target) not in self.reference if node.op == "call_module" else node not in self.filters
        both = self.is_kind(node, Bilinear) or self.rule_name(node) in DISTANCES
        given = [n for n in node.args if isinstance(n, fx.Node) and n in self.random]
        # Where nothing else decodes, the factors of the other side that are given do.
        if both and len(given) > 1:
            return self.by_products or not self.relates(node)
        warps = self.rule_name(node) == "grid_sample" and any(n in self.random for n in node.all_input_nodes[1:])
        return self.by_products and ((both and bool(given)) or warps or self._sums_products(node, sources))

    def relates(self, node: fx.Node) -> bool:
        """A product, distance or difference of the latents of a batch with each other or with draws of a prior: of a kernel.

        One that leaves, or is as large as an input, reconstructs a graph's edges, unless inputs go through the same.
        """
        given = [n for n in node.args if isinstance(n, fx.Node)]
        latent = [n for n in given if n in self.bare]
        if len(given) < 2 or not latent or not all(n in self.bare or n in self.nuisance for n in given):
            return False
        if self.rule_name(node) in DIFFERENCES:
            return all(size_of(node) > size_of(self._unexpanded(n)) for n in latent)
        products = self.is_kind(node, Bilinear) or self.rule_name(node) in DISTANCES
        if not products or any(self.same(node, n) for n in self.outputs):
            return False
        alike = (n for n in self.nodes if self.rule_name(n) == self.rule_name(node) and n not in self.random)
        if any(self._is_of_itself(n) for n in alike):
            return True
        return not self.fits_an_input(node) and not self._is_held_against_edges(node)

    def _unexpanded(self, node: fx.Node) -> fx.Node:
        """What a view, perhaps of the same elements many times, is of."""
        while self.is_kind(node, Shape) and self.values_in(node) and size_of(self.values_in(node)[0]) <= size_of(node):
            (node,) = self.values_in(node)[:1]
        return node

    def _is_of_itself(self, node: fx.Node) -> bool:
        """A product or distance of a value with itself, or a view of it."""
        given = {self._unexpanded(n) for n in node.args if isinstance(n, fx.Node)}
        return len(given) == 1 and len([n for n in node.args if isinstance(n, fx.Node)]) > 1

    def _is_held_against_edges(self, node: fx.Node) -> bool:
        """A loss function holds it, or an elementwise function of it, against what was made of an input: a graph's edges."""
        todo, seen = [node], set()
        while todo:
            each = todo.pop()
            if each in seen:
                continue
            seen.add(each)
            for user in each.users:
                if self.is_loss(user) and any(n in self.raw and size_of(n) == size_of(node) for n in user.all_input_nodes):
                    return True
                if self.is_kind(user, Elementwise, Shape) and size_of(user) == size_of(node):
                    todo.append(user)
        return False

    def _sums_products(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """``(z[i] * z[j]).sum(1)``, the inner products of a graph's edges."""
        if not self.reduces(node, sources) or self.rule_name(sources[0]) not in ("mul", "multiply"):
            return False
        factors = set(sources[0].all_input_nodes)
        return len(factors) == 2 and all(n in self.recording.depends and self.is_kind(n, Shape) for n in factors)

    def random_in(self, node: fx.Node) -> list[fx.Node]:
        """The random values that go into ``node``."""
        return [n for n in node.all_input_nodes if n in self.random]

    def values_in(self, node: fx.Node) -> list[fx.Node]:
        """The tensors whose values go into ``node``: no sizes, nor what a view takes its shape from."""
        if self.is_kind(node, Shape) and node.args and isinstance(node.args[0], fx.Node):
            return [node.args[0]]
        return [n for n in node.all_input_nodes if "shape" in n.meta]

    def placing(self, draw: fx.Node) -> set[fx.Node]:
        """What gives a draw its location and scale, back to the layers that make it."""
        todo = [n for n in draw.all_input_nodes if not asks_of(draw, n)]
        chain, seen = [draw], {draw}
        while chain:
            node = chain.pop()
            for user in node.users:
                if user in seen or self.has_weights(user) or not self.is_kind(user, Elementwise, Shape):
                    continue
                seen.add(user)
                others = [n for n in user.all_input_nodes if n not in seen]
                todo += others
                if not (self.rule_name(user) in LOCATIONS and any(n in self.learned for n in others)):  # at its location it ends
                    chain.append(user)
        found: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in found or node in self.raw or node in self.weights or asks(node):
                continue
            found.add(node)
            if not self.has_weights(node):
                todo += node.all_input_nodes
        return found

    def parameters_of(self, draws: Iterable[fx.Node]) -> set[fx.Node]:
        """What is ``placing`` any of the draws."""
        return {n for draw in draws for n in self.placing(draw)}

    def inputs_placing(self, draws: Iterable[fx.Node]) -> int:
        """How many of the inputs reach the location and scale of draws."""
        placing = self.parameters_of(draws)
        return sum(not placing.isdisjoint(self.ahead_of(n)) for n in self.placeholders)

    def layers_placing(self, draw: fx.Node) -> frozenset[str]:
        """The names of the layers that give a draw its location and scale."""
        layers = [n for n in self.placing(draw) if self.has_weights(n)]
        weights = [n for layer in layers for n in layer.all_input_nodes if n in self.weights]
        return frozenset(str(n.target) for n in (*layers, *weights) if n.op in ("call_module", "get_attr"))

    def compares(self, node: fx.Node) -> bool:
        return str(node.meta.get("dtype")) == "torch.bool"

    @staticmethod
    def is_loss(node: fx.Node) -> bool:
        """A loss function or module."""
        rule: Rule | None = node.meta.get("rule")
        by_rule = rule is not None and isinstance(rule.kind, Collapse)
        return by_rule or issubclass(node.meta.get("module_type", object), nn.modules.loss._Loss)

    def reduces(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Fewer numbers come out than went in, and not because some were selected or gate the others."""
        if self.is_kind(node, Shape) or "draw" in node.meta or "shape" not in node.meta:  # of several results, each has its own
            return False
        if self.rule_name(node) == "glu":
            return False
        return bool(sources) and size_of(node) < max(map(size_of, sources))

    def fits_an_input(self, node: fx.Node) -> bool:
        """As many numbers as in an input that is a batch of vectors or more, or for each of its integers one for each kind."""
        if rank_of(node) < 2:
            return False
        shape = node.meta.get("shape", ())
        if any(rank_of(n) >= 2 and size_of(n) == size_of(node) for n in self.inputs):
            return True
        kinds = ((shape[:dim] + shape[dim + 1 :], shape[dim]) for dim in range(1, len(shape)))  # logits of tokens, of levels
        return any((given, count) in self.kinds or (given, None) in self.kinds for given, count in kinds)

    def inputs_like(self, node: fx.Node) -> list[fx.Node]:
        """Inputs of as many numbers, or of most of whose steps a value has one each, as the frames after the first are."""
        given = [n for n in self.inputs if rank_of(n) >= 2]
        whole = [n for n in given if size_of(n) == size_of(node)]
        return whole or [n for n in given if _is_most_steps(node.meta.get("shape", ()), n.meta["shape"])]

    @functools.cached_property
    def kinds(self) -> set[tuple[tuple[int, ...], int | None]]:
        """(shape, kinds) of inputs of integers and of parts of them: as many as are embedded or one-hot; of an image any."""
        found: set[tuple[tuple[int, ...], int | None]] = set()
        for given in self.inputs:
            if rank_of(given) < 2 or str(given.meta.get("dtype")) not in ("torch.int64", "torch.int32", "torch.uint8"):
                continue
            parts = [n for n in self.nodes if n is given or (n in self.raw and self.same(given, n) and self.is_kind(n, Shape))]
            counts: set[int | None] = set()
            for user in (user for n in parts for user in n.users):
                if user.meta.get("rows") or "embedding" in str(user.target):
                    counts.add(self._rows(user))
                elif self.rule_name(user) == "one_hot":
                    counts.add(user.meta["shape"][-1])
            if not counts and rank_of(given) > 2:
                counts = {None}
            found |= {(n.meta["shape"], count) for n in parts if "shape" in n.meta for count in counts}
            found |= {(given.meta["shape"][:1], count) for count in counts if count}  # of a bag of words
        return found

    def _rows(self, embedding: fx.Node) -> int:
        """How many rows the table of an embedding has."""
        if embedding.op == "call_module":
            return int(embedding.meta.get("rows", 0))
        tables = [n for n in embedding.all_input_nodes if n in self.weights and "shape" in n.meta]
        return int(tables[0].meta["shape"][0]) if tables else 0

    # --- what lies behind and between nodes -----------------------------------------------------------

    def forward_of(self, starts: Iterable[fx.Node], stop: Callable[[fx.Node], bool] = lambda node: False) -> set[fx.Node]:
        """The nodes that depend on ``starts``, not through one where ``stop`` holds."""
        found = set(starts)
        todo = list(found)
        while todo:
            for user in todo.pop().users:
                if user not in found and user.op != "output" and not asks(user) and not stop(user):
                    found.add(user)
                    todo.append(user)
        return found

    def ahead_of(self, node: fx.Node) -> set[fx.Node]:
        """``node`` and what is made of it; found once."""
        if node not in self._ahead:
            self._ahead[node] = self.forward_of((node,))
        return self._ahead[node]

    def behind(self, first: fx.Node, second: fx.Node) -> bool:
        """True where ``second`` is made of ``first``."""
        return second in self.ahead_of(first)

    def between(self, first: fx.Node, second: fx.Node) -> list[fx.Node]:
        """The nodes on the ways from ``first`` to ``second``, ``second`` among them."""
        ahead = self.ahead_of(first)
        found, todo = [], [second]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in ahead and node is not first and node not in seen:
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
        moved = (self.is_kind(n, Elementwise, Shape) or self.rule_name(n) in WRITES or self._keeps_size(n) for n in way)
        return bool(way) and all(moved)

    def _keeps_size(self, node: fx.Node) -> bool:
        """A softmax, dropout or the like: no layer, and as many numbers as before."""
        sources = [n for n in node.all_input_nodes if n in self.recording.depends]
        return not self.has_weights(node) and len(sources) == 1 and size_of(sources[0]) == size_of(node)

    @staticmethod
    def stops_gradient(first: fx.Node, second: fx.Node) -> bool:
        """``first`` has a gradient and ``second``, made of it, has none."""
        return bool(first.meta.get("requires_grad")) and second.meta.get("requires_grad") is False

    @staticmethod
    def is_step(first: fx.Node, second: fx.Node) -> bool:
        """Both are of one line of a loop: steps of a decoder that takes back what it gave."""
        places = {(n.op, n.target, n.meta.get("where"), n.meta.get("module"), n.meta.get("shape")) for n in (first, second)}
        return len(places) == 1 and bool(first.meta.get("where"))


def asks(node: fx.Node) -> bool:
    """A question about shape or type, whose answer is not random."""
    rule: Rule | None = node.meta.get("rule")
    return (rule is not None and type(rule.kind) is Metadata) or (node.op == "call_method" and node.target == "size")


def asks_of(draw: fx.Node, source: fx.Node) -> bool:
    """A node is a draw and asks ``source`` for its shape alone, as ``randn_like(source)`` and ``source.normal_()`` do."""
    if "draw" not in draw.meta:
        return False
    name = str(getattr(draw.meta["draw"].func, "__name__", ""))
    return name.endswith(("_like", "_")) and bool(draw.args) and draw.args[0] is source


def size_of(node: fx.Node) -> int:
    """How many numbers a value has."""
    return math.prod(node.meta.get("shape", ()))


def _is_most_steps(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Time is the first or the second dimension, of vectors or of images."""
    if len(shape) != len(whole) or len(shape) not in (3, 5):
        return False
    differ = [dim for dim, (n, of) in enumerate(zip(shape, whole, strict=True)) if n != of]
    return len(differ) == 1 and differ[0] < 2 and whole[differ[0]] // 2 < shape[differ[0]] < whole[differ[0]]


def rank_of(node: fx.Node) -> int:
    """How many dimensions have more than one entry, the first counted as it is."""
    shape = node.meta.get("shape", ())
    return len(shape[:1]) + sum(n > 1 for n in shape[1:])


def batch_of(node: fx.Node) -> int:
    """How long its first dimension is."""
    shape = node.meta.get("shape", ())
    return int(shape[0]) if shape else 1
