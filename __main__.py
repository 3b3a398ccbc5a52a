"""python -m diff2flow_nodes: see --help."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
