"""A server that answers every request with the same number of bytes, and does nothing else."""

from __future__ import annotations

import asyncio
import socket
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int) -> None:
    """Answer the requests of a connection until the peer closes it."""
    body = b"x" * size
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()
    try:
        while True:
            lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
            await reader.readexactly(length)
            writer.write(head + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main(descriptor: int, size: int) -> None:
    """Serve until a signal, on an inherited socket."""
    listener = socket.socket(fileno=descriptor)
    server = await asyncio.start_server(lambda reader, writer: answer(reader, writer, size), sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
