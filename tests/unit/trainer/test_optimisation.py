"""Precision, memory and waiting: what changes how a step is computed, and not what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from formats.checkpoint import load_unet
from tests.unit.trainer.test_batches import batches
from tests.unit.trainer.test_resume import train, write_npz
from tests.unit.trainer.test_trainer import tiny, weights
from trainer.batches import Batch, Batches
from trainer.config import TrainConfig
from trainer.data import open_dataset
from trainer.ema import EMA, exponential_decay
from trainer.errors import TrainError
from trainer.log import Window
from trainer.loop import resolve
from trainer.objective import objective_of
from trainer.optimisation import Optimisation
from trainer.ranks import OneProcess
from trainer.run_folder import checkpoints
from trainer.timestep_sampler import LossSecondMomentSampler

DEEP = {
    **tiny().model.model_dump(), "channel_mult": (1, 2), "attention_resolutions": (4,), "resblock_updown": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("optimisation") / "toy.npz")


def gradient(config: TrainConfig, npz: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    dataset = open_dataset(npz, 8, 1)
    config = resolve(config, dataset)
    torch.manual_seed(0)
    objective = objective_of(config, "cpu")
    network = objective.build().train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # no layer is zero
    optimisation = Optimisation(config, objective, network, OneProcess("cpu"))
    losses = optimisation.gradient(batches(config, dataset).draw(4))
    grads = {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(network.parameters()))
    return losses, grads


def test_gradient_checkpointing_gives_the_same_gradient(npz: Path) -> None:
    config = tiny(model=DEEP)  # with dropout
    plain, recomputed = gradient(config, npz), gradient(config.replace(use_checkpoint=True), npz)
    for name, tensor in {**plain[0], **plain[1]}.items():
        assert torch.equal({**recomputed[0], **recomputed[1]}[name], tensor), name


def test_channels_last_gives_the_same_gradient_but_for_rounding(npz: Path) -> None:
    config = tiny(model={**DEEP, "dropout": 0.0})
    plain, last = gradient(config, npz)[1], gradient(config.replace(channels_last=True), npz)[1]
    largest = max(float(tensor.abs().max()) for tensor in plain.values())
    for name, tensor in plain.items():
        assert torch.allclose(last[name], tensor, rtol=1e-3, atol=1e-5 * largest), name


def test_the_gradient_of_bfloat16_is_close_to_that_of_float32(npz: Path) -> None:
    """bfloat16 has a precision of 2^-8 = 0.4 %, and the layers add their errors up.

    The limits are of direction (cosine) and size, of the whole gradient and of each tensor. They hold with the
    processor's own bfloat16 (AMX) and with its emulation (ONEDNN_MAX_CPU_ISA=AVX2), which sum in other orders.
    """
    config = tiny(model={**DEEP, "dropout": 0.0})
    plain, low = (gradient(config.replace(precision=precision), npz)[1] for precision in ("float32", "bfloat16"))
    assert all(tensor.dtype == torch.float32 for tensor in low.values())
    assert not all(torch.equal(tensor, low[name]) for name, tensor in plain.items())

    def flat(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()

    def agreement(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
        return float(torch.cosine_similarity(mine, theirs, dim=0)), float(mine.norm() / theirs.norm())

    cosine, ratio = agreement(flat(low), flat(plain))
    assert cosine > 0.9995
    assert ratio == pytest.approx(1, abs=0.01)
    size = flat(plain).norm()
    for name, theirs in plain.items():
        if theirs.norm() > 1e-4 * size:  # a bias before a normalisation of single channels has no gradient but rounding
            cosine, ratio = agreement(low[name].flatten(), theirs.flatten())
            assert cosine > 0.995, name
            assert ratio == pytest.approx(1, abs=0.03), name


def test_a_compiled_network_trains_as_the_plain_one(npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Forward and backward passes are traced as by default, but run without code generation, which takes minutes
    compile_module = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    config = tiny(
        compile=True, preview_per_class=0, log_every_batches=1, total_images=12, timestep_sampler="uniform",
        model={**tiny().model.model_dump(), "dropout": 0.0},
    )  # fmt: skip
    counters.clear()
    train(config.replace(compile=False), npz, tmp_path / "plain")
    assert not counters["stats"]["unique_graphs"]
    train(config.replace(total_images=8), npz, tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] > 0
    model = train(config, npz, tmp_path / "compiled", resume=True)
    plain, lines = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "compiled")
    )
    for name in ("images", "loss", "mse", "vb_bpd", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in plain], rel=1e-3), name
    expected = weights(checkpoints(tmp_path / "plain")[-1])
    found = weights(checkpoints(tmp_path / "compiled")[-1])
    assert found.keys() == expected.keys()  # without `_orig_mod.`
    assert load_unet(model)[0].provenance["images_seen"] == 12


def test_the_gradient_noise_is_estimated_from_the_first_micro_batch_and_the_batch(npz: Path, tmp_path: Path) -> None:
    config = tiny(
        microbatch_size=2, timestep_sampler="uniform", preview_per_class=0, log_every_batches=1, total_images=8
    )
    dataset = open_dataset(npz, 8, 1)
    config = resolve(config, dataset)
    torch.manual_seed(0)
    objective = objective_of(config, "cpu")
    network = objective.build().train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimisation = Optimisation(config, objective, network, OneProcess("cpu"))
    assert (optimisation.micro_batch, optimisation.micro_norm) == (2, None)
    batch = batches(config, dataset).draw(4)
    optimisation.gradient(batch)
    micro_norm = optimisation.micro_norm
    assert micro_norm is not None
    optimisation.gradient(batch.rows(slice(0, 2)))  # the mean gradient of the first micro-batch
    torch.testing.assert_close(micro_norm, optimisation.step(0.0))

    train(config, npz, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:  # E |G_B|^2 = |G|^2 + tr(Sigma) / B
        assert line["gradient_squared"] + line["noise_trace"] / 4 == pytest.approx(line["grad_norm"] ** 2, rel=1e-3)
    plain = train(config.replace(timestep_sampler="stratified"), npz, tmp_path / "plain")
    assert "noise_trace" not in (plain.parent / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    "changes",
    [{"microbatch_size": None}, {"timestep_sampler": "stratified"}, {"precision": "float16"}],
)
def test_the_gradient_noise_is_not_estimated_where_it_cannot_be(npz: Path, changes: dict[str, Any]) -> None:
    config = resolve(tiny(**{"microbatch_size": 2, "timestep_sampler": "uniform", **changes}), open_dataset(npz, 8, 1))
    objective = objective_of(config, "cpu")
    assert Optimisation(config, objective, objective.build(), OneProcess("cpu")).micro_batch is None


def test_a_line_of_the_log_has_unbiased_estimates_of_the_gradient_noise() -> None:
    window = Window((), noise_of=(2, 8))
    zeros = torch.zeros(3)
    for grad_norm, micro_norm in ((1.0, 2.0), (3.0, 4.0)):
        window.add({"loss": zeros}, zeros.long(), torch.tensor(grad_norm), 10, torch.tensor(micro_norm))
    summary = window.summary()
    assert summary["noise_trace"] == pytest.approx((10 - 5) / (1 / 2 - 1 / 8), rel=1e-4)
    assert summary["gradient_squared"] == pytest.approx((8 * 5 - 2 * 10) / 6, rel=1e-4)


def test_a_line_of_the_log_weighs_losses_by_their_timesteps() -> None:
    """As OpenAI's log: the mean over timesteps that were drawn with other probabilities is that over all of them."""
    window = Window(("loss",))
    one, t = torch.ones(()), torch.tensor([0, 0, 0, 9])
    losses, importance = torch.tensor([8.0, 10.0, 12.0, 2.0]), torch.tensor([0.5, 0.5, 1.0, 2.0])
    window.add({"loss": losses}, t, one, 10, weights=importance)
    summary = window.summary()
    assert summary["loss"] == (4 + 5 + 12 + 4) / 4
    assert (summary["loss_q0"], summary["loss_q3"]) == (21 / 2, 2.0)


