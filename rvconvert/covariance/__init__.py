"""Ways of carrying covariance beyond independence. Importing this package adds them to the noise sources."""

from rvconvert.covariance import calibrated, fused, lowrank, sampled

__all__ = ["calibrated", "fused", "lowrank", "sampled"]
