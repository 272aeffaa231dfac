"""`python -m melrt`."""

from melrt.cli.main import main

if __name__ == "__main__":
    main()
