"""Which requests are refused, when and how: a complete app in this process, around a network that a test controls."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.integration.in_process import LATE, QUEUE, WIDTH, running
from tests.waiting import runs


@runs
async def test_exactly_the_requests_beyond_width_and_queue_are_refused() -> None:
    async with running() as service:
        service.denoiser.let.clear()
        asked = [
            asyncio.create_task(service.generate(n=1, cfg_scale=1, steps=3, seed=k))
            for k in range(WIDTH + QUEUE + LATE)
        ]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)

        async def refused() -> bool:
            return await service.metric("iddpm_requests_total", outcome="rejected") == LATE

        await service.until(refused)
        service.denoiser.let.set()
        answers = await asyncio.gather(*asked)
        assert sorted(answer.status_code for answer in answers) == [200] * (WIDTH + QUEUE) + [503] * LATE
        for answer in answers:
            if answer.status_code == 503:
                assert answer.json()["title"] == "Queue full"
                assert int(answer.headers["retry-after"]) >= 1


@runs
async def test_a_client_at_its_share_gets_429_and_others_are_admitted() -> None:
    async with running(client_share=0.5, trusted_proxies="10.0.0.0/8") as service:
        service.denoiser.let.clear()
        body: dict[str, Any] = {"cfg_scale": 1, "steps": 3}
        accepted = [asyncio.create_task(service.generate(**body, n=3))]

        async def in_flight() -> bool:
            waiting, held = await asyncio.gather(
                service.metric("iddpm_images_waiting"), service.metric("iddpm_images_running")
            )
            return waiting + held == 3 * len(accepted)

        await service.until(in_flight)
        for peer, forwarded_for in (("192.0.2.1", None), ("10.0.0.1", "192.0.2.1"), ("192.0.2.1", "192.0.2.9")):
            refused = await service.generate(peer, forwarded_for, **body)
            assert (refused.status_code, refused.json()["title"]) == (429, "Too many requests")
            assert int(refused.headers["retry-after"]) >= 1
        accepted.append(asyncio.create_task(service.generate("10.0.0.1", "192.0.2.9", **body, n=3)))
        assert await service.metric("iddpm_requests_total", outcome="rejected") == 3
        service.denoiser.let.set()
        assert [answer.status_code for answer in await asyncio.gather(*accepted)] == [200, 200]


@runs
async def test_a_deadline_that_cannot_be_met_is_refused_with_the_predicted_finish() -> None:
    async with running() as service:
        refused = await service.generate(steps=50, deadline_s=1e-9)
        assert (refused.status_code, refused.json()["title"]) == (422, "Deadline cannot be met")
        assert refused.json()["predicted_finish_s"] > 1e-9
        assert "deadline_s: predicted to finish in" in refused.json()["detail"]
        assert (await service.generate(steps=3, deadline_s=3600)).status_code == 200


@runs
async def test_answers_give_predicted_and_actual_times() -> None:
    async with running() as service:
        answer = await service.generate(steps=5, n=2, priority="batch")
        timing = answer.json()["timing"]
        assert timing["images_ahead"] == timing["predicted_wait_s"] == 0
        assert timing["predicted_finish_s"] > 0
        assert 0 <= timing["wait_s"] < timing["finish_s"]


@runs
async def test_a_request_that_takes_too_long_gets_504_and_frees_its_rows() -> None:
    async with running(max_request_s=0.5) as service:
        service.denoiser.let.clear()
        late = await service.generate(steps=10, n=4, cfg_scale=1)
        assert (late.status_code, late.json()["title"]) == (504, "Took too long")
        assert await service.metric("iddpm_remaining_row_steps") == 4 * 10
        service.denoiser.let.set()

        async def empty() -> bool:
            return await service.metric("iddpm_remaining_row_steps") == 0

        await service.until(empty)
        assert await service.metric("iddpm_images_running") == 0
        assert await service.metric("iddpm_wasted_row_steps_total") == WIDTH  # the step in progress
        assert await service.metric("iddpm_requests_total", outcome="failed") == 1


@runs
async def test_a_request_that_would_take_too_long_is_refused_before_any_work() -> None:
    async with running(max_request_s=1e-6) as service:
        refused = await service.generate(steps=10)
        assert (refused.status_code, refused.json()["title"]) == (422, "Would take too long")
        assert "the longest that the service allows is 1e-06 s" in refused.json()["detail"]
        assert refused.json()["predicted_finish_s"] > 0
        assert await service.metric("iddpm_images_running") == 0


@pytest.mark.parametrize("body", [{"priority": "urgent"}, {"deadline_s": 0}, {"deadline_s": "1"}, {"deadline_s": 1e9}])
def test_priorities_and_deadlines_have_limits(body: dict[str, Any]) -> None:
    @runs
    async def check() -> None:
        async with running() as service:
            refused = await service.generate(**body)
            assert refused.status_code == 422
            assert {error["field"] for error in refused.json()["errors"]} == set(body)

    check()
