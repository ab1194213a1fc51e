"""Cached: what was asked once is not asked again, in this run or the next: replies on disk, by what was asked.

    Cached(Server("judge"), "~/.cache/reasonrl/judge")

A reply's key holds everything that may move it: the model's identity, the prompt's version and words, the form of the
answer, every pixel. A cache that fails costs calls and never a run: it warns once, and asking goes on without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from attrs import evolve, field, frozen

from reasonrl.judges.vlm import VLM, Answer, Choice, Coordinates, Question, Reply

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

FORMAT = 1
"""Of the file and of the keys; another one is another file."""
BUSY_S = 5.0
"""How long a writer waits for another."""
REST_S = 60.0
"""How long a cache that failed is left alone before it is tried again."""
TOGETHER = 500
"""Keys that one statement looks up."""

_HIT = {"hits": 1.0}
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _folder(path: str | Path) -> Path:
    return Path(path).expanduser()


@final
@frozen
class Cached(VLM):
    """A model whose replies are kept in a folder; several threads, processes and runs may share it, on a local disk.

    Only answers are kept, so what failed is asked again. Of the same question at the same time, in one call or in
    several threads, one is asked. A row takes about 0.6 kB, and nothing is deleted unless `prune` is called.
    """

    inner: VLM
    """Who is asked what the folder does not hold; its `identity` must change when its answers do."""
    folder: Path = field(converter=_folder)

    _now: _Now = field(init=False, eq=False, repr=False, factory=lambda: _Now())

    @property
    def identity(self) -> str:
        """That of who is asked."""
        return self.inner.identity

    @property
    def log_probs(self) -> bool:
        """That of who is asked."""
        return self.inner.log_probs

    @property
    def coordinates(self) -> Coordinates:
        """Those of who is asked."""
        return self.inner.coordinates

    @property
    def path(self) -> Path:
        """The file: a SQLite database."""
        return self.folder / f"replies-{FORMAT}.sqlite3"

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Returns one reply each, in order; those that were not asked for now cost a "hits"."""
        keys = _keys(questions, identity=f"{self.identity} {self.log_probs}")
        first = {key: k for k, key in reversed(list(enumerate(keys)))}
        store = _Store(self.path, self._now)
        replies = store.read(list(first))
        missing = {key: questions[first[key]] for key in dict.fromkeys(keys) if key not in replies}
        replies |= self._fresh(missing, store)
        return [replies[key] if k == first[key] else _again(replies[key]) for k, key in enumerate(keys)]

    def prune(self, *, keep: int) -> None:
        """Deletes all but the newest `keep` replies, and gives their space back."""

        def delete(database: sqlite3.Connection) -> None:
            newest = "SELECT id FROM replies ORDER BY id DESC LIMIT ?"
            database.execute(f"DELETE FROM replies WHERE id NOT IN ({newest})", (keep,))
            database.execute("VACUUM")

        _Store(self.path, self._now).tried(delete, otherwise=None)

    def _fresh(self, missing: Mapping[bytes, Question], store: _Store) -> dict[bytes, Reply]:
        """Asks what nobody is asking at the moment, and waits for what others are."""
        mine, theirs = self._now.claim(missing)
        replies: dict[bytes, Reply] = {}
        try:
            if mine:
                replies = dict(zip(mine, self.inner.ask([missing[key] for key in mine]), strict=True))
                store.write({key: reply for key, reply in replies.items() if not reply.note})
        finally:
            self._now.settle(mine, replies)
        for key, future in theirs.items():
            if (reply := future.result()) is not None:
                replies[key] = _again(reply)
        lost = {key: missing[key] for key in theirs if key not in replies}  # whoever asked them raised
        return replies | self._fresh(lost, store) if lost else replies


@final
class _Now:
    """What is being asked, and whether the cache works: of this process, so a copy starts afresh."""

    def __init__(self) -> None:
        self.rests_until = 0.0
        self._lock = threading.Lock()
        self._asking: dict[int, dict[bytes, Future[Reply | None]]] = {}
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Now, ())

    def claim(self, keys: Iterable[bytes]) -> tuple[list[bytes], dict[bytes, Future[Reply | None]]]:
        """Returns the keys that are the caller's to ask, and what others will have asked."""
        with self._lock:
            asking = self._asking.setdefault(os.getpid(), {})  # a forked process never hears what its parent was told
            theirs = {key: asking[key] for key in keys if key in asking}
            mine = [key for key in keys if key not in theirs]
            asking.update({key: Future() for key in mine})
        return mine, theirs

    def settle(self, keys: Iterable[bytes], replies: Mapping[bytes, Reply]) -> None:
        """Tells those who wait; None = it was not asked after all."""
        with self._lock:
            settled = {key: self._asking[os.getpid()].pop(key) for key in keys}
        for key, future in settled.items():
            future.set_result(replies.get(key))

    def warn(self, kind: str, message: str) -> None:
        """Warns, once for each kind of trouble."""
        with self._lock:
            new = kind not in self._warned
            self._warned.add(kind)
        if new:
            logging.getLogger("reasonrl").warning("%s", message)


