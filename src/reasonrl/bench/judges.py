"""The judges' tables: how much of a server's own rate our client leaves, and how fast a warm cache answers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from attrs import asdict, frozen
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from reasonrl.bench.loopback import Service, rate, served
from reasonrl.bench.measure import machine
from reasonrl.errors import ConfigError
from reasonrl.judges.cached import Cached
from reasonrl.judges.completions import image_part, request_body
from reasonrl.judges.server import Server
from reasonrl.judges.vlm import VLM, Question, Reply, marks, read

if TYPE_CHECKING:
    from reasonrl.judges.vlm import Coordinates

SIDE = 384
"""Of a picture, Janus-Pro's."""
PER_PICTURE = 7
"""Questions about a picture: GoT-R1 asks three of a sample, and one for each of about four planned objects."""
CONCURRENCY = 64
TARGET, LOOKUPS = 0.9, 2000
"""Share of the server's own rate, and lookups a second, that are asked of us."""
MARK = marks(0, 9)


@frozen
class Reached:
    """Requests a second of one service, by both, and what ours took."""

    service: Service
    own: float
    """By the load generator, with bodies that are ready."""
    ours: float
    """By `Server`, from pictures to scores."""
    cpu_s: float
    """Of a question, in our process: encoding, asking, reading."""

    @property
    def share(self) -> float:
        """Of the server's own rate."""
        return self.ours / self.own


@frozen
class Looked:
    """Lookups a second in a warm cache, pictures hashed."""

    per_picture: int
    rate: float


def run(delays_s: Sequence[float], *, least_s: float = 5.0, repeats: int = 3, num_lookups: int = 512) -> dict[str, Any]:
    """Measures services of each delay with 64 places, and lookups; medians over rounds of own, ours, own, ours..."""
    if not delays_s or min(delays_s) <= 0:
        raise ConfigError(f"a service takes some time, got delays of {list(delays_s)} s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("", total=len(delays_s) + 2)
        reached = []
        for delay_s in delays_s:
            progress.update(bar, description=f"a server of {delay_s * 1e3:g} ms")
            reached.append(measured(Service(delay_s, CONCURRENCY), least_s=least_s, repeats=repeats))
            progress.advance(bar)
        looked = []
        for per_picture in (1, PER_PICTURE):
            progress.update(bar, description="a warm cache")
            looked.append(looked_up(per_picture, num_lookups=num_lookups, repeats=repeats))
            progress.advance(bar)
    return {
        "machine": machine(torch.device("cpu")),
        "side": SIDE,
        "per_picture": PER_PICTURE,
        "concurrency": CONCURRENCY,
        "repeats": repeats,
        "targets": {"share": TARGET, "lookups": LOOKUPS},
        "services": [{**asdict(one), "share": one.share} for one in reached],
        "lookups": [asdict(one) for one in looked],
    }


def measured(service: Service, *, least_s: float, repeats: int) -> Reached:
    """Returns both rates of a service, the medians of rounds of about `least_s` seconds each."""
    num_rounds = max(2, round(least_s / service.delay_s))  # of all places; the first connects, the last runs out
    num_requests = num_rounds * service.slots
    questions = asked(num_requests, per_picture=PER_PICTURE)
    own, ours, cpu = [], [], []
    with served(service) as url:
        client = Server("judge", url, concurrency=CONCURRENCY)
        settings = client.body_settings(questions[0])
        ready = [
            request_body(one, [image_part(image) for image in one.images], settings=settings)
            for one in questions[:: max(1, num_requests // CONCURRENCY)]
        ]
        for _ in range(repeats):
            own.append(rate(url, ready, num_requests=num_requests, concurrency=CONCURRENCY))
            begin, begin_cpu = time.perf_counter(), time.process_time()
            scores = [read(MARK, reply) for reply in client.ask(questions)]
            ours.append(num_requests / (time.perf_counter() - begin))
            cpu.append((time.process_time() - begin_cpu) / num_requests)
            unscored = {score.note for score in scores if score.value is None}
            assert not unscored, f"a server without faults left questions unscored: {sorted(unscored)[:3]}"
    return Reached(service, median(own), median(ours), median(cpu))


def looked_up(per_picture: int, *, num_lookups: int, repeats: int) -> Looked:
    """Returns the rate at which a warm cache answers, in one call."""
    questions = asked(num_lookups, per_picture=per_picture)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Cached(_Ready(), Path(folder))
        cache.ask(questions)
        for _ in range(repeats):
            begin = time.perf_counter()
            replies = cache.ask(questions)
            rates.append(num_lookups / (time.perf_counter() - begin))
            assert all(reply.cost == {"hits": 1.0} for reply in replies), "a warm cache asked again"
    return Looked(per_picture, median(rates))


def asked(num_questions: int, *, per_picture: int) -> list[Question]:
    """Returns questions about pictures with the detail of a photograph, `per_picture` about each."""
    noise = np.random.default_rng(0)
    pictures = [_picture(noise) for _ in range(-(-num_questions // per_picture))]
    system = "You judge whether a picture shows what was asked for. " * 8
    return [
        Question(system, f"Question {k}: does the picture show it?", (pictures[k // per_picture],), answer=MARK)
        for k in range(num_questions)
    ]


def _picture(noise: np.random.Generator) -> Image.Image:
    coarse = Image.fromarray(noise.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    fine = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = noise.integers(-4, 5, fine.shape, dtype=np.int16)
    return Image.fromarray((fine + grain).clip(0, 255).astype(np.uint8))


@final
class _Ready(VLM):
    """Answers at once, as the server does."""

    @property
    def identity(self) -> str:
        return "ready"

    @property
    def log_probs(self) -> bool:
        return True

    @property
    def coordinates(self) -> Coordinates:
        return "pixels"

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        return [Reply("7", {str(digit): -0.5 - digit for digit in range(20)}) for _ in questions]


def rendered(result: dict[str, Any]) -> Iterator[RichTable]:
    """Yields both tables."""
    most = f"{result['concurrency']} at a time, {SIDE} x {SIDE} pictures, {result['per_picture']} questions about each"
    table = RichTable(title=f"a server on loopback: {most}", box=None, title_justify="left")
    table.add_column("service", no_wrap=True)
    for name in ("its own requests/s", "ours/s", "share", "our CPU ms a question"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["services"]:
        service = row["service"]
        table.add_row(
            f"{service['slots']} places of {service['delay_s'] * 1e3:g} ms",
            f"{row['own']:,.0f}",
            f"{row['ours']:,.0f}",
            f"{row['share']:.0%}",
            f"{row['cpu_s'] * 1e3:.2f}",
        )
    yield table
    table = RichTable(title=f"a warm cache: {SIDE} x {SIDE} pictures, hashed", box=None, title_justify="left")
    table.add_column("questions about a picture", justify="right")
    table.add_column("lookups/s", justify="right")
    for row in result["lookups"]:
        table.add_row(f"{row['per_picture']}", f"{row['rate']:,.0f}")
    yield table
