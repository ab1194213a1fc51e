"""A chat-completions server on a real socket that answers what it can compute of a question, and errs when told to.

    with FaultyServer(faults=lambda body, seen: "500" if seen == 0 else None) as server:
        Server("any", server.url)

The answer depends on the text and on the first pixel of the picture, so that a mix-up of two questions shows.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from PIL import Image

FAULTS = ("reset", "hung", "half", "429", "500", "not json", "wrong schema", "huge", "drip")
Faults = Callable[[dict[str, Any], int], str | None]
"""From a request's body, and how often it came before, to a fault or None."""


def known_score(text: str, pixel: int = 0) -> int:
    """Returns the digit that the server's reply to a question favours."""
    return hashlib.sha256(f"{text}|{pixel}".encode()).digest()[0] % 10


def known_log_probs(score: int) -> dict[str, float]:
    """Returns the log-probs of the first token: most on the digit, the rest on its neighbour and on a word."""
    return {str(score): math.log(0.7), str((score + 3) % 10): math.log(0.2), "The": math.log(0.1)}


def completion(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the completion that answers a request."""
    parts = body["messages"][-1]["content"]
    text = next(part["text"] for part in parts if part["type"] == "text")
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    score = known_score(text, first_pixel(urls[0]) if urls else 0)
    told = body.get("logprobs")
    content = str(score) if "response_format" not in body else structured(body, score)
    choice = {
        "index": 0,
        "finish_reason": "length" if told else "stop",
        "message": {"role": "assistant", "content": content, "refusal": None},
        "logprobs": {"content": [token_log_probs(score)], "refusal": None} if told else None,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [choice],
        "usage": {"prompt_tokens": 10 + len(text), "completion_tokens": 1, "total_tokens": 11 + len(text)},
    }


def token_log_probs(score: int) -> dict[str, Any]:
    top = [
        {"token": token, "logprob": log_prob, "bytes": list(token.encode())}
        for token, log_prob in known_log_probs(score).items()
    ]
    return {**top[0], "top_logprobs": top}


def structured(body: dict[str, Any], score: int) -> str:
    schema = body["response_format"]["json_schema"]["schema"]
    if schema["type"] == "array":
        return json.dumps([{"bbox_2d": [score, 0, score + 10, 20], "label": "cup"}])
    texts = {name: "because" for name in schema["required"] if name != "score"}
    return json.dumps({**texts, "score": score})


def first_pixel(url: str) -> int:
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True))) as image:
        red, green, _ = image.convert("RGB").getpixel((0, 0))
        return red * 256 + green


@contextmanager
def faulty_process(faults: Faults) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yields the URL of a server in a process of its own, and what tells how many requests it had so far."""
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=serve_apart, args=(there, faults), daemon=True)
    process.start()

    def told() -> int:
        here.send("count")
        return here.recv()

    try:
        with here, there:
            yield here.recv(), told
            here.send("stop")
            process.join(10)
    finally:
        process.kill()
        process.join()
        process.close()


def serve_apart(pipe: Connection, faults: Faults) -> None:
    with FaultyServer(faults) as server:
        pipe.send(server.url)
        while pipe.recv() == "count":
            pipe.send(server.num_requests)


class FaultyServer:
    """Serves in a thread of its own until its `with` ends; counts requests, connections, and the most at a time."""

    def __init__(self, faults: Faults = lambda body, seen: None, *, delay_s: float = 0.0, retry_after: str = "0"):
        self.faults = faults
        self.delay_s = delay_s
        self.retry_after = retry_after
        self.num_requests = 0
        self.num_connections = 0
        self.most_at_once = 0
        self.num_pictures = 0
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[bytes] = []
        self._at_once = 0
        self._seen: Counter[bytes] = Counter()
        self._started: Future[int] = Future()

    def __enter__(self) -> FaultyServer:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="faulty-server")
        self._thread.start()
        self.port = self._started.result()
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        open_now: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.num_connections += 1
            task = asyncio.current_task()
            assert task is not None
            open_now.add(task)
            try:
                await self._converse(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the client went away, or the test is over
            finally:
                open_now.discard(task)
                writer.close()

        server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**22, backlog=512)
        self._started.set_result(server.sockets[0].getsockname()[1])
        await self._over.wait()
        server.close()
        for task in list(open_now):
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)
        await asyncio.sleep(0)  # transports close one turn later

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            raw = await reader.readexactly(length)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            try:
                await self._respond(head, raw, reader, writer)
                await writer.drain()
            finally:
                self._at_once -= 1

    async def _respond(
        self, head: bytes, raw: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.num_requests += 1
        body = json.loads(raw)
        assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n"), head
        if self.num_requests <= 100:
            self.bodies.append(body)
            self.headers.append(head)
        key = hashlib.sha256(raw).digest()
        fault = self.faults(body, self._seen[key])
        self._seen[key] += 1
        await asyncio.sleep(self.delay_s)
        if fault is None:
            return self._send(writer, json.dumps(completion(body)).encode())
        return await self._err(fault, body, reader, writer)

    async def _err(
        self, fault: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if fault == "reset":
            writer.transport.abort()
            raise ConnectionResetError
        if fault == "hung":
            await reader.read()  # until the client gives up
            raise ConnectionResetError
        if fault == "half":
            whole = json.dumps(completion(body)).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(whole) + whole[: len(whole) // 2])
            await writer.drain()
            raise ConnectionResetError
        if fault == "huge":
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while not writer.transport.is_closing():
                writer.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
                await writer.drain()
            raise ConnectionResetError
        if fault == "drip":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not writer.transport.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.01)
            raise ConnectionResetError
        self._send(writer, *self._wrong(fault, body))

    def _wrong(self, fault: str, body: dict[str, Any]) -> tuple[bytes, str, str]:
        if fault == "429":
            return b'{"error": {"message": "slow down"}}', "429 Too Many Requests", self.retry_after
        if fault == "500":
            return b'{"error": {"message": "worker died", "code": 500}}', "500 Internal Server Error", ""
        if fault == "not json":
            return b"<html>It works!</html>", "200 OK", ""
        if fault == "wrong schema":
            return json.dumps({**completion(body), "choices": "none today"}).encode(), "200 OK", ""
        status, _, content = fault.partition(" ")  # "400 {...}", or "200 {...}" for a body of one's own
        return content.encode(), f"{status} As Told", ""

    def _send(self, writer: asyncio.StreamWriter, content: bytes, status: str = "200 OK", after: str = "") -> None:
        asked = f"retry-after: {after}\r\n" if after else ""
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n{asked}\r\n"
        writer.write(head.encode() + content)
