"""What the modes that carry covariance by rows have in common: x = mean + factors^T e + d."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from rvconvert.random_variable import RandomVariable

__all__ = ["Factored"]


class Factored(RandomVariable):
    """Jointly distributed random variables: mean, rows of factors on common noises e, an independent remainder d."""

    @property
    @abstractmethod
    def factors(self) -> Tensor:
        """(r, *shape): the covariance of each element with each noise, in units of the variable."""

    @property
    @abstractmethod
    def remainder(self) -> Tensor:
        """Variance that the rows do not explain, shaped like the variable; ``var`` is their squares' sum and this."""

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) draws: Gaussian, with the covariance that the rows carry; the first dimension is the batch."""
        shape, device, dtype = self.shape, self.device, self.dtype
        out = self.mean + self.remainder.sqrt() * torch.randn(n, *shape, device=device, dtype=dtype, generator=generator)
        each = (shape[0], *(1,) * (len(shape) - 1)) if shape else ()
        for row in self.factors:
            out = out + row * torch.randn(n, *each, device=device, dtype=dtype, generator=generator)
        return out
