"""Server: asks a model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, or a service.

    Server("Qwen/Qwen2.5-VL-7B-Instruct", "http://judge:8000/v1").ask(questions)

Every question ends: with a reply, or with a note that says what became of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, final
from urllib.parse import urlsplit

from attrs import Factory, evolve, field, frozen, validators

from reasonrl.errors import ConfigError
from reasonrl.judges.completions import MalformedError, complaint, completion, image_part, request_body
from reasonrl.judges.loop_thread import Session, Shared
from reasonrl.judges.retries import Breaker, asked_to_wait_s, backoff_s
from reasonrl.judges.vlm import SERVER_ERROR, SERVER_GONE, TIMED_OUT, VLM, Choice, Coordinates, Question, Reply

if TYPE_CHECKING:
    from httpcore2 import AsyncConnectionPool, Response
    from PIL.Image import Image

UNREADABLE = "unreadable image"
"""What a note begins with where a question's picture cannot be encoded."""
PREPARED = 8
"""Questions that are encoded and wait for their turn, beyond those under way."""
PROBE_POLL_S = 0.05

_AGAIN = frozenset({408, 409, 425, 429})
_NOBODY_HOME = frozenset({502, 503, 504})
"""Statuses by which a proxy says that there is no server behind it."""
_FAMILIES: dict[str, Coordinates] = {"qwen2.5vl": "pixels", "qwen2vl": "thousandths", "qwen3vl": "thousandths"}

_positive = validators.gt(0.0)


@frozen
class _Fault:
    """An attempt without a reply."""

    note: str
    again: bool = True
    """Whether another attempt may do better."""
    reached: bool = False
    """Whether a server was there."""
    wait_s: float = 0.0
    """What it asked for before the next."""


_GONE = _Fault(f"{SERVER_GONE}: not asked, since too many attempts before failed", again=False)


def _begun(server: Any) -> Shared:  # a Server, which the class below does not know yet
    breaker = partial(Breaker, window=server.breaker_window, share=server.breaker_share, cool_s=server.breaker_cool_s)
    return Shared(server.concurrency, breaker, server.url.startswith("https:"))


def _bare(url: str) -> str:
    return url.rstrip("/")


