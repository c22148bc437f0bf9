"""`python -m tokpref` is `tokpref`, and so is `torchrun -m tokpref`."""

import sys

from .cli import main

if __name__ == "__main__": sys.exit(main())
