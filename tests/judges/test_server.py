"""What is asked of a server, what is made of its replies, and what is left afterwards."""

import asyncio
import copy
import gc
import io
import json
import math
import os
import pickle
import signal
import threading
import time
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import psutil
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tests.judges.faulty_server import FaultyServer, known_log_probs, known_score

from reasonrl.config import from_record, override, to_record
from reasonrl.errors import ConfigError
from reasonrl.judges.completions import completion, image_part, request_body
from reasonrl.judges.png import png
from reasonrl.judges.server import Server, by_picture
from reasonrl.judges.vlm import Boxes, Choice, Question, Rubric, marks, read, yes_no

MARK = marks(0, 9)


def question(text="is it so?", images=(), answer=MARK):
    return Question("You judge.", text, tuple(images), answer=answer)


def body_of(asked, **settings):
    """Returns the body of the request that a question makes."""
    with FaultyServer() as server:
        [reply] = Server("judge", server.url, **settings).ask([asked])
        assert not reply.note
        return server.bodies[0]


# ---- what is asked ----


def test_a_choice_asks_for_log_probs_of_one_token():
    body = body_of(question())
    assert body["model"] == "judge"
    assert body["temperature"] == 0
    assert body["max_tokens"] == 1
    assert body["logprobs"] is True
    assert body["top_logprobs"] == 20
    assert "response_format" not in body


def test_without_log_probs_none_are_asked_for():
    with FaultyServer() as server:
        [reply] = Server("judge", server.url, log_probs=False).ask([question()])
        assert {"logprobs", "top_logprobs"}.isdisjoint(server.bodies[0])
    assert reply.top is None
    assert read(MARK, reply).value is None


@pytest.mark.parametrize("answer", [Rubric(("reasoning",), 1, 10), Boxes()])
def test_structured_answers_send_their_schema(answer):
    body = body_of(question(answer=answer))
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["schema"] == answer.schema
    assert body["max_tokens"] == answer.max_tokens
    assert "logprobs" not in body


def test_a_server_that_knows_no_schemas_is_sent_none():
    with FaultyServer() as server:
        Server("judge", server.url, structured="none").ask([question(answer=Rubric())])
        assert "response_format" not in server.bodies[0]


def test_extra_is_added_and_stronger():
    body = body_of(question(), extra={"seed": 7, "temperature": 0.5}, length_field="max_completion_tokens")
    assert body["seed"] == 7
    assert body["temperature"] == 0.5
    assert body["max_completion_tokens"] == 1
    assert "max_tokens" not in body


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_come_first_and_arrive_as_they_are(mode):
    picture = Image.radial_gradient("L").resize((30, 20)).convert("RGB" if mode == "P" else "L").convert(mode)
    body = body_of(question("which?", [picture, Image.new("RGB", (4, 4), "red")]))
    system, user = body["messages"]
    assert system == {"role": "system", "content": "You judge."}
    assert [part["type"] for part in user["content"]] == ["image_url", "image_url", "text"]
    assert user["content"][-1]["text"] == question("which?").prompt
    head, _, coded = user["content"][0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(b64decode(coded, validate=True))) as sent:
        expected = picture if mode == "L" else picture.convert("RGB")
        assert sent.size == picture.size
        assert sent.convert("RGB").tobytes() == expected.convert("RGB").tobytes()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["L", "RGB"]), st.randoms(use_true_random=False))
def test_a_picture_is_the_same_after_png(width, height, mode, draw):
    picture = Image.frombytes(mode, (width, height), draw.randbytes(width * height * len(mode)))
    with Image.open(io.BytesIO(png(picture))) as read_back:
        read_back.verify()
    with Image.open(io.BytesIO(png(picture))) as read_back:
        assert (read_back.mode, read_back.size) == (mode, (width, height))
        assert read_back.tobytes() == picture.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_is_asked_as_it_is(text):
    asked = Question(text, text, answer=MARK)
    body = json.loads(request_body(asked, [image_part(Image.new("L", (2, 2)))], settings={"model": text}))
    assert body["model"] == text
    assert body["messages"][-1]["content"][-1]["text"] == asked.prompt
    assert [message["content"] for message in body["messages"][:-1]] == [text] * bool(text)


def test_half_a_surrogate_pair_is_not_asked():
    with FaultyServer() as server:
        [reply] = Server("judge", server.url).ask([Question("You \ud800.", "a \udfff cup", answer=MARK)])
        system, user = server.bodies[0]["messages"]
    assert not reply.note
    assert system["content"] == "You ?."
    assert user["content"][0]["text"].startswith("a ? cup")


