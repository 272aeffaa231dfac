"""Each file of this folder needs packages of another extra. pytest does not collect a file whose packages are not installed."""

from importlib.util import find_spec

NEEDED = {
    "test_bulk.py": "pyarrow", "test_http.py": "websockets", "test_http_connections.py": "websockets",
    "test_http_page.py": "websockets", "test_triton.py": "tritonclient",
}  # fmt: skip
collect_ignore = [file for file, package in NEEDED.items() if find_spec(package) is None]
