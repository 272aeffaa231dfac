"""The page at `/`: one HTML file, which may load nothing but this service's own answers."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import Response

# Blobs are the recording and the result, which the page plays.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; media-src blob:; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page() -> Response:
    """Return the page. Its script and its style are allowed by their hashes, so that no other can run in it."""
    html = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    policy = POLICY.format(script=_hash(html, "script"), style=_hash(html, "style"))
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return Response(html, media_type="text/html", headers=headers)


def _hash(html: str, element: str) -> str:
    (text,) = re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
