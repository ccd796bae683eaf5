"""What a model's user is told once: where training would go wrong in silence."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TYPE_CHECKING

import torch

from rvconvert.capture.frames import is_internal

if TYPE_CHECKING:
    import types

    from torch import nn

    from rvconvert.options import Options

__all__ = ["PATIENCE", "Advice"]

logger = logging.getLogger("rvconvert")
_SAID: set[str] = set()  # once a process
PATIENCE = 50  # calls in training; gradients may be accumulated over some


class Advice:
    """Warnings of one model.

    Attributes:
        calls: of its converted methods, so far.
    """

    def __init__(self, options: Options, model: str) -> None:
        self.options, self.model = options, model
        self.calls = 0
        self.given: set[str] = set()
        self.versions: list[int] = []

    def once(self, key: str, message: str) -> None:
        """Warn once a model."""
        if key not in self.given:
            self.given.add(key)
            warnings.warn(message, stacklevel=_level())

    def of_latent(self, grad: torch.Tensor) -> None:
        """Say once that a loss is made of a latent's mean."""
        if not {"latent", "no penalty"} & self.given and bool(grad.any()):
            self.once(
                "latent",
                f"{self.model} returns a latent, here its mean, and the loss is made of it: log q(z|x) - log p(z) "
                "of a mean is no KL, and falls without bound as the posterior widens. Use the closed form, "
                "torch.distributions.kl_divergence(q, p), or a draw made for the loss, z = mu + std * torch.randn_like(std)",
            )

    @property
    def attaches(self) -> bool:
        """True if the options ask for an L_c that joins the loss."""
        return bool(self.options.attach and self.options.penalty and self.options.output == "mean")

    def without_penalty(self, name: str, last_penalty: torch.Tensor | None, *, encodes: bool) -> None:
        """Say once that a call in training attaches no L_c."""
        # A prior's samples, or an encoder's part alone, beside a reconstruction.
        beside = (bool(self.options.random_inputs) or encodes) and last_penalty is not None
        if not self.attaches or beside:
            return
        why = (
            "nothing that it returns, and nothing that meets an input in it, is a random value with a decoder behind it. "
            "rvconvert.plan(model, example_inputs=x) prints the roles; latent=('file.py:line',) names a draw"
        )
        if encodes:
            why = (
                "it gives a latent, here its mean, and decodes nothing. With a decoder apart, convert both: "
                "convert(encoder, output='distribution') gives a rvconvert.RandomVariable, which "
                "convert(decoder, random_inputs=('z',)) takes"
            )
        if self.options.random_inputs:
            names = " and ".join(self.options.random_inputs)
            why = f"{names} came as a plain tensor. Give the posterior: rvconvert.RandomVariable(mu, logvar.exp())"
        self.once("no penalty", f"{self.model}.{name} attaches no variance penalty L_c: {why}")

    def of_distribution(self, name: str) -> None:
        """Say once that what leaves as a random variable has no L_c attached."""
        if self.options.penalty and not torch.compiler.is_compiling():
            self.once(
                "distribution",
                f"{self.model}.{name} gives random variables, to which no L_c is attached: add "
                "rvconvert.variance_penalty(y) to the loss; attach=False says that it is",
            )

    def of_overflow(self, penalty: torch.Tensor) -> None:
        """Say once that variances have no size that a number can have, of which a training would end in NaN."""
        inside = penalty.is_meta or torch._C._functorch.peek_interpreter_stack() is not None
        if not inside and not bool(penalty.isfinite()):
            self.once(
                "overflow",
                f"the variance of {self.model}'s reconstruction overflows: L_c is {float(penalty)}. "
                "rvconvert.verify(model, x) says at which operation; covariance='sampled' takes no operation's variance on trust",
            )

    def of_no_call(self, model: nn.Module, last_penalty: torch.Tensor | None) -> None:
        """Say once that the model is trained and nothing called a converted method."""
        if not self.calls and last_penalty is None and any(p.grad is not None for p in model.parameters()):
            self.once(
                "never called",
                f"{self.model} has gradients, but its converted {' and '.join(self.options.methods)} was never "
                "called, so it is trained as the plain model, without L_c. Call model(x) in the loop, or convert what the loop "
                "calls: methods=('training_step',); a loop that encodes, samples and decodes by itself converts the decoder, "
                "methods=('decode',), random_inputs=('z',), and gives it rvconvert.RandomVariable(mu, logvar.exp()) for a sample",
            )

    def count_call(self, model: nn.Module) -> None:
        """Count; say once that gradients arrive and no parameter moves: an optimizer made before ``convert`` moves others."""
        self.calls += 1
        if self.calls not in (1, PATIENCE) or not (model.training and torch.is_grad_enabled()):
            return
        if self.options.covariance == "independent" and self.attaches and not _SAID:
            _SAID.add("independent")
            logger.warning(
                "rvconvert: independent moments, the paper's, see about a hundredth of a trained network's variance, so training "
                "widens the posterior; covariance='calibrated' sees it, and rvconvert.verify says how much yours has"
            )
        versions = [p._version for p in model.parameters()]
        if self.calls == PATIENCE and versions == self.versions and any(p.grad is not None for p in model.parameters()):
            self.once(
                "optimizer",
                f"{self.model} was called {PATIENCE} times in training, gradients arrive, and no parameter has "
                "changed. An optimizer made before convert moves the original model: make it from the converted one's "
                "parameters(), or convert with inplace=True",
            )
        self.versions = versions


def _level() -> int:
    """The ``stacklevel`` at which a warning shows the line of the user's own code that is under way."""
    frame: types.FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and is_internal(frame) and frame.f_globals.get("__name__") != "__main__":
        frame, level = frame.f_back, level + 1
    return level if frame is not None else 2
