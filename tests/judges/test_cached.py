"""What was asked once is not asked again; and a cache that fails is a cache that is not there."""

import copy
import gc
import json
import logging
import math
import os
import pickle
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from multiprocessing import get_context

import pytest
from attrs import evolve, field, frozen
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl.config import from_record, to_record
from reasonrl.judges import cached
from reasonrl.judges.cached import Cached
from reasonrl.judges.vlm import VLM, Boxes, Choice, Question, Reply, Rubric, marks, yes_no

MARK = marks(0, 9)


@frozen
class Parrot(VLM):
    """Answers with the question's words; what begins with "fail" has a note. Remembers what it was asked."""

    name: str = "parrot"
    told: bool = True
    delay_s: float = 0.0
    asked: list = field(factory=list, eq=False, repr=False)

    @property
    def identity(self):
        return self.name

    @property
    def log_probs(self):
        return self.told

    @property
    def coordinates(self):
        return "pixels"

    def ask(self, questions):
        self.asked.extend(question.text for question in questions)
        time.sleep(self.delay_s)
        return [self.reply(question.text) for question in questions]

    def reply(self, text):
        if text.startswith("fail"):
            return Reply(note="server gone: today", cost={"seconds": 1.0})
        return Reply(f"said {text}", {"7": -0.1, "8": -math.inf}, cost={"calls": 1.0})


def question(text="is it so?", images=(), answer=MARK, **more):
    return Question("You judge.", text, tuple(images), answer=answer, **more)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "reasonrl"]


def test_what_was_asked_is_not_asked_again_in_the_next_run(tmp_path):
    first = Cached(Parrot(), tmp_path).ask([question("a"), question("b")])
    assert [reply.cost for reply in first] == [{"calls": 1.0}] * 2
    parrot = Parrot()
    again = Cached(parrot, tmp_path).ask([question("b"), question("c"), question("a")])
    assert parrot.asked == ["c"]
    assert [reply.text for reply in again] == ["said b", "said c", "said a"]
    assert [reply.cost for reply in again] == [{"hits": 1.0}, {"calls": 1.0}, {"hits": 1.0}]
    assert again[0].top == first[1].top == {"7": -0.1, "8": -math.inf}


def test_the_same_question_twice_in_one_call_is_asked_once(tmp_path):
    parrot = Parrot()
    replies = Cached(parrot, tmp_path).ask([question(text) for text in ("a", "fail", "a", "fail", "a")])
    assert parrot.asked == ["a", "fail"]
    assert [reply.cost for reply in replies] == [{"calls": 1.0}, {"seconds": 1.0}, {"hits": 1.0}, {}, {"hits": 1.0}]
    assert [bool(reply.note) for reply in replies] == [False, True, False, True, False]


def test_what_failed_is_asked_again(tmp_path):
    parrot = Parrot()
    for _ in range(2):
        [reply] = Cached(parrot, tmp_path).ask([question("fail")])
        assert reply.note == "server gone: today"
    assert parrot.asked == ["fail", "fail"]


def dotted(colour):
    picture = Image.new("RGB", (8, 8), "white")
    picture.putpixel((7, 7), colour)
    return picture


