"""What does deciding cost? Seconds of `schedule` and `complete`, and of a prediction, with thousands of images waiting.

    python -m benchmarks.scheduler --waiting 10000 --width 32

No model runs: what is timed is bookkeeping only. Every image that leaves is replaced by a new one, so the queue keeps
its length; a third of the images is guided, a tenth is batch work, and one client has a tenth of everything. The goal
is a median below 200 microseconds per step at 10,000 waiting and width 32. --step-ms says what a step of the network
takes, to compare with.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import get_args

from service.engine.config import EngineConfig
from service.engine.forecast import DeviceView, Forecast
from service.engine.policies import PolicyName
from service.engine.request import GenerationRequest, ImageParams, PlanKey, Priority, images_of
from service.engine.scheduler import Scheduler
from service.engine.step_costs import StepCosts

MODEL = "m"
CLIENTS = 1000


def draw_request(draw: random.Random, number: int) -> GenerationRequest:
    """Draw a request of one image."""
    steps = draw.choice((50, 50, 50, 100, 100, 250))
    image = ImageParams(
        plan=PlanKey(sampler="ancestral", spec=str(steps)),
        num_steps=steps,
        seed=0,
        image_index=0,
        class_index=None,
        cfg_scale=2.0 if draw.random() < 1 / 3 else 1.0,
    )
    return GenerationRequest(
        request_id=str(number),
        model=MODEL,
        images=(image,),
        client="crowd" if draw.random() < 0.1 else str(draw.randrange(CLIENTS)),
        priority=Priority.BATCH if draw.random() < 0.1 else Priority.INTERACTIVE,
        deadline_s=draw.uniform(1.0, 60.0) if draw.random() < 0.5 else None,
    )


def microseconds(times: list[float]) -> str:
    """Format median, 99th percentile and largest."""
    ordered = sorted(times)
    figures = (statistics.median(ordered), ordered[int(0.99 * len(ordered))], ordered[-1])
    return " | ".join(f"{1e6 * t:.0f}" for t in figures)


def run(policy: PolicyName, waiting: int, width: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of every step's decisions, and of every prediction."""
    config = EngineConfig(max_rows=width, policy=policy)
    scheduler, forecast, costs = Scheduler(config, [MODEL]), Forecast(config, [MODEL]), StepCosts()
    costs.observe(width, 1.0)
    draw = random.Random(0)  # noqa: S311  # nothing secret
    number = 0
    deciding, predicting = [], []

    def arrive() -> None:
        nonlocal number
        request = draw_request(draw, number)
        number += 1
        view = DeviceView(
            running=scheduler.running(),
            steps={MODEL: scheduler.steps(MODEL)},
            widths={MODEL: width},
            costs={MODEL: costs},
        )
        images = images_of(request, float(scheduler.steps(MODEL)))
        begun = time.perf_counter()
        forecast.predict(images, view)
        predicting.append(time.perf_counter() - begun)
        forecast.add(images, view)
        scheduler.add(images_of(request, float(scheduler.steps(MODEL))))

    for _ in range(waiting):
        arrive()
    predicting.clear()
    for _ in range(steps):
        begun = time.perf_counter()
        batch = scheduler.schedule(0.0)
        between = time.perf_counter()
        assert batch is not None
        ok = [True] * len(batch.images)
        resumed = time.perf_counter()
        left = scheduler.complete(batch, ok)
        deciding.append(time.perf_counter() - resumed + between - begun)
        for image in left:
            forecast.remove(image.request_id, image.position)
            arrive()
    return deciding, predicting


def main() -> None:
    """Print a row per policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--step-ms", type=float, default=10.0)
    asked = parser.parse_args()
    print("| policy | step: median us | p99 | max | prediction: median us | p99 | max | part of a step |")
    print("|---|" + "---:|" * 7)
    for policy in get_args(PolicyName):
        deciding, predicting = run(policy, asked.waiting, asked.width, asked.steps)
        part = statistics.median(deciding) / (asked.step_ms / 1000)
        print(f"| {policy} | {microseconds(deciding)} | {microseconds(predicting)} | {part:.2%} |", flush=True)


if __name__ == "__main__":
    main()
