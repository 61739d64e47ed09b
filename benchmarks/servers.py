"""The servers that benchmarks/serving.py measures: how each is started, asked and understood."""

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
    """Path that answers 200 as soon as requests are welcome; {steps} stands for the longest chain."""
    ask: Callable[[int, Arrival], Ask]
    pixels: Callable[[httpx.Response], bytes]
    """The pixels of an answer, uint8 in the order of the images."""
    settings: Mapping[str, str]
    """What it is told beyond what all are told; those that the command line may change."""
    venv: str | None = None
    """Its virtual environment, of those on the command line; None: the one that runs the benchmark."""
    diffusers: bool = False
    """Whether it runs diffusers' form of the network, in PyTorch, so that its pixels are others."""


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
        """Read it.

        Raises:
            ValueError: no such kind, or a setting that it does not have.
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
    """What all servers share."""

    network: BenchNetwork
    work: Path
    width: int
    threads: int
    device_ms: tuple[float, float] | None
    """Of a simulated device, fixed and by row; None: the network itself is run."""
    steps: tuple[int, ...]
    venvs: Mapping[str, Path]
    """Virtual environments by name."""


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    entry: Entry
    url: str
    meter: Path
    log: Path
    process: subprocess.Popen[bytes]

    def wait_ready(self, steps: Sequence[int]) -> None:
        """Wait until it takes requests of these numbers of steps.

        Raises:
            Absent: it does not start here; the message has the end of its log.
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
        raise Absent(f"{self.entry.text} did not become ready:\n{self.log.read_text(errors='replace')[-2000:]}")

    def suspend(self) -> None:
        """Stop its processes: some poll while they have nothing to do, and would disturb others."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let its processes go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    async def read(self, client: httpx.AsyncClient) -> Reading:
        """Read what its network has done."""
        reading = read_meter(self.meter)
        if not _is_ours(self.entry):
            return reading
        # Its batches hold rows that only pad, which the network cannot tell from others
        metrics = (await client.get("/metrics")).text
        found = re.search(r"^iddpm_row_steps_total (\S+)$", metrics, re.MULTILINE)
        assert found
        return Reading(reading.calls, reading.seconds, float(found[1]))

    def picture(self, client: httpx.Client, arrival: Arrival) -> Uint8Array:
        """Ask for images, the very same of every server: bytes of pixels.

        Raises:
            httpx.HTTPStatusError: an error instead of images.
        """
        asked = self.entry.kind.ask(0, arrival)
        response = client.post(asked.path, json=asked.body).raise_for_status()
        return np.frombuffer(self.entry.kind.pixels(response), np.uint8)


@contextmanager
def started(entry: Entry, site: Site, number: int) -> Iterator[Server]:
    """Start a server, and end it with all its processes; `Server.wait_ready` says when it may be asked.

    Args:
        entry: which.
        site: where.
        number: tells it from others that run beside it.

    Raises:
        Absent: its virtual environment is not there.
    """
    site.work.mkdir(parents=True, exist_ok=True)
    meter, log = site.work / f"{number}.meter", site.work / f"{number}.log"
    new_meter(meter)
    port = free_ports(3)  # Triton takes the two after it for other protocols
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603  # our own programs
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
        Absent: its virtual environment is not there.
    """
    venv = entry.kind.venv
    python = Path(sys.executable) if venv is None else site.venvs[venv] / "bin" / "python"
    if not python.exists():
        raise Absent(f"{python} is not there: benchmarks/peers/requirements-{venv}.txt says how to make it")
    told: dict[str, Any] = {
        "model": site.network.checkpoint.resolve(),
        "port": port,
        "meter": meter.resolve(),
        "width": site.width,
        "threads": site.threads,
    }
    if site.device_ms is not None:
        told["device-ms"] = ",".join(map(str, site.device_ms))
    if venv is not None:
        told |= entry.settings
    if entry.kind.diffusers:
        told["diffusers"] = site.network.diffusers_folder().resolve()
    flags = [part for name, value in told.items() for part in (f"--{name}", str(value))]
    steps = [] if venv is None else ["--steps", *map(str, site.steps)]
    return [str(python), "-m", entry.kind.module, *flags, *steps]


def _environment(entry: Entry) -> dict[str, str]:
    return {f"IDDPM_{name.upper()}": value for name, value in entry.settings.items()} if _is_ours(entry) else {}


def _is_ours(entry: Entry) -> bool:
    return entry.kind is KINDS["iddpm"]
