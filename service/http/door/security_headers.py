"""Security headers of every answer, which restrict what browsers may do with it."""

from __future__ import annotations

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # pages set their own
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # no <img> of another origin may show the pictures
    "Cache-Control": "no-store",  # a cache must not give one client's images to another
}
"""Added unless the answer sets the header itself."""