RED, BLUE = dotted((255, 0, 0)), dotted((254, 0, 0))
FIRST = (Parrot(), question(images=[RED]))
CHANGES = {
    "the model": (Parrot("macaw"), question(images=[RED])),
    "whether log-probs are told": (Parrot(told=False), question(images=[RED])),
    "the text": (Parrot(), question("is it not so?", [RED])),
    "the system prompt": (Parrot(), evolve(question(images=[RED]), system="You doubt.")),
    "the version": (Parrot(), question(images=[RED], version="2")),
    "one pixel": (Parrot(), question(images=[BLUE])),
    "the size": (Parrot(), question(images=[RED.resize((4, 16))])),
    "the mode": (Parrot(), question(images=[RED.convert("RGBA")])),
    "no picture": (Parrot(), question()),
    "a picture more": (Parrot(), question(images=[RED, RED])),
    "the options": (Parrot(), question(images=[RED], answer=yes_no())),
    "the answer's form": (Parrot(), question(images=[RED], answer=Boxes())),
    "the answer's length": (Parrot(), question(images=[RED], answer=Boxes(max_tokens=9))),
    "the answer's schema": (Parrot(), question(images=[RED], answer=Rubric(("why",)))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_moves_a_reply_is_in_its_key(tmp_path, change):
    Cached(FIRST[0], tmp_path).ask([FIRST[1]])
    same, other = evolve(FIRST[0], asked=[]), evolve(CHANGES[change][0], asked=[])
    Cached(same, tmp_path).ask([question(images=[RED.copy()])])
    assert not same.asked
    Cached(other, tmp_path).ask([CHANGES[change][1]])
    assert len(other.asked) == 1


def test_what_an_option_is_worth_does_not_move_a_reply(tmp_path):
    parrot = Parrot()
    for values in ((1.0, 0.0), (0.0, 1.0)):
        Cached(parrot, tmp_path).ask([question(answer=Choice(("yes", "no"), values))])
    assert len(parrot.asked) == 1


def test_the_order_of_pictures_is_in_the_key(tmp_path):
    parrot = Parrot()
    Cached(parrot, tmp_path).ask([question(images=[RED, BLUE]), question(images=[BLUE, RED])])
    assert len(parrot.asked) == 2


def test_pictures_that_differ_in_their_palette_differ(tmp_path):
    parrot = Parrot()
    pictures = [Image.new("P", (2, 2)) for _ in range(2)]
    for k, picture in enumerate(pictures):
        picture.putpalette([k * 9] * 768)
    Cached(parrot, tmp_path).ask([question(images=[picture]) for picture in pictures])
    assert len(parrot.asked) == 2


def test_a_picture_that_cannot_be_read_is_left_to_who_is_asked(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:70])
    parrot = Parrot()
    with Image.open(tmp_path / "half.png") as broken:
        replies = Cached(parrot, tmp_path).ask([question("fail", [broken]), question("a")])
    assert [bool(reply.note) for reply in replies] == [True, False]


@settings(max_examples=30, deadline=None)
@given(
    text=st.text(),
    top=st.none() | st.dictionaries(st.text(), st.floats(max_value=0, allow_nan=False)),
)
def test_a_reply_comes_back_as_it_was(tmp_path_factory, text, top):
    class Says(Parrot):
        def reply(self, _):
            return Reply(text, top)

    folder = tmp_path_factory.mktemp("cache")
    first, second = (Cached(Says(), folder).ask([question()])[0] for _ in range(2))
    assert (second.text, second.top) == (first.text, first.top) == (text, top)
    assert second.cost == {"hits": 1.0}


# ---- many at once ----


def test_threads_that_ask_the_same_ask_once(tmp_path):
    parrot = Parrot(delay_s=0.2)
    client = Cached(parrot, tmp_path)
    together = threading.Barrier(8)

    def ask(_):
        together.wait()
        return client.ask([question("a"), question("b")])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert sorted(parrot.asked) == ["a", "b"]
    assert all([reply.text for reply in replies] == ["said a", "said b"] for replies in found)
    assert sum(reply.cost.get("calls", 0) for replies in found for reply in replies) == 2
    assert sum(reply.cost.get("hits", 0) for replies in found for reply in replies) == 14


def test_where_the_one_who_asks_raises_the_others_ask(tmp_path):
    first, may_raise = threading.Event(), threading.Event()

    class RaisesOnce(Parrot):
        def ask(self, questions):
            if not first.is_set():
                first.set()
                may_raise.wait(10)
                raise ZeroDivisionError
            return super().ask(questions)

    client = Cached(RaisesOnce(), tmp_path)
    with ThreadPoolExecutor(2) as pool:
        raising = pool.submit(client.ask, [question("a")])
        first.wait(10)
        waiting = pool.submit(client.ask, [question("a")])
        time.sleep(0.1)
        may_raise.set()
        with pytest.raises(ZeroDivisionError):
            raising.result(10)
        [reply] = waiting.result(10)
    assert reply.text == "said a"


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_what_its_parent_is_asking(tmp_path):
    client = Cached(Parrot(delay_s=1.0), tmp_path)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.ask, [question("a")])
        while not client.inner.asked:
            time.sleep(0.01)
        child = get_context("fork").Process(target=client.ask, args=([question("a")],))
        child.start()
        child.join(30)
        if child.exitcode is None:
            child.kill()
        assert child.exitcode == 0
        assert asking.result(10)[0].text == "said a"


