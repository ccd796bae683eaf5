"""What a recording is: the graph of a method, and what was seen of it while it ran."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from rvconvert.capture.graph_calls import assign_mean, own_copy
from rvconvert.capture.python_state import Contents
from rvconvert.core.tree import Structure

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from torch import fx, nn

    from rvconvert.capture.python_state import Place

__all__ = ["Kept", "Recording", "equal"]

_COUNT = count()


@dataclass(frozen=True)
class Kept:
    """Something that the method keeps on a module: an attribute and the structure of its value, tensors taken out.

    Or what it says by a method of the module, a trainer's log: then ``called``, the value holds its arguments.
    """

    path: str
    name: str
    structure: Structure
    leaves: int
    grown: bool = False  # the same list or dict as before, with other contents
    called: bool = False


@dataclass
class Recording:
    """A method captured as a graph.

    Attributes:
        graph: placeholders are the tensor leaves of the inputs, in order; the output is a flat tuple. On each node, ``meta``
            holds where it comes from, the rule that serves it, its value's shape, and the draw that it is.
        outputs: structure of the outputs.
        returned: which argument, a dict or a list, the method writes its results into and returns; None for none.
        kept: what the method keeps on modules; the tensors in it follow the outputs.
        constants: values that no code in the graph makes, by the name it looks them up with on the conversion.
        attributes: tensors that the method read off modules, by path.
        entries: nodes that read tensors out of containers that modules keep, with these.
        random_inputs: the placeholders given as random variables.
        draws: the nodes that draw.
        drawn: what draws gave that have a generator of their own, or whose code sets the state of one.
        depends: the nodes that depend on a draw or a random input.
        reads: (node, place, decides) where Python reads the value of a tensor, to decide by it or for a report.
        stale: (writer, place) where memory is used that was written in place through another tensor.
        once: why the recording serves the call at hand alone (empty if it can be kept).
        fixed: why the batch size is part of the graph (empty if it is not).
        overwritten: parameters that the run wrote to in place, with what they were.
        steps: of constants that the run wrote to in place, by name: the tensor, and a copy of what it was.
        reached: the names of those that are outside the model for sure.
        writes: the nodes that write to parameters in place, of what is not random.
        initializes: parameters are written by what the graph does not make again: the run's own writes stand.
        asks_grad_mode: the method asks whether gradients are on.
        sets_autocast: the method turns autocast on or off.
        places: plain attributes and globals that the method read, whose values are constants of the graph.
        counted: attributes, numbers, that the method changes.
        numbers: arguments, numbers themselves, that follow the tensors as inputs of the graph, with their values in this call.
        decided: of the numbers that the graph reads anew at each call, those by which Python has decided.
        builds: the method made parameters, which the model had not before.
        backward_hooks: paths of the modules called that have such hooks.
        sized_by_values: as many rows as a mask selects are in it.
        outside: what the method read of Python outside the model, as it was before.
    """

    graph: fx.Graph
    outputs: Structure = field(default_factory=lambda: Structure("constant"))
    returned: int | None = None
    kept: list[Kept] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    random_inputs: list[fx.Node] = field(default_factory=list)
    draws: list[fx.Node] = field(default_factory=list)
    drawn: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    depends: set[fx.Node] = field(default_factory=set)
    reads: list[tuple[fx.Node | None, str, bool]] = field(default_factory=list)
    stale: list[tuple[fx.Node, str]] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)
    overwritten: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    steps: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)
    writes: list[fx.Node] = field(default_factory=list)
    initializes: bool = False
    asks_grad_mode: bool = False
    sets_autocast: bool = False
    places: dict[Place, None] = field(default_factory=dict)
    counted: set[Place] = field(default_factory=set)
    numbers: dict[str, float] = field(default_factory=dict)
    decided: set[Place] = field(default_factory=set)
    builds: bool = False
    backward_hooks: list[str] = field(default_factory=list)
    sized_by_values: bool = False
    outside: Contents = field(default_factory=Contents)

    def equals(self, other: Recording) -> bool:
        """Both have the same graph, of the same constants."""
        mine, others = self.constants, other.constants
        alike = str(self.graph) == str(other.graph) and mine.keys() == others.keys()
        return alike and all(equal(each, others[name]) for name, each in mine.items())

    def keep_repeated(self, other: Recording) -> None:
        """Of what was ``drawn``, keep what another run has drawn again: of a generator that the method seeds at each call."""
        pairs = zip(self.drawn.items(), other.drawn.values(), strict=False)
        self.drawn = {node: value for (node, value), again in pairs if equal(value, again)}

    def freeze(self, node: fx.Node) -> None:
        """Let what a draw has given be what its users take."""
        name = f"drawn_{next(_COUNT)}"
        self.constants[name] = self.drawn[node]
        self.fixed.append(f"it draws the same numbers at every call: {node.meta['where']}")
        with self.graph.inserting_before(node):
            node.replace_all_uses_with(self.graph.get_attr(f"_rvconvert.constants.{name}"))

    def forget(self, node: fx.Node) -> None:
        """A draw that nothing takes is none, and takes nothing of the random state."""
        self.draws.remove(node)
        self.depends.discard(node)
        self.graph.erase_node(node)

    @property
    def output(self) -> fx.Node:
        """The node of the outputs."""
        return next(iter(reversed(self.graph.nodes)))

    def hold_attributes(self, root: nn.Module) -> None:
        """Let the graph of a call that is run once read what a module had as the call found it, not as it left it."""
        for node in self.graph.nodes:
            known = node.op == "get_attr" and node.target in self.attributes
            if known and _found(root, node.target) is not self.attributes[node.target]:
                name = f"attribute_{node.name}"
                self.constants[name] = self.attributes[node.target]
                node.target = f"_rvconvert.constants.{name}"
        for node, tensor in self.entries.items():
            self.constants[f"attribute_{node.name}"] = tensor
            with self.graph.inserting_before(node):
                node.replace_all_uses_with(self.graph.get_attr(f"_rvconvert.constants.attribute_{node.name}"))

    @property
    def written(self) -> list[torch.Tensor]:
        """Parameters, and tensors outside the model, that the run wrote to in place."""
        return [target for target, _ in (*self.overwritten, *self.steps.values())]

    @property
    def unexplained(self) -> dict[int, torch.Tensor]:
        """Tensors in ``steps`` that the run may have made itself, by ``id``."""
        return {id(tensor): tensor for name, (tensor, _) in self.steps.items() if name not in self.reached}

    def renew(self, outside: Container[int]) -> None:
        """Let the graph write to a copy of each constant that the run has made; one that is ``outside`` the model it steps."""
        for name, (tensor, before) in list(self.steps.items()):
            if name in self.reached or id(tensor) in outside:
                continue
            del self.steps[name]
            self.constants[name] = before
            for node in self.graph.find_nodes(op="get_attr", target=f"_rvconvert.constants.{name}"):
                with self.graph.inserting_after(node):
                    copy = self.graph.call_function(own_copy, (node,))
                copy.meta.update(node.meta, part=True, where="", source="", module="")
                node.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
                _forget_writes(copy)

    def settle(self) -> None:
        """Before the graph is run, which writes parameters again: put them back, or let it write none."""
        if not self.initializes:
            self.restore()
            return
        self._put_back(self.steps.values())
        for node in self.writes:
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)
        self.writes.clear()

    def restore(self) -> None:
        """Put back what the run wrote to and the graph writes again."""
        self._put_back((*self.steps.values(), *reversed(self.overwritten)))

    @staticmethod
    def _put_back(overwritten: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        with torch.no_grad():
            for target, value in overwritten:
                target.copy_(value)

    @property
    def kept_leaves(self) -> int:
        """How many of the outputs are tensors that the method keeps on modules."""
        return sum(each.leaves for each in self.kept)


def _forget_writes(node: fx.Node) -> None:
    """Of a random variable into a tensor, or a part of it, that no later call sees."""
    for user in list(node.users):
        if user.target is torch.as_strided and user.meta.get("part"):
            _forget_writes(user)
        if user.target in (assign_mean, torch.as_strided) and not user.users and user.meta.get("part"):
            node.graph.erase_node(user)


def _found(root: nn.Module, path: str) -> Any:
    """What is there now; None where nothing is."""
    value: Any = root
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def equal(a: Any, b: Any) -> bool:
    """True for tensors of the same numbers, and for other values that are equal; False for what cannot be compared."""
    try:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False
