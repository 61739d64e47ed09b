"""The servers that benchmarks/serving.py measures: how to start them, build requests and read answers."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from benchmarks.contenders import Absent
from benchmarks.networks import BenchNetwork
from benchmarks.open_loop import OK, Ask
from benchmarks.peers.meter import Reading, new_meter, read_meter
from benchmarks.peers.request_sampler import Uint8Array
from benchmarks.processes import end_session, free_ports
from benchmarks.traffic import Arrival

ROOT = Path(__file__).parents[1]
START_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A server that can be measured."""

    module: str
    ready: str
    """Path that answers 200 when the server accepts requests; {steps} is replaced by the longest chain."""
    ask: Callable[[int, Arrival], Ask]
    pixels: Callable[[httpx.Response], bytes]
    """The pixels of an answer, uint8 in the order of the images."""
    settings: Mapping[str, str]
    """Additional settings of this kind, which the command line may change."""
    venv: str | None = None
    """Its virtual environment, one of those on the command line; None: that of the benchmark."""
    diffusers: bool = False
    """Whether it runs diffusers' implementation in PyTorch, whose pixels differ."""


def _ask_iddpm(number: int, arrival: Arrival) -> Ask:
    body = {"n": arrival.rows, "steps": arrival.steps, "seed": number, "class": number % 10, "cfg_scale": 1}
    return Ask("/v1/generate", body)


def _iddpm_pixels(response: httpx.Response) -> bytes:
    pictures = (base64.b64decode(image["b64_json"]) for image in response.json()["images"])
    return b"".join(np.asarray(Image.open(io.BytesIO(picture))).tobytes() for picture in pictures)


def _ask_triton(number: int, arrival: Arrival) -> Ask:
    columns = {
        "seed": [number] * arrival.rows,
        "image_index": [*range(arrival.rows)],
        "label": [number % 10] * arrival.rows,
    }
    inputs = [
        {"name": name, "shape": [arrival.rows, 1], "datatype": "INT64", "data": data} for name, data in columns.items()
    ]
    outputs = [{"name": "pixels", "parameters": {"binary_data": True}}]
    return Ask(f"/v2/models/steps_{arrival.steps}/infer", {"inputs": inputs, "outputs": outputs})


def _triton_pixels(response: httpx.Response) -> bytes:
    return response.content[int(response.headers["Inference-Header-Content-Length"]) :]


def _ask_litserve(number: int, arrival: Arrival) -> Ask:
    return Ask(f"/{arrival.steps}", {"n": arrival.rows, "seed": number, "class": number % 10})


def _ask_plain(number: int, arrival: Arrival) -> Ask:
    body = {"n": arrival.rows, "steps": arrival.steps, "seed": number, "class": number % 10}
    return Ask("/generate", body)


def _body(response: httpx.Response) -> bytes:
    return response.content


KINDS: Mapping[str, Kind] = {
    "iddpm": Kind(
        module="benchmarks.peers.iddpm_server",
        ready="/readyz",
        ask=_ask_iddpm,
        pixels=_iddpm_pixels,
        settings={"policy": "srw"},
    ),
    "triton": Kind(
        module="benchmarks.peers.triton_server",
        ready="/v2/models/steps_{steps}/ready",
        ask=_ask_triton,
        pixels=_triton_pixels,
        settings={"turns": "batch", "delay-ms": "0", "batch": "0"},
        venv="triton",
    ),
    "litserve": Kind(
        module="benchmarks.peers.litserve_server",
        ready="/health",
        ask=_ask_litserve,
        pixels=_body,
        settings={"turns": "batch", "delay-ms": "0", "batch": "2"},
        venv="litserve",
    ),
    "one-at-a-time": Kind(
        module="benchmarks.peers.one_at_a_time", ready="/ready", ask=_ask_plain, pixels=_body, settings={}
    ),
    "diffusers": Kind(
        module="benchmarks.peers.one_at_a_time",
        ready="/ready",
        ask=_ask_plain,
        pixels=_body,
        settings={},
        diffusers=True,
    ),
}


