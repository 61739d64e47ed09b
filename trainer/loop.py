"""train(config, ...): run training from the start, or from the newest checkpoint, to the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.config import ModelConfig
from formats.atomic_file import write_file
from formats.checkpoint_config import AnyCheckpointConfig, CheckpointError, read_config
from trainer import state as train_state
from trainer.batches import Batch, Batches, Images
from trainer.config import TimestepSamplerName, TrainConfig
from trainer.data import DataError, Dataset
from trainer.ema import averages_of
from trainer.ema_snapshots import write_snapshot
from trainer.errors import Diverged, Stopped, TrainError
from trainer.every import Every, or_warn
from trainer.initial_model import InitialModel
from trainer.log import Window, append_line, cut_log
from trainer.look_ahead import looking_ahead
from trainer.model_folder import write_model
from trainer.objective import MAX_LOSS, Objective, objective_of
from trainer.optimisation import Optimisation, learning_rate
from trainer.progress import bar_entries
from trainer.provenance import git_commit
from trainer.ranks import OneProcess, Ranks
from trainer.resume import Origin, find_origin, kind_of, recovery_hint
from trainer.run_folder import (
    BEST_FOLDER,
    EMA_FOLDER,
    LOG_FILE,
    MODEL_FOLDER,
    SAMPLES_FOLDER,
    TRAIN_CONFIG_FILE,
    VALIDATION_FILE,
    checkpoint_folder,
    checkpoints,
    claimed,
    delete_old,
    ema_snapshot_file,
    newest_checkpoint,
    say,
    warn,
)
from trainer.state import SavedState, TrainState
from trainer.tensorboard import Board, open_board
from trainer.timestep_sampler import LossSecondMomentSampler, StratifiedSampler, TimestepSampler, UniformSampler
from trainer.validation import Validation, held_out, held_out_anew, read_losses, refuse_unfit, worse_in_a_row

SAFE_LR = 1e-4
"""The paper's learning rate, at which these networks hardly ever diverge."""
MIN_LOSS_SCALE = 1.0
"""Loss scale of float16 below which gradients that are not finite are no overflow any more: the run has diverged."""
TIMESTEP_SAMPLERS: dict[TimestepSamplerName, Callable[[int], TimestepSampler]] = {
    "uniform": UniformSampler,
    "stratified": StratifiedSampler,
    "loss_second_moment": LossSecondMomentSampler,
}

GO_ON, FINISHED, STOP, UNREADABLE = range(4)
"""What the processes agree on before each step; the largest of their values counts."""
ROLLBACK_LR_FACTOR = 0.5
"""Each rollback multiplies the learning rate by this: what diverged at one rate tends to diverge there again on other
batches."""


