"""A judge's server as simple as can be, in a process of its own, and a load generator as simple as can be.

Neither knows our client: they tell what a service gives to whoever asks it without delay.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from attrs import frozen

_END = b"\r\n\r\n"
_LENGTH = b"content-length:"


@frozen
class Service:
    """What takes `delay_s` for each request, and has room for `slots` at a time."""

    delay_s: float
    slots: int = 64

    @property
    def most(self) -> float:
        """Requests a second, at the most."""
        return self.slots / self.delay_s


@contextmanager
def served(service: Service) -> Iterator[str]:
    """Yields the URL of a process that answers every request, after the service's delay, with the same completion."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, service), daemon=True)
    process.start()
    there.close()
    try:
        with here:
            yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.kill()
        process.join()
        process.close()


def rate(url: str, bodies: Sequence[bytes], *, num_requests: int, concurrency: int) -> float:
    """Returns requests a second, over `concurrency` kept connections that ask again as soon as they are answered."""
    return asyncio.run(_load(url, bodies, num_requests, concurrency))


async def _load(url: str, bodies: Sequence[bytes], num_requests: int, concurrency: int) -> float:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    path = f"{urlsplit(url).path}/chat/completions"
    said = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    head, requests = said.encode(), iter(range(num_requests))

    async def ask_on() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for k in requests:
            body = bodies[k % len(bodies)]
            writer.writelines((head, b"%d" % len(body), _END, body))
            answer = (await reader.readuntil(_END)).lower()
            await reader.readexactly(int(answer.partition(_LENGTH)[2].split(b"\r\n")[0]))
        writer.close()
        await writer.wait_closed()

    begin = time.perf_counter()
    await asyncio.gather(*(ask_on() for _ in range(concurrency)))
    return num_requests / (time.perf_counter() - begin)


def _serve(pipe: Connection, service: Service) -> None:
    with suppress(KeyboardInterrupt):
        asyncio.run(_forever(pipe, service))


async def _forever(pipe: Connection, service: Service) -> None:
    slots = asyncio.Semaphore(service.slots)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Line(service.delay_s, slots), "127.0.0.1", 0, backlog=1024)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


class _Line(asyncio.Protocol):
    """One connection: counts the bytes of a request, waits, answers."""

    def __init__(self, delay_s: float, slots: asyncio.Semaphore) -> None:
        self.delay_s = delay_s
        self.slots = slots
        self.head = b""
        self.left: int | None = None
        self.answering: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.left is None:
            self.head += data
            head, end, data = self.head.partition(_END)
            if not end:
                return
            self.left = int(head.lower().partition(_LENGTH)[2].split(b"\r\n")[0])
            self.head = b""
        self.left -= len(data)
        if self.left <= 0:
            self.left = None
            task = asyncio.ensure_future(self._answer())
            self.answering.add(task)
            task.add_done_callback(self.answering.discard)

    async def _answer(self) -> None:
        async with self.slots:
            await asyncio.sleep(self.delay_s)
        if not self.transport.is_closing():
            self.transport.write(_ANSWER)


def _completion() -> bytes:
    """A completion as vLLM writes it: one token, and the likeliest twenty."""
    words = [*"0123456789", "The", "I", "A", "It", "This", "Yes", "No", "None", "An", "In"]
    chances = [0.5 if word == "7" else 0.5 / 19 for word in words]
    top = [
        {"token": word, "logprob": math.log(chance), "bytes": list(word.encode())}
        for word, chance in zip(words, chances, strict=True)
    ]
    body = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "judge",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "7", "refusal": None, "tool_calls": []},
                "logprobs": {"content": [{**top[7], "top_logprobs": top}]},
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 331, "total_tokens": 332, "completion_tokens": 1},
    }
    content = json.dumps(body).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(content) + content


_ANSWER = _completion()
