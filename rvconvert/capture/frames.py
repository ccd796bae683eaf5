"""The code that runs: the model's, torch's, the library's."""

from __future__ import annotations

import linecache
import sys
from typing import TYPE_CHECKING

from rvconvert.capture.intercept import COMMAND_LINE, INTERNAL

if TYPE_CHECKING:
    import types


def user_frame() -> types.FrameType | None:
    """The innermost frame that is the model's own code: not torch's, not ours."""
    current: types.FrameType | None = sys._getframe(1)
    while current is not None:
        if not is_internal(current):
            return current
        current = current.f_back
    return None


def is_internal(frame: types.FrameType) -> bool:
    """True for torch's code and the library's; the demo's model, beside the command line, is a model like any other."""
    filename = frame.f_code.co_filename
    return filename.startswith("<") or (filename.startswith(INTERNAL) and not filename.startswith(COMMAND_LINE))


def is_of_the_model(frame: types.FrameType) -> bool:
    """True for code whose globals the model's values may depend on: not Python's own, nor NumPy's."""
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return not is_internal(frame) and package != "numpy" and package not in sys.stdlib_module_names


def where(frame: types.FrameType | None) -> tuple[str, str]:
    """``file:line`` and the source line of a frame."""
    if frame is None:
        return "", ""
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{path}:{line}", linecache.getline(path, line).strip()


def runs(package: str, function: str = "") -> bool:
    """True while code of this package of torch runs, called by the model; or this function of it."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INTERNAL):
        if package in frame.f_code.co_filename.replace("\\", "/") and function in ("", frame.f_code.co_name):
            return True
        frame = frame.f_back
    return False
