"""The order of service is derived in one place, at arrival and after each step."""

from __future__ import annotations

import pytest

from service.engine.config import EngineConfig
from service.engine.order import ServiceOrder
from service.engine.policies import PATIENCE_S, PolicyName
from tests.fakes import generation, params


@pytest.mark.parametrize(
    ("policy", "first", "after_a_step"),
    [
        ("fifo", (0, 0), (0, 0)),
        ("srw", (2 * 10 + 0.5 * 7, 0), (2 * 9 + 0.5 * 7, 0)),
        ("deadline", (100.0 + PATIENCE_S, 0), (100.0 + PATIENCE_S, 0)),
    ],
)
def test_a_step_changes_the_order_if_the_policy_uses_the_remaining_work(
    policy: PolicyName, first: tuple[float, int], after_a_step: tuple[float, int]
) -> None:
    order = ServiceOrder(EngineConfig(policy=policy, ageing=0.5))
    request = generation("r", params(steps=10, cfg_scale=2.0), params(steps=10))
    image, second = order.images_of(request, submitted_at=100.0, steps={"m": 7})
    assert (image.arrival_step, image.sequence, second.sequence) == (7, 0, 1)
    assert image.order == first
    image.steps_done += 1
    order.update([image])
    assert image.order == after_a_step


def test_a_refused_request_leaves_a_gap_and_changes_no_order() -> None:
    order = ServiceOrder(EngineConfig(policy="fifo"))
    [before] = order.images_of(generation("before", params()), 0.0, {"m": 0})
    order.images_of(generation("refused", params(), params()), 0.0, {"m": 0})
    [after] = order.images_of(generation("after", params()), 0.0, {"m": 0})
    assert before.order < after.order
