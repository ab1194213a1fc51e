"""What becomes of a question when the server errs: a value, or None with the reason, and nothing left over."""

import copy
import gc
import math
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tests.judges.faulty_server import FAULTS, FaultyServer, faulty_process, known_log_probs, known_score

from reasonrl.judges.retries import Breaker, asked_to_wait_s, backoff_s
from reasonrl.judges.server import Server
from reasonrl.judges.vlm import (
    REFUSED,
    SERVER_ERROR,
    SERVER_GONE,
    TIMED_OUT,
    UNPARSEABLE,
    Boxes,
    Question,
    Rubric,
    marks,
    read,
)

MARK = marks(0, 9)


def question(text="is it so?", image=None, answer=MARK):
    return Question("You judge.", text, () if image is None else (image,), answer=answer)


def impatient(url, **settings):
    """Returns a server's client whose waits are short."""
    usual = {"timeout_s": 0.3, "deadline_s": 3.0, "backoff_s": 0.01, "attempts": 2}
    return Server("judge", url, **{**usual, **settings})


def always(fault):
    return lambda body, seen: fault


def asked_once(fault, **settings):
    """Returns the reply of a server that always errs, and how many requests it took."""
    with FaultyServer(always(fault)) as server:
        [reply] = impatient(server.url, **settings).ask([question()])
        return reply, server.num_requests


def test_nobody_listens():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening: refused
        [reply] = impatient(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1").ask([question()])
    assert reply.note.startswith(f"{SERVER_GONE}: ConnectError")
    assert reply.note.endswith(", after 2 attempts")
    assert read(MARK, reply).value is None
    assert reply.cost["retries"] == 1
    assert "calls" not in reply.cost


def test_a_reset_connection_is_asked_again():
    reply, num_requests = asked_once("reset")
    assert reply.note.startswith(f"{SERVER_GONE}: ")
    assert num_requests == 2


def test_a_hung_server_ends_at_the_timeout():
    begin = time.monotonic()
    reply, num_requests = asked_once("hung")
    assert reply.note == f"{TIMED_OUT}: no whole reply in 0.3 s, after 2 attempts"
    assert num_requests == 2
    assert time.monotonic() - begin >= 0.6


def test_half_a_body_is_no_reply():
    reply, num_requests = asked_once("half")
    assert reply.note.startswith(f"{SERVER_GONE}: RemoteProtocolError")
    assert num_requests == 2


def test_a_busy_server_is_asked_when_it_wants_to_be():
    faults = FaultyServer(lambda body, seen: "429" if seen == 0 else None, retry_after="1")
    with faults as server:
        begin = time.monotonic()
        [reply] = impatient(server.url).ask([question()])
        assert time.monotonic() - begin >= 1
    assert not reply.note
    assert reply.cost["retries"] == 1


def test_a_server_that_stays_busy_says_so():
    reply, num_requests = asked_once("429")
    assert reply.note == f"{SERVER_ERROR}: status 429: 'slow down', after 2 attempts"
    assert num_requests == 2


def test_a_wish_to_wait_past_the_deadline_ends_the_question():
    with FaultyServer(always("429"), retry_after="1000") as server:
        begin = time.monotonic()
        [reply] = impatient(server.url, deadline_s=2.0).ask([question()])
        assert time.monotonic() - begin < 2
    assert reply.note == f"{SERVER_ERROR}: status 429: 'slow down'"


def test_an_internal_error_is_asked_again():
    reply, num_requests = asked_once("500")
    assert reply.note == f"{SERVER_ERROR}: status 500: 'worker died', after 2 attempts"
    assert num_requests == 2


def test_no_json_is_a_server_error():
    reply, num_requests = asked_once("not json")
    assert reply.note == f"{SERVER_ERROR}: no JSON: '<html>It works!</html>', after 2 attempts"
    assert num_requests == 2


def test_the_wrong_schema_is_a_server_error():
    reply, num_requests = asked_once("wrong schema")
    assert reply.note.startswith(f"{SERVER_ERROR}: expected choices, a list of objects, got")
    assert num_requests == 2


def test_a_huge_reply_is_cut_off():
    reply, num_requests = asked_once("huge", max_reply_bytes=300_000)
    assert reply.note == f"{SERVER_ERROR}: a reply of more than 300,000 bytes"
    assert num_requests == 1


def test_a_slow_drip_ends_at_the_deadline():
    begin = time.monotonic()
    reply, num_requests = asked_once("drip", timeout_s=60, deadline_s=0.5)
    assert reply.note == f"{TIMED_OUT}: no whole reply in 0.5 s"
    assert num_requests == 1
    assert 0.5 <= time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('400 {"error": {"message": "image too large"}}', "status 400: 'image too large'"),
        ('401 {"detail": "no such key"}', "status 401: 'no such key'"),
        ('404 {"object": "error", "message": "no model\\nof this name"}', "status 404: 'no model of this name'"),
        ('422 {"detail": [{"loc": "body"}]}', "status 422: \"[{'loc': 'body'}]\""),
        ("307 ", "status 307: ''"),
        ("204 ", "status 204: ''"),
    ],
)
def test_a_question_at_fault_is_asked_once(fault, said):
    reply, num_requests = asked_once(fault, attempts=4)
    assert reply.note == f"{SERVER_ERROR}: {said}"
    assert num_requests == 1


