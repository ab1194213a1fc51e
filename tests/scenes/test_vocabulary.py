import re

import numpy as np

from reasonrl.scenes import splits, vocabulary
from reasonrl.scenes.compose import demonstration

MARK_OR_COORDINATES = re.compile(r"<\|\w+\|>|\(\d+,\d+\),\(\d+,\d+\)")


def pieces(text):
    return re.findall(r"[a-z]+|\S", MARK_OR_COORDINATES.sub(" ", text.lower()))


def test_words_are_distinct_lower_case_and_in_a_fixed_order():
    words = vocabulary.words()
    assert len(words) == len(set(words))
    assert all(word == word.lower() and word.strip() for word in words)
    assert words == vocabulary.words()


def test_every_prompt_and_plan_is_covered():
    known, rng = set(vocabulary.words()), np.random.default_rng(0)
    for name in splits.NAMES:
        for text in splits.load(name):
            assert set(pieces(text)) <= known, text
    for text in splits.load("train")[:100]:
        assert set(pieces(demonstration(text, rng).plan_text)) <= known


def test_the_sentence_before_a_prompt_is_covered():
    assert set(pieces(vocabulary.SENTENCE)) <= set(vocabulary.words())
