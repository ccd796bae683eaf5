"""Ways of carrying covariance beyond independence. Importing this package adds them to the noise sources."""

from rvconvert.covariance import fused, lowrank, sampled

__all__ = ["fused", "lowrank", "sampled"]