def test_an_error_of_any_length_is_said_on_a_short_line():
    reply, _ = asked_once("400 " + "long\n" * 10_000)
    assert len(reply.note) < 150
    assert "\n" not in reply.note


TOKEN = '{"token": "7", "logprob": -0.1, "top_logprobs": []}'


def told(message='{"content": "7"}', **more):
    members = "".join(f', "{name}": {value}' for name, value in more.items())
    return f'200 {{"choices": [{{"message": {message}{members}}}]}}'


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        (told('{"content": null, "refusal": "I will not."}'), f"{REFUSED}: 'I will not.'"),
        (told(finish_reason='"content_filter"'), f"{REFUSED}: filtered by the server"),
        (told('{"content": null}'), f"{REFUSED}: the reply has no text"),
        (told('{"content": "  "}'), f"{REFUSED}: the reply has no text"),
        (told('{"content": 7}'), f"{SERVER_ERROR}: expected text as content, got '7', after 2 attempts"),
        (told("[]"), f"{SERVER_ERROR}: expected message, an object, got '[]', after 2 attempts"),
        ("200 [1]", f"{SERVER_ERROR}: expected an object, got '[1]', after 2 attempts"),
        ('200 {"choices": []}', f"{SERVER_ERROR}: expected choices, a list of objects, got '[]', after 2 attempts"),
        (told(logprobs="7"), f"{SERVER_ERROR}: expected logprobs, an object, got '7', after 2 attempts"),
        (told(logprobs='{"content": [{"token": "7", "logprob": NaN}]}'), f"{SERVER_ERROR}: expected a log-prob, got"),
        (told(logprobs='{"content": [{"token": "7", "logprob": 1e999}]}'), f"{SERVER_ERROR}: expected a log-prob"),
        (
            told(logprobs='{"content": [{"token": "7", "logprob": -1' + "0" * 400 + "}]}"),
            f"{SERVER_ERROR}: expected a log-prob",
        ),
        (told(logprobs='{"content": [{"token": "7", "logprob": true}]}'), f"{SERVER_ERROR}: expected a token and"),
        (told(logprobs='{"content": [{"token": 7, "logprob": -1}]}'), f"{SERVER_ERROR}: expected a token and"),
        (
            told(logprobs='{"content": [{"token": "7", "logprob": -1, "top_logprobs": "no"}]}'),
            f"{SERVER_ERROR}: expected top_logprobs, a list, got",
        ),
        ("200 " + "[" * 100_000, f"{SERVER_ERROR}: no JSON"),
        ("200 " + "1" * 10_000, f"{SERVER_ERROR}: no JSON"),
    ],
)
def test_a_reply_is_never_trusted(fault, note):
    reply, _ = asked_once(fault)
    assert reply.note.startswith(note)
    assert read(MARK, reply).value is None


