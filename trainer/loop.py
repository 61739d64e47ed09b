"""train(config, ...): run training from the start, or from the newest checkpoint, to the end."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.config import CheckpointConfig
from diffusion.losses import LossTables, TrainingLosses, q_sample, training_losses
from diffusion.respacing import respace
from diffusion.unet import UNet
from diffusion.update import from_uint8
from formats.atomic_file import write_file
from formats.checkpoint import write_checkpoint
from formats.checkpoint_config import CheckpointError, read_config
from trainer import state as train_state
from trainer.config import TimestepSamplerName, TrainConfig
from trainer.data import DataError, Dataset, batch_indices
from trainer.ema import EMA, exponential_decay, power_decay
from trainer.errors import Stopped, TrainError
from trainer.log import Window, append_line, cut_log
from trainer.preview import write_preview
from trainer.provenance import git_commit
from trainer.resume import Origin, find_origin, recovery_hint
from trainer.run_folder import (
    EMA_FOLDER,
    LOG_FILE,
    MODEL_FOLDER,
    SAMPLES_FOLDER,
    TRAIN_CONFIG_FILE,
    checkpoint_folder,
    checkpoints,
    claimed,
    delete_old,
    ema_snapshot_file,
    say,
    warn,
)
from trainer.state import SavedState, TrainState
from trainer.timestep_sampler import LossSecondMomentSampler, StratifiedSampler, TimestepSampler, UniformSampler

MAX_MSE = 100.0
"""Mean squared error of the prediction above which a network counts as diverged; predicting zeros gives about 1."""
SAFE_LR = 1e-4
"""The paper's learning rate, at which these networks hardly ever diverge."""
TIMESTEP_SAMPLERS: dict[TimestepSamplerName, Callable[[int], TimestepSampler]] = {
    "uniform": UniformSampler,
    "stratified": StratifiedSampler,
    "loss_second_moment": LossSecondMomentSampler,
}