@final
@frozen
class _Store:
    """The file; a connection lives as long as one reading or writing."""

    path: Path
    now: _Now

    def read(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """Returns what is held, each a hit; nothing where the file cannot be read."""

        def select(database: sqlite3.Connection) -> dict[bytes, Reply]:
            found: dict[bytes, Reply] = {}
            for begin in range(0, len(keys), TOGETHER):
                part = keys[begin : begin + TOGETHER]
                marks = ",".join("?" * len(part))
                rows = database.execute(f"SELECT key, reply FROM replies WHERE key IN ({marks})", part)
                found |= {key: reply for key, text in rows if (reply := _reply(text)) is not None}
            return found

        return self.tried(select, otherwise={}) if keys else {}

    def write(self, replies: Mapping[bytes, Reply]) -> None:
        """Keeps replies, where the file can be written; all of them or none."""
        rows = [(key, json.dumps([reply.text, reply.top and dict(reply.top)])) for key, reply in replies.items()]

        def insert(database: sqlite3.Connection) -> None:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT OR REPLACE INTO replies (key, reply) VALUES (?, ?)", rows)
            database.execute("COMMIT")

        if rows:
            self.tried(insert, otherwise=None)

    def tried(self, work: Callable[[sqlite3.Connection], T], *, otherwise: T) -> T:
        """Returns what the work returns; a file that is broken is moved aside, and any other trouble waited out."""
        if time.monotonic() < self.now.rests_until:
            return otherwise
        try:
            try:
                return self._with(work)
            except sqlite3.DatabaseError as error:
                if _code(error) not in _CORRUPT:
                    raise
                self._move_aside(error)
                return self._with(work)
        except (sqlite3.Error, OSError) as error:
            self.now.rests_until = time.monotonic() + REST_S
            self.now.warn("trouble", f"judges go on without the cache {self.path}: {error}")
            return otherwise

    def _with(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Opens, works, closes; again where another opens or closes the file, for which SQLite does not wait."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + BUSY_S
        while True:
            try:
                with closing(_connected(self.path)) as database:
                    return work(database)
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.005)

    def _move_aside(self, error: sqlite3.DatabaseError) -> None:
        aside = self.path.with_name(f"{self.path.name}.broken-{time.time_ns()}")
        for end in ("", "-wal", "-shm"):  # a new file must not find the old one's
            beside = self.path.with_name(self.path.name + end)
            if beside.exists():
                beside.replace(aside.with_name(aside.name + end))
        self.now.warn("broken", f"the cache {self.path} is broken ({error}): it is now {aside.name}, a new one begins")


def _code(error: sqlite3.Error) -> int:
    """SQLite's number of an error, without its finer distinctions."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _connected(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
    try:
        # Readers and one writer at a time; a crash loses the last replies at most, and breaks nothing.
        database.text_factory = bytes  # a row that is no text must not fail the rows beside it
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(
            "CREATE TABLE IF NOT EXISTS replies (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, reply TEXT NOT NULL)"
        )
    except BaseException:
        database.close()
        raise
    return database


def _again(reply: Reply) -> Reply:
    """The reply to a question that was not asked for it: no cost, and a hit where there is an answer."""
    return evolve(reply, cost={} if reply.note else _HIT)


def _reply(text: object) -> Reply | None:
    """What was written, or None for what was not: a file is as untrusted as a server."""
    try:
        said, top = json.loads(text) if isinstance(text, bytes) else (None, None)
    except (ValueError, TypeError, RecursionError):
        return None
    numbers = top is None or (isinstance(top, dict) and all(type(value) in (int, float) for value in top.values()))
    return Reply(said, top, cost=_HIT) if isinstance(said, str) and numbers else None


def _keys(questions: Sequence[Question], *, identity: str) -> list[bytes]:
    forms: dict[Answer, object] = {}
    pictures = {id(image): image for question in questions for image in question.images}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        digests = dict(zip(pictures, pool.map(_digest, pictures.values()), strict=True))
    keys = []
    for question in questions:
        if question.answer not in forms:
            forms[question.answer] = _form(question.answer)
        words = [FORMAT, identity, question.version, question.system, question.prompt, forms[question.answer]]
        parts = [json.dumps(words, sort_keys=True).encode(), *(digests[id(image)] for image in question.images)]
        keys.append(hashlib.sha256(b"\0".join(parts)).digest())
    return keys


def _form(answer: Answer) -> object:
    options = answer.options if isinstance(answer, Choice) else ()
    return [type(answer).__name__, options, answer.max_tokens, answer.schema]


def _digest(image: Image) -> bytes:
    """What tells a picture from all others: 32 bytes; one that cannot be read is like no other."""
    try:
        pixels = image.convert("RGBA") if image.mode in ("P", "PA") else image  # else its palette is left out
        return hashlib.sha256(f"{image.mode} {image.size} ".encode() + pixels.tobytes()).digest()
    except (OSError, ValueError):
        return os.urandom(32)
