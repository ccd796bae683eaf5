"""rvconvert: turn any PyTorch variational autoencoder into an RV-VAE, and the trained result back."""

from rvconvert._convert import convert, plan
from rvconvert.calibration import calibrate
from rvconvert.core.random_variable import RandomVariable
from rvconvert.core.registry import REGISTRY
from rvconvert.errors import ConversionError
from rvconvert.files.checkpoint import load, load_weights, save
from rvconvert.files.export import export
from rvconvert.losses import expected_squared_error, optimal_sigma_nll
from rvconvert.options import Options
from rvconvert.penalty import variance_penalty
from rvconvert.plain import to_plain, transfer_weights
from rvconvert.rules.custom import rule
from rvconvert.verify import verify

__all__ = [
    "REGISTRY",
    "ConversionError",
    "Options",
    "RandomVariable",
    "calibrate",
    "convert",
    "expected_squared_error",
    "export",
    "load",
    "load_weights",
    "optimal_sigma_nll",
    "plan",
    "rule",
    "save",
    "to_plain",
    "transfer_weights",
    "variance_penalty",
    "verify",
]
