"""The dispatch engine: the model's own Python runs, with random variables in the place of tensors.

Control flow, data classes and loops just run, at every call anew; the rules are those of the graph engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rvconvert.capture.recorder import as_class, intercepted_modules, own_copies, unchanged, unscripted, user_frame, where
from rvconvert.core.random_variable import RandomVariable, in_settings, is_in_place, propagate, random_variables
from rvconvert.core.registry import PLAIN, operation_name
from rvconvert.core.tree import flatten
from rvconvert.errors import ConversionError, NonGaussianError, NoReparameterizationError, UnsupportedOperationError
from rvconvert.places import short_place
from rvconvert.program.plan import row_for
from rvconvert.program.rewrite import DIFFERENCES, LOSSES
from rvconvert.report import Row
from rvconvert.rules.kinds import Shape
from rvconvert.rules.noise import GAUSSIAN_SOURCES, NON_GAUSSIAN, nth_source

if TYPE_CHECKING:
    from rvconvert.converted import Conversion

__all__ = ["run", "survey"]


class _Memory:
    """What a tensor and its views share: how often it was written, last through which of them, and where."""

    version = 0
    writer: TensorView | None = None
    place: Any = None


class TensorView(torch.Tensor):
    """A random variable dressed as a tensor for the model's own code.

    ``isinstance(x, torch.Tensor)`` holds, ``x.mean(dim)`` is the method that it is on a tensor, and an
    in-place operation changes what every holder of the object sees. It has no storage, so what would read
    its values behind torch's back fails. What it stands for is ``variable``. ``memory`` it shares with its views, of
    which those at an older ``version`` are stale.
    """

    variable: RandomVariable
    memory: _Memory
    version: int

    @staticmethod
    def __new__(cls, variable: RandomVariable) -> TensorView:
        mean = variable.mean
        made = torch.Tensor._make_wrapper_subclass(cls, mean.shape, dtype=mean.dtype, device=mean.device)
        made.variable = variable
        made.memory, made.version = _Memory(), 0
        return made  # type: ignore[no-any-return]

    def __init__(self, variable: RandomVariable) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise UnsupportedOperationError(f"{func} reads a random variable where no rule can act")


def _undress(value: Any) -> Any:
    if type(value) is TensorView:
        return value.variable
    if isinstance(value, (list, tuple)):
        items = [_undress(each) for each in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: _undress(each) for key, each in value.items()}
    return value


def _dress(value: Any) -> Any:
    if isinstance(value, RandomVariable):
        return TensorView(value)
    if type(value) in (list, tuple):
        return type(value)(_dress(each) for each in value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return type(value)(tuple(_dress(each) for each in value))  # torch.return_types
    return value


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    views = _views(args, kwargs)
    for view in views:
        _refuse_stale(view, func, args)
    target = args[0] if args else None
    before = [(view, view.variable._mean) for view in views]
    place = _place(before[0][1]) if before and before[0][0] is target else None
    result = propagate(func, _undress(args), _undress(kwargs))
    if type(target) is TensorView and result is target.variable:
        if is_in_place(func, kwargs):
            memory = target.memory
            memory.version, memory.writer, memory.place = memory.version + 1, target, place
            target.version = memory.version
        return target
    dressed = _dress(result)
    rule = views[0].variable.settings.registry.find(func) if views else None
    if rule is not None and isinstance(rule.kind, Shape):
        for made in _views(dressed):
            for view, mean in before:
                if made.variable._mean is mean:  # what is there already, in the right shape and type, is itself
                    return view
                if _storage(made.variable._mean) == _storage(mean):
                    made.memory, made.version = view.memory, view.version
    return dressed


def _views(*values: Any) -> list[TensorView]:
    """The dressed random variables in nested arguments."""
    found: list[TensorView] = []
    for value in values:
        if type(value) is TensorView:
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _views(*value)
        elif type(value) is dict:
            found += _views(*value.values())
    return found


def _refuse_stale(view: TensorView, func: Any = None, args: tuple[Any, ...] = ()) -> None:
    """A view sees what is written through another one; a random variable does not, so its use from then on is refused."""
    memory = view.memory
    if view.version == memory.version:
        return
    last = view.version == memory.version - 1 and func is torch.Tensor.__setitem__ and args[0] is view
    if last and args[2] is memory.writer and _place(view.variable._mean[args[1]]) == memory.place:
        return  # x[i] += y: what was written through x[i] is written there once more
    raise ConversionError(  # (torch would take a TypeError within x += y for the wish to try y's own method)
        f"{where(user_frame())[0]}: a random variable is used whose memory was written in place through a view of it; "
        "write out of place (y = torch.relu(y) for y.relu_()), or use the view's result alone"
    )


def _place(mean: torch.Tensor) -> Any:
    try:
        return mean.data_ptr(), mean.shape, mean.stride()
    except (RuntimeError, NotImplementedError):  # no storage of its own
        return id(mean)


class _Run(TorchFunctionMode):
    """Supplies the noise sources, and notes each random operation where asked to."""

    def __init__(self, conversion: Conversion, inputs: Any, rows: list[Row] | None = None) -> None:
        super().__init__()
        self.conversion = conversion
        self.settings = conversion.settings
        self.inputs = {_storage(x) for x in flatten(inputs)[0] if isinstance(x, torch.Tensor)}
        self.collapsed: dict[int, tuple[RandomVariable, Any]] = {}
        self.rows = rows
        self.stack: list[str] = []
        self.drew: list[str] = []
        self.others: list[tuple[str, str]] = []
        self.written: dict[int, tuple[torch.Tensor, TensorView]] = {}

    def current(self, value: Any) -> Any:
        """``value`` with each plain tensor that a random variable was written into replaced by what it became."""
        if isinstance(value, torch.Tensor):
            return self.written[id(value)][1] if id(value) in self.written else value
        if type(value) in (list, tuple):
            return type(value)(self.current(each) for each in value)
        if type(value) is dict:
            return {key: self.current(each) for key, each in value.items()}
        return value

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.written:
            args, kwargs = self.current(args), self.current(kwargs)
        target = args[0] if args else None
        writes = is_in_place(func, kwargs) and func not in GAUSSIAN_SOURCES and type(target) is not TensorView
        if writes and isinstance(target, torch.Tensor) and random_variables(_undress(args[1:]), _undress(kwargs)):
            return self.write(func, target, args, kwargs)
        if func in GAUSSIAN_SOURCES:
            self.drew.append(where(user_frame())[0])
            self.note(operation_name(func), "noise")
            settings = nth_source(self.settings, len(self.drew) - 1)
            value = GAUSSIAN_SOURCES[func](*_undress(args), **_undress(kwargs), settings=settings)
            return TensorView(value)
        if func in NON_GAUSSIAN:
            place, source = where(user_frame())
            self.others.append((NON_GAUSSIAN[func], f"{place}: {source}"))
        if not random_variables(_undress(args), _undress(kwargs)):
            return func(*args, **kwargs)
        if func in LOSSES or (getattr(func, "__name__", "") in DIFFERENCES and any(self.is_input(a) for a in args)):
            args, kwargs = self.at_reconstruction(args), self.at_reconstruction(kwargs)
            if not random_variables(_undress(args), _undress(kwargs)):
                self.note(operation_name(func), "deterministic")
                return func(*args, **kwargs)
        if self.rows is None:
            return _call(func, args, kwargs)
        return self.surveyed(func, args, kwargs)

    def is_input(self, value: Any) -> bool:
        """True for an input of the method, or a view of one."""
        return isinstance(value, torch.Tensor) and type(value) is not TensorView and _storage(value) in self.inputs

    def at_reconstruction(self, value: Any) -> Any:
        """``value`` with the reconstructions in it, which meet the input in a loss here, as their means."""
        if type(value) is TensorView and not value.variable.latent:
            return self.reconstruction(value.variable)
        if isinstance(value, tuple):
            return tuple(self.at_reconstruction(each) for each in value)
        return {k: self.at_reconstruction(v) for k, v in value.items()} if type(value) is dict else value

    def reconstruction(self, variable: RandomVariable) -> Any:
        """The mean of a reconstruction, its penalty attached once however often it is asked for."""
        if id(variable) not in self.collapsed:
            self.collapsed[id(variable)] = (variable, self.conversion.take_reconstruction(variable))
        return self.collapsed[id(variable)][1]

    def write(self, func: Any, target: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An in-place write of a random variable into a plain tensor: from now on the tensor stands for the result."""
        like = random_variables(_undress(args[1:]), _undress(kwargs))[0]
        view = TensorView(like.with_moments(target.detach().clone(), torch.zeros_like(target)))
        self.note(operation_name(func), "random", self.settings.rule_for(func))
        _call(func, (view, *args[1:]), kwargs)
        self.written[id(target)] = (target, view)
        return view

    def surveyed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Apply the rule and note it; where there is none, note that and go on with the plain function."""
        rule = self.settings.rule_for(func)
        name = operation_name(func)
        if rule is None or type(rule.kind).__name__ != "Metadata":
            self.note(name, "random", rule if self.settings.needs_rules else PLAIN)
        if rule is not None or getattr(func, "__name__", "") in ("__bool__", "item"):
            return _call(func, args, kwargs)
        like = random_variables(_undress(args), _undress(kwargs))[0]

        def plain(value: Any) -> Any:
            value = _undress(value)
            if isinstance(value, RandomVariable):
                return value.mean
            return type(value)(plain(v) for v in value) if isinstance(value, (list, tuple)) else value

        def dressed(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return TensorView(like.with_moments(value, torch.zeros_like(value)))
            return tuple(dressed(v) for v in value) if isinstance(value, tuple) else value

        return dressed(func(*(plain(a) for a in args), **{k: plain(v) for k, v in kwargs.items()}))

    def note(self, operation: str, status: str, rule: Any = None) -> None:
        if self.rows is None:
            return
        place, source = where(user_frame())
        info = {"module": self.stack[-1] if self.stack else "", "where": short_place(place), "source": source}
        if status == "deterministic":
            self.rows.append(Row(operation, status, **info))
        elif status == "noise":
            self.rows.append(Row(operation, "noise", **info, rule="standard_normal", exactness="exact"))
        else:
            self.rows.append(row_for(operation, rule, info))


def run(conversion: Conversion, method: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a method with its noise sources as random variables; outputs leave as the options say."""
    mode = _Run(conversion, (args, kwargs))
    result = _collapse(mode, _execute(conversion, mode, method, model, args, kwargs))
    for module in model.modules():  # what the method keeps on the model leaves as its mean too
        for name, value in vars(module).items():
            if type(value) is TensorView:
                vars(module)[name] = conversion.take_mean(value.variable)
    return result


