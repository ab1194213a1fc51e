"""What a prompt asks for that boxes can show: counts and relations, and the words of a name that tell what it is.

    read_prompt("three dogs next to a cat")
    # Asked(counts=(("dog", 3),), relations=(("dog", <Relation.NEXT_TO>, "cat"),))

What English says in other ways ("flanked by", "behind") is not read: such a prompt is for a judge that can read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from attrs import frozen

from reasonrl.relations import Relation, find_relation

NUMBERS = {
    word: k
    for k, word in enumerate(
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"), 1
    )
}
MOST = 20
"""The largest number in digits that is a count; "1990" is not."""


@frozen
class Asked:
    """The counts and relations of a prompt; names are singular, with their adjectives, without article."""

    counts: tuple[tuple[str, int], ...] = ()
    relations: tuple[tuple[str, Relation, str], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What to look for, each name once."""
        related = (name for first, _, second in self.relations for name in (first, second))
        return tuple(dict.fromkeys([*(name for name, _ in self.counts), *related]))


@lru_cache(maxsize=4096)
def read_prompt(text: str) -> Asked:
    """Returns what a prompt asks for that boxes can show; empty where it names neither a relation nor a count.

    A number counts the noun behind it. "a" and "an" count one only in a list that has a number ("two dogs and a cat").
    """
    return Asked(tuple(_counts(_tokens(text)).items()), tuple(_relations(text)))


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|\d+|[^\w\s]")
_ARTICLES = frozenset({"a", "an"})
_DETERMINERS = _ARTICLES | _set(
    "the this that these those some several many few each every another other his her its their my your our"
)
_BREAKS = _set(
    "and or but while with without in on at of to from by for into onto over under underneath beneath below above"
    " near beside next behind between among along alongside around across against through inside within outside"
    " toward towards down up off past during away like as than where who which that there here left right top bottom"
    " close adjacent front both all not never"
)
_VERBS = _set(
    "is are was were be been being has have had do does did can could will would may sit sits sat stand stands"
    " stood lie lies lit lay hang hangs hung run runs ran swim swims swam fly flies flew ring rings rang sing sings"
    " sang eat eats ate drink drinks drank sleep sleeps slept stick sticks stuck ride rides rode drive drives drove"
    " fall falls fell hold holds held keep keeps kept wear wears wore grow grows grew shine shines shone swing"
    " swings swung blow blows blew make makes made take takes took speed sped sweep swept go goes went come comes"
    " came lean leans rest rests"
)
_NOT_VERBS = _set(
    "red bed shed sled seed weed reed breed bread steed striped checkered spotted dotted colored coloured painted"
    " framed patterned curved pointed rounded carved folded polished faded rusted glazed wooded bearded tattered"
    " quilted stuffed painting building ceiling earring ring king wing string spring swing pudding clothing dumpling"
    " duckling awning wedding drawing railing sling thing sibling stocking"
)
"""Nouns and adjectives that end like verbs."""


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


def _number(token: str) -> int | None:
    if token.isdecimal():
        return int(token) if len(token) <= 2 and 1 <= int(token) <= MOST else None
    return NUMBERS.get(token)


def _counts(tokens: Sequence[str]) -> Counter[str]:
    """Returns how many of each name are asked for."""
    found: Counter[str] = Counter()
    if not any(_number(token) and _noun(tokens, i + 1, _number(token)) for i, token in enumerate(tokens)):
        return found
    for i, token in enumerate(tokens):
        number = _number(token)
        if number is None and token in _ARTICLES and (i == 0 or tokens[i - 1] in (",", "and", "&", ";", ":")):
            number = 1
        words = _noun(tokens, i + 1, number) if number else ()
        of_something = tokens[i + 1 + len(words) :][:1] == ["of"]  # "a photo of", "a pair of"
        if number and words and not of_something:
            found[_named(words)] += number
    return found


def _noun(tokens: Sequence[str], start: int, number: int | None) -> tuple[str, ...]:
    """Returns the words of the noun phrase that begins there, without its determiner.

    It ends before a preposition, a verb or a stop; where several are counted, with its first plural.
    """
    words: list[str] = []
    for i in range(start, len(tokens)):
        if not _is_noun_like(tokens, i, words, number):
            break
        words.append(tokens[i])
        if (number or 1) > 1 and singular(tokens[i]) != tokens[i]:
            break
    return tuple(words)


