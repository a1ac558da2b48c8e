"""`python -m rlinf` is the `rlinf` command."""

import sys

from rlinf.cli import main

sys.exit(main(sys.argv[1:]))
