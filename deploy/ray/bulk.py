"""Many images on a Ray cluster, through Ray Data: the files of `iddpm generate`, from any number of workers.

    python -m deploy.ray.bulk models/fashion32 --num 50000 --format npz --out build/fid --workers 8 --cpus 2

This process alone holds the folder, writes in it and knows what is missing; workers only turn rows (class, seed,
image_index) into pixels. docs/bulk.md describes the files, deploy/ray/README.md the cluster.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.bulk_options import Cascade, Classes, FirstIndex, Format, Models, Num, Out, PerClass, Seed, ShardSize
from cli.errors import fail, needs_extra
from cli.sampling_options import (
    CfgScale,
    ClassifierScale,
    Eta,
    Respacing,
    SamplerName,
    Steps,
    UpsampleCfgScale,
    UpsampleClassifierScale,
    UpsampleSampler,
    UpsampleSteps,
    given,
    upsample_fields,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from cli.bulk import Advance, Produce
    from cli.bulk_order import Order
    from deploy.ray.bulk_worker import Batch
    from formats.generation import Generation
    from formats.images import Uint8Array
    from service.settings import Settings

COMMAND = ("python", "-m", "deploy.ray.bulk")
WIDTHS_PER_BATCH = 4
"""Images of a batch, in widths of the engine: enough that the time between two calls does not count."""
CALLS_PER_WORKER = 2
"""Batches that a worker has: while one ends and the next is on its way, the engine is full with the other."""
BATCHES_PER_WORKER = 512
"""Batches that Ray Data is given at once, per worker. Before the first image it stores a table and runs a task for
each, so that a million images at once would cost time and memory. After these batches the workers load the model again.
"""
POLL_S = 0.2
"""Interval at which this process, while it waits for workers, looks whether it shall stop."""
SHARE_OF_RESOURCE = 0.001
"""Share of a custom resource that a worker reserves: the resource only marks nodes."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Workers on a cluster, and what each of them gets."""

    workers: int
    """Number of actors. Those for which the cluster has no room yet start when it has."""
    settings: Settings
    """Of their engines."""
    reserved: dict[str, Any]
    """What Ray reserves for each: num_cpus, num_gpus, resources."""

    def describe(self, order: Order) -> Generation:
        """Return the manifest of ordered images, made on a node that may have workers.

        Raises:
            ray.exceptions.RayError: an option breaks a rule, or the model cannot be run; see `reason_of`.
        """
        import ray

        from deploy.ray import bulk_worker

        return ray.get(ray.remote(**self.reserved)(bulk_worker.describe).remote(self.settings, order))


