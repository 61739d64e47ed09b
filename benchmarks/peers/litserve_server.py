"""LitServe: one API per number of steps, each with a worker that batches requests; its own virtual environment.

LitServe counts a batch in requests, not in rows: a batch with more rows than fit into a network call is split into
parts, which are answered together, as LitServe requires.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Response
from litserve import LitAPI, LitServer

from benchmarks.peers.options import PeerOptions, parse_peer_options
from benchmarks.peers.request_sampler import Uint8Array


class StepsAPI(LitAPI):  # type: ignore[misc]  # LitServe is not installed where types are checked
    """Samples requests of one number of steps."""

    def __init__(self, options: PeerOptions, steps: int) -> None:
        super().__init__(max_batch_size=options.batch, batch_timeout=options.delay_ms / 1000, api_path=f"/{steps}")
        self._options = options
        self._steps = steps

    def setup(self, device: str) -> None:
        """Open the network, in the worker."""
        self._sampler = self._options.sampler()

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def predict(self, requests: Any) -> Any:
        """Sample a batch of requests (or a single one, if the batch size is 1)."""
        if self._options.batch == 1:
            return self._sample([requests])[0]
        answers: list[bytes] = []
        for part in parts(requests, self._options.width):
            answers += self._sample(part)
        return answers

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")

    def _sample(self, requests: Sequence[dict[str, Any]]) -> list[bytes]:
        owners = [k for k, request in enumerate(requests) for _ in range(request["n"])]
        pixels: Uint8Array = self._sampler(
            self._steps,
            [requests[k]["seed"] for k in owners],
            [index for request in requests for index in range(request["n"])],
            [requests[k]["class"] for k in owners],
        )
        return [pixels[[o == k for o in owners]].tobytes() for k in range(len(requests))]


def parts(requests: Sequence[dict[str, Any]], width: int) -> Iterator[list[dict[str, Any]]]:
    """Split a batch into parts of at most `width` images, in order."""
    part: list[dict[str, Any]] = []
    for request in requests:
        if part and sum(r["n"] for r in part) + request["n"] > width:
            yield part
            part = []
        part.append(request)
    if part:
        yield part


def main() -> None:
    """Serve until a signal."""
    options = parse_peer_options(__doc__)
    server = LitServer([StepsAPI(options, steps) for steps in options.steps], accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    main()