def survey(conversion: Conversion, method: Callable[..., Any], model: nn.Module, args: Any, kwargs: Any) -> list[Row]:
    """Run a method once on the side and list its random operations; the model is left as it was.

    Raises:
        NoReparameterizationError, NonGaussianError: nothing Gaussian, or something else, was drawn.
    """
    rows: list[Row] = []
    leaves, structure = flatten((args, kwargs))
    args, kwargs = structure.build(iter(own_copies(leaves)))
    mode = _Run(conversion, (args, kwargs), rows)
    with unchanged(model), torch.enable_grad():
        result = _execute(conversion, mode, method, model, args, kwargs)
    name = f"{conversion.plain_class.__name__}.{method.__name__}"
    leaves, _ = flatten(result, _is_value)
    reached = any(type(leaf) is TensorView for leaf in leaves)
    if mode.others:
        found = "\n".join(f"  {distribution}: {place}" for distribution, place in mode.others)
        raise NonGaussianError(f"{name} draws from a distribution other than a Gaussian:\n{found}")
    if not reached and not mode.drew and not random_variables(args, kwargs) and not conversion.options.random_inputs:
        raise NoReparameterizationError(
            f"{name}: no draw from a Gaussian was found in it; name the method that samples: methods=(...)"
        )
    return rows


