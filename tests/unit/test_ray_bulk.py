"""Bulk generation on Ray, without Ray: the worker, the rows that it gets, what is reserved, the reasons of errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cli.bulk_order import Files, Order, describe_order, requests_for
from cli.generate_command import generate_command
from cli.local_engine import LocalEngine, local_settings
from deploy.ray.bulk import (
    WIDTHS_PER_BATCH,
    Pool,
    batches_of,
    bulk_command,
    fitting,
    produce_on,
    reason_of,
    reservation,
    workers_on,
)
from deploy.ray.bulk_worker import Worker, describe
from deploy.ray.devices import with_threads
from formats.generation import Generation
from service.errors import NotFinite
from service.settings import Settings
from tests.fakes import tiny_checkpoint
from tests.generations import COUNT, FIRST, LABELS, generation
from tests.waiting import PATIENCE_S

MAX_ROWS = 2


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("IDDPM_") and name != "IDDPM_TEST_LONG"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    return with_threads(local_settings(model), cpus=0.5).model_copy(update={"max_rows": MAX_ROWS})


def order(**changes: Any) -> Order:
    fields: dict[str, Any] = {
        "sampling": {"steps": 3, "cfg_scale": 1}, "num": 7, "per_class": None, "classes": None, "seed": 4,
        "image_index": 3, "files": Files("npz", 7),
    }  # fmt: skip
    return Order(**fields | changes)


def test_the_command_has_the_options_of_iddpm_generate_and_those_of_the_cluster() -> None:
    """Typer reads options from a signature, so each command has its own; the types of options are in one module."""
    here, on_ray = signature(generate_command).parameters, dict(signature(bulk_command).parameters)
    for name in ("workers", "cpus", "resource", "address"):
        del on_ray[name]
    assert list(on_ray.values()) == list(here.values())


@pytest.fixture(scope="module")
def engine(settings: Settings) -> LocalEngine:
    return LocalEngine(settings)


@pytest.fixture(scope="module")
def ordered(engine: LocalEngine) -> Generation:
    return describe_order(engine, order())


def rows(ordered: Generation, size: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    tables = batches_of(ordered, ordered.shards(), size)
    return [{name: table[name].to_numpy() for name in table.column_names} for table in tables]


def test_a_worker_runs_cascades(tmp_path: Path) -> None:
    small = tiny_checkpoint(tmp_path / "small", image_size=4, attention_resolutions=())
    settings = with_threads(
        local_settings(small, tiny_checkpoint(tmp_path / "up", low_res_size=4), cascade="large=small+up"), cpus=1
    )
    ordered = describe(settings, order(sampling={"steps": 3, "upsample": {"steps": 2, "cfg_scale": 2}}))
    (answer,) = map(Worker(settings, ordered), rows(ordered, 7))
    engine = LocalEngine(settings)
    ((_, expected),) = engine.run([requests_for(engine, ordered, range(7))], lambda rows: None)
    np.testing.assert_array_equal(answer["pixels"], np.stack(expected))


def test_concurrent_calls_of_a_worker_give_the_pixels_of_the_engine(
    settings: Settings, engine: LocalEngine, ordered: Generation
) -> None:
    worker = Worker(settings, ordered)
    batches = rows(ordered, 3)
    assert len(batches) == 3
    with ThreadPoolExecutor(len(batches)) as pool:
        answers = list(pool.map(worker, batches, timeout=PATIENCE_S))
    assert [answer["image_index"].tolist() for answer in answers] == [[3, 4, 5], [6, 7, 8], [9]]
    ((_, expected),) = engine.run([requests_for(engine, ordered, range(7))], lambda rows: None)
    np.testing.assert_array_equal(np.concatenate([answer["pixels"] for answer in answers]), np.stack(expected))
    again = worker(batches[1])  # after a pause without calls
    np.testing.assert_array_equal(again["pixels"], answers[1]["pixels"])


def test_after_an_error_of_the_engine_all_calls_fail(
    settings: Settings, ordered: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: LocalEngine, groups: Iterator[Any], progress: Any) -> Iterator[Any]:
        next(groups)
        raise NotFinite("image 3: its numbers overflowed while sampling")
        yield

    monkeypatch.setattr(LocalEngine, "run", run)
    worker = Worker(settings, ordered)
    for _ in range(2):
        with pytest.raises(NotFinite, match="image 3"):
            worker(rows(ordered, 4)[0])


def test_a_worker_of_other_numerics_is_refused(settings: Settings, ordered: Generation) -> None:
    with pytest.raises(ValueError, match=r"a node computes other pixels .* choose them with --resource"):
        Worker(settings, ordered.replace(numerics_id="another"))


def test_rows_of_several_seeds_or_with_gaps_are_refused(settings: Settings, ordered: Generation) -> None:
    worker = Worker(settings, ordered)
    for seeds, indices in (([1, 2], [0, 1]), ([1, 1], [0, 2])):
        with pytest.raises(ValueError, match="one seed and consecutive image indices"):
            worker({"seed": np.array(seeds), "image_index": np.array(indices)})


def test_the_description_is_that_of_generate_and_its_errors_can_be_pickled(
    settings: Settings, ordered: Generation
) -> None:
    assert describe(settings, order()) == ordered
    for changes, message in (
        ({"classes": ["Dog"]}, 'class: must be one of Ape, Bee, Cat, T-shirt/top; got "Dog"'),
        ({"sampling": {"steps": 1}}, "steps: "),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            describe(settings, order(**changes))
        assert type(caught.value) is ValueError


def test_batches_hold_class_seed_and_index_of_missing_images_and_never_cross_shards() -> None:
    images = generation(shard_size=4)
    tables = list(batches_of(images, images.shards()[1:], 3))
    assert [table["image_index"].to_pylist() for table in tables] == [[9, 10, 11], [12], [13, 14, 15]]
    assert [label for table in tables for label in table["class"].to_pylist()] == LABELS[4:]
    assert {seed for table in tables for seed in table["seed"].to_pylist()} == {7}
    (without,) = batches_of(generation(classes=None), [range(COUNT)], COUNT)
    assert without.column_names == ["seed", "image_index"]
    assert without["image_index"].to_pylist() == list(range(FIRST, FIRST + COUNT))


def test_of_a_million_images_only_the_batches_that_ray_is_given_exist(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    million = generation(count=1_000_000, shard_size=1000, image_shape=(1, 1, 1))
    made, given, taken = [0], list[int](), [0]
    make = pa.table

    def count(columns: dict[str, Any]) -> pa.Table:
        made[0] += 1
        return make(columns)

    def mapped(tables: list[pa.Table], pool: Pool, _: Generation) -> Iterator[dict[str, Any]]:
        given.append(len(tables))
        assert made[0] == sum(given)  # none for later
        assert pool.workers == 2
        for table in tables:
            assert len(table) <= WIDTHS_PER_BATCH * MAX_ROWS
            numbers = table["image_index"].to_numpy()
            yield {"image_index": numbers, "pixels": (numbers % 251).astype(np.uint8).reshape(-1, 1, 1, 1)}

    monkeypatch.setattr("pyarrow.table", count)
    monkeypatch.setattr("deploy.ray.bulk._mapped", mapped)
    monkeypatch.setattr("deploy.ray.bulk.BATCHES_PER_WORKER", 1000)

    def advance(images: float) -> None:
        taken[0] += int(images)

    missing = million.shards()[:1] + million.shards()[-40:]
    shards = produce_on(Pool(workers=2, settings=settings, reserved={}), million)(missing, advance)
    for images, (found, pixels) in zip(missing, shards, strict=True):
        assert found == images
        expected = (FIRST + np.arange(images.start, images.stop)) % 251
        assert pixels.ravel().tolist() == expected.tolist()
    assert taken == [41_000]
    assert given == [2000, 2000, 1125]


def test_a_worker_has_its_cpus_as_threads_and_with_cuda_one_gpu(settings: Settings) -> None:
    own = settings.model_copy(update={"threads": None})
    assert [with_threads(own, cpus).threads for cpus in (0.5, 1, 2.5)] == [1, 1, 2]
    assert with_threads(own.model_copy(update={"threads": 3}), 1).threads == 3
    assert reservation(settings, 0.5, ["zen3"]) == {"num_cpus": 0.5, "num_gpus": 0, "resources": {"zen3": 0.001}}
    cuda = settings.model_copy(update={"device": "cuda"})
    assert reservation(cuda, 4, ())["num_gpus"] == 1
    with pytest.raises(ValueError, match="set 'cuda'"):
        reservation(settings.model_copy(update={"device": "cuda:1"}), 1, ())


def test_as_many_workers_run_as_fit_on_each_node() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "GPU": 1.0, "zen3": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0, "memory": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    for needs, workers in (((2, 0, ()), 3), ((0.5, 0, ()), 16), ((1, 1, ()), 1), ((1, 0, ("zen3",)), 5)):
        cpus, gpus, names = needs
        reserved = {"num_cpus": cpus, "num_gpus": gpus, "resources": dict.fromkeys(names, 0.001)}
        assert fitting(nodes, reserved) == workers
    with pytest.raises(ValueError, match=r"needs 8 CPU, 1 GPU"):
        fitting(nodes, {"num_cpus": 8, "num_gpus": 1, "resources": {}})


def test_workers_without_a_node_wait_if_their_number_is_given_and_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    reserved = {"num_cpus": 2, "num_gpus": 0, "resources": {}}
    nodes = [{"Alive": True, "Resources": {"CPU": 5.0}}]
    assert [workers_on(nodes, reserved, wanted) for wanted in (None, 1, 7)] == [2, 1, 7]
    assert capsys.readouterr().err == ""
    assert workers_on([], reserved, 3) == 3
    assert "waiting: no node of the cluster has room for a worker, which needs 2 CPU" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no node of the cluster has room"):
        workers_on([], reserved, None)


class TaskError(Exception):
    cause = ValueError("class: there is none")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TaskError("ray::task\n  File\n"), "class: there is none"),
        (RuntimeError("The actor died\n  File\nValueError: a node differs\n\n"), "ValueError: a node differs"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_the_reason_of_an_error_in_ray_is_its_cause(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason


def test_the_model_is_the_same_folder_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deploy.ray.bulk import absolute

    monkeypatch.chdir(tmp_path)
    assert absolute(Path("models/tiny")) == tmp_path / "models/tiny"
    assert absolute(Path("mine=models/tiny")) == Path(f"mine={tmp_path}/models/tiny")
