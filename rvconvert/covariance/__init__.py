"""Ways of carrying covariance beyond independence. Importing this package adds them to the noise sources."""

from rvconvert.covariance import lowrank, sampled

__all__ = ["lowrank", "sampled"]
