"""Records in a JSON file, one a measured run, and Markdown tables made of nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from benchmarks.paper.cells import Setting

Record = dict
GROUP = ("epochs", "images", "test_images", "shrink", "batch")  # what a comparison holds equal, with the seeds


def read(folder: Path, name: str) -> list[Record]:
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


def add(folder: Path, name: str, keys: Record, measure: Callable[[], Record], table: Callable[[list[Record]], str]) -> None:
    """Unless the file holds a record of these keys: measure one, add it, and write the table anew."""
    if not any(all(record.get(k) == v for k, v in keys.items()) for record in read(folder, name)):
        record = keys | measure()
        records = [*read(folder, name), record]  # read again: another command may have added its own by now
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".{name}.json"
        unfinished.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
        os.replace(unfinished, folder / f"{name}.json")
    (folder / f"{name}.md").write_text(table(read(folder, name)))


def keys(setting: Setting, **more: object) -> Record:
    return asdict(setting) | more


def grouped(records: Iterable[Record], names: Sequence[str]) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return groups


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Four decimals as in the paper; three digits where four decimals would show fewer than two."""
    return f"{value:.4f}" if 0.001 <= abs(value) < 100 else f"{value:.3g}"


def over_seeds(records: Sequence[Record], name: str) -> str:
    """The mean over seeds, and their range where there are several."""
    values = [record[name] for record in records if name in record]
    if not values:
        return ""
    spread = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
    return number(fmean(values)) + spread


def updates(record: Record) -> int:
    """Steps of the optimizer in as many epochs as a plain run has; a batch has 64 images unless it was said."""
    return record["epochs"] * -(-record["trained_on"] // (record.get("batch") or 64))


def conditions(record: Record) -> str:
    """What the run was, in words, from what was measured of it."""
    parts = [f"{record['epochs']} epochs" if record["epochs"] != 1 else "1 epoch", f"{record['trained_on']:,} images"]
    if record.get("shrink", 1) != 1:
        parts.append(f"channels / {record['shrink']}")
    if record.get("batch"):
        parts.append(f"batch {record['batch']}")
    return ", ".join([*parts, record["device"]])
