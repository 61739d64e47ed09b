"""The base install has no torch: the service and the sampling core must work without it."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np

from diffusion.plans import build_plan
from diffusion.sampling import ImageSpec, sample_images
from tests.denoisers import AsNetwork, ExactDenoiser
from tests.fakes import tiny_checkpoint, tiny_config
from tests.waiting import PATIENCE_S

HIDE_TORCH = """
import sys
sys.modules["torch"] = None  # from now on importing it fails as if it were not installed
"""


def without_torch(code: str) -> str:
    """Run code in a Python without torch; return its output."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", HIDE_TORCH + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_service_gives_the_images_of_the_one_image_sampler() -> None:
    config = tiny_config()
    output = without_torch(f"""
        import asyncio
        import base64
        from pathlib import Path

        import httpx
        from diffusion.config import CheckpointConfig
        from service.http.app import assemble
        from service.settings import Settings
        from tests.denoisers import ExactDenoiser

        config = CheckpointConfig.model_validate_json({config.model_dump_json()!r})
        app = assemble(Settings(models=(Path("exact"),)), {{"exact": ExactDenoiser(config)}})

        async def ask():
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
            ):
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.01)
                body = {{"class": ["Bee", "Cat"], "steps": 5, "seed": 3, "cfg_scale": 2.0}}
                answer = await client.post("/v1/generate", json=body, headers={{"Accept": "application/x-npz"}})
                print(answer.status_code, base64.b64encode(answer.content).decode())

        asyncio.run(ask())
    """)
    status, encoded = output.split()
    assert status == "200"
    with np.load(io.BytesIO(base64.b64decode(encoded)), allow_pickle=False) as arrays:
        pixels = arrays["arr_0"]

    plan = build_plan(config.diffusion, "ancestral", "5")
    specs = [ImageSpec(seed=3, image_index=k, class_index=1 + k, cfg_scale=2.0) for k in range(2)]
    expected = sample_images(AsNetwork(ExactDenoiser(config)), plan, specs, xp=np)
    np.testing.assert_array_equal(pixels, expected)
    assert len(np.unique(pixels)) > 10


def test_a_chain_runs_on_numpy_arrays() -> None:
    output = without_torch("""
        import numpy as np
        from diffusion.config import DiffusionConfig
        from diffusion.noise import STREAM_STEP, STREAM_X_T, normal
        from diffusion.plans import build_plan
        from diffusion.update import sample_loop, to_uint8

        def noise(step, stream=STREAM_STEP):
            row = np.zeros(1, dtype=np.int64)
            return normal(row, row, row + step, stream, (1, 4, 4))

        plan = build_plan(DiffusionConfig(), "ancestral", "3")
        x = sample_loop(lambda x_t, t: x_t, plan, noise(0, STREAM_X_T), noise)
        print(x.dtype, to_uint8(x).shape)
    """)
    assert output.split() == ["float32", "(1,", "4,", "4,", "1)"]


def test_a_checkpoint_s_config_can_be_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny")
    output = without_torch(f"""
        from pathlib import Path
        from formats.checkpoint_config import checkpoint_sha256, read_config

        folder = Path({str(folder)!r})
        print(read_config(folder).model.image_size, len(checkpoint_sha256(folder)))
    """)
    assert output.split() == ["8", "64"]


def test_the_error_for_serving_a_checkpoint_has_the_command_to_install_torch(tmp_path: Path) -> None:
    output = without_torch(f"""
        from pathlib import Path
        from service.http.app import create_app
        from service.errors import ModelError
        from service.settings import Settings

        try:
            create_app(Settings(models=(Path({str(tmp_path)!r}),), backend="torch"))
        except ModelError as error:
            print(error)
    """)
    assert output.startswith("backend 'torch' needs torch, which is not installed: pip install -c constraints.txt -e ")


def test_the_command_line_starts() -> None:
    assert without_torch("import cli.main; print('started')").strip() == "started"


def test_a_load_needs_no_torch() -> None:
    assert (
        without_torch("import cli.bench_command, cli.load.progress, cli.load.run; print('imported')").strip()
        == "imported"
    )
