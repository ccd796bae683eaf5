"""Out of torch: a VAE as an ONNX or ``torch.export`` file that gives the same answer for the same input."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rvconvert._convert import convert
from rvconvert.converted import conversion_of, is_converted, plain_copy, reconverted
from rvconvert.copies import copied
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.tree import Structure, flatten
from rvconvert.errors import ConversionError
from rvconvert.files.checkpoint import check_destination, write_atomically
from rvconvert.plain import make_deterministic

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["SUFFIXES", "export"]

SUFFIXES = (".onnx", ".pt2")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    example_kwargs: dict[str, Any] | None = None,
    method: str = "forward",
    deviation: bool = False,
    force: bool = False,
    **options: Any,
) -> Path:
    """Write a model as a file that other runtimes read, deterministic: nothing in it draws random numbers.

    Args:
        model: a plain VAE or decoder, or one that ``convert`` returned. It is not changed.
        path: ends in ``.onnx`` (through ``torch.onnx``) or ``.pt2`` (``torch.export.save``).
        example_inputs: a tensor or a tuple of positional arguments. The first dimension stays free where the model lets it.
        example_kwargs: keyword arguments; those that are no tensors become part of the file.
        method: the method to export.
        deviation: the standard deviation of every random output follows the outputs, as ``deviation``; the outputs are
            then propagated means. Else they are what the posterior's mean decodes to.
        force: replace a file that is there.
        options: of ``convert``, for a plain model's deviation: ``covariance``, ``random_inputs`` and the like. A random
            input ``z`` is given by two inputs of the file, ``z`` and ``z_variance``.

    Returns:
        The path.

    Raises:
        CheckpointError: the file exists, its folder does not, or the name ends in something else.
        ConversionError: the model cannot be exported, or draws random numbers all the same.
    """
    if options and (is_converted(model) or not deviation):
        why = "a converted model has its own" if is_converted(model) else "they say what the deviation is: deviation=True"
        raise ConversionError(f"{', '.join(options)}: {why}")
    path = check_destination(path, force=force, suffixes=SUFFIXES)
    args = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    kwargs = dict(example_kwargs or {})
    if deviation:
        made = _propagating(model, method, args, kwargs, options)
    else:
        converted = is_converted(model)
        made = plain_copy(model) if converted else copied(model, {})
        latents = conversion_of(model).latents if converted else _latents(model, method, args, kwargs)
        make_deterministic(made, (method,), frozenset(latents))
    program, names = _exported(_Flat(made.eval(), method, deviation), method, args, kwargs)
    if path.suffix.lower() == ".pt2":
        return write_atomically(path, lambda file: torch.export.save(program, file), force=force)
    content = _onnx(program, *names)
    return write_atomically(path, lambda file: file.write(content), force=force)


def _latents(model: nn.Module, method: str, args: Any, kwargs: Any) -> set[str]:
    """Where a plain model draws its latents; none where it is not one that can be converted, or has none."""
    try:
        return conversion_of(convert(model, methods=(method,), example_inputs=args, example_kwargs=kwargs)).latents
    except ConversionError:
        return set()


def _propagating(model: nn.Module, method: str, args: Any, kwargs: Any, given: dict[str, Any]) -> nn.Module:
    """A converted copy of the model that returns distributions."""
    if is_converted(model):
        made = reconverted(model, dataclasses.replace(conversion_of(model).options, output="distribution", attach=False))
    else:
        options: dict[str, Any] = {"methods": (method,), **given, "output": "distribution", "attach": False}
        made = convert(model, example_inputs=args, example_kwargs=kwargs, **options)
    conversion = conversion_of(made)
    covariance = conversion.options.covariance
    if not conversion.settings.needs_rules:
        why = "draws its paths at each call" if covariance == "sampled" else "makes its nodes at each call"
        raise ConversionError(
            f"covariance={covariance!r} {why}, which a deterministic file cannot; export the deviation in calibrated mode: "
            "rv = rvconvert.convert(model, covariance='calibrated'); rvconvert.calibrate(rv, images); "
            "rvconvert.export(rv, path, x, deviation=True)"
        )
    conversion.chosen(method)
    return made


class _Flat(nn.Module):
    """The method as a function of tensors that returns a tuple of tensors, as exporters have it."""

    inputs: Structure

    def __init__(self, model: nn.Module, method: str, deviation: bool) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.deviation = deviation
        self.random: list[bool] = []
        self.output_names: list[str] = []

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        remaining = iter(tensors)
        leaves = (RandomVariable(next(remaining), next(remaining)) if random else next(remaining) for random in self.random)
        args, kwargs = self.inputs.build(leaves)
        outputs = flatten(getattr(self.model, self.method)(*args, **kwargs))[0]
        means = [x.mean if isinstance(x, RandomVariable) else x for x in outputs]
        deviations = [x.std for x in outputs if isinstance(x, RandomVariable)]
        self.output_names = [f"output_{i}" for i in range(len(means))] if len(means) > 1 else ["output"]
        self.output_names += [f"deviation_{i}" for i in range(len(deviations))] if len(deviations) > 1 else ["deviation"]
        return (*means, *deviations)

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[torch.Tensor], list[str]]:
        """The tensors of a call and their names."""
        signature = inspect.signature(getattr(self.model, self.method))
        bound = signature.bind(*args, **kwargs)
        for name in conversion_of(self.model).options.random_inputs if self.deviation else ():
            if isinstance(bound.arguments.get(name), torch.Tensor):
                bound.arguments[name] = RandomVariable(bound.arguments[name], torch.ones_like(bound.arguments[name]))
        names = []
        for name, value in bound.arguments.items():
            leaves = flatten(value)[0]
            for index, leaf in enumerate(leaves):
                own = name if len(leaves) == 1 else f"{name}_{index}"
                names += [own, f"{own}_variance"] if isinstance(leaf, RandomVariable) else [own]
        leaves, self.inputs = flatten((bound.args, bound.kwargs))
        self.random = [isinstance(leaf, RandomVariable) for leaf in leaves]
        tensors: list[torch.Tensor] = []
        for leaf in leaves:
            tensors += [leaf.mean, leaf.var] if isinstance(leaf, RandomVariable) else [leaf]
        return tensors, names


def _exported(flat: _Flat, method: str, args: Any, kwargs: Any) -> tuple[Any, tuple[list[str], list[str]]]:
    """The program of ``torch.export``, with the names of its inputs and outputs."""
    tensors, input_names = flat.take(args, kwargs)
    name = f"{type(flat.model).__name__}.{method}"
    with torch.no_grad(), _quiet():
        outputs = flat(*tensors)  # in no export yet: the model's own errors are its own, and a recording is made
        program = _program(flat, tuple(tensors), name)
        draws = sorted({str(node.target) for node in program.graph.nodes if _may_draw(node)})
        if draws and not _repeats(program, tensors):
            raise ConversionError(
                f"{name} draws random numbers other than its latents, which are put at their means ({', '.join(draws)}), so "
                "its file would not be deterministic; export the method that decodes: method='decode'"
            )
    return program, (input_names, flat.output_names[: len(outputs)])


def _program(flat: _Flat, tensors: tuple[torch.Tensor, ...], name: str) -> Any:
    """What ``torch.export`` makes of it, the first dimension free if it can be."""
    # AUTO is free where the model lets it; a size of one would be taken as a constant all the same
    free = tuple({0: torch.export.Dim.AUTO} if x.ndim and len(x) > 1 else None for x in tensors)
    for shapes in ((free,), None):
        try:
            fresh = tuple(x.clone() for x in tensors)  # the attempt leaves marks on them
            return torch.export.export(flat, fresh, dynamic_shapes=shapes, strict=False)
        except Exception as error:  # noqa: BLE001 (an exporter may fail in any way)
            failure = error
    reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    raise ConversionError(f"{name} cannot be exported: torch.export says: {reason}") from failure


def _may_draw(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _repeats(program: Any, tensors: list[torch.Tensor]) -> bool:
    """Whether two runs give the same: attention and dropout may draw, and do not in eval mode."""
    run = program.module()
    with torch.random.fork_rng():
        first, second = (run(*tensors) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporters say of themselves: what they deprecate, and packages they would know too."""
    # Arguments of distributions were checked by the run before; an exporter cannot follow the checks.
    checks = torch.distributions.Distribution._validate_args
    loggers = {logging.getLogger(name): level for name, level in (("torch.onnx", logging.ERROR), ("torch", logging.CRITICAL))}
    levels = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning, UserWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(checks)
        for logger, level in levels.items():
            logger.setLevel(level)


def _onnx(program: Any, input_names: list[str], output_names: list[str]) -> bytes:
    try:
        import onnxscript  # noqa: F401 - what torch.onnx needs
    except ImportError:
        raise ConversionError("an ONNX file needs onnx and onnxscript: pip install 'rvconvert[export]'") from None
    try:
        with _quiet():
            made = torch.onnx.export(program, dynamo=True, input_names=input_names, output_names=output_names, verbose=False)
        assert made is not None
        return made.model_proto.SerializeToString()  # type: ignore[no-any-return]
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"it cannot be written as ONNX: torch.onnx says: {reason}; a .pt2 file may do") from error
