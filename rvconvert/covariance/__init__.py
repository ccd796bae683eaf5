"""Ways of carrying covariance beyond independence. Importing this package adds them to ``rvconvert.core.mode.MODES``."""

from rvconvert.covariance import calibrated, lowrank, sampled

__all__ = ["calibrated", "lowrank", "sampled"]
