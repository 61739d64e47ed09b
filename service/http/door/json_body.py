"""Read JSON bodies the same way for all interfaces: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.errors import MalformedJson


def read_json(text: bytes) -> Any:
    """Parse a JSON text.

    Raises:
        MalformedJson: the text is not UTF-8, not JSON, or beyond Python's limits on depth and on digits.
    """
    try:
        decoded = text.decode("utf-8-sig")  # loads(bytes) would take UTF-16 too, which RFC 8259 forbids
    except UnicodeDecodeError as error:
        raise MalformedJson("not UTF-8") from error
    if decoded.startswith("\ufeff"):  # the json module would suggest a Python codec
        raise MalformedJson("more than one byte order mark")
    try:
        return json.loads(decoded)
    except json.JSONDecodeError as error:
        raise MalformedJson(f"{error.msg}, in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise MalformedJson("nested too deeply") from error
    except ValueError as error:  # more digits than Python converts
        raise MalformedJson("a number is too long") from error


class JsonRequest(Request):
    """A request whose body FastAPI reads by `read_json`."""

    async def json(self) -> Any:
        """Return the parsed body."""
        return read_json(await self.body())


class JsonRoute(APIRoute):
    """A route whose JSON body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which gets a `JsonRequest`."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return answer
