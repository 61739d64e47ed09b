"""The cache of sampling plans: bounded in bytes, whatever the length of the plans."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest

from diffusion import chains
from diffusion.chains import Chain, Resample, build_chain
from diffusion.config import DiffusionConfig
from diffusion.plan_cache import PLAN_BYTES, PlanCache
from diffusion.plans import KEPT_PLANS, SamplingPlan, build_plan
from service.engine.config import EngineConfig
from service.engine.engine import Engine
from service.engine.runners.array_runner import ArrayRunner
from service.metrics import Metrics
from tests.denoisers import ExactDenoiser
from tests.fakes import generation, params, tiny_config


@dataclass(frozen=True)
class Plan:
    nbytes: int


def test_a_plan_is_built_once_while_it_is_kept() -> None:
    cache: PlanCache[Plan] = PlanCache(max_bytes=10_000)
    assert cache.get("a", lambda: Plan(1)) is cache.get("a", lambda: pytest.fail("built again"))
    assert (len(cache), cache.nbytes) == (1, 1 + PLAN_BYTES)


def test_plans_used_longest_ago_are_removed_until_the_others_fit() -> None:
    size = 1000 + PLAN_BYTES
    cache: PlanCache[Plan] = PlanCache(max_bytes=3 * size)
    for key in "abc":
        cache.get(key, lambda: Plan(1000))
    cache.get("a", lambda: pytest.fail("built again"))
    cache.get("d", lambda: Plan(1000 + size))  # as large as two
    assert (len(cache), cache.nbytes) == (2, 3 * size)
    cache.get("a", lambda: pytest.fail("built again"))


def test_a_plan_larger_than_the_bound_is_kept_alone() -> None:
    cache: PlanCache[Plan] = PlanCache(max_bytes=10_000)
    for key in "ab":
        cache.get(key, lambda: Plan(50_000))
        cache.get(key, lambda: pytest.fail("built again"))
    assert (len(cache), cache.nbytes) == (1, 50_000 + PLAN_BYTES)


def test_a_plan_that_cannot_be_built_is_not_kept() -> None:
    cache: PlanCache[Plan] = PlanCache(max_bytes=10_000)

    def fail() -> Plan:
        raise ValueError("no such plan")

    with pytest.raises(ValueError, match="no such plan"):
        cache.get("a", fail)
    assert (len(cache), cache.nbytes) == (0, 0)


def test_threads_that_build_the_same_plan_share_one() -> None:
    cache: PlanCache[Plan] = PlanCache(max_bytes=100_000)
    together = threading.Barrier(4, timeout=60)
    found: list[Plan] = []

    def build() -> Plan:
        together.wait()
        return Plan(1)

    threads = [threading.Thread(target=lambda: found.append(cache.get("a", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [plan is found[0] for plan in found] == [True] * 4
    assert cache.nbytes == 1 + PLAN_BYTES


def test_plans_of_images_in_flight_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "KEPT_PLANS", PlanCache(max_bytes=1))
    runner: ArrayRunner[Any] = ArrayRunner(ExactDenoiser(tiny_config()), EngineConfig(max_rows=4))
    engine = Engine({"m": runner}, EngineConfig(max_rows=4, timed_calls=0), Metrics())
    built = 0

    def build(*args: Any, **options: Any) -> SamplingPlan:
        nonlocal built
        built += 1
        return build_plan(*args, **options)

    monkeypatch.setattr(chains, "build_plan", build)
    engine.add(generation("r", *(params(steps=steps) for steps in (5, 6, 7))), submitted_at=0.0)
    while engine.has_work():
        engine.step()
    assert built == 3


def test_long_chains_stay_within_the_bound_of_the_process() -> None:
    diffusion, built = DiffusionConfig(num_timesteps=1000), 0
    for k in range(200):
        chain = Chain(sampler="ddim", spec="250", eta=k / 200, resample=Resample(20, 10))
        plan = build_chain(diffusion, chain)
        assert plan.nbytes >= 76 * plan.num_steps
        built += plan.nbytes
    assert KEPT_PLANS.nbytes <= 64 << 20 < built
