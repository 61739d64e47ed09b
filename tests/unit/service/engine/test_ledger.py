"""The ledger's counts equal a recount of its images after any arrivals and ends; an image is one object throughout."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.config import EngineConfig
from service.engine.ledger import Ledger
from service.engine.order import ServiceOrder
from service.engine.policies import PolicyName
from service.engine.request import Image, Priority
from tests.counts import count
from tests.fakes import generation, params
from tests.unit.service.engine.test_async_engine import CONFIG, PausedRunner, started
from tests.waiting import eventually, runs

MODELS = ("m", "k")
REQUESTS = st.tuples(
    st.sampled_from(MODELS),
    st.sampled_from(["", "a", "b"]),
    st.sampled_from(Priority),
    st.lists(st.tuples(st.integers(2, 9), st.sampled_from([1.0, 2.0]), st.sampled_from([0.0, 1.0])), min_size=1),
)


def check(ledger: Ledger, images: list[Image]) -> None:
    """Compare the ledger with a recount of the images that should be in it."""
    assert set(ledger.orders) == set(images)
    assert ledger.rows == sum(image.rows for image in images)
    assert ledger.requests == len({image.request_id for image in images})
    for image in images:
        assert image in ledger.unfinished(image.request_id)
    for client in ("", "a", "b"):
        own = [image for image in images if image.client == client]
        counted = ledger.client(client)
        assert (counted.rows, counted.images) == (sum(image.rows for image in own), len(own))
    for name, model in ledger.models.items():
        own = [image for image in images if image.model == name]
        assert model.rows == sum(image.rows for image in own)
        assert model.classified_rows == sum(image.classified_rows for image in own)
        assert model.row_steps == sum(image.row_steps for image in own)
        for priority in Priority:
            clients = Counter[str]()
            for image in own:
                if image.priority is priority:
                    clients[image.client] += image.row_steps
            assert model.line(priority).clients == clients
            assert model.line(priority).work.work == clients.total()


@settings(max_examples=count(300))
@given(st.lists(st.one_of(REQUESTS, st.integers(0, 20)), max_size=12), st.sampled_from(["fifo", "srw", "deadline"]))
def test_counts_equal_a_recount_and_nothing_is_left_at_the_end(
    script: list[tuple[str, str, Priority, list[tuple[int, float, float]]] | int], policy: PolicyName
) -> None:
    ledger, order, images = Ledger(MODELS), ServiceOrder(EngineConfig(policy=policy)), list[Image]()
    for number, action in enumerate(script):
        if isinstance(action, int):
            if images:
                ended = images.pop(action % len(images))
                ended.steps_done += 1  # its progress in the engine changes no count
                order.update([ended])
                assert ledger.remove(ended.request_id, ended.position) is ended
        else:
            model, client, priority, sizes = action
            request = generation(
                str(number),
                *(params(steps, cfg_scale, classifier_scale=scale) for steps, cfg_scale, scale in sizes),
                model=model,
                client=client,
                priority=priority,
            )
            accepted = order.images_of(request, 0.0, dict.fromkeys(MODELS, number))
            ledger.add(accepted)
            images += accepted
        check(ledger, images)
    for image in images:
        ledger.remove(image.request_id, image.position)
    check(ledger, [])


def test_an_image_ends_once() -> None:
    ledger = Ledger(MODELS)
    ledger.add(ServiceOrder(CONFIG).images_of(generation("r", params(), params()), 0.0, {"m": 0}))
    ledger.remove("r", 1)
    with pytest.raises(KeyError):
        ledger.remove("r", 1)
    ledger.remove("r", 0)
    with pytest.raises(KeyError):
        ledger.remove("r", 0)


@runs
async def test_the_scheduler_selects_images_in_the_order_assigned_by_admission() -> None:
    runner = PausedRunner()
    async with started(runner, CONFIG.replace(policy="srw")) as engine:
        engine.submit(generation("long", params(steps=9)))
        engine.submit(generation("short", params(steps=3), params(steps=2)))
        await eventually(runner.arrived.is_set)
        booked = engine.ledger.orders
        running = {placed.image for placed in engine.snapshot.started}
        assert running
        assert running <= set(booked)
        assert [image.params.num_steps for image in sorted(booked, key=booked.__getitem__)] == [2, 3, 9]
        runner.released.set()
        await engine.wait_idle()
        assert not engine.ledger.orders
