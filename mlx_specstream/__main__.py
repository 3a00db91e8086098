"""`python -m mlx_specstream`: the `specstream` command, where scripts are not on the path."""

import sys

from mlx_specstream.cli import main

if __name__ == "__main__":
    sys.exit(main())
