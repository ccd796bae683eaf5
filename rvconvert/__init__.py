"""rvconvert: turn any PyTorch variational autoencoder into an RV-VAE, and the trained result back."""

from rvconvert.checkpoint import load, save
from rvconvert.convert import convert, plan
from rvconvert.errors import ConversionError
from rvconvert.penalty import variance_penalty
from rvconvert.random_variable import RandomVariable
from rvconvert.registry import REGISTRY
from rvconvert.rules.custom import rule
from rvconvert.verify import verify
from rvconvert.weights import to_plain, transfer_weights

__all__ = [
    "REGISTRY",
    "ConversionError",
    "RandomVariable",
    "convert",
    "load",
    "plan",
    "rule",
    "save",
    "to_plain",
    "transfer_weights",
    "variance_penalty",
    "verify",
]
