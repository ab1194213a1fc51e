from collections import Counter
from itertools import combinations, islice, product

import pytest

from reasonrl.errors import DataError
from reasonrl.scenes import splits
from reasonrl.scenes.grammar import CATEGORIES, RELATIONS, parse_prompt
from reasonrl.scenes.world import COLORS, SHAPES, TEXTURES

TRAIN = [parse_prompt(text) for text in splits.load("train")]


def words_of(name):
    return {word for text in splits.load(name) for word in text.replace(",", " , ").split()}


def pairs_of(request):
    return {tuple(sorted(p)) for p in combinations([w.name for w in request.wanted], 2)}


def sides_of(request):
    names = [w.name for w in request.wanted]
    one = {(names[i], r.value, names[j]) for i, r, j in request.relations}
    return one | {(names[j], r.inverse.value, names[i]) for i, r, j in request.relations}


def counts_of(request):
    return {(w.count, w.name) for w in request.wanted if w.count > 1}


@pytest.mark.timeout(60)
def test_the_packaged_files_are_what_build_makes():
    assert splits.build() == {name: splits.load(name) for name in splits.NAMES}


def test_sizes_are_as_promised_and_categories_balanced():
    for name in splits.NAMES:
        texts = splits.load(name)
        assert len(texts) == splits.SIZE_OF[name] == len(set(texts))
    shares = Counter(request.category for request in TRAIN)
    assert set(shares) == set(CATEGORIES)
    assert min(n for category, n in shares.items() if category != "shape") >= 220
    assert shares["shape"] > 50  # there are only so many


def test_no_prompt_is_in_two_splits():
    texts = [text for name in splits.NAMES for text in splits.load(name)]
    assert len(texts) == len(set(texts))


def test_held_out_asks_for_a_pair_or_a_side_that_train_never_has():
    pairs = set().union(*map(pairs_of, TRAIN))
    sides = set().union(*map(sides_of, TRAIN))
    for text in splits.load("held_out"):
        request = parse_prompt(text)
        assert pairs_of(request) - pairs or sides_of(request) - sides, text


def test_no_stream_of_training_prompts_ever_leaks():
    for text in islice(splits.stream("train", seed=7), 2000):
        request = parse_prompt(text)
        assert splits.split_of(text) == "train"
        assert not splits.holds_out(request)
        assert not splits.holds_out_count(request)
        assert len(request.instances) <= splits.MOST_TRAINED
        assert text.split()[0] in ("a", "an", "one", "two", "three")


def test_counts_asks_for_a_number_of_a_kind_that_train_never_has():
    trained = set().union(*map(counts_of, TRAIN))
    for text in splits.load("counts"):
        request = parse_prompt(text)
        assert counts_of(request) - trained, text
        assert len(request.instances) <= 3


def test_longer_prompts_have_four_objects_and_the_others_at_most_three():
    for name in splits.NAMES:
        numbers = {len(parse_prompt(text).instances) for text in splits.load(name)}
        assert numbers <= ({4} if name == "longer" else {1, 2, 3})


def test_inverted_prompts_are_the_only_ones_in_that_form():
    for name in splits.NAMES:
        starts = {text.split()[0] in ("a", "an", "one", "two", "three") for text in splits.load(name)}
        assert starts == {name != "inverted"}


def test_every_split_can_be_reached_from_train():
    """All kinds, relations and words of the test splits occur in train."""
    wanted = [w for request in TRAIN for w in request.wanted]
    assert {(w.color, w.shape) for w in wanted if w.color} == set(product(COLORS, SHAPES))
    assert {(w.texture, w.shape) for w in wanted if w.texture} == set(product(TEXTURES[1:], SHAPES))
    assert {r for request in TRAIN for _, r, _ in request.relations} == set(RELATIONS)
    assert {(w.count, w.shape) for w in wanted} >= set(product((1, 2), SHAPES))
    for name in splits.NAMES:
        assert words_of(name) <= words_of("train"), name


def test_streams_repeat_with_their_seed():
    one, two, other = (tuple(islice(splits.stream("train", seed=seed), 20)) for seed in (3, 3, 4))
    assert one == two != other


def test_an_unknown_split_is_refused_with_a_suggestion():
    with pytest.raises(DataError, match=r"unknown split .*'tain': did you mean 'train'"):
        splits.load("tain")