def _check_address(url: str) -> None:
    """Raises ConfigError for what no request can be sent to."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url must begin with http:// or https://, got {url!r}: http://127.0.0.1:8000/v1")
    if "@" in url.split("/")[2]:
        raise ConfigError("url must be without a user and a password, which recipes would tell: use key_variable")
    try:
        parts = urlsplit(url)
        there = bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half a bracket
        there = False
    if not there or not url.isascii() or not url.isprintable() or set(" ?#") & set(url):
        raise ConfigError(f"url must be a host, a port and a path in ASCII, got {url!r}: http://127.0.0.1:8000/v1")


@final
@frozen
class Server(VLM):
    """A vision-language model behind `POST {url}/chat/completions`, asked at temperature 0.

    Failures of the connection, of time, statuses 408, 409, 425, 429 and 5xx, and replies that are no completion are
    asked again, other statuses are not. A server that is gone costs seconds: see `breaker_window`. Proxies named by
    the environment are not used. The instance keeps the breaker between calls, and copies start afresh.
    """

    model: str
    """The name that the server serves it by."""
    url: str = field(default="http://127.0.0.1:8000/v1", converter=_bare)
    revision: str = ""
    """Of the weights: part of a cache's key. A served name says nothing about them, so change it with them."""
    key_variable: str = ""
    """The environment variable that holds the API key; empty = none is sent."""
    log_probs: bool = True
    """Whether the server gives log-probs of a choice's options; `transformers serve` does not."""
    box_coordinates: Coordinates | None = None
    """How the model writes boxes; None = as its name says (Qwen2.5-VL, Qwen2-VL, Qwen3-VL)."""
    structured: Literal["json_schema", "none"] = field(
        default="json_schema", validator=validators.in_(("json_schema", "none"))
    )
    """How a reply is held to its form: a `response_format`, which vLLM and SGLang enforce, with a list at its root for
    boxes, as the models write them; "none" where a server refuses it (OpenAI wants an object at the root)."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = field(
        default="max_tokens", validator=validators.in_(("max_tokens", "max_completion_tokens"))
    )
    """What limits a reply is called: every server knows the first, OpenAI's newer models only the second."""
    top_logprobs: int = field(default=20, validator=[validators.ge(1), validators.le(20)])
    """Likeliest tokens listed; 20 is the most that vLLM gives unless told otherwise (`--max-logprobs`)."""
    extra: Mapping[str, Any] = field(factory=dict, hash=False)
    """Added to a request's body, and stronger: seed, chat_template_kwargs, mm_processor_kwargs."""
    concurrency: int = field(default=64, validator=validators.ge(1))
    """Requests under way at a time, over all threads that ask."""
    attempts: int = field(default=4, validator=validators.ge(1))
    timeout_s: float = field(default=60.0, validator=_positive)
    """Of an attempt, from the connection to the last byte."""
    deadline_s: float = field(default=150.0, validator=_positive)
    """Of a question, from its first attempt to the end of its last."""
    backoff_s: float = field(default=0.5, validator=validators.ge(0.0))
    """The first retry comes after up to so long, each next one after up to twice that."""
    most_backoff_s: float = field(default=30.0, validator=validators.ge(0.0))
    """The most of a backoff; and of what Retry-After asks for, on top of which a backoff comes."""
    max_reply_bytes: int = field(default=1_000_000, validator=validators.ge(1))
    breaker_window: int = field(default=20, validator=validators.ge(1))
    """Of so many attempts, the last ones, `breaker_share` failed to reach the server: then it counts as gone, and
    questions end at once. `breaker_cool_s` later one attempt probes whether it is back, and the others wait for it."""
    breaker_share: float = field(default=0.9, validator=[_positive, validators.le(1.0)])
    breaker_cool_s: float = field(default=30.0, validator=validators.ge(0.0))

    _shared: Shared = field(init=False, eq=False, repr=False, default=Factory(_begun, takes_self=True))

    def __attrs_post_init__(self) -> None:
        _check_address(self.url)

    @property
    def identity(self) -> str:
        """Model, revision, and what else moves its answers, where it is not the default."""
        moves = {"extra": dict(self.extra), "structured": self.structured, "top_logprobs": self.top_logprobs}
        usual = {"extra": {}, "structured": "json_schema", "top_logprobs": 20}
        changed = {name: value for name, value in moves.items() if value != usual[name]}
        name = f"{self.model}@{self.revision}" if self.revision else self.model
        return f"{name} {json.dumps(changed, sort_keys=True)}" if changed else name

    @property
    def coordinates(self) -> Coordinates:
        """How it writes boxes; raises ConfigError where neither the setting nor the name says."""
        if self.box_coordinates is not None:
            return self.box_coordinates
        plain = re.sub(r"(?<!\d)\.|\.(?!\d)|[-_ /]", "", self.model.lower())
        for family, coordinates in _FAMILIES.items():
            if family in plain:
                return coordinates
        raise ConfigError(
            f"cannot tell how {self.model!r} writes boxes: set box_coordinates to 'pixels' (Qwen2.5-VL),"
            " 'thousandths' (Qwen2-VL, Qwen3-VL) or 'locations'"
        )

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Returns one reply each, in order; raises ConfigError for a key that is not there."""
        headers = self._headers()
        if not questions:
            return []
        with self._shared.session() as session:
            return session.wait_for(_Call(self, session, headers).answers(questions))

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(b"Content-Type", b"application/json"), (b"Accept-Encoding", b"identity")]
        if self.key_variable:
            key = os.environ.get(self.key_variable, "").strip()
            if not key or not key.isascii() or not key.isprintable():
                raise ConfigError(f"key_variable {self.key_variable} holds no API key: set it, or key_variable=''")
            headers.append((b"Authorization", f"Bearer {key}".encode()))
        return headers

    def body_settings(self, question: Question) -> dict[str, Any]:
        """Returns what a request's body says beside the messages."""
        answer = question.answer
        settings: dict[str, Any] = {"model": self.model, "temperature": 0, self.length_field: answer.max_tokens}
        if isinstance(answer, Choice):
            if self.log_probs:
                settings |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        elif answer.schema is not None and self.structured == "json_schema":
            schema = {"name": type(answer).__name__.lower(), "schema": answer.schema, "strict": True}
            settings["response_format"] = {"type": "json_schema", "json_schema": schema}
        return settings | dict(self.extra)