def train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    resume: bool = False,
    command: str = "",
    accept_changed_data: bool = False,
    validation: Dataset | None = None,
    initial: InitialModel | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
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
        validation: held-out data, which `resolve` accepted; None: at most a share of the data is held out.
        initial: weights of a new run; None: random ones. A resumed run continues with its own.
        stop: called before each batch; True ends the run with a checkpoint.
        ranks: the processes that train together, each of which calls this function; None: this process alone.

    Raises:
        TrainError: the folder is in use, or its run cannot be resumed with these arguments; the run diverged and has
            no rollback left; a checkpoint cannot be written; an image cannot be read. The progress until then is saved,
            except in a diverged run.
        DataError: an image cannot be read before the first batch was trained.
        Stopped: `stop` returned True in one of the processes.
    """
    ranks = ranks or OneProcess()
    _check_world(config, ranks.world)
    if not ranks.main:
        ranks.highest(0)  # waits until the main process has claimed the folder
        return _Run(config, dataset, validation, run, ranks, command, initial, stop).train(resume, accept_changed_data)
    with claimed(run, resume=resume):
        ranks.highest(0)
        return _Run(config, dataset, validation, run, ranks, command, initial, stop).train(resume, accept_changed_data)


class _Run:
    """A run in one of its processes."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        validation: Dataset | None,
        run: Path,
        ranks: Ranks,
        command: str,
        initial: InitialModel | None,
        stop: Callable[[], bool],
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._validation_data = validation
        self._run = run
        self._ranks = ranks
        self._command = command
        self._stop = stop
        self._initial: Mapping[str, Any] | None = initial.provenance if initial else None
        self._origin: Origin | None = None
        self._rollbacks: list[dict[str, Any]] = []
        """Provenance of each rollback of the run."""
        self._lr = config.lr

        torch.manual_seed(config.seed)
        self._objective: Objective = objective_of(config, ranks.device)
        network = self._objective.build()
        if initial is not None:
            network.load_state_dict(initial.weights)
        network = network.to(ranks.device).train()
        self._optimisation = Optimisation(config, self._objective, network, ranks)
        self._timestep_sampler = TIMESTEP_SAMPLERS[config.timestep_sampler](self._objective.num_steps)
        self._state = TrainState(
            network,
            self._optimisation.optimizer,
            averages_of(config, network),
            self._timestep_sampler,
            self._optimisation.scaler,
        )
        training, held = held_out(config, dataset, validation)
        self._shown = training if held is None else held
        """Images from which the previews of conditioned models begin."""
        self._validation = None if held is None else Validation(config, held, self._objective, self._optimisation)
        self._overfitted = False
        self._batches = Batches(
            config, training, self._timestep_sampler, ranks.device, rank=ranks.rank, world=ranks.world
        )
        self._batch: Batch | None = None
        """The last one that was trained."""
        self._saved_at = 0
        self._window = self._new_window()
        self._bar: tqdm[Any]
        self._board: Board

    def train(self, resume: bool, accept_changed_data: bool) -> Path:
        """Train to the end, and return the folder of the finished checkpoint."""
        config, state = self._config, self._state
        if resume:
            self._restore(accept_changed_data)
        self._board = open_board(config.tensorboard and self._ranks.main, self._run, state.images_seen)
        if self._ranks.main:
            _begin_files(self._run, config, state.images_seen)
        if self._ranks.main and config.total_images < config.lr_warmup_images:
            warn(
                f"the run ends after {config.total_images} images, before the learning rate has risen to lr: that "
                f"takes lr_warmup_images, {config.lr_warmup_images}"
            )
        first = self._saved_at = state.images_seen
        validations = Every(config.validation_every_images, self._validate)
        if resume:
            self._complete(validations)
        recurring = (
            Every(config.log_every_batches * config.batch_size, partial(self._or_roll_back, self._report), start=first),
            Every(config.checkpoint_every_images, partial(self._or_roll_back, self._checkpoint)),
            validations,
        )
        positions = range(first, config.total_images, config.batch_size)
        self._bar = tqdm(
            total=config.total_images, initial=first, unit="img", dynamic_ncols=True, smoothing=0.05,
            disable=not self._ranks.main,
        )  # fmt: skip
        with self._bar, looking_ahead(self._batches.images, iter(positions)) as ahead:  # an error starts on a new line
            for before in positions:
                images = self._next(ahead.take)
                if images is None:
                    break
                self._batch = batch = self._batches.complete(before, images)
                losses = self._optimisation.gradient(batch)
                self._learn_timesteps(batch, losses)
                if before == first and self._origin is not None:
                    self._refuse_diverged_origin(losses)
                self._lr = learning_rate(config, before) * ROLLBACK_LR_FACTOR ** len(self._rollbacks)
                grad_norm = self._optimisation.step(self._lr)
                state.average_in()
                state.images_seen = before + config.batch_size
                micro_norm = self._optimisation.micro_norm
                self._window.add(losses, batch.t, grad_norm, self._objective.num_steps, micro_norm, batch.weights)
                self._bar.update(config.batch_size)
                for every in recurring:
                    every.run_if_due(before, state.images_seen, done=state.images_seen >= config.total_images)
        return self._run / MODEL_FOLDER

    def _next(self, take: Callable[[], Images]) -> Images | None:
        """Return the next images; None, after saving, if the run overfits and ends early.

        Raises:
            Stopped: a process was asked to stop; the progress is saved.
            TrainError: a process cannot read its images; the progress is saved.
            DataError: this one cannot, and there is no checkpoint.
        """
        images, unreadable = None, None
        status = STOP if self._stop() else FINISHED if self._overfitted else GO_ON
        if status == GO_ON:
            try:
                with self._window.waiting_for_data():
                    images = take()
            except DataError as error:
                unreadable, status = error, UNREADABLE
        status = self._ranks.highest(status)
        if images is not None and status == GO_ON:
            return images
        if self._window:
            self._or_roll_back(self._report)
        if self._state.images_seen > self._saved_at:
            self._or_roll_back(self._save)
        if status == FINISHED:
            return None
        if status == STOP:
            raise Stopped(self._state.images_seen)
        if unreadable is None:
            raise TrainError("another process could not read an image; its message names the file", resume_with=())
        problem, skipping = str(unreadable), ("data.unreadable=skip",) if self._may_skip() else ()
        if skipping:
            problem += f"; or set {skipping[0]}, which puts another image of its class in its place"
        if checkpoints(self._run):
            raise TrainError(problem, resume_with=skipping) from unreadable
        raise DataError(problem) from unreadable

    def _may_skip(self) -> bool:
        """Return whether `data.unreadable=skip` would let a run that cannot read an image continue."""
        return self._config.data.unreadable == "fail" and kind_of(self._dataset.description) in ("folder", "dataset")

    def _learn_timesteps(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        if self._timestep_sampler.uses_losses:
            t, loss = self._ranks.gather(torch.stack([batch.t.double(), losses["loss"].double()], dim=1)).unbind(1)
            self._timestep_sampler.update(t.long().numpy(), loss.numpy())

    def _report(self) -> None:
        """Write a line of the log, and begin the next one; the only wait for the device between two checkpoints.

        Raises:
            Diverged: a gradient was not finite; in float16: none of them was, and the loss was not finite either, or
                a smaller loss scale has not helped.
        """
        window, self._window = self._window, self._new_window()
        summary = window.summary(self._ranks.gather(window.rows()))
        if "grad_norm" not in summary and self._optimisation.scaler.get_scale() < MIN_LOSS_SCALE:
            raise Diverged(f"the gradient is not finite, even with a loss scale below {MIN_LOSS_SCALE:g}")
        if not math.isfinite(summary.get("grad_norm", summary["loss"])):
            raise Diverged("the gradient is not finite")
        if self._ranks.main:
            line = {"images": self._state.images_seen, "lr": self._lr, **summary}
            self._bar.set_postfix(bar_entries(line))
            or_warn("line in the log", partial(append_line, self._run / LOG_FILE, line))
            or_warn("entry in TensorBoard", partial(self._board.scalars, self._state.images_seen, line))

    def _new_window(self) -> Window:
        micro = self._optimisation.micro_batch
        return Window(
            self._objective.by_quartile,
            skips=self._optimisation.scaler.is_enabled(),
            noise_of=None if micro is None else (micro, self._config.batch_size),
        )

    def _checkpoint(self) -> None:
        """Save, and draw what the network can do."""
        with self._window.clock_stopped():
            described = self._save()
            state, config = self._state, self._config
            if described is None:
                return
            if config.preview_per_class:
                picture = self._run / SAMPLES_FOLDER / f"{state.images_seen:012d}.png"
                show = partial(
                    self._objective.write_preview, picture, described, state.ema.weights, self._stop, self._shown
                )
                or_warn(f"sample grid after {state.images_seen} images", show)
                or_warn("grid in TensorBoard", partial(self._board.grid, state.images_seen, picture))

    def _validate(self) -> None:
        """Log the loss on held-out images, keep the best model, and note if the run should end."""
        if self._validation is None or not self._ranks.main:
            return
        with self._window.clock_stopped():
            or_warn(
                f"validation after {self._state.images_seen} images", partial(self._log_validation, self._validation)
            )

    def _log_validation(self, validation: Validation) -> None:
        path, state = self._run / VALIDATION_FILE, self._state
        ends = state.images_seen >= self._config.total_images  # then nothing after this notices a signal
        losses = validation.losses(state.ema.weights, (lambda: False) if ends else self._stop)
        if not losses:
            return  # stopped: the resumed run validates first
        line = {"images": state.images_seen, **losses}
        if worse_in_a_row([*read_losses(path, "loss"), line["loss"]]) == 0:
            write_model(self._run / BEST_FOLDER, self._describe(), state.ema.weights)
        append_line(path, line)  # after `best/`: a killed process must not leave a best loss without its model
        self._end_if_overfitted()

    def _end_if_overfitted(self) -> None:
        """Note that the run should end, if the last validations were not better than an earlier one."""
        worse, limit = worse_in_a_row(read_losses(self._run / VALIDATION_FILE, "loss")), self._config.stop_after_worse
        if limit is not None and worse >= limit:
            self._overfitted = True
            say(f"the loss on held-out images was not better in {worse} validations: the run ends")

    def _save(self) -> AnyCheckpointConfig | None:
        """Write a checkpoint, `model/` and a snapshot of the averages; return the configuration of the first two.

        It is None in all processes but the main one.

        Raises:
            Diverged: training must not continue from the present state; raised in all processes.
            TrainError: the files cannot be written. Earlier checkpoints are intact.
        """
        problem = self._unusable() if self._ranks.main else None
        if self._ranks.gather(torch.tensor([int(problem is not None)])).any():
            raise Diverged(problem or "the main process names the reason")
        self._saved_at = self._state.images_seen
        if not self._ranks.main:
            return None
        described = self._describe()
        try:
            train_state.save(self._state, checkpoint_folder(self._run, self._saved_at), described)
            write_model(self._run / MODEL_FOLDER, described, self._state.ema.weights)
        except OSError as error:
            raise _not_written(error, self._saved_at, self._run) from error
        delete_old(self._run, self._config.keep_checkpoints)
        self._write_snapshot()
        return described

    def _write_snapshot(self) -> None:
        """Write the averages that the checkpoint's model is not; with one decay, it is that one."""
        if snapshot := self._state.others if len(self._config.ema_decay) == 1 else self._state.averages:
            path = ema_snapshot_file(self._run, self._saved_at)
            or_warn("snapshot of averages", partial(write_snapshot, path, snapshot))

    def _complete(self, validations: Every) -> None:
        """Write what the run lacks if it was killed, or stopped, just after the checkpoint from which it resumes."""
        if not self._ranks.main:
            return
        seen = self._state.images_seen
        if not ema_snapshot_file(self._run, seen).exists():
            self._write_snapshot()
        if self._validation is None:
            return
        if seen not in read_losses(self._run / VALIDATION_FILE, "images"):
            done = seen >= self._config.total_images
            validations.run_if_due(seen - self._config.batch_size, seen, done=done)
        if not self._overfitted:
            self._end_if_overfitted()

    def _or_roll_back(self, action: Callable[[], object]) -> None:
        """Run an action that notices if the run has diverged; if it has, roll back.

        Raises:
            TrainError: the run has diverged, and may not roll back.
        """
        try:
            action()
        except Diverged as diverged:
            self._roll_back(str(diverged))

    def _roll_back(self, problem: str) -> None:
        """Return to the newest checkpoint, skip the images trained since, and train slower from now on.

        `images_seen` does not go back: it stays the position in the data, from which everything else follows. The
        checkpoint written here makes a resumed run continue in the same way.

        Raises:
            TrainError: there is no checkpoint, or no rollback left.
        """
        if len(self._rollbacks) >= self._config.max_rollbacks or not checkpoints(self._run):
            raise self._diverged(problem)
        state, seen = self._state, self._state.images_seen
        saved = train_state.read(newest_checkpoint(self._run))
        train_state.restore(state, saved)
        state.images_seen = seen
        self._rollbacks.append({"images_seen": seen, "to": saved.images_seen, "problem": problem})
        self._window = self._new_window()
        if self._ranks.main:
            cut_log(self._run / VALIDATION_FILE, saved.images_seen)  # early stopping must not count other weights
            warn(
                f"the run has diverged after {seen} images: {problem}. Rolled back to the weights after "
                f"{saved.images_seen} images; the images since are skipped, and the learning rate is halved (rollback "
                f"{len(self._rollbacks)} of max_rollbacks={self._config.max_rollbacks})"
            )
        self._or_roll_back(self._save)

    def _restore(self, accept_changed_data: bool) -> None:
        """Continue from the newest checkpoint."""
        saved, self._origin = find_origin(
            self._run, self._config, self._dataset, self._validation_data, accept_changed_data=accept_changed_data
        )
        train_state.restore(self._state, saved)
        self._initial = saved.config.provenance.get("initial_model")
        self._rollbacks = list(saved.config.provenance.get("rollbacks", []))
        if self._ranks.main:
            _update_model(self._run, saved)
            say(f"continuing after {saved.images_seen} images{self._origin.description}")
            before = (self._origin.changes or {}).get("data_before")
            if before and self._config.validation_share and held_out_anew(before, self._dataset.description):
                warn(
                    "the images that validation_share holds out are drawn anew from the changed data: most of them "
                    f"were trained on, so that losses in {VALIDATION_FILE} will be too low, and {BEST_FOLDER}/ and "
                    "stop_after_worse are misled. Held-out images that stay: a new run with --validation"
                )
            if self._rollbacks:
                factor = ROLLBACK_LR_FACTOR ** len(self._rollbacks)
                say(f"rollbacks so far: {len(self._rollbacks)}; the learning rate is {factor:g} times the given one")

    def _describe(self) -> AnyCheckpointConfig:
        """Return the configuration that a checkpoint stores now, with its provenance."""
        config, origin = self._config, self._origin
        return self._objective.checkpoint(
            self._dataset.class_names if config.class_conditional else None,
            {
                "images_seen": self._state.images_seen,
                "command": self._command,
                "commit": git_commit(),
                "data": self._dataset.description,
                **({"validation_data": self._validation_data.description} if self._validation_data else {}),
                "precision": self._optimisation.precision,
                "torch": torch.__version__,
                "train_config": config.model_dump(mode="json", exclude={"model", "diffusion", "sampling"}),
                **({"initial_model": dict(self._initial)} if self._initial else {}),
                **({"rollbacks": list(self._rollbacks)} if self._rollbacks else {}),
                **({"resumed": origin.history} if origin is not None and origin.history else {}),
            },
        )

    def _judge(self, losses: Mapping[str, Tensor]) -> str | None:
        """Return why losses show that the network has diverged; None: they do not."""
        name = self._objective.judged_by
        value = float(losses[name].mean())
        return None if value <= MAX_LOSS else f"{name} is {value:.3g}, and an untrained network has at most 10"

    def _unusable(self) -> str | None:
        """Return why training must not continue from the present state; None: it can continue."""
        assert self._batch is not None  # noqa: S101  # a step was trained
        with torch.no_grad():
            problem = self._judge(self._optimisation.losses(self._batch))
        if problem:
            return problem
        weights = {**self._state.network.state_dict(), **self._state.ema.weights}
        if name := train_state.first_not_finite(weights):
            return f"{name} contains NaN or infinity"
        return None

    def _refuse_diverged_origin(self, losses: Mapping[str, Tensor]) -> None:
        if self._origin is not None and self._judge(losses):
            raise TrainError(
                f"{self._origin.folder} contains a network that had already diverged. {recovery_hint(self._run)}"
            )

    def _diverged(self, problem: str) -> TrainError:
        """Return the error of a diverged run, with the fields to change."""
        config = self._config
        fields = [f"lr={min(config.lr / 10, SAFE_LR):g}"]
        if config.grad_clip is None or config.grad_clip > 1:
            fields.append("grad_clip=1")
        if self._optimisation.precision != "float32":
            fields.append("precision=float32")
        options = " ".join(f"--set {field}" for field in fields)
        if found := checkpoints(self._run):
            how = f"Continue from the checkpoint after {int(found[-1].name)} images with --resume {options}"
        else:
            how = f"There is no checkpoint yet: start again with {options}"
        count = len(self._rollbacks)
        rolled = f", after {count} rollback{'s' if count > 1 else ''}" if count else ""
        return TrainError(
            f"the run has diverged after {self._state.images_seen} images{rolled}: {problem}. {how}",
            resume_with=fields if found else None,
        )


def resolve(config: TrainConfig, dataset: Dataset, validation: Dataset | None = None) -> TrainConfig:
    """Set the fields that the data determine: the number of classes, and the null class for label dropout.

    Raises:
        ValueError: the model needs conditioning images, and the data have none; or the held-out data do not fit.
    """
    if validation is not None:
        refuse_unfit(config, dataset, validation)
    if config.cond_channels and dataset.conditions is None:
        raise ValueError(
            f"model.cond_channels is {config.cond_channels}, and these data are images without conditioning images"
        )
    if not isinstance(config.model, ModelConfig):
        return config.replace(model=config.model.replace(num_classes=len(dataset.class_names)).model_dump())
    classes = len(dataset.class_names) if config.class_conditional else None
    null_class = classes is not None and config.label_dropout > 0
    model = config.model.replace(num_classes=classes, null_class=null_class)
    model = model.replace(learn_sigma=config.diffusion.learns_variance)
    sampling = config.sampling if null_class else config.sampling.replace(cfg_scale=1.0)
    return config.replace(model=model.model_dump(), sampling=sampling.model_dump())


def _check_world(config: TrainConfig, world: int) -> None:
    part, rest = divmod(config.batch_size, world)
    if rest:
        raise TrainError(f"batch_size ({config.batch_size}) must be a multiple of the number of processes, {world}")
    if config.microbatch_size is not None and part % config.microbatch_size:
        raise TrainError(
            f"microbatch_size must divide the {part} images per step of each of {world} processes; "
            f"got {config.microbatch_size}"
        )


def _update_model(run: Path, saved: SavedState) -> None:
    """Write `model/` if the run ended after writing its newest checkpoint and before writing `model/`."""
    try:
        current = read_config(run / MODEL_FOLDER).provenance.get("images_seen") == saved.images_seen
    except CheckpointError:
        current = False
    if not current:
        write_model(run / MODEL_FOLDER, saved.config, saved.averages)


def _begin_files(run: Path, config: TrainConfig, images_seen: int) -> None:
    """Write the configuration, and remove what the run wrote after the checkpoint from which it resumes."""
    for log in (run / LOG_FILE, run / VALIDATION_FILE):
        if images_seen:
            cut_log(log, images_seen)
        else:
            log.unlink(missing_ok=True)  # left by a run that ended before its first checkpoint
    for snapshot in (run / EMA_FOLDER).glob("*.safetensors"):
        if snapshot.stem.isdecimal() and int(snapshot.stem) > images_seen:
            snapshot.unlink()
    write_file(run / TRAIN_CONFIG_FILE, f"{config.model_dump_json(indent=2)}\n".encode())


def _not_written(error: OSError, images_seen: int, run: Path) -> TrainError:
    """Return the error of a checkpoint that could not be written."""
    found = checkpoints(run)
    last = f"the one after {int(found[-1].name)} images is intact" if found else "there is no earlier one"
    return TrainError(
        f"the checkpoint after {images_seen} images could not be written, {error.filename}: {error.strerror}; {last}",
        resume_with=() if found else None,
    )
