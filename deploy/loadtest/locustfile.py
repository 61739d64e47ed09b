"""Users of the service for Locust: each one asks for images, looks at them for a moment, and asks again.

    locust -f deploy/loadtest/locustfile.py --host http://127.0.0.1:8000 --headless --users 8 --run-time 1m

What they ask for is the mixture in mix.json, which `iddpm bench --mix deploy/loadtest/mix.json` takes too. Locust shows
each kind of request by its name. A refused user waits for as long as the answer says (Retry-After), and the refusal
counts as a failure. The API key, if one is needed, is read from the variable IDDPM_KEY.
"""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, between, task

KINDS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "mix.json").read_text(encoding="utf-8"))
LONGEST_PAUSE_S = 30.0
ANSWER_S = 3660.0
"""A little more than the service's default time limit of a request (IDDPM_MAX_REQUEST_S)."""
MAX_SEED = 2**53 - 1


def draw_request(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """Return the name of a kind, drawn by weight, and the body of a request with a seed of its own."""
    (kind,) = draw.choices(KINDS, [kind["weight"] for kind in KINDS])
    fields = {name: value for name, value in kind.items() if name not in ("name", "weight")}
    return kind["name"], {"seed": draw.randint(0, MAX_SEED), **fields}


class ImageUser(HttpUser):
    """A person or program that waits for its images before it asks for others."""

    wait_time = between(0.5, 1.5)

    def on_start(self) -> None:
        """Prepare what differs between users."""
        self._draw = random.Random()  # noqa: S311  # nothing secret
        key = os.environ.get("IDDPM_KEY")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    @task
    def generate(self) -> None:
        """Ask for images and wait for them."""
        name, body = draw_request(self._draw)
        pause_s = 0.0
        with self.client.post(
            "/v1/generate", json=body, headers=self._headers, name=name, timeout=ANSWER_S, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code} {_title_of(answer)}")
                pause_s = min(LONGEST_PAUSE_S, float(answer.headers.get("Retry-After", 0)))
            elif len(answer.json()["images"]) != body.get("n", 1):
                answer.failure("not the number of images that were asked for")
        time.sleep(pause_s)  # Locust makes it pause this user only


def _title_of(answer: Any) -> str:
    """Return the title of a problem; the start of the text of answers that do not come from the service."""
    try:
        return str(answer.json()["title"])
    except (ValueError, KeyError, TypeError):
        return str(answer.text or answer.error)[:100]
