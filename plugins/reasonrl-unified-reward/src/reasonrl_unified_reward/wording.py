"""What the models are asked, and how their answers are read.

The answers have the published forms, which is what the models were trained to write. The questions are our own words:
for the exact ones, give the `template`, `system` and `instruction` of the model's card.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from attrs import field

from reasonrl.judges.vlm import GUARD, OUT_OF_RANGE, REFUSED, UNPARSEABLE, shown

CAPTION = "{caption}"
"""Where a template wants the prompt's text, which arrives between marks that it cannot close."""

SYSTEM = f"You are a careful judge of generated images. {GUARD}"

POINTWISE = (
    "The image was generated from the caption below. Rate it from 1 (poor) to 5 (excellent): its alignment, how well"
    " it shows what the caption says; its coherence, how free it is of distortions and contradictions; its style, how"
    " good it looks whatever the caption says.\n\n{caption}"
)
SCORES = (
    "End with exactly these three lines, a number from 1 to 5 after each colon:\n"
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z"
)
FINAL = "End with exactly this line, a number from 1 to 5 after the colon:\nFinal Score: X"

PAIRWISE = (
    "Image 1 and Image 2, in this order, were both generated from the caption below. Compare how faithfully they show"
    " what it says, then how coherent and how good-looking they are, and decide which one is better.\n\n{caption}"
)
VERDICT = (
    "Reason between <think> and </think>, then end with one of <answer>Image 1 is better</answer>,"
    " <answer>Image 2 is better</answer> or <answer>Both images are equally good</answer>."
)

# Possessive where a run of spaces could be divided in many ways: replies are untrusted, and may be nothing else.
_MARK = re.compile(
    r"^(?:[^\S\n]|[*#-])*+(alignment|coherence|style|final)\s++score[\s*]*+(?:\(\s*1\s*-\s*5\s*\)[\s*]*+)?:[\s*]*+"
    r"(\d{1,3}(?:\.\d{1,6})?)(?:\s*/\s*5)?[\s*.]*$",
    re.MULTILINE | re.IGNORECASE,
)
_THOUGHT = re.compile(r"\A.*</think>", re.DOTALL | re.IGNORECASE)
_WINNER = re.compile(
    r"\A\s*+(?:<answer>\s*+)?(?:(?P<better>image\s+(?P<number>[12])\s+is\s+better)"
    r"|(?P<tie>both\s+images\s+are\s+equally\s+(?:good|bad)))\.?\s*+(?:</answer>\s*+)?\Z",
    re.IGNORECASE,
)


def template(default: str) -> Any:
    """Returns a field of a question's text, which must say where the caption goes."""

    def names_it(_: object, attribute: Any, value: str) -> None:
        if value.count(CAPTION) != 1:
            found = value.count(CAPTION)
            raise ValueError(
                f"{attribute.name} must hold {CAPTION} once, where the prompt's text goes: it does {found}x"
            )

    return field(default=default, validator=names_it, kw_only=True)


def marks(text: str, names: Sequence[str]) -> tuple[dict[str, float], str]:
    """Returns the marks 1 to 5 of these names, or none of them and the reason."""
    said = _THOUGHT.sub("", text)
    if not said.strip():
        return {}, f"{REFUSED}: an empty reply"
    found: dict[str, list[float]] = {}
    for match in _MARK.finditer(said):
        found.setdefault(match[1].casefold(), []).append(float(match[2]))
    unclear = [name for name in names if len(found.get(name, ())) != 1]
    if unclear:
        return {}, f"{UNPARSEABLE}: expected one mark of {', '.join(unclear)}, got {shown(said)}"
    outside = [f"{name} {found[name][0]:g}" for name in names if not 1 <= found[name][0] <= 5]
    if outside:
        return {}, f"{OUT_OF_RANGE}: {', '.join(outside)} is not in 1..5"
    return {name: found[name][0] for name in names}, ""


def first_wins(text: str) -> tuple[float | None, str]:
    """Returns 1 where the first picture is better, 0 where the second is, 0.5 for a tie; None and the reason else."""
    said = _THOUGHT.sub("", text)
    if not said.strip():
        return None, f"{REFUSED}: an empty reply"
    match = _WINNER.match(said)
    if match is None:
        return None, f"{UNPARSEABLE}: expected which image is better, got {shown(said)}"
    return (0.5, "") if match["tie"] else (float(match["number"] == "1"), "")