def write_many(folder, part, barrier):
    barrier.wait(60)
    client = Cached(Parrot(), folder)
    for k in range(10):
        replies = client.ask([question(f"shared {k} {n}") for n in range(5)] + [question(f"{part} {k}")])
        assert not any(reply.note for reply in replies)


def test_processes_write_at_once_and_lose_nothing(tmp_path):
    context = get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=write_many, args=(tmp_path, part, barrier)) for part in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    parrot = Parrot()
    asked = [question(f"shared {k} {n}") for k in range(10) for n in range(5)]
    asked += [question(f"{part} {k}") for part in range(3) for k in range(10)]
    Cached(parrot, tmp_path).ask(asked)
    assert not parrot.asked


def test_threads_write_at_once_and_lose_nothing(tmp_path, caplog):
    clients = [Cached(Parrot(), tmp_path) for _ in range(8)]  # each with its own connection, new file
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: clients[k].ask([question(f"{k} {n}") for n in range(20)]), range(8)))
    parrot = Parrot()
    Cached(parrot, tmp_path).ask([question(f"{k} {n}") for k in range(8) for n in range(20)])
    assert not parrot.asked
    assert not warnings(caplog)


# ---- trouble ----


def asks_on(client, caplog, said):
    """Asks twice, and checks that answers come and that one warning says why nothing is kept."""
    with caplog.at_level(logging.WARNING, "reasonrl"):
        for text in ("x", "y"):
            [reply] = client.ask([question(text)])
            assert reply.text == f"said {text}"
    assert len(warnings(caplog)) == 1
    assert said in warnings(caplog)[0]


@pytest.mark.parametrize("broken", ["no database", "torn in the middle"])
def test_a_broken_file_is_moved_aside(tmp_path, caplog, broken):
    client = Cached(Parrot(), tmp_path)
    client.ask([question(f"{k} {'long ' * 200}") for k in range(100)])
    content = bytearray(client.path.read_bytes())
    content = b"these are no replies " * 500 if broken == "no database" else bytes(content[:4096]) + b"\xaa" * 90_000
    client.path.write_bytes(content)
    asks_on(client, caplog, "is broken")
    [aside] = tmp_path.glob("*.broken-*[0-9]")
    assert aside.read_bytes() == content
    client.inner.asked.clear()
    client.ask([question("x"), question("y")])
    assert not client.inner.asked


def test_a_row_that_says_nothing_is_asked_again(tmp_path, caplog):
    client = Cached(Parrot(), tmp_path)
    for wrong in ("no json", "[1, null]", '["a"]', '["a", {"7": "high"}]', "7", "[" * 100_000, b"\xff"):
        client.ask([question("a")])
        with closing(sqlite3.connect(client.path)) as database, database:
            database.execute("UPDATE replies SET reply = ?", (wrong,))
        client.inner.asked.clear()
        assert client.ask([question("a")])[0].text == "said a"
        assert client.inner.asked == ["a"]
    assert not warnings(caplog)


def test_a_row_that_is_no_text_is_asked_again_and_costs_no_other(tmp_path, caplog):
    client = Cached(Parrot(), tmp_path)
    client.ask([question("a"), question("b")])
    with closing(sqlite3.connect(client.path)) as database, database:
        database.execute("UPDATE replies SET reply = CAST(x'ff5b' AS TEXT) WHERE id = 1")
    client.inner.asked.clear()
    for _ in range(2):
        assert [reply.text for reply in client.ask([question("a"), question("b")])] == ["said a", "said b"]
    assert client.inner.asked == ["a"]
    assert not warnings(caplog)


def test_log_probs_that_are_whole_numbers_are_kept(tmp_path):
    class Whole(Parrot):
        def reply(self, text):
            return Reply("7", {"7": 0, "8": -9})

    client = Cached(Whole(), tmp_path)
    for _ in range(2):
        assert client.ask([question()])[0].top == {"7": 0, "8": -9}
    assert len(client.inner.asked) == 1


