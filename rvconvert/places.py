"""Places in code as a person reads them: ``some_library/models/vae.py:61``."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

__all__ = ["short_place"]

_INSTALLED = ("site-packages", "dist-packages")


def short_place(where: str) -> str:
    """``file:line`` with the file relative to the working folder, or to the folder its package lies in.

    A file of one's own keeps the path that an editor opens from here; one of an installed package, or from elsewhere,
    begins with its package's name. What is not an absolute path stays as it is.
    """
    path, colon, line = where.rpartition(":")
    if not colon or not os.path.isabs(path):
        return where
    return f"{_short_path(path, os.getcwd(), tuple(sys.path))}:{line}"


@lru_cache(maxsize=4096)
def _short_path(path: str, working_folder: str, search_path: tuple[str, ...]) -> str:
    file = Path(path)
    if file.is_relative_to(working_folder) and not set(_INSTALLED) & set(file.parts):
        return str(file.relative_to(working_folder))
    # Where Python found its package: the first folder up that is no package, or above it an entry of Python's own path.
    roots = [_above_packages(file.parent), *map(Path, filter(os.path.isabs, search_path))]
    outside = [root for root in roots if file.is_relative_to(root) and not (root / "__init__.py").exists()]
    return str(file.relative_to(min(outside, key=lambda root: len(root.parts))))


def _above_packages(folder: Path) -> Path:
    """The first folder, from ``folder`` up, that is no package."""
    while (folder / "__init__.py").exists() and folder != folder.parent:
        folder = folder.parent
    return folder