def _is_noun_like(tokens: Sequence[str], i: int, words: Sequence[str], number: int | None) -> bool:
    word = tokens[i]
    if not word[0].isalpha() or word in _BREAKS or word in _DETERMINERS or word in NUMBERS:
        return False
    if not words:
        determined = i > 0 and (tokens[i - 1] in _DETERMINERS or _number(tokens[i - 1]) is not None)
        return determined or word not in _VERBS  # "a fly"
    if word in _VERBS or word.endswith("ly"):
        return False
    # "a cup filled ..", "one dog jumps over .."; but "a swimming pool", "one glass vase".
    following = tokens[i + 1] if i + 1 < len(tokens) else "."
    last = not following[0].isalpha() or following in _BREAKS | _DETERMINERS or following in NUMBERS
    verbal = word.endswith("ed") or (last and (word.endswith("ing") or (number == 1 and singular(word) != word)))
    return not verbal or word in _NOT_VERBS


def _named(words: Sequence[str]) -> str:
    return " ".join([*words[:-1], singular(words[-1])])


_NEGATED = re.compile(r"\b(?:not|never|\w+n['’]t)\b")


def _relations(text: str) -> Iterator[tuple[str, Relation, str]]:
    """Yields each relation between the noun phrases on its two sides, from left to right.

    "a cup on a plate" is none: "on" alone has no phrase; nor is one behind "not". Behind "and", a relation has the
    subject before it.
    """
    subject: str | None = None
    while found := find_relation(text):
        left, relation, text = found
        clause = re.split(r"[,;:.]|\band\b", left.lower())[-1]
        subject = _first_noun(_tokens(clause)) or subject
        other = _first_noun(_tokens(text))
        if subject and other and not _NEGATED.search(clause):
            yield subject, relation, other


def _first_noun(tokens: Sequence[str]) -> str | None:
    """Returns the name of the first noun phrase, or None where there is none."""
    number: int | None = None
    for i, token in enumerate(tokens):
        if token in _DETERMINERS or _number(token):
            number = _number(token)
        elif words := _noun(tokens, i, number):
            return _named(words)
        else:
            return None
    return None


# ---- names ----

_IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "mice": "mouse",
    "geese": "goose",
    "feet": "foot",
    "teeth": "tooth",
    "oxen": "ox",
    "dice": "die",
    "lenses": "lens",
    "buses": "bus",
    "gases": "gas",
    "axes": "axe",
    "quizzes": "quiz",
}
_UNCHANGED = _set("gas lens canvas atlas series species news")
_IES = _set("pies ties cookies movies zombies brownies smoothies hoodies selfies veggies genies birdies magpies")
_VES = {
    f"{stem}ves": f"{stem}{end}"
    for end, stems in {
        "f": _set("lea loa shel wol cal hal scar el hoo thie shea wharf"),
        "fe": _set("kni wi li"),
    }.items()
    for stem in stems
}
_OES = _set("shoes toes hoes canoes oboes horseshoes snowshoes")
_CHES = _set("aches headaches caches")


def singular(word: str) -> str:
    """Returns a lower-case English noun in the singular; one that is no plural stays as it is.

    >>> [singular(word) for word in ("dogs", "boxes", "knives", "berries", "mice", "glass", "sheep")]
    ['dog', 'box', 'knife', 'berry', 'mouse', 'glass', 'sheep']
    """
    for plural, single in _IRREGULAR.items():  # policemen, grandchildren
        if word == plural or (len(plural) > 3 and word.endswith(plural)):
            return word[: len(word) - len(plural)] + single
    if word.endswith("men") and len(word) > 4 and word not in ("specimen", "stamen", "abdomen", "regimen", "ramen"):
        return f"{word[:-3]}man"
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")) or word in _UNCHANGED:
        return word
    if word in _VES:
        return _VES[word]
    if word.endswith("ies") and word not in _IES:
        return f"{word[:-3]}y"
    hissing = word.endswith(("sses", "xes", "shes", "uses")) and word not in ("houses", "mouses", "blouses", "spouses")
    if (hissing and not re.search(r"[aeou]uses$", word)) or (word.endswith("ches") and word not in _CHES):
        return word[:-2]
    return word[:-2] if word.endswith("oes") and word not in _OES else word[:-1]


_COLLECTIONS = _set("pair group bunch set couple pack flock herd crowd row stack pile")


@lru_cache(maxsize=4096)
def name_words(name: str) -> tuple[str, ...]:
    """Returns the words of a name, singular, up to its head noun: ("brown", "horse") for "a brown horse in a field"."""
    words: list[str] = []
    for token in _tokens(name):
        if token == "of" and words and words[-1] in _COLLECTIONS:
            words = []
        elif token in _BREAKS and words:
            break
        elif token[0].isalpha() and token not in _DETERMINERS and token not in NUMBERS:
            words.append(singular(token))
    return tuple(words)
