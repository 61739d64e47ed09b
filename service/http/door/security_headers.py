"""Headers of every answer that tell browsers how little to do with it."""

from __future__ import annotations

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # pages bring their own
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # no <img> of another origin shows our pictures
    "Cache-Control": "no-store",  # a cache must not give one client's images to another
}
"""Set where the answer does not bring its own."""
