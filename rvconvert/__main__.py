"""``python -m rvconvert``: what the ``rvconvert`` command runs."""

import sys

from rvconvert.cli.main import main

sys.exit(main())
