"""What the service says about itself when it is ready."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from service.http.start_up import start_up_facts, start_up_screen
from service.http.state import ServiceState
from tests.integration.in_process import WIDTH, running
from tests.waiting import runs


@runs
async def test_facts_are_json_and_the_screen_has_all_of_them() -> None:
    async with running() as service:
        state: ServiceState = service.app.state.service
        facts = start_up_facts(state, ["http://127.0.0.1:8000"], 99)
        keyed = state.settings.model_copy(update={"keys_file": Path("keys.json"), "admin_root": Path("models")})
        guarded = start_up_facts(replace(state, settings=keyed), ["http://[::]:80", "http://10.0.0.1:80"], 99)
        numerics_id = state.models["m"].numerics_id

    assert json.loads(json.dumps(facts)) == facts
    (model,) = facts["models"]
    assert (model["name"], model["width"], model["threads"], model["precision"]) == ("m", WIDTH, 1, "fp32")
    screen = start_up_screen(facts)
    for shown in (
        f"iddpm {facts['version']} is ready",
        "m (default): 8 x 8, 1 channel, 4 classes, T = ",
        f"exact arithmetic, 1 thread; precision fp32; width {WIDTH} rows",
        numerics_id,
        "5 rows wait, 600 s at most; per request 64000 row-steps, 3600 s",
        "99 connections",
        "no API key is needed",
        "hosts localhost, 127.0.0.1, [::1]",
        "page        http://127.0.0.1:8000/\n",
    ):
        assert shown in screen
    assert len(screen.splitlines()) <= 24
    assert max(map(len, screen.splitlines())) <= 100

    screen = start_up_screen(guarded)
    assert "API keys of keys.json" in screen
    assert "models of models can be loaded while running" in screen
    assert "listening   http://[::]:80\n              http://10.0.0.1:80\n" in screen
    assert "page        http://localhost:80/\n              http://10.0.0.1:80/\n" in screen
