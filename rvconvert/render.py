"""Text for people: reports, rules and results as tables, progress bars. The only importer of rich."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rvconvert.core.registry import Exactness, Rule
from rvconvert.report import Report, Row

__all__ = ["progress", "report_table", "rules_table", "show", "show_error", "table", "to_text"]

STYLE = {
    "noise": "magenta",
    "exact": "green",
    "exact if independent": "green",
    "moment matched": "yellow",
    "approximate": "yellow",
    "plain": "dim",
    "NO RULE": "bold red",
}


def to_text(renderable: RenderableType, width: int | None = None) -> str:
    """Plain text without colours, ``width`` characters wide (default: the terminal's, 120 where there is none)."""
    file = io.StringIO()
    width = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=file, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(renderable, crop=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def show(*renderables: RenderableType) -> None:
    """Print to standard output, in colour on a terminal."""
    console = _console(sys.stdout)
    for each in renderables:
        console.print(each, highlight=False, crop=False, soft_wrap=isinstance(each, str))


def show_error(message: str) -> None:
    """Print a refusal to standard error, as it stands (so that a stub in it can be pasted)."""
    console = _console(sys.stderr)
    console.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)


def _console(file: IO[str]) -> Console:
    width = None if file.isatty() else max(shutil.get_terminal_size((120, 24)).columns, 80)
    return Console(file=file, width=width)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", numeric: Sequence[str] = ()) -> Table:
    """A table of cells that are printed as they are; columns in ``numeric`` are aligned right."""
    made = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    cells = [[escape(str(cell)) for cell in row] for row in rows]
    for index, name in enumerate(columns):
        if name in numeric:  # where room is short the words of a heading give way, never a figure or a name
            widest = max((len(row[index]) for row in cells), default=0)
            made.add_column(name, justify="right", min_width=max(widest, *map(len, name.split())))
        else:
            made.add_column(name, no_wrap=True, overflow="fold")
    for row in cells:
        made.add_row(*row)
    return made


def report_table(report: Report) -> RenderableType:
    """A report: one line a node, then what stands in the way, what it all amounts to, and the notes."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    made.title = f"{report.model}.{report.method}"
    for name in ("module", "operation", "moments", "where", "source"):
        made.add_column(name, no_wrap=name != "source", overflow="fold")  # the source line gives way first
    for before, row in zip((None, *report.rows), report.rows, strict=False):
        moments = _moments(row)
        same = before is not None and (before.where, before.source) == (row.where, row.source)
        dim = "dim" if moments == "plain" else ""
        made.add_row(
            Text(row.module, dim),
            Text(row.operation, dim),
            Text(moments, STYLE[moments]),
            Text(row.where, dim),
            Text("" if same else row.source, "dim", no_wrap=True, overflow="ellipsis"),
        )
    parts: list[RenderableType] = [made, *map(_obstacle, report.unsupported), Text(_summary(report))]
    parts += [Text(line, "dim") for line in _assumptions(report)]
    parts += [Text(f"note: {note}", "yellow") for note in report.notes]
    return Group(*parts)


def _moments(row: Row) -> str:
    """What is known of a row's result, in a few words."""
    words = {"deterministic": "plain", "unsupported": "NO RULE", "noise": "noise"}
    return words.get(row.status) or row.exactness.replace("_", " ")


def _summary(report: Report) -> str:
    counts = report.counts
    random = counts.get("random", 0) + counts.get("noise", 0) + counts.get("unsupported", 0)
    parts = [f"{len(report)} operations, {random} of them random"]
    if counts.get("noise"):
        parts.append(f"{counts['noise']} noise source{'s' if counts['noise'] > 1 else ''}")
    if counts.get("unsupported"):
        parts.append(f"{counts['unsupported']} without a rule")
    return f"{'; '.join(parts)}. Recording: {report.lifetime} ({report.reason})."


def _assumptions(report: Report) -> list[str]:
    """The rules that are not exact, each with what must hold, once."""
    found = {row.rule: row.assumption for row in report.rows if row.exactness not in ("", "exact") and row.assumption}
    by_text: dict[str, list[str]] = {}
    for rule, assumption in found.items():
        by_text.setdefault(assumption, []).append(rule)
    return [f"{', '.join(rules)}: {assumption}" for assumption, rules in by_text.items()]


def _obstacle(row: Row) -> Text:
    lines = [f"{row.operation} in {row.module or 'the model itself'}, {row.where}: {row.reason}"]
    lines += [f"    {line}" for line in row.hint.splitlines()]
    return Text("\n".join(lines), "red")


def rules_table(rules: Iterable[Rule]) -> RenderableType:
    """The rule table, the strongest promise first."""
    order = list(Exactness)
    ordered = sorted(rules, key=lambda rule: (order.index(rule.exactness), rule.name))
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("operation", "modules", "moments", "assumption"):
        made.add_column(name, overflow="fold")
    for rule in ordered:
        made.add_row(
            Text(rule.name),
            Text(", ".join(module.__name__ for module in rule.modules), "dim"),
            Text(rule.exactness.value.replace("_", " "), STYLE[rule.exactness.value.replace("_", " ")]),
            Text("" if rule.assumption == "none" else rule.assumption, "dim"),
        )
    return made


def progress() -> Progress:
    """Progress bars on standard error, which vanish when done; silent where there is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