def test_a_folder_that_cannot_be_one_is_gone_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    asks_on(Cached(Parrot(), tmp_path / "file"), caplog, "judges go on without the cache")


def test_a_locked_file_is_gone_without_and_tried_again_later(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(cached, "BUSY_S", 0.1)
    client = Cached(Parrot(), tmp_path)
    client.ask([question("a")])
    with closing(sqlite3.connect(client.path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        asks_on(client, caplog, "database is locked")
    client.inner.asked.clear()
    client._now.rests_until = 0.0
    client.ask([question("a"), question("z")])
    client.ask([question("z")])
    assert client.inner.asked == ["z"]


@pytest.mark.parametrize(("limit", "said"), [("max_page_count=4", "full"), ("query_only=1", "readonly")])
def test_a_full_disk_and_a_read_only_one_are_gone_without(tmp_path, caplog, monkeypatch, limit, said):
    connected = cached._connected

    def limited(path):
        database = connected(path)
        database.execute(f"PRAGMA {limit}")
        return database

    client = Cached(Parrot(), tmp_path)
    client.ask([question("a")])
    monkeypatch.setattr(cached, "_connected", limited)
    big = question("x" * 50_000)
    with caplog.at_level(logging.WARNING, "reasonrl"):
        assert client.ask([big])[0].text == f"said {big.text}"
        assert client.ask([question("y")])[0].text == "said y"
    [warning] = warnings(caplog)
    assert said in warning
    monkeypatch.setattr(cached, "_connected", connected)
    client._now.rests_until = 0.0
    client.inner.asked.clear()
    client.ask([question("a")])
    assert not client.inner.asked


def die_while_writing(folder):
    client = Cached(Parrot(), folder)
    client.ask([question("kept")])
    database = cached._connected(client.path)
    database.execute("BEGIN IMMEDIATE")
    database.execute("INSERT INTO replies (key, reply) VALUES (?, ?)", (b"half", "[]"))
    os._exit(9)


def test_a_crash_in_the_middle_of_writing_loses_no_other_reply(tmp_path, caplog):
    process = get_context("spawn").Process(target=die_while_writing, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    parrot = Parrot()
    Cached(parrot, tmp_path).ask([question("kept"), question("new")])
    Cached(parrot, tmp_path).ask([question("kept"), question("new")])
    assert parrot.asked == ["new"]
    with closing(sqlite3.connect(Cached(parrot, tmp_path).path)) as database:
        assert database.execute("SELECT count(*) FROM replies").fetchone() == (2,)
    assert not warnings(caplog)


# ---- keeping house ----


def test_pruning_keeps_the_newest(tmp_path):
    client = Cached(Parrot(), tmp_path)
    for k in range(6):
        client.ask([question(f"{k} {'long ' * 2000}")])
    before = client.path.stat().st_size
    client.prune(keep=2)
    assert client.path.stat().st_size < before / 2
    client.inner.asked.clear()
    client.ask([question(f"{k} {'long ' * 2000}") for k in range(6)])
    assert [text[0] for text in client.inner.asked] == ["0", "1", "2", "3"]


def test_nothing_stays_open(tmp_path):
    client = Cached(Parrot(), tmp_path)
    before = threading.active_count()
    client.ask([question(images=[RED])])
    assert threading.active_count() == before
    gc.collect()  # a connection left open would warn here
    assert [path.name for path in tmp_path.iterdir()] == [client.path.name]


def test_no_question_opens_nothing(tmp_path):
    assert Cached(Parrot(), tmp_path / "none").ask([]) == []
    assert not (tmp_path / "none").exists()


def test_it_is_who_it_asks_and_its_settings_travel(tmp_path):
    client = Cached(Parrot("ara", told=False), str(tmp_path))
    assert (client.identity, client.log_probs, client.coordinates) == ("ara", False, "pixels")
    for copied in (pickle.loads(pickle.dumps(client)), copy.deepcopy(client)):  # noqa: S301
        assert copied == client
        assert copied._now is not client._now
    roots = {"cached": Cached, "parrot": Parrot}
    record = json.loads(json.dumps(to_record(client, roots=roots)))
    assert record["folder"] == str(tmp_path)
    assert from_record(record, roots=roots) == client
