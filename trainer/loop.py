"""train(config, ...): one run from start, or from its last checkpoint, to its end. Read it top to bottom."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.checkpoint import write_checkpoint
from diffusion.checkpoint_config import read_config
from diffusion.config import CheckpointConfig
from diffusion.images import captioned_rows
from diffusion.losses import LossTables, TrainingLosses, q_sample, training_losses
from diffusion.plans import ancestral_plan
from diffusion.respacing import respace
from diffusion.sampling import ImageSpec, sample_images
from diffusion.unet import UNet
from diffusion.update import from_uint8
from trainer import state as train_state
from trainer.config import MAY_CHANGE_ON_RESUME, TimestepSamplerName, TrainConfig
from trainer.data import Dataset, batch_indices
from trainer.ema import EMA, exponential_decay, power_decay
from trainer.provenance import git_commit
from trainer.state import TrainState
from trainer.timestep_sampler import LossSecondMomentSampler, StratifiedSampler, TimestepSampler, UniformSampler

CONFIG_FILE = "train_config.json"
LOG_FILE = "log.jsonl"
MODEL_FOLDER = "model"
EMA_FOLDER = "ema"
QUARTILES = 4
PREVIEW_ROWS = 10
TIMESTEP_SAMPLERS: dict[TimestepSamplerName, Callable[[int], TimestepSampler]] = {
    "uniform": UniformSampler,
    "stratified": StratifiedSampler,
    "loss_second_moment": LossSecondMomentSampler,
}


class TrainError(ValueError):
    """A run that cannot start or continue; the message says why."""


def train(config: TrainConfig, dataset: Dataset, run: Path, *, resume: bool = False, command: str = "") -> Path:
    """Train a model and return the folder of its finished checkpoint (`RUN/model`).

    Exactly repeatable on one machine: order, timesteps, noise, label dropout and dropout are functions of
    (config.seed, images seen), so that a resumed run equals one that was never interrupted.

    Args:
        config: as `resolve` completes it for these data.
        dataset: from `open_dataset`.
        run: the run's folder: configuration, log, sample grids, checkpoints, finished model.
        resume: continue the run that is there.
        command: for the provenance.

    Raises:
        TrainError: a run is already there, or none to resume, or it had another configuration or other data.
        DataError: data that cannot be trained on.
    """
    _claim(run, config, dataset, resume=resume)
    num_images = len(dataset.labels)

    # Network, optimiser, averages
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = _use_bfloat16(config, device)
    torch.manual_seed(config.seed)
    network = UNet(config.model).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    process = respace(config.diffusion)
    tables = LossTables.from_process(process, device)
    model_t = torch.from_numpy(process.model_t).to(device)
    timestep_sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](process.num_steps)
    ema = EMA(network, exponential_decay(config.ema_decay, warmup=config.ema_warmup))
    power_emas = {sigma_rel: EMA(network, power_decay(sigma_rel)) for sigma_rel in config.ema_sigma_rels}
    state = TrainState(network, optimizer, ema, timestep_sampler, power_emas)
    if resume:
        _resume(state, run)

    # Train
    batches = 0
    window = Window()
    bar = tqdm(total=config.total_images, initial=state.images_seen, unit="img", dynamic_ncols=True, smoothing=0.05)
    while state.images_seen < config.total_images:
        # Draw: a function of the seed and the position in the run, of nothing else
        rng = np.random.default_rng((config.seed, 1, state.images_seen))
        torch.manual_seed(int(rng.integers(2**63)))
        indices = batch_indices(config.seed, state.images_seen, config.batch_size, num_images)
        x0 = torch.from_numpy(from_uint8(dataset.images(indices)))
        if config.horizontal_flip:
            mirrored = torch.from_numpy(rng.random(len(x0)) < 0.5)
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
        y = _labels(config, dataset, indices, rng)
        t, weights = timestep_sampler.sample(rng, config.batch_size)
        noise = torch.randn(x0.shape)

        # Accumulate the gradient of the batch's mean
        optimizer.zero_grad(set_to_none=True)
        size = config.microbatch_size or config.batch_size
        parts: list[TrainingLosses] = []
        for start in range(0, config.batch_size, size):
            rows = slice(start, start + size)
            part_t, part_x0 = torch.from_numpy(t[rows]).to(device), x0[rows].to(device)
            part_noise, part_weights = noise[rows].to(device), torch.from_numpy(weights[rows]).to(device)
            x_t = q_sample(tables, part_x0, part_t, part_noise)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                output = network(x_t, model_t[part_t], None if y is None else y[rows].to(device))
            losses = training_losses(
                tables,
                config.diffusion,
                output,
                part_x0,
                x_t,
                part_noise,
                part_t,
                loss=config.loss,
                rescale=config.rescale_vlb,
                min_snr_gamma=config.min_snr_gamma,
            )
            ((losses.loss * part_weights).sum() / config.batch_size).backward()  # type: ignore[no-untyped-call]
            parts.append(TrainingLosses(*(term.detach().cpu() for term in losses)))
        batch = TrainingLosses(*(torch.cat(terms) for terms in zip(*parts, strict=True)))
        timestep_sampler.update(t, batch.loss.double().numpy())

        # Step
        grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
        if not torch.isfinite(grad_norm):
            raise TrainError(f"the gradient is not finite after {state.images_seen} images; lower lr, or use float32")
        lr = learning_rate(config, state.images_seen)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        state.average_in()
        state.images_seen += config.batch_size
        batches += 1

        # Report
        bar.update(config.batch_size)
        window.add(batch, t, float(grad_norm), process.num_steps)
        if batches % config.log_every_batches == 0:
            line = {"images": state.images_seen, "lr": lr, **window.summary()}
            bar.set_postfix(loss=line["loss"], mse=line["mse"], vb_bpd=line["vb_bpd"])
            with (run / LOG_FILE).open("a") as log:
                log.write(json.dumps(line) + "\n")
            window = Window()

        # Checkpoint
        done = state.images_seen >= config.total_images
        if done or state.images_seen // config.checkpoint_every_images > (
            (state.images_seen - config.batch_size) // config.checkpoint_every_images
        ):
            described = checkpoint_config(config, dataset, state.images_seen, command, bfloat16)
            write_checkpoint(run / MODEL_FOLDER, described, state.ema.weights)  # first: a state implies a model
            train_state.save(state, train_state.checkpoint_folder(run, state.images_seen), described)
            train_state.delete_old(run, config.keep_checkpoints)
            if state.power_emas:
                train_state.save_ema_snapshot(state, run / EMA_FOLDER / f"{state.images_seen:012d}.safetensors")
            if config.preview_per_class:
                _write_preview(config, described, state, run)
    bar.close()
    return run / MODEL_FOLDER


def resolve(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Fill in what the data determines: the number of classes, and the null class that label dropout needs."""
    classes = len(dataset.class_names) if config.class_conditional else None
    null_class = classes is not None and config.label_dropout > 0
    model = config.model.replace(num_classes=classes, null_class=null_class)
    model = model.replace(learn_sigma=config.diffusion.learns_variance)
    sampling = config.sampling if null_class else config.sampling.replace(cfg_scale=1.0)
    return config.replace(model=model.model_dump(), sampling=sampling.model_dump())


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Return the learning rate of the step that follows that many images."""
    warmup = min(1.0, (images_seen + config.batch_size) / max(1, config.lr_warmup_images))
    progress = (images_seen - config.lr_warmup_images) / max(1, config.total_images - config.lr_warmup_images)
    progress = min(1.0, max(0.0, progress))
    match config.lr_schedule:
        case "constant":
            decay = 1.0
        case "linear":
            decay = 1 - progress
        case "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * progress))
        case "inverse_sqrt":
            decay = math.sqrt(config.lr_decay_images / max(config.lr_decay_images, images_seen))
    return config.lr * warmup * decay


def checkpoint_config(
    config: TrainConfig, dataset: Dataset, images_seen: int, command: str, bfloat16: bool
) -> CheckpointConfig:
    """Describe the model as its checkpoint will, with where it comes from."""
    return CheckpointConfig(
        model=config.model,
        diffusion=config.diffusion,
        class_names=dataset.class_names if config.class_conditional else None,
        sampling=config.sampling,
        provenance={
            "images_seen": images_seen,
            "command": command,
            "commit": git_commit(),
            "data": dataset.description,
            "precision": "bfloat16" if bfloat16 else "float32",
            "torch": torch.__version__,
            "train_config": config.model_dump(mode="json", exclude={"model", "diffusion", "sampling"}),
        },
    )


class Window:
    """Means of the loss terms since the last log line, whole and per quartile of the timesteps."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._rows: list[Tensor] = []
        self._grad_norms: list[float] = []

    def add(self, batch: TrainingLosses, t: np.ndarray[Any, Any], grad_norm: float, num_steps: int) -> None:
        """Take in one batch."""
        quartile = torch.from_numpy(t * QUARTILES // num_steps).float()
        self._rows.append(torch.stack([*batch, quartile]))
        self._grad_norms.append(grad_norm)

    def summary(self) -> dict[str, float]:
        """Return the means, rounded for reading, and the speed."""
        *terms, quartile = torch.cat(self._rows, dim=1)
        values = {name: term.mean().item() for name, term in zip(TrainingLosses._fields, terms, strict=True)}
        mse = terms[TrainingLosses._fields.index("mse")]
        for q in range(QUARTILES):
            if (here := quartile == q).any():
                values[f"mse_q{q}"] = mse[here].mean().item()
        values["grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        values["images_per_second"] = quartile.numel() / (time.perf_counter() - self._started)
        return {name: float(f"{value:.5g}") for name, value in values.items()}


def preview(
    network: UNet, config: CheckpointConfig, per_class: int, steps: int, device: torch.device | None = None
) -> Any:
    """Draw a captioned grid of samples, each class a row; always the same seeds, so that grids can be compared."""
    plan = ancestral_plan(config.diffusion, str(steps))
    names: Sequence[str] = config.class_names[:PREVIEW_ROWS] if config.class_names else [""] * PREVIEW_ROWS
    rows = []
    for index, name in enumerate(names):
        class_index = None if config.model.num_classes is None else index
        specs = [
            ImageSpec(seed=k, class_index=class_index, cfg_scale=config.sampling.cfg_scale)
            if config.class_names
            else ImageSpec(seed=k + index * per_class)
            for k in range(per_class)
        ]
        rows.append((name, sample_images(network, plan, specs, device=device)))
    return captioned_rows(rows)


def _write_preview(config: TrainConfig, described: CheckpointConfig, state: TrainState, run: Path) -> None:
    try:
        device = next(iter(state.ema.weights.values())).device
        network = UNet(config.model).to(device).eval()
        network.load_state_dict(state.ema.weights)
        folder = run / "samples"
        folder.mkdir(exist_ok=True)
        picture = preview(network, described, config.preview_per_class, config.preview_steps, device)
        picture.save(folder / f"{state.images_seen:012d}.png")
    except Exception as error:  # memory, disk, a font: the checkpoint is written, and the run is worth more
        reason = str(error) or type(error).__name__
        tqdm.write(f"warning: no sample grid after {state.images_seen} images: {reason}", file=sys.stderr)


def _claim(run: Path, config: TrainConfig, dataset: Dataset, *, resume: bool) -> None:
    """Take a folder for a run that may begin there, or go on; nothing is written before all is known to fit."""
    path = run / CONFIG_FILE
    if not resume:
        if train_state.checkpoints(run):
            raise TrainError(f"{run} already holds a run; give another --out, or --resume to continue it")
        run.mkdir(parents=True, exist_ok=True)
        (run / LOG_FILE).unlink(missing_ok=True)  # of one that ended before its first checkpoint
    else:
        if not train_state.checkpoints(run):
            raise TrainError(f"{run} holds no checkpoint to resume from")
        before = TrainConfig.model_validate_json(path.read_text())
        if changed := sorted(set(config.changed_fields(before)) - MAY_CHANGE_ON_RESUME):
            raise TrainError(
                f"{run} was started with other values of {', '.join(changed)}; "
                f"a resumed run may change {', '.join(sorted(MAY_CHANGE_ON_RESUME))} only"
            )
        trained_on = read_config(train_state.checkpoints(run)[-1]).provenance.get("data")
        if trained_on != dataset.description:
            raise TrainError(f"{run} was trained on {trained_on}; this is {dataset.description}")
    _replace(path, config.model_dump_json(indent=2) + "\n")


def _resume(state: TrainState, run: Path) -> None:
    """Go back to the last checkpoint; the log must end where it does."""
    train_state.restore(state, train_state.checkpoints(run)[-1])
    log = run / LOG_FILE
    if log.exists():
        lines = log.read_text().splitlines(keepends=True)
        _replace(log, "".join(line for line in lines if _images_of(line) <= state.images_seen))


def _images_of(line: str) -> float:
    """Return the images seen by a line of the log; infinitely many by one that was torn when the machine stopped."""
    try:
        return float(json.loads(line)["images"])
    except ValueError:
        return math.inf


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    temporary.rename(path)


def _labels(
    config: TrainConfig, dataset: Dataset, indices: np.ndarray[Any, Any], rng: np.random.Generator
) -> Tensor | None:
    if config.model.num_classes is None:
        return None
    labels = dataset.labels[indices]
    if config.model.null_class:
        labels = np.where(rng.random(len(labels)) < config.label_dropout, config.model.num_classes, labels)
    return torch.from_numpy(labels)


def _use_bfloat16(config: TrainConfig, device: torch.device) -> bool:
    if config.precision != "auto":
        return config.precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