def _is_value(x: Any) -> bool:
    return type(x) is TensorView or isinstance(x, (torch.Tensor, RandomVariable))


def _execute(conversion: Conversion, mode: _Run, method: Any, model: nn.Module, args: Any, kwargs: Any) -> Any:
    leaves, structure = flatten((args, kwargs))
    args, kwargs = structure.build(iter([_dress(x) for x in leaves]))
    paths = {id(module): path for path, module in model.named_modules()}

    def module_call(original: Any, module: nn.Module, module_args: Any, module_kwargs: Any) -> Any:
        rule = conversion.settings.registry.find_module(type(module))
        body = rule.body if rule is not None and conversion.settings.needs_rules else None
        if body is not None and random_variables(_undress(module_args), _undress(module_kwargs)):
            mode.note(type(module).__name__, "random", rule)
            made = body(module, *_undress(module_args), **_undress(module_kwargs))
            return _dress(in_settings(made, conversion.settings))
        mode.stack.append(paths.get(id(module), ""))
        try:
            return original(module, *module_args, **module_kwargs)
        finally:
            mode.stack.pop()

    with as_class(model, conversion.plain_class), unscripted(), intercepted_modules(module_call), mode:
        return _written_back(mode, method(model, *args, **kwargs))


def _written_back(mode: _Run, result: Any) -> Any:
    leaves, structure = flatten(result, _is_value)
    return structure.build(iter([mode.current(leaf) for leaf in leaves])) if mode.written else result


def _collapse(mode: _Run, result: Any) -> Any:
    """Random outputs leave as the options say."""
    options = mode.conversion.options
    leaves, structure = flatten(result, _is_value)
    values = []
    for leaf in leaves:
        if type(leaf) is TensorView:
            _refuse_stale(leaf)
            variable = leaf.variable
            if options.output == "distribution":
                leaf = variable
            elif variable.latent or variable.ndim == 0:
                leaf = mode.conversion.take_mean(variable)
            else:
                leaf = mode.reconstruction(variable)
        values.append(leaf)
    return structure.build(iter(values))


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # no storage of its own
        return id(tensor)
