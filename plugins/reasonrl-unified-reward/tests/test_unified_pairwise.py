import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations

import pytest
from attrs import frozen
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reasonrl_unified_reward import UnifiedReward, UnifiedRewardPairwise
from reasonrl_unified_reward.pairing import pairs_of
from reasonrl_unified_reward.wording import first_wins

from reasonrl import Prompt, Trajectory
from reasonrl.judges.server import Server
from reasonrl.judges.vlm import VLM, Reply
from reasonrl.testing import check_judge

ANSWERS = ("Image 1 is better", "Image 2 is better", "Both images are equally good")
ASKED = []


def gray(question):
    """The levels of the two pictures, by which they are told apart."""
    return tuple(image.getpixel((0, 0))[0] for image in question.images)


@frozen
class Brighter(VLM):
    """Prefers the brighter picture, after adding `bias` to the first; what `broken` names it cannot read."""

    bias: int = 0
    broken: tuple = ()
    identity = "brighter"
    log_probs = False
    coordinates = "pixels"

    def ask(self, questions):
        ASKED[:] = questions
        return [self.reply(question) for question in questions]

    def reply(self, question):
        first, second = gray(question)
        if (first, second) in self.broken:
            return Reply("I cannot say.", cost={"calls": 1.0})
        gap = first + self.bias - second
        said = ANSWERS[0 if gap > 0 else 1 if gap < 0 else 2]
        return Reply(f"<think>{ANSWERS[1]}?</think>\n<answer>{said}</answer>", cost={"calls": 1.0, "tokens_out": 9.0})


def group(*levels, prompt="p"):
    return [
        Trajectory(
            Prompt(prompt, "a red cup"), (k,),
            images={} if level is None else {"image": Image.new("RGB", (4, 4), (level, 0, 0))},
        )
        for k, level in enumerate(levels)
    ]  # fmt: skip


def totals(judge, rows):
    return [verdict.total() for verdict in judge.judge(rows)]


def test_it_keeps_the_contract_of_a_judge():
    check_judge(UnifiedRewardPairwise(Brighter()))
    check_judge(UnifiedRewardPairwise(Brighter(), opponents=1, orders=1))


def test_the_best_of_three_wins_both_and_ties_are_halves():
    assert totals(UnifiedRewardPairwise(Brighter()), group(10, 200, 90)) == [0, 1, 0.5]
    assert totals(UnifiedRewardPairwise(Brighter()), group(10, 10, 90)) == [0.25, 0.25, 1]


LEVELS = st.lists(st.integers(0, 255), min_size=2, max_size=9)
OPPONENTS = st.none() | st.integers(1, 9)


@given(LEVELS, OPPONENTS, st.sampled_from([1, 2]), st.integers(-300, 300), st.integers(0, 3))
def test_scores_of_a_group_average_one_half(levels, opponents, orders, bias, seed):
    judge = UnifiedRewardPairwise(Brighter(bias), opponents=opponents, orders=orders, seed=seed)
    found = totals(judge, group(*levels))
    assert sum(found) / len(found) == pytest.approx(0.5)
    assert all(0 <= value <= 1 for value in found)


@given(LEVELS, OPPONENTS, st.sampled_from([-1000, 1000]))
def test_a_constant_preference_for_a_place_cancels_exactly_with_two_orders(levels, opponents, bias):
    judge = UnifiedRewardPairwise(Brighter(bias), opponents=opponents)
    assert totals(judge, group(*levels)) == [0.5] * len(levels)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=8, unique=True), st.integers(0, 60))
def test_a_bias_never_puts_the_darker_picture_first(levels, bias):
    found = totals(UnifiedRewardPairwise(Brighter(bias)), group(*levels))
    by_level = [value for _, value in sorted(zip(levels, found, strict=True))]
    assert by_level == sorted(by_level)


@given(LEVELS, OPPONENTS)
def test_an_unbiased_model_says_the_same_in_one_order_as_in_two(levels, opponents):
    one, two = (UnifiedRewardPairwise(Brighter(), opponents=opponents, orders=k) for k in (1, 2))
    assert totals(one, group(*levels)) == pytest.approx(totals(two, group(*levels)))


# ---- who meets whom ----


@given(st.integers(1, 14), OPPONENTS, st.text(max_size=3))
def test_everybody_meets_equally_many_and_stands_first_as_often_as_second(size, opponents, seed):
    pairs = pairs_of(size, opponents, seed=seed)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(a != b for a, b in pairs)
    met = Counter(member for pair in pairs for member in pair)
    wanted = size - 1 if opponents is None else min(opponents, size - 1)
    assert {met[k] for k in range(size)} == {wanted + (wanted % 2 and size % 2)}
    first = Counter(a for a, _ in pairs)
    assert all(abs(2 * first[k] - met[k]) <= 1 for k in range(size))
    assert pairs == pairs_of(size, opponents, seed=seed)


def test_without_a_limit_all_pairs_meet():
    assert {frozenset(p) for p in pairs_of(5, None, seed="")} == {frozenset(p) for p in combinations(range(5), 2)}


def test_seeds_and_prompts_draw_other_opponents():
    drawn = {tuple(sorted(map(frozenset, pairs_of(12, 2, seed=seed)), key=sorted)) for seed in "abcdef"}
    assert len(drawn) > 1