def train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    resume: bool = False,
    command: str = "",
    accept_changed_data: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train a model and return the folder of its finished checkpoint (`RUN/model`).

    Deterministic on one machine: order, timesteps, noise, label dropout and dropout are functions of
    (config.seed, images seen), so that a resumed run is bit-identical to an uninterrupted one.

    Args:
        config: completed by `resolve` for these data.
        dataset: from `open_dataset`.
        run: the run folder: configuration, log, sample grids, checkpoints, finished model.
        resume: continue the run in the folder.
        command: recorded in the provenance.
        accept_changed_data: resume although the data differ from those of the checkpoint.
        stop: called after each batch; True ends the run with a checkpoint.

    Raises:
        TrainError: the folder is in use, or its run cannot be resumed with these arguments; the run diverged; a
            checkpoint cannot be written; an image cannot be read. The progress until then is saved, except in a
            diverged run.
        DataError: an image cannot be read before the first batch was trained.
        Stopped: `stop` returned True.
    """
    _refuse_distributed()
    with claimed(run, resume=resume):
        return _train(config, dataset, run, resume, command, accept_changed_data, stop)


def _train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    resume: bool,
    command: str,
    accept_changed_data: bool,
    stop: Callable[[], bool],
) -> Path:
    saved, origin = None, None
    if resume:
        saved, origin = find_origin(run, config, dataset, accept_changed_data=accept_changed_data)

    # Network, optimiser, averages
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bfloat16 = _use_bfloat16(config, device)
    torch.manual_seed(config.seed)
    network = UNet(config.model).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    process = respace(config.diffusion)
    tables = LossTables.from_process(process, device)
    t_model = torch.from_numpy(process.t_model).to(device)
    timestep_sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](process.num_steps)
    ema = EMA(network, exponential_decay(config.ema_decay, warmup=config.ema_warmup))
    power_emas = {sigma_rel: EMA(network, power_decay(sigma_rel)) for sigma_rel in config.ema_sigma_rels}
    state = TrainState(network, optimizer, ema, timestep_sampler, power_emas)
    if saved is not None and origin is not None:
        train_state.restore(state, saved)
        _update_model(run, saved)
        say(f"continuing after {state.images_seen} images{origin.description}")
    del saved  # frees memory of the size of the network and its optimiser
    _begin_files(run, config, state.images_seen)
    if config.total_images < config.lr_warmup_images:
        warn(
            f"the run ends after {config.total_images} images, before the learning rate has risen to lr: that takes "
            f"lr_warmup_images, {config.lr_warmup_images}"
        )

    def losses_of(batch: Batch, rows: slice) -> TrainingLosses:
        t, x0, noise = (part[rows].to(device) for part in (batch.t, batch.x0, batch.noise))
        x_t = q_sample(tables, x0, t, noise)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            output = network(x_t, t_model[t], None if batch.y is None else batch.y[rows].to(device))
        return training_losses(
            tables,
            config.diffusion,
            output,
            x0,
            x_t,
            noise,
            t,
            loss=config.loss,
            rescale=config.rescale_vlb,
            min_snr_gamma=config.min_snr_gamma,
        )

    def save(last: Batch) -> CheckpointConfig:
        with torch.no_grad():
            mse = float(losses_of(last, slice(0, micro)).mse.mean())
        if problem := _unusable(state, mse):
            raise _diverged(problem, config, state.images_seen, run, bfloat16)
        described = checkpoint_config(config, dataset, state.images_seen, command, bfloat16, origin)
        try:
            train_state.save(state, checkpoint_folder(run, state.images_seen), described)
            write_checkpoint(run / MODEL_FOLDER, described, state.ema.weights)
        except OSError as error:
            raise _not_written(error, state.images_seen, run) from error
        delete_old(run, config.keep_checkpoints)
        return described

    # Train
    micro = config.microbatch_size or config.batch_size
    batch: Batch | None = None
    batches = 0
    saved_at = state.images_seen
    window, lr = Window(), config.lr
    bar = tqdm(total=config.total_images, initial=saved_at, unit="img", dynamic_ncols=True, smoothing=0.05)

    def report(lr: float) -> Window:
        line = {"images": state.images_seen, "lr": lr, **window.summary()}
        bar.set_postfix(loss=line["loss"], mse=line["mse"], vb_bpd=line["vb_bpd"])
        _or_warn("line in the log", partial(append_line, run / LOG_FILE, line))
        return Window()

    with bar:  # so that an error starts on a new line
        while state.images_seen < config.total_images:
            try:
                if stop():
                    raise Stopped(state.images_seen)
                batch = draw(config, dataset, state.images_seen, timestep_sampler)
            except (DataError, Stopped) as error:
                if window:
                    report(lr)
                if batch is not None and state.images_seen > saved_at:
                    save(batch)
                if isinstance(error, DataError) and checkpoints(run):
                    raise TrainError(str(error), resume_with=()) from error
                raise

            # Accumulate the gradient of the batch's mean loss
            optimizer.zero_grad(set_to_none=True)
            parts: list[TrainingLosses] = []
            for start in range(0, config.batch_size, micro):
                rows = slice(start, start + micro)
                part = losses_of(batch, rows)
                weighted = part.loss * batch.weights[rows].to(device)
                (weighted.sum() / config.batch_size).backward()  # type: ignore[no-untyped-call]
                parts.append(TrainingLosses(*(term.detach().cpu() for term in part)))
            losses = TrainingLosses(*(torch.cat(terms) for terms in zip(*parts, strict=True)))
            if origin is not None and batches == 0 and not float(losses.mse.mean()) <= MAX_MSE:
                raise TrainError(f"{origin.folder} contains a network that had already diverged. {recovery_hint(run)}")
            t = batch.t.numpy()
            timestep_sampler.update(t, losses.loss.double().numpy())

            # Step
            grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip or math.inf)
            if not torch.isfinite(grad_norm):
                raise _diverged("the gradient is not finite", config, state.images_seen, run, bfloat16)
            lr = learning_rate(config, state.images_seen)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            state.average_in()
            state.images_seen += config.batch_size
            batches += 1
            done = state.images_seen >= config.total_images

            # Report
            bar.update(config.batch_size)
            window.add(losses, t, float(grad_norm), process.num_steps)
            if batches % config.log_every_batches == 0 or done:
                window = report(lr)

            # Checkpoint
            if done or state.images_seen // config.checkpoint_every_images > (
                (state.images_seen - config.batch_size) // config.checkpoint_every_images
            ):
                with window.clock_stopped():
                    described = save(batch)
                    saved_at = state.images_seen
                    if state.power_emas:
                        snapshot = ema_snapshot_file(run, saved_at)
                        _or_warn("snapshot of averages", partial(train_state.save_ema_snapshot, state, snapshot))
                    if config.preview_per_class:
                        picture = run / SAMPLES_FOLDER / f"{saved_at:012d}.png"
                        shown = (config.preview_per_class, config.preview_steps)
                        show = partial(write_preview, picture, described, state.ema.weights, *shown, stop)
                        _or_warn(f"sample grid after {saved_at} images", show)
    return run / MODEL_FOLDER


class Batch(NamedTuple):
    """Inputs of one train step: a function of the seed and the position in the run only."""

    x0: Tensor
    """Images [B, C, H, W] in [-1, 1]."""
    y: Tensor | None
    """int64 [B], num_classes where the label is dropped; None: unconditional."""
    t: Tensor
    """int64 [B]."""
    weights: Tensor
    """Weights of the losses, [B]."""
    noise: Tensor


def draw(config: TrainConfig, dataset: Dataset, images_seen: int, timestep_sampler: TimestepSampler) -> Batch:
    """Draw the next batch after a number of images; seed torch's generator for it, dropout included."""
    rng = np.random.default_rng((config.seed, 1, images_seen))
    torch.manual_seed(int(rng.integers(2**63)))
    indices = batch_indices(config.seed, images_seen, config.batch_size, len(dataset.labels))
    x0 = torch.from_numpy(from_uint8(dataset.images(indices)))
    if config.horizontal_flip:
        mirrored = torch.from_numpy(rng.random(len(x0)) < 0.5)
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
    y = _labels(config, dataset, indices, rng)
    t, weights = timestep_sampler.sample(rng, config.batch_size)
    return Batch(x0, y, torch.from_numpy(t), torch.from_numpy(weights), torch.randn(x0.shape))