def test_what_is_no_number_of_tokens_is_not_counted():
    reply, _ = asked_once('200 {"choices": [{"message": {"content": "7"}}], "usage": {"prompt_tokens": -3}}')
    assert not reply.note
    assert set(reply.cost) == {"calls", "seconds", "retries"}
    reply, _ = asked_once('200 {"choices": [{"message": {"content": "7"}}], "usage": {"completion_tokens": 1e9}}')
    assert "tokens_out" not in reply.cost


def test_half_a_surrogate_pair_does_not_travel():
    reply, _ = asked_once(told('{"content": "7\\ud800"}'))
    assert reply.text == "7?"


@pytest.mark.parametrize("answer", [Rubric(), Boxes(max_tokens=99)])
def test_a_reply_cut_by_the_limit_is_unparseable(answer):
    cut = '{"choices": [{"message": {"content": "[{\\"bbox"}, "finish_reason": "length"}]}'
    with FaultyServer(always(f"200 {cut}")) as server:
        [reply] = impatient(server.url).ask([question(answer=answer)])
    assert reply.note == f"{UNPARSEABLE}: cut at {answer.max_tokens} tokens: '[{{\"bbox'"
    assert reply.cost["calls"] == 1


def test_one_question_that_fails_fails_no_other():
    def poisoned(body, seen):
        return "500" if "poison" in body["messages"][-1]["content"][-1]["text"] else None

    texts = ["a", "poison", "b", "c"]
    with FaultyServer(poisoned) as server:
        replies = impatient(server.url).ask([question(text) for text in texts])
    assert [bool(reply.note) for reply in replies] == [False, True, False, False]


def test_an_image_that_cannot_be_read_is_a_note(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:70])
    with FaultyServer() as server, Image.open(tmp_path / "half.png") as broken:
        replies = impatient(server.url).ask([question(image=broken), question()])
        assert server.num_requests == 1
    assert replies[0].note.startswith("unreadable image: ")
    assert not replies[1].note


# ---- a server that is gone ----


