"""Memory for large results, used again once no tensor has it.

A C library gives large pieces back to the system when they are freed, and the system clears each page of the next one at its
first use: as long as five elementwise operations on it take.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

LARGE = 1 << 20  # bytes; smaller pieces the C library keeps
FORGOTTEN = 1 << 10  # results made since a size was last asked for, after which its memory is given up

_idle: dict[int, list[Tensor]] = {}  # by size in bytes
_asked: dict[int, int] = {}  # the number of the last result of each size
_made = 0


def is_plain(x: Tensor) -> bool:
    """True for a tensor with memory of its own: no subclass, no sparse layout, no meta device."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.device.type != "meta"


def empty(n: int, like: Tensor) -> Tensor:
    """``n`` uninitialized elements of the dtype and on the device of ``like``."""
    size = n * like.element_size()
    if not like.is_cpu or size < LARGE:
        return torch.empty(n, dtype=like.dtype, device=like.device)
    _count(size)
    try:
        buffer = _idle.setdefault(size, []).pop()
    except IndexError:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
    # The tensor has the array until the last view of it is gone; the array's own end hands the memory back.
    array = buffer.numpy()
    weakref.finalize(array, _hand_back, size, buffer).atexit = False
    return torch.from_numpy(array).view(like.dtype)


def empty_like(x: Tensor) -> Tensor:
    """An uninitialized tensor of the shape, dtype, device and, if ``x`` is dense, memory order of ``x``."""
    if not is_plain(x):
        return torch.empty_like(x)
    return empty(x.numel(), x).as_strided(x.shape, torch.empty_like(x, device="meta").stride())


def into_buffer(function: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor:
    """An elementwise ``function(x, *others)`` in the shape, dtype and memory order of ``x``, which has no graph."""
    return function(x, *others, out=empty_like(x) if all(y.dtype == x.dtype for y in others) else None)


def _hand_back(size: int, buffer: Tensor) -> None:
    _idle.setdefault(size, []).append(buffer)


def _count(size: int) -> None:
    """Note that ``size`` was asked for, and give up the memory of sizes that no one asks for any more."""
    global _made
    _made += 1
    _asked[size] = _made
    if _made % FORGOTTEN == 0:
        for other, last in list(_asked.items()):
            if _made - last > FORGOTTEN:
                _asked.pop(other, None)
                _idle.pop(other, None)