def produce_on(pool: Pool, generation: Generation) -> Produce:
    """Return a function that generates shards with the workers of a pool."""

    def produce(missing: list[range], advance: Advance) -> Iterator[tuple[range, Uint8Array]]:
        import numpy as np

        awaited = {images.start // generation.shard_size: images for images in missing}
        begun: dict[range, tuple[Uint8Array, npt.NDArray[np.bool_]]] = {}
        tables = batches_of(generation, missing, WIDTHS_PER_BATCH * pool.settings.max_rows)
        for batch in _generated(tables, pool, generation, lambda: advance(0)):
            numbers = batch["image_index"] - generation.image_index
            images = awaited[int(numbers[0]) // generation.shard_size]
            if images not in begun:
                shape = (len(images), *generation.image_shape)
                begun[images] = np.empty(shape, np.uint8), np.zeros(len(images), np.bool_)
            pixels, there = begun[images]
            pixels[numbers - images.start] = batch["pixels"]
            there[numbers - images.start] = True
            if there.all():
                del begun[images], awaited[images.start // generation.shard_size]
                yield images, pixels
            advance(len(numbers))
        if awaited:
            raise RuntimeError(f"Ray Data has ended without all images of {len(awaited)} shards")

    return produce


def batches_of(generation: Generation, missing: list[range], size: int) -> Iterator[pa.Table]:
    """Yield the rows (class, seed, image_index) of missing images, a table per batch.

    Args:
        generation: the images.
        missing: images of each missing shard.
        size: images of a batch. No batch has images of two shards, so that few shards are incomplete at a time.
    """
    import pyarrow as pa

    for images in missing:
        for start in range(images.start, images.stop, size):
            part = range(start, min(start + size, images.stop))
            labels = generation.labels(part)
            columns = {} if labels is None else {"class": pa.array(labels)}
            columns["seed"] = pa.array([generation.seed] * len(part), pa.int64())
            columns["image_index"] = pa.array(map(generation.index_of, part), pa.int64())
            yield pa.table(columns)


def reservation(settings: Settings, cpus: float, resources: Sequence[str]) -> dict[str, Any]:
    """Return what Ray reserves for a worker.

    Args:
        settings: of its engine; with CUDA it gets one GPU.
        cpus: number of CPUs.
        resources: custom resources that its node must have.

    Raises:
        ValueError: the settings name one of several GPUs.
    """
    from deploy.ray.devices import gpus_of, refuse_one_gpu

    refuse_one_gpu(settings)
    return {
        "num_cpus": cpus,
        "num_gpus": gpus_of(settings),
        "resources": dict.fromkeys(resources, SHARE_OF_RESOURCE),
    }


def fitting(nodes: list[dict[str, Any]], reserved: dict[str, Any]) -> int:
    """Return the number of workers for which nodes have room if nothing else runs there.

    Args:
        nodes: as `ray.nodes` returns them.
        reserved: see `Pool`.

    Raises:
        ValueError: no node is large enough.
    """
    needs = {"CPU": reserved["num_cpus"], "GPU": reserved["num_gpus"], **reserved["resources"]}
    total = sum(
        min(int(node["Resources"].get(name, 0) / need) for name, need in needs.items() if need)
        for node in nodes
        if node["Alive"]
    )
    if not total:
        needed = ", ".join(f"{need:g} {name}" for name, need in needs.items() if need)
        raise ValueError(f"no node of the cluster has room for a worker, which needs {needed}: add nodes, or use less")
    return total


def workers_on(nodes: list[dict[str, Any]], reserved: dict[str, Any], wanted: int | None) -> int:
    """Return the number of workers to start: as many as are wanted, or as have room.

    Args:
        nodes: as `ray.nodes` returns them.
        reserved: see `Pool`.
        wanted: None: as many as have room. A given number waits for nodes; if there is none yet, that is printed.

    Raises:
        ValueError: no number is given, and no node is large enough.
    """
    try:
        room = fitting(nodes, reserved)
    except ValueError as error:
        if wanted is None:
            raise
        typer.echo(f"waiting: {error}", err=True)
        return wanted
    return wanted or room


def _generated(
    tables: Iterator[pa.Table], pool: Pool, generation: Generation, poll: Callable[[], None]
) -> Iterator[Batch]:
    """Generate batches, a part of them at a time; call a function while there is none."""
    while part := list(islice(tables, BATCHES_PER_WORKER * pool.workers)):
        yield from _read_ahead(partial(_mapped, part, pool, generation), poll)


def _mapped(tables: list[pa.Table], pool: Pool, generation: Generation) -> Iterator[Batch]:
    """Generate batches, in the order in which they become complete."""
    import ray.data

    from deploy.ray.bulk_worker import Worker

    dataset = ray.data.from_arrow(tables).map_batches(
        Worker,
        fn_constructor_args=(pool.settings, generation),
        batch_size=None,  # a table
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=pool.workers,
            max_tasks_in_flight_per_actor=CALLS_PER_WORKER,
            max_concurrent_calls_per_actor=CALLS_PER_WORKER,
            enable_true_multi_threading=True,
        ),
        **pool.reserved,
    )
    return iter(dataset.iter_batches(batch_size=None, batch_format="numpy"))


def _read_ahead(make: Callable[[], Iterator[Batch]], poll: Callable[[], None]) -> Iterator[Batch]:
    """Yield batches that another thread makes and reads; call a function while there is none.

    So a request to stop need not wait for a batch. The thread ends with the process.
    """
    found: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=1)

    def read() -> None:
        try:
            for batch in make():
                found.put(batch)
            found.put(None)
        except BaseException as error:  # raised below
            found.put(error)

    threading.Thread(target=read, name="ray data", daemon=True).start()
    while True:
        try:
            batch = found.get(timeout=POLL_S)
        except queue.Empty:
            poll()
            continue
        if batch is None:
            return
        if isinstance(batch, BaseException):
            raise batch
        yield batch


def bulk_command(
    model: Models,
    out: Out,
    cascade: Cascade = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers, each with an engine. Default: as many as fit now.")
    ] = None,
    cpus: Annotated[
        float,
        typer.Option(min=0.01, help="CPUs of a worker; rounded down also its threads, unless IDDPM_THREADS is set."),
    ] = 1.0,
    resource: Annotated[
        list[str] | None, typer.Option(help="Custom resource NAME of nodes that may have workers; can be repeated.")
    ] = None,
    address: Annotated[
        str, typer.Option(help="HOST:PORT of the cluster; auto: RAY_ADDRESS, or the one that runs on this machine.")
    ] = "auto",
    num: Num = None,
    per_class: PerClass = None,
    classes: Classes = None,
    image_format: Format = "png",
    shard_size: ShardSize = 1000,
    steps: Steps = None,
    respacing: Respacing = None,
    sampler: SamplerName = "ancestral",
    eta: Eta = None,
    cfg_scale: CfgScale = None,
    classifier_scale: ClassifierScale = None,
    upsample_steps: UpsampleSteps = None,
    upsample_sampler: UpsampleSampler = None,
    upsample_cfg_scale: UpsampleCfgScale = None,
    upsample_classifier_scale: UpsampleClassifierScale = None,
    seed: Seed = 0,
    image_index: FirstIndex = 0,
) -> None:
    """Generate many images on a Ray cluster: the files of `iddpm generate`, byte for byte.

    The same command continues what was interrupted, even by `kill -9`, also as `iddpm generate` on a node of the same
    kind. The service's settings in the environment of this command apply to all workers.
    """
    with needs_extra("ray"):
        import ray
        import tqdm  # noqa: F401

    from pydantic import ValidationError

    from cli.bulk import generate_into
    from cli.bulk_order import Files, Order
    from cli.local_engine import local_settings
    from deploy.ray.devices import with_threads
    from formats.checkpoint_config import describe_validation_error
    from service.errors import ServiceError

    sampling = given(
        steps=steps,
        respacing=respacing,
        sampler=sampler,
        eta=eta,
        cfg_scale=cfg_scale,
        classifier_scale=classifier_scale,
    ) | upsample_fields(upsample_steps, upsample_sampler, upsample_cfg_scale, upsample_classifier_scale)
    try:
        order = Order(
            sampling=sampling,
            num=num,
            per_class=per_class,
            classes=classes,
            seed=seed,
            image_index=image_index,
            files=Files(image_format, shard_size),
        )
        settings = with_threads(local_settings(*map(absolute, model), cascade=cascade), cpus)
        reserved = reservation(settings, cpus, resource or ())
        connect(address)
        try:
            workers = workers_on(ray.nodes(), reserved, workers)
            pool = Pool(workers=workers, settings=settings, reserved=reserved)
            generation = pool.describe(order)
            generate_into(out, generation, produce_on(pool, generation), COMMAND)
        finally:
            ray.shutdown()
    except ValidationError as error:
        fail(describe_validation_error(error))
    except ray.exceptions.RayError as error:
        fail(reason_of(error))
    except (ServiceError, OSError, ValueError) as error:
        fail(error)
    typer.echo(f"{generation.count} images in {out}, numerics_id {generation.numerics_id}")


def connect(address: str) -> None:
    """Connect to a cluster; only problems are logged.

    Raises:
        ConnectionError: there is none.
    """
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
    ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is ours
    context.raise_original_map_exception = True  # an error of a worker has its own message


def absolute(model: Path) -> Path:
    """Return a model, FOLDER or NAME=FOLDER, with the folder as all nodes have it."""
    from service.settings import read_model

    name, folder = read_model(model)
    return folder.resolve() if folder == model else Path(f"{name}={folder.resolve()}")


def reason_of(error: Exception) -> str:
    """Return what went wrong in a task or an actor of Ray, without its traceback."""
    cause = getattr(error, "cause", None)  # that of a task
    if cause is not None:
        return str(cause)
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


app = typer.Typer(add_completion=False)
app.command()(bulk_command)
if __name__ == "__main__":
    app()
