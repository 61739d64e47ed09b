"""The command line of all peers; `benchmarks.servers` builds it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from benchmarks.peers.request_sampler import RequestSampler, Turns


@dataclass(frozen=True, kw_only=True)
class PeerOptions:
    """Options of a peer."""

    model: Path
    port: int
    meter: Path
    width: int
    threads: int
    device_ms: tuple[float, float] | None
    """Fixed time and time per row of a call on a simulated device; None: the network is run."""
    steps: tuple[int, ...]
    """The numbers of steps that will be requested: peers that batch by it create a queue for each."""
    turns: Turns
    delay_ms: float
    """Maximum delay of a request while a batch is filled."""
    batch: int
    """Maximum batch, in the server's own unit; 0: the width."""

    def sampler(self) -> RequestSampler:
        """Open the network; for one thread."""
        return RequestSampler(
            self.model,
            self.meter,
            width=self.width,
            threads=self.threads,
            turns=self.turns,
            device_ms=self.device_ms,
        )


def peer_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options common to all servers, iddpm included."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--meter", type=Path, required=True, help="file of the network's meter")
    parser.add_argument("--width", type=int, default=8, help="maximum rows of a network call (8)")
    parser.add_argument("--threads", type=int, default=1, help="of a network call (1)")
    parser.add_argument(
        "--device-ms", type=_two_numbers, metavar="FIXED,ROW", help="simulate a device instead of running the network"
    )
    return parser


def parse_peer_options(description: str | None) -> PeerOptions:
    """Read the command line of a peer that batches."""
    parser = peer_parser(description)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 250], help="(50 100 250)")
    parser.add_argument("--turns", choices=get_args(Turns), default="batch", help="(batch)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="(0)")
    parser.add_argument("--batch", type=int, default=0, help="(the width)")
    read = vars(parser.parse_args())
    return PeerOptions(**{**read, "steps": tuple(read["steps"])})


def _two_numbers(text: str) -> tuple[float, float]:
    fixed, by_row = map(float, text.split(","))
    return fixed, by_row
