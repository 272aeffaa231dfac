"""The HTTP service: `melrt serve http`."""
