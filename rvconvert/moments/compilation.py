"""Elementwise kernels run block by block, in the processor's cache, or compiled where that is asked for.

The moments of an activation are some fifty operations on each element. Run one after the other on whole tensors they
cost many times the convolutions beside them, all of it memory traffic. ``fused(kernel, *tensors)`` runs them on blocks that
stay in cache. ``RVCONVERT_COMPILE=1`` in the environment, or ``enable()``, compiles them by Inductor instead: seconds for
each kernel at its first use, a third less time a step.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rvconvert.moments.buffers import empty, is_plain

__all__ = ["disable", "enable", "fused", "is_enabled"]

Kernel = Callable[..., "Tensor | tuple[Tensor, ...]"]

SMALL = 1 << 13  # elements below which a compiled kernel gains nothing
BLOCK = 1 << 17  # elements of a block for each core: temporaries stay in its cache, and few calls are made

# Inductor copies what is used twice into each use, which takes minutes for the recurrences of a quadrature. Realized early
# and fused again, every intermediate is computed once.
_INDUCTOR: dict[str, Any] = {"realize_opcount_threshold": 3, "max_fusion_size": 4096}

logger = logging.getLogger("rvconvert")
_enabled = os.environ.get("RVCONVERT_COMPILE", "0") == "1"
_compiled: dict[Any, Callable[..., Any]] = {}
_lock = threading.RLock()


def enable() -> None:
    """Compile elementwise kernels, each at its first use."""
    global _enabled
    _enabled = True


def disable() -> None:
    """Compile nothing: elementwise kernels run block by block (the default)."""
    global _enabled
    _enabled = False


def is_enabled() -> bool:
    """True while elementwise kernels are compiled; False after ``disable()``, or where compiling failed."""
    return _enabled


def _least(dtype: torch.dtype) -> float:
    """Next to a denormal number: 1e-26 in float32."""
    return 1e12 * torch.finfo(dtype).tiny


def flushed(x: Tensor) -> Tensor:
    """``x`` with 0 in the place of what is next to a denormal number.

    The tail of an activation leads there, as do the squared weights of each layer, and a convolution with one denormal number in
    a hundred takes a CPU five times as long as one of others.
    """
    return F.hardshrink(x, _least(x.dtype))


def is_traced() -> bool:
    """While compiling, or inside a transform of torch.func or a dispatch mode: values are not plain tensors of now."""
    in_a_mode = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return in_a_mode or torch._C._functorch.peek_interpreter_stack() is not None


def fused(kernel: Kernel, *tensors: Tensor, constants: tuple[Any, ...] = ()) -> Any:
    """``kernel(*tensors, *constants)`` in one pass over memory.

    Args:
        kernel: a module-level function of tensors of one shape, elementwise, giving one or more tensors of that shape.
        tensors: of one shape, dtype and device.
        constants: what else the kernel takes; hashable. Each set of constants is compiled by itself.

    Returns:
        What the kernel returns, ``flushed``. Differentiable calls, tensor subclasses and traced calls run the kernel as it is.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not all(map(is_plain, tensors)):
        return _flushed(kernel, *tensors, *constants)
    n = first.numel()
    if n <= SMALL or torch._C._len_torch_dispatch_stack():
        return _flushed(kernel, *tensors, *constants)
    if not _enabled and (n <= BLOCK or not first.is_cpu):
        return _flushed(kernel, *tensors, *constants)
    shape, strides = first.shape, first.stride()
    if not _is_dense(first):
        first = first.contiguous()
        strides = first.stride()
    flat = [_flat(x, shape, strides) for x in tensors]
    results = _run_compiled(kernel, constants, flat) if _enabled else None
    if results is None:
        results = _by_blocks(kernel, flat, constants) if first.is_cpu else _flushed(kernel, *flat, *constants)
    if isinstance(results, Tensor):
        return results.as_strided(shape, strides)
    return tuple(x.as_strided(shape, strides) for x in results)


def _flushed(kernel: Kernel, *arguments: Any) -> Any:
    results = kernel(*arguments)
    return flushed(results) if isinstance(results, Tensor) else tuple(map(flushed, results))


def _is_dense(x: Tensor) -> bool:
    """True if the elements fill a stretch of memory without gap or overlap, in any order of dimensions."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _flat(x: Tensor, shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """The elements of ``x`` in the memory order of ``strides``."""
    if x.stride() != strides:
        ordered = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)
        x = ordered.copy_(x)
    return x.as_strided((x.numel(),), (1,))


def _by_blocks(kernel: Kernel, flat: list[Tensor], constants: tuple[Any, ...]) -> Any:
    n, size = flat[0].numel(), BLOCK * torch.get_num_threads()
    results: tuple[Tensor, ...] = ()
    single = False
    for start in range(0, n, size):
        parts = kernel(*(x[start : start + size] for x in flat), *constants)
        single = isinstance(parts, Tensor)
        parts = (parts,) if isinstance(parts, Tensor) else parts
        if not results:
            results = tuple(empty(n, x) for x in parts)
        for result, part in zip(results, parts, strict=True):
            torch.hardshrink(part, _least(part.dtype), out=result[start : start + size])  # ``flushed``, and in its place
    return results[0] if single else results


def _run_compiled(kernel: Kernel, constants: tuple[Any, ...], flat: list[Tensor]) -> Any:
    """The kernel's results by Inductor; None where it cannot compile, after one line of warning."""
    key = (kernel, constants, flat[0].dtype, flat[0].device.type)
    function = _compiled.get(key)
    if function is not None:
        return function(*flat)
    with _lock:
        function = _compiled.get(key) or _specialised(kernel, constants)
        start = time.perf_counter()
        try:
            results = function(*flat)
        except Exception as error:  # noqa: BLE001 (a compiler may fail in any way)
            disable()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            logger.warning("rvconvert: no compiled kernels, training will be slower (%s)", reason[:200])
            return None
        _compiled[key] = function
        seconds = time.perf_counter() - start
        logger.info("rvconvert: compiled %s in %.1f s (once; cached on disk)", kernel.__name__.strip("_"), seconds)
        return results


def _specialised(kernel: Kernel, constants: tuple[Any, ...]) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        return _flushed(kernel, *tensors, *constants)

    # Dynamo counts recompilations by code object, so each kernel gets one of its own.
    call.__code__ = call.__code__.replace(co_name=getattr(kernel, "__name__", "kernel").strip("_"))
    return torch.compile(call, dynamic=True, fullgraph=True, options=_INDUCTOR)
