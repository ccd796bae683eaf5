"""Text for people: reports, rules and results as tables, progress bars. The only importer of rich."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import sys
from typing import IO, TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markup import escape
from rich.padding import Padding
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rvconvert.report import Report, Row

__all__ = ["folded_rows", "progress", "report_table", "rules_table", "show", "show_error", "table", "to_text"]

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
    plain = {"color_system": None, "force_terminal": False, "force_jupyter": False, "legacy_windows": False}
    console = Console(file=file, width=width, **plain)  # type: ignore[arg-type]
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
    """A report: its operations below the line of code they stand in, what stands in the way, the sum, the notes."""
    parts: list[RenderableType] = [Text(f"{report.model}.{report.method}", "bold"), Text(), _Operations(report.rows), Text()]
    parts += [*map(_obstacle, report.unsupported), Text(_summary(report))]
    parts += [Text(line, "dim") for line in _assumptions(report)]
    parts += [Text(f"note: {note}", "yellow") for note in report.notes]
    if report.refusal:
        parts += [Text(), Text(f"convert refuses this: {report.refusal}", "red", no_wrap=True, overflow="ignore")]
    return Group(*parts)


class _Operations:
    """Rows in blocks, one a line of code. Where room is short module paths fold; names and places stay whole."""

    INDENT, GAP = 4, 2

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = folded_rows(rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = [max((len(cells[column]) for _, cells in self.rows), default=0) for column in range(4)]
        for column, least in ((0, 12), (2, 11)):  # paths of modules fold first, then what is promised, at its words
            excess = self.INDENT + sum(width + self.GAP for width in widths if width) - options.max_width
            widths[column] = min(widths[column], max(widths[column] - excess, least))
        for place, block in itertools.groupby(self.rows, key=lambda each: (each[0].where, each[0].source)):
            if any(place):
                yield _place(*place)
            made = Table.grid(padding=(0, self.GAP, 0, 0))
            for width in filter(None, widths):
                made.add_column(width=width, overflow="fold")
            for _, cells in block:
                dim = "dim" if cells[2] == "plain" else ""
                styles = (dim, dim, STYLE[cells[2]], "cyan")
                made.add_row(*(Text(cell, style) for cell, style, width in zip(cells, styles, widths, strict=True) if width))
            yield Padding(made, (0, 0, 0, self.INDENT))


def _place(where: str, source: str) -> RenderableType:
    """A place, never cut, and its line of code beside it; below it where it is long."""
    if len(where) > 48:
        return Group(Text(where, "dim", overflow="fold"), Padding(Text(source, "dim", overflow="fold"), (0, 0, 0, 6)))
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True, width=len(where))
    made.add_column(overflow="fold")
    made.add_row(Text(where, "dim"), Text(source, "dim"))
    return made


def folded_rows(rows: Sequence[Row]) -> list[tuple[Row, tuple[str, str, str, str]]]:
    """Each row with its cells (module, operation, moments, turns and role); a loop's rows stand once.

    A loop is a stretch of rows that follows itself: over the same modules, or three times and more over modules that
    differ by a number (``blocks.0``, ``blocks.1``, ...).
    """
    keys = [(re.sub(r"\d+", "#", row.module), row.operation, row.status, row.rule, row.where, row.role) for row in rows]
    found: list[tuple[Row, tuple[str, str, str, str]]] = []
    start = 0
    while start < len(rows):
        period, turns = _loop(rows, keys, start)
        for offset in range(period):
            row = rows[start + offset]
            last = rows[start + offset + (turns - 1) * period]
            remark = " ".join(filter(None, (f"×{turns}" if turns > 1 else "", row.role)))
            cells = (_span(row.module, last.module), row.operation, _moments(row), remark)
            found.append((row, cells))
        start += period * turns
    return found


def _loop(rows: Sequence[Row], keys: Sequence[tuple[str, ...]], start: int) -> tuple[int, int]:
    """The loop that begins at ``start`` and saves most rows: its length in rows and its turns; (1, 1) if there is none."""
    best = (1, 1)
    for period in range(1, (len(keys) - start) // 2 + 1):
        if keys[start] != keys[start + period]:
            continue
        turns = 1
        while keys[start : start + period] == keys[start + turns * period : start + (turns + 1) * period]:
            turns += 1
        same = all(rows[start + i].module == rows[start + period + i].module for i in range(period))
        if turns >= (2 if same else 3) and period * (turns - 1) > best[0] * (best[1] - 1):
            best = (period, turns)
    return best


def _span(first: str, last: str) -> str:
    """``blocks.0.norm`` and ``blocks.7.norm`` as ``blocks.0…7.norm``."""
    pairs = zip(re.split(r"(\d+)", first), re.split(r"(\d+)", last), strict=True)
    return "".join(a if a == b else f"{a}…{b}" for a, b in pairs)


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
    kept = "" if report.refusal else f" Recording: {report.lifetime} ({report.reason})."
    return f"{'; '.join(parts)}.{kept}"


def _assumptions(report: Report) -> list[str]:
    """The rules that are not exact, each with what must hold, once."""
    found = {row.rule: row.assumption for row in report.rows if row.exactness not in ("", "exact") and row.assumption}
    by_text: dict[str, list[str]] = {}
    for rule, assumption in found.items():
        by_text.setdefault(assumption, []).append(rule)
    return [f"{', '.join(rules)}: {assumption}" for assumption, rules in by_text.items()]


def _obstacle(row: Row) -> RenderableType:
    what = f"{row.operation} in {row.module or 'the model itself'}, {row.where}: {row.reason}"
    stub = "\n".join(f"    {line}" for line in row.hint.splitlines())
    return Group(Text(what, "red"), Text(stub, "red", no_wrap=True, overflow="ignore"))  # to paste: never broken


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
