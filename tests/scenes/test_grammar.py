import re
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl.errors import DataError
from reasonrl.relations import PHRASES, Relation
from reasonrl.scenes.grammar import (
    RELATIONS,
    SPOKEN,
    Request,
    Wanted,
    parse_prompt,
    write_prompt,
)
from reasonrl.scenes.world import COLORS, SHAPES, TEXTURES

LEFT, ABOVE, BELOW = Relation.LEFT, Relation.ABOVE, Relation.BELOW
kinds = st.builds(
    Wanted,
    st.sampled_from(SHAPES),
    st.none() | st.sampled_from(tuple(COLORS)),
    st.none() | st.sampled_from(TEXTURES[1:]),
)
relations = st.sampled_from(RELATIONS)


@st.composite
def requests(draw):
    form = draw(st.integers(0, 5))
    if form == 0:
        counted = draw(st.lists(kinds, min_size=1, max_size=2))
        wanted = [Wanted(k.shape, k.color, k.texture, draw(st.integers(1, 2))) for k in counted]
        return Request(tuple(wanted))
    links = {
        1: (),
        2: ((0, draw(relations), 1),),
        3: ((0, draw(relations), 1), (0, draw(relations), 2)),
        4: ((1, draw(relations), 2),),
        5: ((0, draw(relations), 1), (2, draw(relations), 3)),
    }[form]
    least = max([0, *(max(i, j) for i, _, j in links)]) + 1
    return Request(tuple(draw(st.lists(kinds, min_size=least, max_size=4))), links)


@given(requests(), st.sampled_from(("", "is")), st.data())
@settings(deadline=None, max_examples=200)
def test_what_is_written_is_read_back(request, verb, data):
    phrases = {r: data.draw(st.sampled_from(spoken)) for r, spoken in SPOKEN.items()}
    inverted = data.draw(st.booleans())
    text = write_prompt(request, phrases=phrases, verb=verb, inverted=inverted)
    assert parse_prompt(text) == request


@given(requests())
@settings(deadline=None, max_examples=50)
def test_case_spaces_and_a_full_stop_do_not_matter(request):
    text = write_prompt(request)
    assert parse_prompt("  " + text.upper().replace(" ", "   ") + " .") == request
    assert parse_prompt(re.sub(r"\b(a|an)\b", "the", text)) == request


@pytest.mark.parametrize(
    ("text", "category", "relations"),
    [
        ("a red circle and a blue square", "color", ()),
        ("a circle and a triangle", "shape", ()),
        ("a striped circle and a checkered square", "texture", ()),
        ("a red circle on the left of a blue square", "spatial", ((0, LEFT, 1),)),
        ("to the left of a blue square is a red circle", "spatial", ((0, LEFT, 1),)),
        ("three red circles and one square", "numeracy", ()),
        ("one square", "numeracy", ()),
        ("a striped circle above a square and a green cross", "complex", ((0, ABOVE, 1),)),
        (
            "a red circle left of a square and above a cross",
            "complex",
            ((0, LEFT, 1), (0, ABOVE, 2)),
        ),
        (
            "a circle above a square, and a cross below a diamond",
            "complex",
            ((0, ABOVE, 1), (2, BELOW, 3)),
        ),
    ],
)
def test_categories_and_relations_are_read(text, category, relations):
    request = parse_prompt(text)
    assert (request.category, request.relations) == (category, relations)


def test_inverted_phrasing_asks_for_the_same():
    plain = parse_prompt("a red circle to the left of a blue square")
    assert parse_prompt("to the left of a blue square is a red circle") == plain
    assert plain.wanted[0] == Wanted("circle", "red")


@pytest.mark.parametrize("phrase", [p for p, r in PHRASES.items() if r in RELATIONS])
def test_every_phrase_of_the_plan_is_read(phrase):
    assert parse_prompt(f"a circle {phrase} a square").relations == ((0, PHRASES[phrase], 1),)


def test_phrases_we_write_mean_what_they_should():
    assert all(PHRASES[phrase] is relation for relation in SPOKEN for phrase in SPOKEN[relation])
    assert set(SPOKEN) == set(RELATIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circel and a gren square", r"'circel' \(did you mean 'circle'\?\), 'gren'"),
        ("", "is empty"),
        (" . ", "is empty"),
        ("a circle square", 'expected "," or "and" between objects, found \'square\''),
        ("three circle", "expected 'circles', found 'circle'"),
        ("a red blue circle", "one colour and one texture"),
        ("a red and a circle", "expected a shape"),
        ("a circle and", "expected a shape .* found the end"),
        ("above a square", 'expected "is" .* found the end'),
        ("a circle and a square and above a cross", "an object before the relation"),
        ("a circle inside a square", "no relation 'inside'"),
        ("two circles above a square", "a relation links single objects"),
        ("three circles and two squares", "1 to 4 objects, got 5"),
    ],
)
def test_what_is_not_understood_is_named_in_one_line(text, message):
    with pytest.raises(DataError, match=message) as error:
        parse_prompt(text)
    assert "\n" not in str(error.value)


SOME_WORDS = ("a", "an", "red", "circle", "circles", "two", "is", ",", "and", "above", "left of")


@given(st.text(max_size=60) | st.lists(st.sampled_from(SOME_WORDS)).map(" ".join))
@settings(deadline=None, max_examples=300)
def test_any_text_is_read_or_refused_as_data(text):
    with suppress(DataError):
        assert 1 <= len(parse_prompt(text).instances) <= 4


def test_a_relation_that_no_clause_can_say_is_refused():
    circle, square = Wanted("circle"), Wanted("square")
    with pytest.raises(DataError, match="order of mention"):
        write_prompt(Request((circle, square), ((1, LEFT, 0),)))