@dataclass(frozen=True)
class Entry:
    """A server of a kind with settings, written KIND or KIND,NAME=VALUE,..."""

    text: str
    kind: Kind
    settings: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse it.

        Raises:
            ValueError: unknown kind or setting.
        """
        name, *given = text.split(",")
        if name not in KINDS:
            raise ValueError(f"a server is one of {', '.join(KINDS)}; got {name!r}")
        kind = KINDS[name]
        changes = dict(setting.split("=", 1) for setting in given if "=" in setting)
        if len(changes) != len(given) or not changes.keys() <= kind.settings.keys():
            raise ValueError(
                f"settings of {name} are NAME=VALUE with {', '.join(kind.settings) or 'no name'}: {text!r}"
            )
        return cls(text, kind, {**kind.settings, **changes})


@dataclass(frozen=True, kw_only=True)
class Site:
    """Settings common to all servers."""

    network: BenchNetwork
    work: Path
    width: int
    threads: int
    device_ms: tuple[float, float] | None
    """Fixed time and time per row of a simulated device; None: the network is run."""
    steps: tuple[int, ...]
    venvs: Mapping[str, Path]
    """Virtual environments by name."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    entry: Entry
    url: str
    meter: Path
    log: Path
    process: subprocess.Popen[bytes]

    def wait_ready(self, steps: Sequence[int]) -> None:
        """Wait until it accepts requests of these numbers of steps.

        Raises:
            Absent: it did not start; the message contains the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        path = self.entry.kind.ready.format(steps=max(steps))
        with httpx.Client(base_url=self.url, trust_env=False) as client:
            while self.process.poll() is None and time.monotonic() < deadline:
                try:
                    if client.get(path).status_code == OK:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise Absent(
            f"{self.entry.text} did not become ready:\n{self.log.read_text('utf-8', errors='replace')[-2000:]}"
        )

    def suspend(self) -> None:
        """Suspend its processes: some poll while idle, and would disturb other servers."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Resume its processes."""
        os.killpg(self.process.pid, signal.SIGCONT)

    async def read(self, client: httpx.AsyncClient) -> Reading:
        """Read the counters of its network."""
        reading = read_meter(self.meter)
        if not _is_ours(self.entry):
            return reading
        # Its batches contain padding, which the network cannot distinguish from other rows
        metrics = (await client.get("/metrics")).text
        found = re.search(r"^iddpm_row_steps_total (\S+)$", metrics, re.MULTILINE)
        assert found
        return Reading(reading.calls, reading.seconds, float(found[1]))

    def picture(self, client: httpx.Client, arrival: Arrival) -> Uint8Array:
        """Request images, the same ones from every server; return the bytes of their pixels.

        Raises:
            httpx.HTTPStatusError: the server answered with an error.
        """
        asked = self.entry.kind.ask(0, arrival)
        response = client.post(asked.path, json=asked.body).raise_for_status()
        return np.frombuffer(self.entry.kind.pixels(response), np.uint8)


@contextmanager
def started(entry: Entry, site: Site, number: int) -> Iterator[Server]:
    """Start a server, and end it with all its processes; `Server.wait_ready` waits until it accepts requests.

    Args:
        entry: server and settings.
        site: common settings.
        number: distinguishes servers that run at the same time.

    Raises:
        Absent: its virtual environment does not exist.
    """
    site.work.mkdir(parents=True, exist_ok=True)
    meter, log = site.work / f"{number}.meter", site.work / f"{number}.log"
    new_meter(meter)
    port = free_ports(3)  # Triton uses the next two ports for other protocols
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # programs of this repository
            command(entry, site, port, meter),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(site.threads), "PYTHONPATH": str(ROOT), **_environment(entry)},
        )
    try:
        yield Server(entry, f"http://127.0.0.1:{port}", meter, log, process)
    finally:
        end_session(process)


def command(entry: Entry, site: Site, port: int, meter: Path) -> list[str]:
    """Return the command that starts a server.

    Raises:
        Absent: its virtual environment does not exist.
    """
    venv = entry.kind.venv
    python = Path(sys.executable) if venv is None else site.venvs[venv] / "bin" / "python"
    if not python.exists():
        raise Absent(f"{python} does not exist; benchmarks/peers/requirements-{venv}.txt describes how to create it")
    options: dict[str, Any] = {
        "model": site.network.checkpoint.resolve(),
        "port": port,
        "meter": meter.resolve(),
        "width": site.width,
        "threads": site.threads,
    }
    if site.device_ms is not None:
        options["device-ms"] = ",".join(map(str, site.device_ms))
    if venv is not None:
        options |= entry.settings
    if entry.kind.diffusers:
        options["diffusers"] = site.network.diffusers_folder().resolve()
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    steps = [] if venv is None else ["--steps", *map(str, site.steps)]
    return [str(python), "-m", entry.kind.module, *flags, *steps]


def _environment(entry: Entry) -> dict[str, str]:
    return {f"IDDPM_{name.upper()}": value for name, value in entry.settings.items()} if _is_ours(entry) else {}


def _is_ours(entry: Entry) -> bool:
    return entry.kind is KINDS["iddpm"]
