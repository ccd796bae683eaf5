"""Draws by ``numpy.random``, whose numbers no graph holds: torch makes them where a graph is recorded, or compared."""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FROM_ARRAYS = frozenset((torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy))


def _drawn(draw: Callable[..., torch.Tensor], size: Any, shift: Any = 0, scale: Any = 1) -> torch.Tensor | None:
    """In float64; None where NumPy is to draw: one number, which Python takes, or a law of each element."""
    if size is None or not all(isinstance(number, (int, float)) for number in (shift, scale)):
        return None
    size = tuple(size) if np.iterable(size) else (size,)
    if not size:
        return None
    made = draw(size, dtype=torch.float64, device="cpu")
    made = made if scale == 1 else made * scale
    return made if shift == 0 else made + shift


_DRAWS: dict[str, Callable[..., torch.Tensor | None]] = {  # by names in numpy.random, with the same arguments
    "normal": lambda loc=0.0, scale=1.0, size=None: _drawn(torch.randn, size, loc, scale),
    "standard_normal": lambda size=None: _drawn(torch.randn, size),
    "randn": lambda *size: _drawn(torch.randn, size),
    "uniform": lambda low=0.0, high=1.0, size=None: _drawn(torch.rand, size, low, high - low),
    "random": lambda size=None: _drawn(torch.rand, size),
    "random_sample": lambda size=None: _drawn(torch.rand, size),
    "rand": lambda *size: _drawn(torch.rand, size),
}


def as_array(made: torch.Tensor) -> np.ndarray:
    """What NumPy would have drawn."""
    with torch._C.DisableTorchFunction():
        return made.numpy().copy()


@contextlib.contextmanager
def drawn_by_torch(give: Callable[[torch.Tensor], np.ndarray] = as_array) -> Iterator[None]:
    """Within, in this thread, torch draws what ``numpy.random`` is asked for, and ``give`` makes an array of it."""
    thread, own = threading.get_ident(), {name: getattr(np.random, name) for name in _DRAWS}

    def of(name: str) -> Callable[..., Any]:
        @functools.wraps(own[name])
        def draw(*args: Any, **kwargs: Any) -> Any:
            made = _DRAWS[name](*args, **kwargs) if threading.get_ident() == thread else None
            return own[name](*args, **kwargs) if made is None else give(made)

        return draw

    for name in own:
        setattr(np.random, name, of(name))
    try:
        yield
    finally:
        for name, function in own.items():
            setattr(np.random, name, function)
