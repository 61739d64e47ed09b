"""`iddpm sample` gives the pixels of the service, in the requested files."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.client import ClientError, ConnectionLost, Event, ProgressEvent, RequestFailed, UnexpectedAnswer
from cli.client_core import StreamEnded
from cli.main import app
from cli.sample_remote import sample_remote
from cli.sampled import SampledImage, output_at, refuse_impossible_pictures
from diffusion.config import ImageSize
from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from formats.checkpoint import write_checkpoint
from service.backends.base import BackendOptions
from service.backends.select import load_denoiser
from service.encoding import encode_npz
from service.engine.config import EngineConfig
from service.engine.runners.array_runner import ArrayRunner
from service.http.native.schemas import GeneratedImage, GenerateResponse, ModelInfo, Problem, Timing
from tests.fakes import tiny_checkpoint, tiny_config, tiny_network
from tests.unit.formats.test_atomic_file import longest_file

if TYPE_CHECKING:
    from cli.client import Client


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


def sample(model: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sample", "--model", str(model), *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_images_equal_the_one_image_sampler(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.npz"
    code, output = sample(model, "--class", "bee", "-n", "3", "--steps", "4", "--seed", "6", "--out", str(out))
    assert code == 0, output
    config = tiny_config()
    plan = build_plan(config.diffusion, "ancestral", "4")
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [1, 1, 1]
        for index, pixels in enumerate(arrays["arr_0"]):
            spec = ImageSpec(seed=6, image_index=index, class_index=1, cfg_scale=config.sampling.cfg_scale)
            assert np.array_equal(pixels, sample_images(tiny_network(config), plan, [spec])[0])


def test_an_image_of_a_seed_can_be_sampled_by_its_index(model: Path, tmp_path: Path) -> None:
    options = ("--class", "bee", "--steps", "4", "--seed", "6")
    assert sample(model, *options, "-n", "4", "--out", str(tmp_path / "all"))[0] == 0
    assert sample(model, *options, "-n", "2", "--image-index", "2", "--out", str(tmp_path / "some"))[0] == 0
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["6_2.png", "6_3.png"]
    for path in (tmp_path / "some").iterdir():
        assert path.read_bytes() == (tmp_path / "all" / path.name).read_bytes()
    code, output = sample(model, *options, "-n", "2", "--image-index", str(2**32 - 1), "--out", str(tmp_path / "none"))
    assert (code, "image_index must be at most 4294967294 with 2 images; got 4294967295" in output) == (1, True)


def test_a_folder_gets_one_file_per_image(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    code, output = sample(model, "-n", "70", "--steps", "2", "--seed", "6", "--cfg-scale", "1", "--out", str(out))
    assert (code, "wrote 70 images" in output) == (0, True)
    assert {path.name for path in out.iterdir()} == {f"6_{index}.png" for index in range(70)}
    with Image.open(out / "6_69.png") as picture:
        assert picture.size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "Dog"], 'error: class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'),
        (["--steps", "1001"], "error: steps: must be 2..1000"),
        (["--sampler", "euler"], "error: sampler: Input should be 'ancestral', 'ddim', 'dpm++' or 'sde-dpm++'"),
        (["--seed", "-1"], "error: seed:"),
        (["--out", "x.gif"], "error: --out: must be a folder, or a file that ends in .png, .webp, .jpg, .jpeg, .npz"),
    ],
)
def test_invalid_arguments_end_with_one_line(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output = sample(model, "--out", str(tmp_path / "x.png"), *arguments)
    assert code == 1
    assert message in output
    assert "Traceback" not in output


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    code, output = sample(tmp_path / "nowhere", "--out", str(tmp_path / "x.png"))
    assert (code, f"error: {tmp_path / 'nowhere'}: there is no such folder" in output) == (1, True)


@pytest.mark.parametrize(
    ("name", "channels", "size", "n", "message"),
    [
        (
            "x.jpg",
            4,
            8,
            1,
            "--out: .jpg files hold images of 1 or 3 channels, but this model's have 4: name",
        ),
        (
            "x",
            2,
            8,
            1,
            "the .png files of a folder hold images of 1 or 3 or 4 channels, but this",
        ),
        (
            "x.webp",
            3,
            64,
            70_000,
            "the grid of 70000 images is 17488 pixels wide or high, but .webp files hold at most 16383",
        ),
        ("x.jpeg", 1, 1024, 9999, "but .jpeg files hold at most 65500: name a folder, or a file that ends in .npz"),
    ],
)
def test_a_format_that_cannot_hold_the_images_is_refused(
    name: str, channels: int, size: int, n: int, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_impossible_pictures(output_at(Path(name)), channels, size, n)
    refuse_impossible_pictures(output_at(Path("x.npz")), channels, size, n)


def test_it_is_refused_before_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    four = config.replace(model=config.model.replace(image_channels=4).model_dump())
    model = tmp_path / "model"
    write_checkpoint(model, four, tiny_network(four).state_dict())
    monkeypatch.setattr("service.engine.engine.Engine.step", None)
    code, output = sample(model, "--steps", "2", "--out", str(tmp_path / "x.jpg"))
    assert (code, "but this model's have 4" in output) == (1, True)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder.png", "is a folder; name a file, or a folder whose name does not end in .png"),
        ("file/x.png", "it is not a folder, or permission is denied"),
        ("file", "is a file; name a folder, or a file that ends in .png"),
    ],
)
def test_an_occupied_output_path_is_refused_before_a_model_is_loaded(tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    code, output = sample(tmp_path / "nowhere", "--out", str(tmp_path / out))
    assert (code, message in output) == (1, True)


@pytest.mark.parametrize(("out", "named"), [("x.png", "x.png"), ("pictures", "pictures/1_0.png")])
def test_a_full_disk_is_one_line_and_leaves_no_half_file(model: Path, tmp_path: Path, out: str, named: str) -> None:
    with longest_file(20):
        code, output = sample(model, "--steps", "2", "--seed", "1", "--out", str(tmp_path / out))
    assert code == 1
    assert output.endswith(f"error: [Errno 27] File too large: '{tmp_path / named}'")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_leaves_the_file_that_was_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "1_0.png").write_bytes(b"before")
    with longest_file(20):
        code, _ = sample(model, "--steps", "2", "--seed", "1", "--out", str(tmp_path))
    assert code == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"1_0.png": b"before"}


def test_the_model_may_be_named(model: Path, tmp_path: Path) -> None:
    code, output = sample(Path(f"mine={model}"), "--steps", "2", "--out", str(tmp_path / "x.png"))
    assert code == 0, output


def test_it_reads_the_settings_of_the_service(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def numerics_id() -> str:
        code, output = sample(model, "--steps", "2", "--seed", "1", "--out", str(tmp_path / "x.jpg"))
        assert code == 0, output
        return output.partition("numerics_id ")[2].split()[0]

    monkeypatch.setenv("IDDPM_HOST", "0.0.0.0")  # noqa: S104  # not listening
    usual = numerics_id()
    monkeypatch.setenv("IDDPM_MAX_ROWS", "4")
    options = BackendOptions(max_rows=4)
    narrow = ArrayRunner(load_denoiser(model, "auto", options), EngineConfig(max_rows=4)).numerics_id
    assert numerics_id() == narrow != usual
    with Image.open(tmp_path / "x.jpg") as picture:
        assert picture.format == "JPEG"
    monkeypatch.setenv("IDDPM_MAX_ROW", "4")
    code, output = sample(model, "--out", str(tmp_path / "x.jpg"))
    assert (code, "unknown environment variable IDDPM_MAX_ROW" in output) == (1, True)


def test_retries_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # not in use, once it is closed
    arguments = ["sample", "--url", f"http://127.0.0.1:{port}", "--out", str(tmp_path / "x.png")]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 1
    tries = [line for line in ended.stderr.splitlines() if "Connection refused; retrying in" in line]
    assert len(tries) > 5


class Fragile:
    """A client that loses its first requests with the given errors, by default after an event of their streams."""

    def __init__(self, *errors: ClientError, after: int = 1) -> None:
        self.errors, self.after = list(errors), after
        self.asked: list[tuple[int, int]] = []

    def models(self) -> list[ModelInfo]:
        return []

    def generate(self, *, on_event: Callable[[Event], None], **fields: Any) -> GenerateResponse:
        self.asked.append((fields["image_index"], fields["n"]))
        for step in range(self.after):
            on_event(ProgressEvent(position=0, step=step, steps=4, eta_s=0.0))
        if self.errors:
            raise self.errors.pop(0)
        timing = Timing(images_ahead=0, predicted_wait_s=0, wait_s=0, predicted_finish_s=0, finish_s=0)
        return GenerateResponse(model="m", images=[], numerics_id="x", timing=timing)


def lost(cause: Exception) -> ConnectionLost:
    error = ConnectionLost("reset")
    error.__cause__ = cause
    return error


def refused(status: int) -> RequestFailed:
    return RequestFailed(Problem(type="about:blank", title="Refused", status=status, detail="because"))


def refuse_nothing(channels: int, size: ImageSize) -> None:
    """Accept images of any kind."""


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr("time.sleep", taken.append)
    return taken


def ask(client: Fragile, n: int = 3, arrived: Callable[[list[SampledImage]], object] = len) -> None:
    sample_remote(cast("Client", client), {"seed": 1, "steps": 4}, n, at_once=2, check=refuse_nothing, arrived=arrived)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        StreamEnded("the stream ended before the images were done"),
        lost(httpx.ReadError("reset")),
        lost(httpx.RemoteProtocolError("closed")),
        UnexpectedAnswer("502 Bad Gateway", 502),
        UnexpectedAnswer("500: as Ray Serve says it", 500),
        refused(502),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}",
)
def test_a_request_that_is_lost_on_the_way_is_repeated_after_a_pause(
    pauses: list[float], error: ClientError, after: int
) -> None:
    client = Fragile(error, error, after=after)
    ask(client)
    assert client.asked == [(0, 2)] * 3 + [(2, 1)]
    assert pauses == [0.5, 1.0]


def test_a_request_that_is_lost_three_times_ends_the_command(pauses: list[float]) -> None:
    client = Fragile(*[StreamEnded("reset")] * 3)
    with pytest.raises(ConnectionLost):
        ask(client)
    assert len(client.asked) == 3


@pytest.mark.parametrize(
    "error",
    [
        ConnectionLost("the request is not valid HTTP"),
        lost(httpx.ConnectError("refused")),  # the client has repeated it for a minute
        lost(httpx.ConnectTimeout("")),
        lost(httpx.ProxyError("403")),
        UnexpectedAnswer("404 Not Found", 404),
        UnexpectedAnswer("invalid GenerateResponse"),
        refused(500),
    ],
    ids=lambda error: f"{type(error).__name__}-{error}",
)
def test_an_error_that_would_come_again_ends_the_command(error: ClientError) -> None:
    client = Fragile(error)
    with pytest.raises(type(error)):
        ask(client)
    assert len(client.asked) == 1


class Limited:
    """A client whose service refuses the second request."""

    def __init__(self, *_: object, **__: object) -> None:
        self.first = True

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None: ...

    def models(self) -> list[ModelInfo]:
        return []

    def generate(self, **fields: Any) -> GenerateResponse:
        if not self.first:
            raise refused(422)
        self.first = False
        file = base64.b64encode(encode_npz(np.zeros((1, 2, 2, 1), np.uint8), [None])).decode()
        image = GeneratedImage(
            b64_json=file, seed=7, image_index=0, class_index=None, class_=None, steps=2, queue_ms=0, compute_ms=0
        )
        timing = Timing(images_ahead=0, predicted_wait_s=0, wait_s=0, predicted_finish_s=0, finish_s=0)
        return GenerateResponse(model="m", images=[image], numerics_id="x", timing=timing)


def test_images_that_have_arrived_are_kept_if_a_later_request_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.client.Client", Limited)
    arguments = ["sample", "--url", "http://x", "-n", "2", "--at-once", "1", "--seed", "7", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["7_0.png"]


def test_a_model_that_gives_nan_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    weights = tiny_network(config).state_dict()
    weights["out.2.bias"][0] = float("nan")
    write_checkpoint(tmp_path / "nan", config, weights)
    monkeypatch.setenv("IDDPM_BACKEND", "torch")
    code, output = sample(tmp_path / "nan", "--steps", "2", "--out", str(tmp_path / "x.png"))
    assert code == 1
    assert re.search(r"error: torch .*: the network's output is not finite: ", output)


def test_the_error_for_weights_in_place_of_a_model_names_the_import_command(tmp_path: Path) -> None:
    weights = tmp_path / "ema.pt"
    weights.write_bytes(b"weights")
    code, output = sample(weights, "--out", str(tmp_path / "x.png"))
    assert code == 1
    assert output.strip().endswith("ema.pt: a model is a folder, and this is a file; iddpm import makes one of weights")