def resolve(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """Set the fields that the data determine: the number of classes, and the null class for label dropout."""
    classes = len(dataset.class_names) if config.class_conditional else None
    null_class = classes is not None and config.label_dropout > 0
    model = config.model.replace(num_classes=classes, null_class=null_class)
    model = model.replace(learn_sigma=config.diffusion.learns_variance)
    sampling = config.sampling if null_class else config.sampling.replace(cfg_scale=1.0)
    return config.replace(model=model.model_dump(), sampling=sampling.model_dump())


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Return the learning rate of the next step after a number of images."""
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
    config: TrainConfig, dataset: Dataset, images_seen: int, command: str, bfloat16: bool, origin: Origin | None
) -> CheckpointConfig:
    """Return the configuration that the checkpoint stores, with its provenance."""
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
            **({"resumed": origin.history} if origin is not None and origin.history else {}),
        },
    )


def _update_model(run: Path, saved: SavedState) -> None:
    """Write `model/` if the run ended after writing its newest checkpoint and before writing `model/`."""
    try:
        current = read_config(run / MODEL_FOLDER).provenance.get("images_seen") == saved.images_seen
    except CheckpointError:
        current = False
    if not current:
        write_checkpoint(run / MODEL_FOLDER, saved.config, saved.averages)


def _begin_files(run: Path, config: TrainConfig, images_seen: int) -> None:
    """Write the configuration, and remove what the run wrote after the checkpoint from which it resumes."""
    log = run / LOG_FILE
    if images_seen:
        cut_log(log, images_seen)
    else:
        log.unlink(missing_ok=True)  # left by a run that ended before its first checkpoint
    for snapshot in (run / EMA_FOLDER).glob("*.safetensors"):
        if snapshot.stem.isdecimal() and int(snapshot.stem) > images_seen:
            snapshot.unlink()
    write_file(run / TRAIN_CONFIG_FILE, f"{config.model_dump_json(indent=2)}\n".encode())


def _refuse_distributed() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise TrainError(
            f"training on several devices is not supported yet, and WORLD_SIZE is {world}: start iddpm train without "
            "torchrun, as one process"
        )


def _unusable(state: TrainState, mse: float) -> str | None:
    """Return why training must not continue from a state; None: it can continue."""
    if not mse <= MAX_MSE:
        return f"the network's mean squared error is {mse:.3g}, and a network that predicts zeros has 1"
    weights = {**state.network.state_dict(), **state.ema.weights}
    if name := train_state.first_not_finite(weights):
        return f"{name} contains NaN or infinity"
    return None


def _diverged(problem: str, config: TrainConfig, images_seen: int, run: Path, bfloat16: bool) -> TrainError:
    """Return the error of a diverged run, with the fields to change."""
    fields = [f"lr={min(config.lr / 10, SAFE_LR):g}"]
    if config.grad_clip is None or config.grad_clip > 1:
        fields.append("grad_clip=1")
    if bfloat16:
        fields.append("precision=float32")
    options = " ".join(f"--set {field}" for field in fields)
    if found := checkpoints(run):
        how = f"Continue from the checkpoint after {int(found[-1].name)} images with --resume {options}"
    else:
        how = f"There is no checkpoint yet: start again with {options}"
    return TrainError(
        f"the run has diverged after {images_seen} images: {problem}. {how}", resume_with=fields if found else None
    )


def _not_written(error: OSError, images_seen: int, run: Path) -> TrainError:
    """Return the error of a checkpoint that could not be written."""
    found = checkpoints(run)
    last = f"the one after {int(found[-1].name)} images is intact" if found else "there is no earlier one"
    return TrainError(
        f"the checkpoint after {images_seen} images could not be written, {error.filename}: {error.strerror}; {last}",
        resume_with=() if found else None,
    )


def _or_warn(what: str, action: Callable[[], None]) -> None:
    """Run an optional action; if it fails, print a warning and continue."""
    try:
        action()
    except OSError as error:
        warn(f"no {what}: {error.filename}: {error.strerror}")
    except Exception as error:  # e.g. memory, a font: the checkpoint is written, and the run must continue
        warn(f"no {what}: {str(error) or type(error).__name__}")


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