def test_the_number_of_questions_is_as_documented():
    for settings, expected in (
        ({}, 240), ({"orders": 1}, 120), ({"opponents": 4}, 64), ({"opponents": 4, "orders": 1}, 32),
    ):  # fmt: skip
        UnifiedRewardPairwise(Brighter(), **settings).judge(group(*range(16)))
        assert len(ASKED) == expected


def test_pictures_of_other_prompts_are_never_compared():
    rows = group(10, 20, prompt="p") + group(110, 120, prompt="q")
    mixed = [rows[0], rows[2], rows[3], rows[1]]
    assert totals(UnifiedRewardPairwise(Brighter()), mixed) == [0, 0, 1, 1]
    assert {abs(a - b) for a, b in map(gray, ASKED)} == {10}


def test_the_order_of_rows_does_not_change_who_meets_whom():
    judge, rows = UnifiedRewardPairwise(Brighter(), opponents=2), group(*range(0, 200, 20))
    straight = totals(judge, rows)
    assert totals(judge, rows[::-1]) == straight[::-1]


# ---- what is left out ----


@pytest.mark.parametrize("broken", [(10, 200), (200, 10)])
def test_a_pair_with_one_unreadable_answer_is_left_out_and_no_half(broken):
    verdicts = UnifiedRewardPairwise(Brighter(broken=(broken,))).judge(group(10, 200, 90))
    assert [v.total() for v in verdicts] == [0, 1, 0.5]  # 90 has beaten 10 and lost to 200
    notes = [v.scores["UnifiedRewardPairwise"].note for v in verdicts]
    assert notes[0].startswith("1 of 2 comparisons: unparseable: expected which image is better")
    assert notes[2] == ""


def test_a_picture_without_a_valid_pair_abstains_with_the_reason():
    broken = tuple((a, b) for a in (10, 90, 200) for b in (10, 90, 200) if 10 in (a, b))
    verdicts = UnifiedRewardPairwise(Brighter(broken=broken)).judge(group(10, 200, 90))
    assert [v.total() for v in verdicts] == [None, 1, 0]
    assert verdicts[0].scores["UnifiedRewardPairwise"].note.startswith("unparseable: ")


def test_a_missing_image_is_a_zero_and_meets_nobody():
    verdicts = UnifiedRewardPairwise(Brighter()).judge(group(10, None, 90))
    assert [v.total() for v in verdicts] == [0, 0.0, 1]
    assert verdicts[1].scores["UnifiedRewardPairwise"].note == "no image"
    assert len(ASKED) == 2


def test_the_only_picture_of_a_prompt_abstains():
    verdicts = UnifiedRewardPairwise(Brighter()).judge(group(10, None))
    assert [v.total() for v in verdicts] == [None, 0.0]
    note = verdicts[0].scores["UnifiedRewardPairwise"].note
    assert note == "no comparison: no other picture of its prompt"


def test_costs_of_the_pictures_add_up_to_the_calls():
    verdicts = UnifiedRewardPairwise(Brighter()).judge(group(10, 200, 90, 30))
    costs = [v.scores["UnifiedRewardPairwise"].cost for v in verdicts]
    assert sum(cost["calls"] for cost in costs) == len(ASKED) == 12
    assert sum(cost["tokens_out"] for cost in costs) == 9 * 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Image 1 is better", 1.0),
        ("<answer>Image 2 is better</answer>", 0.0),
        ("<think>Image 1 is better</think><answer>Image 2 is better.</answer>", 0.0),
        ("<think>a</think> b </think> <ANSWER> image 1 is better </ANSWER>\n", 1.0),
        ("Both images are equally good.", 0.5),
        ("Image 3 is better", None),
        ("Image 1 is better. Image 2 is better.", None),
        ("Image 1 is not better", None),
        ("<think>long, and cut: Image 1 is better", None),
        ("", None),
    ],
)
def test_only_a_clear_winner_is_read(text, expected):
    value, note = first_wins(text)
    assert value == expected
    assert bool(note) == (expected is None)


@given(st.text())
def test_no_text_breaks_the_reader(text):
    value, note = first_wins(text)
    assert (value is None) == bool(note)


@pytest.mark.parametrize("wrong", [{"orders": 3}, {"opponents": 0}, {"max_tokens": 0}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UnifiedRewardPairwise(Brighter(), **wrong)


# ---- through a socket ----


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions as a Think model does; 500 to every third request."""

    protocol_version = "HTTP/1.1"
    requests_seen: list

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests_seen.append(body)
        content = body["messages"][-1]["content"]
        pictures = sum(part["type"] == "image_url" for part in content)
        said = "<think>They differ.</think><answer>Image 1 is better</answer>"
        if pictures == 1:
            said = "Alignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3"
        reply = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}], "usage": {}}
        failed = len(self.requests_seen) % 3 == 0
        raw = b"{}" if failed else json.dumps(reply).encode()
        self.send_response(500 if failed else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        """Silent."""


@pytest.fixture
def server():
    seen = []
    handler = type("Recording", (Handler,), {"requests_seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}/v1", seen
        httpd.shutdown()
        thread.join()


def test_both_judges_work_through_a_server(server):
    url, seen = server
    vlm = Server("unified", url, backoff_s=0.01, concurrency=2)
    verdicts = (UnifiedReward(vlm) + UnifiedRewardPairwise(vlm)).judge(group(10, 200, 90))
    assert [v.total() for v in verdicts] == [0.75 + 0.5] * 3  # it always prefers the first: two orders cancel it
    assert all("response_format" not in body for body in seen)
    assert {body["max_tokens"] for body in seen} == {512, 2048}
