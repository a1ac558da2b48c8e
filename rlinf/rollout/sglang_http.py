"""The SGLang server's HTTP routes on loopback: JSON in, JSON or a stream of JSON events out. A connection for every call.

There are no time-outs: a weight update takes as long as it takes, and when a process of the server dies the server is ended, which
closes every connection (rlinf/rollout/sglang_server.py).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

HOST = "127.0.0.1"
LINE_BYTES = 1 << 26  # one event: the scores of a prompt are its longest


class Refused(Exception):
    """The server answered, and its answer was no. The message is the server's."""


class SGLangHttp:
    """`key` authorises every call. Raises Refused for an answer of 400 and above, OSError or EOFError when the connection breaks."""

    def __init__(self, port: int, key: str) -> None:
        self.port = port
        self._key = key

    async def post(self, path: str, body: dict[str, Any], words: bool = False) -> Any:
        """The answer; None when it is empty. words: the route answers in words, not in JSON."""
        async with self._call(path, body) as lines:
            text = "".join([line async for line in lines])
            return text if words else json.loads(text) if text else None

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Server-sent events as they come."""
        async with self._call(path, body) as lines:
            async for line in lines:
                if line.startswith("data: "):
                    if line == "data: [DONE]":
                        return
                    yield json.loads(line[6:])
        raise EOFError("the stream ended before its last event")

    @asynccontextmanager
    async def _call(self, path: str, body: dict[str, Any]) -> AsyncIterator[AsyncIterator[str]]:
        """The lines of the answer's body."""
        reader, writer = await asyncio.open_connection(HOST, self.port, limit=LINE_BYTES)
        try:
            payload = json.dumps(body).encode()
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {self._key}\r\nConnection: close\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
            )
            writer.write(head.encode() + payload)
            await writer.drain()
            status, headers = await _read_head(reader)
            lines = _lines(_chunks(reader) if headers.get("transfer-encoding") == "chunked" else _whole(reader, headers))
            if status >= 400:
                raise Refused(_message("\n".join([line async for line in lines])) or f"{path}: HTTP status {status}")
            yield lines
        finally:
            writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    headers = dict(line.split(":", 1) for line in rest if ":" in line)
    return int(first.split()[1]), {name.lower(): value.strip().lower() for name, value in headers.items()}


async def _whole(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    yield await reader.readexactly(int(headers.get("content-length", "0")))


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode()
    if rest:
        yield rest.decode()


def _message(text: str) -> str:
    """What a refusal says: SGLang writes {"message": ...} or {"error": {"message": ...}}."""
    if not text.startswith("{"):
        return text
    answer = json.loads(text)
    error = answer.get("error", answer)
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
