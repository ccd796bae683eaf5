"""Sizes that values decide: as many rows as a mask selects, as many classes as a batch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["COUNTS", "DataSizes", "splits"]

# ``repeat_interleave`` and ``where`` where one of their arguments says so
_BY_VALUES = frozenset("nonzero argwhere masked_select unique unique_consecutive _unique2".split())
_UNLESS_GIVEN = {"bincount": ("minlength", 2), "one_hot": ("num_classes", 1)}  # what leaves no size to values, and its place
_ROWS = frozenset("unbind __iter__ split chunk tensor_split vsplit split_with_sizes".split())
_IN_PLACE = frozenset("setitem __setitem__ index_put index_copy scatter masked_scatter masked_fill".split())
COUNTS = frozenset("numel nelement __len__".split())


class DataSizes:
    """Which nodes have a size that depends on the values of others: the first one, or any."""

    def __init__(self) -> None:
        self._deciding: dict[fx.Node, fx.Node | None] = {}
        self._of_any_dim: set[fx.Node] = set()
        self._of_columns = False  # a mask has selected other than rows

    def note(self, node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Told of a call, with what is given to it as tensors."""
        sources = node.all_input_nodes
        if not sources:
            return
        if name == "_pad_packed_sequence" and isinstance(node.args[-1], fx.Node):  # as long as the longest, if no length is given
            self._deciding[node] = self.deciding(sources[1])
            self._of_any_dim.add(node)
        option, place = _UNLESS_GIVEN.get(name, ("", 0))
        if option and option not in kwargs and len(args) <= place:
            self._deciding[node] = sources[0]
        repeats = args[1] if name == "repeat_interleave" and len(args) > 1 else None
        indices = args[1] if name == "__getitem__" else ()
        if name in _BY_VALUES or (name == "where" and len(args) == 1):
            self._deciding[node] = sources[0]
        elif name in ("arange", "range") and any("shape" in n.meta for n in sources):  # as far as a tensor says
            self._deciding[node] = next(n for n in sources if "shape" in n.meta)
        elif name == "_pack_padded_sequence" and len(sources) > 1:
            self._deciding[node] = sources[1]  # the lengths, where these are a tensor
        elif isinstance(repeats, torch.Tensor) or _is_mask(indices[0] if isinstance(indices, tuple) and indices else indices):
            self._deciding[node] = sources[-1]
        elif isinstance(indices, tuple) and any(map(_is_mask, indices)):  # the rows are all there
            self._of_columns = True

    @property
    def of_values(self) -> bool:
        """Some size has been seen that values decide."""
        return self._of_columns or any(each is not None for each in self._deciding.values())

    def deciding(self, node: fx.Node, dim: int = 0) -> fx.Node | None:
        """What decides a size of a value, that of its rows by default; None if it is known from the sizes of the inputs."""
        todo = [node]
        while todo:
            each = todo[-1]
            if each in self._deciding:
                todo.pop()
                continue
            sources = self._sources(each)
            missing = [n for n in sources if n not in self._deciding]
            if missing:
                todo += missing
                continue
            self._deciding[each] = next((found for n in sources if (found := self._deciding[n]) is not None), None)
            if any(n in self._of_any_dim for n in sources):
                self._of_any_dim.add(each)
        return self._deciding[node] if dim == 0 or node in self._of_any_dim else None

    @staticmethod
    def _sources(node: fx.Node) -> list[fx.Node]:
        """What a value may have its size from: not a number, nor what is written into a whole."""
        if node.meta.get("shape") == ():
            return []
        target = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
        writes = node.meta.get("mutates") or target.rstrip("_") in _IN_PLACE
        sources = node.all_input_nodes[:1] if writes else node.all_input_nodes
        rows = node.meta.get("shape", ())[:1]
        return [n for n in sources if "shape" not in n.meta or not rows or n.meta["shape"][:1] == rows]


def splits(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A call that gives a list as long as a value has rows."""
    return name in _ROWS and kwargs.get("dim", args[-1] if len(args) > (1 if name == "unbind" else 2) else 0) == 0


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
