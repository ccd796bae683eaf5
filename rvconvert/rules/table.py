"""The supported operations as data: what the README's table and ``rvconvert rules`` are made of."""

from __future__ import annotations

from dataclasses import dataclass

from rvconvert.core.registry import REGISTRY, Exactness, Registry
from rvconvert.rules.kinds import Metadata

__all__ = ["Supported", "as_markdown", "supported_operations"]


@dataclass(frozen=True)
class Supported:
    """Operations that hold under one assumption, to one exactness.

    Attributes:
        operations: canonical names, in the order of registration.
        modules: names of the ``torch.nn`` classes whose forward is one of them.
        exactness: how far their moments can be trusted.
        assumption: what must hold for that.
    """

    operations: tuple[str, ...]
    modules: tuple[str, ...]
    exactness: Exactness
    assumption: str


def supported_operations(registry: Registry = REGISTRY) -> list[Supported]:
    """Every operation with a rule, those of one exactness and assumption together.

    Questions about shape and type, which the mean answers, are left out.
    """
    groups: dict[tuple[Exactness, str], tuple[list[str], list[str]]] = {}
    for rule in registry:
        if isinstance(rule.kind, Metadata) or rule.name.startswith("_"):
            continue
        operations, modules = groups.setdefault((rule.exactness, rule.assumption), ([], []))
        operations.append(rule.name)
        modules += [module.__name__ for module in rule.modules]
    return [Supported(tuple(ops), tuple(mods), *key) for key, (ops, mods) in groups.items()]


def as_markdown(registry: Registry = REGISTRY) -> str:
    """The same as a Markdown table, exact rules first."""
    rows = sorted(supported_operations(registry), key=lambda row: list(Exactness).index(row.exactness))
    lines = ["| operations | modules | exactness | what must hold |", "| --- | --- | --- | --- |"]
    for row in rows:
        operations, modules = (", ".join(f"`{name}`" for name in names) for names in (row.operations, row.modules))
        lines.append(f"| {operations} | {modules} | {row.exactness.value.replace('_', ' ')} | {row.assumption} |")
    return "\n".join(lines)
