"""Entry point of `python -m melrt_benchmarks.sitting.stub`."""

import sys

from melrt_benchmarks.sitting.stub.cli import main

if __name__ == "__main__":
    sys.exit(main())
