"""A LitServe app that answers with a prepared picture; runs with LitServe's Python, without this repository's packages.

One worker, requests batched up to 8 without a delay, and its fast queue; no other setting was tried.
"""

import base64
import os
import sys
from typing import Any

import litserve

PICTURE = base64.b64encode(os.urandom(3200)).decode()


class Null(litserve.LitAPI):  # type: ignore[misc]  # not installed where types are checked
    """Accepts and returns the fields of the service's requests."""

    def setup(self, device: str) -> None:
        """Nothing to load."""

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the body unchanged."""
        return request

    def predict(self, x: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer a batch."""
        return [{"model": "null", "images": [{"b64_json": PICTURE, "seed": body["seed"]}]} for body in x]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        return output


if __name__ == "__main__":
    api = Null(api_path="/v1/generate", max_batch_size=8, batch_timeout=0)
    server = litserve.LitServer(api, accelerator="cpu", healthcheck_path="/readyz", fast_queue=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
