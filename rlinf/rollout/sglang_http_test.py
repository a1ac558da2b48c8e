"""The HTTP client against a server of a few lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from rlinf.rollout.sglang_http import HOST, Refused, SGLangHttp

JSON = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


def with_answer(answer: bytes, ask: Callable[[SGLangHttp], Awaitable[Any]]) -> tuple[Any, bytes]:
    """What `ask` makes of the answer, and what the server heard."""
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        heard.append(head + await reader.readexactly(length))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def both() -> Any:
        server = await asyncio.start_server(serve, HOST, 0)
        async with server:
            return await ask(SGLangHttp(server.sockets[0].getsockname()[1], "secret"))

    return asyncio.run(both()), heard[0]


def chunked(*parts: bytes) -> bytes:
    """An answer whose events are cut anywhere."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"


async def events(http: SGLangHttp) -> list[dict[str, Any]]:
    return [event async for event in http.stream("/generate", {})]


def test_a_call_is_authorised_json_and_so_is_its_answer() -> None:
    answer, heard = with_answer(JSON % (8, b'{"a": 1}'), lambda http: http.post("/path", {"x": [1, 2]}))
    assert answer == {"a": 1}
    assert heard.startswith(b"POST /path HTTP/1.1\r\n") and b"Authorization: Bearer secret\r\n" in heard
    assert json.loads(heard.split(b"\r\n\r\n")[1]) == {"x": [1, 2]}


def test_an_empty_answer_is_none() -> None:
    assert with_answer(JSON % (0, b""), lambda http: http.post("/path", {}))[0] is None


@pytest.mark.parametrize(
    "body", [b'{"error": {"message": "too long"}}', b'{"success": false, "message": "too long"}', b'{"error": "too long"}', b"too long"]
)
def test_a_refusal_says_what_the_server_said(body: bytes) -> None:
    with pytest.raises(Refused, match="^too long$"):
        with_answer(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body), lambda http: http.post("/path", {}))


def test_events_are_put_together_wherever_they_were_cut() -> None:
    stream = b'data: {"n": 1}\n\ndata: {"text": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
    for cut in range(1, len(stream)):
        assert with_answer(chunked(stream[:cut], stream[cut:]), events)[0] == [{"n": 1}, {"text": "é"}]


@pytest.mark.parametrize(
    "answer", [chunked(b'data: {"n": 1}\n\n'), chunked(b'data: {"n": 1}\n\n')[:-5], b""], ids=["no last event", "cut off", "nothing"]
)
def test_a_stream_that_breaks_off_is_an_error(answer: bytes) -> None:
    with pytest.raises(EOFError):
        with_answer(answer, events)
