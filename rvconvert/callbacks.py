"""What a converted model's variances do while it trains, in the logs of Lightning and of Hugging Face's Trainer.

``for_lightning()`` and ``for_transformers(trainer)`` make a callback each; the framework is imported then, not before. They
log through the trainer's own loggers, so TensorBoard, Weights & Biases and the rest show the same names:

- ``rv/penalty``: L_c of the last call;
- ``rv/propagated_variance``, ``rv/true_variance``: of a pixel, the second from antithetic pairs; every ``every`` steps;
- ``rv/between_variance``: of the reconstruction, between the inputs of a batch.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rvconvert.converted import is_converted
from rvconvert.core.tree import flatten
from rvconvert.errors import ConversionError
from rvconvert.verify import output_variances

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Monitor", "for_lightning", "for_transformers"]


class Monitor:
    """What both callbacks share: measures a converted model and warns, once each.

    Args:
        every: steps from one measurement of the variances to the next; each costs ``2 * pairs`` plain runs.
        pairs: antithetic pairs of paths for the true variance.
        patience: measurements in a row that must look collapsed before it warns: a new model looks so too.
    """

    def __init__(self, every: int = 500, pairs: int = 8, patience: int = 3) -> None:
        if every < 1 or pairs < 1 or patience < 1:
            raise ConversionError(f"every={every}, pairs={pairs} and patience={patience} must be 1 or more")
        self.every, self.pairs, self.patience = every, pairs, patience
        self.collapsed = 0

    def penalty(self, model: nn.Module) -> dict[str, float]:
        """The penalty of the model's last call."""
        value: Any = model.last_penalty
        return {} if value is None else {"rv/penalty": float(value)}

    def variances(self, model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, float]:
        """The variances of the reconstruction on a batch. Leaves the model and torch's random state as they were."""
        modes = {module: module.training for module in model.modules()}
        with torch.random.fork_rng():
            found = output_variances(model, *inputs, pairs=self.pairs, **kwargs)
        for module, training in modes.items():
            module.training = training
        self._watch(found.between, flatten((inputs, kwargs))[0])
        return {
            "rv/propagated_variance": found.propagated,
            "rv/true_variance": found.true,
            "rv/between_variance": found.between,
        }

    def _watch(self, between: float, inputs: list[Any]) -> None:
        data = next((x for x in inputs if isinstance(x, Tensor) and x.is_floating_point() and len(x) > 1), None)
        if data is None:
            return
        looks_collapsed = between < 0.01 * float(data.double().var(0, correction=0).mean())
        self.collapsed = self.collapsed + 1 if looks_collapsed else 0
        if self.collapsed == self.patience:
            warnings.warn(
                "the posterior seems to have collapsed: reconstructions of different inputs vary by less than 1 % of what the "
                "inputs do; lower the weight of the KL term or of the penalty, or warm them up",
                stacklevel=2,
            )


def converted_module(model: nn.Module) -> nn.Module:
    """The converted model in a module: itself, or the first one inside it.

    Raises:
        ConversionError: there is none, as when ``convert`` came after the trainer had its model.
    """
    for module in model.modules():
        if is_converted(module):
            return module
    raise ConversionError(
        f"{type(model).__name__} holds no converted model; call rvconvert.convert before the model goes to the trainer, to "
        "accelerate.prepare or to an optimizer: its parameters are copies"
    )


def _first_input(batch: Any) -> tuple[Any, ...]:
    if isinstance(batch, Tensor):
        return (batch,)
    if isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        return (batch[0],)
    kind = type(batch).__name__
    raise ConversionError(f"which part of a batch, a {kind}, does the model take? inputs=lambda batch: (batch['x'],)")


def for_lightning(
    every: int = 500, pairs: int = 8, patience: int = 3, inputs: Callable[[Any], tuple[Any, ...]] = _first_input
) -> Any:
    """A ``lightning.Callback``.

    Args:
        every: see ``Monitor``, as are ``pairs`` and ``patience``.
        inputs: the converted model's arguments, of a batch; default: the batch, or the first thing in it.
    """
    lightning = _framework("lightning", "lightning.pytorch", "pytorch_lightning")

    class VarianceMonitor(lightning.Callback):  # type: ignore[name-defined, misc]
        """Logs the penalty and the variances of the converted model in the trained module."""

        def __init__(self) -> None:
            self.monitor = Monitor(every, pairs, patience)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            model = converted_module(pl_module)
            values = self.monitor.penalty(model)
            if trainer.global_step % every == 0:
                values |= self.monitor.variances(model, *inputs(batch))
            pl_module.log_dict(values)

    return VarianceMonitor()


def for_transformers(trainer: Any, every: int = 500, pairs: int = 8, patience: int = 3) -> Any:
    """Add a callback to a ``transformers.Trainer`` that logs through it: ``for_transformers(trainer)`` before ``train()``.

    The penalty is logged when the trainer logs; the variances are measured on the first batch of its training data.

    Args:
        trainer: whose model is, or holds, a converted one.
        every: see ``Monitor``, as are ``pairs`` and ``patience``.

    Returns:
        The callback.
    """
    transformers = _framework("transformers", "transformers")
    model = converted_module(trainer.model)
    monitor = Monitor(every, pairs, patience)
    taken = inspect.signature(model.forward).parameters
    with torch.random.fork_rng():  # the order in which training sees its data stays
        first = dict(next(iter(trainer.get_train_dataloader())))

    class VarianceMonitor(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        """Logs the penalty and the variances of the converted model that is trained."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            should_log = control.should_log
            values = monitor.penalty(model) if should_log else {}
            if state.global_step % every == 0:
                device = next(model.parameters()).device
                batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in first.items() if k in taken}
                values |= monitor.variances(model, **batch)
            if values:
                trainer.log(values)
                control.should_log = should_log  # the trainer's own log of this step is still to come

    made = VarianceMonitor()
    trainer.add_callback(made)
    return made


def _framework(package: str, *modules: str) -> Any:
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ConversionError(f"this callback needs {package}: pip install {package}")
