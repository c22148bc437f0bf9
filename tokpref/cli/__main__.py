"""`python -m tokpref.cli` is `tokpref`, and so is `torchrun -m tokpref.cli`."""

import sys

from . import main

if __name__ == "__main__": sys.exit(main())
