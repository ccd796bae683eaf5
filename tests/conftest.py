"""The suite runs kernels block by block; what is said of compiled ones is tested where they are asked for."""

import os

os.environ.setdefault("RVCONVERT_COMPILE", "0")
