"""Reports as data: what a plan and a conversion found, one row a node. Printing them is ``render``'s."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Report", "Row", "merge"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation of the model.

    Attributes:
        operation: the op as torch names it, or the module's class.
        status: ``"noise"``, ``"random"``, ``"deterministic"`` or ``"unsupported"``.
        role: ``"latent"``, ``"nuisance"`` (a draw left as it is), ``"reconstruction"``, ``"loss"``, ``"drawn"`` (of a draw
            of the latent, as in the plain model), or empty.
        module: path of the module in whose forward it stands.
        where: ``file:line``; ``source``: that line as the user wrote it.
        rule, exactness, assumption: of the rule that serves it, empty if none.
        reason, hint: why it is not supported, and what to type next.
    """

    operation: str
    status: str
    module: str = ""
    where: str = ""
    source: str = ""
    rule: str = ""
    exactness: str = ""
    assumption: str = ""
    reason: str = ""
    hint: str = ""
    role: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What converting a method of a model does, node by node.

    Attributes:
        model: class of the model; ``method``: the method that is converted.
        lifetime: ``"kept"``, the recording serves every call of its kind, or ``"once"``, each call is recorded; ``reason``: why.
        rows: the operations in order.
        notes: what a person should know (branches that are fixed, penalty, ...).
        refusal: why the method cannot be converted at all, empty if it can (but for ``unsupported``).
    """

    model: str
    method: str
    lifetime: str
    reason: str
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def unsupported(self) -> tuple[Row, ...]:
        """The rows that stand in the way, an operation of a loop once."""
        rows = (row for row in self.rows if row.status == "unsupported")
        return tuple({(row.operation, row.module, row.where): row for row in rows}.values())

    @property
    def counts(self) -> dict[str, int]:
        """How many rows have each status."""
        return dict(Counter(row.status for row in self.rows))

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for ``--json``."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        from rvconvert.render import report_table, to_text

        return to_text(report_table(self))


def merge(reports: Sequence[Report]) -> Report:
    """One report for several methods of a model."""
    first = reports[0]
    if len(reports) == 1:
        return first
    return Report(
        first.model,
        ", ".join(r.method for r in reports),
        ", ".join(dict.fromkeys(r.lifetime for r in reports)),
        "; ".join(dict.fromkeys(r.reason for r in reports)),
        tuple(row for r in reports for row in r.rows),
        tuple(note for r in reports for note in r.notes),
        "\n".join(r.refusal for r in reports if r.refusal),
    )
