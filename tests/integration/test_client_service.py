"""The Python client and `iddpm sample --url` against a real server: equal pixels, progress, keys, one execution."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.client import (
    AsyncClient,
    Client,
    ConnectionLost,
    Denoised,
    Event,
    PreviewEvent,
    ProgressEvent,
    QueuedEvent,
    RequestFailed,
    pixels_of,
)
from cli.client import arrays_of as arrays_out
from cli.main import app
from service.http.door.keys import ApiKey, Limits, hash_of, new_key
from service.http.door.keys_file import write_keys
from tests.fakes import CLASS_NAMES, tiny_checkpoint
from tests.integration.server import Server, running
from tests.waiting import PATIENCE_S, until

KEY = new_key()
ASKED: dict[str, Any] = {"class_": "bee", "n": 3, "steps": 4, "seed": 6, "format": "npz"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("service")
    write_keys(folder / "keys.json", [ApiKey(name="alice", sha256=hash_of(KEY), limits=Limits())])
    keys = {"IDDPM_KEYS_FILE": str(folder / "keys.json")}
    with running(model, folder / "log.txt", "--threads", "1", environment=keys) as running_server:
        yield running_server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, key=KEY) as opened:
        yield opened


def sample(*arguments: str, key: str = KEY) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sample", *arguments], env={"IDDPM_KEY": key})
    return result.exit_code, " ".join(result.output.split())


def arrays_of(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


def test_the_client_lists_models(client: Client) -> None:
    (found,) = client.models()
    assert (found.name, found.classes) == ("tiny", list(CLASS_NAMES))


def test_followed_awaited_and_plain_requests_give_equal_pixels(server: Server, client: Client) -> None:
    plain = client.generate(**ASKED)
    events: list[Event] = []
    followed = client.generate(**ASKED, preview_every=2, on_event=events.append)

    async def awaited() -> list[Any]:
        async with AsyncClient(server.url, key=KEY) as asynchronous:
            assert (await asynchronous.models())[0].name == "tiny"
            alone = [asynchronous.generate(**{**ASKED, "n": 1, "image_index": k}) for k in range(3)]
            return await asyncio.gather(*alone, asynchronous.generate(**ASKED, on_event=lambda _: None))

    *singles, together = asyncio.run(awaited())
    pictures = [image.b64_json for image in plain.images]
    assert len(set(pictures)) == 3
    assert [image.b64_json for image in followed.images] == pictures
    assert [single.images[0].b64_json for single in singles] == pictures
    assert [image.b64_json for image in together.images] == pictures
    assert pixels_of(pictures[0]).shape == (8, 8, 1)
    assert isinstance(events[0], QueuedEvent)
    last = {event.position: event.step for event in events if isinstance(event, ProgressEvent)}
    assert last == {0: 4, 1: 4, 2: 4}
    for event in events:
        if isinstance(event, PreviewEvent):
            assert pixels_of(event.b64_json).shape == (8, 8, 1)


def test_a_repeated_idempotency_key_is_one_execution(client: Client) -> None:
    once, again = (client.generate(n=1, steps=3, idempotency_key="k") for _ in range(2))
    assert once == again  # seeds and measured times
    assert client.generate(n=1, steps=3).images[0].seed != once.images[0].seed


def test_errors_of_the_service_reach_the_caller(server: Server, client: Client) -> None:
    with pytest.raises(RequestFailed, match=r'class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'):
        client.generate(class_="Dog")
    with pytest.raises(RequestFailed, match="unknown field"):
        client.generate(colour="red", on_event=print)  # type: ignore[call-arg]  # what a newer service might know
    with Client(server.url) as stranger, pytest.raises(RequestFailed) as raised:
        stranger.models()
    assert raised.value.problem.status == 401


def test_leaving_a_stream_frees_its_rows(server: Server, client: Client) -> None:
    class Enough(Exception):
        pass

    def stop(_: Event) -> None:
        raise Enough

    with pytest.raises(Enough):
        client.generate(n=1, steps=1000, on_event=stop)
    authorized = {"Authorization": f"Bearer {KEY}"}
    cancelled = 'iddpm_requests_total{outcome="cancelled"} 1.0'
    until(lambda: cancelled in httpx.get(f"{server.url}/metrics", headers=authorized, timeout=PATIENCE_S).text)


def test_the_client_waits_for_a_service_that_starts_late(model: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with Client(address, patience_s=0) as hasty, pytest.raises(ConnectionLost):
            hasty.models()  # bound, and not listening

        def answer_late() -> None:
            time.sleep(0.2)
            listener.listen()
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"data":[],"models":[]}')

        late = threading.Thread(target=answer_late)
        late.start()
        with Client(address, patience_s=PATIENCE_S) as patient:
            assert patient.models() == []
        late.join()


def test_the_command_gives_equal_pixels_with_and_without_a_server(server: Server, model: Path, tmp_path: Path) -> None:
    options = ["--class", "1", "-n", "66", "--steps", "3", "--seed", "6"]  # two requests, with the model's guidance
    code, here = sample("--model", str(model), *options, "-o", str(tmp_path / "here.npz"))
    assert code == 0, here
    code, there = sample("--url", server.url, *options, "-o", str(tmp_path / "there.npz"))
    assert code == 0, there
    pixels, labels = arrays_of(tmp_path / "there.npz")
    assert labels.tolist() == [1] * 66
    expected, _ = arrays_of(tmp_path / "here.npz")
    np.testing.assert_array_equal(pixels, expected)
    (numerics_id,) = re.findall(r"seed 6, numerics_id (\w{16}) wrote", here)
    assert f"seed 6, numerics_id {numerics_id} wrote" in there  # one thread in both


@pytest.mark.parametrize(
    "options",
    [
        ["--image", "three.npy", "--strength", "0.6", "--sampler", "dpm++", "--dtype", "float32"],
        ["--image", "picture.png", "--mask", "mask.png", "--resample", "2,2", "--fit", "resize", "-n", "3"],
        ["--latent", "latent.npy", "--start-timestep", "500", "--no-clip", "--dtype", "float32"],
    ],
    ids=["arrays", "mask", "latent"],
)
def test_given_images_give_equal_bytes_with_and_without_a_server(
    server: Server, model: Path, tmp_path: Path, options: list[str]
) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "three.npy", rng.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8))
    np.save(tmp_path / "latent.npy", rng.standard_normal((8, 8, 1)).astype(np.float32))
    Image.fromarray(rng.integers(0, 65536, (8, 12), dtype=np.uint16)).save(tmp_path / "picture.png")
    Image.fromarray(rng.integers(0, 2, (8, 12), dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    paths = [str(tmp_path / text) if (tmp_path / text).exists() else text for text in options]
    common = ["--class", "bee", "--steps", "4", "--seed", "6", *paths]
    for place in (["--model", str(model)], ["--url", server.url, "--at-once", "64"]):
        code, output = sample(*place, *common, "-o", str(tmp_path / f"{place[0]}.npy"))
        assert code == 0, output
    assert (tmp_path / "--model.npy").read_bytes() == (tmp_path / "--url.npy").read_bytes()
    assert len(np.load(tmp_path / "--url.npy")) == (1 if "--latent" in options else 3)


def test_given_images_are_divided_among_the_requests(server: Server, model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "four.npy", rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8))
    common = [
        "--class",
        "bee",
        "--steps",
        "4",
        "--seed",
        "6",
        "--image",
        str(tmp_path / "four.npy"),
        "--strength",
        "0.6",
    ]
    for name, place in {"here": ["--model", str(model)], "there": ["--url", server.url, "--at-once", "3"]}.items():
        code, output = sample(*place, *common, "-n", "4", "-o", str(tmp_path / f"{name}.npy"))
        assert code == 0, output
    assert (tmp_path / "here.npy").read_bytes() == (tmp_path / "there.npy").read_bytes()


@pytest.mark.parametrize("name", ["latent.npy", "latent.npz"])
def test_encode_gives_equal_bytes_with_and_without_a_server(
    server: Server, model: Path, tmp_path: Path, name: str
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    np.save(tmp_path / "three.npy", images)
    options = [
        str(tmp_path / "three.npy"),
        "--class",
        "1",
        "--steps",
        "6",
        "--end-timestep",
        "500",
        "--cfg-scale",
        "1.5",
    ]
    said = []
    for place in (["--model", str(model)], ["--url", server.url]):
        out = str(tmp_path / f"{place[0]}-{name}")
        result = CliRunner().invoke(app, ["encode", *place, *options, "-o", out], env={"IDDPM_KEY": KEY})
        assert result.exit_code == 0, result.output
        said += re.findall(r"timestep \d+, numerics_id \w{16}", result.output)
    assert len(said) == 2
    assert len(set(said)) == 1
    assert (tmp_path / f"--model-{name}").read_bytes() == (tmp_path / f"--url-{name}").read_bytes()


def test_both_clients_encode_arrays(server: Server, client: Client) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    encoded = client.encode(image=image, class_="bee", steps=4)
    assert encoded.latents.shape == (1, 8, 8, 1)
    assert encoded.timestep == 999

    async def awaited() -> npt.NDArray[np.float32]:
        async with AsyncClient(server.url, key=KEY) as asynchronous:
            return (await asynchronous.encode(image=image, class_="bee", steps=4)).latents

    assert np.array_equal(asyncio.run(awaited()), encoded.latents)
    with pytest.raises(RequestFailed, match="image: must have shape"):
        client.encode(image=image[:4])


def test_both_clients_call_the_network_with_arrays(server: Server, client: Client) -> None:
    x_t = np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32)
    found = client.denoise(x_t=x_t, timestep=[10, 999], class_=["bee", 0])
    assert (found.predicts, found.numerics_id) == ("eps", client.models()[0].numerics_id)
    assert found.prediction.shape == found.log_variance.shape == (2, 8, 8, 1)
    assert found.prediction.dtype == found.log_variance.dtype == np.float32
    assert (found.log_variance[0] < found.log_variance[1]).all()

    async def awaited() -> Denoised:
        async with AsyncClient(server.url, key=KEY) as asynchronous:
            return await asynchronous.denoise(x_t=x_t[1], timestep=999, class_=0)

    alone = asyncio.run(awaited())
    assert np.array_equal(alone.prediction[0], found.prediction[1])
    assert np.array_equal(alone.log_variance[0], found.log_variance[1])
    with pytest.raises(RequestFailed, match=r"timestep: must be 0\.\.999; got 1000"):
        client.denoise(x_t=x_t, timestep=1000)


def test_arrays_go_in_and_come_out(client: Client) -> None:
    images = np.random.default_rng(0).random((2, 8, 8, 1)).astype(np.float32) * 255
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 1
    answer = client.generate(image=images, mask=mask, class_="bee", steps=3, seed=1, format="npy", dtype="float32")
    made = arrays_out(answer)
    assert made.shape == images.shape
    assert made.dtype == np.float32
    assert np.array_equal(made[:, :, :4], images[:, :, :4])
    assert not np.array_equal(made[:, :, 4:], images[:, :, 4:])
    latents = client.encode(image=images, class_="bee", steps=4).latents
    decoded = client.generate(latent=latents, class_="bee", steps=4, sampler="ddim", cfg_scale=1)
    assert arrays_out(decoded).dtype == np.uint8
    assert arrays_out(decoded).shape == images.shape


def test_the_command_writes_a_file_per_image(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    code, output = sample("--url", server.url, "-n", "2", "--steps", "2", "--seed", "5", "-o", str(folder))
    assert code == 0, output
    assert sorted(path.name for path in folder.iterdir()) == ["5_0.png", "5_1.png"]


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (["--class", "Dog"], None, 'Invalid request: class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'),
        (["--class", "17"], None, "Invalid request: class: index must be 0..3; got 17"),
        (["--model", "other"], None, 'Unknown model: model: must be one of tiny; got "other"'),
        ([], "iddpm_wrong", "Unauthorized: Authorization: not a valid key"),
        ([], "iddpm_\twrong", "key: must be printable ASCII characters"),
    ],
)
def test_invalid_arguments_end_with_one_line(
    server: Server, tmp_path: Path, arguments: list[str], key: str | None, message: str
) -> None:
    code, output = sample("--url", server.url, "-o", str(tmp_path / "x.png"), *arguments, key=key or KEY)
    assert code == 1
    assert f"error: {message}" in output
    assert "Traceback" not in output
    assert "wrong" not in output
    assert not (tmp_path / "x.png").exists()
