"""Briefs: what one picture is drawn from, out of what a policy wrote."""

from __future__ import annotations

import re
from typing import Literal

from attrs import evolve

from reasonrl.plan import BOX_END, BOX_START, OBJ_END, OBJ_START, Plan
from reasonrl.renderers.family import Brief
from reasonrl.types import FAULT, Stop, Trajectory

Text = Literal["plan", "prompt", "both"]
WithoutPlan = Literal["prompt", "nothing", "unscored"]
_BOXES = re.compile(rf"{re.escape(BOX_START)}.*?({re.escape(BOX_END)}|$)", re.DOTALL)
_MARKS = re.compile("|".join(re.escape(mark) for mark in (OBJ_START, OBJ_END, BOX_START, BOX_END)))


def briefed(trajectory: Trajectory, *, text: Text, without_plan: WithoutPlan) -> tuple[Trajectory, Brief | None]:
    """Returns the trajectory and what to draw for it; None for a picture that `without_plan` leaves undrawn."""
    prompt, reasoning = trajectory.prompt, trajectory.reasoning
    objects = tuple(o for o in Plan.parse(reasoning).objects if o.box is not None) if reasoning else ()
    if reasoning is None or (not objects and without_plan == "prompt"):
        return trajectory, Brief(prompt.text, (), prompt.image)
    if not objects:
        return faulty(trajectory, "a plan without boxes") if without_plan == "unscored" else trajectory, None
    words = prose(reasoning)
    said = {"plan": words, "prompt": prompt.text, "both": f"{prompt.text} {words}"}[text]
    return trajectory, Brief(said, objects, prompt.image)


def faulty(trajectory: Trajectory, why: str) -> Trajectory:
    """Returns it as one that could not be drawn, by nobody's merit: it is left unscored."""
    return evolve(trajectory, stop=Stop.FAULT, artifacts={**trajectory.artifacts, FAULT: why})


def prose(reasoning: str) -> str:
    """Returns a plan's words without marks and coordinates."""
    return " ".join(_MARKS.sub("", _BOXES.sub("", reasoning)).split()).replace(" ,", ",").replace(" .", ".")
