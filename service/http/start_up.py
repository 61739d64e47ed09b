"""Describe the service when it becomes ready: the fields of a JSON line, and one screen for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from service.cpus import available_cpus
from service.http.state import ServiceState

LABEL_WIDTH = 12
ALL_ADDRESSES = ("//[::]:", "//0.0.0.0:")
"""In URLs of sockets that accept connections to every address of this machine."""


def start_up_facts(service: ServiceState, addresses: Sequence[str], connections: int) -> dict[str, Any]:
    """Return what an operator checks first, as values for JSON.

    Args:
        service: the running service, after its warm-up.
        addresses: URLs at which it listens.
        connections: maximum number of open connections.
    """
    settings, widths = service.settings, service.engine.snapshot.widths
    return {
        "version": version("iddpm"),
        "models": [
            {
                "name": model.name,
                "image_shape": list(model.result_config.model.image_shape),
                "classes": len(model.class_names or ()),
                "num_timesteps": model.config.diffusion.num_timesteps,
                "backend": model.backend,
                "precision": model.precision,
                "threads": model.threads,
                "width": widths[model.engine_id],
                "numerics_id": model.numerics_id,
            }
            for model in service.models.values()
        ],
        "limits": {
            "max_rows": settings.max_rows,
            "max_queue": settings.max_queue,
            "max_wait_s": settings.max_wait_s,
            "max_row_steps": settings.max_row_steps,
            "max_request_s": settings.max_request_s,
            "connections": connections,
        },
        "keys_file": None if settings.keys_file is None else str(settings.keys_file),
        "allowed_hosts": list(settings.allowed_hosts),
        "admin_root": None if settings.admin_root is None else str(settings.admin_root),
        "processors": str(available_cpus()),
        "addresses": list(addresses),
    }


def start_up_screen(facts: dict[str, Any]) -> str:
    """Return the same facts as text of about 20 lines."""
    limits = facts["limits"]
    lines = [f"iddpm {facts['version']} is ready", ""]
    for number, model in enumerate(facts["models"]):
        lines += _labelled("" if number else "model", *_model_lines(model, is_default=number == 0))
    lines += _labelled(
        "limits",
        f"{limits['max_queue']} rows wait, {limits['max_wait_s']:g} s at most; "
        f"per request {limits['max_row_steps']} row-steps, {limits['max_request_s']:g} s",
        f"{limits['connections']} connections",
    )
    keys = "no API key is needed" if facts["keys_file"] is None else f"API keys of {facts['keys_file']}"
    lines += _labelled("access", keys, f"hosts {', '.join(facts['allowed_hosts'])}")
    if facts["admin_root"] is not None:
        lines += _labelled("admin", f"models of {facts['admin_root']} can be loaded while running")
    lines += _labelled("processors", facts["processors"])
    lines += _labelled("listening", *facts["addresses"])
    lines += ["", *_labelled("page", *(f"{address}/" for address in map(_local, facts["addresses"])))]
    local = _local(facts["addresses"][0])
    lines += _labelled("API", f"{local}/docs")
    lines += _labelled("metrics", f"{local}/metrics")
    lines += ["", "Ctrl-C finishes the accepted requests, then ends."]
    return "\n".join(["", *(f"  {line}".rstrip() for line in lines), ""])


def _model_lines(model: dict[str, Any], *, is_default: bool) -> list[str]:
    channels, height, width = model["image_shape"]
    classes = _counted(model["classes"], "class") if model["classes"] else "no classes"
    threads = f", {_counted(model['threads'], 'thread')}" if model["threads"] else ""
    return [
        f"{model['name']}{' (default)' if is_default else ''}: {height} x {width}, {_counted(channels, 'channel')}, "
        f"{classes}, T = {model['num_timesteps']}",
        f"  {model['backend']}{threads}; precision {model['precision']}; width {_counted(model['width'], 'row')}",
        f"  numerics_id {model['numerics_id']}",
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _local(address: str) -> str:
    """Return a URL that works on this machine."""
    for everywhere in ALL_ADDRESSES:
        address = address.replace(everywhere, "//localhost:")
    return address


def _labelled(label: str, *lines: str) -> list[str]:
    return [f"{'' if number else label:{LABEL_WIDTH}}{line}" for number, line in enumerate(lines)]
