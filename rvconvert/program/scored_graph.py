"""A decoded graph with the losses that are made inside the method: where they take what a decoder gives, and how."""

from __future__ import annotations

from itertools import combinations

from torch import fx

from rvconvert.program.decoded_graph import DecodedGraph
from rvconvert.program.recorded_graph import DIFFERENCES, PRODUCTS, WRITES, rank_of, size_of
from rvconvert.rules.kinds import Elementwise, Shape

__all__ = ["RESCALINGS", "SUBTRACTING", "ScoredGraph"]

RESCALINGS = frozenset("mul multiply add sub subtract rsub div true_divide divide clamp clip clamp_min clamp_max".split())
# Errors, log-likelihoods and their like are no activation of a last layer: a reconstruction ends before them.
_LOGARITHMS = frozenset("log log1p log2 log10 log_softmax logsigmoid".split())
_ERRORS = frozenset("pow square abs neg".split()) | _LOGARITHMS
_EXTREMA = frozenset("max min amax amin maximum minimum".split())
_EXPONENTIALS = frozenset("exp expm1".split())
_SUMMING = frozenset("softmax log_softmax logsumexp logaddexp".split())
_OF_CORRELATIONS = frozenset("cov corrcoef sort msort".split())
SUBTRACTING = DIFFERENCES | frozenset("mse_loss l1_loss smooth_l1_loss huber_loss".split())
_MASKING = WRITES | {"masked_fill", "where"}
_OF_TWO = PRODUCTS - {"addcmul", "lerp"}
_JOINING = frozenset("cat stack hstack vstack dstack column_stack".split())
_EVEN = frozenset("pow square abs norm vector_norm huber_loss".split())


