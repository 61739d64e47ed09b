"""The Triton kernel of the noise, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.noise import MAX_IMAGE_INDEX, MAX_SEED, MAX_WORD, STREAM_STEP, STREAM_X_T, normal, unchecked_normal
from service.backends import triton_noise
from service.backends.cuda_queue import fastest_normal
from service.backends.triton_noise import triton_normal
from service.engine.config import EngineConfig
from service.engine.request import ImageStep
from service.engine.runners.array_runner import ArrayRunner
from tests.counts import LONG
from tests.fakes import params, tiny_config
from tests.late_queue import QueuedDenoiser
from tests.paths import ROOT


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 1, 1), (3, 5, 7)])
@pytest.mark.parametrize("stream", [STREAM_X_T, STREAM_STEP])
def test_equals_the_noise_of_all_devices(shape: tuple[int, int, int], stream: int) -> None:
    seeds = torch.tensor([0, 1, 2**31, 2**32 + 5, MAX_SEED])
    image_indices = torch.tensor([0, 7, 2**31, MAX_IMAGE_INDEX, 1])
    steps = torch.tensor([3, 0, MAX_WORD, 2**31 + 1, 999])
    found = triton_normal(seeds, image_indices, steps, stream, shape)
    assert torch.equal(found, normal(seeds, image_indices, steps, stream, shape))


def test_reads_columns_of_a_block_of_numbers() -> None:
    words = torch.arange(40).reshape(4, 10)
    seeds, image_indices, steps = words[:, 2], words[:, 3], words[:, 1]
    found = triton_normal(seeds, image_indices, steps, STREAM_STEP, (1, 4, 4))
    assert torch.equal(found, normal(seeds, image_indices, steps, STREAM_STEP, (1, 4, 4)))


def test_the_kernel_is_used_if_it_gives_the_noise_of_all_devices(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = torch.device("cpu")
    assert fastest_normal(device) is triton_normal
    assert not caplog.messages
    monkeypatch.setattr(triton_noise, "triton_normal", lambda *a: triton_normal(*a) + 1e-5)
    assert fastest_normal(device) is unchecked_normal
    monkeypatch.setitem(sys.modules, "service.backends.triton_noise", None)
    assert fastest_normal(device) is unchecked_normal
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "noise is generated without Triton, more slowly"
    ] * 2


def test_a_step_uses_the_noise_of_its_queue() -> None:
    network = QueuedDenoiser(tiny_config(), batch_sizes=(1, 2))
    network.queue.lacks_memory_after = 0  # PyTorch does not see the kernel: it cannot be recorded as in a graph
    network.queue.normal = triton_normal
    network.queue.fuse = lambda work: partial(work, normal=triton_normal)  # type: ignore[method-assign]
    images = []
    for denoiser in (network, QueuedDenoiser(tiny_config(), batch_sizes=(1, 2))):
        runner = ArrayRunner(denoiser, EngineConfig(max_rows=2, slots_per_row=1, timed_calls=0))
        runner.warm_up()
        for step in range(3):
            taken = [ImageStep(slot=1, params=params(steps=3, seed=5), step=step)]
            if step == 0:
                runner.start(taken)
            assert runner.launch(taken).wait() == [True]
        images.append(runner.read([1]).wait())
    np.testing.assert_array_equal(images[0], images[1])


@pytest.mark.skipif(not LONG, reason="compiles for about a minute")
def test_all_kernels_compile_for_gpus(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert [found.stdout.count(f"\n{architecture} ") for architecture in (90, 120)] == [11, 11]


def test_the_triton_code_of_the_fused_update_gives_the_same_noise(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.interpret_update"],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    noise, x_prev = map(float, found.stdout.split())
    assert noise == 0
    assert x_prev < 1e-6