def test_a_float16_run_resumes_with_its_loss_scale(npz: Path, tmp_path: Path) -> None:
    config = tiny(precision="float16", preview_per_class=0)
    train(config, npz, tmp_path / "whole")
    train(config.replace(total_images=20), npz, tmp_path / "halves")
    saved = json.loads((checkpoints(tmp_path / "halves")[-1] / "state" / "progress.json").read_text())
    assert saved["scaler"]["scale"] > 0
    train(config, npz, tmp_path / "halves", resume=True)
    whole, halves = (weights(checkpoints(tmp_path / name)[-1]) for name in ("whole", "halves"))
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


def test_a_float16_step_that_overflows_is_skipped(npz: Path) -> None:
    config = resolve(tiny(precision="float16"), open_dataset(npz, 8, 1))
    objective = objective_of(config, "cpu")
    network = objective.build().train()
    optimisation = Optimisation(config, objective, network, OneProcess("cpu"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimisation.gradient(batches(config, open_dataset(npz, 8, 1)).draw(0))
    next(network.parameters()).grad.fill_(torch.inf)  # type: ignore[union-attr]
    scale = optimisation.scaler.get_scale()
    assert not torch.isfinite(optimisation.step(1.0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert optimisation.scaler.get_scale() == scale / 2


def with_loss_scale(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    scaler = partial(torch.amp.GradScaler, init_scale=scale)
    monkeypatch.setattr("trainer.optimisation.torch.amp.GradScaler", scaler)


def test_a_line_of_skipped_float16_steps_only_is_no_divergence(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_loss_scale(monkeypatch, 2.0**40)  # overflows float16 until it was halved often enough
    train(tiny(precision="float16", log_every_batches=1, total_images=160, preview_per_class=0), npz, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert "grad_norm" not in lines[0]
    assert lines[-1]["grad_norm"] > 0


@pytest.mark.parametrize("spoiled", ["gradient", "weight"])
def test_a_float16_run_that_diverges_ends(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    gradient = Optimisation.gradient

    def diverged(self: Optimisation, batch: Batch) -> dict[str, Tensor]:
        weight = next(self.network.parameters())
        if spoiled == "weight":
            weight.data.fill_(torch.nan)
        losses = gradient(self, batch)
        assert weight.grad is not None
        weight.grad.fill_(torch.inf)
        return losses

    with_loss_scale(monkeypatch, 4.0)
    monkeypatch.setattr(Optimisation, "gradient", diverged)
    config = tiny(precision="float16", log_every_batches=1, preview_per_class=0)
    with pytest.raises(TrainError, match=rf"diverged after {12 if spoiled == 'gradient' else 4} images.*not finite"):
        train(config, npz, tmp_path / "run")


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_steps_with_equal_gradients_do_not_depend_on_the_number_of_threads(npz: Path, precision: str) -> None:
    config = resolve(tiny(precision=precision, grad_clip=0.1), open_dataset(npz, 8, 1))
    objective = objective_of(config, "cpu")
    before = torch.get_num_threads()
    stepped = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            optimisation = Optimisation(config, objective, objective.build(), OneProcess("cpu"))
            optimisation.scaler.scale(torch.ones(()))  # float16: as the backward pass does
            for step in range(3):
                for number, parameter in enumerate(optimisation.network.parameters()):
                    generator = torch.Generator().manual_seed(1000 * step + number)
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimisation.step(1e-3)
            stepped.append([parameter.detach() for parameter in optimisation.network.parameters()])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*stepped, strict=True))


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the copies from host memory to a device, and whether each makes the host wait."""

    def __init__(self, pinned: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pinned = pinned
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        source = args[1] if str(func) == "aten.copy_.default" else args[0] if args else None
        if "copy" in str(func) and isinstance(source, Tensor) and source.device.type == "cpu" != result.device.type:
            asynchronous = bool((kwargs or {}).get("non_blocking")) or args[2:3] == (True,)
            self.waits.append(not (asynchronous and any(source is tensor for tensor in self._pinned)))
        return result


@pytest.mark.parametrize("pairs", [False, True])
def test_no_copy_to_the_device_makes_the_host_wait(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: bool
) -> None:
    """The device `meta` stands for a GPU: its tensors have no values, and copies to it are made by the same calls."""
    if pairs:
        npz = tmp_path / "pairs.npz"
        images = np.zeros((8, 8, 8, 1), np.uint8)
        np.savez(npz, images=images, cond=images, labels=np.zeros(8, np.int64))
    pinned: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        if not any(tensor is known for known in pinned):
            pinned.append(tensor.clone())
            return pinned[-1]
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    dataset = open_dataset(npz, 8, 1, cond_channels=int(pairs))
    config = resolve(tiny(model={**DEEP, "cond_channels": int(pairs)}, timestep_sampler="loss_second_moment"), dataset)
    source = Batches(config, dataset, LossSecondMomentSampler(config.diffusion.num_timesteps), "meta")
    with Copies(pinned) as copies:
        batch = source.draw(4)
        assert {tensor.device.type for tensor in (batch.x0, batch.t, batch.weights, batch.noise)} == {"meta"}
        assert copies.waits == [False] * (7 if pairs else 6)  # images, labels, t, weights, two words of the noise's key
        torch.zeros(2).to("meta")
        assert copies.waits[-1]  # it is counted


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in ("aten._local_scalar_dense.default", "aten.nonzero.default")
        return func(*args, **(kwargs or {}))


def test_steps_wait_for_the_device_only_when_a_line_of_the_log_is_due(npz: Path) -> None:
    dataset = open_dataset(npz, 8, 1)
    config = resolve(tiny(model=DEEP, microbatch_size=2, timestep_sampler="uniform", grad_clip=1.0), dataset)
    objective = objective_of(config, "cpu")
    network = objective.build().train()
    optimisation = Optimisation(config, objective, network, OneProcess("cpu"))
    ema, window = EMA(network, exponential_decay(0.9, warmup=True)), Window(noise_of=(2, 4))
    source = batches(config, dataset)
    drawn = [source.draw(first) for first in (0, 4, 8)]
    with Waits() as waits:
        for batch in drawn:
            losses = optimisation.gradient(batch)
            window.add(losses, batch.t, optimisation.step(1e-3), objective.num_steps, optimisation.micro_norm)
            ema.update(network.state_dict())
        rows = window.rows()
        assert waits.count == 0
        window.summary(rows)
        assert waits.count > 0  # it is counted


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_held_out_images_are_not_trained_on_and_end_an_overfitted_run(
    npz: Path, tmp_path: Path, precision: str
) -> None:
    run = tmp_path / "run"
    config = tiny(
        precision=precision, preview_per_class=0, total_images=400, validation_share=0.25, validation_every_images=8,
        stop_after_worse=2, ema_decay=0.0, lr=0.05, checkpoint_every_images=1000,
    )  # fmt: skip
    model = train(config, npz, run)
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3  # two worse ones in a row
    assert {"images", "loss", "mse", "vb_bpd", "mse_q0"} <= lines[0].keys()
    assert json.loads((model / "config.json").read_text())["provenance"]["images_seen"] == lines[-1]["images"]
    assert json.loads((run / "best" / "config.json").read_text())["provenance"]["images_seen"] == lines[best]["images"]
