"""Read JSON bodies the same way for all interfaces: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from json import decoder, scanner
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from service.errors import MalformedJson
from service.http.encoding_pool import LARGE_BODY
from service.http.state import service_state

MAX_CONTAINERS = 2000
"""Lists and objects of a body, which take up to 48 times the memory of their text; all interfaces need a few dozen."""


class _InSteps(json.JSONDecoder):
    """The json module's decoder without its C scanner, with equal values and messages.

    The C scanner holds the interpreter lock until a whole text is read, so that the event loop would stand still even
    if another thread parses. This one is slower for lists of numbers, and as fast for long strings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parse_object = decoder.JSONObject  # type: ignore[attr-defined]
        self.parse_array = decoder.JSONArray  # type: ignore[attr-defined]
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]


_IN_STEPS = _InSteps()


def read_json(text: bytes) -> Any:
    """Parse a JSON text. If it has `LARGE_BODY` bytes or more, call it in the `EncodingPool`.

    Raises:
        MalformedJson: the text is not UTF-8, not JSON, or beyond Python's limits on depth and on digits.
    """
    try:
        decoded = text.decode("utf-8-sig")  # loads(bytes) would take UTF-16 too, which RFC 8259 forbids
    except UnicodeDecodeError as error:
        raise MalformedJson("not UTF-8") from error
    if decoded.startswith("\ufeff"):  # the json module would suggest a Python codec
        raise MalformedJson("more than one byte order mark")
    if decoded.count("[") + decoded.count("{") > MAX_CONTAINERS:  # files in base64 have none of these characters
        raise MalformedJson(f"more than {MAX_CONTAINERS} lists and objects")
    try:
        return json.loads(decoded) if len(text) < LARGE_BODY else _IN_STEPS.decode(decoded)
    except json.JSONDecodeError as error:
        raise MalformedJson(f"{error.msg}, in line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise MalformedJson("nested too deeply") from error
    except ValueError as error:  # more digits than Python converts
        raise MalformedJson("a number is too long") from error


class JsonRequest(Request):
    """A request whose body FastAPI reads by `read_json`, in the encoding pool if it is large."""

    async def json(self) -> Any:
        """Return the parsed body."""
        body = await self.body()
        state = await service_state(self)
        return await state.encoding.run_if_large(len(body), read_json, body)


class JsonRoute(APIRoute):
    """A route whose JSON body is read by `read_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, which gets a `JsonRequest`."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return answer
