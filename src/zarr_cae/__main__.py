"""`python -m zarr_cae`: the command line."""

import sys

from zarr_cae.cli import main

if __name__ == "__main__":
    sys.exit(main())