class ScoredGraph(DecodedGraph):
    """A decoded graph with its losses.

    Attributes:
        losses: outputs that are a loss or a term of one.
        scoring: random nodes that reach such outputs, and no other.
    """

    losses: frozenset[fx.Node]
    scoring: set[fx.Node]

    def score(self) -> None:
        """Find the losses."""
        self.loss_like = self._loss_like()
        self.losses = frozenset(n for n in self.outputs if n in self.random and n in self.loss_like)
        self.scoring = self._only_towards_losses()

    def _loss_like(self) -> set[fx.Node]:
        """Values that are a loss: of a loss function, an error against an input, or one number for each example."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            if node not in self.random:
                continue
            sources = self.random_in(node)
            if self.is_loss(node) or self.is_error(node):
                found.add(node)
            elif self.decodes(node):
                continue
            summary = self.reduces(node, sources) and (size_of(node) == 1 or rank_of(node) <= 1)
            if summary or (any(n in found for n in sources) and not self.is_rescaled(node, found)):
                found.add(node)
        return found

    def is_rescaled(self, node: fx.Node, losses: set[fx.Node]) -> bool:
        """What a decoder gives, divided or shifted by one number for each example or joined to it: a sum, a norm, a maximum."""
        given = [n for n in node.all_input_nodes if n in self.decoded and n not in losses]
        whole = [n for n in given if size_of(n) == size_of(node) or (len(self.parts(node)) > 1 and rank_of(n) > 1)]
        return bool(whole) and all(size_of(n) < size_of(node) for n in node.all_input_nodes if n in losses)

    def scores(self) -> frozenset[fx.Node]:
        """A loss function's values and errors, numbers made of them, and what is one number."""
        found: set[fx.Node] = set()
        for node in self.nodes:
            scores = self.is_loss(node) or self.is_error(node) or any(n in found for n in node.all_input_nodes)
            scores = scores or ("shape" in node.meta and size_of(node) == 1)
            if scores and node in self.random and not self.decodes(node) and not self.compares(node):
                found.add(node)
        return frozenset(found)

    def is_error(self, node: fx.Node) -> bool:
        """An even function of a difference from an input."""
        if self.rule_name(node) not in _EVEN and not (self.rule_name(node) in PRODUCTS and len(set(node.all_input_nodes)) == 1):
            return False
        for source in node.all_input_nodes:
            operands = source.all_input_nodes
            other_sign = source.kwargs.get("alpha", 1) != 1 or any(map(self._is_negative, operands))
            turned = self.rule_name(source) == "add" and other_sign
            difference = source in self.decoded and (self.rule_name(source) in DIFFERENCES or turned)
            if difference and any(n in self.raw for n in operands) and any(n in self.random for n in operands):
                return True
        return False

    def _is_negative(self, node: fx.Node) -> bool:
        """Another sign before a value: ``-x``, ``-1 * x``."""
        number = next((n for n in node.args if isinstance(n, (int, float))), 0)
        return self.rule_name(node) in ("neg", "negative") or (self.rule_name(node) in ("mul", "multiply") and number < 0)

    def _only_towards_losses(self) -> set[fx.Node]:
        """Random nodes that reach outputs which are losses, and no other."""
        reaches: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            if node not in self.random:
                continue
            ends = [n for n in self.outputs if n is node]
            verdicts = [node in self.losses] if ends else []
            verdicts += [reaches[n] for n in node.users if n in reaches]
            if verdicts:
                reaches[node] = all(verdicts)
        return {n for n, only in reaches.items() if only}

    def frontier(self) -> list[tuple[fx.Node, fx.Node]]:
        """(value, user): where what a decoder gives enters the making of a loss, activations of its last layer included."""
        edges: list[tuple[fx.Node, fx.Node]] = []
        todo, seen = list(self.losses), set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            for source in (n for n in node.all_input_nodes if n in self.random):
                whole = self.is_result(source) or self.is_sum(source)
                if source in self.scoring and source not in self.outputs and not whole:
                    todo.append(source)
                elif source in self.decoded:
                    edges.append((source, node))
        return list(dict.fromkeys(e for source, user in edges for e in self.extended(source, user)))

    def is_sum(self, node: fx.Node) -> bool:
        """A sum of what layers give, as a residual layer ends in, or a canvas that is written to step by step."""
        sources = self.random_in(node)
        if self.rule_name(node) != "add" or node.kwargs.get("alpha", 1) != 1 or any(n in self.raw for n in node.all_input_nodes):
            return False
        several = len(node.all_input_nodes) > 1
        return several and all(size_of(n) == size_of(node) and self._is_given(n) for n in sources)

    def _is_given(self, node: fx.Node) -> bool:
        """By a layer, its activation included, or by a sum of such."""
        while self.is_activation(node) or self.is_masking(node):
            values = self.values_in(node)
            node = values[0] if len(values) == 1 else self.random_in(node)[0]  # beside a mask
        return node in self.random and (self.is_result(node) or self.is_sum(node))

    def is_result(self, node: fx.Node) -> bool:
        """Of a layer, or one of its several results, as a recurrent layer gives."""
        while "part" in node.meta and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return self.decodes(node)

    def extended(self, source: fx.Node, user: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The edges behind the activations of the last layer, which belong to the reconstruction."""
        while True:
            whole = self.meeting_again(source)
            if whole is None:
                goes_on = self.is_activation(user) or self.is_masking(user) or self.scales(source, user)
                goes_on = goes_on or self.is_compared_logarithm(user)
                if user not in self.scoring or user in self.outputs or not goes_on:
                    return [(source, user)]
                if len([n for n in source.users if n in self.random]) != 1:
                    return [(source, user)]
                whole = user
            following = [n for n in whole.users if n in self.random]
            if len(following) != 1 and self.meeting_again(whole) is None:
                return [(whole, each) for each in following if not self.decodes(each)]
            source, user = whole, following[0]

    def meeting_again(self, source: fx.Node) -> fx.Node | None:
        """Where all that is made of ``source`` is one value of its size."""
        return self.rescaling(source) or self.put_together(source)

    def put_together(self, source: fx.Node) -> fx.Node | None:
        """Where parts of ``source``, each with an activation of its own, are joined again: columns of a table."""
        users = {n for n in source.users if n in self.random}
        for node in self.nodes:
            joins = self.rule_name(node) in _JOINING | WRITES and size_of(node) == size_of(source)
            if not joins or node not in self.scoring or node in self.outputs:
                continue
            way = set(self.between(source, node))
            others = {n for each in way for n in each.all_input_nodes if n in self.random} - way - {source}
            gone_on = {user for each in way - {node} for user in each.users if user in self.random and user.users}
            if users and users | gone_on <= way and not others and all(map(self.is_part, way)):
                return node
        return None

    def is_part(self, node: fx.Node) -> bool:
        """A part, an activation of one, or parts joined."""
        return self.rule_name(node) in _JOINING | WRITES or self.is_kind(node, Shape) or self.is_activation(node)

    def rescaling(self, source: fx.Node) -> fx.Node | None:
        """The end of a normalisation written out, ``y / y.sum(1, keepdim=True)``: all that is made of ``source`` meets there."""
        users = {n for n in source.users if n in self.random}
        ends = PRODUCTS | DIFFERENCES
        if len(users) < 2:
            return None
        for node in self.nodes:
            if (
                node not in self.scoring
                or node in self.outputs
                or self.rule_name(node) not in ends
                or size_of(node) != size_of(source)
            ):
                continue
            way = set(self.between(source, node))
            made_of = {n for each in way for n in each.all_input_nodes} - way - {source}
            gone_on = {user for each in way - {node} for user in each.users if user in self.random}
            logarithms = any(self.rule_name(n) in _ERRORS - _EVEN for n in way)
            summary = any("shape" in n.meta and size_of(n) < size_of(source) for n in way)
            if summary and not logarithms and users | gone_on <= way and not made_of & self.conditioned:
                return None if self.is_log_likelihood(node) else node
        return None

    def is_log_likelihood(self, node: fx.Node) -> bool:
        """A log-softmax written out, ``y - y.logsumexp(1, keepdim=True)``, that is picked from or weighed."""
        if self.rule_name(node) not in DIFFERENCES or len(node.all_input_nodes) != 2:
            return False
        of, by = node.all_input_nodes
        if self.rule_name(by) != "logsumexp" or not self.same(of, by.all_input_nodes[0]):
            return False
        todo = list(node.users)
        while todo:
            user = todo.pop()
            if self.rule_name(user) in _OF_TWO | {"gather"}:
                return True
            todo += user.users if self.is_kind(user, Shape) or self.rule_name(user) in _MASKING else ()
        return False

    def is_activation(self, node: fx.Node) -> bool:
        """A function of one value and constants that ends a decoder."""
        if len(self.values_in(node)) != 1 or self.is_loss(node):
            return False
        name = self.rule_name(node)
        plain = self.is_kind(node, Elementwise, Shape) or name == "softmax"
        return plain and name not in _ERRORS and size_of(node) == size_of(self.values_in(node)[0])

    def is_masking(self, node: fx.Node) -> bool:
        """Numbers written into one value where a comparison holds, as into padding."""
        others = [n for n in self.values_in(node) if n not in self.random]
        return self.rule_name(node) in _MASKING and len(self.random_in(node)) == 1 and all(map(self.compares, others))

    def is_compared_logarithm(self, node: fx.Node) -> bool:
        """A logarithm that an input as it is is subtracted from, a log spectrogram, or that is taken for logits."""
        users = [n for n in node.users if n in self.random]
        if self.rule_name(node) not in _LOGARITHMS or len(users) != 1:
            return False
        (user,) = users
        met = [n for n in user.all_input_nodes if n in self.raw and size_of(n) == size_of(node) and self.is_step_of_input(n)]
        return self.rule_name(user) in ("softmax", "log_softmax") or (bool(met) and self.rule_name(user) in SUBTRACTING)

    def scales(self, source: fx.Node, node: fx.Node) -> bool:
        """``source`` times a factor of fewer numbers, such as one for each example: a library's size, a temperature."""
        factors = [n for n in node.all_input_nodes if n is not source]
        name = self.rule_name(node)
        if name not in _OF_TWO or len(factors) != 1 or (name[:3] != "mul" and node.args[0] is not source):
            return False
        weights = factors[0] in self.decoded  # of a mixture of what a decoder gives
        return not weights and size_of(factors[0]) < size_of(source) == size_of(node) and not self.behind(source, factors[0])

    def meets_input(self, source: fx.Node, user: fx.Node) -> fx.Node | None:
        """Where on its way to the loss, through no other layer, the value meets an input."""
        todo, seen = [user], set()
        while todo:
            node = todo.pop()
            if node in seen or node not in self.scoring:
                continue
            seen.add(node)
            others = [n for n in node.all_input_nodes if n not in self.random]
            # Not so what an encoder reads beside an input, or as the difference from it: the state before it, a canvas.
            picks = not self.is_kind(node, Shape) or self.rule_name(node) == "gather"  # the log-probability of what is there
            compared = any(n in self.raw for n in others) and picks and self.is_scored(node)
            compared = compared or (self.is_loss(node) and any(n in self.conditioned for n in others))
            if compared and not self.is_width(source, node) and not self.weighs_error(node):
                return node
            # An input that meets a sum weighs it.
            summed = self.reduces(node, self.random_in(node)) and not self.fits_an_input(node)
            if (node is user or not self.decodes(node)) and not summed:
                todo += list(node.users)
        return None

    def weighs_error(self, node: fx.Node) -> bool:
        """A factor, such as a mask, of what an input was subtracted from before: of a likelihood."""
        if self.rule_name(node) not in _OF_TWO:
            return False
        begins = [n for n in self.scoring if self.rule_name(n) in DIFFERENCES and any(x in self.raw for x in n.all_input_nodes)]
        errors = self.forward_of([n for n in begins if n is not node], stop=self.decodes)
        return any(n in errors for n in self.random_in(node))

    def is_width(self, source: fx.Node, loss: fx.Node) -> bool:
        """``source`` makes the variance that a Gaussian likelihood takes beside its mean."""
        given = loss.args[2] if len(loss.args) > 2 else loss.kwargs.get("var")
        gaussian = getattr(loss.meta.get("module_type"), "__name__", "") == "GaussianNLLLoss"
        likelihood = gaussian or self.rule_name(loss) == "gaussian_nll_loss"
        return likelihood and isinstance(given, fx.Node) and self.same(source, given)

    def is_scored(self, node: fx.Node) -> bool:
        """A loss is made of ``node`` without any layer."""
        todo, seen = [node], set()
        while todo:
            each = todo.pop()
            if each in self.losses:
                return True
            if each not in seen:
                seen.add(each)
                todo += [user for user in each.users if user.op != "output" and not self.has_weights(user)]
        return False

    def whole(self, source: fx.Node, user: fx.Node, at: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The edge, moved to where a value as large as the input meets it: what layers give may be mixed or summed before."""
        met = [n for n in at.all_input_nodes if n in self.random and self.behind(source, n)]
        if len(met) != 1 or not self.is_held_against_an_input(met[0], at):
            return source, user
        value, end = met[0], at
        if self.rule_name(value) in _LOGARITHMS and self.rule_name(at) in PRODUCTS:  # of a likelihood, x log y
            behind = self.values_in(value)[0]
            mixed = size_of(behind) == size_of(value) and self.joins_others(source, behind)
            value, end = (behind, value) if mixed else (value, end)
        carried = self.forward_of((source,), stop=self.decodes)  # not by way of a further step, to which it is fed back
        way = [n for n in self.between(source, value) if n in carried]
        errors = any((self.rule_name(n) in _ERRORS or _is_square(n)) and not self.is_compared_logarithm(n) for n in way)
        apart = errors or any(self.is_loss(n) or self.is_one_of_several(n) or self.is_log_likelihood(n) for n in way)
        # Terms of one likelihood take one value: x / exp(y) + y.
        others = {n for n in source.users if n in self.scoring and n not in way}
        apart = apart or (self.is_function(source, value) and any(self.is_scored(n) for n in others))
        return (source, user) if value is source or apart else (value, end)

    def is_held_against_an_input(self, value: fx.Node, at: fx.Node) -> bool:
        """Numbers of an input, or some that are made of one without a layer, are set against as many of ``value``."""
        given = [n for n in at.all_input_nodes if n in self.raw]
        if self.is_loss(at):
            return at.args[:1] == (value,) and self.rule_name(value) not in _LOGARITHMS and rank_of(value) >= 2
        shape = value.meta.get("shape", ())
        return any(rank_of(n) >= 2 and (size_of(n) == size_of(value) or shape[-rank_of(n) :] == n.meta["shape"]) for n in given)

    def is_function(self, source: fx.Node, value: fx.Node) -> bool:
        """``value`` is a function of each element of ``source``, and no multiple of it."""
        way = [n for n in self.between(source, value) if not self.is_kind(n, Shape)]
        functions = all(self.is_kind(n, Elementwise) and len(self.values_in(n)) == 1 for n in way)
        return functions and any(self.rule_name(n) not in RESCALINGS for n in way)

    def is_one_of_several(self, node: fx.Node) -> bool:
        """Some of the elements of a value of which others are used too, as a mean beside a log-variance."""
        selected = [n for n in self.values_in(node) if "part" in node.meta or size_of(node) < size_of(n)]
        used = [[user for user in n.users if user in self.random and "int" not in str(user.meta.get("dtype"))] for n in selected]
        return self.is_kind(node, Shape) and any(len(users) > 1 for users in used)

    def is_step_of_input(self, node: fx.Node) -> bool:
        """An input, what is selected of one or scaled or shifted by another, more than a number for each example."""
        while node.op != "placeholder" and (self.is_kind(node, Shape) or self.rule_name(node) in RESCALINGS):
            sources = [n for n in node.args if isinstance(n, fx.Node) and n in self.raw]
            sources = [n for n in sources if size_of(n) == max(map(size_of, sources))]
            if not sources or (self.rule_name(node) in PRODUCTS and len(sources) > 1):
                return False
            node = sources[0]
        return node.op == "placeholder" and rank_of(node) >= 2

    def drawn(self, ends: set[fx.Node]) -> frozenset[fx.Node]:
        """What among scores leads to no layer and to none of ``ends``, is made of none, and has no moments to rely on.

        Densities of one latent under many components are one variable; as so many independent ones their logsumexp grows with
        the posterior's variance, and a loss falls without bound. So does the density of a draw whose elements are correlated;
        a loss function that has no rule for a latent has no gradient for its variance, what relates the latents of a batch to
        each other takes each of them many times, as a quadratic form of one does, and a draw's own scale is no other
        variable than it. The model's own estimate, from a draw, has no such error.
        """
        scores = self.scoring - self.forward_of(ends)
        leads: set[fx.Node] = set()
        for node in reversed(self.nodes):
            layer = self.has_weights(node) and self.decodes(node) and not all(map(self.is_density, self.random_in(node)))
            if node in ends or layer or any(user in leads for user in node.users):
                leads.add(node)
        related: set[fx.Node] = set()
        for node in self.nodes:
            if node in scores and (
                self.relates(node) or self.is_apart_from_own_prior(node) or any(n in related for n in node.all_input_nodes)
            ):
                related.add(node)
        free = scores - leads
        exponentials = {n for n in free if self.is_exponential(n)}
        return frozenset(
            n
            for n in free
            if n in related
            or n in exponentials
            or (self.rule_name(n) in _EXTREMA and any(self.behind(n, each) for each in exponentials))  # m + log(sum(exp(a - m)))
            or self.is_of_correlations(n)
            or self.is_loss_at_mean(n)
            or self.is_over_own_scale(n)
            or self.is_quadratic(n)
        )

    def is_apart_from_own_prior(self, node: fx.Node) -> bool:
        """A difference of a posterior's location from what it is made of beside others: of q(z1 | x, z2) from p(z1 | z2)."""
        operands = self.random_in(node)
        if self.rule_name(node) not in DIFFERENCES or len(operands) != 2:
            return False
        first, second = map(self.roots_of, operands)
        several = len(first | second) > 1 and not first.isdisjoint(second)
        several = several and (first | second).isdisjoint(self.latents)  # of a draw and its location a rule makes the noise
        return several and any(n in self.parameters_of(self.latents) for n in operands)

    def roots_of(self, node: fx.Node) -> set[fx.Node]:
        """The random values that ``node`` is an elementwise function of, as far back as layers and draws."""
        found, todo, seen = set(), [node], set()
        while todo:
            each = todo.pop()
            if each in seen:
                continue
            seen.add(each)
            if self.is_kind(each, Elementwise) or (self.is_kind(each, Shape) and "part" not in each.meta):
                todo += self.random_in(each)
            else:
                found.add(each)
        return found

    def is_over_own_scale(self, node: fx.Node) -> bool:
        """What a draw is made of over the scale that it was drawn with, which is random itself: log q(z2 | z1) of z2 ~ q."""
        operands = self.random_in(node)
        if self.rule_name(node) not in _OF_TWO or len(operands) != 2:
            return False
        for whole, scale in (operands, reversed(operands)):
            drawn = [n for n in self.latents if self.behind(n, whole) and not self.behind(n, scale)]
            if drawn and not self.parameters_of(drawn).isdisjoint(self.elementwise_of(scale)):
                return True
        return False

    def is_quadratic(self, node: fx.Node) -> bool:
        """A product of a draw and of what a matrix or a layer makes of it, as a Mahalanobis distance is: ``z * (P @ z)``."""
        name = self.rule_name(node)
        if name not in _OF_TWO and name not in ("einsum", "bilinear"):
            return False
        given: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), lambda n: given.append(n) if n in self.random else None)
        drawn = set(self.latents)
        for first, second in combinations(given, 2):
            if first is second:
                if name in PRODUCTS:  # a square
                    continue
                return True
            for a, b in ((first, second), (second, first)):
                own = self.elementwise_of(a) & drawn
                if any(self.behind(n, b) and n not in self.elementwise_of(b) for n in own):
                    return True
        return False

    def elementwise_of(self, node: fx.Node) -> set[fx.Node]:
        """``node`` and the random values that it is an elementwise function of."""
        found, todo = set(), [node]
        while todo:
            each = todo.pop()
            if each not in found:
                found.add(each)
                todo += self.random_in(each) if self.is_kind(each, Elementwise, Shape) else []
        return found

    def is_density(self, node: fx.Node) -> bool:
        """The exponential of sums, through no layer: what learned weights of a mixture multiply."""
        todo = self.values_in(node) if self.rule_name(node) in _EXPONENTIALS else []
        while todo:
            each = todo.pop()
            if self.reduces(each, self.random_in(each)) and not self.decodes(each):
                return True
            todo += self.random_in(each) if self.is_kind(each, Elementwise, Shape) else []
        return False

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


def _is_square(node: fx.Node) -> bool:
    """A product of a value with itself."""
    return len(node.args) == 2 and node.args[0] is node.args[1]