def test_the_key_comes_from_the_environment_and_is_no_setting(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame")
    with FaultyServer() as server:
        client = Server("judge", server.url, key_variable="JUDGE_KEY")
        client.ask([question()])
        assert b"authorization: bearer sesame" in server.headers[0].lower()
    assert "sesame" not in repr(client) + json.dumps(to_record(client, roots={"server": Server}))


@pytest.mark.parametrize("value", [" sesame", "sesame\n", "\tsesame \r\n"])
def test_blanks_around_a_key_are_no_part_of_it(monkeypatch, value):
    monkeypatch.setenv("JUDGE_KEY", value)
    with FaultyServer() as server:
        [reply] = Server("judge", server.url, key_variable="JUDGE_KEY").ask([question()])
        assert not reply.note
        assert b"authorization: bearer sesame\r\n" in server.headers[0].lower()


@pytest.mark.parametrize("value", [None, "", " ", "two\nlines", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_an_error(monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="key_variable JUDGE_KEY holds no API key"):
        Server("judge", key_variable="JUDGE_KEY").ask([question()])


# ---- what is made of the reply ----


def test_a_choice_is_worth_the_expected_value_of_its_log_probs():
    asked = question()
    with FaultyServer() as server:
        [reply] = Server("judge", server.url).ask([asked])
    score = known_score(asked.prompt)
    assert reply.text == str(score)
    assert reply.top == known_log_probs(score)
    worth = (0.7 * score + 0.2 * ((score + 3) % 10)) / 9 / 0.9
    assert read(MARK, reply).value == pytest.approx(worth)


def test_a_rubric_is_worth_its_score():
    asked = question(answer=Rubric(("description", "reasoning")))
    with FaultyServer() as server:
        [reply] = Server("judge", server.url).ask([asked])
    assert read(asked.answer, reply).value == known_score(asked.prompt) / 10


def test_the_cost_is_what_the_server_says_and_how_long_it_took():
    asked = question()
    with FaultyServer(delay_s=0.05) as server:
        [reply] = Server("judge", server.url).ask([asked])
    assert reply.cost["calls"] == 1
    assert reply.cost["tokens_in"] == 10 + len(asked.prompt)
    assert reply.cost["tokens_out"] == 1
    assert reply.cost["retries"] == 0
    assert 0.05 <= reply.cost["seconds"] < 10


def whole(content, top, said="7", log_prob=-0.1):
    listed = [{"token": token, "logprob": value} for token, value in top]
    token = {"token": said, "logprob": log_prob, "top_logprobs": listed}
    message = {"role": "assistant", "content": content}
    return json.dumps({"choices": [{"message": message, "logprobs": {"content": [token]}}]}).encode()


@given(st.lists(st.tuples(st.sampled_from(["7", " 7", "x"]), st.floats(-50, 0)), min_size=1))
def test_the_same_string_of_several_tokens_has_their_summed_probability(top):
    reply = completion(whole("7", [("7", -1.0), *top]), question())
    assert reply.top is not None
    for text in {"7", *(text for text, _ in top)}:
        mass = math.fsum(math.exp(value) for found, value in [("7", -1.0), *top] if found == text)
        assert math.exp(reply.top[text]) == pytest.approx(mass)


def test_a_probability_of_zero_is_no_fault():
    reply = completion(whole("7", [("7", -math.inf), ("7", -0.1), ("8", -9999.0)]), question())
    assert reply.top == {"7": -0.1, "8": -9999.0}


def test_what_was_said_counts_where_the_list_lacks_it():
    reply = completion(whole("7", [("8", -3.0)], said="7", log_prob=-0.05), question())
    assert reply.top == {"8": -3.0, "7": -0.05}


def test_without_log_probs_in_the_reply_there_is_no_top():
    reply = completion(b'{"choices": [{"message": {"content": "7"}, "logprobs": {"content": []}}]}', question())
    assert reply.text == "7"
    assert reply.top is None


# ---- many, at once, from anywhere ----


def expected_text(asked):
    return str(known_score(asked.prompt))


def test_no_question_is_no_request_and_no_thread():
    before = threading.active_count()
    assert Server("judge", "http://127.0.0.1:9/v1").ask([]) == []
    assert threading.active_count() == before


def test_replies_are_in_the_order_of_the_questions():
    pictures = [Image.new("RGB", (4, 4), (0, k, 0)) for k in range(5)]
    asked = [question(str(k), [pictures[k % 5]] if k % 3 else []) for k in range(60)]
    with FaultyServer() as server:
        replies = Server("judge", server.url, concurrency=7).ask(asked)
    assert [reply.text for reply in replies] == [
        str(known_score(one.prompt, k % 5 if k % 3 else 0)) for k, one in enumerate(asked)
    ]


@given(st.lists(st.integers(0, 4)))
def test_every_question_is_asked_once_and_with_the_others_of_its_picture(chosen):
    pictures = [Image.new("L", (1, 1)) for _ in range(4)]
    asked = [question(images=pictures[k : k + 1]) for k in chosen]
    order = list(by_picture(asked))
    assert sorted(order) == list(range(len(asked)))
    runs = [chosen[k] for n, k in enumerate(order) if not n or chosen[order[n - 1]] != chosen[k]]
    assert len(runs) == len(set(runs))


def test_a_picture_asked_about_often_is_encoded_once(monkeypatch):
    encoded = []

    def counted(image):
        encoded.append(id(image))
        return image_part(image)

    monkeypatch.setattr("reasonrl.judges.server.image_part", counted)
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    asked = [question(str(k), [first, second] if k % 2 else [second]) for k in range(40)]
    with FaultyServer() as server:
        Server("judge", server.url, concurrency=4).ask(asked)
    assert sorted(encoded) == sorted([id(first), id(second)])


def test_no_more_than_the_limit_is_under_way_over_all_threads_and_connections_are_kept():
    with FaultyServer(delay_s=0.01) as server:
        client = Server("judge", server.url, concurrency=5)
        asked = [[question(f"{part} {k}") for k in range(30)] for part in range(4)]
        found = {}
        threads = [
            threading.Thread(target=lambda part=part: found.update({part: client.ask(asked[part])}))
            for part in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.most_at_once == 5
        assert server.num_connections == 5
    assert [[reply.text for reply in found[part]] for part in range(4)] == [
        [expected_text(one) for one in part] for part in asked
    ]


def test_it_asks_inside_a_running_loop():
    async def cell(client):
        return client.ask([question()])

    with FaultyServer() as server:
        [reply] = asyncio.run(cell(Server("judge", server.url)))
    assert reply.text == expected_text(question())


def test_nothing_is_left_over():
    def here():
        return threading.active_count(), len(psutil.Process().net_connections(kind="all"))

    with FaultyServer() as server:
        client = Server("judge", server.url, concurrency=8)
        before = here()
        for k in range(3):
            client.ask([question(f"{k} {n}", [Image.new("L", (2, 2))]) for n in range(20)])
            assert threading.active_count() == before[0]
            end = time.monotonic() + 5  # the server, in this process, closes its side when it hears of it
            while here() != before and time.monotonic() < end:
                time.sleep(0.01)
            assert here() == before
        assert client._shared.users.session is None
    gc.collect()


def test_a_caller_that_is_interrupted_takes_its_requests_along():
    def interrupt(server):
        while server.num_requests < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with FaultyServer(lambda body, seen: "hung") as server:
        before = threading.active_count()
        presses = threading.Thread(target=interrupt, args=(server,))
        presses.start()
        with pytest.raises(KeyboardInterrupt):
            Server("judge", server.url).ask([question(str(k)) for k in range(3)])
        presses.join()
        assert threading.active_count() == before


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_process_forked_while_somebody_asks_asks_for_itself():
    with FaultyServer(delay_s=0.5) as server:
        client = Server("judge", server.url)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(client.ask, [question()])
            while not server.num_requests:
                time.sleep(0.01)
            child = get_context("fork").Process(target=client.ask, args=([question("and this?")],))
            child.start()
            child.join(30)
            if child.exitcode is None:
                child.kill()
            assert child.exitcode == 0
            assert not asking.result(10)[0].note


def test_an_error_of_our_own_comes_out_and_leaves_nothing(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    before = threading.active_count()
    with FaultyServer() as server:
        monkeypatch.setattr("reasonrl.judges.server.request_body", broken)
        with pytest.raises(ZeroDivisionError, match="a bug"):
            Server("judge", server.url).ask([question(str(k)) for k in range(10)])
    assert threading.active_count() == before


# ---- settings ----


def test_settings_make_a_server_equal_and_hashable_and_travel():
    client = Server("judge", "http://127.0.0.1:9/v1/", extra={"seed": 1}, attempts=2)
    same = Server("judge", "http://127.0.0.1:9/v1", extra={"seed": 1}, attempts=2)
    assert client == same
    assert hash(client) == hash(same)
    assert client != evolve(client, extra={"seed": 2})
    for copied in (pickle.loads(pickle.dumps(client)), copy.deepcopy(client), evolve(client)):  # noqa: S301
        assert copied == client
        assert copied._shared is not client._shared
    record = json.loads(json.dumps(to_record(client, roots={"server": Server})))
    assert record == {
        "use": "server",
        "model": "judge",
        "url": "http://127.0.0.1:9/v1",
        "extra": {"seed": 1},
        "attempts": 2,
    }
    assert from_record(record, roots={"server": Server}) == client
    assert override(client, "timeout_s=5").timeout_s == 5


@pytest.mark.parametrize(
    "wrong",
    [{"concurrency": 0}, {"attempts": 0}, {"timeout_s": 0}, {"top_logprobs": 21}, {"structured": "regex"}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Server("judge", **wrong)


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(ConfigError, match="url must begin with http"):
        Server("judge", "localhost:8000")


@pytest.mark.parametrize(
    "url",
    [
        "http://judge:port/v1",
        "http://judge:99999/v1",
        "http:///v1",
        "http://[::1/v1",
        "http://j\u00f4dge/v1",
        "http://judge/v 1",
        "http://judge/v1\n",
        "http://judge/v1?version=2",
        "http://judge/v1#top",
    ],
)
def test_an_address_that_cannot_be_asked_is_refused(url):
    with pytest.raises(ConfigError, match="url must be a host") as refused:
        Server("judge", url)
    assert "\n" not in str(refused.value)


def test_a_password_in_an_address_is_refused_and_not_told():
    with pytest.raises(ConfigError, match="key_variable") as refused:
        Server("judge", "http://me:sesame@judge:8000/v1")
    assert "sesame" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1/", "https://judge", "http://judge:8000/a/v1"])
def test_any_other_address_is_taken(url):
    assert Server("judge", url).url == url.rstrip("/")


def test_the_identity_is_what_moves_answers():
    client = Server("judge", "http://here:1/v1", revision="abc", timeout_s=3)
    assert client.identity == "judge@abc"
    assert client.identity == evolve(client, url="http://there:2/v1", concurrency=1).identity
    moved = [evolve(client, **change) for change in ({"extra": {"seed": 1}}, {"top_logprobs": 5}, {"revision": ""})]
    assert len({client.identity, *(one.identity for one in moved)}) == 4


@pytest.mark.parametrize(
    ("model", "coordinates"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "pixels"),
        ("qwen2.5-vl", "pixels"),
        ("Qwen/Qwen3-VL-8B-Instruct-FP8", "thousandths"),
        ("Qwen/Qwen2-VL-2B-Instruct", "thousandths"),
    ],
)
def test_the_family_tells_how_boxes_are_written(model, coordinates):
    assert Server(model).coordinates == coordinates
    assert Server(model, box_coordinates="locations").coordinates == "locations"


def test_an_unknown_family_is_an_error_only_when_boxes_are_wanted():
    client = Server("judge")
    assert client.identity == "judge"
    with pytest.raises(ConfigError, match="cannot tell how 'judge' writes boxes: set box_coordinates"):
        _ = client.coordinates


# ---- the protocol, by another's word ----


def test_another_client_can_talk_to_the_server_of_these_tests():
    openai = pytest.importorskip("openai")
    content = [{"type": "text", "text": "is it so?"}]
    with (
        FaultyServer() as server,
        openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client,
    ):
        found = client.chat.completions.create(
            model="judge", messages=[{"role": "user", "content": content}], logprobs=True, top_logprobs=20
        )
    type(found).model_validate(found.model_dump(), strict=True)
    score = known_score("is it so?")
    assert found.choices[0].message.content == str(score)
    listed = found.choices[0].logprobs.content[0].top_logprobs
    assert {entry.token: entry.logprob for entry in listed} == known_log_probs(score)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


@pytest.mark.parametrize("answer", [Choice(("a", "b"), (1.0, 0.0)), yes_no(), Rubric(("reasoning",)), Boxes()])
def test_requests_are_of_the_type_that_another_client_sends(answer):
    pytest.importorskip("openai")
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
    from pydantic import TypeAdapter

    body = body_of(question("which?", [Image.new("RGB", (4, 4))], answer))
    types = TypeAdapter(CompletionCreateParamsNonStreaming)
    valid = types.validate_python(body)
    assert set(valid) == set(body)
    parts = [message["content"] for message in valid["messages"]]
    assert all(list(part) for part in parts)  # lists are validated when they are walked through
    with pytest.raises(ValueError, match="temperature"):
        types.validate_python({**body, "temperature": "hot"})
