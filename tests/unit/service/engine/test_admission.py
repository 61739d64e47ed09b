"""Admission without a thread, a runner or an event loop."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.engine.admission import Admission
from service.engine.config import EngineConfig
from service.engine.request import GenerationRequest, Priority
from service.engine.snapshot import Snapshot
from service.engine.step_costs import StepCosts
from service.errors import (
    ClientLimit,
    DeadlineUnmeetable,
    InvalidRequest,
    QueueFull,
    ServiceError,
    TooLong,
    UnknownModel,
)
from tests.fakes import generation, params

CONFIG = EngineConfig(max_rows=2, max_queue=4, max_wait_s=60.0, client_share=0.5, policy="fifo")


def snapshot(*models: str) -> Snapshot:
    """Return the snapshot of an idle engine whose steps of two rows take a second."""
    costs = StepCosts()
    costs.observe(2, 1.0)
    return Snapshot.of(
        [], dict.fromkeys(models, 0), dict.fromkeys(models, CONFIG.max_rows), dict.fromkeys(models, costs.now)
    )


def limited(request: GenerationRequest, images: int) -> GenerationRequest:
    return GenerationRequest(**{**vars(request), "max_client_images": images})


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (generation("r", params(), model="k"), UnknownModel),
        (generation("r", *[params()] * 7), InvalidRequest),
        (generation("r", *[params()] * 5), QueueFull),
        (generation("r", params(), params(), client="a"), ClientLimit),
        (limited(generation("r", params(), client="a"), 2), ClientLimit),
        (limited(generation("r", params(), params(), params()), 2), InvalidRequest),
        (generation("r", params(steps=5)), QueueFull),
        (generation("r", params(steps=5), deadline_s=9.0), QueueFull),
    ],
)
def test_a_refused_request_changes_no_counts(request_: GenerationRequest, error: type[ServiceError]) -> None:
    admission = Admission(CONFIG, ["m"])
    admission.accept(generation("before", params(steps=80), params(steps=80), client="a"), 0.0, snapshot("m"))
    before = dict(admission.ledger.orders)
    with pytest.raises(error):
        admission.accept(request_, 0.0, snapshot("m"))
    assert dict(admission.ledger.orders) == before
    assert admission.ledger.rows == admission.ledger.client("a").images == 2
    assert admission.eta("r", snapshot("m")) is None


def test_a_deadline_is_compared_with_the_returned_prediction() -> None:
    admission = Admission(CONFIG, ["m"])
    with pytest.raises(DeadlineUnmeetable):
        admission.accept(generation("r", params(steps=5), deadline_s=4.9), 0.0, snapshot("m"))
    [image], prediction = admission.accept(generation("r", params(steps=5), deadline_s=5.0), 100.0, snapshot("m"))
    assert (prediction.finish_s, image.deadline) == (5.0, 105.0)
    assert admission.eta("r", snapshot("m")) == prediction


def test_a_request_that_would_be_given_up_is_refused() -> None:
    admission = Admission(CONFIG, ["m"])
    allowed = replace(generation("r", params(steps=4), priority=Priority.BATCH), longest_s=4.0)
    with pytest.raises(
        TooLong, match="predicted to take 5 s alone, the longest that the service allows is 4 s"
    ) as long:
        admission.accept(replace(allowed, images=(params(steps=5),)), 0.0, snapshot("m"))
    assert long.value.predicted_s == 5.0
    admission.accept(replace(allowed, request_id="first", images=(params(steps=4),) * 2), 0.0, snapshot("m"))
    with pytest.raises(QueueFull, match="the limit is 4 s") as full:  # it would fit, alone
        admission.accept(allowed, 0.0, snapshot("m"))
    assert full.value.retry_after_s >= 1
    admission.accept(replace(allowed, longest_s=None), 0.0, snapshot("m"))


def test_work_of_others_is_no_reason_to_call_a_request_too_long() -> None:
    """Other models take turns with its steps, and interactive work limits a batch's own."""
    for before in (generation("other", params(steps=9), model="n"), generation("same", params(steps=9))):
        admission = Admission(CONFIG, ["m", "n"])
        request = replace(generation("r", params(steps=4), priority=Priority.BATCH), longest_s=4.5)
        admission.accept(before, 0.0, snapshot("m", "n"))
        with pytest.raises(QueueFull, match=r"the limit is 4\.5 s"):
            admission.accept(request, 0.0, snapshot("m", "n"))
        with pytest.raises(TooLong):
            admission.accept(replace(request, images=(params(steps=5),)), 0.0, snapshot("m", "n"))
        admission.release(before.request_id, 0)
        admission.accept(request, 0.0, snapshot("m", "n"))


def test_capacity_of_ended_images_is_reused() -> None:
    admission = Admission(CONFIG, ["m"])
    admission.accept(limited(generation("r", params(), params(), client="a"), 2), 0.0, snapshot("m"))
    second = limited(generation("s", params(), client="a"), 2)
    with pytest.raises(ClientLimit, match="2 images of this client are in flight, the limit is 2; "):
        admission.accept(second, 0.0, snapshot("m"))
    admission.release("r", 0)
    admission.accept(second, 0.0, snapshot("m"))
    admission.release_all()
    assert admission.ledger.rows == admission.ledger.requests == 0


def test_a_retired_model_accepts_nothing_and_is_dropped_after_its_last_image() -> None:
    admission = Admission(CONFIG, ["m"])
    admission.accept(generation("r", params(), params()), 0.0, snapshot("m"))
    admission.add_model("m/2")
    admission.retire_model("m")
    with pytest.raises(UnknownModel):
        admission.accept(generation("s", params()), 0.0, snapshot("m", "m/2"))
    admission.release("r", 0)
    assert admission.remove_finished_models() == []
    admission.release("r", 1)
    assert admission.remove_finished_models() == ["m"]
    assert list(admission.ledger.models) == ["m/2"]
    assert admission.remove_finished_models() == []
    admission.accept(generation("t", params(), model="m/2"), 0.0, snapshot("m/2"))
