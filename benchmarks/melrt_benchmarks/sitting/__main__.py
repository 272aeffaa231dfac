"""Entry point of `python -m melrt_benchmarks.sitting`."""

import sys

from melrt_benchmarks.sitting.cli import main

if __name__ == "__main__":
    sys.exit(main())
