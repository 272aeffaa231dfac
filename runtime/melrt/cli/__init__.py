"""The `melrt` command."""