def test_a_dead_server_costs_a_few_attempts_and_not_one_of_each_question():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        client = impatient(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", attempts=4)
        replies = client.ask([question(str(k)) for k in range(1000)])
    assert {reply.note.partition(":")[0] for reply in replies} == {SERVER_GONE}
    held_back = [reply for reply in replies if "not asked" in reply.note]
    assert len(held_back) >= 1000 - 64 - 8


def test_a_hung_server_costs_one_timeout_and_not_one_of_each_question():
    with FaultyServer(always("hung")) as server:
        client = impatient(server.url, attempts=4, concurrency=32)
        begin = time.monotonic()
        replies = client.ask([question(str(k)) for k in range(1000)])
        assert time.monotonic() - begin < 10  # one after the other in 32 places: 1000 / 32 · 4 · 0.3 s = 37 s
        assert server.num_requests <= 64
    assert {reply.note.partition(":")[0] for reply in replies} == {SERVER_GONE, TIMED_OUT}


def test_a_server_that_comes_back_is_found_by_one_probe_that_the_others_wait_for():
    gone = threading.Event()
    gone.set()
    with FaultyServer(lambda body, seen: "reset" if gone.is_set() else None, delay_s=0.01) as server:
        client = impatient(server.url, breaker_cool_s=0.5, concurrency=8)
        notes = [reply.note for reply in client.ask([question(str(k)) for k in range(40)])]
        assert all(notes)
        before = server.num_requests
        assert all(reply.note for reply in client.ask([question("held back"), question("too")]))
        assert server.num_requests == before
        time.sleep(0.5)
        gone.clear()
        assert not any(reply.note for reply in client.ask([question(f"again {k}") for k in range(40)]))


def test_waiting_for_a_probe_is_time_of_the_question():
    probed = threading.Event()

    def faults(body, seen):
        text = body["messages"][-1]["content"][-1]["text"]
        if text.startswith("probe"):
            probed.set()
            time.sleep(1.0)  # the server is slow to come back, and then it hangs
            return None
        return "hung" if probed.is_set() else "reset"

    with FaultyServer(faults) as server:
        client = impatient(
            server.url, timeout_s=5, deadline_s=1.5, attempts=1, breaker_window=1, breaker_cool_s=0.0, concurrency=2
        )
        client.ask([question("gone")])
        with ThreadPoolExecutor(1) as pool:
            probing = pool.submit(client.ask, [question("probe")])
            probed.wait(10)
            [reply] = client.ask([question("waits")])
            assert not probing.result(10)[0].note
    assert reply.note.startswith(TIMED_OUT)
    assert reply.cost["seconds"] < 2.2  # 1.5, and not 1.0 of waiting with 1.5 on top


def test_a_key_that_a_server_repeats_is_not_in_the_note(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    reply, _ = asked_once('401 {"error": "no such key: sesame"}', key_variable="JUDGE_KEY")
    assert reply.note == f"{SERVER_ERROR}: status 401: 'no such key: (key)'"


def test_an_open_breaker_is_not_copied():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        client = impatient(f"http://127.0.0.1:{nobody.getsockname()[1]}/v1", breaker_window=1, breaker_share=1.0)
        client.ask([question()])
    assert client._shared.breaker.is_open
    assert not copy.deepcopy(client)._shared.breaker.is_open


# ---- ten thousand ----


def one_in_five(body, seen):
    """Errs in a fifth of the attempts, each way as often."""
    draw = random.Random(f"{body['messages'][-1]['content'][-1]['text']} {seen}")
    return draw.choice(FAULTS) if draw.random() < 0.2 else None


def picture(k):
    return Image.new("RGB", (16, 16), (k // 256 % 256, k % 256, 0))


def expected(asked, pixel):
    score = known_score(asked.prompt, pixel)
    if isinstance(asked.answer, Rubric):
        return score / 10
    found = {int(text): math.exp(p) for text, p in known_log_probs(score).items() if text.isdecimal()}
    return sum(p * digit / 9 for digit, p in found.items()) / sum(found.values())


def left_over():
    """Returns how many threads and sockets this process has."""
    return threading.active_count(), len(psutil.Process().net_connections(kind="all"))


def asked_of(part):
    """Returns 2,000 questions, half of each kind, four to a picture, mixed, and each one's first pixel."""
    pictures = [picture(part * 500 + k) for k in range(500)]
    answers = (MARK, Rubric(("reasoning",)))
    found = [(question(f"{part} {k}", pictures[k // 4], answers[k % 2]), part * 500 + k // 4) for k in range(2000)]
    random.Random(part).shuffle(found)
    return found


def test_ten_thousand_questions_at_a_fifth_faults_end_scored_or_with_a_reason():
    outcomes, resident = Counter(), []
    with faulty_process(one_in_five) as (url, num_requests):
        client = impatient(url, attempts=3, timeout_s=0.75, deadline_s=10, max_reply_bytes=200_000)
        before = left_over()
        for part in range(5):
            asked = asked_of(part)
            replies = client.ask([one for one, _ in asked])
            assert left_over() == before
            for (one, pixel), reply in zip(asked, replies, strict=True):
                score = read(one.answer, reply)
                if score.value is None:
                    outcomes[score.note.partition(":")[0]] += 1
                else:
                    assert score.value == pytest.approx(expected(one, pixel), abs=1e-9), one.text
                    outcomes["scored"] += 1
            del asked, replies, one, reply
            gc.collect()
            resident.append(psutil.Process().memory_info().rss)
        assert num_requests() > 11_000
    assert sum(outcomes.values()) == 10_000
    assert set(outcomes) <= {"scored", TIMED_OUT, SERVER_GONE, SERVER_ERROR}, outcomes
    assert outcomes["scored"] > 9_000
    assert outcomes[SERVER_ERROR] > 100  # a huge reply is not asked for again
    assert resident[-1] - resident[1] < 16e6, resident  # of bytes: 6,000 questions leave nothing behind


# ---- backoff ----


@given(st.integers(0, 10_000), st.floats(0, 100), st.floats(0, 1000), st.floats(0, 1))
def test_a_backoff_is_within_its_limits(retry, base_s, most_s, draw):
    waited = backoff_s(retry, base_s=base_s, most_s=most_s, draw=draw)
    assert 0 <= waited <= most_s
    assert waited <= base_s * 2.0 ** min(retry, 60)


@given(st.integers(0, 40), st.floats(0.001, 10))
def test_the_limit_of_a_backoff_doubles(retry, base_s):
    first, second = (backoff_s(k, base_s=base_s, most_s=1e30, draw=1.0) for k in (retry, retry + 1))
    assert second == 2 * first


@given(st.text() | st.floats().map(str) | st.integers().map(str))
def test_a_wish_to_wait_is_a_number_in_range_whatever_it_says(said):
    assert 0 <= asked_to_wait_s(said, now=1e9, most_s=30.0) <= 30


def test_a_wish_to_wait_may_be_a_number_or_a_date():
    date = "Sun, 09 Sep 2001 01:46:50 GMT"  # 1e9 + 10 s
    assert asked_to_wait_s("7", now=1e9, most_s=30.0) == 7
    assert asked_to_wait_s(date, now=1e9, most_s=30.0) == pytest.approx(10)
    assert asked_to_wait_s(date, now=2e9, most_s=30.0) == 0
    assert asked_to_wait_s("soon", now=1e9, most_s=30.0) == 0


# ---- breaker ----

EVENTS = st.lists(
    st.tuples(st.sampled_from(["admit", "reached", "failed", "drop", "wait"]), st.integers(0, 5)), max_size=200
)


def driven(breaker, events):
    """Drives a breaker; yields (event, number admitted or None, attempts under way, now) after each event."""
    now, under_way = 0.0, []
    for event, k in events:
        number = None
        if event == "wait":
            now += k
        elif event == "admit":
            number = breaker.admit(now)
            if number is not None:
                under_way.append(number)
        elif under_way:
            number = under_way.pop(k % len(under_way))
            if event == "drop":
                breaker.drop(number)
            else:
                breaker.report(number, reached=event == "reached", now=now)
        yield event, number, list(under_way), now


@given(EVENTS)
def test_while_open_at_most_one_attempt_a_cool_down_passes(events):
    breaker = Breaker(window=4, share=0.75, cool_s=3.0)
    opened_at = None
    for event, number, _, now in driven(breaker, events):
        if event == "admit" and opened_at is not None and number is not None:
            assert now >= opened_at + 3.0
            assert breaker.probing
        if event == "admit" and opened_at is None:
            assert number is not None
        if breaker.is_open and opened_at is None:
            opened_at = now
        elif not breaker.is_open:
            opened_at = None


@given(EVENTS)
def test_a_breaker_is_never_stuck(events):
    breaker = Breaker(window=4, share=0.75, cool_s=3.0)
    under_way, now = [], 0.0
    for _, _, under_way, now in driven(breaker, events):  # noqa: B007 - the last ones are wanted
        pass
    for number in under_way:
        breaker.drop(number)
    number = breaker.admit(now + 3.0)
    assert number is not None
    breaker.report(number, reached=True, now=now + 3.0)
    assert not breaker.is_open


@given(st.lists(st.booleans(), max_size=60))
def test_a_failure_opens_it_when_the_share_of_the_last_ones_failed_and_not_before(results):
    breaker = Breaker(window=5, share=0.8, cool_s=1.0)
    for k, reached in enumerate(results):
        number = breaker.admit(float(0))
        assert number is not None
        breaker.report(number, reached=reached, now=0.0)
        recent = results[max(0, k - 4) : k + 1]
        if not reached and len(recent) == 5 and recent.count(False) >= 4:
            assert breaker.is_open
            return
        assert not breaker.is_open


def test_attempts_begun_before_it_opened_say_nothing_after():
    breaker = Breaker(window=2, share=1.0, cool_s=5.0)
    late, *failing = (breaker.admit(0.0) for _ in range(3))
    for number in failing:
        breaker.report(number, reached=False, now=1.0)
    breaker.report(late, reached=True, now=2.0)
    assert breaker.is_open
    probe = breaker.admit(6.0)
    assert probe is not None
    assert breaker.admit(6.0) is None
    breaker.report(probe, reached=False, now=7.0)
    assert breaker.admit(11.9) is None
    assert breaker.admit(12.0) is not None
