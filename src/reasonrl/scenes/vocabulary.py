"""The words of the drawn world, for a word-level tokenizer that adds coordinates and marks."""

from __future__ import annotations

from reasonrl.relations import PHRASES
from reasonrl.scenes.grammar import ARTICLES, NUMBERS, PLURALS, RELATIONS
from reasonrl.scenes.world import COLORS, SHAPES, TEXTURES

SENTENCE = "Follow the caption to generate an image through a chain of thought process:"
"""What GoT-R1 says before the prompt; its words are covered."""
JOINTS = ("and", "is", ",", ".", ":")


def words() -> tuple[str, ...]:
    """Returns each lower-case word and punctuation mark of prompts and plans, in a fixed order."""
    relating = sorted(
        {word for phrase, relation in PHRASES.items() if relation in RELATIONS for word in phrase.split()}
    )
    sentence = SENTENCE.lower().removesuffix(":").split()
    every = (
        *JOINTS,
        *ARTICLES,
        *NUMBERS,
        *COLORS,
        *TEXTURES,
        *SHAPES,
        *PLURALS.values(),
        *relating,
        *sentence,
    )
    return tuple(dict.fromkeys(every))