@final
class _Call:
    """One ask, on the session's loop."""

    def __init__(self, server: Server, session: Session, headers: list[tuple[bytes, bytes]]) -> None:
        self.server = server
        self.session = session
        self.headers = headers
        self.shared = server._shared

    async def answers(self, questions: Sequence[Question]) -> list[Reply]:
        """Returns the replies, in order; a few workers go through the questions, picture by picture."""
        replies: dict[int, Reply] = {}
        pictures = _Pictures(questions)
        order = iter(by_picture(questions))

        async def work() -> None:
            for k in order:
                replies[k] = await self.answer(questions[k], pictures)

        num_workers = min(len(questions), self.server.concurrency + PREPARED)
        workers = [asyncio.create_task(work()) for _ in range(num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
        return [replies[k] for k in range(len(questions))]

    async def answer(self, question: Question, pictures: _Pictures) -> Reply:
        """Returns a question's reply, after as many attempts as it takes and may take."""
        try:
            parts = [await pictures.part(image) for image in question.images]
        except (OSError, ValueError) as error:
            return Reply(note=f"{UNREADABLE}: {error}")
        finally:
            pictures.shown(question.images)
        body = request_body(question, parts, settings=self.server.body_settings(question))
        async with self.session.place() as place:
            begin = time.monotonic()
            until = begin + self.server.deadline_s
            found = await self.attempt(place, body, question, until=until)
        num_attempts = 1
        while isinstance(found, _Fault) and found.again and num_attempts < self.server.attempts:
            wait_s = self.wait_s(num_attempts - 1, found)
            if time.monotonic() + wait_s >= until:
                break
            await asyncio.sleep(wait_s)
            async with self.session.place() as place:
                again = await self.attempt(place, body, question, until=until)
            if again is _GONE:
                break  # what went wrong before says more
            found, num_attempts = again, num_attempts + 1
        cost = {"seconds": time.monotonic() - begin, "retries": num_attempts - 1.0}
        if isinstance(found, Reply):
            return evolve(found, cost={**found.cost, **cost})
        times = f", after {num_attempts} attempts" if num_attempts > 1 else ""
        return Reply(note=f"{found.note}{times}", cost=cost)

    def wait_s(self, retry: int, fault: _Fault) -> float:
        """Returns the seconds before a retry: jitter, on top of what the server asked for."""
        server, draw = self.server, self.shared.users.draw.random()
        return fault.wait_s + backoff_s(retry, base_s=server.backoff_s, most_s=server.most_backoff_s, draw=draw)

    async def attempt(
        self, place: AsyncConnectionPool, body: bytes, question: Question, *, until: float
    ) -> Reply | _Fault:
        """Returns what one request came to, and tells the breaker; asks nothing while that is open, nor too late."""
        breaker = self.shared.breaker
        number = None
        while number is None:
            now = time.monotonic()
            if now >= until:
                return _GONE
            if (number := breaker.admit(now)) is None:
                if not breaker.probing:
                    return _GONE
                await asyncio.sleep(PROBE_POLL_S)
        try:
            found = await self.exchange(place, body, question, limit_s=min(until - now, self.server.timeout_s))
        except BaseException:
            breaker.drop(number)
            raise
        breaker.report(number, reached=isinstance(found, Reply) or found.reached, now=time.monotonic())
        return found

    async def exchange(
        self, place: AsyncConnectionPool, body: bytes, question: Question, *, limit_s: float
    ) -> Reply | _Fault:
        """Returns what one request came to."""
        import httpcore2

        failures = (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException, OSError)
        url = f"{self.server.url}/chat/completions"
        try:
            async with (
                asyncio.timeout(limit_s),
                place.stream("POST", url, headers=self.headers, content=body) as response,
            ):
                return await self.read(response, question)
        except TimeoutError:
            return _Fault(f"{TIMED_OUT}: no whole reply in {limit_s:.3g} s")
        except failures as error:
            return _Fault(f"{SERVER_GONE}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")

    async def read(self, response: Response, question: Question) -> Reply | _Fault:
        """Returns the reply of a response, of which no more is read than allowed."""
        headers = {name.lower(): value.decode("latin-1") for name, value in response.headers}
        if headers.get(b"content-encoding", "identity") != "identity":
            return _Fault(f"{SERVER_ERROR}: a compressed reply, which was not asked for", again=False, reached=True)
        raw = await _up_to(response, self.server.max_reply_bytes)
        status = response.status
        if raw is None:
            most = f"{self.server.max_reply_bytes:,} bytes"
            return _Fault(f"{SERVER_ERROR}: a reply of more than {most}", again=False, reached=True)
        if status != 200:
            asked = headers.get(b"retry-after", "")
            return _Fault(
                f"{SERVER_ERROR}: status {status}: {complaint(self.without_key(raw))}",
                again=status in _AGAIN or status >= 500,
                reached=status not in _NOBODY_HOME,
                wait_s=asked_to_wait_s(asked, now=time.time(), most_s=self.server.most_backoff_s),
            )
        try:
            return completion(raw, question)
        except MalformedError as error:
            return _Fault(f"{SERVER_ERROR}: {error}", reached=True)

    def without_key(self, raw: bytes) -> bytes:
        """Returns an error's body, in which a server may repeat the key that it does not know."""
        for name, value in self.headers:
            if name == b"Authorization":
                raw = raw.replace(value.removeprefix(b"Bearer "), b"(key)")
        return raw


async def _up_to(response: Response, most: int) -> bytes | None:
    """The body, or None where it is longer; leaving early closes the connection."""
    held = bytearray()
    stream: AsyncIterator[bytes] = response.aiter_stream()
    async with aclosing(stream) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            held += chunk
            if len(held) > most:
                return None
    return bytes(held)


@final
class _Pictures:
    """Pictures as parts of requests: each encoded once, off the loop, and let go with the last question it is in."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self._left = Counter(id(image) for question in questions for image in question.images)
        self._parts: dict[int, asyncio.Task[str]] = {}

    async def part(self, image: Image) -> str:
        """Returns a picture's part; raises OSError or ValueError where it cannot be read."""
        if id(image) not in self._parts:
            self._parts[id(image)] = asyncio.create_task(asyncio.to_thread(image_part, image))
        return await self._parts[id(image)]

    def shown(self, images: Sequence[Image]) -> None:
        """Counts down."""
        for image in images:
            self._left[id(image)] -= 1
            if not self._left[id(image)]:
                self._parts.pop(id(image), None)


def by_picture(questions: Sequence[Question]) -> Iterator[int]:
    """Yields the places of all questions, those with the same first picture together: a server keeps its prefix."""
    groups: dict[int | None, list[int]] = {}
    for k, question in enumerate(questions):
        groups.setdefault(id(question.images[0]) if question.images else None, []).append(k)
    for group in groups.values():
        yield from group
