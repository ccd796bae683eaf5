"""The suite runs kernels block by block; what is said of compiled ones is tested where they are asked for."""

import os

os.environ.setdefault("RVCONVERT_COMPILE", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
